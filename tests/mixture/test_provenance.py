import shutil

import pytest

from hf_csm.config import DatasetConfig, Replay, Source
from hf_csm.errors import UserError
from hf_csm.mixture.provenance import (
    CorpusTerms,
    corpora_of,
    count_windows,
    read_corpora,
    with_earlier,
    write_corpora,
)
from hf_csm.mixture.windows import training_table
from tests.doubles.hub import LocalHub


def edited(codes, folder, old, new):
    shutil.copytree(codes, folder)
    text = (folder / "README.md").read_text()
    assert old in text
    (folder / "README.md").write_text(text.replace(old, new))
    return folder


def test_the_provenance_of_a_run_has_corpora_licenses_and_windows(codes, tmp_path):
    other = edited(codes, tmp_path / "other", "fingerprint: ", "fingerprint: x")
    config = DatasetConfig(sources=[Source(str(codes))], emotions=["happy", "sad"], replay=Replay(str(other), 0.2))
    table = training_table(config, None)
    trained, replay = count_windows(corpora_of(config), table)
    assert (trained.corpus, trained.title, trained.license) == ("ravdess", "RAVDESS", "cc-by-nc-sa-4.0")
    assert "Livingstone" in trained.notice and trained.not_to_be_published is None and trained.table is None
    assert set(trained.emotions) == {"happy", "sad"} and sum(trained.emotions.values()) == trained.num_windows
    assert replay.replay and set(replay.emotions) == {"angry", "happy", "neutral", "sad"}
    assert trained.num_windows + replay.num_windows == len(table)
    assert trained.duration_s + replay.duration_s == pytest.approx(table.num_frames.sum() * 0.08)
    write_corpora([trained, replay], tmp_path)
    assert read_corpora(tmp_path) == [trained, replay]


def test_a_table_on_the_hub_keeps_its_name_and_revision(codes, tmp_path):
    from hf_csm.publish.push_table import push_table

    with LocalHub(tmp_path / "hub") as hub, hub.connected(tmp_path / "home"):
        push_table(codes, "user/codes")
        (found,) = corpora_of(DatasetConfig(sources=[Source("user/codes", revision="main")]))
    assert (found.table, found.revision) == ("user/codes", "main")


@pytest.mark.parametrize("old, new", [("builder: ravdess", "builder: esd"), ("corpus: ravdess", "corpus: esd")])
def test_an_edited_card_does_not_make_a_corpus_free(codes, tmp_path, old, new):
    folder = edited(codes, tmp_path / "edited", old, new)
    (found,) = corpora_of(DatasetConfig(sources=[Source(str(folder))]))
    assert found.not_to_be_published and "form" in found.not_to_be_published


def test_nor_does_an_edited_record(tmp_path):
    write_corpora([CorpusTerms("msp_podcast", "Podcasts", "cc0-1.0", num_windows=3)], tmp_path)
    (found,) = read_corpora(tmp_path)
    assert found.not_to_be_published and (found.license, found.num_windows) == ("other", 3)


def test_the_card_beside_a_manifest_gives_its_corpus(codes, tmp_path):
    (unknown,) = corpora_of(DatasetConfig(manifest_path=str(tmp_path / "talks.jsonl")))
    assert (unknown.corpus, unknown.license, unknown.table) == ("talks", "unknown", None)
    shutil.copy(codes / "README.md", tmp_path)
    (known,) = corpora_of(DatasetConfig(manifest_path=str(tmp_path / "talks.jsonl")))
    assert known.corpus == "ravdess"


def test_the_provenance_includes_the_checkpoint_a_run_starts_from(tmp_path):
    old, new = CorpusTerms("esd", "ESD", "other"), CorpusTerms("ravdess", "RAVDESS", "mit", num_windows=2)
    assert with_earlier([new], tmp_path) == [new]
    write_corpora([old, CorpusTerms("ravdess", "RAVDESS", "mit", num_windows=1)], tmp_path)
    found = with_earlier([new], tmp_path)
    assert [terms.corpus for terms in found] == ["ravdess", "esd"] and found[0] is new


@pytest.mark.parametrize("text", ["", "[1]", "{", '[{"corpus": "a"}]', '{"a": 1}'])
def test_a_damaged_record_is_named(tmp_path, text):
    (tmp_path / "corpora.json").write_text(text)
    with pytest.raises(UserError, match="corpora.json") as error:
        read_corpora(tmp_path)
    assert "--resume-from-checkpoint latest" in error.value.remedy


def test_the_languages_of_the_rows_are_known_before_training(codes):
    (found,) = corpora_of(DatasetConfig(sources=[Source(str(codes))]))
    assert found.languages == ["en"]


@pytest.mark.parametrize(
    ("stated", "expected"), [(" CC-BY-4.0 ", "cc-by-4.0"), (["MIT", "gpl-3.0"], "mit, gpl-3.0"), (None, "unknown")]
)
def test_a_license_is_read_however_it_is_spelt(stated, expected):
    assert CorpusTerms("mine", "Mine", stated).license == expected
