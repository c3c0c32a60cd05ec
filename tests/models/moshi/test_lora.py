import copy
import json

import peft
import pytest
import torch

from hf_csm.errors import UserError
from hf_csm.models.moshi.checkpoint import find_checkpoint
from hf_csm.models.moshi.lora import (
    NATIVE_NAMES,
    adapter_disabled,
    adapter_parameters,
    adapter_state,
    add_lora,
    linear_paths,
    load_adapter,
    lora_config,
    save_adapter,
    target_pattern,
)
from hf_csm.models.moshi.model import MoshiLM, load_moshi
from tests.doubles.random_adapter import randomize


COMMON_NAMES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="module")
def base(tiny_moshi):
    # Frozen as under an adapter: torch multiplies by a weight that requires gradients in another order.
    return load_moshi(find_checkpoint(str(tiny_moshi)), dtype=torch.float32).requires_grad_(False)


@pytest.fixture(scope="module")
def codes(base):
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(base.layout.card, (2, 17, 8), generator=generator)
    return torch.nn.functional.pad(codes, (0, 1), value=-1)


def with_lora(base, *, rank=4, alpha=8, names=COMMON_NAMES, train=None, seed=0):
    """A copy of `base` with an adapter, trained for three steps on the codes `train`."""
    model = add_lora(copy.deepcopy(base), rank=rank, alpha=alpha, target_modules=names, seed=seed)
    if train is not None:
        optimizer = torch.optim.AdamW(adapter_parameters(model), lr=1e-2)
        for _ in range(3):
            model(train).nll.mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    return model.eval()


def nll(model, codes):
    with torch.no_grad():
        return model(codes).nll


def adapted_layers(model):
    return {
        name.split(".lora_A")[0].removeprefix("lm.base_model.model.")
        for name, _ in model.named_parameters()
        if "lora_A" in name
    }


@pytest.mark.parametrize(
    ("names", "layers"),
    [
        (["q_proj", "k_proj", "v_proj"], {"in_projs"}),
        (["o_proj"], {"out_projs"}),
        (["gate_proj", "up_proj", "down_proj"], {"linear_in", "linear_out"}),
        (["in_projs"], {"in_projs"}),
        (["linear_in", "linear_out"], {"linear_in", "linear_out"}),
        (["text_linear", "depformer_in"], {"text_linear", "depformer_in"}),
        (COMMON_NAMES, {"in_projs", "out_projs", "linear_in", "linear_out"}),
    ],
)
def test_names_mean_these_layers_in_both_transformers(base, names, layers):
    adapted = adapted_layers(with_lora(base, names=names))
    own_names = {path.rstrip("0123456789.").split(".")[-1] for path in adapted}
    assert own_names == layers
    if layers <= set(NATIVE_NAMES.values()):
        assert {path.split(".")[0] for path in adapted} == {"transformer", "depformer"}
        expected = [path for path in linear_paths(base.lm) if set(path.split(".")) & layers]
        assert adapted == set(expected)


def test_all_linear_means_every_linear_layer(base):
    assert adapted_layers(with_lora(base, names="all-linear")) == set(linear_paths(base.lm))


@pytest.mark.parametrize(
    "names", [["linear_in"], ["gate_proj", "up_proj"], ["q_proj", "k_proj", "v_proj", "down_proj"]]
)
def test_half_a_gating_is_refused(base, names):
    with pytest.raises(UserError, match=r"without linear_(in|out)"):
        target_pattern(names, base.lm)


def test_an_unknown_name_is_refused_with_the_nearest(base):
    with pytest.raises(UserError, match=r"no 'qproj'; nearest is 'q_proj'"):
        target_pattern(["qproj"], base.lm)
    with pytest.raises(UserError, match="empty"):
        target_pattern([], base.lm)


@pytest.mark.parametrize("names", [["q_proj"], ["k_proj", "v_proj"], ["gate_proj", "down_proj"]])
def test_a_part_of_a_fused_matrix_warns_that_all_of_it_is_adapted(base, names):
    with pytest.warns(UserWarning, match="adapts them all"):
        target_pattern(names, base.lm)


def test_a_fresh_adapter_changes_nothing(base, codes):
    model = copy.deepcopy(base)
    before = nll(model, codes)
    assert torch.equal(nll(add_lora(model, rank=4, alpha=8, target_modules=COMMON_NAMES), codes), before)


