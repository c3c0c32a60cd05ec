import json

import pytest
from huggingface_hub import HfApi

from hf_csm.errors import UserError
from hf_csm.models.moshi.checkpoint import find_checkpoint
from hf_csm.publish.push_model import push_model
from tests.doubles.hub import remote_json


BASE = "kyutai/tiny"


def test_a_local_base_needs_base_model(hub, base_on_hub, local_run):
    with pytest.raises(UserError, match="local folder") as error:
        push_model(local_run / "best", "user/happy")
    assert "--base-model USER/NAME" in error.value.remedy and not HfApi().repo_exists("user/happy")
    push_model(local_run / "best", "user/happy", base_model=BASE)
    assert remote_json("user/happy", "config.json")["moshi_name"] == f"hf://{BASE}/model.safetensors"
    assert remote_json("user/happy", "adapter_config.json")["base_model_name_or_path"] == BASE


@pytest.mark.parametrize("merged", [False, True])
def test_another_base_than_the_trained_one_is_refused(hub, base_on_hub, local_run, run, tiny_moshi, merged):
    api = HfApi()
    api.create_repo("user/other")
    api.upload_folder(repo_id="user/other", folder_path=tiny_moshi)
    weights = bytearray((tiny_moshi / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    api.upload_file(repo_id="user/other", path_or_fileobj=bytes(weights), path_in_repo="model.safetensors")
    with pytest.raises(UserError, match="no file identical to .*model.safetensors"):
        push_model(local_run / "best", "user/happy", base_model="user/other", merged=merged)
    with pytest.raises(UserError, match="trained on kyutai/tiny.* user/other"):
        push_model(run / "best", "user/happy", base_model="user/other", merged=merged)
    with pytest.raises(UserError, match="user/none.* base model.* no such repository"):
        push_model(local_run / "best", "user/happy", base_model="user/none", merged=merged)
    assert not api.repo_exists("user/happy")


def test_a_changed_base_is_refused_for_an_adapter_but_can_be_merged(hub, base_on_hub, run):
    trained_on = HfApi().model_info(BASE).sha
    path = run / "checkpoint_000010" / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"revision": trained_on}))
    push_model(run / "best", "user/before")
    assert remote_json("user/before", "emotions.json")["base_revision"] == trained_on
    content = bytearray((find_checkpoint(BASE).moshi_weights).read_bytes())
    content[-1] ^= 1
    api = HfApi(token=next(token for token, user in hub.users.items() if user.name == "kyutai"))
    api.upload_file(repo_id=BASE, path_or_fileobj=bytes(content), path_in_repo="model.safetensors")
    with pytest.raises(UserError, match="model.safetensors has changed") as error:
        push_model(run / "best", "user/happy")
    assert "--merged" in error.value.remedy
    push_model(run / "best", "user/happy", merged=True)
