import shutil

import numpy as np
import pytest

import hf_csm.mixture.windows
from hf_csm.config import DatasetConfig, Replay, Source
from hf_csm.errors import UserError
from hf_csm.mixture.windows import WindowTable, held_out_table, manifest_table, training_table, with_tables
from tests.doubles.codes import RandomWindow, restate_sizes, write_random_codes


@pytest.fixture(scope="module")
def esd(tmp_path_factory):
    """Four speakers to train and two to validate; half of them Chinese."""
    windows = [
        RandomWindow(emotion, 25 * (1 + (emotion == "sad")), speaker, split, language)
        for speaker, split, language in [
            ("0001", "train", "zh"),
            ("0002", "train", "zh"),
            ("0011", "train", "en"),
            ("0012", "train", "en"),
            ("0003", "validation", "zh"),
            ("0013", "validation", "en"),
        ]
        for emotion in ("happy", "sad", "angry")
        if (split, emotion) != ("validation", "angry")
    ]
    return write_random_codes(tmp_path_factory.mktemp("codes") / "esd", windows)


@pytest.fixture(scope="module")
def ravdess(tmp_path_factory):
    windows = [RandomWindow("happy"), RandomWindow(None), RandomWindow("calm"), RandomWindow("happy", split="test")]
    return write_random_codes(tmp_path_factory.mktemp("codes") / "ravdess", windows)


def train(*folders, **options):
    return training_table(DatasetConfig(sources=[Source(str(folder)) for folder in folders], **options), None)


@pytest.mark.parametrize(
    ("filters", "kept"),
    [
        ({}, 12),
        ({"emotions": ["sad", "happy"]}, 8),
        ({"languages": ["en"]}, 6),
        ({"speakers": ["esd-0001", "esd-0011"]}, 6),
        ({"emotions": ["sad"], "languages": ["en"], "speakers": ["esd-0011"]}, 1),
    ],
)
def test_filters_keep_matching_windows(esd, filters, kept):
    table = train(esd, **filters)
    assert len(table) == kept
    for name, column in [("emotions", table.emotions), ("languages", table.languages), ("speakers", table.speakers)]:
        assert set(column) <= set(filters.get(name, column))


@pytest.mark.parametrize(
    ("filters", "named", "remedy"),
    [
        ({"emotions": ["Happy"]}, "dataset.emotions has 'Happy'", "Choose from neutral, calm, happy"),
        (
            {"emotions": ["happy", "disgust"]},
            "'disgust', which no training window has",
            "There are angry, happy, sad.",
        ),
        ({"languages": ["de"]}, "dataset.languages has 'de'", "There are en, zh."),
        ({"speakers": ["esd-0021"]}, "dataset.speakers has 'esd-0021'", "Did you mean esd-00"),
        ({"speakers": ["esd-0013"]}, "'esd-0013', which no training window has", "esd-0012"),  # it is in validation
    ],
)
def test_a_filter_value_without_windows_is_an_error(esd, filters, named, remedy):
    with pytest.raises(UserError) as caught:
        train(esd, **filters)
    assert named in caught.value.problem
    assert remedy in caught.value.remedy


def test_the_message_lists_only_a_few_of_many_speakers(tmp_path):
    many = write_random_codes(tmp_path / "many", [RandomWindow("sad", 5, f"{i:02d}") for i in range(20)])
    with pytest.raises(UserError, match="many-11 and 8 more"):
        train(many, speakers=["nobody"])


def test_validation_is_filtered_by_emotion_and_language_but_not_by_speaker(esd):
    config = DatasetConfig(
        manifest_path=str(esd), emotions=["happy", "angry"], languages=["en"], speakers=["esd-0011"]
    )
    table = held_out_table(config, "validation", None)
    assert (table.speakers, table.emotions) == (["esd-0013"], ["happy"])  # no angry windows, which is no error


