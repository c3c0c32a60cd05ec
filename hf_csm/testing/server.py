"""Talk to a speech server over its WebSocket, and start moshi's own, or ours, as a process on CPU.

with ServerProcess("moshi.server", ["--hf-repo", "user/adapter", "--device", "cpu"], log="server.log") as server:
    heard = asyncio.run(converse(server.port, audio))
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
import numpy as np
import sphn

from hf_csm.units import SAMPLE_RATE, SAMPLES_PER_FRAME


_RUN = """
import os, runpy, sys
import torch
from moshi.models.lm import LMGen

torch.set_num_threads(1)
if not torch.cuda.is_available():
    torch.cuda.synchronize = lambda *args: None  # moshi.server calls it wherever it runs
module, tokens_path, seed = sys.argv.pop(1), sys.argv.pop(1), sys.argv.pop(1)
if seed:
    reset_streaming = LMGen.reset_streaming

    def reset_and_seed(self, *args):
        torch.manual_seed(int(seed))
        reset_streaming(self, *args)
        if tokens_path:
            open(tokens_path, "w").close()

    LMGen.reset_streaming = reset_and_seed
if tokens_path:
    step = LMGen.step

    def step_and_write(self, *args, **kwargs):
        tokens = step(self, *args, **kwargs)
        if tokens is not None and (tokens[0] >= 0).all():
            with open(tokens_path, "a") as file:
                print(*tokens[0, :, 0].tolist(), file=file)
        return tokens

    LMGen.step = step_and_write
runpy.run_module(module, run_name="__main__", alter_sys=True)
"""


class ServerProcess:
    """A server in a process of its own, on a free port of this machine; ends with the context.

    Entering waits until it takes connections.

    Attributes:
        port: its port on 127.0.0.1.
    """

    def __init__(
        self,
        module: str,
        arguments: Sequence[str | Path],
        *,
        log: Path | str,
        environment: Mapping[str, str] | None = None,
        seed: int | None = None,
        tokens: Path | str | None = None,
        timeout_s: float = 120,
    ):
        """Start it.

        Args:
            module: `moshi.server`, or `hf_csm.cli` for ours, whose arguments then begin with `serve`.
            log: file for what it prints.
            seed: of each conversation; the random state starts anew where the model does.
            tokens: file that gets the tokens of the latest conversation, a frame a line: text, then codes.
        """
        self.log, self.timeout_s, self.port = Path(log), timeout_s, free_port()
        own = [module, str(tokens or ""), "" if seed is None else str(seed)]
        place = ["--host", "127.0.0.1", "--port", str(self.port)]
        command = [sys.executable, "-c", _RUN, *own, *map(str, arguments), *place]
        with self.log.open("w") as file:
            self.process = subprocess.Popen(
                command, env=dict(os.environ if environment is None else environment), stdout=file, stderr=file
            )

    def __enter__(self) -> ServerProcess:
        try:
            deadline = time.monotonic() + self.timeout_s
            while time.monotonic() < deadline:
                if self.process.poll() is not None:
                    raise RuntimeError(f"the server ended with {self.process.returncode}:\n{self.log.read_text()}")
                with contextlib.suppress(OSError):
                    socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
                    return self
                time.sleep(0.1)
            raise TimeoutError(f"no answer in {self.timeout_s} s:\n{self.log.read_text()}")
        except BaseException:
            self.__exit__()
            raise

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        try:
            self.process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def free_port() -> int:
    """Return a port of 127.0.0.1 that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@dataclass
class Heard:
    """What a client got in a conversation.

    Attributes:
        handshake: the first message.
        audio: `[S]`, float32, 24 kHz.
        texts: pieces of text, as sent.
        num_frames_before_audio: that were sent before the first audio came, where frames were sent one by one.
        close_code: of the server; None while it has not closed.
        close_reason: its words.
    """

    handshake: bytes = b""
    audio: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.float32))
    texts: list[str] = field(default_factory=list)
    num_frames_before_audio: int = 0
    close_code: int | None = None
    close_reason: str = ""


async def converse(
    port: int,
    audio: np.ndarray,
    *,
    query: str = "",
    num_frames: int | None = None,
    one_by_one: bool = False,
    timeout_s: float = 30,
) -> Heard:
    """Say `audio` to the server on `port` as moshi's own client does, and return what came back.

    Args:
        audio: `[S]`, float32, 24 kHz, S a multiple of 1,920; sent frame by frame, as fast as it is taken.
        query: of the address, such as `emotion=happy`.
        num_frames: stop when so many frames of audio have come; all but the last 6 of what was sent by default, since
            delays and Opus hold some back.
        one_by_one: send a frame only when nothing more comes for the ones before.
        timeout_s: for each message.
    """
    writer, reader = sphn.OpusStreamWriter(SAMPLE_RATE), sphn.OpusStreamReader(SAMPLE_RATE)
    frames = [
        audio[i : i + SAMPLES_PER_FRAME] for i in range(0, len(audio) - SAMPLES_PER_FRAME + 1, SAMPLES_PER_FRAME)
    ]
    wanted = SAMPLES_PER_FRAME * (len(frames) - 6 if num_frames is None else num_frames)
    heard, pieces, num_samples = Heard(), [], 0

    def take(message: aiohttp.WSMessage) -> bool:
        """Keep what a message brings; say whether the conversation goes on."""
        nonlocal num_samples
        if message.type == aiohttp.WSMsgType.CLOSE:
            heard.close_code, heard.close_reason = message.data, message.extra or ""
        if message.type == aiohttp.WSMsgType.BINARY:
            kind, payload = message.data[0], message.data[1:]
            if kind == 0:
                heard.handshake = message.data
            elif kind == 1:
                pieces.append(reader.append_bytes(payload))
                num_samples += pieces[-1].shape[-1]
            elif kind == 2:
                heard.texts.append(payload.decode())
        return message.type in (aiohttp.WSMsgType.BINARY, aiohttp.WSMsgType.TEXT)

    url = f"ws://127.0.0.1:{port}/api/chat{'?' if query else ''}{query}"
    async with aiohttp.ClientSession() as session, session.ws_connect(url, autoclose=False) as ws:
        goes_on = take(await ws.receive(timeout=timeout_s))
        for frame in frames:
            if not goes_on:
                break
            opus = writer.append_pcm(frame)
            if opus:
                await ws.send_bytes(b"\x01" + opus)
            heard.num_frames_before_audio += num_samples == 0
            while one_by_one and goes_on:
                try:
                    goes_on = take(await ws.receive(timeout=0.3))
                except asyncio.TimeoutError:
                    break
        while goes_on and num_samples < wanted:
            goes_on = take(await ws.receive(timeout=timeout_s))
    heard.audio = np.concatenate(pieces) if pieces else heard.audio
    return heard
