"""The parts of stage two: settings, schedule, checkpoints and the report."""
