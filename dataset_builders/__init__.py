"""One corpus per file. Open them with `hf_csm.load_corpus`."""
