"""A model with a fake engine, and a server on a free port."""

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
from hf_csm.serving.resolve import AdapterChoice, ResolvedModels
from hf_csm.serving.server.app import Server
from hf_csm.serving.server.limits import Limits
from hf_csm.serving.server.run import bind
from hf_csm.units import SAMPLES_PER_FRAME
from tests.doubles.waiting import GUARD_S


PADDING = 3
CHOICES = (
    AdapterChoice("moody", 0, EmotionControl("prefix", "({emotion})", ("happy", "sad"))),
    AdapterChoice("calm", 1, EmotionControl("none", emotions=("calm",))),
    AdapterChoice("base", None, EmotionControl("none")),
)


class FakeEngine:
    """Returns its input one frame later, with the text tokens of `texts`.

    Attributes:
        calls: calls of its methods, in order.
        texts: text tokens to generate, by slot.
        gate: a step waits until it is set.
        failure: error raised by the next step.
    """

    def __init__(self, num_slots, delay=1):
        self.num_slots, self.padding_ids, self.delay = num_slots, frozenset({0, PADDING}), delay
        self.calls, self.threads = [], set()
        self.texts = {slot: deque() for slot in range(num_slots)}
        self.inputs = {slot: [] for slot in range(num_slots)}
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
        self.inputs[slot] = []

    def step(self, frames):
        self.threads.add(threading.get_ident())
        self.calls.append(("step", tuple(sorted(frames))))
        self.gate.wait(GUARD_S)
        time.sleep(self.step_s)
        if self.failure is not None:
            raise self.failure
        generated = {}
        for slot, frame in frames.items():
            assert frame.shape == (SAMPLES_PER_FRAME,) and frame.dtype == np.float32
            self.inputs[slot].append(frame)
            if len(self.inputs[slot]) > self.delay:
                token = self.texts[slot].popleft() if self.texts[slot] else PADDING
                generated[slot] = Frame(token, self.inputs[slot][-1 - self.delay], np.zeros(8, dtype=np.int64))
        return generated

    def close(self):
        self.calls.append(("close",))


class FakeModel:
    """A `LoadedModel` with a `FakeEngine`."""

    base_name = "tiny"
    tokenizer = SimpleNamespace(id_to_piece=lambda token: f"▁w{token}")

    def __init__(self, num_slots=1, choices=CHOICES, **options):
        self.engine = FakeEngine(num_slots, **options)
        self.resolved = ResolvedModels(SimpleNamespace(name="moshi"), None, "tiny", (), choices)
        self.choices, self.emotions, self.choose = list(choices), self.resolved.emotions, self.resolved.choose

    def steer(self, slot, choice, emotion, strength=1.0):
        self.engine.calls.append(("steer", slot, choice.name, emotion, strength))

    def set_strength(self, slot, choice, strength):
        self.engine.calls.append(("set_strength", slot, choice.name, strength))


class Served:
    """A running server and a client session."""

    def __init__(self, server, port, client):
        self.server, self.port, self.client = server, port, client
        self.address = f"http://127.0.0.1:{port}"

    def connect(self, query="", **options):
        return self.client.ws_connect(f"{self.address}/api/chat{query}", **options)

    async def until(self, condition):
        """Wait until a condition is true."""
        deadline = time.monotonic() + GUARD_S
        while not condition():
            assert time.monotonic() < deadline
            await asyncio.sleep(0.01)

    def count(self, name, **labels):
        """Return the value of a metric."""
        return self.server.metrics.registry.get_sample_value(f"hf_csm_{name}", labels) or 0.0


@contextlib.asynccontextmanager
async def _serving(model, limits=None, **options):
    server = Server(model, limits=limits or Limits(check_s=0.02, closing_s=0.5), **options)
    sockets = bind("127.0.0.1", 0)
    await server.start(sockets)
    async with aiohttp.ClientSession() as client:
        try:
            yield Served(server, sockets[0].getsockname()[1], client)
        finally:
            if isinstance(model, FakeModel):
                model.engine.gate.set()
            await server.stop()


@pytest.fixture(scope="session")
def fake_model():
    """The class `FakeModel`."""
    return FakeModel


@pytest.fixture(scope="session")
def serving():
    """`async with serving(model, limits, **options) as served`: a server in this process."""
    return _serving
