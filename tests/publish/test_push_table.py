import json
import shutil
import subprocess
import sys

import pytest
from huggingface_hub import HfApi, constants, hf_hub_download
from huggingface_hub.utils import reset_sessions

from hf_csm.corpora import all_builders
from hf_csm.data.schema import UTTERANCE_FEATURES, WINDOW_FEATURES
from hf_csm.data.table import ShardWriter, SplitInfo, read_card_metadata, write_card
from hf_csm.errors import UserError
from hf_csm.hub import find_table
from hf_csm.publish.push_table import push_table, table_files
from tests.doubles.hub import Repository, puts


BUILDERS = {builder.NAME: builder for builder in all_builders()}
NOTICE = BUILDERS["ravdess"].NOTICE
WINDOW = {"id": "w", "split": "train", "emotion": 0, "speaker_id": "s", "codes": [[[1, 2]]] * 2, "num_frames": 2}
UTTERANCE = {"id": "u", "split": "train", "emotion": 0, "speaker_id": "s", "text": "secret words"}


@pytest.fixture
def table(prepared, tmp_path):
    """A copy of the prepared RAVDESS with a plot, and with files that are not to be published."""
    shutil.copytree(prepared, tmp_path / "table")
    for name in ("plots/pitch.png", "plots/.cache.png", "notes.txt", "data/train/happy.tmp", ".token"):
        (tmp_path / "table" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "table" / name).write_bytes(name.encode() * 100)
    return tmp_path / "table"


def made_up(folder, stage, in_card, in_rows, license="cc-by-4.0", builder=None, body=NOTICE):
    """Write a table of one row, as `prepare` and `encode` write theirs."""
    features, row = (UTTERANCE_FEATURES, UTTERANCE) if stage == "prepared" else (WINDOW_FEATURES, WINDOW)
    path = folder / "data" / "train" / "neutral-00000-of-00001.parquet"
    with ShardWriter(path, features) as writer:
        writer.write([{**dict.fromkeys(features), **row, "corpus": in_rows}])
    metadata = {"stage": stage, "corpus": in_card} | ({"builder": builder} if builder else {})
    splits = {"train": SplitInfo(1, path.stat().st_size)}
    write_card(folder, features=features, title="T", license=license, splits=splits, metadata=metadata, body=body)
    return folder


def remote_files(repo_id, revision=None):
    return set(HfApi().list_repo_files(repo_id, repo_type="dataset", revision=revision)) - {".gitattributes"}


def local_files(table):
    return {path.relative_to(table).as_posix() for path in table_files(table)}


def test_a_table_is_published_with_card_and_plots_and_nothing_else(hub, prepared, table):
    assert push_table(table, "user/ravdess") == f"{hub.endpoint}/datasets/user/ravdess"
    assert remote_files("user/ravdess") == local_files(table)
    assert local_files(table) == local_files(prepared) | {"plots/pitch.png"}
    assert local_files(prepared) == {p.relative_to(prepared).as_posix() for p in prepared.rglob("*") if p.is_file()}
    for name in local_files(table):
        assert (find_table("user/ravdess") / name).read_bytes() == (table / name).read_bytes()
    info = HfApi().dataset_info("user/ravdess")
    assert not info.private and info.card_data.license == "cc-by-nc-sa-4.0"


def test_a_table_of_codes_is_published(hub, codes):
    push_table(codes, "user/codes", private=True)
    assert read_card_metadata(find_table("user/codes")) == read_card_metadata(codes)
    assert HfApi().dataset_info("user/codes").private


def test_an_upload_that_was_cut_is_completed_by_the_next_one(hub, table):
    hub.fail_after(3, "PUT")
    with pytest.raises(UserError, match="cannot be reached") as error:
        push_table(table, "user/ravdess")
    assert "what has arrived is kept" in error.value.remedy and not remote_files("user/ravdess")
    hub.recover()
    num_cut = len(puts(hub))
    push_table(table, "user/ravdess")
    num_large = sum(not name.endswith(".md") for name in local_files(table))
    assert len(puts(hub)) - num_cut == num_large - 3
    for name in local_files(table):
        assert (find_table("user/ravdess") / name).read_bytes() == (table / name).read_bytes()


def test_every_place_where_a_push_can_break_leaves_it_to_the_next_one(hub, table):
    push_table(table, "user/reference")
    num_requests = len(hub.requests)
    for num_served in range(0, num_requests, 3):
        hub.fail_after(num_served)
        with pytest.raises(UserError):
            push_table(table, f"user/cut-{num_served}")
        hub.recover()
        push_table(table, f"user/cut-{num_served}")
        assert remote_files(f"user/cut-{num_served}") == local_files(table)


def test_pushing_the_same_table_again_changes_nothing(hub, table):
    push_table(table, "user/ravdess")
    before, num_puts = HfApi().dataset_info("user/ravdess").sha, len(puts(hub))
    push_table(table, "user/ravdess")
    assert HfApi().dataset_info("user/ravdess").sha == before and len(puts(hub)) == num_puts


