"""Connections that may not hold more memory than a message needs, and those that are one too many."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from aiohttp import web


READ_AHEAD_BYTES = 512 * 1024
"""aiohttp stops reading with 128 KB of messages waiting; the last read adds up to 256 KB."""


class Connection(web.RequestHandler):
    """aiohttp's, with a bound: it would keep a frame that says it has 8 exabytes for as long as these keep coming.

    Attributes:
        max_message_bytes: None as long as it is plain HTTP.
        num_bytes: that came since `num_bytes` was last set to 0, which is when a message was taken.
        on_too_large: called once when these cannot be a message any more.
    """

    max_message_bytes: int | None = None
    num_bytes = 0
    on_too_large: Callable[[], None] | None = None

    def data_received(self, data: bytes) -> None:
        if self.max_message_bytes is not None:
            self.num_bytes += len(data)
            if self.num_bytes > self.max_message_bytes + READ_AHEAD_BYTES:
                if self.on_too_large is not None:
                    self.on_too_large()
                return  # the rest of it is not kept
        super().data_received(data)


class Refusal(asyncio.Protocol):
    """A connection too many."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        transport.abort()
