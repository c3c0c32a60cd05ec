"""Export, model card, licenses, and the Hub."""
