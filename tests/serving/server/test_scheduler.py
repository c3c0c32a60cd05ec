import asyncio
import threading

import numpy as np
import pytest

from hf_csm.serving.server import scheduler as scheduler_module
from hf_csm.serving.server.metrics import Metrics
from hf_csm.serving.server.scheduler import Conversation, Scheduler
from tests.doubles.waiting import GUARD_S


FRAME = np.zeros(1920, dtype=np.float32)


async def until(condition):
    while not condition():  # `run` guards against hanging
        await asyncio.sleep(0.01)


class Client(Conversation):
    """Acquires a slot and collects its messages and errors."""

    def __init__(self, scheduler):
        super().__init__(scheduler)
        self.messages, self.errors = [], []
        self.has_slot = scheduler.acquire(self)

    def enqueue(self, message):
        self.messages.append(message)

    def fail(self, error):
        self.errors.append(error)

    def on_frame(self, frame):
        return [frame.audio[0]]

    async def wait_for(self, num_messages):
        await until(lambda: len(self.messages) >= num_messages)
        return self.messages


def run(fake_model, test, num_slots=2, **options):
    """Run `test(scheduler, engine)` with a running scheduler."""

    async def main():
        engine = fake_model(num_slots, delay=0).engine
        scheduler = Scheduler(engine, Metrics(), **options)
        await scheduler.start()
        try:
            return await asyncio.wait_for(test(scheduler, engine), GUARD_S)
        finally:
            engine.gate.set()
            await scheduler.stop()
            assert not scheduler._thread.is_alive()

    return asyncio.run(main())


async def start_step(client, engine):
    """Put a frame, and wait until the engine is in its step, closed behind the gate."""
    engine.gate.clear()
    await client.put(FRAME)
    await until(lambda: ("step", (client.slot,)) in engine.calls)


def test_waiting_slots_are_stepped_together_one_frame_each(fake_model):
    async def test(scheduler, engine):
        one, other = Client(scheduler), Client(scheduler)
        await start_step(one, engine)
        for number in range(3):
            await one.put(FRAME + number)
        await other.put(FRAME + 7)
        engine.gate.set()
        assert await one.wait_for(4) == [0, 0, 1, 2]
        assert await other.wait_for(1) == [7]
        assert engine.calls[1:] == [("step", (0,)), ("step", (0, 1)), ("step", (0,)), ("step", (0,))]
        assert len(engine.threads) == 1 and threading.get_ident() not in engine.threads

    run(fake_model, test)


def test_commands_and_frames_run_in_order(fake_model):
    async def test(scheduler, engine):
        client = Client(scheduler)
        engine.gate.clear()
        await client.put(FRAME)
        client.submit(lambda: ["a"])
        client.submit(lambda: ["b", "c"])
        await client.put(FRAME + 1)
        client.submit(lambda: ["d"])
        engine.gate.set()
        assert await client.wait_for(6) == [0, "a", "b", "c", 1, "d"]

    run(fake_model, test)


def test_put_waits_while_the_backlog_is_full(fake_model):
    async def test(scheduler, engine):
        client = Client(scheduler)
        engine.gate.clear()
        putting = asyncio.create_task(put_many(client, 60))
        await until(lambda: client.num_waiting == 25)
        assert not putting.done() and scheduler.max_backlog == 25
        engine.gate.set()
        await putting
        await client.wait_for(60)

    async def put_many(client, number):
        for _ in range(number):
            await client.put(FRAME)
            assert client.num_waiting <= 25

    run(fake_model, test, max_backlog_s=2.0)


def test_releasing_a_slot_wakes_its_waiter_and_drops_its_messages(fake_model):
    async def test(scheduler, engine):
        old = Client(scheduler)
        await start_step(old, engine)
        putting = asyncio.create_task(fill(old))
        await until(lambda: old.num_waiting == scheduler.max_backlog)
        assert scheduler.num_free == 1
        old.release()
        old.release()
        await putting
        assert scheduler.num_free == 2
        new = Client(scheduler)
        assert new.slot == old.slot
        new.submit(lambda: ["mine"])
        engine.gate.set()
        assert await new.wait_for(1) == ["mine"]
        await new.put(FRAME)
        assert await new.wait_for(2) == ["mine", 0]
        assert old.messages == []
        assert engine.calls.count(("step", (0,))) == 2  # the frames queued by the old conversation were dropped

    async def fill(client):
        for _ in range(40):
            await client.put(FRAME)

    run(fake_model, test)


def test_there_are_as_many_conversations_as_slots(fake_model):
    async def test(scheduler, engine):
        clients = [Client(scheduler) for _ in range(3)]
        assert [client.has_slot and client.slot for client in clients] == [0, 1, False]
        assert scheduler.num_free == 0
        clients[0].release()
        assert Client(scheduler).slot == 0

    run(fake_model, test)


@pytest.mark.parametrize("where", ["command", "on_frame"])
def test_error_of_one_client_does_not_affect_others(fake_model, where):
    async def test(scheduler, engine):
        bad, good = Client(scheduler), Client(scheduler)
        error = ValueError("mine")

        def fail(*_):
            raise error

        if where == "command":
            bad.submit(fail)
        else:
            bad.on_frame = fail
        for client in (bad, good):
            await client.put(FRAME)
        assert await good.wait_for(1) == [0]
        await until(lambda: bad.errors)
        assert (bad.errors, bad.messages, good.errors) == ([error], [], [])
        assert scheduler.is_healthy

    run(fake_model, test)


def test_failed_engine_ends_every_conversation(fake_model):
    async def test(scheduler, engine):
        clients = [Client(scheduler), Client(scheduler)]
        assert scheduler.is_healthy
        engine.failure = RuntimeError("CUDA error")
        await clients[0].put(FRAME)
        await scheduler.over.wait()
        assert [str(client.errors[0]) for client in clients] == ["the engine failed: CUDA error"] * 2
        assert scheduler.error is engine.failure and not scheduler.is_healthy

    run(fake_model, test)


def test_stuck_engine_is_not_healthy(fake_model, monkeypatch):
    async def test(scheduler, engine):
        monkeypatch.setattr(scheduler_module, "STUCK_S", 0.05)
        client = Client(scheduler)
        await start_step(client, engine)
        await until(lambda: not scheduler.is_healthy)
        monkeypatch.undo()
        engine.gate.set()
        await client.wait_for(1)
        assert scheduler.is_healthy

    run(fake_model, test)


def test_failed_warm_up_is_reported_at_once(fake_model):
    async def main():
        engine = fake_model().engine
        engine.warm_up = lambda: 1 / 0
        scheduler = Scheduler(engine, Metrics())
        with pytest.raises(RuntimeError, match="warm-up"):
            await asyncio.wait_for(scheduler.start(), GUARD_S)

    asyncio.run(main())


def test_steps_are_measured(fake_model):
    async def test(scheduler, engine):
        client, other = Client(scheduler), Client(scheduler)
        await start_step(client, engine)
        for one in (client, other):
            await one.put(FRAME)
        engine.gate.set()
        await client.wait_for(2)
        value = scheduler._metrics.registry.get_sample_value
        assert value("hf_csm_frames_total") == 3
        assert value("hf_csm_frame_seconds_count") == 2
        assert value("hf_csm_slots") == 2
        assert client.num_frames == 2

    run(fake_model, test)
