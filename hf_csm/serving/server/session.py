"""One conversation over one WebSocket, from handshake to close frame.

Three tasks: one reads, one writes, one looks at the clock. The first that finds a reason ends them all; the slot is
given back before the client is told, so that no client can hold it.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import time
from collections import deque
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any, cast

import aiohttp
from aiohttp import WSCloseCode, WSMsgType, web

from hf_csm.errors import UserError
from hf_csm.models.family import Frame
from hf_csm.serving.loaded import Speaker
from hf_csm.serving.server.connection import Connection
from hf_csm.serving.server.journal import write
from hf_csm.serving.server.limits import Limits, TokenBucket, close_reason
from hf_csm.serving.server.metrics import Metrics
from hf_csm.serving.server.protocol import AUDIO, AUDIO_FORMATS, HANDSHAKE, BadAudio, Framer, text_message
from hf_csm.serving.server.scheduler import Scheduler
from hf_csm.serving.server.steering import HANDSHAKE_NOW, TRUE, Talk, error_message, read_control, read_query
from hf_csm.units import SAMPLE_RATE, SAMPLES_PER_FRAME


ENOUGH_SAMPLES = SAMPLE_RATE // 100
"""A message that brings 10 ms of audio is paced by the engine and needs no other limit."""
UNSENT_BYTES = 16 * 1024
"""That the event loop keeps for a slow reader, beside the system's buffer; then frames are counted."""
DEFAULT_REASONS: dict[int, bytes] = {
    WSCloseCode.MESSAGE_TOO_BIG: b"too large a message",
    WSCloseCode.PROTOCOL_ERROR: b"not a WebSocket message",
    WSCloseCode.INVALID_TEXT: b"text that is not UTF-8",
}
PING, PONG = object(), object()
_numbers = itertools.count(1)


@dataclass(frozen=True)
class End:
    """Why a conversation is over.

    Attributes:
        label: for the metrics and the log.
        code: of the close frame; None where there is nobody to send it to.
        reason: for people, in the close frame.
    """

    label: str
    code: int | None = None
    reason: str = ""


LEFT = End("client_left")
VANISHED = End("vanished")
TOO_LARGE = End("bad_message", WSCloseCode.MESSAGE_TOO_BIG, "too large a message")
ENDS_OF_CLIENTS = (LEFT.label,)


class Socket(web.WebSocketResponse):
    """A WebSocket whose close frames always have a reason where something was wrong."""

    def __init__(self, limits: Limits):
        super().__init__(
            timeout=limits.closing_s,
            autoping=False,
            compress=False,  # audio is compressed already, and what is inflated can be very large
            max_msg_size=limits.max_message_bytes,
            writer_limit=0,  # waits for the line after each message, so that what is unsent is known
        )

    async def close(self, *, code: int = WSCloseCode.OK, message: bytes = b"", drain: bool = True) -> bool:
        return await super().close(code=code, message=message or DEFAULT_REASONS.get(code, b""), drain=drain)


