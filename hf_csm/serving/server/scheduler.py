"""One thread that owns the engine and steps every conversation that has a frame waiting, a frame each.

Everything for a slot, frames and commands, comes to the engine in one queue, in order. The event loop never waits for
the engine and the engine never for a client.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Protocol

import numpy as np

from hf_csm.models.family import Frame
from hf_csm.serving.server.metrics import Metrics
from hf_csm.units import FRAME_RATE, Seconds


STUCK_S = 10.0
"""A step takes a fraction of this, or the engine does not answer any more."""

Command = Callable[[], list[object]]


class Stepper(Protocol):
    """The part of `models.streaming.Engine` that is called from the thread."""

    num_slots: int

    def warm_up(self) -> None: ...

    def step(self, frames: Mapping[int, np.ndarray]) -> dict[int, Frame]: ...


class Lane:
    """A slot while it is taken by one conversation. For the event loop.

    Attributes:
        slot: its number.
        is_released: the conversation is over; nothing is delivered any more.
        num_frames: that the engine has taken.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        slot: int,
        hear: Callable[[Frame], list[object]],
        deliver: Callable[[object], None],
        fail: Callable[[Exception], None],
    ):
        self.slot = slot
        self.is_released = False
        self.num_frames = 0
        self._scheduler = scheduler
        self._hear, self._deliver, self._fail = hear, deliver, fail
        self._work: deque[np.ndarray | Command] = deque()
        self._num_waiting = 0
        self._room = asyncio.Event()

    async def put(self, frame: np.ndarray) -> None:
        """Hand over what the user says, `[1920]`; waits while the engine is far behind."""
        while self._num_waiting >= self._scheduler.max_backlog and not self.is_released:
            self._room.clear()
            await self._room.wait()
        self._num_waiting += 1
        self._scheduler.add(self, frame)

    def call(self, command: Command) -> None:
        """Have a command run by the engine's thread after the frames that were put; what it returns is delivered.

        Where the engine does not keep up, the command waits with the audio before it: up to `max_backlog` frames.
        """
        self._scheduler.add(self, command)

    def release(self) -> None:
        """Give the slot back; it is free at once."""
        if not self.is_released:
            self.is_released = True
            self._room.set()
            self._scheduler.free(self)

    # What follows is called by the scheduler: `take` and `hear` in the engine's thread, `arrive` in the loop's.

    def take(self) -> tuple[list[Command], np.ndarray | None]:
        """Remove commands up to the next frame, and that frame."""
        commands: list[Command] = []
        while self._work:
            work = self._work.popleft()
            if isinstance(work, np.ndarray):
                return commands, work
            commands.append(work)
        return commands, None

    def add(self, work: np.ndarray | Command) -> None:
        """Append to the queue."""
        self._work.append(work)

    def has_work(self) -> bool:
        """Whether `take` would give anything."""
        return bool(self._work)

    def hear(self, frame: Frame) -> list[object]:
        """Turn what Moshi said into what is delivered."""
        return self._hear(frame)

    def arrive(self, has_room: bool, things: list[object], error: Exception | None) -> None:
        """Deliver what a step gave."""
        if has_room:
            self._num_waiting -= 1
            self.num_frames += 1
            self._room.set()
        for thing in things:
            if not self.is_released:
                self._deliver(thing)
        if error is not None and not self.is_released:
            self._fail(error)


