import asyncio
import json
import sys
import types

import numpy as np
import pytest
import sphn
from aiohttp import WSMsgType

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


async def events(ws, number):
    """Read until so many JSON messages have come."""
    found = []
    while len(found) < number:
        message = await ws.receive(timeout=GUARD_S)
        if message.type is WSMsgType.TEXT:
            found.append(json.loads(message.data))
    return found


def through_opus(frames):
    writer, reader = sphn.OpusStreamWriter(SAMPLE_RATE), sphn.OpusStreamReader(SAMPLE_RATE)
    return [reader.append_bytes(writer.append_pcm(frame)) for frame in frames]


def test_audio_and_text_match_moshi_server(fake_model, serving):
    async def test():
        model = fake_model()
        model.engine.texts[0].extend([17, 0, 3, 18])
        audio = (0.1 * np.random.default_rng(0).normal(size=(12, SAMPLES_PER_FRAME))).astype(np.float32)
        writer, reader = sphn.OpusStreamWriter(SAMPLE_RATE), sphn.OpusStreamReader(SAMPLE_RATE)
        async with serving(model) as served, served.connect() as ws:
            assert await ws.receive_bytes() == b"\x00"
            for frame in audio:
                await ws.send_bytes(b"\x01" + writer.append_pcm(frame))
            kinds, texts, heard = [], [], []
            while len(heard) < 11:
                message = await ws.receive_bytes(timeout=GUARD_S)
                kinds.append(message[0])
                if message[0] == 1:
                    heard.append(reader.append_bytes(message[1:]))
                else:
                    texts.append(message[1:].decode())
            assert kinds[:6] == [1, 2, 1, 1, 1, 2] and texts == [" w17", " w18"]
            # Input and output of the engine pass through one reader and one writer each.
            np.testing.assert_array_equal(heard, through_opus(through_opus(audio))[:11])
            assert served.count("sessions_active") == 1
        assert served.count("sessions_total") == 1 and served.count("sessions_active") == 0
        assert served.count("drops_total", reason="vanished") == 0

    run(test())


def test_moshi_client_works_unchanged(fake_model, serving, monkeypatch):
    played = []

    class Stream:
        """Callback of `sounddevice`, called every 80 ms from its own thread."""

        def __init__(self, *, callback, blocksize, **_):
            self.callback, self.blocksize = callback, blocksize

        def __enter__(self):
            self.task = asyncio.get_running_loop().create_task(self.play())

        def __exit__(self, *_):
            self.task.cancel()

    class InputStream(Stream):
        async def play(self):
            while True:
                self.callback(np.full((self.blocksize, 1), 0.1, dtype=np.float32), self.blocksize, None, None)
                await asyncio.sleep(0.005)

    class OutputStream(Stream):
        async def play(self):
            while True:
                out = np.zeros((self.blocksize, 1), dtype=np.float32)
                self.callback(out, self.blocksize, None, None)
                played.append(float(np.abs(out).max()))
                await asyncio.sleep(0.005)

    class Printer:
        def __init__(self):
            self.tokens, self.logs = [], []

        def print_token(self, token):
            self.tokens.append(token)

        def log(self, level, message):
            self.logs.append(message)

        def print_pending(self):
            pass

        print_lag = print_header = print_pending

    monkeypatch.setitem(
        sys.modules, "sounddevice", types.SimpleNamespace(InputStream=InputStream, OutputStream=OutputStream)
    )
    monkeypatch.delitem(sys.modules, "moshi.client", raising=False)
    from moshi import client as moshi_client

    monkeypatch.delitem(sys.modules, "moshi.client")

    async def test():
        model, printer = fake_model(), Printer()
        model.engine.texts[0].extend([17, 18])
        async with serving(model) as served:
            options = types.SimpleNamespace(url=None, https=False, host="127.0.0.1", port=served.port)
            talking = asyncio.create_task(moshi_client.run(printer, options))
            await served.until(lambda: max(played, default=0) > 0.05 and len(printer.tokens) == 2)
            assert printer.tokens == [" w17", " w18"]
            # moshi's client logs the last line for the handshake of moshi.server as well.
            address = f"ws://127.0.0.1:{served.port}/api/chat"
            assert printer.logs == [f"Connecting to {address}.", "connected!", "unknown message kind 0"]
            talking.cancel()
            await asyncio.wait([talking])
            await served.until(lambda: served.server.scheduler.num_free == 1)

    run(test())


