import gc
import json
import weakref

import pytest
import torch
from huggingface_hub import HfApi
from moshi.models import loaders
from safetensors.torch import load_file, save_file

from hf_csm.errors import UserError
from hf_csm.models.moshi.checkpoint import find_checkpoint
from hf_csm.models.moshi.export import (
    ExportError,
    check_native_keys,
    export_adapter,
    serving_config,
)
from hf_csm.models.moshi.lora import linear_paths, save_adapter
from hf_csm.models.moshi.merge import merge_adapter
from hf_csm.models.moshi.model import load_moshi
from hf_csm.models.moshi.verify import verify_export
from tests.doubles.hub import LocalHub
from tests.doubles.random_adapter import PROJECTIONS, random_adapter


@pytest.fixture(scope="module")
def base(tiny_moshi):
    return find_checkpoint(str(tiny_moshi))


@pytest.fixture(scope="module")
def model(base):
    return random_adapter(base, names=PROJECTIONS)


@pytest.fixture(scope="module")
def adapter(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained") / "adapter"
    save_adapter(model, folder)
    return folder


@pytest.fixture
def exported(model, base, tmp_path):
    return export_adapter(model, base, tmp_path / "native")


@pytest.mark.parametrize("names", [PROJECTIONS, ["out_projs"], "all-linear"])
def test_the_model_that_moshi_loads_is_the_trained_one(base, tmp_path, names):
    model = random_adapter(base, names=names)
    folder = export_adapter(model, base, tmp_path / "native")
    save_adapter(model, tmp_path / "adapter")
    assert verify_export(folder, tmp_path / "adapter", base, dtype=torch.float32) < 1e-4
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "lora.safetensors"]


def test_in_bfloat16_only_rounding_differs(exported, adapter, base):
    assert 0 < verify_export(exported, adapter, base) < 0.2


def test_one_base_model_is_in_memory_at_a_time(exported, adapter, base, tmp_path, monkeypatch):
    merge_adapter(adapter, base, tmp_path)
    loaded, alive = weakref.WeakSet(), []
    load = loaders.get_moshi_lm

    def count(filename, *arguments, **more):
        alive.append(len(loaded))
        lm = load(filename, *arguments, **more)
        if filename is not None:
            loaded.add(lm)
        return lm

    gc.collect()
    monkeypatch.setattr(loaders, "get_moshi_lm", count)
    verify_export(exported, adapter, base)
    verify_export(tmp_path, adapter, base)
    assert len(alive) >= 4 and not any(alive) and not loaded


def test_every_linear_layer_has_weights_and_the_untouched_ones_are_zero(base, tmp_path):
    model = random_adapter(base, names=["out_projs"])
    weights = load_file(export_adapter(model, base, tmp_path / "native") / "lora.safetensors")
    paths = linear_paths(load_moshi(base).lm)
    assert weights.keys() == {f"{path}.lora_{part}.weight" for path in paths for part in "AB"}
    for path in paths:
        assert weights[f"{path}.lora_B.weight"].any() == ("out_projs" in path)


def test_the_config_serves_from_anywhere(exported, tiny_moshi):
    config = json.loads((exported / "config.json").read_text())
    assert (config["lora"], config["lora_name"], config["lora_rank"]) == (True, "lora.safetensors", 4)
    assert config["lora_scaling"] == 1.5
    assert config["moshi_name"] == f"file://{tiny_moshi}/model.safetensors"
    # As `moshi.server --hf-repo user/adapter` does, with the adapter's own files already downloaded.
    found = loaders.CheckpointInfo.from_hf_repo(
        "user/adapter", config_path=exported / "config.json", lora_weights=exported / "lora.safetensors"
    )
    assert found.get_moshi(fuse_lora=True).dim == 64
    assert found.get_mimi().frame_rate == 12.5
    assert found.get_text_tokenizer().vocab_size() == 512