def test_a_newer_state_of_the_table_replaces_the_older_and_leaves_other_files(hub, table):
    push_table(table, "user/ravdess")
    upload = {"repo_id": "user/ravdess", "repo_type": "dataset"}
    HfApi().upload_file(path_or_fileobj=b"ours", path_in_repo="LICENSE", **upload)
    HfApi().upload_file(path_or_fileobj=b"old", path_in_repo="data/train/happy-00009-of-00010.parquet", **upload)
    (table / "plots" / "pitch.png").rename(table / "plots" / "loudness.png")
    push_table(table, "user/ravdess")
    assert remote_files("user/ravdess") == local_files(table) | {"LICENSE"}


def test_a_revision_is_a_branch_of_its_own(hub, table):
    push_table(table, "user/ravdess")
    (table / "plots" / "pitch.png").unlink()
    url = push_table(table, "user/ravdess", revision="v2")
    assert url.endswith("/datasets/user/ravdess/tree/v2")
    assert remote_files("user/ravdess", "v2") == remote_files("user/ravdess") - {"plots/pitch.png"}
    assert not (find_table("user/ravdess", "v2") / "plots").exists()


FORBIDDEN = sorted(name for name, builder in BUILDERS.items() if builder.NOT_TO_BE_PUBLISHED)


def test_the_corpora_that_may_not_be_distributed():
    assert {"esd", "msp_podcast"} <= set(FORBIDDEN) and "ravdess" not in FORBIDDEN


@pytest.mark.parametrize("corpus", FORBIDDEN)
@pytest.mark.parametrize("stage", ["prepared", "codes"])
@pytest.mark.parametrize("edited", ["nothing", "card", "rows", "card but for its builder"])
def test_tables_that_may_not_be_distributed_are_refused_even_with_an_edited_card(hub, tmp_path, corpus, stage, edited):
    in_card = "ravdess" if edited.startswith("card") else corpus
    in_rows = corpus if edited in ("nothing", "card") else "ravdess"
    builder = corpus if edited == "card but for its builder" else None
    folder = made_up(tmp_path / "t", stage, in_card, in_rows, "cc-by-nc-sa-4.0", builder)
    with pytest.raises(UserError) as error:
        push_table(folder, "user/table")
    assert BUILDERS[corpus].TITLE in error.value.problem and "may not be published" in error.value.problem
    assert BUILDERS[corpus].NOT_TO_BE_PUBLISHED.rstrip(".") in error.value.problem
    assert not hub.requests


@pytest.mark.parametrize(
    "card, problem, remedy",
    [
        (
            {"in_card": "mine", "in_rows": "mine", "license": "other"},
            "license of the corpus mine is not stated",
            "--license",
        ),
        ({"in_card": "mine", "in_rows": "ravdess"}, "names the corpus mine, the rows ravdess", "again"),
        ({"in_card": "ravdess", "in_rows": "ravdess", "license": "mit"}, "lost the license", "again"),
        (
            {"in_card": "ravdess", "in_rows": "ravdess", "license": "cc-by-nc-sa-4.0", "body": "Free for all."},
            "lost the license or the notice",
            "again",
        ),
        ({"in_card": "mine", "in_rows": "mine", "license": "free"}, "refuses the card", "Correct these values"),
    ],
)
def test_a_card_that_does_not_say_the_terms_is_refused(hub, tmp_path, card, problem, remedy):
    with pytest.raises(UserError) as error:
        push_table(made_up(tmp_path / "t", "prepared", **card), "user/table")
    assert problem in error.value.problem and remedy in error.value.remedy and not puts(hub)


def test_a_corpus_of_the_users_own_is_published_under_the_license_that_its_card_states(hub, tmp_path):
    push_table(made_up(tmp_path / "t", "prepared", "mine", "mine", "cc-by-4.0", "csv_manifest"), "user/mine")
    assert HfApi().dataset_info("user/mine").card_data.license == "cc-by-4.0"


def damage_card(table):
    (table / "README.md").write_text("# Not of hf-csm\n")


def remove_shard(table):
    next(table.glob("data/train/*.parquet")).unlink()


@pytest.mark.parametrize(
    "damage, problem",
    [(damage_card, "not a table of hf-csm"), (shutil.rmtree, "not a table"), (remove_shard, "whole")],
)
def test_a_folder_that_is_not_a_whole_table_is_refused(hub, table, damage, problem):
    damage(table)
    with pytest.raises(UserError, match=problem):
        push_table(table, "user/table")
    assert not hub.requests