@pytest.mark.parametrize(
    ("by", "groups"),
    [
        (["corpus"], {("esd",): 12, ("ravdess",): 3}),
        (["emotion"], {("angry",): 4, ("calm",): 1, ("happy",): 5, ("sad",): 4, ("unlabelled",): 1}),
        (["language", "corpus"], {("en", "esd"): 6, ("en", "ravdess"): 3, ("zh", "esd"): 6}),
        (["speaker"], {("esd-0001",): 3, ("esd-0002",): 3, ("esd-0011",): 3, ("esd-0012",): 3, ("ravdess-01",): 3}),
    ],
)
def test_groups_agree_in_the_traits_they_are_made_by(esd, ravdess, by, groups):
    table = train(esd, ravdess)
    counts = dict.fromkeys(groups, 0)
    for group in table.groups(by):
        counts[group.names] += len(group.rows)
        assert group.duration_s == pytest.approx(table.num_frames[group.rows].sum() / 12.5)
    assert counts == groups


def test_a_group_of_two_tables_keeps_them_apart(esd, ravdess):
    sources = [Source(str(esd), 2.0), Source(str(ravdess), 3.0)]
    groups = WindowTable(sources, "train", codec_sha256=None).groups(["emotion"])
    assert [(group.weight, len(group.rows)) for group in groups if group.names == ("happy",)] == [(2.0, 4), (3.0, 1)]


def test_filters_do_not_apply_to_replay_and_it_is_in_no_group(esd, ravdess):
    table = train(esd, emotions=["sad"], replay=Replay(str(ravdess), 0.1))
    assert [group.names for group in table.groups()] == [("esd", "sad")]
    replay = table.replay_group()
    assert replay.is_replay
    assert {table.emotions[row] for row in replay.rows} == {"happy", "calm", None}
    with pytest.raises(UserError, match="'calm'.* no training window"):
        train(esd, emotions=["calm"], replay=Replay(str(ravdess), 0.1))


def test_replay_without_training_windows_is_an_error(esd, tmp_path):
    held_out = write_random_codes(tmp_path / "held_out", [RandomWindow(None, split="test")])
    with pytest.raises(UserError, match=r"held_out.* no training windows"):
        train(esd, replay=Replay(str(held_out), 0.1))


def test_a_source_without_training_windows_is_named(esd, tmp_path):
    held_out = write_random_codes(tmp_path / "held_out", [RandomWindow(None, split="test")])
    with pytest.raises(UserError, match=r"held_out has no training windows"):
        train(esd, held_out)


def test_an_incomplete_table_is_refused(esd, tmp_path):
    copy = shutil.copytree(esd, tmp_path / "esd")
    next(copy.glob("data/train/*.parquet")).unlink()
    with pytest.raises(UserError, match="/esd: not a whole table"):
        train(copy)


@pytest.mark.parametrize("is_replay", [False, True], ids=["in sources", "in replay"])
def test_a_table_named_twice_is_an_error(esd, is_replay):
    again = f"{esd}/../{esd.name}"
    with pytest.raises(UserError, match="are one table"):
        train(esd, replay=Replay(again, 0.1)) if is_replay else train(esd, again)


def test_the_number_of_windows_left_out_is_reported_for_each_source(esd, ravdess):
    table = train(esd, ravdess, emotions=["happy", "calm"], replay=None)
    assert table.left_out() == [
        f"{esd}: 8 of 12 windows left out by the filters",
        f"{ravdess}: 1 of 3 windows left out by the filters",
    ]
    assert train(esd, ravdess).left_out() == []


def test_a_table_without_a_language_column_has_no_languages(tmp_path):
    old = write_random_codes(tmp_path / "old", [RandomWindow("sad")] * 2, without=("language",))
    assert train(old).languages == [None, None]
    with pytest.raises(UserError, match=r"dataset.languages.* 'en'.*\n.*tables have none"):
        train(old, languages=["en"])


def test_a_table_of_another_version_is_refused_with_the_command_that_makes_it(tmp_path):
    old = write_random_codes(tmp_path / "old", [RandomWindow("sad")], without=("turns",))
    with pytest.raises(UserError, match=r"no column 'turns'.*\n.*hf-csm encode prepared/old"):
        train(old)


