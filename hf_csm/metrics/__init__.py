"""`evaluate` modules, one file each. None yet."""
