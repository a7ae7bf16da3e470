"""Reads compiled programs as text, and counts what they move and compute."""
