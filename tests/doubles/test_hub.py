import json
import os
from pathlib import Path

import pytest
import requests
from huggingface_hub import CommitOperationDelete, HfApi, HfFileSystem, constants, hf_hub_download, snapshot_download
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
from tests.doubles.hub_card import card_problems


LARGE, SMALL = bytes(range(256)) * 40, b"small\n"
CARD = b"---\nlicense: odbl\ntags:\n- speech\n---\n\n# A table\n"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    for wait in ("base_wait_time", "max_wait_time"):
        monkeypatch.setitem(http_backoff.__kwdefaults__, wait, 0)
    with LocalHub(tmp_path / "hub") as running, running.connected(tmp_path / "home"):
        yield running


@pytest.fixture
def folder(tmp_path):
    """README.md and notes.txt go with the commit, two Parquet files through LFS."""
    files = {
        "README.md": CARD,
        "notes.txt": SMALL,
        "data/a.parquet": LARGE,
        "data/b.parquet": LARGE[::-1],
        "no.txt": b"",
    }
    for name, content in files.items():
        path = tmp_path / "folder" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return tmp_path / "folder"


@pytest.fixture
def pushed(hub, folder):
    """The id of a repository with the folder."""
    repo_id = HfApi().create_repo("user/table", repo_type="dataset").repo_id
    HfApi().upload_folder(folder_path=folder, repo_id=repo_id, repo_type="dataset")
    return repo_id


def contents(folder):
    folder = Path(folder)
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name[0] != "."}


def num(hub, request):
    return sum(done.startswith(request) for done in hub.requests)


@pytest.mark.parametrize("repo_type", ["dataset", "model"])
def test_what_is_pushed_is_what_is_pulled(hub, folder, repo_type):
    (folder / "data" / "b.parquet").rename(folder / "b.safetensors")
    (folder / "data" / "a.parquet").rename(folder / "a.bin")
    HfApi().create_repo("user/x", repo_type=repo_type)
    commit = HfApi().upload_folder(folder_path=folder, repo_id="user/x", repo_type=repo_type, ignore_patterns=["no.*"])
    found = snapshot_download("user/x", repo_type=repo_type)
    assert contents(found) == {name: content for name, content in contents(folder).items() if name != "no.txt"}
    assert Path(found).name == commit.oid
    assert num(hub, "PUT /lfs/") == 2


def test_what_is_there_is_neither_sent_nor_committed_again(hub, folder, pushed):
    before = HfApi().list_repo_commits(pushed, repo_type="dataset")
    HfApi().upload_folder(folder_path=folder, repo_id=pushed, repo_type="dataset")
    HfApi().upload_file(path_or_fileobj=LARGE, path_in_repo="c.parquet", repo_id=pushed, repo_type="dataset")
    assert num(hub, "PUT /lfs/") == 2
    after = HfApi().list_repo_commits(pushed, repo_type="dataset")
    assert after[1:] == before and [commit.authors for commit in after] == [["user"]] * 3


def test_listings_tell_sizes_and_hashes(pushed):
    api = HfApi()
    by_path = {entry.path: entry for entry in api.list_repo_tree(pushed, recursive=True, repo_type="dataset")}
    assert set(by_path) == {
        ".gitattributes",
        "README.md",
        "notes.txt",
        "no.txt",
        "data",
        "data/a.parquet",
        "data/b.parquet",
    }
    assert (by_path["notes.txt"].size, by_path["notes.txt"].lfs) == (6, None)
    assert by_path["notes.txt"].blob_id == git_hash(SMALL)
    assert by_path["data/a.parquet"].lfs.size == by_path["data/a.parquet"].size == len(LARGE)
    info = api.dataset_info(pushed, files_metadata=True)
    assert {file.rfilename for file in info.siblings} == set(by_path) - {"data"}
    assert info.card_data.license == "odbl" and info.tags == ["speech"] and not info.private
    assert [entry.path for entry in api.list_repo_tree(pushed, repo_type="dataset", path_in_repo="data")] == [
        "data/a.parquet",
        "data/b.parquet",
    ]
    assert [entry.path for entry in api.get_paths_info(pushed, ["data", "no.txt", "none"], repo_type="dataset")] == [
        "data",
        "no.txt",
    ]


