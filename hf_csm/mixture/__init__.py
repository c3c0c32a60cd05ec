"""Tables to one balanced stream: windows, batches, `interleave_corpora`."""
