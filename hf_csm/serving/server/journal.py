"""The server's log: an event and its fields on a line. Never audio, text, tokens or queries."""

from __future__ import annotations

import json
import logging


LOGGER = logging.getLogger("hf_csm.serving")


def write(event: str, *, is_error: bool = False, **fields: object) -> None:
    """Log an event; `write("request", path="/")` -> `request path="/"`."""
    line = " ".join((event, *(f"{name}={json.dumps(value)}" for name, value in fields.items())))
    LOGGER.log(logging.ERROR if is_error else logging.INFO, line)
