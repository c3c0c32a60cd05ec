"""The real `moshi.server`, as users start it, serves what we export. On CPU: its one call to CUDA is replaced."""

import asyncio
import json

import numpy as np
import pytest
import torch

from hf_csm.export.native import export_native, serving_config
from hf_csm.models.lora import adapter_parameters, add_lora
from hf_csm.models.moshi import find_checkpoint, load_moshi, load_tokenizer
from hf_csm.testing.server import ServerProcess, converse
from hf_csm.units import SAMPLE_RATE, SAMPLES_PER_FRAME


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


def tone():
    time_s = np.arange(NUM_FRAMES * SAMPLES_PER_FRAME) / SAMPLE_RATE
    return (0.3 * np.sin(2 * np.pi * 220 * time_s)).astype(np.float32)


def test_moshis_server_says_what_the_adapter_was_taught(happy_adapter, tiny_moshi, tmp_path):
    config, weights = happy_adapter / "config.json", happy_adapter / "lora.safetensors"
    base_config = tmp_path / "base.json"
    base_config.write_text(json.dumps(serving_config(find_checkpoint(str(tiny_moshi)))))
    on_cpu = ["--device", "cpu", "--static", "none"]
    adapted_files = ["--config-path", config, "--lora-weight", weights]
    with (
        ServerProcess("moshi.server", [*on_cpu, *adapted_files], log=tmp_path / "adapted.log") as adapted,
        ServerProcess("moshi.server", [*on_cpu, "--config-path", base_config], log=tmp_path / "plain.log") as plain,
    ):
        heard = asyncio.run(converse(adapted.port, tone()))
        by_base = asyncio.run(converse(plain.port, tone()))
    texts, base_texts = ([text.strip() for text in said.texts] for said in (heard, by_base))
    assert heard.handshake == b"\x00"
    assert len(heard.audio) >= (NUM_FRAMES - 6) * SAMPLES_PER_FRAME
    assert len(texts) >= NUM_FRAMES // 2
    assert texts.count(WORD) >= 0.9 * len(texts)
    assert base_texts.count(WORD) <= 0.2 * len(base_texts)
