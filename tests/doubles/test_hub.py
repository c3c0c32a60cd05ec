"""The stand-in Hub behaves to the real clients as the Hub does, where our tests rely on it."""

from pathlib import Path

import pytest
import requests
from huggingface_hub import CommitOperationDelete, HfApi, HfFileSystem, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import http_backoff
from huggingface_hub.utils.sha import git_hash

from tests.doubles.hub import LocalHub


LARGE, SMALL = bytes(range(256)) * 40, b"small\n"
CARD = b"---\nlicense: odbl\ntags:\n- speech\n---\n\n# A table\n"
FILES = {"README.md": CARD, "notes.txt": SMALL, "data/a.parquet": LARGE, "data/b.parquet": LARGE[::-1], "no.txt": b""}
DATASET = {"repo_type": "dataset"}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    for wait in ("base_wait_time", "max_wait_time"):
        monkeypatch.setitem(http_backoff.__kwdefaults__, wait, 0)
    with LocalHub(tmp_path / "hub") as running, running.connected(tmp_path / "home"):
        yield running


@pytest.fixture
def folder(tmp_path):
    """README.md and two text files are sent with the commit, two Parquet files through LFS."""
    for name, content in FILES.items():
        path = tmp_path / "folder" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return tmp_path / "folder"


@pytest.fixture
def pushed(hub, folder):
    """The id of a repository with the folder."""
    HfApi().create_repo("user/table", **DATASET)
    HfApi().upload_folder(folder_path=folder, repo_id="user/table", **DATASET)
    return "user/table"


def contents(folder):
    folder = Path(folder)
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name[0] != "."}


def num(hub, request):
    return sum(done.startswith(request) for done in hub.requests)


def test_a_download_is_equal_to_the_upload_and_nothing_is_sent_twice(hub, folder, pushed):
    assert contents(snapshot_download(pushed, **DATASET)) == FILES
    HfApi().upload_folder(folder_path=folder, repo_id=pushed, **DATASET)
    HfApi().upload_file(path_or_fileobj=LARGE, path_in_repo="c.parquet", repo_id=pushed, **DATASET)
    assert num(hub, "PUT /lfs/") == 2


def test_listings_have_sizes_and_hashes(pushed):
    api = HfApi()
    by_path = {entry.path: entry for entry in api.list_repo_tree(pushed, recursive=True, **DATASET)}
    assert set(by_path) == {*FILES, ".gitattributes", "data"}
    assert (by_path["notes.txt"].size, by_path["notes.txt"].lfs) == (6, None)
    assert by_path["notes.txt"].blob_id == git_hash(SMALL)
    assert by_path["data/a.parquet"].lfs.size == by_path["data/a.parquet"].size == len(LARGE)
    info = api.dataset_info(pushed, files_metadata=True)
    assert {file.rfilename for file in info.siblings} == set(by_path) - {"data"}
    assert info.card_data.license == "odbl" and info.tags == ["speech"] and not info.private
    in_data = api.list_repo_tree(pushed, path_in_repo="data", **DATASET)
    assert [entry.path for entry in in_data] == ["data/a.parquet", "data/b.parquet"]
    assert [entry.path for entry in api.get_paths_info(pushed, ["data", "none"], **DATASET)] == ["data"]


def test_branches_tags_and_commits_name_states(pushed):
    api = HfApi()
    first = api.dataset_info(pushed).sha
    api.create_tag(pushed, tag="v1", **DATASET)
    api.create_branch(pushed, branch="try/out", **DATASET)
    less = {"operations": [CommitOperationDelete("data/"), CommitOperationDelete("notes.txt")], "commit_message": "-"}
    api.create_commit(pushed, **less, **DATASET, revision="try/out")
    assert [api.dataset_info(pushed, revision=name).sha for name in ("main", "v1", first[:8])] == [first] * 3
    assert set(api.list_repo_files(pushed, **DATASET, revision="try/out")) == {".gitattributes", "README.md", "no.txt"}
    refs = api.list_repo_refs(pushed, **DATASET)
    assert [{ref.name for ref in found} for found in (refs.branches, refs.tags)] == [{"main", "try/out"}, {"v1"}]
    with pytest.raises(HfHubHTTPError, match="The branch is at"):
        api.create_commit(pushed, **less, **DATASET, parent_commit="0" * 40)


