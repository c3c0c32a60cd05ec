"""Server, web page and offline speech."""
