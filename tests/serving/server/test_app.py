import asyncio
import contextlib
import json
import logging
from pathlib import Path

import aiohttp
import numpy as np
import pytest

from hf_csm import __version__
from hf_csm.serving.loaded import load_model
from hf_csm.serving.server import app as server_module
from hf_csm.serving.server.limits import Limits
from hf_csm.units import SAMPLES_PER_FRAME
from tests.doubles.server import converse
from tests.doubles.waiting import GUARD_S


def run(test):
    """Run a coroutine with a guard against hanging."""
    asyncio.run(asyncio.wait_for(test, GUARD_S))


async def get(served, path="/api/info", **options):
    """Return status, headers and body."""
    async with served.client.get(served.address + path, **options) as response:
        return response.status, response.headers, await response.text()


def test_log_entries_are_single_lines(fake_model, serving, caplog):
    caplog.set_level(logging.INFO, logger="hf_csm.serving")

    async def test():
        async with serving(fake_model()) as served:
            await get(served, "/a%0A%22b%22%20INFO%20request")

    run(test())
    assert any("/a\\n" in message for message in caplog.messages)
    assert not any("\n" in message for message in caplog.messages)


def test_info_lists_adapters_emotions_and_slots(fake_model, serving):
    async def test():
        async with serving(fake_model(2), model_type="moshi") as served, served.connect() as ws:
            await ws.receive_bytes()
            status, _, body = await get(served)
            assert status == 200
            assert json.loads(body) == {
                "base_model": "tiny",
                "model_type": "moshi",
                "frame_rate": 12.5,
                "sample_rate": 24000,
                "slots": 2,
                "free_slots": 1,
                "voices": [
                    {"name": "moody", "emotions": ["happy", "sad"], "control": "prefix"},
                    {"name": "calm", "emotions": ["calm"], "control": "none"},
                    {"name": "base", "emotions": [], "control": "none"},
                ],
                "emotions": ["happy", "sad", "calm"],
                "strength": {"min": 0, "max": 2, "default": 1},
                "seeds": False,
                "version": __version__,
            }

    run(test())


@pytest.mark.parametrize(
    ("name", "shown"), [("user/base", "user/base"), ("/home/me/base", "base"), (".", Path.cwd().name)]
)
def test_info_hides_local_paths(fake_model, serving, name, shown):
    async def test():
        model = fake_model()
        model.base_name = name
        async with serving(model) as served:
            assert json.loads((await get(served))[2])["base_model"] == shown

    run(test())


def test_health_reports_a_stuck_and_a_failed_engine(fake_model, serving, monkeypatch):
    async def test():
        model = fake_model()
        async with serving(model) as served:
            assert (await get(served, "/health"))[::2] == (200, '{"status": "ok"}')
            monkeypatch.setattr("hf_csm.serving.server.scheduler.STUCK_S", 0.05)
            async with served.connect("?audio=pcm") as ws:
                await ws.receive_bytes()
                model.engine.gate.clear()
                await ws.send_bytes(b"\x01" + bytes(2 * SAMPLES_PER_FRAME))
                await served.until(lambda: not served.server.scheduler.is_healthy)
                assert (await get(served, "/health"))[::2] == (503, '{"status": "stuck"}')
                model.engine.failure = RuntimeError("CUDA error")
                model.engine.gate.set()
                await served.server.scheduler.over.wait()
            assert (await get(served, "/health"))[::2] == (503, '{"status": "failed"}')

    run(test())


def test_metrics_in_prometheus_format(fake_model, serving):
    async def test():
        async with serving(fake_model(3)) as served:
            status, headers, body = await get(served, "/metrics")
            assert status == 200 and headers["Content-Type"].startswith("text/plain; version=")
            assert "hf_csm_slots 3.0" in body.splitlines()

    run(test())


def test_page_has_security_headers(fake_model, serving):
    async def test():
        async with serving(fake_model(), token="secret") as served:
            status, headers, body = await get(served, "/")
            assert status == 200 and headers["Content-Type"] == "text/html" and "<html" in body
            policy = headers["Content-Security-Policy"]
            assert policy.startswith("default-src 'self';") and "frame-ancestors 'none'" in policy
            assert not any(word in policy for word in ("unsafe", "ws:", "blob:", "data:"))
            assert headers["Permissions-Policy"].startswith("microphone=(self)")
            assert headers["Referrer-Policy"] == "no-referrer" and headers["X-Content-Type-Options"] == "nosniff"
            for path in server_module.PAGE.glob("*.js"):
                assert (await get(served, f"/{path.name}"))[0] == 200

    run(test())


@pytest.mark.parametrize(
    "path", ["/nothing", "/../server.py", "/%2e%2e/server.py", "/page/../../server.py", "//etc/passwd", "/api/"]
)
def test_unknown_paths_are_not_found(fake_model, serving, path):
    async def test():
        async with serving(fake_model()) as served:
            reader, writer = await asyncio.open_connection("127.0.0.1", served.port)
            writer.write(f"GET {path} HTTP/1.1\r\nHost: [::1]:1\r\nConnection: close\r\n\r\n".encode())
            answer = (await reader.read()).decode()
            assert answer.startswith("HTTP/1.1 404") and "error" in answer
            writer.close()

    run(test())


