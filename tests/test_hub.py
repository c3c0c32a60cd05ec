import shutil

import pytest
from huggingface_hub import HfApi, constants
from huggingface_hub.utils import http_backoff, reset_sessions

from hf_csm.data.table import read_card_metadata
from hf_csm.errors import UserError
from hf_csm.hub import find_table, is_whole
from tests.doubles.hub import LocalHub


@pytest.fixture(scope="module")
def hub(prepared, tmp_path_factory):
    """A Hub with the prepared table, and repositories that are gated, private or no table."""
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


def test_a_local_folder_is_returned_as_it_is(prepared):
    assert find_table(str(prepared)) == prepared


def test_only_the_files_of_the_table_are_downloaded(prepared):
    found = find_table("user/table")
    files = {str(path.relative_to(found)) for path in found.rglob("*") if path.is_file()}
    assert files == {str(path.relative_to(prepared)) for path in prepared.rglob("*") if path.is_file()}
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
        ("prepared/ravdess", "v1", "has no revision 'v1'", "Name the folder"),
        ("prepared/card.md", None, "is a file", "Name the folder"),
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
