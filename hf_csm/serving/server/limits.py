"""What a client may ask of the server before its conversation is ended, and how that is said."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from hf_csm.units import Seconds


LONGEST_REASON = 123
"""Bytes that a WebSocket close frame has for its reason."""


@dataclass(frozen=True)
class Limits:
    """Bounds of a conversation and of a connection; stock clients stay far within them.

    Attributes:
        max_message_bytes: of one WebSocket message.
        max_control_bytes: of one control message.
        messages_per_s: messages that bring no audio, in the long run. Those that do are paced by the engine.
        messages_burst: such messages at once.
        max_backlog_s: audio of the user that waits for the engine; what is beyond is left unread on the line.
        max_unsent_s: audio of Moshi that waits for the reader, on top of 128 KB in the system's buffer.
        max_conversation_s: from handshake to end.
        idle_s: without audio from the client.
        ping_s: without any message, after which the client is asked whether it is there.
        vanished_s: without any message, after which it is taken to be gone.
        closing_s: for the client to answer a close frame, then the connection is cut.
        request_s: for a connection to make a request.
        max_connections: at once, those without a conversation included.
        check_s: between two looks at the above.
    """

    max_message_bytes: int = 256 * 1024
    max_control_bytes: int = 4096
    messages_per_s: float = 200.0
    messages_burst: int = 1000
    max_backlog_s: Seconds = 2.0
    max_unsent_s: Seconds = 8.0
    max_conversation_s: Seconds = 3600.0
    idle_s: Seconds = 60.0
    ping_s: Seconds = 10.0
    vanished_s: Seconds = 25.0
    closing_s: Seconds = 3.0
    request_s: Seconds = 10.0
    max_connections: int = 256
    check_s: Seconds = 1.0


class TokenBucket:
    """Lets `per_s` through in the long run and `burst` at once."""

    def __init__(self, per_s: float, burst: int, clock: Callable[[], float] = time.monotonic):
        self._per_s, self._burst, self._clock = per_s, float(burst), clock
        self._level, self._since = float(burst), clock()

    def take(self) -> bool:
        """Take one, or return False when there is none left."""
        now = self._clock()
        self._level = min(self._burst, self._level + (now - self._since) * self._per_s)
        self._since = now
        if self._level < 1:
            return False
        self._level -= 1
        return True


def close_reason(text: str) -> bytes:
    """Return `text` as the reason of a close frame, cut where it is too long, between two characters."""
    return text.encode()[:LONGEST_REASON].decode(errors="ignore").encode()