def test_other_methods_and_plain_requests_get_json_errors(fake_model, serving):
    async def test():
        async with serving(fake_model()) as served:
            async with served.client.post(f"{served.address}/api/info", data=b"x" * 100) as response:
                assert response.status == 405 and "error" in await response.json()
            status, _, body = await get(served, "/api/chat")
            assert status == 426 and "WebSocket" in json.loads(body)["error"]

    run(test())


def test_internal_errors_are_logged_but_not_shown(fake_model, serving, monkeypatch, caplog):
    async def test():
        async with serving(fake_model()) as served:
            monkeypatch.setattr(served.server.metrics, "render", lambda: 1 / 0)
            assert (await get(served, "/metrics"))[::2] == (500, '{"error": "Internal error."}')
        assert "ZeroDivisionError" in caplog.text

    run(test())


@pytest.mark.parametrize(
    ("query", "headers", "status"),
    [
        ("", {}, 401),
        ("?token=wrong", {}, 401),
        ("?token=", {}, 401),
        ("?token=Secret%C3%BC", {}, 401),
        ("", {"Authorization": "Basic secretü"}, 401),
        ("", {"Authorization": "Bearer secret"}, 401),
        ("?token=secret%C3%BC", {}, 200),
        ("", {"Authorization": "bearer secretü"}, 200),
    ],
)
def test_token_is_required(fake_model, serving, query, headers, status):
    async def test():
        async with serving(fake_model(), token="secretü") as served:
            for path in ("/api/info", "/metrics"):
                assert (await get(served, path + query, headers=headers))[0] == status
            if status == 200:
                async with served.connect(query, headers=headers) as ws:
                    assert await ws.receive_bytes() == b"\x00"
            else:
                with pytest.raises(aiohttp.WSServerHandshakeError, match="401"):
                    await served.connect(query, headers=headers)
                assert (await get(served, "/nothing" + query, headers=headers))[0] == 401
            for path in ("/health", "/"):
                assert (await get(served, path))[0] == 200

    run(test())


@pytest.mark.parametrize(
    ("options", "origin", "host", "is_allowed"),
    [
        ({}, None, "localhost:1", True),
        ({}, "http://localhost:1", "localhost:1", True),
        ({}, "http://[::1]:1", "[::1]:1", True),
        ({}, "http://localhost:2", "localhost:1", False),
        ({}, "http://evil.example", "localhost:1", False),
        ({}, "http://evil.example", "evil.example", False),  # a name of theirs that leads here
        ({}, "null", "localhost:1", False),
        ({}, "http://[", "localhost:1", False),
        ({}, None, "evil.example", False),
        ({}, None, "localhost.evil.example:8998", False),
        ({}, None, "[", False),
        ({"is_local": False}, None, "moshi.example", True),
        ({"is_local": False}, "https://moshi.example", "moshi.example", True),
        ({"is_local": False}, "https://evil.example", "moshi.example", False),
        ({"allowed_origins": ["https://friend.example"]}, "https://friend.example", "localhost:1", True),
        ({"allowed_origins": ["https://friend.example"]}, "https://friend.example.evil", "localhost:1", False),
        ({"allowed_origins": ["https://friend.example"]}, "https://friend.example", "friend.example", True),
        ({"allowed_origins": ["https://friend.example"]}, None, "friend.example:1", True),
        ({"allowed_origins": ["https://friend.example"]}, None, "evil.example", False),
        ({"allowed_origins": ["*"]}, "https://any.example", "any.example", True),
    ],
)
def test_host_and_origin_checks(fake_model, serving, options, origin, host, is_allowed):
    async def test():
        headers = {"Host": host} | ({"Origin": origin} if origin else {})
        async with serving(fake_model(), **options) as served:
            status, answered, _ = await get(served, headers=headers)
            assert status == (200 if is_allowed else 403)
            allows = answered.get("Access-Control-Allow-Origin")
            assert allows == (origin if options.get("allowed_origins") and is_allowed else None)
            assert (await get(served, "/metrics", headers=headers))[0] == status
            assert (await get(served, "/health", headers=headers))[0] == 200
            if is_allowed:
                async with served.connect(headers=headers) as ws:
                    assert await ws.receive_bytes() == b"\x00"
            else:
                with pytest.raises(aiohttp.WSServerHandshakeError, match="403"):
                    await served.connect(headers=headers)
                refused = [served.count("sessions_refused_total", reason=reason) for reason in ("origin", "host")]
                assert sorted(refused) == [0, 3]

    run(test())


