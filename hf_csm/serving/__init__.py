"""Our own server. Not yet: adapters are served by `python -m moshi.server`."""
