import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from moshi.models import loaders
from safetensors.torch import load_file, save_file

from hf_csm.errors import UserError
from hf_csm.models.moshi import merge
from hf_csm.models.moshi.checkpoint import find_checkpoint
from hf_csm.models.moshi.export import ExportError
from hf_csm.models.moshi.lora import lora_config, native_lm, read_adapter, save_adapter
from hf_csm.models.moshi.merge import check_merged, merge_adapter
from hf_csm.models.moshi.model import load_moshi
from hf_csm.models.moshi.verify import verify_export
from hf_csm.publish.export import export_checkpoint
from tests.doubles.random_adapter import random_adapter


def merged_state(model):
    """Return the weights of the base with the adapter added, by moshi's names."""
    config, state, merged = lora_config(model), native_lm(model).state_dict(), {}
    for name, weight in state.items():
        path, is_adapted, kind = name.partition(".base_layer.")
        if is_adapted:
            low, high = (state[f"{path}.lora_{part}.default.weight"] for part in "AB")
            merged[f"{path}.{kind}"] = weight + config.lora_alpha / config.r * (high @ low)
        elif ".lora_" not in name:
            merged[name] = weight
    return merged


@pytest.fixture(scope="module")
def base(tiny_moshi):
    return find_checkpoint(str(tiny_moshi))


@pytest.fixture(scope="module")
def model(base):
    model = random_adapter(base)
    return model.eval()


