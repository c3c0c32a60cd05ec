"""Connections with bounded input buffers, and refused connections."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from aiohttp import web


READ_AHEAD_BYTES = 512 * 1024
"""aiohttp pauses reading with 128 KB of messages queued; the last read adds up to 256 KB."""


class Connection(web.RequestHandler):
    """aiohttp's connection with a bounded input buffer: `max_msg_size` is checked only when a frame is complete.

    Attributes:
        max_message_bytes: None while the connection is plain HTTP.
        num_bytes: bytes received since the last complete message; the session resets it.
        on_too_large: called when the current message exceeds the limit.
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
                return
        super().data_received(data)


class Refusal(asyncio.Protocol):
    """A connection beyond the limit, closed at once."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        transport.abort()
