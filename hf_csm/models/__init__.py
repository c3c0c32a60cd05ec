"""Model families behind one contract: codes in, negative log likelihood per token out."""
