import asyncio
import contextlib
import dataclasses
import errno
import os
import shutil
import signal
import socket
import ssl
import subprocess
import threading
from types import SimpleNamespace

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
    explain,
    hold,
    read_certificate,
    read_token,
    serve,
)


def test_a_port_in_use_is_said_before_anything_is_loaded(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert cli.main(["serve", "no/such-model", "--host", "127.0.0.1", "--port", str(port)]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == f"error: Port {port} of 127.0.0.1 is in use."
    assert len(lines) == 2


def test_localhost_is_bound_for_each_kind_of_address_and_only_there():
    sockets = bind("localhost", 0)
    assert {listener.getsockname()[0] for listener in sockets} <= {"127.0.0.1", "::1"}
    assert len({listener.getsockname()[1] for listener in sockets}) == 1
    for listener in sockets:
        listener.close()


@pytest.mark.parametrize(
    ("host", "port", "message"),
    [
        ("no-such-host.invalid", 0, "not known"),
        ("a" * 300, 0, "not known"),
        ("192.0.2.1", 0, "not of this machine"),
        ("127.0.0.1", 65536, "--port is 65536"),
        ("127.0.0.1", -1, "--port is -1"),
    ],
)
def test_an_address_that_cannot_be_is_said(host, port, message):
    with pytest.raises(UserError, match=message):
        bind(host, port)


def test_what_the_system_forbids_is_said():
    assert "not allowed" in explain(OSError(errno.EACCES, "Permission denied"), "localhost", 80).problem
    assert "Odd" in explain(OSError(errno.EIO, "Odd"), "localhost", 80).problem


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"slots": 0}, "--slots is 0"),
        ({"max_minutes": 0.0}, "--max-minutes is 0"),
        ({"max_minutes": float("nan")}, "--max-minutes is nan"),
        ({"allow_origin": ["example.org"]}, "no origin"),
        ({"allow_origin": ["https://example.org/"]}, "no origin"),
    ],
)
def test_options_that_make_no_sense_are_said(options, message):
    with pytest.raises(UserError, match=message):
        serve(ServeOptions(["no/such-model"], **options))


def test_an_emotion_that_no_model_knows_is_said_before_weights_are_read(expressive, monkeypatch):
    monkeypatch.setattr("hf_csm.serving.server.run.load_models", lambda *_, **__: 1 / 0)
    with pytest.raises(UserError, match="happyy"):
        serve(ServeOptions([str(expressive)], emotion="happyy", port=0, device="cpu"))


def test_the_token_comes_from_a_file_or_the_environment(tmp_path, monkeypatch):
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


def test_certificates_that_cannot_be_used_are_said(certificate, tmp_path):
    with pytest.raises(UserError, match="cert.pem cannot be read"):
        read_certificate(tmp_path)
    shutil.copy(certificate / "cert.pem", tmp_path)
    with pytest.raises(UserError, match="key.pem cannot be read"):
        read_certificate(tmp_path)
    (tmp_path / "key.pem").write_text("no key")
    with pytest.raises(UserError, match="no certificate and its key"):
        read_certificate(tmp_path)
    command = ["openssl", "rsa", "-aes128", "-passout", "pass:word", "-in", certificate / "key.pem"]
    subprocess.run([*command, "-out", tmp_path / "key.pem"], check=True, capture_output=True)
    with pytest.raises(UserError, match="has a password"):
        read_certificate(tmp_path)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_conversations_over_tls_and_then_the_server(fake_speaker, certificate, number):
    async def test():
        speaker = fake_speaker()
        server = Server(speaker, limits=Limits(closing_s=0.5))
        sockets = bind("127.0.0.1", 0)
        port = sockets[0].getsockname()[1]
        holding = asyncio.create_task(hold(server, sockets, read_certificate(certificate), "https://127.0.0.1"))
        trust = ssl.create_default_context(cafile=certificate / "cert.pem")
        trust.check_hostname = False
        async with aiohttp.ClientSession() as client:
            while not server._listeners:
                await asyncio.sleep(0.01)
            async with client.ws_connect(f"wss://127.0.0.1:{port}/api/chat", ssl=trust) as ws:
                assert await ws.receive_bytes(timeout=5) == b"\x00"
                os.kill(os.getpid(), number)
                os.kill(os.getpid(), number)  # as `timeout` does
                message = await ws.receive(timeout=5)
                assert (message.data, message.extra) == (1001, "the server is going down")
        await asyncio.wait_for(holding, 10)
        assert not server.scheduler._thread.is_alive()

    asyncio.run(test())


def test_a_failed_engine_ends_the_process_with_an_error(fake_speaker):
    async def test():
        speaker = fake_speaker()
        speaker.engine.failure = RuntimeError("CUDA error")
        server = Server(speaker, limits=Limits(closing_s=0.5))
        sockets = bind("127.0.0.1", 0)
        address = f"http://127.0.0.1:{sockets[0].getsockname()[1]}"
        holding = asyncio.create_task(hold(server, sockets, None, address))
        while not server._listeners:
            await asyncio.sleep(0.01)
        async with aiohttp.ClientSession() as client, client.ws_connect(f"{address}/api/chat?audio=pcm") as ws:
            await ws.receive_bytes()
            await ws.send_bytes(b"\x01" + bytes(3840))
            assert (await ws.receive(timeout=5)).data == 1011
        with pytest.raises(RuntimeError, match="the engine failed") as caught:
            await asyncio.wait_for(holding, 10)
        assert str(caught.value.__cause__) == "CUDA error"

    asyncio.run(test())


@pytest.mark.parametrize(
    ("failure", "words"),
    [
        (torch.OutOfMemoryError("CUDA out of memory."), "tiny does not fit in the memory of the device with 1 slot."),
        (RuntimeError("CUDA error: no luck\nmore"), "The engine failed: RuntimeError: CUDA error: no luck"),
    ],
)
@pytest.mark.parametrize("when", ["warm_up", "step"])
def test_a_failed_engine_is_said_in_two_lines(fake_speaker, monkeypatch, capsys, failure, words, when):
    speaker = fake_speaker()

    def fail(*_):
        raise failure

    monkeypatch.setattr(speaker.engine, when, fail)
    speaker.models = dataclasses.replace(speaker.models, base=SimpleNamespace(model_type="moshi"))
    monkeypatch.setattr("hf_csm.serving.server.run.find_models", lambda *_: speaker.models)
    monkeypatch.setattr("hf_csm.serving.server.run.load_models", lambda *_, **__: speaker)
    monkeypatch.setattr("hf_csm.serving.server.run.logging.basicConfig", lambda **_: None)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]

    async def talk():
        async with aiohttp.ClientSession() as client:
            for _ in range(200):
                with contextlib.suppress(OSError):
                    async with client.ws_connect(f"http://127.0.0.1:{port}/api/chat?audio=pcm") as ws:
                        await ws.send_bytes(b"\x01" + bytes(3840))
                        while (await ws.receive(timeout=5)).data != 1011:
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


def test_a_port_that_was_taken_meanwhile_is_said(fake_speaker):
    async def test():
        sockets = bind("127.0.0.1", 0)
        with socket.socket() as other:
            other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            other.bind(sockets[0].getsockname())
            other.listen()
            server = Server(fake_speaker())
            with pytest.raises(UserError, match="in use"):
                await hold(server, sockets, None, "")
            assert not server.scheduler._thread.is_alive()
        sockets[0].close()

    asyncio.run(test())
