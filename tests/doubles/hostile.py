"""Clients that break every rule of a speech server's WebSocket protocol, to test that the server survives them.

counts = asyncio.run(pester(port, num_messages=1000, seed=0))      # malformed, oversized, truncated, out of order
counts = asyncio.run(abort(port, num_connections=100, seed=0))     # before the handshake, in a frame, by reset
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import socket
import struct
from collections import Counter
from collections.abc import Iterator

import numpy as np
import sphn

from hf_csm.units import SAMPLE_RATE, SAMPLES_PER_FRAME
from tests.doubles.waiting import GUARD_S


BINARY, TEXT, CLOSE, PING = 2, 1, 8, 9
OVERSIZED_BYTES = 1 << 20
QUERIES = ("", "?audio=pcm", "?events=1", "?audio=pcm&events=1", "?strength=7", "?emotion=%00&voice=%ff", "?seed=-1")
JSON_VALUES: tuple[object, ...] = (None, True, -1, 1e308, float("nan"), "happy", "\x00", "x" * 500, [], {}, 10**400)


def opus_stream(num_frames: int = 30) -> list[bytes]:
    """Return noise as messages of Ogg Opus, a frame of 80 ms each; the first holds the headers."""
    writer, noise = sphn.OpusStreamWriter(SAMPLE_RATE), np.random.default_rng(0)
    frames = (0.1 * noise.normal(size=(num_frames, SAMPLES_PER_FRAME))).astype(np.float32)
    return [writer.append_pcm(frame) for frame in frames]


def ws_frame(payload: bytes, opcode: int = BINARY, *, flags: int = 0x80, is_masked: bool = True) -> bytes:
    """Return a WebSocket frame as a client sends it, masked with zeros."""
    size, mask = len(payload), 0x80 if is_masked else 0
    if size < 126:
        header = bytes([flags | opcode, mask | size])
    elif size < 1 << 16:
        header = bytes([flags | opcode, mask | 126]) + struct.pack(">H", size)
    else:
        header = bytes([flags | opcode, mask | 127]) + struct.pack(">Q", size)
    return header + (bytes(4) if is_masked else b"") + payload


def bad_messages(seed: int) -> Iterator[bytes]:
    """Yield frames to send one after the other, without end; which rule they break changes from time to time."""
    chance, stream = random.Random(seed), opus_stream()
    ways = (_noise, _truncated, _flipped, _out_of_order, _pages, _control, _oversized, _protocol)
    while True:
        way = chance.choice(ways)
        for _ in range(chance.randrange(1, 12)):
            yield way(chance, stream)


def _noise(chance: random.Random, stream: list[bytes]) -> bytes:
    return ws_frame(chance.randbytes(chance.choice((0, 1, 2, 30, 1000))))


def _truncated(chance: random.Random, stream: list[bytes]) -> bytes:
    message = chance.choice(stream)
    return ws_frame(b"\x01" + message[: chance.randrange(len(message))])


def _flipped(chance: random.Random, stream: list[bytes]) -> bytes:
    message = bytearray(chance.choice(stream))
    for _ in range(chance.randrange(1, 5)):
        message[chance.randrange(len(message))] = chance.randrange(256)
    return ws_frame(b"\x01" + message)


def _out_of_order(chance: random.Random, stream: list[bytes]) -> bytes:
    """A stream's messages in any order, headers again in the middle, and kinds that only servers send."""
    kind = chance.choice((b"\x01", b"\x01", b"\x01", b"\x00", b"\x02", b"\x03"))
    return ws_frame(kind + chance.choice(stream))


def _pages(chance: random.Random, stream: list[bytes]) -> bytes:
    """Ogg pages that are well formed and hold packets that are not."""
    lacing = [chance.choice((0, 1, 3, 60, 255)) for _ in range(chance.randrange(256))]
    head = b"OggS\0" + bytes([chance.randrange(8)]) + chance.randbytes(20)
    return ws_frame(b"\x01" + head + bytes([len(lacing), *lacing]) + chance.randbytes(sum(lacing)))


