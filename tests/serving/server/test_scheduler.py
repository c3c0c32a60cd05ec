import asyncio
import threading

import numpy as np
import pytest

from hf_csm.serving.server import scheduler as scheduler_module
from hf_csm.serving.server.metrics import Metrics
from hf_csm.serving.server.scheduler import Scheduler


FRAME = np.zeros(1920, dtype=np.float32)


class Client:
    """Takes a lane and keeps what is delivered."""

    def __init__(self, scheduler):
        self.things, self.errors = [], []
        self.lane = scheduler.acquire(lambda frame: [frame.audio[0]], self.things.append, self.errors.append)

    async def wait_for(self, num_things):
        for _ in range(500):
            if len(self.things) >= num_things:
                return self.things
            await asyncio.sleep(0.01)
        raise AssertionError(f"only {self.things} came")


def run(fake_speaker, test, num_slots=2, **options):
    """Run `test(scheduler, engine)` with a scheduler that is started and stopped."""

    async def main():
        engine = fake_speaker(num_slots, delay=0).engine
        scheduler = Scheduler(engine, Metrics(), **options)
        await scheduler.start()
        try:
            return await asyncio.wait_for(test(scheduler, engine), 20)
        finally:
            engine.gate.set()
            await scheduler.stop()
            assert not scheduler._thread.is_alive()

    return asyncio.run(main())


def test_slots_that_have_a_frame_are_stepped_together_one_frame_each(fake_speaker):
    async def test(scheduler, engine):
        one, other = Client(scheduler), Client(scheduler)
        engine.gate.clear()
        await one.lane.put(FRAME)
        while ("step", (0,)) not in engine.calls:
            await asyncio.sleep(0.01)
        for number in range(3):
            await one.lane.put(FRAME + number)
        await other.lane.put(FRAME + 7)
        engine.gate.set()
        assert await one.wait_for(4) == [0, 0, 1, 2]
        assert await other.wait_for(1) == [7]
        assert engine.calls[1:] == [("step", (0,)), ("step", (0, 1)), ("step", (0,)), ("step", (0,))]
        assert len(engine.threads) == 1 and threading.get_ident() not in engine.threads

    run(fake_speaker, test)


def test_commands_run_in_the_order_of_the_frames(fake_speaker):
    async def test(scheduler, engine):
        client = Client(scheduler)
        engine.gate.clear()
        await client.lane.put(FRAME)
        client.lane.call(lambda: ["a"])
        client.lane.call(lambda: ["b", "c"])
        await client.lane.put(FRAME + 1)
        client.lane.call(lambda: ["d"])
        engine.gate.set()
        assert await client.wait_for(6) == [0, "a", "b", "c", 1, "d"]

    run(fake_speaker, test)


def test_who_sends_faster_than_the_engine_waits(fake_speaker):
    async def test(scheduler, engine):
        client = Client(scheduler)
        engine.gate.clear()
        putting = asyncio.create_task(put_many(client.lane, 60))
        await asyncio.sleep(0.1)
        assert not putting.done()
        assert scheduler.max_backlog == 25 <= client.lane._num_waiting
        engine.gate.set()
        await putting
        await client.wait_for(60)

    async def put_many(lane, number):
        for _ in range(number):
            await lane.put(FRAME)
            assert lane._num_waiting <= 25

    run(fake_speaker, test, max_backlog_s=2.0)


def test_a_released_lane_wakes_who_waits_and_gets_nothing_more(fake_speaker):
    async def test(scheduler, engine):
        old = Client(scheduler)
        engine.gate.clear()
        putting = asyncio.create_task(fill(old.lane))
        await asyncio.sleep(0.05)
        assert scheduler.num_free == 1
        old.lane.release()
        old.lane.release()
        await putting
        assert scheduler.num_free == 2
        new = Client(scheduler)
        assert new.lane.slot == old.lane.slot
        new.lane.call(lambda: ["mine"])
        engine.gate.set()
        assert await new.wait_for(1) == ["mine"]
        await asyncio.sleep(0.05)
        assert old.things == [] and new.things == ["mine"]
        assert engine.calls.count(("step", (0,))) == 1  # what the old one had queued is forgotten

    async def fill(lane):
        for _ in range(40):
            await lane.put(FRAME)

    run(fake_speaker, test)


def test_there_are_as_many_lanes_as_slots(fake_speaker):
    async def test(scheduler, engine):
        clients = [Client(scheduler) for _ in range(3)]
        assert [client.lane and client.lane.slot for client in clients] == [0, 1, None]
        assert scheduler.num_free == 0
        clients[0].lane.release()
        assert Client(scheduler).lane.slot == 0

    run(fake_speaker, test)


@pytest.mark.parametrize("where", ["command", "hear"])
def test_an_error_in_one_conversation_is_its_own(fake_speaker, where):
    async def test(scheduler, engine):
        bad, good = Client(scheduler), Client(scheduler)
        error = ValueError("mine")

        def fail(*_):
            raise error

        if where == "command":
            bad.lane.call(fail)
        else:
            bad.lane._hear = fail
        for client in (bad, good):
            await client.lane.put(FRAME)
        assert await good.wait_for(1) == [0]
        for _ in range(100):
            if bad.errors:
                break
            await asyncio.sleep(0.01)
        assert (bad.errors, bad.things, good.errors) == ([error], [], [])
        assert scheduler.is_well

    run(fake_speaker, test)


def test_a_failed_engine_ends_every_conversation_and_is_not_well(fake_speaker):
    async def test(scheduler, engine):
        clients = [Client(scheduler), Client(scheduler)]
        assert scheduler.is_well
        engine.failure = RuntimeError("CUDA error")
        await clients[0].lane.put(FRAME)
        await scheduler.over.wait()
        assert [str(client.errors[0]) for client in clients] == ["the engine failed: CUDA error"] * 2
        assert scheduler.error is engine.failure and not scheduler.is_well

    run(fake_speaker, test)


def test_a_stuck_engine_is_not_well(fake_speaker, monkeypatch):
    async def test(scheduler, engine):
        monkeypatch.setattr(scheduler_module, "STUCK_S", 0.05)
        client = Client(scheduler)
        engine.gate.clear()
        await client.lane.put(FRAME)
        await asyncio.sleep(0.2)
        assert not scheduler.is_well
        monkeypatch.undo()
        engine.gate.set()
        await client.wait_for(1)
        assert scheduler.is_well

    run(fake_speaker, test)


def test_an_engine_that_does_not_warm_up_is_said_at_once(fake_speaker):
    async def main():
        engine = fake_speaker().engine
        engine.warm_up = lambda: 1 / 0
        scheduler = Scheduler(engine, Metrics())
        with pytest.raises(RuntimeError, match="warmed up"):
            await asyncio.wait_for(scheduler.start(), 5)

    asyncio.run(main())


def test_steps_are_measured(fake_speaker):
    async def test(scheduler, engine):
        client, other = Client(scheduler), Client(scheduler)
        engine.gate.clear()
        await client.lane.put(FRAME)
        await asyncio.sleep(0.05)
        for lane in (client.lane, other.lane):
            await lane.put(FRAME)
        engine.gate.set()
        await client.wait_for(2)
        value = scheduler._metrics.registry.get_sample_value
        assert value("hf_csm_frames_total") == 3
        assert value("hf_csm_frame_seconds_count") == 2
        assert value("hf_csm_slots") == 2
        assert client.lane.num_frames == 2

    run(fake_speaker, test)
