"""What the verbs of hf-csm take and do; everything heavy is imported when one runs."""
