import asyncio
import contextlib
import errno
import os
import shutil
import signal
import socket
import ssl
import subprocess
import threading

import aiohttp
import pytest
import torch

from hf_csm import cli
from hf_csm.errors import UserError
from hf_csm.serving.server.app import Server
from hf_csm.serving.server.limits import Limits
from hf_csm.serving.server.run import (
    TOKEN_VARIABLE,
    ServeOptions,
    bind,
    read_certificate,
    read_token,
    run_until_signal,
    serve,
    socket_error,
)
from tests.doubles.waiting import GUARD_S


def test_port_in_use_is_reported_before_loading(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert cli.main(["serve", "no/such-model", "--host", "127.0.0.1", "--port", str(port)]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == f"error: Port {port} of 127.0.0.1 is in use."
    assert len(lines) == 2


def test_localhost_binds_loopback_addresses_only():
    sockets = bind("localhost", 0)
    assert {listener.getsockname()[0] for listener in sockets} <= {"127.0.0.1", "::1"}
    assert len({listener.getsockname()[1] for listener in sockets}) == 1
    for listener in sockets:
        listener.close()


@pytest.mark.parametrize(
    ("host", "port", "message"),
    [
        ("no-such-host.invalid", 0, "cannot be resolved"),
        ("a" * 300, 0, "cannot be resolved"),
        ("192.0.2.1", 0, "not an address of this machine"),
        ("127.0.0.1", 65536, "--port is 65536"),
        ("127.0.0.1", -1, "--port is -1"),
    ],
)
def test_invalid_addresses(host, port, message):
    with pytest.raises(UserError, match=message):
        bind(host, port)


def test_errors_of_the_system():
    assert "not permitted" in socket_error(OSError(errno.EACCES, "Permission denied"), "localhost", 80).problem
    assert "Odd" in socket_error(OSError(errno.EIO, "Odd"), "localhost", 80).problem


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"slots": 0}, "--slots is 0"),
        ({"max_minutes": 0.0}, "--max-minutes is 0"),
        ({"max_minutes": float("nan")}, "--max-minutes is nan"),
        ({"allow_origin": ["example.org"]}, "not an origin"),
        ({"allow_origin": ["https://example.org/"]}, "not an origin"),
    ],
)
def test_invalid_options(options, message):
    with pytest.raises(UserError, match=message):
        serve(ServeOptions(["no/such-model"], **options))


def test_unknown_emotion_is_reported_before_loading(expressive, monkeypatch):
    monkeypatch.setattr("hf_csm.serving.server.run.load_weights", lambda *_, **__: 1 / 0)
    with pytest.raises(UserError, match="happyy"):
        serve(ServeOptions([str(expressive)], emotion="happyy", port=0, device="cpu"))


def test_token_from_file_or_environment(tmp_path, monkeypatch):
    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)
    assert read_token(None) is None
    monkeypatch.setenv(TOKEN_VARIABLE, "from-environment")
    assert read_token(None) == "from-environment"
    path = tmp_path / "token"
    path.write_text("from-file\n")
    assert read_token(path) == "from-file"
    for content in (b"", b" \n", b"two words", b"\xff\xfe"):
        path.write_bytes(content)
        with pytest.raises(UserError) as caught:
            read_token(path)
        assert "words" not in str(caught.value)
    with pytest.raises(UserError, match="cannot be read"):
        read_token(tmp_path / "none")


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    if shutil.which("openssl") is None:
        pytest.skip("openssl makes the certificate")
    folder = tmp_path_factory.mktemp("tls")
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=localhost", "-days", "2"]
        + ["-keyout", folder / "key.pem", "-out", folder / "cert.pem"],
        check=True,
        capture_output=True,
    )
    return folder


