"""From raw corpora to batches: rows, conversations, codes, mixture, layout."""
