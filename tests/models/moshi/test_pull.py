import json
import shutil

import pytest
from huggingface_hub import HfApi, constants, hf_hub_download
from huggingface_hub.errors import LocalEntryNotFoundError
from huggingface_hub.utils import http_backoff, reset_sessions
from moshi.models import loaders

from hf_csm.errors import UserError
from hf_csm.models.moshi.pull import fetch_file, find_folder, split_name
from tests.doubles.hub import LocalHub


ADAPTER = {
    "moshi_name": "hf://user/base/model.safetensors",
    "mimi_name": "hf://user/base/m.safetensors",
    "lora_name": "l.safetensors",
}
LEGACY = (loaders.MOSHI_NAME, loaders.MIMI_NAME, loaders.TEXT_TOKENIZER_NAME)


def upload(repo_id, files, **more):
    """Upload files from their content, in order of name; dicts as JSON."""
    for name, content in files.items():
        content = json.dumps(content) if isinstance(content, dict) else content
        HfApi().upload_file(path_or_fileobj=content.encode(), path_in_repo=name, repo_id=repo_id, **more)


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    with LocalHub(tmp_path_factory.mktemp("hub")) as running, running.connected(tmp_path_factory.mktemp("home")):
        api = HfApi()
        for name in ("adapter", "silent", "legacy", "peft", "private", "gated", "empty", "escape", "broken", "list"):
            api.create_repo(f"user/{name}", private=name == "private")
        names = ADAPTER | {"tokenizer_name": "tokenizer.model"}
        files = {"config.json": names, "emotions.json": {}, "l.safetensors": "v1", "tokenizer.model": "-"}
        files |= {"adapter_config.json": {}, "adapter_model.safetensors": "-", "samples/x.wav": "-", "README.md": "-"}
        upload("user/adapter", files)
        api.create_tag("user/adapter", tag="v1")
        upload("user/adapter", {"l.safetensors": "v2"})
        upload("user/silent", {"config.json": names, "l.safetensors": "-", "tokenizer.model": "-"})
        upload("user/legacy", dict.fromkeys((*LEGACY, "more.safetensors"), "-"))
        upload("user/peft", {"adapter_config.json": {}, "adapter_model.safetensors": "-", "optimizer.pt": "-"})
        upload("user/gated", {"config.json": names})
        upload("user/empty", {"README.md": "-"})
        upload("user/escape", {"config.json": {"moshi_name": "../../../x.safetensors"}})
        upload("user/broken", {"config.json": "{"})
        upload("user/list", {"config.json": "[]"})
        api.update_repo_settings("user/gated", gated="auto")
    return running


@pytest.fixture
def connected(hub, tmp_path, monkeypatch):
    """A new cache, a user of the name `reader`."""
    for wait in ("base_wait_time", "max_wait_time"):
        monkeypatch.setitem(http_backoff.__kwdefaults__, wait, 0)
    monkeypatch.chdir(tmp_path)
    home = tmp_path / "home"
    with LocalHub(hub.folder) as running, running.connected(home, running.add_user("reader", can_write=False)):
        yield running


@pytest.fixture
def offline(monkeypatch):
    """A switch for HF_HUB_OFFLINE."""

    def switch():
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        reset_sessions()

    return switch


