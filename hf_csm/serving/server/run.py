"""`hf-csm serve`: address, certificate and token first, then the model, then conversations until a signal."""

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
from hf_csm.serving.loaded import choose_device, explain_failure, find_models, load_models
from hf_csm.serving.server.app import LOCAL_NAMES, Server
from hf_csm.serving.server.limits import Limits


TOKEN_VARIABLE = "HF_CSM_TOKEN"
BUFFER_BYTES = 64 * 1024
"""Of the system for each connection and way; its own choice would hide minutes of audio from the limits."""
SIGNALS = (signal.SIGINT, signal.SIGTERM)
QUIET = ("aiohttp.access", "aiohttp.server", "aiohttp.websocket")
"""They log requests as they came, which may hold a token; the server answers for its own errors."""


@dataclass(frozen=True)
class ServeOptions:
    """What `hf-csm serve` was told; see its help."""

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
        UserError: the address is taken or not ours, certificate or token cannot be read, a model cannot be loaded, or
            the engine failed.
    """
    if options.slots < 1:
        raise UserError(f"--slots is {options.slots}.", "Give a whole number of at least 1.")
    if not options.max_minutes > 0:
        raise UserError(f"--max-minutes is {options.max_minutes:g}.", "Give more than 0.")
    for origin in options.allow_origin:
        if origin != "*" and (origin.count("/") != 2 or not origin.startswith(("http://", "https://"))):
            raise UserError(f"--allow-origin {origin} is no origin.", "Give scheme and host: https://example.org")
    token, tls = read_token(options.token_file), read_certificate(options.ssl)
    sockets = bind(options.host, options.port)
    try:
        device = choose_device(options.device)
        models = find_models(options.names, options.revision)
        models.choose(options.emotion)
        speaker = load_models(models, num_slots=options.slots, device=device, dtype=options.dtype)
        is_local = all(listener.getsockname()[0] in LOCAL_NAMES for listener in sockets)
        server = Server(
            speaker,
            model_type=models.base.model_type,
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
            logging.warning("anybody who can reach %s can talk to this server: no token is set", options.host)
        port = sockets[0].getsockname()[1]
        try:
            asyncio.run(hold(server, sockets, tls, f"{'https' if tls else 'http'}://{options.host}:{port}"))
        except RuntimeError as error:
            if (failure := server.scheduler.error) is None:
                raise
            raise explain_failure(failure, models.base_name, options.slots) from error
        speaker.close()
    finally:
        for listener in sockets:
            listener.close()


async def hold(server: Server, sockets: Sequence[socket.socket], tls: ssl.SSLContext | None, address: str) -> None:
    """Run a server until a signal comes or its engine fails; a second signal ends it at once.

    Raises:
        RuntimeError: the engine failed.
        UserError: the address was taken meanwhile.
    """
    loop, stopped = asyncio.get_running_loop(), asyncio.Event()

    def stop() -> None:
        if not stopped.is_set():  # the same signal may come twice, from the terminal and from a parent
            loop.call_later(1, lambda: [loop.remove_signal_handler(number) for number in SIGNALS])
        stopped.set()

    try:
        await server.start(sockets, tls)
    except OSError as error:  # another server took the port while the model was loaded
        await server.scheduler.stop()
        raise explain(error, *sockets[0].getsockname()[:2]) from error
    for number in SIGNALS:
        loop.add_signal_handler(number, stop)
    logging.info("serving at %s", address)
    waits = [asyncio.create_task(event.wait()) for event in (stopped, server.scheduler.over)]
    await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    for wait in waits:
        wait.cancel()
    logging.info("going down")
    await server.stop()
    if server.scheduler.error is not None:
        raise RuntimeError("the engine failed; conversations were ended") from server.scheduler.error


def bind(host: str, port: int) -> list[socket.socket]:
    """Take an address before the model is loaded; port 0 is any that is free.

    Raises:
        UserError: it is in use, not allowed, or not of this machine.
    """
    if not 0 <= port <= 65535:
        raise UserError(f"--port is {port}.", "Give 1 to 65535, or 0 for any that is free.")
    try:
        found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        raise UserError(f"--host {host} is not known: {error}.", "Give localhost, or 0.0.0.0 for all.") from error
    sockets: list[socket.socket] = []
    failure: OSError | None = None
    for family, kind, protocol, _, address in dict.fromkeys(found):
        try:
            listener = socket.socket(family, kind, protocol)
        except OSError as error:  # no IPv6 on this machine
            failure = error
            continue
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            for buffer in (socket.SO_SNDBUF, socket.SO_RCVBUF):  # connections inherit them
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
        raise explain(failure, host, port) from failure
    return sockets


def explain(error: OSError, host: str, port: int) -> UserError:
    """Return what a user can do about an address that cannot be used."""
    if error.errno == errno.EADDRINUSE:
        return UserError(f"Port {port} of {host} is in use.", "Stop what uses it, or give another: --port 0 is any.")
    if error.errno in (errno.EACCES, errno.EPERM):
        return UserError(f"Port {port} of {host} is not allowed to you.", "Give a --port above 1023.")
    if error.errno == errno.EADDRNOTAVAIL:
        return UserError(f"--host {host} is not of this machine.", "Give localhost, or 0.0.0.0 for all.")
    return UserError(f"{host}:{port} cannot be used: {error.strerror}.", "Give another --host or --port.")


def read_certificate(folder: Path | None) -> ssl.SSLContext | None:
    """Return what serves TLS with `cert.pem` and `key.pem`, as `moshi.server --ssl` has them.

    Raises:
        UserError: one is missing, or they are not certificate and key.
    """
    if folder is None:
        return None
    certificate, key = folder / "cert.pem", folder / "key.pem"
    for path in (certificate, key):
        try:
            path.read_bytes()
        except OSError as error:
            raise UserError(
                f"--ssl {folder}: {path.name} cannot be read: {error.strerror}.", "Put cert.pem and key.pem there."
            ) from error

    def no_password() -> str:
        raise UserError(f"--ssl {folder}: key.pem has a password.", "Give a key without one.")

    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    try:
        context.load_cert_chain(certificate, key, password=no_password)
    except ssl.SSLError as error:
        raise UserError(
            f"--ssl {folder}: cert.pem and key.pem are no certificate and its key ({error.reason}).",
            "Make a pair: openssl req -x509 -newkey rsa:2048 -nodes -keyout key.pem -out cert.pem",
        ) from error
    return context


def read_token(path: Path | None) -> str | None:
    """Return the token of a file, else of the environment; None when neither names one.

    Raises:
        UserError: the file cannot be read or holds no token.
    """
    if path is None:
        return os.environ.get(TOKEN_VARIABLE) or None
    try:
        token = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise UserError(f"--token-file {path} cannot be read: {reason}.", "Give a file with the token.") from error
    if not token or len(token.split()) != 1:
        raise UserError(f"--token-file {path} does not hold a single word.", "Write the token into it.")
    return token
