"""From a training checkpoint to files that moshi's own loader and server read."""