def test_a_repository_with_something_else_is_left_alone(hub, table, tmp_path):
    push_table(made_up(tmp_path / "t", "prepared", "mine", "mine"), "user/mine")
    for name in ("README.md", "model.txt"):
        HfApi().create_repo(f"user/{name}", repo_type="dataset")
        HfApi().upload_file(
            path_or_fileobj=b"# Other\n", path_in_repo=name, repo_id=f"user/{name}", repo_type="dataset"
        )
    for name, what in (
        ("mine", "holds mine, prepared"),
        ("README.md", "something other"),
        ("model.txt", "something other"),
    ):
        before = HfApi().dataset_info(f"user/{name}").sha
        for revision in (None, "new-branch"):
            with pytest.raises(UserError, match=what):
                push_table(table, f"user/{name}", revision=revision)
        assert HfApi().dataset_info(f"user/{name}").sha == before
        assert [branch.name for branch in HfApi().list_repo_refs(f"user/{name}", repo_type="dataset").branches] == [
            "main"
        ]


def test_private_is_refused_for_a_public_repository(hub, table):
    push_table(table, "user/ravdess")
    with pytest.raises(UserError, match="is public"):
        push_table(table, "user/ravdess", private=True)


@pytest.mark.parametrize(
    "who, repo_id, problem, remedy",
    [
        ("user", "ravdess", "not the name of a Hub repository", "USER/NAME"),
        ("user", "user/rav dess", "not the name of a Hub repository", "USER/NAME"),
        ("user", "another/ravdess", "your token may not do this", "token that may write"),
        ("reader", "user/ravdess", "your token may not do this", "token that may write"),
        ("reader", "user/exists", "your token may not do this", "token that may write"),
        ("anonymous", "user/ravdess", "you are not logged in", "hf auth login"),
        ("hf_wrong", "user/ravdess", "does not accept your token", "hf auth login"),
    ],
)
def test_missing_write_access_is_an_error_with_a_remedy(hub, table, tmp_path, capsys, who, repo_id, problem, remedy):
    HfApi().create_repo("user/exists", repo_type="dataset")
    tokens = {"user": hub.token, "reader": hub.add_user("user", can_write=False), "anonymous": None}
    token = tokens.get(who, who)
    with hub.connected(tmp_path / "home", token), pytest.raises(UserError) as error:
        push_table(table, repo_id)
    assert problem in error.value.problem and repo_id in error.value.problem and remedy in error.value.remedy
    assert "\n" not in error.value.problem + error.value.remedy
    assert token is None or token not in str(error.value) + str(error.value.__cause__) + "".join(capsys.readouterr())


def test_without_the_hub_nothing_is_pushed(hub, table, monkeypatch):
    for status, problem in ((None, "cannot be reached"), (503, "HTTP 503")):
        hub.fail_after(0, status=status)
        with pytest.raises(UserError, match=problem):
            push_table(table, "user/ravdess")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    reset_sessions()
    with pytest.raises(UserError, match="HF_HUB_OFFLINE"):
        push_table(table, "user/ravdess")


def test_an_upload_that_arrived_otherwise_than_sent_is_not_called_done(hub, table, monkeypatch):
    store = Repository.store
    monkeypatch.setattr(Repository, "store", lambda self, content: store(self, content + b"\n"))
    with pytest.raises(UserError, match=r"1 files.* differ.*README\.md"):
        push_table(table, "user/ravdess")
    assert hf_hub_download("user/ravdess", "README.md", repo_type="dataset")


WHOLE_WAY = """
import json, os, sys
from datasets import load_dataset
from hf_csm.hub import find_table
from hf_csm.data.table import read_card_metadata
from hf_csm.publish.push_table import push_table
from tests.doubles.hub import Repository, puts

table = sys.argv[1]
push_table(table, "user/ravdess", private=True)
rows = {}
for split in ("train", "validation", "test"):
    rows[split] = list(load_dataset(table, split=split, streaming=True))
    assert rows[split] == list(load_dataset("user/ravdess", split=split, streaming=True)), split
    assert rows[split] == list(load_dataset("user/ravdess", split=split)), split
found = find_table("user/ravdess")
assert read_card_metadata(found) == read_card_metadata(table)
print(json.dumps({"rows": {split: len(found) for split, found in rows.items()}, "found": str(found)}))
"""
OFFLINE = """
import json
from hf_csm.hub import find_table
from hf_csm.data.table import read_columns, split_files
found = find_table("user/ravdess")
print(json.dumps({"found": str(found), "num_train": len(read_columns(split_files(found, "train"), ["id"]))}))
"""


def test_a_pushed_table_streams_and_is_cached_for_offline_use(hub, table, tmp_path):
    def run(script, **more):
        environment = hub.environment(tmp_path / "user home") | {"HF_HUB_DISABLE_PROGRESS_BARS": "1"} | more
        ran = subprocess.run(
            [sys.executable, "-c", script, str(table)], env=environment, capture_output=True, text=True
        )
        assert ran.returncode == 0, ran.stderr
        assert hub.token not in ran.stdout + ran.stderr
        return json.loads(ran.stdout.splitlines()[-1])

    online = run(WHOLE_WAY)
    assert set(online["rows"]) == {"train", "validation", "test"} and min(online["rows"].values()) >= 8
    num_requests = len(hub.requests)
    offline = run(OFFLINE, HF_HUB_OFFLINE="1")
    assert offline == {"found": online["found"], "num_train": online["rows"]["train"]}
    assert len(hub.requests) == num_requests
