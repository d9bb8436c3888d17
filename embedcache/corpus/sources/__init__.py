"""Where documents come from: files, folders, tables, data sets, the standard library."""
