import shutil

import pytest
from huggingface_hub import HfApi, constants, hf_hub_download
from huggingface_hub.utils import http_backoff, reset_sessions

from hf_csm.data.table import read_card_metadata
from hf_csm.errors import UserError
from hf_csm.hub import fetch_file, find_model, find_table, is_whole, split_url
from tests.doubles.hub import LocalHub


ADAPTER_FILES = ("config.json", "adapter_config.json", "emotions.json", "adapter_model.safetensors", "samples/x.wav")


@pytest.fixture(scope="module")
def hub(prepared, tmp_path_factory):
    """A Hub with the prepared table, an adapter, and repositories that are gated, private or something else."""
    with LocalHub(tmp_path_factory.mktemp("hub")) as running, running.connected(tmp_path_factory.mktemp("home")):
        api = HfApi()
        for name in ("table", "gated", "private", "other"):
            api.create_repo(f"user/{name}", repo_type="dataset", private=name == "private")
        api.upload_folder(folder_path=prepared, repo_id="user/table", repo_type="dataset")
        api.create_tag("user/table", tag="v1", repo_type="dataset")
        for name in ("data/train/more.txt", "extra.bin"):
            api.upload_file(path_or_fileobj=b"-", path_in_repo=name, repo_id="user/table", repo_type="dataset")
        api.upload_file(path_or_fileobj=b"# -", path_in_repo="README.md", repo_id="user/gated", repo_type="dataset")
        api.upload_file(path_or_fileobj=b"# -", path_in_repo="README.md", repo_id="user/other", repo_type="dataset")
        api.update_repo_settings("user/gated", repo_type="dataset", gated="auto")
        for name in ("adapter", "silent", "private"):
            api.create_repo(f"user/{name}", private=name == "private")
        for name in ADAPTER_FILES:
            api.upload_file(path_or_fileobj=b"v1", path_in_repo=name, repo_id="user/adapter")
        api.create_tag("user/adapter", tag="v1")
        api.upload_file(path_or_fileobj=b"v2", path_in_repo="config.json", repo_id="user/adapter")
        api.upload_file(path_or_fileobj=b"{}", path_in_repo="config.json", repo_id="user/silent")
    return running


@pytest.fixture(autouse=True)
def connected(hub, tmp_path, monkeypatch):
    """An empty cache, and a user named `reader`."""
    for wait in ("base_wait_time", "max_wait_time"):
        monkeypatch.setitem(http_backoff.__kwdefaults__, wait, 0)
    monkeypatch.chdir(tmp_path)
    home = tmp_path / "home"
    with LocalHub(hub.folder) as running, running.connected(home, running.add_user("reader", can_write=False)):
        yield running


@pytest.fixture
def offline(monkeypatch):
    """A switch for HF_HUB_OFFLINE."""

    def switch(is_offline=True):
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", is_offline)
        reset_sessions()

    return switch