class Scheduler:
    """Slots, and the thread that steps them.

    Attributes:
        max_backlog: frames of one user that may wait.
        error: what ended the thread; None while all is well.
        over: set when the engine failed. It cannot be mended: what a device holds after an error is unknown.
    """

    def __init__(self, engine: Stepper, metrics: Metrics, *, max_backlog_s: Seconds = 2.0):
        self.max_backlog = max(1, round(max_backlog_s * FRAME_RATE))
        self.error: BaseException | None = None
        self._engine, self._metrics = engine, metrics
        self._lanes: dict[int, Lane] = {}
        self._changed = threading.Condition()
        self._is_stopping = False
        self._busy_since: float | None = None
        self._ready, self.over = asyncio.Event(), asyncio.Event()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        metrics.slots.set(engine.num_slots)

    async def start(self) -> None:
        """Start the thread; returns when the engine is warm.

        Raises:
            RuntimeError: the engine failed.
        """
        self._loop = asyncio.get_running_loop()
        self._thread.start()
        await self._ready.wait()
        if self.error is not None:
            raise RuntimeError("the engine failed as it warmed up") from self.error

    @property
    def num_slots(self) -> int:
        """Conversations that fit."""
        return self._engine.num_slots

    @property
    def num_free(self) -> int:
        """Slots that are not taken."""
        return self.num_slots - len(self._lanes)

    @property
    def is_well(self) -> bool:
        """Whether the engine answers."""
        busy_since = self._busy_since
        is_stuck = busy_since is not None and time.monotonic() - busy_since > STUCK_S
        return self.error is None and self._thread.is_alive() and not is_stuck

    def acquire(
        self,
        hear: Callable[[Frame], list[object]],
        deliver: Callable[[object], None],
        fail: Callable[[Exception], None],
    ) -> Lane | None:
        """Take a free slot, if there is one.

        Args:
            hear: called in the engine's thread with each frame Moshi says; returns what is delivered for it.
            deliver: called in the event loop with each thing that a command or `hear` returned, in order.
            fail: called in the event loop when a command, `hear` or the engine raised.
        """
        for slot in range(self.num_slots):
            if slot not in self._lanes:
                lane = Lane(self, slot, hear, deliver, fail)
                with self._changed:
                    self._lanes[slot] = lane
                return lane
        return None

    def add(self, lane: Lane, work: np.ndarray | Command) -> None:
        """Queue work for a lane; it is never done if the lane was given back."""
        with self._changed:
            lane.add(work)
            self._changed.notify()

    def free(self, lane: Lane) -> None:
        """Forget a lane with all it has queued."""
        with self._changed:
            if self._lanes.get(lane.slot) is lane:
                del self._lanes[lane.slot]

    async def stop(self, timeout_s: Seconds = STUCK_S) -> None:
        """End the thread after the step it is in."""
        with self._changed:
            self._is_stopping = True
            self._changed.notify()
        await asyncio.to_thread(self._thread.join, timeout_s)

    def _run(self) -> None:
        try:
            self._engine.warm_up()
            self._tell(self._ready.set)
            while (work := self._take()) is not None:
                self._busy_since = time.monotonic()
                self._do(work)
                self._busy_since = None
        except BaseException as error:
            self.error = error
            self._tell(self._end)
        self._tell(self._ready.set)

    def _take(self) -> list[tuple[Lane, list[Command], np.ndarray | None]] | None:
        with self._changed:
            while not self._is_stopping:
                work = [(lane, *lane.take()) for lane in self._lanes.values() if lane.has_work()]
                if work:
                    return work
                self._changed.wait()
        return None

    def _do(self, work: list[tuple[Lane, list[Command], np.ndarray | None]]) -> None:
        """Run the commands, then one step for all; a command that raises ends its own conversation only."""
        things: dict[Lane, list[object]] = {lane: [] for lane, _, _ in work}
        errors: dict[Lane, Exception] = {}
        for lane, commands, _ in work:
            try:
                for command in commands:
                    things[lane] += command()
            except Exception as error:
                errors[lane] = error
        frames = {lane.slot: frame for lane, _, frame in work if frame is not None and lane not in errors}
        if frames:
            start = time.perf_counter()
            said = self._engine.step(frames)
            self._metrics.frame_time.observe(time.perf_counter() - start)
            self._metrics.frames.inc(len(frames))
            for lane in things:
                if lane.slot in said and lane not in errors:
                    try:
                        things[lane] += lane.hear(said[lane.slot])
                    except Exception as error:
                        errors[lane] = error
        self._tell(
            self._arrive, [(lane, frame is not None, things[lane], errors.get(lane)) for lane, _, frame in work]
        )

    def _tell(self, function: Callable[..., None], *args: object) -> None:
        try:
            self._loop.call_soon_threadsafe(function, *args)
        except RuntimeError:  # the loop is closed: nobody listens any more
            self._is_stopping = True

    def _arrive(self, arrivals: list[tuple[Lane, bool, list[object], Exception | None]]) -> None:
        for lane, has_room, things, error in arrivals:
            lane.arrive(has_room, things, error)

    def _end(self) -> None:
        assert self.error is not None
        failure = RuntimeError(f"the engine failed: {self.error}")
        for lane in list(self._lanes.values()):
            lane.arrive(False, [], failure)
        self.over.set()
