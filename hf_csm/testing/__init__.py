"""Tiny checkpoints and synthetic corpora for users' own tests."""
