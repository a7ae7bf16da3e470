"""Runs stages side by side, each in a process of its own. Knows nothing of T5."""