def names_in(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_a_folder_is_itself(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path.parent)
    assert find_folder(str(tmp_path)) == tmp_path
    assert find_folder(tmp_path) == tmp_path
    assert not find_folder(tmp_path.name).is_absolute()


@pytest.mark.parametrize(
    ("name", "also", "expected"),
    [
        ("adapter", (), {"config.json", "emotions.json", "adapter_config.json", "l.safetensors", "tokenizer.model"}),
        ("silent", ("corpora.json",), {"config.json", "l.safetensors", "tokenizer.model"}),
        ("legacy", (), set(LEGACY)),
        ("peft", (), {"adapter_config.json", "adapter_model.safetensors"}),
    ],
)
def test_only_what_is_read_is_fetched(connected, name, also, expected):
    assert names_in(find_folder(f"user/{name}", also=also)) == expected


def test_more_can_be_asked_for(connected):
    assert "adapter_model.safetensors" in names_in(find_folder("user/adapter", also=["adapter_model.safetensors"]))


def test_weights_can_be_left_out(connected):
    folder = find_folder("user/adapter", weights=False, also=["adapter_model.safetensors"])
    assert names_in(folder) == {"config.json", "emotions.json", "adapter_config.json", "adapter_model.safetensors"}
    assert find_folder("user/legacy", weights=False).parent.parent.name == "models--user--legacy"


def test_all_files_are_of_the_revision(connected):
    tagged, newest = find_folder("user/adapter", "v1"), find_folder("user/adapter")
    assert ((tagged / "l.safetensors").read_text(), (newest / "l.safetensors").read_text()) == ("v1", "v2")
    assert (find_folder("user/adapter", tagged.name) / "l.safetensors").read_text() == "v1"


@pytest.mark.parametrize("name", ["adapter", "silent", "legacy", "peft"])
def test_what_is_in_the_cache_needs_no_network(connected, offline, name):
    found = find_folder(f"user/{name}")
    connected.fail_after(0)
    assert find_folder(f"user/{name}") == found
    connected.fail_after(0, status=503)
    assert find_folder(f"user/{name}") == found
    num_requests = len(connected.requests)
    offline()
    assert find_folder(f"user/{name}") == found
    assert len(connected.requests) == num_requests


def test_the_second_time_costs_one_request(connected):
    find_folder("user/silent")
    num_requests = len(connected.requests)
    find_folder("user/silent")
    assert len(connected.requests) == num_requests + 1


@pytest.mark.parametrize("lost", ["l.safetensors", "emotions.json", "tokenizer.model", "config.json"])
def test_half_a_repository_in_the_cache_is_not_taken_for_the_whole(connected, offline, lost):
    found = find_folder("user/adapter")
    (found / lost).unlink()
    offline()
    with pytest.raises(UserError, match="the cache has only a part") as error:
        find_folder("user/adapter")
    assert error.value.problem.startswith("user/adapter: ") and "HF_HUB_OFFLINE" in error.value.remedy


def test_what_another_program_has_cached_is_completed_or_refused(connected, offline, monkeypatch):
    hf_hub_download("user/adapter", "config.json")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    reset_sessions()
    with pytest.raises(UserError, match="the cache has only a part"):
        find_folder("user/adapter")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    reset_sessions()
    assert "emotions.json" in names_in(find_folder("user/adapter"))


def test_an_interrupted_download_goes_on(connected):
    connected.fail_after(7)
    with pytest.raises(UserError):
        find_folder("user/adapter")
    connected.recover()
    assert names_in(find_folder("user/adapter")) >= {"l.safetensors", "emotions.json", "config.json"}


@pytest.mark.parametrize(
    ("name", "revision", "problem", "remedy"),
    [
        ("user/none", None, "no such repository that you may see", "your account may see it"),
        ("user/private", None, "no such repository that you may see", "your account may see it"),
        ("user/gated", None, "is gated", "Accept its terms"),
        ("user/adapter", "v9", "no such revision", "branch, tag or commit"),
        ("user/empty", None, f"has no {loaders.MOSHI_NAME}, nor a config.json", "Moshi model or adapter"),
        ("user/escape", None, "../../../x.safetensors, which is outside of the repository", "owner"),
        ("user/broken", None, "config.json is not JSON", "owner"),
        ("user/list", None, "config.json is not a JSON object", "owner"),
        ("user/ad apter", None, "not the name of a Hub repository", "USER/NAME"),
        ("adapter", None, "no folder adapter, and it is not the name", "or a repository"),
        ("./user/adapter", None, "no folder ./user/adapter", "or a repository"),
        ("/user/adapter", None, "no folder /user/adapter", "or a repository"),
        ("local/folder", "v1", "is a folder, which has no revision 'v1'", "Leave --revision out"),
        ("local/file", None, "is a file", "its folder"),
    ],
)
def test_names_that_lead_nowhere(connected, tmp_path, name, revision, problem, remedy):
    (tmp_path / "local" / "folder").mkdir(parents=True)
    (tmp_path / "local" / "file").touch()
    with pytest.raises(UserError) as error:
        find_folder(name, revision)
    assert problem in error.value.problem and remedy in error.value.remedy
    assert "\n" not in error.value.problem + error.value.remedy


def test_what_is_not_cached_is_named_with_the_reason(connected, offline, tmp_path):
    connected.fail_after(0)
    with pytest.raises(UserError, match="user/adapter: .*the Hub cannot be reached"):
        find_folder("user/adapter")
    connected.recover()
    offline()
    with pytest.raises(UserError, match="user/adapter: .*switched off by HF_HUB_OFFLINE"):
        find_folder("user/adapter")
    assert not list(tmp_path.rglob("config.json"))


def test_a_wrong_token_is_named_and_not_shown(connected, tmp_path):
    with connected.connected(tmp_path / "another home", "hf_wrong"), pytest.raises(UserError) as error:
        find_folder("user/adapter")
    assert "does not accept your token" in error.value.problem and "hf_wrong" not in str(error.value)


def test_a_file_that_is_not_there_is_none_and_stays_so_without_network(connected, offline):
    assert fetch_file("user/adapter", "none.bin") is None
    commit = find_folder("user/adapter").name
    assert fetch_file("user/adapter", "none.bin", commit) is None
    offline()
    assert fetch_file("user/adapter", "none.bin", commit) is None
    shutil.rmtree(constants.HF_HUB_CACHE)
    with pytest.raises(LocalEntryNotFoundError):  # nobody knows
        fetch_file("user/adapter", "none.bin", commit)


@pytest.mark.parametrize(
    ("names", "problem"),
    [
        ({"moshi_name": "model.pt"}, r"model\.pt \(moshi_name\), which is not in safetensors"),
        ({"mimi_name": "hf://user/base/mimi.bin"}, r"mimi\.bin \(mimi_name\), which is not in safetensors"),
        ({"tokenizer_name": "file:///etc/passwd"}, "file:///etc/passwd, a place on somebody's machine"),
    ],
)
def test_what_a_repository_may_not_name_is_refused(tmp_path, names, problem):
    with LocalHub(tmp_path / "hub") as hub, hub.connected(tmp_path / "home"):
        HfApi().create_repo("user/hostile")
        upload("user/hostile", {"config.json": names})
        with pytest.raises(UserError, match=problem):
            find_folder("user/hostile")


@pytest.mark.parametrize("name", ["hf://a", "hf://user/happy", "hf://user/happy/", "hf://user/happy/../x"])
def test_a_name_of_no_file_on_the_hub_is_refused(name):
    with pytest.raises(UserError, match="no file of a Hub repository"):
        split_name(name)


def test_no_name_is_no_folder():
    with pytest.raises(UserError, match="name of a model is empty"):
        find_folder("")
