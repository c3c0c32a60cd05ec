"""The HTTP side: the page, the API, who may use them, and connections that never say what they want."""

from __future__ import annotations

import asyncio
import hmac
import ssl
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from socket import socket
from typing import Any
from urllib.parse import urlsplit

from aiohttp import WSCloseCode, web

from hf_csm import __version__
from hf_csm.serving.loaded import MAX_STRENGTH, Speaker
from hf_csm.serving.server.connection import Connection, Refusal
from hf_csm.serving.server.journal import write
from hf_csm.serving.server.limits import Limits
from hf_csm.serving.server.metrics import Metrics
from hf_csm.serving.server.scheduler import Scheduler
from hf_csm.serving.server.session import End, Session, Socket
from hf_csm.units import FRAME_RATE, SAMPLE_RATE


PAGE = Path(__file__).parent.parent / "page"
LOCAL_NAMES = ("localhost", "127.0.0.1", "::1")
SECURITY_HEADERS = {
    # The last three are not covered by the first.
    "Content-Security-Policy": "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Permissions-Policy": "microphone=(self), camera=(), geolocation=()",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",  # the address of the page may hold the token
    "Cache-Control": "no-cache",
}
SERVER_STOPS = End("server_stops", WSCloseCode.GOING_AWAY, "the server is going down")
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Server:
    """Serves conversations with a speaker; the page and the API around them.

    Attributes:
        scheduler: `scheduler.over` is set when the engine failed; then nothing is left to serve.
    """

    def __init__(
        self,
        speaker: Speaker,
        *,
        model_type: str = "moshi",
        limits: Limits | None = None,
        token: str | None = None,
        allowed_origins: Sequence[str] = (),
        default_emotion: str | None = None,
        is_local: bool = True,
    ):
        """
        Args:
            token: who does not give it may see the page and whether the server is well.
            allowed_origins: sites whose pages may use the server beside its own, `https://host`; `*` is any.
            is_local: it may only be used under this machine's own names and those of allowed origins, so that no
                foreign name can be made to lead a browser here.
        """
        self.limits = limits or Limits()
        self.metrics = Metrics()
        self.scheduler = Scheduler(speaker.engine, self.metrics, max_backlog_s=self.limits.max_backlog_s)
        self._speaker, self._model_type, self._default_emotion = speaker, model_type, default_emotion
        self._token, self._allowed_origins, self._is_local = token, set(allowed_origins), is_local
        self._page = {"/" + path.relative_to(PAGE).as_posix(): path for path in PAGE.rglob("*") if path.is_file()}
        self._sessions: dict[Session, asyncio.Task[object] | None] = {}
        self._busy: set[object] = set()  # connections with a request under way
        self._is_stopping = False
        self._listeners: list[asyncio.Server] = []

    async def start(self, sockets: Sequence[socket], tls: ssl.SSLContext | None = None) -> None:
        """Warm the engine up, then take connections; returns when it does.

        Raises:
            RuntimeError: the engine failed.
        """
        await self.scheduler.start()
        self._runner = web.AppRunner(self._application(), shutdown_timeout=self.limits.closing_s)
        await self._runner.setup()
        create_server, handshake_s = asyncio.get_running_loop().create_server, self.limits.request_s if tls else None
        for listener in sockets:
            self._listeners.append(
                await create_server(self._connection, sock=listener, ssl=tls, ssl_handshake_timeout=handshake_s)
            )
        self._janitor = asyncio.create_task(self._close_silent_connections())

    async def stop(self) -> None:
        """End all conversations, then everything else."""
        self._is_stopping = True
        for listener in self._listeners:
            listener.close()
        tasks = [task for task in self._sessions.values() if task is not None]
        for session in self._sessions:
            session.end(SERVER_STOPS)
        if tasks:
            await asyncio.wait(tasks, timeout=self.limits.closing_s + 1)
        self._janitor.cancel()
        await self._runner.cleanup()
        await self.scheduler.stop()

    def _application(self) -> web.Application:
        application = web.Application(middlewares=[self._answer])
        application.router.add_get("/api/chat", self._chat)
        application.router.add_get("/api/info", self._info)
        application.router.add_get("/health", self._health)
        application.router.add_get("/metrics", self._show_metrics)
        application.router.add_get("/{path:.*}", self._show_page)
        return application

    # Who may come in

    def _connection(self) -> asyncio.Protocol:
        server = self._runner.server
        assert server is not None
        if len(server.connections) >= self.limits.max_connections:
            self.metrics.refused.labels("connections").inc()
            return Refusal()
        options: dict[str, Any] = {"access_log": None, "keepalive_timeout": 75, "lingering_time": 1}
        return Connection(server, loop=asyncio.get_running_loop(), **options)

    async def _close_silent_connections(self) -> None:
        """aiohttp lets a connection wait for ever for its first request, or in the middle of one."""
        silent_since: dict[object, float] = {}
        while True:
            await asyncio.sleep(self.limits.check_s)
            server, now_s = self._runner.server, time.monotonic()
            assert server is not None
            silent = [connection for connection in server.connections if connection not in self._busy]
            silent_since = {connection: silent_since.get(connection, now_s) for connection in silent}
            for connection in silent:
                if now_s - silent_since[connection] > self.limits.request_s:
                    connection.force_close()

    @web.middleware
    async def _answer(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Check who asks, answer in JSON where something is wrong, and log without the query."""
        connection = request.protocol
        self._busy.add(connection)
        try:
            refusal = self._turn_away(request)
            response = await handler(request) if refusal is None else refusal  # a web.Response is false
        except web.HTTPException as error:
            response = _problem(error.status, error.reason)
        except (ConnectionError, asyncio.CancelledError):
            raise
        except Exception as error:
            write("request failed", path=request.path, error=repr(error), is_error=True)
            response = _problem(500, "the server failed")
        finally:
            self._busy.discard(connection)
        if not response.prepared:
            response.headers.update(SECURITY_HEADERS)
            if (origin := request.headers.get("Origin")) and self._is_allowed(origin):
                response.headers.update({"Access-Control-Allow-Origin": origin, "Vary": "Origin"})
        write("request", method=request.method, path=request.path, status=response.status)
        return response

    def _turn_away(self, request: web.Request) -> web.Response | None:
        is_open = request.path == "/health" or request.path == "/" or request.path in self._page
        host = request.headers.get("Host", "localhost")  # which every browser names
        if not is_open and not self._is_known(host):
            self.metrics.refused.labels("host").inc()
            return _problem(
                403,
                f"This server answers to localhost, not to {host[:200]}. "
                f"Start it with --allow-origin {request.scheme}://{host[:200]}.",
            )
        origin = request.headers.get("Origin")  # browsers name it for the scripts of the page, too
        is_foreign = origin is not None and not self._is_allowed(origin) and _place(origin)[0] != host
        if origin is not None and is_foreign and not is_open:
            self.metrics.refused.labels("origin").inc()
            return _problem(
                403, f"Pages of {origin[:200]} may not use this server. Start it with --allow-origin {origin[:200]}."
            )
        if self._token is not None and not is_open and not self._knows_token(request):
            self.metrics.refused.labels("token").inc()
            return _problem(401, "This server wants a token: ?token=... or Authorization: Bearer ...")
        return None

    def _is_allowed(self, origin: str) -> bool:
        return "*" in self._allowed_origins or origin in self._allowed_origins

    def _is_known(self, host: str) -> bool:
        """Whether the server may be used under this name of `Host`."""
        names = {*LOCAL_NAMES, *(_place(origin)[1] for origin in self._allowed_origins)}
        return not self._is_local or "*" in self._allowed_origins or _place(f"//{host}")[1] in names

    def _knows_token(self, request: web.Request) -> bool:
        assert self._token is not None
        scheme, _, bearer = request.headers.get("Authorization", "").partition(" ")
        given = request.query.get("token") or (bearer if scheme.lower() == "bearer" else "")
        return hmac.compare_digest(
            given.encode(errors="surrogateescape"), self._token.encode(errors="surrogateescape")
        )

    # What there is

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        socket = Socket(self.limits)
        if not socket.can_prepare(request):
            return _problem(426, "Conversations are held over a WebSocket.")
        await socket.prepare(request)
        session = Session(
            socket,
            request,
            self._speaker,
            self.scheduler,
            self.limits,
            self.metrics,
            default_emotion=self._default_emotion,
        )
        self._sessions[session] = asyncio.current_task()
        if self._is_stopping:
            session.end(SERVER_STOPS)
        try:
            await session.run()
        finally:
            del self._sessions[session]
        return socket

    async def _info(self, request: web.Request) -> web.Response:
        speaker = self._speaker
        return web.json_response(
            {
                "base_model": _shown(speaker.base_name),
                "model_type": self._model_type,
                "frame_rate": FRAME_RATE,
                "sample_rate": SAMPLE_RATE,
                "slots": self.scheduler.num_slots,
                "free_slots": self.scheduler.num_free,
                "voices": [
                    {"name": voice.name, "emotions": list(voice.emotions), "control": voice.control.control}
                    for voice in speaker.voices
                ],
                "emotions": speaker.emotions,
                "strength": {"min": 0, "max": MAX_STRENGTH, "default": 1},
                "seeds": self.scheduler.num_slots == 1,
                "version": __version__,
            }
        )

    async def _health(self, request: web.Request) -> web.Response:
        if self.scheduler.is_well:
            return web.json_response({"status": "ok"})
        return web.json_response({"status": "failed" if self.scheduler.error else "stuck"}, status=503)

    async def _show_metrics(self, request: web.Request) -> web.Response:
        return web.Response(body=self.metrics.render(), headers={"Content-Type": self.metrics.content_type})

    async def _show_page(self, request: web.Request) -> web.StreamResponse:
        path = self._page.get("/index.html" if request.path == "/" else request.path)
        return _problem(404, "There is nothing here.") if path is None else web.FileResponse(path)


def _place(url: str) -> tuple[str, str | None]:
    """Return host and port as they are written, and the name alone; what is no URL has neither."""
    try:
        parts = urlsplit(url)
        return parts.netloc, parts.hostname
    except ValueError:
        return "", None


def _shown(model: str) -> str:
    """Return what strangers may see of a model's name: of a folder of this machine the last part.

    >>> _shown("kyutai/moshiko-pytorch-bf16"), _shown("/home/me/models/base")
    ('kyutai/moshiko-pytorch-bf16', 'base')
    """
    path = Path(model).expanduser()
    return path.resolve().name if path.is_absolute() or path.exists() else model


def _problem(status: int, message: str) -> web.Response:
    return web.json_response({"error": message}, status=status)
