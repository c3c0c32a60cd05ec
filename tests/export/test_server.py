"""The real `moshi.server`, as users start it, serves what we export. On CPU: its one call to CUDA is replaced."""

import asyncio
import json
import os
import socket
import subprocess
import sys
import time

import aiohttp
import numpy as np
import pytest
import sphn
import torch

from hf_csm.export.native import export_native, serving_config
from hf_csm.models.lora import adapter_parameters, add_lora
from hf_csm.models.moshi import find_checkpoint, load_moshi, load_tokenizer
from hf_csm.units import SAMPLE_RATE, SAMPLES_PER_FRAME


SERVER = """
import runpy, sys, torch
torch.set_num_threads(1)
torch.cuda.synchronize = lambda *args: None
runpy.run_module("moshi.server", run_name="__main__", alter_sys=True)
"""
WORD = "happy"
NUM_FRAMES = 30


def learn_to_say(model, token):
    """Train the adapter until every token of the text stream is `token`, whatever else is heard."""
    optimizer = torch.optim.AdamW(adapter_parameters(model), lr=2e-2)
    generator = torch.Generator().manual_seed(0)
    for _ in range(40):
        codes = torch.randint(model.layout.card, (4, model.layout.num_streams, 12), generator=generator)
        codes[:, 0] = token
        loss = model(codes).nll[:, 0].mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss < 0.01


@pytest.fixture(scope="module")
def happy_adapter(tiny_moshi, tmp_path_factory):
    base = find_checkpoint(str(tiny_moshi))
    (token,) = load_tokenizer(base).encode(WORD)[:1]
    model = add_lora(load_moshi(base, dtype=torch.float32), rank=4, alpha=8, target_modules="all-linear")
    learn_to_say(model, token)
    return export_native(model, base, tmp_path_factory.mktemp("adapter") / "happy")


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


class Server:
    """A server process; ends with the context."""

    def __init__(self, arguments, log_path):
        self.log_path = log_path
        self.port = free_port()
        command = [sys.executable, "-c", SERVER, "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--device", "cpu", "--static", "none", *map(str, arguments)]
        with log_path.open("w") as log:
            self.process = subprocess.Popen(command, env=os.environ, stdout=log, stderr=subprocess.STDOUT)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.process.terminate()
        self.process.wait(timeout=10)

    def wait(self, timeout_s=60):
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            assert self.process.poll() is None, self.log_path.read_text()
            try:
                socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
                return
            except OSError:
                time.sleep(0.1)
        raise TimeoutError("the server does not answer")


async def converse(port):
    """Send `NUM_FRAMES` of a tone; return the handshake, the audio samples and the text messages that come back."""
    time_s = np.arange(NUM_FRAMES * SAMPLES_PER_FRAME) / SAMPLE_RATE
    tone = (0.3 * np.sin(2 * np.pi * 220 * time_s)).astype(np.float32)
    writer, reader = sphn.OpusStreamWriter(SAMPLE_RATE), sphn.OpusStreamReader(SAMPLE_RATE)
    handshake, texts, num_samples = None, [], 0
    async with aiohttp.ClientSession() as session, session.ws_connect(f"ws://127.0.0.1:{port}/api/chat") as ws:
        handshake = await ws.receive_bytes(timeout=20)
        for frame in np.split(tone, NUM_FRAMES):
            await ws.send_bytes(b"\x01" + writer.append_pcm(frame))
        while num_samples < (NUM_FRAMES - 6) * SAMPLES_PER_FRAME:
            message = await ws.receive_bytes(timeout=20)
            if message[0] == 1:
                num_samples += reader.append_bytes(message[1:]).shape[-1]
            elif message[0] == 2:
                texts.append(message[1:].decode().strip())
    return handshake, num_samples, texts


def test_moshis_server_says_what_the_adapter_was_taught(happy_adapter, tiny_moshi, tmp_path):
    config, weights = happy_adapter / "config.json", happy_adapter / "lora.safetensors"
    base_config = tmp_path / "base.json"
    base_config.write_text(json.dumps(serving_config(find_checkpoint(str(tiny_moshi)))))
    with (
        Server(["--config-path", config, "--lora-weight", weights], tmp_path / "adapted.log") as adapted,
        Server(["--config-path", base_config], tmp_path / "plain.log") as plain,
    ):
        adapted.wait()
        plain.wait()
        handshake, num_samples, texts = asyncio.run(converse(adapted.port))
        _, _, base_texts = asyncio.run(converse(plain.port))
    assert handshake == b"\x00"
    assert num_samples >= (NUM_FRAMES - 6) * SAMPLES_PER_FRAME
    assert len(texts) >= NUM_FRAMES // 2
    assert texts.count(WORD) >= 0.9 * len(texts)
    assert base_texts.count(WORD) <= 0.2 * len(base_texts)
