"""Shared by all stages: row schemas, labels, audio, text, and the table."""