def test_pcm_is_exact_in_both_directions(fake_model, serving):
    async def test():
        samples = np.random.default_rng(0).integers(-30000, 30000, 3 * SAMPLES_PER_FRAME).astype("<i2")
        stream = samples.tobytes()
        async with serving(fake_model()) as served, served.connect("?audio=pcm") as ws:
            await ws.receive_bytes()
            for start in range(0, len(stream), 777):
                await ws.send_bytes(b"\x01" + stream[start : start + 777])
            heard = b"".join([(await ws.receive_bytes(timeout=GUARD_S))[1:] for _ in range(2)])
            difference = np.frombuffer(heard, "<i2").astype(int) - samples[: 2 * SAMPLES_PER_FRAME]
            assert abs(difference).max() <= 1

    run(test())


def test_session_resets_the_slot_and_applies_its_query(fake_model, serving):
    async def test():
        model = fake_model()
        async with serving(model, default_emotion="sad") as served:
            for query in ("?emotion=happy&strength=0.5&seed=7", ""):
                async with served.connect(query) as ws:
                    assert await ws.receive_bytes() == b"\x00"
                await served.until(lambda: served.server.scheduler.num_free == 1)
        assert model.engine.calls[1:5] == [
            ("reset", 0, 7),
            ("steer", 0, "moody", "happy", 0.5),
            ("reset", 0, None),
            ("steer", 0, "moody", "sad", 1.0),
        ]

    run(test())


def test_events_are_sent_only_to_clients_that_support_them(fake_model, serving):
    async def test():
        async with serving(fake_model(2)) as served:
            async with served.connect() as ws:
                assert await ws.receive_bytes() == b"\x00"
                await ws.send_bytes(b"\x01")  # no sound
                await served.until(lambda: not served.server.scheduler._conversations[0].queue)
                await ws.send_str('{"type": "steer", "emotion": "sad"}')
                (event,) = await events(ws, 1)  # the initial steering was not sent
                assert (event["type"], event["voice"], event["emotion"]) == ("steering", "moody", "sad")
            async with served.connect("?events=1&emotion=happy") as ws:
                assert await ws.receive_bytes() == b"\x00"
                (event,) = await events(ws, 1)
                assert event == {
                    "type": "steering", "voice": "moody", "emotion": "happy", "strength": 1.0, "pending": None
                }  # fmt: skip

    run(test())


def test_steering_waits_for_a_pause(fake_model, serving):
    async def test():
        model = fake_model()
        model.engine.texts[0].extend([17, 18])
        async with serving(model) as served, served.connect("?audio=pcm&events=1") as ws:
            await ws.send_bytes(b"\x01" + 3 * FRAME)
            await served.until(lambda: served.count("frames_total") == 3)
            await ws.send_str('{"type": "steer", "emotion": "sad"}')
            event = (await events(ws, 2))[-1]
            assert event["emotion"] is None and event["pending"]["emotion"] == "sad"
            await ws.send_bytes(b"\x01" + 6 * FRAME)
            (event,) = await events(ws, 1)
            assert event["emotion"] == "sad" and event["pending"] is None
        at = model.engine.calls.index(("steer", 0, "moody", "sad", 1.0))
        assert model.engine.calls[:at].count(("step", (0,))) == 9

    run(test())


@pytest.mark.parametrize("text", ["hello", '{"type": "steer", "emotion": "angry"}', "x" * 5000, "[" * 3000])
def test_invalid_control_messages_are_answered_and_the_session_continues(fake_model, serving, text):
    async def test():
        async with serving(fake_model()) as served, served.connect("?audio=pcm") as ws:
            await ws.receive_bytes()
            await ws.send_str(text)
            (event,) = await events(ws, 1)
            assert event["type"] == "error" and event["message"]
            await ws.send_bytes(b"\x01" + 2 * FRAME)
            assert (await ws.receive_bytes(timeout=GUARD_S))[0] == 1

    run(test())


