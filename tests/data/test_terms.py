import json

import pytest

from hf_csm.config import DatasetConfig, Replay, Source
from hf_csm.data.terms import CorpusTerms, corpora_of, count_windows, read_corpora, with_earlier, write_corpora
from hf_csm.data.windows import training_table
from hf_csm.errors import UserError
from hf_csm.testing.codes import RandomWindow, write_random_codes


TALK = CorpusTerms("talk", "Talk", "cc-by-4.0", replay=True, emotions={"unlabelled": 2}, languages=["en"])


@pytest.fixture
def dataset(tmp_path):
    """Tables of two corpora of the user's own, one of them for replay, and what trains on the happy windows."""
    windows = [RandomWindow("happy"), RandomWindow("happy", language="zh"), RandomWindow("sad", language="fr")]
    write_random_codes(tmp_path / "codes" / "mine", [*windows, RandomWindow("happy", split="validation")])
    write_random_codes(tmp_path / "codes" / "talk", [RandomWindow(None, 50, language=None)])
    return DatasetConfig(
        sources=[Source(str(tmp_path / "codes" / "mine"))],
        replay=Replay(str(tmp_path / "codes" / "talk"), 0.5),
        emotions=["happy"],
    )


def test_windows_are_counted_as_they_are_trained_on(dataset):
    mine, talk = count_windows(corpora_of(dataset), training_table(dataset, None))
    assert (mine.corpus, mine.license, mine.replay, mine.table) == ("mine", "unknown", False, None)
    assert (mine.num_windows, mine.duration_s, mine.emotions, mine.languages) == (2, 4.0, {"happy": 2}, ["en", "zh"])
    assert (talk.corpus, talk.replay, talk.emotions, talk.languages) == ("talk", True, {"unlabelled": 1}, [])
    assert talk.duration_s == 4.0


def test_what_is_written_is_read(tmp_path):
    write_corpora([TALK], tmp_path)
    assert read_corpora(tmp_path) == [TALK]
    assert [path.name for path in tmp_path.iterdir()] == ["corpora.json"]


def test_a_file_of_another_version_is_read_as_far_as_it_is_known(tmp_path):
    row = {"corpus": "own", "title": "Own", "license": "mit", "voices": 3}
    (tmp_path / "corpora.json").write_text(json.dumps([row]))
    assert read_corpora(tmp_path) == [CorpusTerms("own", "Own", "mit")]


def test_nobody_can_edit_the_terms_of_a_corpus_that_is_known(tmp_path):
    write_corpora([CorpusTerms("ravdess", "Mine", "mit"), CorpusTerms("esd", "Mine", "mit")], tmp_path)
    ravdess, esd = read_corpora(tmp_path)
    assert (ravdess.license, ravdess.title) == ("cc-by-nc-sa-4.0", "RAVDESS")
    assert esd.not_to_be_published is not None


def test_what_a_run_was_trained_on_before_it_was_resumed_stays(tmp_path):
    own = CorpusTerms("own", "Own", "mit")
    assert with_earlier([own], tmp_path) == [own]
    write_corpora([TALK, CorpusTerms("own", "Own", "mit", num_windows=9)], tmp_path)
    assert with_earlier([own], tmp_path) == [own, TALK]


@pytest.mark.parametrize(
    "content",
    [
        "[",
        "{}x",
        "[1]",
        '[{"corpus": "a"}]',
        '[{"corpus": 1, "title": "A", "license": "mit"}]',
        '[{"corpus": "a", "title": "A", "license": null}]',
        '[{"corpus": "a", "title": "A", "license": "mit", "emotions": null}]',
        '[{"corpus": "a", "title": "A", "license": "mit", "emotions": ["sad"]}]',
        '[{"corpus": "a", "title": "A", "license": "mit", "emotions": {"sad": "many"}}]',
        '[{"corpus": "a", "title": "A", "license": "mit", "languages": [1]}]',
        '[{"corpus": "a", "title": "A", "license": "mit", "table": 1}]',
    ],
)
def test_a_damaged_file_is_refused(tmp_path, content):
    (tmp_path / "corpora.json").write_text(content)
    with pytest.raises(UserError, match="corpora.json cannot be read") as error:
        read_corpora(tmp_path)
    assert "\n" not in error.value.problem + error.value.remedy