def test_a_base_on_the_hub_is_named_by_its_repository(tiny_moshi, tmp_path):
    with LocalHub(tmp_path / "hub") as hub, hub.connected(tmp_path / "home"):
        HfApi().create_repo("user/tiny")
        HfApi().upload_folder(folder_path=tiny_moshi, repo_id="user/tiny")
        config = serving_config(find_checkpoint("user/tiny"))
    assert config["moshi_name"] == "hf://user/tiny/model.safetensors"
    assert config["mimi_name"] == "hf://user/tiny/mimi.safetensors"
    assert config["mimi_config_name"] == "hf://user/tiny/mimi.json"
    assert config["tokenizer_name"] == "hf://user/tiny/tokenizer.model"
    assert config["dim"] == 64


def test_a_base_without_config_is_moshi_7b(base):
    legacy = type(base)(**{**vars(base), "lm_config": None, "raw_config": None, "name_or_path": "someone/legacy"})
    config = serving_config(legacy)
    assert config["dim"] == 4096
    assert config["moshi_name"] == "hf://someone/legacy/model.safetensors"
    assert "mimi_config_name" not in config


def test_an_exported_folder_is_found_as_an_adapter_and_refused_as_a_base(exported):
    found = find_checkpoint(str(exported))
    assert found.get_moshi(fuse_lora=True).dim == 64
    with pytest.raises(UserError, match="LoRA adapter, not a base"):
        load_moshi(found)


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (lambda state: state.pop("text_linear.lora_A.weight"), "text_linear.lora_A.weight: missing"),
        (lambda state: state.update(other=torch.zeros(1)), "other"),
        (lambda state: state.update({"text_linear.lora_A.weight": torch.zeros(3, 64)}), "(3, 64) instead of (4, 64)"),
    ],
)
def test_weights_that_moshi_could_not_load_are_an_error(exported, base, damage, complaint):
    state = load_file(exported / "lora.safetensors")
    damage(state)
    save_file(state, exported / "lora.safetensors")
    with pytest.raises(ExportError) as error:
        check_native_keys(exported, base)
    assert complaint in str(error.value)


def test_a_slightly_different_weight_is_an_error_with_the_difference(exported, adapter, base):
    state = load_file(exported / "lora.safetensors")
    state["transformer.layers.0.gating.linear_in.lora_A.weight"][0, 0] += 0.25
    save_file(state, exported / "lora.safetensors")
    check_native_keys(exported, base)
    with pytest.raises(ExportError, match=r"linear_in\.lora_A.* by up to 0\.25"):
        verify_export(exported, adapter, base)


def test_another_scaling_is_an_error(exported, adapter, base):
    config = json.loads((exported / "config.json").read_text())
    (exported / "config.json").write_text(json.dumps({**config, "lora_scaling": 1.0}))
    with pytest.raises(ExportError, match="scaling"):
        verify_export(exported, adapter, base)


def test_another_base_is_an_error_with_the_difference_of_the_logits(exported, adapter, base, tiny_moshi, tmp_path):
    weights = load_file(tiny_moshi / "model.safetensors")
    weights["text_linear.weight"] = weights["text_linear.weight"] * 1.5
    save_file(weights, tmp_path / "other.safetensors")
    config = json.loads((exported / "config.json").read_text())
    moved = {**config, "moshi_name": f"file://{tmp_path}/other.safetensors"}
    (exported / "config.json").write_text(json.dumps(moved))
    with pytest.raises(ExportError, match="off by up to"):
        verify_export(exported, adapter, base)


@pytest.mark.parametrize("name", ["config.json", "lora.safetensors"])
def test_a_truncated_export_is_refused(exported, base, name):
    content = (exported / name).read_bytes()
    (exported / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=name):
        check_native_keys(exported, base)


def test_a_failed_export_leaves_the_old_one_and_nothing_beside_it(exported, model, base, monkeypatch):
    before = (exported / "lora.safetensors").read_bytes()

    def full_disk(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("hf_csm.models.moshi.export.save_file", full_disk)
    with pytest.raises(OSError, match="No space"):
        export_adapter(model, base, exported)
    assert (exported / "lora.safetensors").read_bytes() == before
    assert [path.name for path in exported.parent.iterdir()] == ["native"]


def test_the_adapter_folder_alone_gives_the_same_files_as_the_model(model, exported, base, tmp_path):
    save_adapter(model, tmp_path / "adapter")
    out = export_adapter(tmp_path / "adapter", base, tmp_path / "again")
    for name in ("config.json", "lora.safetensors"):
        assert (out / name).read_bytes() == (exported / name).read_bytes()
