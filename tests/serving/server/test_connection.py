"""Connections that are aborted, stall, or violate the protocol."""

import asyncio
import contextlib
import socket
import struct

import numpy as np
import pytest
from aiohttp import WSMsgType, web

from hf_csm.serving.server.limits import Limits
from hf_csm.units import SAMPLE_RATE, SAMPLES_PER_FRAME
from tests.doubles.waiting import GUARD_S


SECOND = np.zeros(SAMPLE_RATE, dtype="<i2").tobytes()
FRAME = np.zeros(SAMPLES_PER_FRAME, dtype="<i2").tobytes()
QUICK = {"check_s": 0.02, "closing_s": 0.5}


def run(test):
    """Run a coroutine with a guard against hanging."""
    asyncio.run(asyncio.wait_for(test, GUARD_S))


async def closing(ws):
    """Read to the close frame; return code and reason."""
    while (message := await ws.receive(timeout=GUARD_S)).type in (WSMsgType.BINARY, WSMsgType.TEXT):
        pass
    assert message.type is WSMsgType.CLOSE, message
    return message.data, message.extra


def raw_request(served, query="", buffer=None):
    """Open a WebSocket by hand, on a socket that does not read by itself."""
    line = socket.socket()
    if buffer:
        for way in (socket.SO_RCVBUF, socket.SO_SNDBUF):
            line.setsockopt(socket.SOL_SOCKET, way, buffer)
    line.settimeout(GUARD_S)
    line.connect(("127.0.0.1", served.port))
    line.sendall(
        f"GET /api/chat{query} HTTP/1.1\r\nHost: 127.0.0.1:{served.port}\r\n"
        "Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
        "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n".encode()
    )
    return line


def masked(payload, opcode=2):
    """Return a client's frame, masked with zeros."""
    size = bytes([0x80 | len(payload)]) if len(payload) < 126 else b"\xfe" + struct.pack(">H", len(payload))
    return bytes([0x80 | opcode]) + size + bytes(4) + payload


def test_fast_sender_is_paced_without_loss(fake_model, serving):
    async def test():
        model = fake_model()
        async with serving(model, Limits(**QUICK, max_backlog_s=1.0, max_unsent_s=60)) as served:
            line = raw_request(served, "?audio=pcm", buffer=4096)
            await served.until(lambda: served.server.scheduler.num_free == 0)
            model.engine.gate.clear()
            num_bytes = await asyncio.to_thread(send_until_it_blocks, line)
            assert SAMPLE_RATE < num_bytes < 20 * SAMPLE_RATE  # of the 60 s offered
            (session,) = served.server._sessions
            assert session.num_waiting <= 13
            model.engine.gate.set()
            await served.until(
                lambda: served.count("frames_total") >= num_bytes // len(masked(b"\x01" + SECOND)) * 12.5
            )
            line.close()

    def send_until_it_blocks(line):
        line.settimeout(0.3)
        stream, num_bytes = masked(b"\x01" + SECOND) * 60, 0
        try:
            while num_bytes < len(stream):
                num_bytes += line.send(stream[num_bytes:])
        except TimeoutError:
            return num_bytes
        raise AssertionError("the server read everything")

    run(test())


def test_slow_reader_is_dropped_without_affecting_others(fake_model, serving):
    async def test():
        model = fake_model(2)
        limits = Limits(**QUICK, max_unsent_s=2.0)
        async with serving(model, limits) as served:
            line = raw_request(served, "?audio=pcm", buffer=4096)
            await served.until(lambda: served.server.scheduler.num_free == 1)
            (slow,) = served.server._sessions
            async with served.connect("?audio=pcm") as good:
                await good.receive_bytes()
                sending = asyncio.create_task(asyncio.to_thread(send_much, line))
                num_frames = 0
                while not served.count("drops_total", reason="slow_reader"):
                    await good.send_bytes(b"\x01" + FRAME)
                    if num_frames:
                        assert (await good.receive_bytes(timeout=GUARD_S))[0] == 1
                    num_frames += 1
                assert num_frames > 5
                assert slow.num_frames < 150  # 2 s, and what fits in the socket buffers
                assert served.server.scheduler.num_free == 1
                await served.until(lambda: len(served.server._runner.server.connections) == 1)  # disconnected
                await sending
            line.close()

    def send_much(line):
        try:
            for _ in range(200):
                line.sendall(masked(b"\x01" + 10 * FRAME))
        except OSError:
            pass

    run(test())


def test_client_that_floods_pings_and_never_reads_is_dropped(fake_model, serving):
    async def test():
        limits = Limits(**QUICK, max_unsent_s=1.0, messages_burst=100_000)
        async with serving(fake_model(), limits) as served:
            line = raw_request(served, buffer=4096)
            await asyncio.to_thread(send_pings, line)
            await served.until(lambda: served.count("drops_total", reason="slow_reader"))
            line.close()

    def send_pings(line):
        with contextlib.suppress(OSError):
            line.sendall(masked(bytes(125), opcode=9) * 5000)

    run(test())