@pytest.mark.parametrize(
    ("codec_sha256", "named"),
    [(None, r"b holds codes of codec 1{12}; .*a of codec 0{12}"), ("0" * 64, "b holds .*; the base model's is 0{12}")],
)
def test_tables_of_different_codecs_are_refused(tmp_path, codec_sha256, named):
    first = write_random_codes(tmp_path / "a", [RandomWindow("sad")])
    second = write_random_codes(tmp_path / "b", [RandomWindow("sad")], codec_sha256="1" * 64)
    with pytest.raises(UserError, match=named):
        WindowTable([Source(str(first)), Source(str(second))], "train", codec_sha256=codec_sha256)


def test_a_prepared_table_is_refused_as_codes(prepared, monkeypatch):
    monkeypatch.setattr(hf_csm.mixture.windows, "find_table", lambda name, revision=None: prepared)
    with pytest.raises(UserError, match="user/a .*table of codes.*\n.*hf-csm encode user/a "):
        WindowTable([Source("user/a")], "train", codec_sha256=None)


def test_a_source_may_be_on_the_hub(esd, monkeypatch):
    asked = []

    def find_table(name, revision=None):
        asked.append((name, revision))
        return esd

    monkeypatch.setattr(hf_csm.mixture.windows, "find_table", find_table)
    assert len(WindowTable([Source("user/esd", revision="v2")], "train", codec_sha256=None)) == 12
    assert asked == [("user/esd", "v2")]


def test_a_row_has_the_codes_that_were_written(esd):
    table = train(esd)
    for i in (0, 5, 11):
        codes = table.row(i)["codes"]
        assert (codes.dtype, codes.shape) == (np.int16, (2, 8, table.num_frames[i]))


def test_a_table_for_validation_alone_may_have_training_windows_only(esd, tmp_path):
    dialogues = write_random_codes(tmp_path / "dialogues", [RandomWindow(None)] * 3)
    config = DatasetConfig(manifest_path=str(esd), val_manifest_path=str(dialogues))
    assert set(held_out_table(config, "validation", None).corpora) == {"dialogues"}


def test_training_windows_are_never_used_for_validation(esd, tmp_path):
    copy = shutil.copytree(esd, tmp_path / "esd")
    shutil.rmtree(copy / "data" / "validation")
    restate_sizes(copy)
    config = DatasetConfig(manifest_path=str(copy), val_manifest_path=f"{copy}/.")
    assert len(held_out_table(config, "validation", None)) == 0


def test_with_tables_changes_every_path():
    config = DatasetConfig(
        sources=[Source("a", 2.0), Source("b")], val_manifest_path="c", replay=Replay("d", 0.5), emotions=["sad"]
    )
    changed = with_tables(config, str.upper)
    assert changed.sources == [Source("A", 2.0), Source("B")]
    assert (changed.val_manifest_path, changed.replay, changed.emotions) == ("C", Replay("D", 0.5), ["sad"])
    assert with_tables(DatasetConfig(manifest_path="a"), str.upper).manifest_path == "A"
    assert with_tables(DatasetConfig(), str.upper) == DatasetConfig()


def test_each_manifest_has_its_own_folder_of_codes():
    places = {
        manifest_table(*args) for args in [("a/t.jsonl", "r", 80), ("b/t.jsonl", "r", 80), ("a/t.jsonl", "r", 8)]
    }
    assert len(places) == 3
    assert all(str(place).startswith("r/codes/t-") for place in places)
    assert manifest_table("a/t.jsonl", "r", 80) == manifest_table("./a/t.jsonl", "r", 80.0)


def test_a_changed_manifest_has_another_folder(tmp_path):
    manifest = tmp_path / "t.jsonl"
    manifest.write_text("{}\n")
    before = manifest_table(str(manifest), "r", 80)
    assert manifest_table(str(manifest), "r", 80) == before
    manifest.write_text("[]\n")
    assert manifest_table(str(manifest), "r", 80) != before
