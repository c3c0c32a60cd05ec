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
from tests.doubles.waiting import GUARD_S, wait_until


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
    ):
        """Start it.

        Args:
            module: `moshi.server`, or `hf_csm.cli` for ours, whose arguments then begin with `serve`.
            log: file for what it prints.
            seed: of each conversation; the random state starts anew where the model does.
            tokens: file that gets the tokens of the latest conversation, a frame a line: text, then codes.
        """
        self.log, self.port = Path(log), free_port()
        own = [module, str(tokens or ""), "" if seed is None else str(seed)]
        place = ["--host", "127.0.0.1", "--port", str(self.port)]
        command = [sys.executable, "-c", _RUN, *own, *map(str, arguments), *place]
        with self.log.open("w") as file:
            self.process = subprocess.Popen(
                command, env=dict(os.environ if environment is None else environment), stdout=file, stderr=file
            )

    def __enter__(self) -> ServerProcess:
        try:
            wait_until(self._takes_connections)
            return self
        except BaseException:
            self.__exit__()
            raise

    def _takes_connections(self) -> bool:
        if self.process.poll() is not None:
            raise RuntimeError(f"the server ended with {self.process.returncode}:\n{self.log.read_text()}")
        with contextlib.suppress(OSError):
            socket.create_connection(("127.0.0.1", self.port)).close()
            return True
        return False

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        try:
            self.process.wait(timeout=GUARD_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def free_port() -> int:
    """Return a free port of 127.0.0.1."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@dataclass
class Heard:
    """The messages that a client received in a conversation.

    Attributes:
        handshake: the first message.
        audio: `[S]`, float32, 24 kHz.
        texts: pieces of text, as sent.
        num_frames_before_audio: that were sent before the first audio came; only a slow `pace_s` makes it exact.
        lags_s: for each message with audio, how long after its first sample's place in what was sent it came.
        close_code: of the server; None while it has not closed.
        close_reason: of the server.
    """

    handshake: bytes = b""
    audio: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.float32))
    texts: list[str] = field(default_factory=list)
    num_frames_before_audio: int = 0
    lags_s: list[float] = field(default_factory=list)
    close_code: int | None = None
    close_reason: str = ""


async def converse(
    port: int,
    audio: np.ndarray,
    *,
    query: str = "",
    num_frames: int | None = None,
    pace_s: float = 0.0,
) -> Heard:
    """Send `audio` to the server on `port` as moshi's own client does, and return the answer.

    Args:
        audio: `[S]`, float32, 24 kHz, S a multiple of 1,920; sent frame by frame, as fast as it is taken.
        query: of the address, such as `emotion=happy`.
        num_frames: stop when so many frames of audio have come; all but the last 6 of what was sent by default, since
            delays and Opus hold some back.
        pace_s: seconds from frame to frame, 0.08 for real time.
    """
    writer, reader = sphn.OpusStreamWriter(SAMPLE_RATE), sphn.OpusStreamReader(SAMPLE_RATE)
    num_sent = len(audio) // SAMPLES_PER_FRAME
    wanted = SAMPLES_PER_FRAME * (num_sent - 6 if num_frames is None else num_frames)
    heard, sent_at = Heard(), []
    pieces: list[np.ndarray] = []
    num_samples = 0

    async def talk(ws: aiohttp.ClientWebSocketResponse) -> None:
        begin = time.monotonic()
        for number, frame in enumerate(np.split(audio[: num_sent * SAMPLES_PER_FRAME], num_sent)):
            await asyncio.sleep(max(0.0, begin + number * pace_s - time.monotonic()))
            opus = writer.append_pcm(frame)
            if opus:
                await ws.send_bytes(b"\x01" + opus)
            sent_at.append(time.monotonic())

    url = f"ws://127.0.0.1:{port}/api/chat{'?' if query else ''}{query}"
    async with aiohttp.ClientSession() as session, session.ws_connect(url, autoclose=False) as ws:
        talking = None
        while num_samples < wanted:
            message = await ws.receive(timeout=GUARD_S)
            if message.type == aiohttp.WSMsgType.CLOSE:
                heard.close_code, heard.close_reason = message.data, message.extra or ""
            if message.type not in (aiohttp.WSMsgType.BINARY, aiohttp.WSMsgType.TEXT):
                break
            kind, payload = message.data[0], message.data[1:]
            if kind == 0:
                heard.handshake = message.data
                talking = asyncio.create_task(talk(ws))
            elif kind == 1:
                pieces.append(reader.append_bytes(payload))
                if pieces[-1].shape[-1]:
                    if num_samples == 0:
                        heard.num_frames_before_audio = len(sent_at)
                    heard.lags_s.append(time.monotonic() - sent_at[num_samples // SAMPLES_PER_FRAME])
                    num_samples += pieces[-1].shape[-1]
            elif kind == 2:
                heard.texts.append(payload.decode())
        if talking is not None:
            talking.cancel()
            with contextlib.suppress(asyncio.CancelledError, ConnectionError):
                await talking
    heard.audio = np.concatenate(pieces) if pieces else heard.audio
    return heard
