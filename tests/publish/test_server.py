"""The real `moshi.server`, as users start it, and ours serve what we push. On CPU, so its call to CUDA is replaced."""

import asyncio
import dataclasses

import numpy as np
import pytest
import torch

from hf_csm.mixture.provenance import CorpusTerms, write_corpora
from hf_csm.models.moshi.checkpoint import find_checkpoint, load_tokenizer
from hf_csm.models.moshi.export import export_adapter
from hf_csm.models.moshi.lora import adapter_parameters, add_lora, save_adapter
from hf_csm.models.moshi.model import load_moshi
from hf_csm.publish.push_model import push_model
from hf_csm.units import SAMPLE_RATE, SAMPLES_PER_FRAME
from tests.doubles.server import ServerProcess, converse


WORD = "happy"
NUM_FRAMES = 30
MINE = CorpusTerms("mine", "Mine", "cc-by-4.0", num_windows=4, duration_s=40.0, emotions={"happy": 4})


def learn_to_say(model, token):
    """Train the adapter until most tokens of the text stream are `token`, whatever else is heard."""
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


@pytest.fixture
def checkpoint(tiny_moshi, base_on_hub, tmp_path):
    """A run's checkpoint that says one word, of the base that is on the Hub."""
    base = dataclasses.replace(find_checkpoint(str(tiny_moshi)), name_or_path=base_on_hub)
    (token,) = load_tokenizer(base).encode(WORD)[:1]
    model = add_lora(load_moshi(base, dtype=torch.float32), rank=4, alpha=8, target_modules="all-linear")
    learn_to_say(model, token)
    folder = tmp_path / "run" / "checkpoint_000040"
    save_adapter(model, folder / "adapter")
    export_adapter(model, base, folder / "consolidated")
    write_corpora([MINE], folder.parent)
    return folder


def tone():
    time_s = np.arange(NUM_FRAMES * SAMPLES_PER_FRAME) / SAMPLE_RATE
    return (0.3 * np.sin(2 * np.pi * 220 * time_s)).astype(np.float32)


@pytest.mark.slow
def test_a_pushed_model_is_served_alike_by_moshi_and_hf_csm(hub, checkpoint, tmp_path):
    push_model(checkpoint, "user/happy")
    on_cpu = ["--device", "cpu", "--static", "none"]
    with ServerProcess(
        "moshi.server",
        ["--hf-repo", "user/happy", *on_cpu],
        log=tmp_path / "one_flag.log",
        environment=hub.environment(tmp_path / "clean"),
    ) as stock:
        heard = asyncio.run(converse(stock.port, tone()))
    texts = [text.strip() for text in heard.texts]
    assert heard.handshake == b"\x00"
    assert len(heard.audio) >= (NUM_FRAMES - 6) * SAMPLES_PER_FRAME
    assert texts.count(WORD) >= NUM_FRAMES // 2
    assert texts.count(WORD) >= 0.9 * len(texts)

    # Not fused, as ours, which changes the strength while it speaks; fusing rounds once more.
    arguments = {
        "moshi.server": ["--hf-repo", "user/happy", "--no_fuse_lora", *on_cpu],
        "hf_csm.cli": ["serve", "user/happy", "--device", "cpu", "--dtype", "bfloat16"],
    }
    said, tokens = {}, {}
    for module, options in arguments.items():
        written = tmp_path / f"{module}.txt"
        with ServerProcess(
            module,
            options,
            log=tmp_path / f"{module}.log",
            environment=hub.environment(tmp_path / f"home_{module}"),
            seed=7,
            tokens=written,
        ) as server:
            said[module] = asyncio.run(converse(server.port, tone()))
        tokens[module] = np.loadtxt(written, dtype=int)[: NUM_FRAMES - 6]
    stock, ours = said["moshi.server"], said["hf_csm.cli"]
    assert tokens["moshi.server"].shape == (NUM_FRAMES - 6, 9)
    assert np.array_equal(tokens["moshi.server"], tokens["hf_csm.cli"])
    num_texts = min(len(stock.texts), len(ours.texts))
    assert num_texts >= NUM_FRAMES // 2
    assert stock.texts[:num_texts] == ours.texts[:num_texts]
    num_samples = (NUM_FRAMES - 6) * SAMPLES_PER_FRAME
    np.testing.assert_array_equal(stock.audio[:num_samples], ours.audio[:num_samples])
