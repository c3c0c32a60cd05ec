"""Raw corpus to a prepared table of utterances."""
