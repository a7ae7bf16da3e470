"""The tables and figures of the report, one file each."""
