"""Where documents come from: text files, record files, folders, data sets, the standard library."""
