"""Rows and events that runs left."""