def test_client_that_does_not_answer_pings_is_dropped(fake_model, serving):
    async def test():
        limits = Limits(**QUICK, heartbeat_s=4.0)
        async with serving(fake_model(2), limits) as served:
            line = raw_request(served)  # never answers pings
            async with served.connect(autoping=True) as quiet:  # answers pings, and sends nothing else
                await quiet.receive_bytes()
                reading = asyncio.create_task(quiet.receive())
                await served.until(lambda: served.count("drops_total", reason="vanished"))
                assert not reading.done() and served.server.scheduler.num_free == 1
                reading.cancel()
            assert b"\x89\x00" in line.recv(4096)  # it received a ping
            line.close()

    run(test())


def test_pings_are_answered(fake_model, serving):
    async def test():
        async with serving(fake_model()) as served, served.connect(autoping=False) as ws:
            await ws.receive_bytes()
            await ws.ping(b"there?")
            message = await ws.receive(timeout=GUARD_S)
            assert (message.type, message.data) == (WSMsgType.PONG, b"there?")

    run(test())


@pytest.mark.parametrize("how", ["close", "end", "reset", "in_a_frame", "in_the_backlog"])
def test_aborted_connection_frees_its_slot(fake_model, serving, how):
    async def test():
        model = fake_model()
        async with serving(model) as served:
            line = raw_request(served, "?audio=pcm")
            await served.until(lambda: served.server.scheduler.num_free == 0)
            if how == "in_the_backlog":
                model.engine.gate.clear()
            line.sendall(masked(b"\x01" + 10 * FRAME))
            if how == "close":
                line.sendall(masked(struct.pack(">H", 1000), opcode=8))
            elif how == "reset":
                line.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            elif how == "in_a_frame":
                line.sendall(masked(b"\x01" + FRAME)[:100])
            line.close()
            model.engine.gate.set()
            await served.until(lambda: served.server.scheduler.num_free == 1)
            async with served.connect() as ws:
                assert await ws.receive_bytes(timeout=GUARD_S) == b"\x00"

    run(test())


@pytest.mark.parametrize("attribute", ["failure", "reset_failure"])
def test_failure_is_reported_without_details(fake_model, serving, attribute):
    async def test():
        model = fake_model()
        setattr(model.engine, attribute, RuntimeError("secret details"))
        async with serving(model) as served, served.connect("?audio=pcm") as ws:
            await ws.send_bytes(b"\x01" + FRAME)
            assert await closing(ws) == (1011, "internal error")
            assert served.count("drops_total", reason="failed") == 1
            assert served.server.scheduler.is_healthy == (attribute == "reset_failure")

    run(test())


def test_failure_of_the_opus_writer_ends_the_session(fake_model, serving):
    class Panic(BaseException):
        pass

    def panic(audio):
        raise Panic

    async def test():
        async with serving(fake_model()) as served, served.connect("?audio=pcm") as ws:
            await ws.receive_bytes()
            (session,) = served.server._sessions
            session._audio.encode = panic
            await ws.send_bytes(b"\x01" + 2 * FRAME)
            assert await closing(ws) == (1011, "internal error")
            await served.until(lambda: served.server.scheduler.num_free == 1)

    run(test())


def test_compression_is_not_negotiated(fake_model, serving):
    async def test():
        async with serving(fake_model()) as served, served.connect(compress=15) as ws:
            assert ws.compress == 0
            assert await ws.receive_bytes() == b"\x00"

    run(test())


@pytest.mark.parametrize("frame", [b"\xf2\x80" + bytes(4), masked(b"\xff\xfe", 1), masked(b"", 3), masked(b"\0", 8)])
def test_invalid_websocket_frames_end_the_session(fake_model, serving, frame):
    async def test():
        async with serving(fake_model()) as served:
            line = raw_request(served)
            await served.until(lambda: served.server.scheduler.num_free == 0)
            line.sendall(frame)
            await served.until(lambda: served.server.scheduler.num_free == 1)
            line.close()

    run(test())


def test_endless_frame_is_not_buffered(fake_model, serving, monkeypatch):
    kept, keep = [], web.RequestHandler.data_received
    monkeypatch.setattr(web.RequestHandler, "data_received", lambda self, data: (kept.append(data), keep(self, data)))

    async def test():
        async with serving(fake_model(), Limits(check_s=0.02, closing_s=0.2)) as served:
            line = raw_request(served)
            await served.until(lambda: served.server.scheduler.num_free == 0)
            await asyncio.to_thread(send_endless, line)
            await served.until(lambda: served.server.scheduler.num_free == 1)
            assert 2**18 < sum(map(len, kept)) < 2**20
            assert served.count("drops_total", reason="bad_message") == 1
            line.close()

    def send_endless(line):
        line.sendall(b"\x82\xff" + struct.pack(">Q", 2**40) + bytes(4))
        with contextlib.suppress(OSError):
            for _ in range(16):
                line.sendall(bytes(2**18))

    run(test())


def test_client_that_never_reads_its_refusal_is_disconnected(fake_model, serving):
    async def test():
        async with serving(fake_model()) as served, served.connect() as ws:
            await ws.receive_bytes()
            lines = [raw_request(served) for _ in range(5)]
            await served.until(lambda: served.count("sessions_refused_total", reason="busy") == 5)
            await served.until(lambda: len(served.server._runner.server.connections) == 1)
            for line in lines:
                line.close()

    run(test())