def test_branches_tags_and_commits_name_states(hub, pushed):
    api = HfApi()
    first = api.dataset_info(pushed).sha
    api.create_tag(pushed, tag="v1", repo_type="dataset")
    api.create_branch(pushed, branch="try/out", repo_type="dataset")
    operations = [CommitOperationDelete("data/"), CommitOperationDelete("notes.txt")]
    api.create_commit(pushed, operations, commit_message="Less", repo_type="dataset", revision="try/out")
    assert api.dataset_info(pushed).sha == api.dataset_info(pushed, revision="v1").sha == first
    assert api.dataset_info(pushed, revision=first[:8]).sha == first
    assert set(api.list_repo_files(pushed, repo_type="dataset", revision="try/out")) == {
        ".gitattributes",
        "README.md",
        "no.txt",
    }
    refs = api.list_repo_refs(pushed, repo_type="dataset")
    assert {branch.name for branch in refs.branches} == {"main", "try/out"} and [tag.name for tag in refs.tags] == [
        "v1"
    ]
    api.delete_tag(pushed, tag="v1", repo_type="dataset")
    api.delete_branch(pushed, branch="try/out", repo_type="dataset")
    for revision in ("v1", "try/out"):
        assert not api.revision_exists(pushed, revision, repo_type="dataset")


def test_a_commit_on_another_state_than_expected_is_refused(pushed):
    operations = [CommitOperationDelete("notes.txt")]
    with pytest.raises(HfHubHTTPError, match="The branch is at"):
        HfApi().create_commit(pushed, operations, commit_message="Late", repo_type="dataset", parent_commit="0" * 40)


def test_parts_of_files_are_read(hub, pushed):
    for name, content in (("data/a.parquet", LARGE), ("README.md", CARD)):
        with HfFileSystem(skip_instance_cache=True).open(f"datasets/{pushed}/{name}", block_size=10) as file:
            file.seek(7)
            assert file.read(20) == content[7:27]
        url = f"{hub.endpoint}/datasets/{pushed}/resolve/main/{name}"
        for asked, expected in (("bytes=-5", content[-5:]), (f"bytes={len(content) - 2}-", content[-2:])):
            assert requests.get(url, headers={"Range": asked}).content == expected
        assert requests.get(url, headers={"Range": f"bytes={len(content)}-"}).status_code == 416


@pytest.mark.parametrize(
    "ask, error",
    [
        (lambda api: api.dataset_info("user/none"), RepositoryNotFoundError),
        (lambda api: api.model_info("user/table"), RepositoryNotFoundError),
        (lambda api: api.dataset_info("table"), RepositoryNotFoundError),
        (lambda api: api.dataset_info("user/table", revision="v9"), RevisionNotFoundError),
        (lambda api: hf_hub_download("user/table", "none.txt", repo_type="dataset"), EntryNotFoundError),
        (lambda api: api.create_repo("user/table", repo_type="dataset"), "409.*already created"),
        (lambda api: api.create_repo("another/table", repo_type="dataset"), "403.*rights"),
        (lambda api: api.delete_file("none.txt", "user/table", repo_type="dataset"), EntryNotFoundError),
        (lambda api: HfApi(token="hf_wrong").dataset_info("user/table"), "Invalid credentials"),
        (lambda api: HfApi(token="hf_wrong").whoami(), "Invalid user token"),
    ],
)
def test_the_client_tells_errors_apart(pushed, ask, error):
    expected = {"match": f"(?s){error}"} if isinstance(error, str) else {}
    with pytest.raises(requests.HTTPError if isinstance(error, str) else error, **expected):
        ask(HfApi())


def test_private_repositories_are_seen_by_their_owner_only(hub, tmp_path):
    api = HfApi()
    api.create_repo("user/secret", private=True)
    api.upload_file(path_or_fileobj=SMALL, path_in_repo="x.txt", repo_id="user/secret")
    assert api.model_info("user/secret").private and api.whoami()["name"] == "user"
    for token in (False, hub.add_user("another")):
        with pytest.raises(RepositoryNotFoundError):
            HfApi(token=token).model_info("user/secret")
    assert hf_hub_download("user/secret", "x.txt")
    api.update_repo_settings("user/secret", private=False, gated="auto")
    with pytest.raises(GatedRepoError):
        HfApi(token=hub.add_user("another")).hf_hub_download(
            "user/secret", "x.txt", force_download=False, cache_dir="c"
        )
    api.delete_repo("user/secret")
    assert not api.repo_exists("user/secret")


