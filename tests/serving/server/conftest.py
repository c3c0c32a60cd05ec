"""A speaker without a model, and a server of it on a free port: what these tests talk to."""

import asyncio
import contextlib
import threading
import time
from collections import deque
from types import SimpleNamespace

import aiohttp
import numpy as np
import pytest

from hf_csm.models.emotion_control import EmotionControl
from hf_csm.models.family import Frame
from hf_csm.serving.resolve import Models, Voice
from hf_csm.serving.server.app import Server
from hf_csm.serving.server.limits import Limits
from hf_csm.serving.server.run import bind
from hf_csm.units import SAMPLES_PER_FRAME


PADDING = 3
VOICES = (
    Voice("moody", 0, EmotionControl("prefix", "({emotion})", ("happy", "sad"))),
    Voice("calm", 1, EmotionControl("none", emotions=("calm",))),
    Voice("base", None, EmotionControl("none")),
)


class FakeEngine:
    """Says what it hears a frame later, and the text tokens that it is given.

    Attributes:
        calls: what was done with it, in order.
        texts: tokens to say, by slot.
        gate: a step waits until it is set.
        failure: what the next step raises.
    """

    def __init__(self, num_slots, delay=1):
        self.num_slots, self.padding_ids, self.delay = num_slots, frozenset({0, PADDING}), delay
        self.calls, self.threads = [], set()
        self.texts = {slot: deque() for slot in range(num_slots)}
        self.heard = {slot: [] for slot in range(num_slots)}
        self.gate = threading.Event()
        self.gate.set()
        self.failure = self.reset_failure = None
        self.step_s = 0.0

    def warm_up(self):
        self.calls.append(("warm_up",))
        self.threads.add(threading.get_ident())

    def reset(self, slot, *, seed=None):
        if self.reset_failure is not None:
            raise self.reset_failure
        self.calls.append(("reset", slot, seed))
        self.heard[slot] = []

    def step(self, frames):
        self.threads.add(threading.get_ident())
        self.calls.append(("step", tuple(sorted(frames))))
        self.gate.wait(20)
        time.sleep(self.step_s)
        if self.failure is not None:
            raise self.failure
        said = {}
        for slot, frame in frames.items():
            assert frame.shape == (SAMPLES_PER_FRAME,) and frame.dtype == np.float32
            self.heard[slot].append(frame)
            if len(self.heard[slot]) > self.delay:
                token = self.texts[slot].popleft() if self.texts[slot] else PADDING
                said[slot] = Frame(token, self.heard[slot][-1 - self.delay], np.zeros(8, dtype=np.int64))
        return said

    def close(self):
        self.calls.append(("close",))


class FakeSpeaker:
    """What `voices.Speaker` is, around a `FakeEngine`."""

    base_name = "tiny"
    tokenizer = SimpleNamespace(id_to_piece=lambda token: f"▁w{token}")

    def __init__(self, num_slots=1, voices=VOICES, **options):
        self.engine = FakeEngine(num_slots, **options)
        self.models = Models(None, "tiny", (), voices)
        self.voices, self.emotions, self.choose = list(voices), self.models.emotions, self.models.choose

    def steer(self, slot, voice, emotion, strength=1.0):
        self.engine.calls.append(("steer", slot, voice.name, emotion, strength))

    def weigh(self, slot, voice, strength):
        self.engine.calls.append(("weigh", slot, voice.name, strength))


class Served:
    """A server that runs, and how to reach it."""

    def __init__(self, server, port, client):
        self.server, self.port, self.client = server, port, client
        self.address = f"http://127.0.0.1:{port}"

    def connect(self, query="", **options):
        return self.client.ws_connect(f"{self.address}/api/chat{query}", **options)

    async def until(self, holds, timeout_s=5):
        """Wait until something is true."""
        deadline = time.monotonic() + timeout_s
        while not holds():
            assert time.monotonic() < deadline, "this did not come true"
            await asyncio.sleep(0.01)

    def count(self, name, **labels):
        """Return the value of a metric."""
        return self.server.metrics.registry.get_sample_value(f"hf_csm_{name}", labels) or 0.0


@contextlib.asynccontextmanager
async def _serving(speaker, limits=None, **options):
    server = Server(speaker, limits=limits or Limits(check_s=0.02, closing_s=0.5), **options)
    sockets = bind("127.0.0.1", 0)
    await server.start(sockets)
    async with aiohttp.ClientSession() as client:
        try:
            yield Served(server, sockets[0].getsockname()[1], client)
        finally:
            if isinstance(speaker, FakeSpeaker):
                speaker.engine.gate.set()
            await server.stop()


@pytest.fixture(scope="session")
def fake_speaker():
    """The class of speakers without a model."""
    return FakeSpeaker


@pytest.fixture(scope="session")
def serving():
    """`async with serving(speaker, limits, **options) as served`: a server in this process."""
    return _serving
