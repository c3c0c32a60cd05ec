import pytest
import torch
from moshi.models.loaders import get_moshi_lm
from safetensors.torch import load_file, save_file

from hf_csm.errors import UserError
from hf_csm.models.family import RuntimeAdapter
from hf_csm.models.moshi.checkpoint import find_checkpoint
from hf_csm.models.moshi.export import export_adapter
from hf_csm.models.moshi.lora import adapter_parameters, add_lora
from hf_csm.models.moshi.model import load_moshi
from hf_csm.models.moshi.runtime_lora import SteeredLinear, add_adapters


RANK, SCALING = 4, 1.7
NUM_FRAMES = 6


def write_adapter(base, folder, seed, target_modules="all-linear"):
    """Write a native adapter with random weights; return it as what a server loads."""
    model = add_lora(load_moshi(base), rank=RANK, alpha=SCALING * RANK, target_modules=target_modules)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in adapter_parameters(model):
            weight.copy_(0.3 * torch.randn(weight.shape, generator=generator))
    export_adapter(model, base, folder)
    return RuntimeAdapter(folder.name, folder / "lora.safetensors", RANK, SCALING)


@pytest.fixture(scope="module")
def base(tiny_moshi):
    return find_checkpoint(str(tiny_moshi))


@pytest.fixture(scope="module")
def adapters(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    return [write_adapter(base, folder / name, seed) for seed, name in enumerate(("happy", "sad"))]


def load(base, **kwargs):
    return get_moshi_lm(base.moshi_weights, lm_kwargs=base.lm_config, **{"dtype": torch.bfloat16} | kwargs)


def stocks(base, adapter, dtype=torch.bfloat16):
    """Load base and adapter as moshi's server does, not fused."""
    config = dict(base.lm_config) | {"lora": True, "lora_rank": adapter.rank, "lora_scaling": adapter.scaling}
    return get_moshi_lm(
        base.moshi_weights, lm_kwargs=config, lora_weights=adapter.weights, fuse_lora=False, dtype=dtype
    )


def logits(lm, batch_size=1):
    """Return `[B, ...]`, the logits of every row for the same input, computed step by step."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(lm.card, (1, lm.num_codebooks, NUM_FRAMES), generator=generator).repeat(batch_size, 1, 1)
    found = []
    with torch.no_grad(), lm.streaming(batch_size):
        for frame in codes.split(1, dim=-1):
            output, text = lm.forward_text(frame)
            found.append(text.flatten(1))
            with lm.depformer.streaming(batch_size):
                for k in range(lm.dep_q):
                    found.append(lm.forward_depformer(k, frame[:, k : k + 1], output).flatten(1))
    return torch.cat(found, dim=1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_at_strength_one_it_is_moshis_own_to_the_bit(base, adapters, dtype):
    lm = load(base, dtype=dtype)
    strengths = add_adapters(lm, adapters[:1], num_slots=1)
    strengths.set(0, 0, 1.0)
    assert torch.equal(logits(lm), logits(stocks(base, adapters[0], dtype)))


def test_another_loaded_adapter_changes_nothing(base, adapters):
    lm = load(base)
    strengths = add_adapters(lm, adapters, num_slots=1)
    for index, adapter in enumerate(adapters):
        strengths.set(0, index, 1.0)
        strengths.set(0, 1 - index, 0.0)
        assert torch.equal(logits(lm), logits(stocks(base, adapter)))


def test_at_strength_zero_it_is_the_base_to_the_bit(base, adapters):
    lm = load(base)
    add_adapters(lm, adapters, num_slots=1)
    assert torch.equal(logits(lm), logits(load(base)))


def test_each_slot_has_its_own_strengths(base, adapters):
    lm = load(base, dtype=torch.float32)
    strengths = add_adapters(lm, adapters, num_slots=4)
    chosen = [(0.0, 0.0), (1.0, 0.0), (0.0, 1.0), (0.5, 0.0)]
    for slot, values in enumerate(chosen):
        for index, value in enumerate(values):
            strengths.set(slot, index, value)
    together = logits(lm, batch_size=4)
    for row, values in zip(together, chosen, strict=True):
        alone = load(base, dtype=torch.float32)
        single = add_adapters(alone, adapters, num_slots=1)
        for index, value in enumerate(values):
            single.set(0, index, value)
        torch.testing.assert_close(row, logits(alone)[0], rtol=1e-3, atol=1e-3)
    assert (together[3] - together[0]).abs().max() > 0.1
    assert (together[3] - together[1]).abs().max() > 0.1


@pytest.mark.parametrize("names", [["q_proj"], ["gate_proj", "up_proj", "down_proj"]])
def test_layers_that_no_adapter_changes_stay_as_they_are(base, tmp_path, names):
    adapter = write_adapter(base, tmp_path / "few", 0, target_modules=names)
    lm = load(base)
    add_adapters(lm, [adapter], num_slots=1).set(0, 0, 1.0)
    own = "in_projs" if names == ["q_proj"] else "linear_"
    steered = [path for path, module in lm.named_modules() if isinstance(module, SteeredLinear)]
    assert steered
    assert all(own in path for path in steered)
    assert torch.equal(logits(lm), logits(stocks(base, adapter)))


def test_half_a_gating_is_completed(base, adapters, tmp_path):
    """moshi runs no gating of which one layer alone has another type."""
    weights = load_file(adapters[0].weights)
    halved = {name: torch.zeros_like(weight) if "linear_out" in name else weight for name, weight in weights.items()}
    save_file(halved, tmp_path / "lora.safetensors")
    adapter = RuntimeAdapter("half", tmp_path / "lora.safetensors", RANK, SCALING)
    lm = load(base)
    add_adapters(lm, [adapter], num_slots=1).set(0, 0, 1.0)
    assert torch.equal(logits(lm), logits(stocks(base, adapter)))


def damaged(weights, how):
    name = "transformer.layers.0.gating.linear_in"
    if how == "rank":
        weights[f"{name}.lora_A.weight"] = weights[f"{name}.lora_A.weight"][:2]
    elif how == "width":
        weights[f"{name}.lora_A.weight"] = torch.ones(RANK, 99)
    elif how == "half":
        del weights[f"{name}.lora_B.weight"]
    else:
        weights[how] = torch.ones(RANK, 8)
    return {key: weight.contiguous() for key, weight in weights.items()}


@pytest.mark.parametrize(
    ("how", "named"),
    [
        ("rank", r"linear_in .*\(2, 64\).*rank 4.*\(4, 64\)"),
        ("width", r"linear_in .*\(4, 99\).*\(4, 64\)"),
        ("half", "linear_in, which lacks one"),
        ("transformer.layers.7.gating.linear_in.lora_A.weight", "layers.7.gating.linear_in, which the base has not"),
    ],
)
def test_an_adapter_for_another_base_is_named_and_nothing_is_changed(base, adapters, tmp_path, how, named):
    save_file(damaged(load_file(adapters[0].weights), how), tmp_path / "lora.safetensors")
    other = RuntimeAdapter("other", tmp_path / "lora.safetensors", RANK, SCALING)
    lm = load(base)
    with pytest.raises(UserError, match=f"adapter other is not one for moshiko.*{named}"):
        add_adapters(lm, [adapters[0], other], num_slots=1, base_name="moshiko")
    assert not [module for module in lm.modules() if isinstance(module, SteeredLinear)]


def test_a_cut_file_is_named(base, adapters, tmp_path):
    (tmp_path / "lora.safetensors").write_bytes(adapters[0].weights.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"lora\.safetensors cannot be read"):
        add_adapters(load(base), [RuntimeAdapter("cut", tmp_path / "lora.safetensors", RANK, SCALING)], num_slots=1)