def test_parts_of_files_are_read(hub, pushed):
    for name, content in (("data/a.parquet", LARGE), ("README.md", CARD)):
        with HfFileSystem(skip_instance_cache=True).open(f"datasets/{pushed}/{name}", block_size=10) as file:
            file.seek(7)
            assert file.read(20) == content[7:27]


@pytest.mark.parametrize(
    "ask, error",
    [
        (lambda api: api.dataset_info("user/none"), RepositoryNotFoundError),
        (lambda api: api.model_info("user/table"), RepositoryNotFoundError),
        (lambda api: api.dataset_info("user/table", revision="v9"), RevisionNotFoundError),
        (lambda api: hf_hub_download("user/table", "none.txt", **DATASET), EntryNotFoundError),
        (lambda api: api.create_repo("user/table", **DATASET), "409.*already created"),
        (lambda api: api.create_repo("another/table", **DATASET), "403.*rights"),
        (lambda api: api.delete_file("none.txt", "user/table", **DATASET), EntryNotFoundError),
        (lambda api: HfApi(token="hf_wrong").dataset_info("user/table"), "Invalid credentials"),
        (lambda api: HfApi(token="hf_wrong").whoami(), "Invalid user token"),
    ],
)
def test_clients_recognize_errors(pushed, ask, error):
    expected = {"match": f"(?s){error}"} if isinstance(error, str) else {}
    with pytest.raises(requests.HTTPError if isinstance(error, str) else error, **expected):
        ask(HfApi())


def test_private_and_gated_repositories_are_for_their_owner(hub):
    api = HfApi()
    api.create_repo("user/secret", private=True)
    api.upload_file(path_or_fileobj=SMALL, path_in_repo="x.txt", repo_id="user/secret")
    for token in (False, hub.add_user("another")):
        with pytest.raises(RepositoryNotFoundError):
            HfApi(token=token).model_info("user/secret")
    assert hf_hub_download("user/secret", "x.txt")
    api.update_repo_settings("user/secret", private=False, gated="auto")
    with pytest.raises(GatedRepoError):
        HfApi(token=hub.add_user("another")).hf_hub_download("user/secret", "x.txt", cache_dir="c")
    api.delete_repo("user/secret")
    assert not api.repo_exists("user/secret")


def test_only_the_owner_with_a_write_token_writes(hub, pushed):
    for token in (hub.add_user("user", can_write=False), hub.add_user("another")):
        api = HfApi(token=token)
        assert api.list_repo_files(pushed, **DATASET)
        with pytest.raises(HfHubHTTPError, match="403"):
            api.create_repo("user/new")
        with pytest.raises(HfHubHTTPError, match="403"):
            api.upload_file(path_or_fileobj=SMALL, path_in_repo="x.txt", repo_id=pushed, **DATASET)


def test_a_dropped_upload_leaves_nothing_and_a_second_one_completes(hub, folder):
    api = HfApi()
    api.create_repo("user/table", **DATASET)
    hub.fail_after(1, "PUT")
    with pytest.raises(RuntimeError, match="Error while uploading"):
        api.upload_folder(folder_path=folder, repo_id="user/table", **DATASET)
    assert set(api.list_repo_files("user/table", **DATASET)) == {".gitattributes"}
    hub.recover()
    num_before = num(hub, "PUT")
    api.upload_folder(folder_path=folder, repo_id="user/table", **DATASET)
    assert num(hub, "PUT") - num_before == 1
    assert contents(snapshot_download("user/table", **DATASET)) == FILES


@pytest.mark.parametrize(
    "metadata",
    [
        "license: CC BY 4.0",
        "language: English",
        "size_categories: [many]",
        "tags: [1]",
        "configs: [{data_files: x}]",
        "a: [",
    ],
)
def test_a_card_with_wrong_metadata_is_refused_before_anything_is_sent(hub, folder, metadata):
    (folder / "README.md").write_text(f"---\n{metadata}\n---\n")
    HfApi().create_repo("user/table", **DATASET)
    with pytest.raises(ValueError, match="Invalid metadata"):
        HfApi().upload_folder(folder_path=folder, repo_id="user/table", **DATASET)
    assert not num(hub, "PUT")
