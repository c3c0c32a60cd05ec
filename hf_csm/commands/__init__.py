"""The commands of `hf-csm`."""
