"""`hf-csm serve`: check address, certificate and token, load the model, and serve until a signal."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import signal
import socket
import ssl
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from hf_csm.errors import UserError
from hf_csm.models.device import choose_device
from hf_csm.serving.loaded import engine_error, load_weights
from hf_csm.serving.resolve import resolve_models
from hf_csm.serving.server.app import LOCAL_NAMES, Server
from hf_csm.serving.server.limits import Limits


TOKEN_VARIABLE = "HF_CSM_TOKEN"
BUFFER_BYTES = 64 * 1024
"""Socket buffer per connection and direction; default sizes would hide minutes of audio from the limits."""
SIGNALS = (signal.SIGINT, signal.SIGTERM)
QUIET = ("aiohttp.access", "aiohttp.server", "aiohttp.websocket")
"""These loggers write raw requests, which may contain a token."""


@dataclass(frozen=True)
class ServeOptions:
    """Options of `hf-csm serve`; see its help."""

    names: Sequence[str]
    revision: str | None = None
    emotion: str | None = None
    host: str = "localhost"
    port: int = 8998
    slots: int = 1
    device: str | None = None
    dtype: str | None = None
    ssl: Path | None = None
    token_file: Path | None = None
    allow_origin: Sequence[str] = field(default_factory=tuple)
    max_minutes: float = 60.0


def serve(options: ServeOptions) -> None:
    """Serve until Ctrl-C or SIGTERM.

    Raises:
        UserError: the address cannot be used, certificate or token cannot be read, a model cannot be loaded, or the
            engine failed.
    """
    if options.slots < 1:
        raise UserError(f"--slots is {options.slots}.", "Use an integer of at least 1.")
    if not options.max_minutes > 0:
        raise UserError(f"--max-minutes is {options.max_minutes:g}.", "Use a number above 0.")
    for origin in options.allow_origin:
        if origin != "*" and (origin.count("/") != 2 or not origin.startswith(("http://", "https://"))):
            raise UserError(f"--allow-origin {origin} is not an origin.", "Use scheme and host: https://example.org")
    token, tls = read_token(options.token_file), read_certificate(options.ssl)
    sockets = bind(options.host, options.port)
    try:
        device = choose_device(options.device)
        models = resolve_models(options.names, options.revision)
        models.choose(options.emotion)
        model = load_weights(models, num_slots=options.slots, device=device, dtype=options.dtype)
        is_local = all(listener.getsockname()[0] in LOCAL_NAMES for listener in sockets)
        server = Server(
            model,
            model_type=models.family.name,
            limits=Limits(max_conversation_s=options.max_minutes * 60),
            token=token,
            allowed_origins=options.allow_origin,
            default_emotion=options.emotion,
            is_local=is_local,
        )
        logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", level=logging.INFO)
        for name in QUIET:
            logging.getLogger(name).setLevel(logging.CRITICAL)
        if not is_local and token is None:
            logging.warning("no token is set: anyone who can reach %s can use this server", options.host)
        port = sockets[0].getsockname()[1]
        try:
            asyncio.run(
                run_until_signal(server, sockets, tls, f"{'https' if tls else 'http'}://{options.host}:{port}")
            )
        except RuntimeError as error:
            if (failure := server.scheduler.error) is None:
                raise
            raise engine_error(failure, models.base_name, options.slots) from error
        model.close()
    finally:
        for listener in sockets:
            listener.close()


async def run_until_signal(
    server: Server, sockets: Sequence[socket.socket], tls: ssl.SSLContext | None, address: str
) -> None:
    """Run a server until a signal or a failure of the engine; a second signal ends the process at once.

    Raises:
        RuntimeError: the engine failed.
        UserError: the address is in use by now.
    """
    loop, stopped = asyncio.get_running_loop(), asyncio.Event()

    def stop() -> None:
        if not stopped.is_set():  # the same signal may arrive twice, from the terminal and from a parent process
            loop.call_later(1, lambda: [loop.remove_signal_handler(number) for number in SIGNALS])
        stopped.set()

    try:
        await server.start(sockets, tls)
    except OSError as error:  # another server took the port while the model was loaded
        await server.scheduler.stop()
        raise socket_error(error, *sockets[0].getsockname()[:2]) from error
    for number in SIGNALS:
        loop.add_signal_handler(number, stop)
    logging.info("serving at %s", address)
    waits = [asyncio.create_task(event.wait()) for event in (stopped, server.scheduler.over)]
    await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    for wait in waits:
        wait.cancel()
    logging.info("shutting down")
    await server.stop()
    if server.scheduler.error is not None:
        raise RuntimeError("the engine failed; all sessions were ended") from server.scheduler.error


def bind(host: str, port: int) -> list[socket.socket]:
    """Bind an address before the model is loaded; port 0 picks a free one.

    Raises:
        UserError: the address is in use, not permitted, or not on this machine.
    """
    if not 0 <= port <= 65535:
        raise UserError(f"--port is {port}.", "Use 1 to 65535, or 0 for any free port.")
    try:
        found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        raise UserError(
            f"--host {host} cannot be resolved: {error}.", "Use localhost, or 0.0.0.0 for all interfaces."
        ) from error
    sockets: list[socket.socket] = []
    failure: OSError | None = None
    for family, kind, protocol, _, address in dict.fromkeys(found):
        try:
            listener = socket.socket(family, kind, protocol)
        except OSError as error:  # IPv6 is not available
            failure = error
            continue
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            for buffer in (socket.SO_SNDBUF, socket.SO_RCVBUF):  # inherited by connections
                listener.setsockopt(socket.SOL_SOCKET, buffer, BUFFER_BYTES)
            if family == socket.AF_INET6:
                listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            if sockets:
                port = sockets[0].getsockname()[1]
            listener.bind((address[0], port, *address[2:]))
            sockets.append(listener)
        except OSError as error:
            listener.close()
            failure = error
            if error.errno != errno.EADDRNOTAVAIL:
                break
    if failure is not None and (not sockets or failure.errno in (errno.EADDRINUSE, errno.EACCES)):
        for listener in sockets:
            listener.close()
        raise socket_error(failure, host, port) from failure
    return sockets


def socket_error(error: OSError, host: str, port: int) -> UserError:
    """Convert an error of binding an address."""
    if error.errno == errno.EADDRINUSE:
        return UserError(
            f"Port {port} of {host} is in use.",
            "Stop the program that uses it, or choose another: --port 0 picks a free one.",
        )
    if error.errno in (errno.EACCES, errno.EPERM):
        return UserError(f"Port {port} of {host} is not permitted.", "Use a --port above 1023.")
    if error.errno == errno.EADDRNOTAVAIL:
        return UserError(
            f"--host {host} is not an address of this machine.", "Use localhost, or 0.0.0.0 for all interfaces."
        )
    return UserError(f"{host}:{port} cannot be used: {error.strerror}.", "Use another --host or --port.")


def read_certificate(folder: Path | None) -> ssl.SSLContext | None:
    """Load `cert.pem` and `key.pem` from a folder, as `moshi.server --ssl` does.

    Raises:
        UserError: a file is missing or invalid.
    """
    if folder is None:
        return None
    certificate, key = folder / "cert.pem", folder / "key.pem"
    for path in (certificate, key):
        try:
            path.read_bytes()
        except OSError as error:
            raise UserError(
                f"--ssl {folder}: {path.name} cannot be read: {error.strerror}.",
                "The folder must contain cert.pem and key.pem.",
            ) from error

    def no_password() -> str:
        raise UserError(f"--ssl {folder}: key.pem has a password.", "Use a key without one.")

    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    try:
        context.load_cert_chain(certificate, key, password=no_password)
    except ssl.SSLError as error:
        raise UserError(
            f"--ssl {folder}: cert.pem and key.pem are not a matching pair ({error.reason}).",
            "Create one: openssl req -x509 -newkey rsa:2048 -nodes -keyout key.pem -out cert.pem",
        ) from error
    return context


def read_token(path: Path | None) -> str | None:
    """Return the token from a file, else from the environment, else None.

    Raises:
        UserError: the file cannot be read or has no token.
    """
    if path is None:
        return os.environ.get(TOKEN_VARIABLE) or None
    try:
        token = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise UserError(
            f"--token-file {path} cannot be read: {reason}.", "Use a text file that contains only the token."
        ) from error
    if not token or len(token.split()) != 1:
        raise UserError(f"--token-file {path} must contain exactly one word.", "Write the token into it.")
    return token