def test_users_who_may_only_read_write_nothing(hub, pushed):
    for token in (hub.add_user("user", can_write=False), hub.add_user("another")):
        api = HfApi(token=token)
        assert api.list_repo_files(pushed, repo_type="dataset")
        for write in (
            lambda api=api: api.create_repo("user/new"),
            lambda api=api: api.upload_file(
                path_or_fileobj=SMALL, path_in_repo="x.txt", repo_id=pushed, repo_type="dataset"
            ),
            lambda api=api: api.create_tag(pushed, tag="mine", repo_type="dataset"),
        ):
            with pytest.raises(HfHubHTTPError, match="403"):
                write()


def test_content_that_is_not_what_it_is_called_is_not_kept(hub, pushed):
    repository = hub.repositories[f"datasets/{pushed}"]
    url = f"{hub.endpoint}/lfs/datasets/{pushed}/{'0' * 64}?signature={hub.signature}"
    assert requests.put(url, data=LARGE).status_code == 400
    assert requests.put(url.partition("?")[0], data=LARGE).status_code == 403
    assert not repository.object_path("0" * 64).exists() and not list(repository.folder.rglob("*.tmp"))


def test_a_dropped_upload_leaves_nothing_and_a_second_one_completes(hub, folder):
    api = HfApi()
    api.create_repo("user/table", repo_type="dataset")
    hub.fail_after(1, "PUT")
    with pytest.raises(RuntimeError, match="Error while uploading"):
        api.upload_folder(folder_path=folder, repo_id="user/table", repo_type="dataset")
    assert set(api.list_repo_files("user/table", repo_type="dataset")) == {".gitattributes"}
    hub.recover()
    num_before = num(hub, "PUT")
    api.upload_folder(folder_path=folder, repo_id="user/table", repo_type="dataset")
    assert num(hub, "PUT") - num_before == 1
    assert contents(snapshot_download("user/table", repo_type="dataset")) == contents(folder)


def test_a_hub_fails_in_the_way_and_at_the_time_it_is_told_to(hub):
    hub.fail_after(1, status=418)
    assert [requests.get(f"{hub.endpoint}/api/whoami-v2").status_code for _ in range(3)] == [401, 418, 418]
    hub.fail_after(0, "POST")
    assert requests.get(f"{hub.endpoint}/api/whoami-v2").status_code == 401
    with pytest.raises(requests.ConnectionError):
        requests.post(f"{hub.endpoint}/api/validate-yaml", data=LARGE)


def test_a_hub_that_is_opened_again_has_its_repositories(hub, pushed, tmp_path):
    with LocalHub(hub.folder) as again, again.connected(tmp_path / "another home"):
        assert HfApi().dataset_info(pushed).sha
        assert contents(snapshot_download(pushed, repo_type="dataset"))["data/a.parquet"] == LARGE


def test_the_client_is_left_as_it_was(tmp_path):
    before = (dict(os.environ), constants.ENDPOINT, constants.HF_HUB_OFFLINE, constants.HF_HUB_CACHE)
    with LocalHub(tmp_path) as hub, hub.connected(tmp_path, token=None):
        assert hub.endpoint == constants.ENDPOINT and "HF_TOKEN" not in os.environ
        assert os.environ["PATH"] == before[0]["PATH"]
    assert (dict(os.environ), constants.ENDPOINT, constants.HF_HUB_OFFLINE, constants.HF_HUB_CACHE) == before


@pytest.mark.parametrize(
    "metadata, expected",
    [
        ({"license": "cc-by-nc-sa-4.0", "language": ["en", "zh"], "size_categories": ["1K<n<10K"]}, []),
        ({"license": "CC BY 4.0"}, ["license"]),
        ({"license": ["odbl", "none of these"]}, ["license"]),
        ({"language": "English", "size_categories": ["many"]}, ["language", "size_categories"]),
        ({"configs": [{"data_files": "*"}], "tags": [1]}, ["tags", "configs"]),
    ],
)
def test_metadata_of_a_card_is_checked(metadata, expected):
    errors, warnings = card_problems(f"---\n{json.dumps(metadata)}\n---\n# Card\n", "dataset")
    assert [error.split('"')[1] for error in errors] == expected and not warnings


def test_a_card_that_is_refused_is_refused_before_anything_is_sent(hub, folder):
    (folder / "README.md").write_text("---\nlicense: free\n---\n")
    HfApi().create_repo("user/table", repo_type="dataset")
    with pytest.raises(ValueError, match="Invalid metadata"):
        HfApi().upload_folder(folder_path=folder, repo_id="user/table", repo_type="dataset")
    assert not num(hub, "PUT")
    assert card_problems("# No metadata\n", "dataset")[1] and card_problems("---\na: [\n---\n", "model")[0]
