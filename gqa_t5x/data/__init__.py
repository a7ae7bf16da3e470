"""Data as seqio tasks, and the text corpus that needs no network."""
