"""One conversation over one WebSocket, from handshake to close frame.

Three tasks receive, send and check time limits. The first that ends the session ends all; the slot is freed before the
close handshake, so that no client can hold it.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import logging
import time
from collections import deque
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any, cast

import aiohttp
from aiohttp import WSCloseCode, WSMsgType, web

from hf_csm.errors import UserError
from hf_csm.models.family import Frame
from hf_csm.serving.loaded import LoadedModel
from hf_csm.serving.server.connection import Connection
from hf_csm.serving.server.limits import Limits, TokenBucket, close_reason
from hf_csm.serving.server.metrics import Metrics
from hf_csm.serving.server.protocol import (
    AUDIO,
    AUDIO_FORMATS,
    HANDSHAKE,
    BadAudio,
    Event,
    Framer,
    Handshake,
    Message,
    Pong,
    text_message,
)
from hf_csm.serving.server.scheduler import Conversation, Scheduler
from hf_csm.serving.server.steering import TRUE, SteeringState, error_event, read_control, read_query
from hf_csm.units import SAMPLE_RATE, SAMPLES_PER_FRAME


LOGGER = logging.getLogger("hf_csm.serving")
"""Never logs audio, text, tokens or query strings."""
MIN_PACED_SAMPLES = SAMPLE_RATE // 100
"""Messages with at least 10 ms of audio are paced by the engine; all others are rate-limited."""
UNSENT_BYTES = 16 * 1024
"""Write buffer of the event loop, in addition to the socket buffer; frames beyond it are counted."""
DEFAULT_REASONS: dict[int, bytes] = {
    WSCloseCode.MESSAGE_TOO_BIG: b"message too large",
    WSCloseCode.PROTOCOL_ERROR: b"invalid WebSocket frame",
    WSCloseCode.INVALID_TEXT: b"text is not UTF-8",
}
_numbers = itertools.count(1)


@dataclass(frozen=True)
class End:
    """Why a session ended.

    Attributes:
        label: for metrics and log.
        code: of the close frame; None if the client is gone.
        reason: of the close frame, human-readable.
    """

    label: str
    code: int | None = None
    reason: str = ""


LEFT = End("client_left")
VANISHED = End("vanished")
TOO_LARGE = End("bad_message", WSCloseCode.MESSAGE_TOO_BIG, "message too large")
SERVER_STOPS = End("server_stops", WSCloseCode.GOING_AWAY, "server is shutting down")


class Socket(web.WebSocketResponse):
    """A WebSocket that gives a reason in its close frames after an error."""

    def __init__(self, limits: Limits):
        super().__init__(
            timeout=limits.closing_s,
            autoping=False,  # pongs go through the send queue, which is bounded
            heartbeat=limits.heartbeat_s,
            compress=False,  # audio is already compressed, and decompression could exhaust memory
            max_msg_size=limits.max_message_bytes,
            writer_limit=0,  # drain after each message, so that the send queue is measured
        )

    async def close(self, *, code: int = WSCloseCode.OK, message: bytes = b"", drain: bool = True) -> bool:
        return await super().close(code=code, message=message or DEFAULT_REASONS.get(code, b""), drain=drain)


class Session(Conversation):
    """A conversation with one client.

    Attributes:
        number: for the log.
    """

    def __init__(
        self,
        socket: Socket,
        request: web.Request,
        model: LoadedModel,
        scheduler: Scheduler,
        limits: Limits,
        metrics: Metrics,
        *,
        default_emotion: str | None,
    ):
        super().__init__(scheduler)
        self.number = next(_numbers)
        self._socket, self._transport = socket, request.transport
        self._connection = cast(Connection, request.protocol)
        self._connection.max_message_bytes = limits.max_message_bytes
        self._connection.on_too_large = lambda: self.end(TOO_LARGE)
        self._query = request.query
        self._model, self._limits, self._metrics = model, limits, metrics
        self._default_emotion = default_emotion
        self._bucket = TokenBucket(limits.messages_per_s, limits.messages_burst)
        self._over: asyncio.Future[End] = asyncio.get_running_loop().create_future()
        self._unsent: deque[Message] = deque()
        self._num_unsent_frames = 0
        self._has_unsent = asyncio.Event()
        self._sends_events = False
        self._began_s = self._last_audio_s = time.monotonic()

    def end(self, end: End) -> None:
        """End the session, unless it has ended already."""
        if not self._over.done():
            self._over.set_result(end)

    async def run(self) -> None:
        """Run the session to its end."""
        try:
            options = read_query(
                self._query,
                self._model,
                default_emotion=self._default_emotion,
                takes_seeds=self._scheduler.num_slots == 1,
            )
        except UserError as error:
            await self._refuse(error, End("query", WSCloseCode.POLICY_VIOLATION, error.problem))
            return
        if not self._scheduler.acquire(self):
            busy = UserError(f"busy: all {self._scheduler.num_slots} slots are in use;", "try again later")
            reason = f"{busy.problem} {busy.remedy}"
            await self._refuse(busy, End("busy", WSCloseCode.TRY_AGAIN_LATER, reason))
            return
        self._steering = SteeringState(self._model, self.slot, options)
        self._sends_events = options.events
        self._audio = AUDIO_FORMATS[options.audio]()
        self._framer = Framer(self._audio)
        self._metrics.sessions.inc()
        self._metrics.sessions_active.inc()
        LOGGER.info("session started session=%d slot=%d audio=%s", self.number, self.slot, options.audio)
        if self._transport is not None:
            self._transport.set_write_buffer_limits(high=UNSENT_BYTES)
        self.submit(self._steering.start)
        tasks = [asyncio.create_task(self._guard(work)) for work in (self._receive, self._send, self._watch)]
        end = SERVER_STOPS
        try:
            end = await self._over
        finally:
            self.release()
            self._metrics.sessions_active.dec()
            if end is not LEFT:
                self._metrics.drops.labels(end.label).inc()
            LOGGER.info(
                "session ended session=%d slot=%d reason=%s seconds=%.1f frames=%d",
                self.number,
                self.slot,
                end.label,
                time.monotonic() - self._began_s,
                self.num_frames,
            )
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await self._close(end)

    async def _refuse(self, error: UserError, end: End) -> None:
        self._metrics.refused.labels(end.label).inc()
        LOGGER.info("session refused session=%d reason=%s", self.number, end.label)
        if self._query.get("events", "").lower() in TRUE:
            await self._try_send(self._socket.send_json(error_event(error).content))
        await self._close(end)

    async def _close(self, end: End) -> None:
        if end.code is not None:
            await self._try_send(self._socket.close(code=end.code, message=close_reason(end.reason)))
        # Unread data would stay in memory as long as the client keeps the connection open.
        if self._transport is not None and (end is VANISHED or self._transport.get_write_buffer_size()):
            self._transport.abort()

    async def _try_send(self, sending: Coroutine[Any, Any, Any]) -> None:
        with contextlib.suppress(OSError, RuntimeError, asyncio.TimeoutError):  # the client is gone
            await asyncio.wait_for(sending, self._limits.closing_s + 0.5)

    async def _guard(self, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        try:
            await work()
        except (ConnectionError, aiohttp.ClientError):
            self.end(VANISHED)
        except asyncio.CancelledError:
            raise
        except BaseException as error:  # a panic of the Opus extension derives from BaseException
            self.fail(error)

    # Called by the scheduler

    def on_frame(self, frame: Frame) -> list[Message]:
        return self._steering.on_frame(frame)

    def fail(self, error: BaseException) -> None:
        LOGGER.error("session failed session=%d error=%r", self.number, error)
        self.end(End("failed", WSCloseCode.INTERNAL_ERROR, "internal error"))

    def enqueue(self, message: Message) -> None:
        if isinstance(message, Event) and not self._sends_events:
            return
        self._unsent.append(message)
        self._has_unsent.set()
        if isinstance(message, Frame):
            self._num_unsent_frames += 1
        limit = self._limits.max_unsent_s * SAMPLE_RATE / SAMPLES_PER_FRAME
        if self._num_unsent_frames > limit or len(self._unsent) > 10 * limit + 100:
            self.end(End("slow_reader", WSCloseCode.POLICY_VIOLATION, "client reads too slowly"))

    # Receiving

    async def _receive(self) -> None:
        while True:
            message = await self._socket.receive()
            self._connection.num_bytes = 0
            if message.type is WSMsgType.ERROR:
                self.end(End("bad_message") if isinstance(message.data, aiohttp.WebSocketError) else VANISHED)
                return
            if message.type in (WSMsgType.CLOSE, WSMsgType.CLOSING, WSMsgType.CLOSED):
                self.end(LEFT if message.type is WSMsgType.CLOSE else VANISHED)
                return
            before = self._framer.num_samples
            if message.type is WSMsgType.BINARY:
                if not await self._on_binary(message.data):
                    return
            elif message.type is WSMsgType.TEXT:
                self._on_text(message.data)
            elif message.type is WSMsgType.PING:
                self.enqueue(Pong(message.data))
            if self._framer.num_samples - before < MIN_PACED_SAMPLES and not self._bucket.take():
                self.end(End("too_fast", WSCloseCode.POLICY_VIOLATION, "too many messages"))
                return

    async def _on_binary(self, data: bytes) -> bool:
        """Handle a binary message; return False if it ends the session."""
        if not data:
            self._metrics.ignored.labels("empty").inc()
        elif data[0] == AUDIO:
            try:
                for frame in self._framer.frames(data[1:]):
                    self._last_audio_s = time.monotonic()
                    await self.put(frame)
            except BadAudio as error:
                self.end(End("bad_audio", WSCloseCode.INVALID_TEXT, str(error)))
                return False
        else:
            self._metrics.ignored.labels("unknown_kind").inc()
        return True

    def _on_text(self, text: str) -> None:
        self._sends_events = True
        try:
            if len(text) > self._limits.max_control_bytes:
                raise UserError(
                    "Control message too long.", f"The limit is {self._limits.max_control_bytes} characters."
                )
            request = read_control(text)
        except UserError as error:
            self._metrics.ignored.labels("bad_control").inc()
            self.enqueue(error_event(error))
            return
        self.submit(lambda: self._steering.on_request(request))

    # Sending

    async def _send(self) -> None:
        while True:
            await self._has_unsent.wait()
            while self._unsent:
                match self._unsent.popleft():
                    case Frame() as frame:
                        self._num_unsent_frames -= 1
                        await self._send_frame(frame)
                    case Event(content):
                        await self._socket.send_str(json.dumps(content))
                    case Handshake():
                        await self._socket.send_bytes(bytes([HANDSHAKE]))
                    case Pong(payload):
                        await self._socket.pong(payload)
            self._has_unsent.clear()

    async def _send_frame(self, frame: Frame) -> None:
        payload = self._audio.encode(frame.audio)
        if payload:
            await self._socket.send_bytes(bytes([AUDIO]) + payload)
        if frame.text_token not in self._model.engine.padding_ids:
            await self._socket.send_bytes(text_message(self._model.tokenizer.id_to_piece(frame.text_token)))

    # Time limits

    async def _watch(self) -> None:
        limits = self._limits
        while True:
            await asyncio.sleep(limits.check_s)
            now_s = time.monotonic()
            if now_s - self._began_s > limits.max_conversation_s:
                limit = f"{limits.max_conversation_s / 60:g} minutes"
                self.end(End("too_long", WSCloseCode.POLICY_VIOLATION, f"session limit of {limit} reached"))
            elif now_s - self._last_audio_s > limits.idle_s:
                self.end(End("idle", WSCloseCode.POLICY_VIOLATION, f"no audio for {limits.idle_s:g} seconds"))
