"""The report: one document writer, one file a table."""