def _control(chance: random.Random, stream: list[bytes]) -> bytes:
    message = {"type": chance.choice(("steer", "steer", "stop", None))}
    for key in chance.sample(("emotion", "voice", "strength", "now", "mood"), 3):
        message[key] = chance.choice(JSON_VALUES)  # type: ignore[assignment]
    text = json.dumps(message)
    text = chance.choice((text, text[: len(text) // 2], "[" * 3000, "\ud83d\ude00", '"' + "x" * 9000 + '"'))
    return ws_frame(text.encode(errors="replace"), TEXT)


def _oversized(chance: random.Random, stream: list[bytes]) -> bytes:
    return ws_frame(b"\x01" + bytes(OVERSIZED_BYTES), chance.choice((BINARY, TEXT)))


def _protocol(chance: random.Random, stream: list[bytes]) -> bytes:
    return chance.choice(
        (
            ws_frame(b"\xff\xfe\xfd", TEXT),
            ws_frame(b"", 3),
            ws_frame(b"x", flags=0xF0),
            ws_frame(b"x" * 200, PING),
            ws_frame(b"ping", PING),
            ws_frame(b"\x01", 0),
            ws_frame(b"\x01x", flags=0),
            ws_frame(b"\x01x", is_masked=False),
            ws_frame(b"\x00", CLOSE),
            ws_frame(struct.pack(">H", 1005), CLOSE),
            b"\x82\xff" + struct.pack(">Q", 2**63 - 1) + bytes(4),
            b"\x82\xff" + struct.pack(">Q", 2**64 - 1) + bytes(4),
        )
    )


def request(port: int, query: str = "") -> bytes:
    """Return the request that opens a conversation."""
    return (
        f"GET /api/chat{query} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
        "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
    ).encode()


async def pester(port: int, num_messages: int, seed: int) -> Counter[str]:
    """Send bad messages to the server on `port`, in as many conversations as it takes; one after the other.

    Returns:
        `messages` and `conversations`, and how often each close code came; `cut` where none did.
    """
    chance, messages, counts = random.Random(seed), bad_messages(seed), Counter[str]()
    while counts["messages"] < num_messages:
        counts["conversations"] += 1
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
        except OSError:
            counts["not connected"] += 1
            continue
        reading = asyncio.create_task(_last_words(reader))
        with contextlib.suppress(OSError):
            writer.write(request(port, chance.choice(QUERIES)))
            for _ in range(chance.randrange(1, 40)):
                writer.write(next(messages))
                counts["messages"] += 1
                await writer.drain()
                if chance.random() < 0.3:
                    await asyncio.sleep(0)
                if reading.done():
                    break
            if writer.can_write_eof():
                writer.write(ws_frame(struct.pack(">H", 1000), CLOSE))
        counts[await asyncio.wait_for(reading, GUARD_S)] += 1
        writer.transport.abort()
    return counts


async def _last_words(reader: asyncio.StreamReader) -> str:
    """Read to the end; return the code of the close frame, or `cut`."""
    try:
        status = (await reader.readuntil(b"\r\n\r\n")).split(b" ", 2)[1]
        if status != b"101":
            return f"http {status.decode()}"
        while True:
            first, size = await reader.readexactly(2)
            size = struct.unpack(">H", await reader.readexactly(2))[0] if size == 126 else size
            payload = await reader.readexactly(size)
            if first & 0xF == CLOSE:
                return f"close {struct.unpack('>H', payload[:2])[0]}" if payload else "close"
    except (asyncio.IncompleteReadError, OSError):
        return "cut"


async def abort(port: int, num_connections: int, seed: int, num_at_once: int = 8) -> Counter[str]:
    """Open connections to the server on `port` and leave them in the rudest ways; return how often each."""
    chance, counts = random.Random(seed), Counter[str]()
    todo = iter(range(num_connections))
    stream = opus_stream(3)

    async def leave() -> None:
        for _ in todo:
            how = chance.choice(("at once", "in the request", "after it", "in a frame", "in the audio", "unread"))
            by_reset = chance.random() < 0.5
            counts[f"{how}{', by reset' if by_reset else ''}"] += 1
            with contextlib.suppress(OSError, asyncio.IncompleteReadError):
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
                line = writer.get_extra_info("socket")
                if by_reset:
                    line.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                query = chance.choice(QUERIES[:4])
                if how == "in the request":
                    writer.write(request(port, query)[: chance.randrange(1, 100)])
                elif how != "at once":
                    writer.write(request(port, query))
                    if how != "after it":
                        await reader.readuntil(b"\r\n\r\n")
                if how == "in a frame":
                    writer.write(ws_frame(b"\x01" + stream[0])[: chance.randrange(1, 400)])
                elif how in ("in the audio", "unread"):
                    for message in stream:
                        writer.write(ws_frame(b"\x01" + message))
                if how == "unread":
                    await asyncio.sleep(0.02)
                writer.transport.abort() if by_reset else writer.close()

    await asyncio.gather(*(leave() for _ in range(num_at_once)))
    return counts