def test_unknown_and_empty_messages_are_counted_and_ignored(fake_model, serving):
    async def test():
        async with serving(fake_model()) as served, served.connect("?audio=pcm") as ws:
            await ws.receive_bytes()
            for message in (b"", b"\x00", b"\x02hello", b"\xff" * 100, b"\x01", b"\x01" + 2 * FRAME):
                await ws.send_bytes(message)
            assert (await ws.receive_bytes(timeout=GUARD_S))[0] == 1
            assert served.count("messages_ignored_total", reason="unknown_kind") == 3
            assert served.count("messages_ignored_total", reason="empty") == 1

    run(test())


def test_busy_server_refuses_with_a_reason(fake_model, serving):
    async def test():
        async with serving(fake_model(2)) as served:
            async with served.connect() as one, served.connect() as other:
                assert await one.receive_bytes() == await other.receive_bytes() == b"\x00"
                reason = "busy: all 2 slots are in use; try again later"
                async with served.connect() as third:
                    assert await closing(third) == (1013, reason)
                async with served.connect("?events=1") as third:
                    assert await events(third, 1) == [{"type": "error", "message": reason}]
                    assert await closing(third) == (1013, reason)
                assert served.count("sessions_refused_total", reason="busy") == 2
            async with served.connect() as ws:
                assert await ws.receive_bytes(timeout=GUARD_S) == b"\x00"

    run(test())


@pytest.mark.parametrize("query", ["?emotion=angry", "?strength=x", "?audio=mp3", "?seed=-1", "?voice=" + "ü" * 300])
def test_invalid_queries_are_refused_with_a_reason(fake_model, serving, query):
    async def test():
        async with serving(fake_model()) as served, served.connect(query) as ws:
            code, reason = await closing(ws)
            assert code == 1008 and reason
            assert served.server.scheduler.num_free == 1

    run(test())


@pytest.mark.parametrize(
    ("limits", "query", "messages", "code", "reason"),
    [
        ({}, "", [b"\x01" + b"\x1a\x45\xdf\xa3" * 20], 1007, "not Ogg Opus"),
        ({"max_message_bytes": 1000}, "", [b"\x01" + bytes(1000)], 1009, "too large"),
        ({"messages_burst": 20, "messages_per_s": 1}, "", [b"\x05"] * 30, 1008, "too many messages"),
        ({"messages_burst": 20, "messages_per_s": 1}, "?audio=pcm", [b"\x01\0\0"] * 30, 1008, "too many messages"),
        ({"messages_burst": 20, "messages_per_s": 1}, "", ["{}"] * 30, 1008, "too many messages"),
        ({"max_conversation_s": 0.1}, "", [], 1008, "session limit"),
        ({"idle_s": 0.1}, "", [b"\x05"], 1008, "no audio for 0.1 seconds"),
    ],
)
def test_exceeding_a_limit_ends_the_session_with_a_reason(fake_model, serving, limits, query, messages, code, reason):
    async def test():
        async with serving(fake_model(), Limits(**QUICK | limits)) as served, served.connect(query) as ws:
            await ws.receive_bytes()
            for message in messages:
                await (ws.send_bytes if isinstance(message, bytes) else ws.send_str)(message)
            found = await closing(ws)
            assert found[0] == code and reason in found[1]
            await served.until(lambda: served.server.scheduler.num_free == 1)
            assert sum(served.count("drops_total", reason=label) for label in DROPS) == 1

    run(test())


DROPS = ("bad_audio", "bad_message", "too_fast", "too_long", "idle")


def test_audio_messages_are_not_rate_limited(fake_model, serving):
    async def test():
        limits = Limits(**QUICK, messages_burst=5, messages_per_s=1)
        async with serving(fake_model(), limits) as served, served.connect("?audio=pcm") as ws:
            for _ in range(300):  # 1.1 MB in all
                await ws.send_bytes(b"\x01" + FRAME)
            for _ in range(300):
                assert (await ws.receive_bytes(timeout=GUARD_S))[0] in (0, 1)

    run(test())