def test_only_adapter_weights_move_and_the_base_stays_equal_to_the_bit(base, codes):
    model = with_lora(base, names="all-linear")
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    assert {name for name, weight in model.named_parameters() if weight.requires_grad} == {
        name for name in before if "lora_" in name
    }
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=1e-2)
    for _ in range(3):
        model(codes).nll.mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, weight in model.named_parameters():
        assert torch.equal(weight, before[name]) == ("lora_" not in name), name


def test_a_disabled_adapter_is_the_base_to_the_bit_and_comes_back(base, codes):
    model = copy.deepcopy(base)
    before = nll(model, codes)
    add_lora(model, rank=4, alpha=8, target_modules=COMMON_NAMES)
    randomize(model)
    with adapter_disabled(model):
        assert torch.equal(nll(model, codes), before)
    assert not torch.allclose(nll(model, codes), before, atol=0.1)
    assert all(weight.requires_grad for weight in adapter_parameters(model))


def test_the_adapter_is_float32_over_a_bfloat16_base(tiny_moshi, codes):
    model = load_moshi(find_checkpoint(str(tiny_moshi)), dtype=torch.bfloat16)
    add_lora(model, rank=2, alpha=4, target_modules=COMMON_NAMES)
    assert {weight.dtype for weight in adapter_parameters(model)} == {torch.float32}
    assert {weight.dtype for weight in model.parameters() if not weight.requires_grad} == {torch.bfloat16}
    model(codes).nll.mean().backward()
    assert {weight.grad.dtype for weight in adapter_parameters(model)} == {torch.float32}


def test_the_seed_decides_the_adapter_and_the_callers_random_state_stays(base):
    before = torch.get_rng_state()
    first, same, other = (adapter_state(with_lora(base, seed=seed)) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_saved_and_loaded_over_another_seed_is_the_same(base, codes, tmp_path):
    model = with_lora(base, train=codes)
    save_adapter(model, tmp_path)
    expected = nll(model, codes)
    assert torch.equal(nll(load_adapter(with_lora(base, seed=9), tmp_path), codes), expected)
    assert torch.equal(nll(load_adapter(copy.deepcopy(base), tmp_path), codes), expected)


def test_peft_loads_the_saved_adapter(base, codes, tmp_path):
    model = with_lora(base, train=codes)
    save_adapter(model, tmp_path)
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base.lm), str(tmp_path))
    assert torch.equal(nll(MoshiLM(loaded.merge_and_unload()), codes).isfinite(), nll(model, codes).isfinite())
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base.lm), str(tmp_path))
    with torch.no_grad():
        assert torch.equal(loaded(codes).text_logits, model.lm(codes).text_logits)
    assert (
        json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"] == base.lm.name_or_path
    )


def test_another_rank_is_refused_with_both_ranks(base, tmp_path):
    save_adapter(with_lora(base, rank=2), tmp_path)
    with pytest.raises(UserError, match="rank 2.* rank 4"):
        load_adapter(with_lora(base, rank=4), tmp_path)


def test_another_alpha_or_other_layers_are_refused(base, tmp_path):
    save_adapter(with_lora(base, alpha=16), tmp_path)
    with pytest.raises(UserError, match="alpha 16"):
        load_adapter(with_lora(base), tmp_path)
    save_adapter(with_lora(base, names=["out_projs"]), tmp_path)
    with pytest.raises(UserError, match="differ in"):
        load_adapter(with_lora(base), tmp_path)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_a_missing_or_truncated_file_is_refused(base, tmp_path, name, damage):
    save_adapter(with_lora(base), tmp_path)
    path = tmp_path / name
    content = path.read_bytes()
    path.unlink()
    if damage == "truncated":
        path.write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=name if damage == "missing" else "damaged or truncated") as error:
        load_adapter(copy.deepcopy(base), tmp_path)
    assert len(str(error.value).splitlines()) == 2


def test_dropout_with_gradient_checkpointing_is_refused(tiny_moshi):
    model = load_moshi(find_checkpoint(str(tiny_moshi)), gradient_checkpointing=True)
    with pytest.raises(UserError, match="dropout"):
        add_lora(model, rank=2, alpha=4, target_modules="all-linear", dropout=0.1)


def test_the_length_of_the_saved_pattern_does_not_depend_on_the_number_of_layers(base):
    assert len(lora_config(with_lora(base)).target_modules) < 500
