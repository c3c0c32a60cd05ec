"""HTTP server: page, API, access control and connection limits."""

from __future__ import annotations

import asyncio
import hmac
import logging
import ssl
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from socket import socket
from typing import Any
from urllib.parse import urlsplit

from aiohttp import web

from hf_csm import __version__
from hf_csm.serving.loaded import MAX_STRENGTH, LoadedModel
from hf_csm.serving.server.connection import Connection, Refusal
from hf_csm.serving.server.limits import Limits
from hf_csm.serving.server.metrics import Metrics
from hf_csm.serving.server.scheduler import Scheduler
from hf_csm.serving.server.session import SERVER_STOPS, Session, Socket
from hf_csm.units import FRAME_RATE, SAMPLE_RATE


LOGGER = logging.getLogger("hf_csm.serving")
"""Never logs query strings, which may contain a token."""
PAGE = Path(__file__).parent.parent / "page"
LOCAL_NAMES = ("localhost", "127.0.0.1", "::1")
SECURITY_HEADERS = {
    # The last three are not covered by default-src.
    "Content-Security-Policy": "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Permissions-Policy": "microphone=(self), camera=(), geolocation=()",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",  # the URL of the page may contain the token
    "Cache-Control": "no-cache",
}
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Server:
    """Serves conversations with a model, the page and the API.

    Attributes:
        scheduler: its `over` is set when the engine failed and the server must stop.
    """

    def __init__(
        self,
        model: LoadedModel,
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
            token: required for everything but the page and `/health`.
            allowed_origins: origins besides the server's own whose pages may use it, `https://host`; `*` for any.
            is_local: accept only this machine's own host names and those of allowed origins, against DNS rebinding.
        """
        self.limits = limits or Limits()
        self.metrics = Metrics()
        self.scheduler = Scheduler(model.engine, self.metrics, max_backlog_s=self.limits.max_backlog_s)
        self._model, self._model_type, self._default_emotion = model, model_type, default_emotion
        self._token, self._allowed_origins, self._is_local = token, set(allowed_origins), is_local
        self._page = {"/" + path.relative_to(PAGE).as_posix(): path for path in PAGE.rglob("*") if path.is_file()}
        self._sessions: dict[Session, asyncio.Task[object] | None] = {}
        self._busy: set[object] = set()  # connections with a request in progress
        self._is_stopping = False
        self._listeners: list[asyncio.Server] = []

    async def start(self, sockets: Sequence[socket], tls: ssl.SSLContext | None = None) -> None:
        """Warm up the engine, then listen.

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
        self._idle_task = asyncio.create_task(self._close_idle_connections())

    async def stop(self) -> None:
        """End all sessions and stop listening."""
        self._is_stopping = True
        for listener in self._listeners:
            listener.close()
        tasks = [task for task in self._sessions.values() if task is not None]
        for session in self._sessions:
            session.end(SERVER_STOPS)
        if tasks:
            await asyncio.wait(tasks, timeout=self.limits.closing_s + 1)
        self._idle_task.cancel()
        await self._runner.cleanup()
        await self.scheduler.stop()

    def _application(self) -> web.Application:
        application = web.Application(middlewares=[self._respond])
        application.router.add_get("/api/chat", self._chat)
        application.router.add_get("/api/info", self._info)
        application.router.add_get("/health", self._health)
        application.router.add_get("/metrics", self._show_metrics)
        application.router.add_get("/{path:.*}", self._show_page)
        return application

    # Connections and access control

    def _connection(self) -> asyncio.Protocol:
        server = self._runner.server
        assert server is not None
        if len(server.connections) >= self.limits.max_connections:
            self.metrics.refused.labels("connections").inc()
            return Refusal()
        options: dict[str, Any] = {"access_log": None, "keepalive_timeout": 75, "lingering_time": 1}
        return Connection(server, loop=asyncio.get_running_loop(), **options)

    async def _close_idle_connections(self) -> None:
        """Close connections without a complete request: aiohttp has no timeout for request headers."""
        idle_since: dict[object, float] = {}
        while True:
            await asyncio.sleep(self.limits.check_s)
            server, now_s = self._runner.server, time.monotonic()
            assert server is not None
            idle = [connection for connection in server.connections if connection not in self._busy]
            idle_since = {connection: idle_since.get(connection, now_s) for connection in idle}
            for connection in idle:
                if now_s - idle_since[connection] > self.limits.request_s:
                    connection.force_close()

    @web.middleware
    async def _respond(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Check access, convert errors to JSON responses, and log the request without its query string."""
        connection = request.protocol
        self._busy.add(connection)
        try:
            refusal = self._check_access(request)
            response = await handler(request) if refusal is None else refusal  # a web.Response is falsy
        except web.HTTPException as error:
            response = _error(error.status, error.reason)
        except (ConnectionError, asyncio.CancelledError):
            raise
        except Exception as error:
            LOGGER.error("request failed path=%r error=%r", request.path, error)
            response = _error(500, "Internal error.")
        finally:
            self._busy.discard(connection)
        if not response.prepared:
            response.headers.update(SECURITY_HEADERS)
            if (origin := request.headers.get("Origin")) and self._is_allowed_origin(origin):
                response.headers.update({"Access-Control-Allow-Origin": origin, "Vary": "Origin"})
        LOGGER.info("request method=%s path=%r status=%d", request.method, request.path, response.status)
        return response

    def _check_access(self, request: web.Request) -> web.Response | None:
        """Return the response to a request that is refused."""
        is_open = request.path == "/health" or request.path == "/" or request.path in self._page
        host = request.headers.get("Host", "localhost")  # every browser sends it
        if not is_open and not self._is_allowed_host(host):
            self.metrics.refused.labels("host").inc()
            return _error(
                403,
                f"Host {host[:200]} is not allowed; use localhost. "
                f"Or start the server with --allow-origin {request.scheme}://{host[:200]}.",
            )
        origin = request.headers.get("Origin")  # browsers also send it for the scripts of the page
        is_foreign = origin is not None and not self._is_allowed_origin(origin) and _split_host(origin)[0] != host
        if origin is not None and is_foreign and not is_open:
            self.metrics.refused.labels("origin").inc()
            return _error(
                403, f"Origin {origin[:200]} is not allowed. Start the server with --allow-origin {origin[:200]}."
            )
        if self._token is not None and not is_open and not self._has_token(request):
            self.metrics.refused.labels("token").inc()
            return _error(401, "This server requires a token: ?token=... or Authorization: Bearer ...")
        return None

    def _is_allowed_origin(self, origin: str) -> bool:
        return "*" in self._allowed_origins or origin in self._allowed_origins

    def _is_allowed_host(self, host: str) -> bool:
        """Whether requests with this `Host` header are accepted."""
        names = {*LOCAL_NAMES, *(_split_host(origin)[1] for origin in self._allowed_origins)}
        return not self._is_local or "*" in self._allowed_origins or _split_host(f"//{host}")[1] in names

    def _has_token(self, request: web.Request) -> bool:
        assert self._token is not None
        scheme, _, bearer = request.headers.get("Authorization", "").partition(" ")
        given = request.query.get("token") or (bearer if scheme.lower() == "bearer" else "")
        return hmac.compare_digest(
            given.encode(errors="surrogateescape"), self._token.encode(errors="surrogateescape")
        )

    # Routes

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        socket = Socket(self.limits)
        if not socket.can_prepare(request):
            return _error(426, "This address requires a WebSocket.")
        await socket.prepare(request)
        session = Session(
            socket,
            request,
            self._model,
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
        model = self._model
        return web.json_response(
            {
                "base_model": _public_name(model.base_name),
                "model_type": self._model_type,
                "frame_rate": FRAME_RATE,
                "sample_rate": SAMPLE_RATE,
                "slots": self.scheduler.num_slots,
                "free_slots": self.scheduler.num_free,
                "voices": [
                    {"name": choice.name, "emotions": list(choice.emotions), "control": choice.control.control}
                    for choice in model.choices
                ],
                "emotions": model.emotions,
                "strength": {"min": 0, "max": MAX_STRENGTH, "default": 1},
                "seeds": self.scheduler.num_slots == 1,
                "version": __version__,
            }
        )

    async def _health(self, request: web.Request) -> web.Response:
        if self.scheduler.is_healthy:
            return web.json_response({"status": "ok"})
        return web.json_response({"status": "failed" if self.scheduler.error else "stuck"}, status=503)

    async def _show_metrics(self, request: web.Request) -> web.Response:
        return web.Response(body=self.metrics.render(), headers={"Content-Type": self.metrics.content_type})

    async def _show_page(self, request: web.Request) -> web.StreamResponse:
        path = self._page.get("/index.html" if request.path == "/" else request.path)
        return _error(404, "Not found.") if path is None else web.FileResponse(path)


def _split_host(url: str) -> tuple[str, str | None]:
    """Return host with port, and host name, of a URL; neither if it is invalid."""
    try:
        parts = urlsplit(url)
        return parts.netloc, parts.hostname
    except ValueError:
        return "", None


def _public_name(model: str) -> str:
    """Return the name of a model for clients: of a local folder only the last part.

    >>> _public_name("kyutai/moshiko-pytorch-bf16"), _public_name("/home/me/models/base")
    ('kyutai/moshiko-pytorch-bf16', 'base')
    """
    path = Path(model).expanduser()
    return path.resolve().name if path.is_absolute() or path.exists() else model


def _error(status: int, message: str) -> web.Response:
    return web.json_response({"error": message}, status=status)
