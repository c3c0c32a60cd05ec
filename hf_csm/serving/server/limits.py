"""Limits of a session and of a connection."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from hf_csm.units import Seconds


MAX_REASON_BYTES = 123
"""Maximum length of the reason in a WebSocket close frame."""


@dataclass(frozen=True)
class Limits:
    """Limits of a session and of a connection; moshi's own clients stay far below them.

    Attributes:
        max_message_bytes: of one WebSocket message.
        max_control_bytes: of one control message.
        messages_per_s: sustained rate of messages without audio. Audio is paced by the engine.
        messages_burst: burst size of such messages.
        max_backlog_s: user audio queued for the engine; beyond it, the server stops reading.
        max_unsent_s: model audio in the send queue, in addition to 128 KB in the socket buffer.
        max_conversation_s: length of a session.
        idle_s: time without audio from the client.
        heartbeat_s: time without a message after which a ping is sent; half of it later the client counts as gone.
        closing_s: time to answer a close frame.
        request_s: time for a connection to make a request.
        max_connections: open connections, including those without a session.
        check_s: interval between checks of the above.
    """

    max_message_bytes: int = 256 * 1024
    max_control_bytes: int = 4096
    messages_per_s: float = 200.0
    messages_burst: int = 1000
    max_backlog_s: Seconds = 2.0
    max_unsent_s: Seconds = 8.0
    max_conversation_s: Seconds = 3600.0
    idle_s: Seconds = 60.0
    heartbeat_s: Seconds = 16.0
    closing_s: Seconds = 3.0
    request_s: Seconds = 10.0
    max_connections: int = 256
    check_s: Seconds = 1.0


class TokenBucket:
    """Rate limiter: `per_s` sustained, `burst` at once."""

    def __init__(self, per_s: float, burst: int, clock: Callable[[], float] = time.monotonic):
        self._per_s, self._burst, self._clock = per_s, float(burst), clock
        self._level, self._since = float(burst), clock()

    def take(self) -> bool:
        """Take one token; return False if none is left."""
        now = self._clock()
        self._level = min(self._burst, self._level + (now - self._since) * self._per_s)
        self._since = now
        if self._level < 1:
            return False
        self._level -= 1
        return True


def close_reason(text: str) -> bytes:
    """Encode the reason of a close frame, truncated to the maximum length between characters."""
    return text.encode()[:MAX_REASON_BYTES].decode(errors="ignore").encode()