def names_in(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_a_local_folder_is_returned_as_it_is(prepared, tmp_path):
    assert find_table(str(prepared)) == prepared
    assert find_model(str(tmp_path)) == find_model(tmp_path) == tmp_path
    (tmp_path / "model").mkdir()
    assert not find_model("model").is_absolute()


def test_only_the_files_of_the_table_are_downloaded(prepared):
    found = find_table("user/table")
    assert names_in(found) == names_in(prepared)
    assert read_card_metadata(found) == read_card_metadata(prepared) and is_whole(found)


def test_a_cached_revision_needs_no_network(connected, monkeypatch):
    found = find_table("user/table", revision="v1")
    connected.fail_after(0)
    assert find_table("user/table", revision="v1") == found
    num_requests = len(connected.requests)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    reset_sessions()
    assert find_table("user/table", revision="v1") == found
    with pytest.raises(UserError, match="switched off by HF_HUB_OFFLINE"):
        find_table("user/table")  # main is another revision
    assert len(connected.requests) == num_requests


@pytest.mark.parametrize("info", ["null", "3", "{splits: [{name: train}]}"])
def test_a_table_whose_card_is_damaged_is_not_whole(prepared, tmp_path, info):
    shutil.copytree(prepared, tmp_path / "table")
    card = tmp_path / "table" / "README.md"
    card.write_text(f"---\ndataset_info: {info}\nhf_csm: {{stage: prepared}}\n---\n")
    assert not is_whole(tmp_path / "table")


def test_a_partly_cached_table_is_not_used(connected):
    found = find_table("user/table")
    shutil.rmtree(found / "data" / "test")
    connected.fail_after(0)
    with pytest.raises(UserError, match="the cache has only a part"):
        find_table("user/table")
    connected.recover()
    assert is_whole(find_table("user/table"))


@pytest.mark.parametrize(
    "name, revision, problem, remedy",
    [
        ("user/none", None, "no such repository that you may see", "your account may see it"),
        ("user/private", None, "no such repository that you may see", "your account may see it"),
        ("user/gated", None, "is gated", "Accept its terms"),
        ("user/other", None, "is not a table of hf-csm", "push-dataset"),
        ("user/table", "v9", "no such revision", "branch, tag or commit"),
        ("prepared/ravdes", None, "did you mean prepared/ravdess?", "Check the spelling"),
        ("ravdess", None, "not the name of a Hub repository", "USER/NAME"),
        ("./a/b", None, "not the name of a Hub repository", "USER/NAME"),
        ("user/ta ble", None, "not the name of a Hub repository", "USER/NAME"),
        ("prepared/ravdess", "v1", "has no revision 'v1'", "Omit the revision"),
        ("prepared/card.md", None, "is a file", "Name its folder"),
    ],
)
def test_a_wrong_name_is_an_error_with_a_remedy(tmp_path, name, revision, problem, remedy):
    (tmp_path / "prepared" / "ravdess").mkdir(parents=True)
    (tmp_path / "prepared" / "card.md").touch()
    with pytest.raises(UserError) as error:
        find_table(name, revision)
    assert problem in error.value.problem and name in error.value.problem and remedy in error.value.remedy
    assert "\n" not in error.value.problem + error.value.remedy


@pytest.mark.parametrize(
    "name, revision, problem, remedy",
    [
        ("", None, "name of a model is empty", "USER/NAME"),
        ("user/none", None, "no such repository that you may see", "your account may see it"),
        ("user/private", None, "no such repository that you may see", "your account may see it"),
        ("user/adapter", "v9", "no such revision", "branch, tag or commit"),
        ("user/ad apter", None, "not the name of a Hub repository", "USER/NAME"),
        ("adapter", None, "not the name of a Hub repository", "USER/NAME"),
        ("./user/adapter", None, "not the name of a Hub repository", "USER/NAME"),
        ("/user/adapter", None, "not the name of a Hub repository", "USER/NAME"),
        ("local/folder", "v1", "has no revision 'v1'", "Omit the revision"),
        ("local/file", None, "is a file", "Name its folder"),
    ],
)
def test_a_wrong_name_of_a_model_is_an_error_with_a_remedy(tmp_path, name, revision, problem, remedy):
    (tmp_path / "local" / "folder").mkdir(parents=True)
    (tmp_path / "local" / "file").touch()
    with pytest.raises(UserError) as error:
        find_model(name, revision)
    assert problem in error.value.problem and name in error.value.problem and remedy in error.value.remedy
    assert "\n" not in error.value.problem + error.value.remedy


@pytest.mark.parametrize(
    "token, name, problem, remedy",
    [
        (None, "user/private", "no such repository that you may see", "if it is private, log in"),
        (None, "user/gated", "is gated", "log in"),
        ("hf_wrong", "user/table", "does not accept your token", "hf auth login"),
    ],
)
def test_without_a_valid_token_the_error_names_the_login(connected, tmp_path, token, name, problem, remedy):
    with connected.connected(tmp_path / "another home", token), pytest.raises(UserError) as error:
        find_table(name)
    assert problem in error.value.problem and remedy in error.value.remedy
    assert "hf_wrong" not in str(error.value)


@pytest.mark.parametrize("status, problem", [(None, "cannot be reached"), (503, "HTTP 503"), (403, "may not do this")])
def test_an_unreachable_or_failing_hub_is_named(connected, status, problem):
    connected.fail_after(0, status=status)
    with pytest.raises(UserError, match=problem):
        find_table("user/table")
    connected.fail_after(3, status=status)  # in the middle of a download
    with pytest.raises(UserError, match=problem):
        find_table("user/table")
    connected.recover()
    assert is_whole(find_table("user/table"))


# Models


def test_only_the_files_that_describe_a_model_are_downloaded():
    assert names_in(find_model("user/adapter")) == set(ADAPTER_FILES[:3])
    assert names_in(find_model("user/silent", files=["corpora.json"])) == {"config.json"}
    found = find_model("user/adapter", files=["adapter_model.safetensors"])
    assert names_in(found) == set(ADAPTER_FILES[:4])


def test_all_files_are_of_one_revision():
    tagged, newest = find_model("user/adapter", "v1"), find_model("user/adapter")
    assert ((tagged / "config.json").read_text(), (newest / "config.json").read_text()) == ("v1", "v2")
    assert find_model("user/adapter", tagged.name) == tagged


@pytest.mark.parametrize("name", ["user/adapter", "user/silent"])
def test_a_cached_model_needs_no_network(connected, offline, name):
    found = find_model(name)
    for status in (None, 503):
        connected.fail_after(0, status=status)
        assert find_model(name) == found
    num_requests = len(connected.requests)
    offline()
    assert find_model(name) == found
    assert len(connected.requests) == num_requests


def test_a_cached_model_costs_one_request(connected):
    find_model("user/silent")
    num_requests = len(connected.requests)
    find_model("user/silent")
    assert len(connected.requests) == num_requests + 1


@pytest.mark.parametrize("lost", ["emotions.json", "config.json"])
def test_a_partly_cached_model_is_not_used(connected, offline, lost):
    (find_model("user/adapter") / lost).unlink()
    offline()
    with pytest.raises(UserError, match=f"user/adapter: {lost} is not in the cache") as error:
        find_model("user/adapter")
    assert "HF_HUB_OFFLINE" in error.value.remedy


def test_a_model_that_another_program_has_cached_in_part_is_completed_or_refused(connected, offline):
    hf_hub_download("user/adapter", "config.json")
    offline()
    with pytest.raises(UserError, match="is not in the cache"):
        find_model("user/adapter")
    offline(False)
    assert names_in(find_model("user/adapter")) == set(ADAPTER_FILES[:3])


def test_an_interrupted_download_of_a_model_resumes(connected):
    connected.fail_after(5)
    with pytest.raises(UserError):
        find_model("user/adapter")
    connected.recover()
    assert names_in(find_model("user/adapter")) == set(ADAPTER_FILES[:3])


def test_a_file_that_does_not_exist_is_none_also_offline(offline):
    assert fetch_file("user/adapter", "none.bin") is None
    commit = find_model("user/adapter").name
    assert fetch_file("user/adapter", "none.bin", commit) is None
    offline()
    assert fetch_file("user/adapter", "none.bin", commit) is None
    shutil.rmtree(constants.HF_HUB_CACHE)
    with pytest.raises(UserError, match="none.bin is not in the cache"):
        fetch_file("user/adapter", "none.bin", commit)


@pytest.mark.parametrize("url", ["hf://a", "hf://user/happy", "hf://user/happy/", "hf://user/happy/../x"])
def test_a_url_of_no_file_on_the_hub_is_refused(url):
    with pytest.raises(UserError, match="no file of a Hub repository"):
        split_url(url)