class Session:
    """A client's conversation.

    Attributes:
        number: of the session, for the log.
    """

    def __init__(
        self,
        socket: Socket,
        request: web.Request,
        speaker: Speaker,
        scheduler: Scheduler,
        limits: Limits,
        metrics: Metrics,
        *,
        default_emotion: str | None,
    ):
        self.number = next(_numbers)
        self._socket, self._transport = socket, request.transport
        self._connection = cast(Connection, request.protocol)
        self._connection.max_message_bytes = limits.max_message_bytes
        self._connection.on_too_large = lambda: self.end(TOO_LARGE)
        self._query = request.query
        self._speaker, self._scheduler, self._limits, self._metrics = speaker, scheduler, limits, metrics
        self._default_emotion = default_emotion
        self._bucket = TokenBucket(limits.messages_per_s, limits.messages_burst)
        self._over: asyncio.Future[End] = asyncio.get_running_loop().create_future()
        self._unsent: deque[object] = deque()
        self._num_unsent_frames = 0
        self._has_unsent = asyncio.Event()
        self._wants_events = False
        self._began_s = self._last_audio_s = time.monotonic()
        self._waiting_since_s: float | None = None
        self._is_pinged = False

    def end(self, end: End) -> None:
        """End it for this reason, unless it has ended already."""
        if not self._over.done():
            self._over.set_result(end)

    async def run(self) -> None:
        """Hold the conversation, whatever happens in it."""
        try:
            opening = read_query(
                self._query,
                self._speaker,
                default_emotion=self._default_emotion,
                takes_seeds=self._scheduler.num_slots == 1,
            )
        except UserError as error:
            await self._refuse(error, End("query", WSCloseCode.POLICY_VIOLATION, error.problem))
            return
        lane = self._scheduler.acquire(self._hear, self._deliver, self._fail)
        if lane is None:
            busy = UserError(f"busy: all {self._scheduler.num_slots} conversations are taken;", "try again later")
            reason = f"{busy.problem} {busy.remedy}"
            await self._refuse(busy, End("busy", WSCloseCode.TRY_AGAIN_LATER, reason))
            return
        self._lane = lane
        self._talk = Talk(self._speaker, lane.slot, opening)
        self._wants_events = opening.events
        self._audio = AUDIO_FORMATS[opening.audio]()
        self._framer = Framer(self._audio)
        self._metrics.sessions.inc()
        self._metrics.sessions_active.inc()
        write("conversation begins", session=self.number, slot=lane.slot, audio=opening.audio)
        if self._transport is not None:
            self._transport.set_write_buffer_limits(high=UNSENT_BYTES)
        lane.call(self._talk.begin)
        tasks = [asyncio.create_task(self._guard(work)) for work in (self._receive, self._send, self._watch)]
        end = End("server_stops", WSCloseCode.GOING_AWAY, "the server is going down")
        try:
            end = await self._over
        finally:
            lane.release()
            self._metrics.sessions_active.dec()
            if end.label not in ENDS_OF_CLIENTS:
                self._metrics.drops.labels(end.label).inc()
            write(
                "conversation ends",
                session=self.number,
                slot=lane.slot,
                why=end.label,
                seconds=round(time.monotonic() - self._began_s, 1),
                frames=lane.num_frames,
            )
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await self._close(end)

    async def _refuse(self, error: UserError, end: End) -> None:
        self._metrics.refused.labels(end.label).inc()
        write("conversation refused", session=self.number, why=end.label)
        if self._query.get("events", "").lower() in TRUE:
            await self._quietly(self._socket.send_json(error_message(error)))
        await self._close(end)

    async def _close(self, end: End) -> None:
        if end.code is not None:
            await self._quietly(self._socket.close(code=end.code, message=close_reason(end.reason)))
        # What a client does not read would stay in memory for as long as it holds the line.
        if self._transport is not None and (end is VANISHED or self._transport.get_write_buffer_size()):
            self._transport.abort()

    async def _quietly(self, sending: Coroutine[Any, Any, Any]) -> None:
        with contextlib.suppress(OSError, RuntimeError, asyncio.TimeoutError):  # nobody is there to be told
            await asyncio.wait_for(sending, self._limits.closing_s + 0.5)

    async def _guard(self, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        try:
            await work()
        except (ConnectionError, aiohttp.ClientError):
            self.end(VANISHED)
        except asyncio.CancelledError:
            raise
        except BaseException as error:  # a panic of the Opus extension is no Exception
            self._fail(error)

    # The engine's side

    def _hear(self, frame: Frame) -> list[object]:
        return self._talk.hear(frame)

    def _fail(self, error: BaseException) -> None:
        write("conversation failed", session=self.number, error=repr(error), is_error=True)
        self.end(End("failed", WSCloseCode.INTERNAL_ERROR, "the server failed"))

    def _deliver(self, thing: object) -> None:
        if isinstance(thing, dict) and not self._wants_events:
            return
        self._unsent.append(thing)
        self._has_unsent.set()
        if isinstance(thing, Frame):
            self._num_unsent_frames += 1
        limit = self._limits.max_unsent_s * SAMPLE_RATE / SAMPLES_PER_FRAME
        if self._num_unsent_frames > limit or len(self._unsent) > 10 * limit + 100:
            self.end(End("slow_reader", WSCloseCode.POLICY_VIOLATION, "too slow a reader"))

    # From the client

    async def _receive(self) -> None:
        while True:
            self._waiting_since_s = time.monotonic()
            message = await self._socket.receive()
            self._waiting_since_s, self._is_pinged = None, False
            self._connection.num_bytes = 0
            if message.type is WSMsgType.ERROR:
                self.end(End("bad_message") if isinstance(message.data, aiohttp.WebSocketError) else VANISHED)
                return
            if message.type in (WSMsgType.CLOSE, WSMsgType.CLOSING, WSMsgType.CLOSED):
                self.end(LEFT if message.type is WSMsgType.CLOSE else VANISHED)
                return
            before = self._framer.num_samples
            if message.type is WSMsgType.BINARY:
                if not await self._take_binary(message.data):
                    return
            elif message.type is WSMsgType.TEXT:
                self._take_text(message.data)
            elif message.type is WSMsgType.PING:
                self._deliver((PONG, message.data))
            if self._framer.num_samples - before < ENOUGH_SAMPLES and not self._bucket.take():
                self.end(End("too_fast", WSCloseCode.POLICY_VIOLATION, "too many messages"))
                return

    async def _take_binary(self, data: bytes) -> bool:
        """Take in a message; False ends the conversation."""
        if not data:
            self._metrics.ignored.labels("empty").inc()
        elif data[0] == AUDIO:
            try:
                for frame in self._framer.frames(data[1:]):
                    self._last_audio_s = time.monotonic()
                    await self._lane.put(frame)
            except BadAudio as error:
                self.end(End("bad_audio", WSCloseCode.INVALID_TEXT, str(error)))
                return False
        else:
            self._metrics.ignored.labels("unknown_kind").inc()
        return True

    def _take_text(self, text: str) -> None:
        self._wants_events = True
        try:
            if len(text) > self._limits.max_control_bytes:
                raise UserError("Too long a control message.", f"Keep to {self._limits.max_control_bytes} characters.")
            wish = read_control(text)
        except UserError as error:
            self._metrics.ignored.labels("bad_control").inc()
            self._deliver(error_message(error))
            return
        self._lane.call(lambda: self._talk.wish(wish))

    # To the client

    async def _send(self) -> None:
        while True:
            await self._has_unsent.wait()
            while self._unsent:
                thing = self._unsent.popleft()
                if isinstance(thing, Frame):
                    self._num_unsent_frames -= 1
                    await self._send_frame(thing)
                elif isinstance(thing, dict):
                    await self._socket.send_str(json.dumps(thing))
                elif thing is HANDSHAKE_NOW:
                    await self._socket.send_bytes(bytes([HANDSHAKE]))
                elif thing is PING:
                    await self._socket.ping()
                elif isinstance(thing, tuple):
                    await self._socket.pong(thing[1])
            self._has_unsent.clear()

    async def _send_frame(self, frame: Frame) -> None:
        sound = self._audio.encode(frame.audio)
        if sound:
            await self._socket.send_bytes(bytes([AUDIO]) + sound)
        if frame.text_token not in self._speaker.engine.padding_ids:
            await self._socket.send_bytes(text_message(self._speaker.tokenizer.id_to_piece(frame.text_token)))

    # The clock

    async def _watch(self) -> None:
        limits = self._limits
        while True:
            await asyncio.sleep(limits.check_s)
            now_s = time.monotonic()
            if now_s - self._began_s > limits.max_conversation_s:
                longest = f"{limits.max_conversation_s / 60:g} minutes"
                self.end(
                    End("too_long", WSCloseCode.POLICY_VIOLATION, f"too long a conversation: the limit is {longest}")
                )
            elif now_s - self._last_audio_s > limits.idle_s:
                self.end(End("idle", WSCloseCode.POLICY_VIOLATION, f"no audio for {limits.idle_s:g} seconds"))
            elif self._waiting_since_s is not None and now_s - self._waiting_since_s > limits.vanished_s:
                self.end(VANISHED)
            elif (
                self._waiting_since_s is not None
                and now_s - self._waiting_since_s > limits.ping_s
                and not self._is_pinged
            ):
                self._is_pinged = True
                self._deliver(PING)
