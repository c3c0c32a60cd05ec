"""Prepared table or recorded dialogues to a table of codes, and out again in moshi-finetune's format."""
