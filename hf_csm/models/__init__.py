"""Model families behind one record: see `family`."""