def test_connections_are_limited_and_idle_ones_closed(fake_model, serving):
    async def test():
        limits = Limits(check_s=0.02, request_s=0.3, max_connections=3, closing_s=0.5)
        async with serving(fake_model(), limits) as served, served.connect() as ws:
            assert await ws.receive_bytes() == b"\x00"
            lines = [await asyncio.open_connection("127.0.0.1", served.port) for _ in range(4)]
            lines[0][1].write(b"GET / HTTP/1.1\r\nHost: x\r\nA: ")  # and no more
            await served.until(lambda: served.count("sessions_refused_total", reason="connections") == 2)
            for reader, writer in lines:
                with contextlib.suppress(ConnectionResetError):
                    assert await reader.read() == b""
                writer.close()
            assert not ws.closed and served.server.scheduler.num_free == 0  # a session is not idle
            assert (await get(served, "/health"))[0] == 200

    run(test())


def test_idle_keepalive_connection_is_closed(fake_model, serving):
    async def test():
        limits = Limits(check_s=0.02, request_s=0.3, closing_s=0.5)
        async with serving(fake_model(), limits) as served:
            reader, writer = await asyncio.open_connection("127.0.0.1", served.port)
            writer.write(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
            assert (await asyncio.wait_for(reader.read(), GUARD_S)).endswith(b'{"status": "ok"}')
            writer.close()

    run(test())


def test_shutdown_closes_sessions(fake_model, serving):
    async def test():
        async with serving(fake_model(2)) as served:
            one, other = await served.connect(autoclose=True), await served.connect(autoclose=True)
            for ws in (one, other):
                await ws.receive_bytes()
            reading = [asyncio.create_task(ws.receive()) for ws in (one, other)]
            await served.server.stop()
            for message in [await task for task in reading]:
                assert (message.data, message.extra) == (1001, "server is shutting down")
            with pytest.raises(aiohttp.ClientConnectorError):
                await served.connect()
            served.server.stop = lambda: asyncio.sleep(0)

    run(test())


def test_connections_during_shutdown_are_closed(fake_model, serving):
    async def test():
        async with serving(fake_model()) as served:
            served.server._is_stopping = True
            async with served.connect() as ws:
                while (message := await ws.receive(timeout=GUARD_S)).data == b"\x00":
                    pass
                assert (message.data, message.extra) == (1001, "server is shutting down")

    run(test())


def test_log_has_no_query_text_or_token(fake_model, serving, caplog):
    caplog.set_level(logging.DEBUG)

    async def test():
        model = fake_model()
        model.engine.texts[0].extend([4711])
        async with serving(model, token="hunter2") as served:
            async with served.connect("?token=hunter2&audio=pcm&emotion=sad") as ws:
                await ws.receive_bytes()
                await ws.send_str("private words")
                await ws.send_bytes(b"\x01" + bytes(6 * SAMPLES_PER_FRAME))
                while (await ws.receive(timeout=GUARD_S)).data[:1] != b"\x02":
                    pass
            await get(served, "/api/info?token=hunter3")
            await get(served, "/api/info", headers={"Authorization": "Bearer hunter4"})
            await served.until(lambda: served.server.scheduler.num_free == 1)
        ours = [record.getMessage() for record in caplog.records if record.name.startswith("hf_csm")]
        assert [line for line in ours if "session ended" in line and "client_left" in line]
        assert [line for line in ours if line == "request method=GET path='/api/info' status=401"]
        for secret in ("hunter", "private", "4711", "sad"):
            assert not [line for line in ours if secret in line]

    run(test())


@pytest.mark.slow
def test_real_model_in_two_slots(expressive, calm, serving):
    """The tiny Moshi, two conversations with two adapters at once; forced text is not sent as text."""
    noise = (0.1 * np.random.default_rng(0).normal(size=30 * SAMPLES_PER_FRAME)).astype(np.float32)
    told, steps = [], []

    async def test():
        model = load_model([str(expressive), str(calm)], num_slots=2, device="cpu")
        engine = model.engine
        force_text, step = engine.force_text, engine.step
        engine.force_text = lambda slot, tokens: (told.append((slot, list(tokens))), force_text(slot, tokens))
        engine.step = lambda frames: steps.append(step(frames)) or steps[-1]
        async with serving(model, Limits()) as served:
            steps.clear()  # of warming up
            heard = await asyncio.gather(
                converse(served.port, noise, query="emotion=happy"), converse(served.port, noise, query="emotion=calm")
            )
            async with served.connect("?events=1&voice=base") as ws:
                await ws.send_str('{"type": "steer", "emotion": "sad", "strength": 0.5}')
                assert await ws.receive_bytes() == b"\x00"
                first, then = [await ws.receive_json(timeout=GUARD_S) for _ in range(2)]
                assert (first["voice"], then["voice"], then["emotion"], then["strength"]) == (
                    "base", "expressive", "sad", 0.5
                )  # fmt: skip
        prefix = model.prefix(model.choose("happy"), "happy")
        slot, tokens = told[0]
        assert tokens == prefix != []
        said = [frames[slot].text_token for frames in steps if slot in frames]
        assert said[: len(prefix)] == prefix
        pieces = [model.tokenizer.id_to_piece(token) for token in said[len(prefix) :] if token not in (0, 3)]
        assert heard[0].texts == [piece.replace("▁", " ") for piece in pieces][: len(heard[0].texts)]
        assert all(len(one.audio) >= 24 * SAMPLES_PER_FRAME for one in heard)

    run(test())
