"""What all stages share: row schemas, labels, audio, text, and the table."""