def test_invalid_certificates(certificate, tmp_path):
    with pytest.raises(UserError, match="cert.pem cannot be read"):
        read_certificate(tmp_path)
    shutil.copy(certificate / "cert.pem", tmp_path)
    with pytest.raises(UserError, match="key.pem cannot be read"):
        read_certificate(tmp_path)
    (tmp_path / "key.pem").write_text("no key")
    with pytest.raises(UserError, match="not a matching pair"):
        read_certificate(tmp_path)
    command = ["openssl", "rsa", "-aes128", "-passout", "pass:word", "-in", certificate / "key.pem"]
    subprocess.run([*command, "-out", tmp_path / "key.pem"], check=True, capture_output=True)
    with pytest.raises(UserError, match="has a password"):
        read_certificate(tmp_path)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_ends_sessions_and_server_over_tls(fake_model, certificate, number):
    async def test():
        model = fake_model()
        server = Server(model, limits=Limits(closing_s=0.5))
        sockets = bind("127.0.0.1", 0)
        port = sockets[0].getsockname()[1]
        holding = asyncio.create_task(
            run_until_signal(server, sockets, read_certificate(certificate), "https://127.0.0.1")
        )
        trust = ssl.create_default_context(cafile=certificate / "cert.pem")
        trust.check_hostname = False
        async with aiohttp.ClientSession() as client:
            while not server._listeners:
                await asyncio.sleep(0.01)
            async with client.ws_connect(f"wss://127.0.0.1:{port}/api/chat", ssl=trust) as ws:
                assert await ws.receive_bytes(timeout=GUARD_S) == b"\x00"
                os.kill(os.getpid(), number)
                os.kill(os.getpid(), number)  # as `timeout` sends it
                message = await ws.receive(timeout=GUARD_S)
                assert (message.data, message.extra) == (1001, "server is shutting down")
        await asyncio.wait_for(holding, GUARD_S)
        assert not server.scheduler._thread.is_alive()

    asyncio.run(test())


def test_failed_engine_ends_the_server(fake_model):
    async def test():
        model = fake_model()
        model.engine.failure = RuntimeError("CUDA error")
        server = Server(model, limits=Limits(closing_s=0.5))
        sockets = bind("127.0.0.1", 0)
        address = f"http://127.0.0.1:{sockets[0].getsockname()[1]}"
        holding = asyncio.create_task(run_until_signal(server, sockets, None, address))
        while not server._listeners:
            await asyncio.sleep(0.01)
        async with aiohttp.ClientSession() as client, client.ws_connect(f"{address}/api/chat?audio=pcm") as ws:
            await ws.receive_bytes()
            await ws.send_bytes(b"\x01" + bytes(3840))
            assert (await ws.receive(timeout=GUARD_S)).data == 1011
        with pytest.raises(RuntimeError, match="the engine failed") as caught:
            await asyncio.wait_for(holding, GUARD_S)
        assert str(caught.value.__cause__) == "CUDA error"

    asyncio.run(test())


@pytest.mark.parametrize(
    ("failure", "words"),
    [
        (torch.OutOfMemoryError("CUDA out of memory."), "tiny does not fit in device memory with 1 slot."),
        (RuntimeError("CUDA error: no luck\nmore"), "The engine failed: RuntimeError: CUDA error: no luck"),
    ],
)
@pytest.mark.parametrize("when", ["warm_up", "step"])
def test_failed_engine_gives_a_two_line_error(fake_model, monkeypatch, capsys, failure, words, when):
    model = fake_model()

    def fail(*_):
        raise failure

    monkeypatch.setattr(model.engine, when, fail)
    monkeypatch.setattr("hf_csm.serving.server.run.resolve_models", lambda *_: model.resolved)
    monkeypatch.setattr("hf_csm.serving.server.run.load_weights", lambda *_, **__: model)
    monkeypatch.setattr("hf_csm.serving.server.run.logging.basicConfig", lambda **_: None)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]

    async def talk():
        async with aiohttp.ClientSession() as client:
            while True:  # until the server listens
                with contextlib.suppress(OSError):
                    async with client.ws_connect(f"http://127.0.0.1:{port}/api/chat?audio=pcm") as ws:
                        await ws.send_bytes(b"\x01" + bytes(3840))
                        while (await ws.receive(timeout=GUARD_S)).data != 1011:
                            pass
                        return
                await asyncio.sleep(0.05)

    talking = threading.Thread(target=lambda: asyncio.run(talk()))
    if when == "step":
        talking.start()
    assert cli.main(["serve", "x", "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]) == 1
    if when == "step":
        talking.join()
    lines = [line for line in capsys.readouterr().err.splitlines() if "%" not in line]
    assert lines[-2] == f"error: {words}" and lines[-1].strip()


def test_port_taken_during_loading(fake_model):
    async def test():
        sockets = bind("127.0.0.1", 0)
        with socket.socket() as other:
            other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            other.bind(sockets[0].getsockname())
            other.listen()
            server = Server(fake_model())
            with pytest.raises(UserError, match="in use"):
                await run_until_signal(server, sockets, None, "")
            assert not server.scheduler._thread.is_alive()
        sockets[0].close()

    asyncio.run(test())
