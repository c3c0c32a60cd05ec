"""Tests that need a GPU: `pytest -m gpu`; skipped on a machine without one."""

import numpy as np
import pytest
import torch

from hf_csm.models.family import RuntimeAdapter
from hf_csm.models.moshi import MOSHI
from hf_csm.models.moshi.checkpoint import find_checkpoint, load_mimi
from hf_csm.models.moshi.codec import encode_waveforms
from hf_csm.models.moshi.engine import Engine
from hf_csm.models.moshi.export import export_adapter
from hf_csm.models.moshi.lora import adapter_parameters, add_lora
from hf_csm.models.moshi.model import load_moshi
from hf_csm.models.moshi.runtime_lora import add_adapters
from hf_csm.training.loop import train
from hf_csm.training.metrics_log import read_metrics
from hf_csm.units import SAMPLES_PER_FRAME


pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")]


@pytest.fixture(scope="module")
def base(tiny_moshi):
    return find_checkpoint(str(tiny_moshi))


def random_codes(layout, num_frames=60):
    codes = torch.randint(layout.card, (2, layout.num_streams, num_frames), generator=torch.Generator().manual_seed(0))
    codes[:, :, -layout.max_delay :] = -1
    return codes


def test_bfloat16_on_the_gpu_agrees_with_float32_on_the_cpu(base):
    cpu = load_moshi(base, dtype=torch.float32)
    gpu = load_moshi(base, device="cuda", dtype=torch.bfloat16)
    codes = random_codes(cpu.layout)
    with torch.no_grad():
        expected, found = cpu(codes), gpu(codes.cuda())
    assert torch.equal(expected.mask, found.mask.cpu())
    assert found.nll.dtype == torch.float32
    torch.testing.assert_close(found.nll.cpu().mean(), expected.nll.mean(), rtol=0.02, atol=0.0)


def test_gradients_of_float32_adapters_flow_through_a_bfloat16_base(base):
    model = load_moshi(base, device="cuda", dtype=torch.bfloat16, gradient_checkpointing=True)
    add_lora(model, rank=4, alpha=8, target_modules=["q_proj", "k_proj", "v_proj"]).train()
    with torch.autocast("cuda", torch.bfloat16):
        model(random_codes(model.layout).cuda()).nll.sum().backward()
    for weight in adapter_parameters(model):
        assert weight.dtype == torch.float32
        assert weight.grad is not None
        assert weight.grad.isfinite().all()


def test_codes_from_the_gpu_equal_those_from_the_cpu(base):
    rng = np.random.default_rng(0)
    waveform = (0.1 * rng.standard_normal((2, 300 * SAMPLES_PER_FRAME))).astype(np.float32)
    (cpu,) = encode_waveforms(load_mimi(base), [waveform])
    (gpu,) = encode_waveforms(load_mimi(base, "cuda"), [waveform])
    assert (cpu == gpu).mean() > 0.99  # float32 sums in another order flip a code now and then


def test_a_run_on_the_gpu_learns_and_resumes(base, codes, tmp_path):
    from hf_csm.config import DatasetConfig, LoraSettings, MoshiPaths, OptimizerConfig, RunConfig, TrainingConfig

    def config(run_dir, resume=None):
        return RunConfig(
            run_dir=str(tmp_path / run_dir),
            resume_from_checkpoint=resume,
            moshi_paths=MoshiPaths(base.name_or_path),
            dataset=DatasetConfig(manifest_path=str(codes), duration_sec=12, batch_size=2),
            lora=LoraSettings(rank=4, alpha=8),
            optimizer=OptimizerConfig(lr=0.003),
            training=TrainingConfig(max_steps=6, save_every=3, eval_every=3, eval_windows=4, trackers=[]),
        )

    train(config("straight"), MOSHI)
    train(config("resumed", str(tmp_path / "straight" / "checkpoint_000003")), MOSHI)
    straight = [line["loss"] for line in read_metrics(tmp_path / "straight" / "metrics.jsonl") if "loss" in line]
    resumed = [line["loss"] for line in read_metrics(tmp_path / "resumed" / "metrics.jsonl") if "loss" in line]
    assert straight[-1] < straight[0]
    assert resumed == pytest.approx(straight[3:], rel=1e-3)


def talk(engine, slot, seed, num_frames=12):
    """Return text and codes, `[T, 1 + Q]`, of a new conversation in `slot` with noise as input."""
    engine.reset(slot)
    noise = np.random.default_rng(seed).normal(scale=0.1, size=(num_frames, SAMPLES_PER_FRAME)).astype(np.float32)
    frames = [engine.step({slot: frame}).get(slot) for frame in noise]
    return np.stack([[frame.text_token, *frame.codes] for frame in frames if frame is not None])


def test_cuda_graphs_do_not_change_the_output_of_the_engine(base):
    from moshi.utils.compile import no_cuda_graph

    lm, mimi = base.get_moshi(device="cuda", dtype=torch.float32), load_mimi(base, "cuda")
    engine = Engine(lm, mimi, num_slots=2, use_sampling=False)
    engine.warm_up()
    graphed = [talk(engine, slot, slot) for slot in (0, 1)]
    engine.close()
    with no_cuda_graph():
        engine = Engine(lm, mimi, num_slots=2, use_sampling=False)
        plain = [talk(engine, slot, slot) for slot in (0, 1)]
        engine.close()
    assert np.array_equal(graphed, plain)


def test_a_strength_set_after_capture_changes_the_output_of_cuda_graphs(base, tmp_path):
    model = add_lora(load_moshi(base), rank=4, alpha=8, target_modules="all-linear")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in adapter_parameters(model):
            weight.copy_(0.3 * torch.randn(weight.shape, generator=generator))
    export_adapter(model, base, tmp_path / "adapter")
    lm = base.get_moshi(device="cuda", dtype=torch.float32)
    strengths = add_adapters(
        lm, [RuntimeAdapter("mine", tmp_path / "adapter" / "lora.safetensors", 4, 2.0)], num_slots=1
    )
    engine = Engine(lm, load_mimi(base, "cuda"), strengths=strengths, use_sampling=False)
    engine.warm_up()
    outputs = []
    for strength in (0.0, 1.0, 0.0):
        engine.set_strength(0, 0, strength)
        outputs.append(talk(engine, 0, 0))
    engine.close()
    assert np.array_equal(outputs[0], outputs[2])
    assert not np.array_equal(outputs[0], outputs[1])
