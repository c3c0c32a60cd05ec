"""The page in Chromium, with a file as microphone."""

import asyncio
import contextlib
import re
import shutil
import socket
import threading
from pathlib import Path

import numpy as np
import pytest
import soundfile
from playwright.sync_api import expect, sync_playwright

from hf_csm.serving.loaded import load_model
from hf_csm.serving.server.app import Server
from hf_csm.units import SAMPLE_RATE
from tests.doubles.server import ServerProcess
from tests.doubles.waiting import GUARD_S


CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
expect.set_options(timeout=1000 * GUARD_S)
PAGE = Path(__file__).parents[3] / "hf_csm" / "serving" / "page"


@pytest.fixture(scope="session")
def microphone(tmp_path_factory):
    """A WAV file with two speech-like syllables and a pause, repeated."""
    seconds = np.arange(6 * SAMPLE_RATE) / SAMPLE_RATE
    phase = (140 + 30 * np.sin(2 * np.pi * 1.3 * seconds)) * seconds % 1
    is_voiced = (seconds % 1.5 < 0.4) | ((seconds % 1.5 > 0.6) & (seconds % 1.5 < 0.9))
    path = tmp_path_factory.mktemp("microphone") / "microphone.wav"
    soundfile.write(path, 0.4 * is_voiced * np.exp(-5 * phase) * np.sin(12 * np.pi * phase), SAMPLE_RATE)
    return path


@pytest.fixture(scope="module")  # not longer: playwright's event loop conflicts with tests that run their own
def browser(microphone):
    if CHROMIUM is None:
        pytest.skip("no Chromium: apt-get install chromium")
    arguments = [
        "--no-sandbox",
        "--use-fake-device-for-media-stream",
        f"--use-file-for-fake-audio-capture={microphone}",
        "--host-resolver-rules=MAP moshi.test 127.0.0.1",
    ]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser):
    """A function that opens the page and waits until it is loaded; errors logged by the page fail the test."""
    opened, logged = [], []

    def open_page(url, script=None, *, status="Ready.", errors=None, **options):
        page = browser.new_context(**{"permissions": ["microphone"], **options}).new_page()
        opened.append(page)
        page.set_default_timeout(1000 * GUARD_S)
        page.on("pageerror", lambda error: logged.append(str(error)))
        page.on(
            "console",
            lambda message: None if errors and re.search(errors, message.text) else logged.append(message.text),
        )
        if script:
            page.add_init_script(script)
        page.goto(url)
        expect(page.locator("#status")).to_have_text(status)
        return page

    yield open_page
    for page in opened:
        page.context.close()
    assert logged == []


@pytest.fixture
def page(open_page, url):
    return open_page(url)


@pytest.fixture
def bare_page(browser):
    context = browser.new_context()
    yield context.new_page()
    context.close()


@pytest.fixture
def worklet():
    return (PAGE / "worklet.js").read_text(encoding="utf-8")


class InThread:
    """Our server in a thread, which starts faster than a process."""

    def __init__(self, adapters, **options):
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://localhost:{self.listener.getsockname()[1]}/"
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever)
        self.thread.start()
        self.model = load_model([str(adapter) for adapter in adapters])
        self.server = self.run(self.start(options))

    def run(self, coroutine):
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(timeout=GUARD_S)

    async def start(self, options):
        server = Server(self.model, **options)
        await server.start([self.listener])
        return server

    def stop(self):
        """Stop the server."""
        if self.thread.is_alive():
            self.run(self.server.stop())
            self.model.close()
            self.loop.call_soon_threadsafe(self.loop.stop)
            self.thread.join()
            self.loop.close()
            self.listener.close()

    def cut(self):
        """Abort the connections of all sessions."""
        for session in list(self.server._sessions):
            self.loop.call_soon_threadsafe(session._transport.abort)


@pytest.fixture
def serve(expressive):
    """A function that starts a server in a thread, with `expressive` and other adapters."""
    with contextlib.ExitStack() as stack:

        def serve(*adapters, **options):
            server = InThread([expressive, *adapters], **options)
            stack.callback(server.stop)
            return server

        yield serve


@pytest.fixture(scope="session")
def url(expressive, tmp_path_factory):
    """URL of an `hf-csm serve` shared by all tests."""
    log = tmp_path_factory.mktemp("serve") / "log.txt"
    with ServerProcess("hf_csm.cli", ["serve", expressive, "--device", "cpu"], log=log) as server:
        yield f"http://localhost:{server.port}/"