@pytest.fixture(scope="module")
def adapter(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained") / "adapter"
    save_adapter(model, folder)
    return folder


@pytest.fixture
def out(adapter, base, tmp_path):
    """A folder with the merged weights."""
    folder = tmp_path / "merged"
    folder.mkdir()
    merge_adapter(adapter, base, folder)
    return folder


def test_merged_weights_have_the_bases_names_shapes_and_dtype_and_load_as_a_base(model, out, tiny_moshi):
    assert sorted(path.name for path in out.iterdir()) == ["config.json", "model.safetensors"]
    old, new = load_file(tiny_moshi / "model.safetensors"), load_file(out / "model.safetensors")
    assert {name: (w.shape, w.dtype) for name, w in new.items()} == {
        name: (w.shape, w.dtype) for name, w in old.items()
    }
    assert not any(key.startswith("lora") for key in json.loads((out / "config.json").read_text()))
    found = find_checkpoint(str(out))
    assert found.mimi_weights == tiny_moshi / "mimi.safetensors"
    again = load_moshi(found, dtype=torch.float32)
    for name, weight in merged_state(model).items():
        assert torch.equal(again.lm.state_dict()[name], weight.bfloat16().float())


def test_logits_of_merged_weights_are_those_of_the_trained_model_up_to_rounding(out, adapter, base):
    assert 0 < verify_export(out, adapter, base, dtype=torch.float32) < 0.1
    found = loaders.CheckpointInfo.from_hf_repo(
        "user/merged", moshi_weights=out / "model.safetensors", config_path=out / "config.json"
    )
    assert found.get_moshi().dtype == torch.bfloat16


def test_a_weight_that_is_not_the_merged_one_is_an_error(out, adapter, base):
    weights = load_file(out / "model.safetensors")
    weights["text_linear.weight"] *= 1.5
    save_file(weights, out / "model.safetensors")
    with pytest.raises(ExportError, match=r"text_linear\.weight.* merged"):
        check_merged(out / "model.safetensors", *read_adapter(adapter), base)
    with pytest.raises(ExportError, match="off by up to"):
        verify_export(out, adapter, base)


def test_a_checkpoint_exports_merged(out, adapter, tmp_path):
    exported = export_checkpoint(adapter, tmp_path / "out", merged=True)
    assert (exported / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()


def test_merging_loads_no_model(adapter, base, tmp_path, monkeypatch):
    monkeypatch.setattr(loaders.CheckpointInfo, "get_moshi", lambda *arguments, **more: pytest.fail("loaded"))
    merge_adapter(adapter, base, tmp_path)


def test_merged_weights_that_moshi_does_not_load_are_an_error(adapter, base, tmp_path):
    merge_adapter(adapter, base, tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    save_file(state | {"unknown.weight": torch.zeros(2, 2)}, tmp_path / "model.safetensors")
    with pytest.raises(ExportError, match=r"does not load .*unknown\.weight"):
        verify_export(tmp_path, adapter, base, dtype=torch.float32)


def fused(state):
    """Return the weights as older files have them: the projections of all steps in one matrix."""
    joined = {}
    for name, weight in state.items():
        found = re.fullmatch(r"(.*\.)(in|out)_projs\.(\d+)\.weight", name)
        if found is None:
            joined[name] = weight
        else:
            joined.setdefault(found[1] + ("in_proj_weight" if found[2] == "in" else "out_proj.weight"), []).append(
                weight
            )
    return {name: torch.cat(weight) if isinstance(weight, list) else weight for name, weight in joined.items()}


@pytest.mark.parametrize("piece_numbers", [1 << 24, 100])
def test_merging_piece_by_piece_gives_the_merged_weights(model, base, tmp_path, monkeypatch, piece_numbers):
    monkeypatch.setattr(merge, "PIECE_NUMBERS", piece_numbers)  # a hundred numbers: a row or two at a time
    save_adapter(model, tmp_path / "adapter")
    merge_adapter(tmp_path / "adapter", base, tmp_path)
    merge_adapter(tmp_path / "adapter", base, tmp_path)
    written = load_file(tmp_path / "model.safetensors")
    for name, weight in merged_state(model).items():
        torch.testing.assert_close(written[name], weight.bfloat16(), rtol=0.01, atol=0)
    assert not list(tmp_path.glob(".*"))


def test_a_base_with_fused_projections_is_merged_as_moshi_splits_it(model, adapter, base, tiny_moshi, tmp_path):
    weights = tmp_path / "fused.safetensors"
    save_file(fused(load_file(tiny_moshi / "model.safetensors")), weights)
    assert "depformer.layers.0.self_attn.in_proj_weight" in load_file(weights)
    base = replace(base, moshi_weights=weights)
    out = tmp_path / "merged"
    out.mkdir()
    merge_adapter(adapter, base, out)
    found = loaders.CheckpointInfo.from_hf_repo(
        "user/merged", moshi_weights=out / "model.safetensors", config_path=out / "config.json"
    )
    state = found.get_moshi(dtype=torch.float32).state_dict()
    for name, weight in merged_state(model).items():
        assert torch.equal(state[name], weight.bfloat16().float()), name


def narrow(state):
    state["linears.2.weight"] = state["linears.2.weight"][:, :-8].contiguous()


def lose(state):
    del state["linears.2.weight"]


def quantise(state):
    state["linears.2.weight"] = state["linears.2.weight"].to(torch.int8)


@pytest.mark.parametrize("change, found", [(narrow, "BF16 [128, 24]"), (lose, "nothing"), (quantise, "I8 [128, 32]")])
def test_an_adapter_of_another_base_is_named_with_layer_shape_and_rank(model, base, tmp_path, change, found):
    state = load_file(base.moshi_weights)
    change(state)
    save_file(state, tmp_path / "other.safetensors")
    save_adapter(model, tmp_path / "adapter")
    other = replace(base, moshi_weights=tmp_path / "other.safetensors")
    with pytest.raises(UserError) as error:
        merge_adapter(tmp_path / "adapter", other, tmp_path)
    assert "linears.2 [128, 32] of rank 4" in error.value.problem and f"which has {found} there" in error.value.problem
    assert not (tmp_path / "model.safetensors").exists()


def test_a_truncated_base_is_an_error(model, base, tmp_path):
    (tmp_path / "cut.safetensors").write_bytes(base.moshi_weights.read_bytes()[:-10])
    save_adapter(model, tmp_path / "adapter")
    with pytest.raises(UserError, match="damaged or truncated"):
        merge_adapter(tmp_path / "adapter", replace(base, moshi_weights=tmp_path / "cut.safetensors"), tmp_path)


def test_data_that_the_disk_changes_are_detected(model, base, tmp_path, monkeypatch):
    replace_file = os.replace

    def damage_and_replace(source, target):
        content = bytearray(Path(source).read_bytes())
        content[-1] ^= 1
        Path(source).write_bytes(content)
        replace_file(source, target)

    save_adapter(model, tmp_path / "adapter")
    monkeypatch.setattr(os, "replace", damage_and_replace)
    with pytest.raises(ExportError, match="is not the merged weight"):
        merge_adapter(tmp_path / "adapter", base, tmp_path)


WIDE = """
import json, shutil, sys
from pathlib import Path

import torch
from peft import LoraConfig
from safetensors.torch import save_file
import hf_csm.models.moshi.merge as merge
from hf_csm.models.moshi.checkpoint import find_checkpoint

folder, tiny, width, num_layers = Path(sys.argv[1]), sys.argv[2], 8192, 16
header, offset = {}, 0
for layer in range(num_layers):
    num_bytes = 2 * width * width
    header[f"layers.{layer}.weight"] = {
        "dtype": "BF16", "shape": [width, width], "data_offsets": [offset, offset + num_bytes]
    }
    offset += num_bytes
text = json.dumps(header).encode()
text += b" " * (-len(text) % 8)
with open(folder / "base.safetensors", "wb") as file:
    file.write(len(text).to_bytes(8, "little") + text)
    file.truncate(8 + len(text) + offset)  # zeros, which take no room
weights = {}
for layer in range(0, num_layers, 4):  # the others are copied as they are
    weights[f"base_model.model.layers.{layer}.lora_A.weight"] = torch.randn(8, width)
    weights[f"base_model.model.layers.{layer}.lora_B.weight"] = torch.randn(width, 8)
(folder / "adapter").mkdir()
save_file(weights, folder / "adapter" / "adapter_model.safetensors")
LoraConfig(
    r=8, lora_alpha=16, target_modules=".*", base_model_name_or_path=str(folder / "base")
).save_pretrained(folder / "adapter")
shutil.copytree(tiny, folder / "base")
(folder / "base.safetensors").replace(folder / "base" / "model.safetensors")
del weights


def peak_bytes():  # not getrusage, which counts what the parent had when it started this process
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith("VmHWM")))


before = peak_bytes()
(folder / "out").mkdir()
merge.merge_adapter(folder / "adapter", find_checkpoint(str(folder / "base")), folder / "out")
size = (folder / "out" / "model.safetensors").stat().st_size
print(json.dumps({"before": before, "peak": peak_bytes(), "size": size}))
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peak memory is read from /proc")
def test_merging_two_gigabytes_takes_little_memory(tiny_moshi, tmp_path):
    ran = subprocess.run(
        [sys.executable, "-c", WIDE, str(tmp_path), str(tiny_moshi)], capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout.splitlines()[-1])
    print(found)
    assert found["size"] > 2 * 1024**3
    assert found["peak"] < 1.3 * found["size"] + 1e9  # the bar
    assert found["peak"] - found["before"] < 0.4e9  # a piece and its update, whatever the size of the file
    (tmp_path / "out" / "model.safetensors").unlink()
