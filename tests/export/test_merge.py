import json

import pytest
import torch
from moshi.models import loaders
from safetensors.torch import load_file, save_file

from hf_csm.export.merge import export_merged, verify_merged
from hf_csm.export.native import ExportError, export_checkpoint
from hf_csm.models.lora import adapter_parameters, add_lora, merged, save_adapter
from hf_csm.models.moshi import find_checkpoint, load_moshi


@pytest.fixture(scope="module")
def base(tiny_moshi):
    return find_checkpoint(str(tiny_moshi))


@pytest.fixture(scope="module")
def model(base):
    model = add_lora(load_moshi(base, dtype=torch.float32), rank=4, alpha=6, target_modules="all-linear")
    for number, weight in enumerate(adapter_parameters(model)):
        torch.nn.init.normal_(weight, std=0.1, generator=torch.Generator().manual_seed(number))
    return model.eval()


def test_merged_weights_have_the_bases_names_shapes_and_dtype_and_load_as_a_base(model, base, tiny_moshi, tmp_path):
    out = export_merged(model, base, tmp_path / "merged")
    assert sorted(path.name for path in out.iterdir()) == ["config.json", "model.safetensors"]
    old, new = load_file(tiny_moshi / "model.safetensors"), load_file(out / "model.safetensors")
    assert {name: (w.shape, w.dtype) for name, w in new.items()} == {
        name: (w.shape, w.dtype) for name, w in old.items()
    }
    assert not any(key.startswith("lora") for key in json.loads((out / "config.json").read_text()))
    found = find_checkpoint(str(out))
    assert found.mimi_weights == tiny_moshi / "mimi.safetensors"
    again = load_moshi(found, dtype=torch.float32)
    for name, weight in merged(model).state_dict().items():
        assert torch.equal(again.lm.state_dict()[name], weight.bfloat16().float())


def test_moshis_loader_reads_it_and_logits_are_those_of_the_trained_model_up_to_rounding(model, base, tmp_path):
    out = export_merged(model, base, tmp_path / "merged")
    assert 0 < verify_merged(out, model, base) < 0.1
    found = loaders.CheckpointInfo.from_hf_repo(
        "user/merged", moshi_weights=out / "model.safetensors", config_path=out / "config.json"
    )
    assert found.get_moshi().dtype == torch.bfloat16


def test_a_weight_that_is_not_the_merged_one_is_an_error(model, base, tmp_path):
    out = export_merged(model, base, tmp_path / "merged")
    weights = load_file(out / "model.safetensors")
    weights["linears.3.weight"][0, 0] += 0.5
    save_file(weights, out / "model.safetensors")
    with pytest.raises(ExportError, match=r"linears\.3\.weight is not the merged weight"):
        verify_merged(out, model, base)


def test_a_checkpoint_exports_merged(model, base, tmp_path):
    save_adapter(model, tmp_path / "checkpoint" / "adapter")
    out = export_checkpoint(tmp_path / "checkpoint", tmp_path / "out", merged=True)
    direct = export_merged(model, base, tmp_path / "direct")
    assert (out / "model.safetensors").read_bytes() == (direct / "model.safetensors").read_bytes()
