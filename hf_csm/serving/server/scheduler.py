"""One thread owns the engine and steps, one frame each, every conversation that has a frame waiting.

Frames and commands of a slot reach the engine in order, through one queue. The event loop never waits for the engine,
and the engine never waits for a client.
"""

from __future__ import annotations

import asyncio
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from hf_csm.models.family import Engine, Frame
from hf_csm.serving.server.metrics import Metrics
from hf_csm.serving.server.protocol import Message
from hf_csm.units import FRAME_RATE, Seconds


STUCK_S = 10.0
"""A step that takes longer means that the engine hangs."""

Command = Callable[[], list[Message]]


class Conversation(ABC):
    """A conversation that holds a slot after `Scheduler.acquire`. Used from the event loop, except for `on_frame`.

    Attributes:
        slot: index of the slot.
        queue: frames and commands for the engine; guarded by the scheduler's lock.
        is_released: the slot was given back; the results of work that is still in progress are dropped.
        num_frames: frames that the engine has stepped.
        num_waiting: frames that it has yet to step.
    """

    slot: int

    def __init__(self, scheduler: Scheduler):
        self.queue: deque[np.ndarray | Command] = deque()
        self.is_released = False
        self.num_frames = self.num_waiting = 0
        self._scheduler = scheduler
        self._has_room = asyncio.Event()

    @abstractmethod
    def on_frame(self, frame: Frame) -> list[Message]:
        """Return the messages to send for a generated frame. Called in the engine's thread."""

    @abstractmethod
    def enqueue(self, message: Message) -> None:
        """Queue a message for sending."""

    @abstractmethod
    def fail(self, error: BaseException) -> None:
        """Handle an error of a command, of `on_frame` or of the engine."""

    async def put(self, frame: np.ndarray) -> None:
        """Queue a frame of user audio, `[1920]`; waits while the backlog is full."""
        while self.num_waiting >= self._scheduler.max_backlog and not self.is_released:
            self._has_room.clear()
            await self._has_room.wait()
        self.num_waiting += 1
        self._scheduler.submit(self, frame)

    def submit(self, command: Command) -> None:
        """Run a command in the engine's thread after the frames queued before it, and send what it returns."""
        self._scheduler.submit(self, command)

    def release(self) -> None:
        """Free the slot; what is queued is dropped."""
        if not self.is_released:
            self.is_released = True
            self._has_room.set()
            self._scheduler.free(self)

    def deliver(self, step: Step) -> None:
        """Handle the results of a step."""
        if step.frame is not None:
            self.num_waiting -= 1
            self.num_frames += 1
            self._has_room.set()
        if self.is_released:
            return
        for message in step.messages:
            self.enqueue(message)
        if step.error is not None:
            self.fail(step.error)


@dataclass
class Step:
    """Work of one slot for one step of the engine, and its results."""

    conversation: Conversation
    commands: list[Command] = field(default_factory=list)
    frame: np.ndarray | None = None
    messages: list[Message] = field(default_factory=list)
    error: BaseException | None = None


