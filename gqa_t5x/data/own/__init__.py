"""Text, and inputs with targets, of the user's own: files as tasks of seqio."""