class Scheduler:
    """The slots, and the thread that steps them.

    Attributes:
        max_backlog: frames of one user that may wait.
        error: what ended the thread; None while it runs.
        over: set when the engine failed. It cannot recover: the state of the device is unknown.
    """

    def __init__(self, engine: Engine, metrics: Metrics, *, max_backlog_s: Seconds = 2.0):
        self.max_backlog = max(1, round(max_backlog_s * FRAME_RATE))
        self.error: BaseException | None = None
        self._engine, self._metrics = engine, metrics
        self._conversations: dict[int, Conversation] = {}
        self._changed = threading.Condition()
        self._is_stopping = False
        self._busy_since: float | None = None
        self._ready, self.over = asyncio.Event(), asyncio.Event()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        metrics.slots.set(engine.num_slots)

    async def start(self) -> None:
        """Start the thread and wait until the engine is warm.

        Raises:
            RuntimeError: the engine failed.
        """
        self._loop = asyncio.get_running_loop()
        self._thread.start()
        await self._ready.wait()
        if self.error is not None:
            raise RuntimeError("the engine failed during warm-up") from self.error

    @property
    def num_slots(self) -> int:
        """Number of simultaneous conversations."""
        return self._engine.num_slots

    @property
    def num_free(self) -> int:
        """Number of free slots."""
        return self.num_slots - len(self._conversations)

    @property
    def is_healthy(self) -> bool:
        """Whether the engine runs and does not hang."""
        busy_since = self._busy_since
        is_stuck = busy_since is not None and time.monotonic() - busy_since > STUCK_S
        return self.error is None and self._thread.is_alive() and not is_stuck

    def acquire(self, conversation: Conversation) -> bool:
        """Give a free slot to a conversation; return False if all are taken."""
        for slot in range(self.num_slots):
            if slot not in self._conversations:
                conversation.slot = slot
                with self._changed:
                    self._conversations[slot] = conversation
                return True
        return False

    def submit(self, conversation: Conversation, work: np.ndarray | Command) -> None:
        """Queue work for a conversation; dropped if its slot is released before it runs."""
        with self._changed:
            conversation.queue.append(work)
            self._changed.notify()

    def free(self, conversation: Conversation) -> None:
        """Make the slot of a conversation available."""
        with self._changed:
            del self._conversations[conversation.slot]

    async def stop(self, timeout_s: Seconds = STUCK_S) -> None:
        """End the thread after its current step."""
        with self._changed:
            self._is_stopping = True
            self._changed.notify()
        await asyncio.to_thread(self._thread.join, timeout_s)

    def _run(self) -> None:
        try:
            self._engine.warm_up()
            self._call_in_loop(self._ready.set)
            while (steps := self._next_steps()) is not None:
                self._busy_since = time.monotonic()
                self._run_steps(steps)
                self._busy_since = None
        except BaseException as error:
            self.error = error
            self._call_in_loop(self._end)
        self._call_in_loop(self._ready.set)

    def _next_steps(self) -> list[Step] | None:
        """Wait for work, and take from each queue the commands up to its next frame, and that frame."""
        with self._changed:
            while not self._is_stopping:
                steps = [Step(one) for one in self._conversations.values() if one.queue]
                for step in steps:
                    queue = step.conversation.queue
                    while queue and step.frame is None:
                        work = queue.popleft()
                        if isinstance(work, np.ndarray):
                            step.frame = work
                        else:
                            step.commands.append(work)
                if steps:
                    return steps
                self._changed.wait()
        return None

    def _run_steps(self, steps: list[Step]) -> None:
        """Run the commands, then one engine step for all slots; an error of one client ends only its conversation."""
        for step in steps:
            try:
                for command in step.commands:
                    step.messages += command()
            except Exception as error:
                step.error = error
        active = [step for step in steps if step.error is None]
        frames = {step.conversation.slot: step.frame for step in active if step.frame is not None}
        if frames:
            start = time.perf_counter()
            generated = self._engine.step(frames)
            self._metrics.frame_time.observe(time.perf_counter() - start)
            self._metrics.frames.inc(len(frames))
            for step in active:
                if step.conversation.slot in generated:
                    try:
                        step.messages += step.conversation.on_frame(generated[step.conversation.slot])
                    except Exception as error:
                        step.error = error
        self._call_in_loop(self._deliver, steps)

    def _call_in_loop(self, function: Callable[..., None], *args: object) -> None:
        try:
            self._loop.call_soon_threadsafe(function, *args)
        except RuntimeError:  # the loop is closed
            self._is_stopping = True

    def _deliver(self, steps: list[Step]) -> None:
        for step in steps:
            step.conversation.deliver(step)

    def _end(self) -> None:
        failure = RuntimeError(f"the engine failed: {self.error}")
        for conversation in list(self._conversations.values()):
            conversation.deliver(Step(conversation, error=failure))
        self.over.set()
