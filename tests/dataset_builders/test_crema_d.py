import shutil
import zipfile
from collections import Counter

import numpy as np
import pytest

import hf_csm
from dataset_builders.crema_d import FILE_NAME, HELD_OUT, SENTENCES
from hf_csm.corpora import make_builder
from hf_csm.data.schema import UTTERANCE_FEATURES
from hf_csm.errors import UserError
from hf_csm.prepare.run import prepare
from hf_csm.prepare.utterance import Tally
from tests.doubles.crema_d import (
    clip_bytes,
    clip_names,
    demographics_csv,
    lfs_pointer,
    summary_csv,
    vote_counts,
    votes_csv,
    write_crema_d,
)


SMALL = {"sentences": ("DFA",), "emotions": ("NEU", "ANG")}


def listing(raw):
    shards, tally = make_builder("crema_d", raw).shards()
    return {u.id.removeprefix("crema_d-"): u for shard in shards for u in shard.utterances}, tally


def touch(folder, *names, **tables):
    """Make empty files, and tables in `processedResults/`."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    for name, content in tables.items():
        (folder / "processedResults").mkdir(exist_ok=True)
        (folder / "processedResults" / f"{name}.csv").write_bytes(content)
    return folder


@pytest.fixture(scope="module")
def whole_grid(tmp_path_factory):
    """Return the listing of every name of the corpus, with its votes, from a zip of empty files."""
    path = tmp_path_factory.mktemp("grid") / "CREMA-D-master.zip"
    names = list(clip_names())
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            archive.writestr(f"CREMA-D-master/AudioWAV/{name}.wav", b"")
        archive.writestr("CREMA-D-master/processedResults/summaryTable.csv", summary_csv(names))
        archive.writestr("CREMA-D-master/processedResults/tabulatedVotes.csv", votes_csv(names))
    return listing(path)


@pytest.fixture(scope="module")
def defective(tmp_path_factory):
    """Return the ids of the rows, and all that was counted, of a corpus with every defect."""
    raw = tmp_path_factory.mktemp("defects")
    sentences = ("TIE", "IWW", "MTI", "ITH", "WSI")
    write_crema_d(raw, actors=(1006, 1013, 1017, 1040, 1076), sentences=sentences)
    (raw / "AudioWAV/1013_TIE_FEA_XX.wav").unlink()
    (raw / "AudioWAV/1013_DFA_FEA_XX.wav").write_bytes(clip_bytes("1013_DFA_FEA_XX"))
    builder = make_builder("crema_d", raw)
    shards, tally = builder.shards()
    ids = [row["id"] for shard in shards for row in builder.rows(shard, tally)]
    return ids, tally


@pytest.mark.parametrize(
    ("action", "reason", "count", "example"),
    [
        ("dropped", "digital silence", 1, "1076_MTI_SAD_XX.wav"),
        ("dropped", "one recording under two labels", 6, "1006_TIE_HAP_XX.wav"),
        ("repaired", "named with one X instead of two, as before October 2022", 1, "1040_ITH_SAD_X.wav"),
        ("dropped", "in summaryTable.csv without a wav", 1, "1013_TIE_FEA_XX"),
        ("noted", "no entry in summaryTable.csv", 1, "1013_DFA_FEA_XX.wav"),
    ],
)
def test_every_known_defect_is_handled_and_counted(defective, action, reason, count, example):
    ids, tally = defective
    assert tally.counts[action, reason] == count
    assert tally.examples[action, reason] == example
    name = example.removesuffix(".wav")
    is_kept = {"dropped": False, "noted": True, "repaired": True}[action]
    assert (f"crema_d-{name.replace('_X', '_XX') if name.endswith('_X') else name}" in ids) == is_kept


def test_nothing_else_is_lost_or_counted(defective):
    ids, tally = defective
    assert len(tally.counts) == 5
    assert len(ids) == 5 * 5 * 6 + 1 - 1 - 6 - 1


def test_a_row_has_the_acted_and_the_perceived_emotion(tmp_path):
    raw = write_crema_d(tmp_path, actors=(1001,), sentences=("IEO",))
    rows = {row["id"][8:]: row for row in hf_csm.load_corpus("crema_d", raw, split="train")}
    names = UTTERANCE_FEATURES
    assert len(rows) == 16
    row = rows["1001_IEO_NEU_XX"]
    assert (row["emotion_raw"], names["emotion"].int2str(row["emotion"])) == ("NEU", "neutral")
    assert names["emotion_perceived"].int2str(row["emotion_perceived"]) == "neutral"
    assert row["emotion_agreement"] == pytest.approx(10 / 11)
    assert row["intensity"] is row["sentence_id"] is row["arousal"] is None
    assert (row["text"], row["speaker_id"], row["gender"]) == ("It's eleven o'clock", "crema_d-1001", "male")
    assert (row["corpus"], row["language"], row["license"]) == ("crema_d", "en", "odbl")
    assert names["emotion"].int2str(rows["1001_IEO_FEA_HI"]["emotion"]) == "fearful"


def test_a_tie_among_the_raters_is_no_agreement_but_has_its_share(tmp_path):
    raw = write_crema_d(tmp_path, actors=(1001,), sentences=("IEO",))
    tied = listing(raw)[0]["1001_IEO_ANG_MD"]
    assert tied.emotion_perceived_raw is None
    assert tied.emotion_agreement == pytest.approx(5 / 12)


def test_votes_and_shares_are_those_of_the_voice_alone(whole_grid):
    utterances, _ = whole_grid
    for name in list(utterances)[::50]:
        counts = vote_counts(name)
        most = max(counts.values())
        winners = [letter for letter in counts if counts[letter] == most]
        assert utterances[name].emotion_perceived_raw == (winners[0] if len(winners) == 1 else None)
        assert utterances[name].emotion_agreement == pytest.approx(most / sum(counts.values()))


def test_every_name_of_the_corpus_is_known_and_counted_as_published(whole_grid):
    utterances, tally = whole_grid
    assert tally.counts == {("dropped", "one recording under two labels"): 6}
    # 7,442 clips, 5,146 / 738 / 1,558, less the six
    assert Counter(u.split for u in utterances.values()) == {"train": 5_142, "validation": 738, "test": 1_556}
    by_emotion = Counter(u.emotion_raw for u in utterances.values())
    assert by_emotion == {**dict.fromkeys(("ANG", "DIS", "FEA", "HAP", "SAD"), 1_270), "NEU": 1_086}
    by_level = Counter(u.intensity for u in utterances.values())
    assert by_level == {None: 6_071, "low": 455, "medium": 455, "high": 455}
    assert Counter(u.gender for u in utterances.values()) == {"male": 3_928, "female": 3_508}
    by_text = Counter(u.text for u in utterances.values())
    assert (by_text["It's eleven o'clock"], by_text["That is exactly what happened"]) == (1_456, 543)
    assert len({u.speaker_id for u in utterances.values()}) == 91
    assert {u.language for u in utterances.values()} == {"en"}


def test_clips_with_a_damaged_mp3_or_video_are_kept(whole_grid):
    assert {"1076_MTI_NEU_XX", "1064_TIE_SAD_XX", "1064_IEO_DIS_MD"} <= whole_grid[0].keys()


def test_the_splits_are_those_of_tensorflow_datasets():
    actors = [str(actor) for actor in range(1001, 1092)]
    np.random.RandomState(0).shuffle(actors)
    assert HELD_OUT["validation"].split() == sorted(actors[63:72])
    assert HELD_OUT["test"].split() == sorted(actors[72:])


@pytest.mark.parametrize("layout", ["clone", "mirror", "flat", "bare", "audb"])
def test_every_layout_gives_the_same_clips(tmp_path, layout):
    raw = write_crema_d(tmp_path, actors=(1002, 1015, 1047), layout=layout, **SMALL)
    utterances, tally = listing(raw)
    assert sorted(utterances) == sorted(clip_names((1002, 1015, 1047), **SMALL))
    assert not tally.counts
    assert {u.speaker_id[-4:]: (u.gender, u.split) for u in utterances.values()} == {
        "1002": ("female", "train"),
        "1015": ("male", "validation"),
        "1047": ("female", "test"),
    }
    has_votes = layout == "clone"
    assert all((u.emotion_agreement is not None) == has_votes for u in utterances.values())
    assert all(has_votes or u.emotion_perceived_raw is None for u in utterances.values())


def test_the_demographics_table_decides_on_gender(tmp_path):
    table = (
        demographics_csv().replace(b'1001,31,"Male"', b'1001,31,"Female"').replace(b'1002,32,"Female"', b'1002,32,"?"')
    )
    touch(tmp_path, "1001_DFA_NEU_XX.wav", "1002_DFA_NEU_XX.wav", "1003_DFA_NEU_XX.wav")
    (tmp_path / "VideoDemographics.csv").write_bytes(table)
    assert [u.gender for u in listing(tmp_path)[0].values()] == ["female", None, "female"]


def test_both_names_of_the_misnamed_clip_are_one_clip(tmp_path):
    touch(tmp_path, "1040_ITH_SAD_X.wav", "1040_ITH_SAD_XX.wav", summaryTable=summary_csv(["1040_ITH_SAD_XX"]))
    utterances, tally = listing(tmp_path)
    assert list(utterances) == ["1040_ITH_SAD_XX"]
    assert sorted((action, count) for (action, _), count in tally.counts.items()) == [("dropped", 1), ("repaired", 1)]


@pytest.mark.parametrize("spelling", [b"FileName", b"fileName", b"FILENAME"])
def test_the_case_of_column_names_does_not_matter(tmp_path, spelling):
    name = "1001_IEO_NEU_XX"
    tables = {"summaryTable": summary_csv([name]), "tabulatedVotes": votes_csv([name])}
    tables = {k: table.replace(b"FileName", spelling).replace(b"fileName", spelling) for k, table in tables.items()}
    touch(tmp_path, f"{name}.wav", **tables)
    (utterance,) = listing(tmp_path)[0].values()
    assert (utterance.emotion_perceived_raw, utterance.emotion_agreement) == ("N", pytest.approx(10 / 11))


def test_git_lfs_pointers_are_named_counted_and_explained(tmp_path):
    raw = write_crema_d(tmp_path, actors=(1001, 1002), **SMALL)
    for name in ("1001_DFA_NEU_XX", "1002_DFA_ANG_XX"):
        path = raw / f"AudioWAV/{name}.wav"
        path.write_bytes(lfs_pointer(path.read_bytes()))
    with pytest.raises(UserError, match=r"1001_DFA_NEU_XX\.wav: a Git LFS pointer.* 2 of 4 wavs") as raised:
        listing(raw)
    assert "git lfs pull" in raised.value.remedy and "gitlab.com" in raised.value.remedy


NAME = "1001_IEO_NEU_XX"


@pytest.mark.parametrize(
    ("table", "content", "problem"),
    [
        ("summaryTable", summary_csv([NAME]).decode().encode("utf-16"), r"summaryTable\.csv: not UTF-8"),
        ("summaryTable", b'"","FileName","VoiceVote"\n"1","caf\xe9","N"\n', "not UTF-8"),
        ("summaryTable", b'"","FileName","VoiceVote"\n"1","' + NAME.encode(), "cannot be read from its first row"),
        ("summaryTable", b"", "no rows"),
        (
            "summaryTable",
            b'"","FileName","FaceVote"\n"1","x","N"\n',
            "no column 'VoiceVote'; .* FaceVote",
        ),
        ("summaryTable", b'"","FileName","VoiceVote"\n"1","1001_IEO_NEU_XX"\n', "2 cells under 3 columns"),
        ("summaryTable", summary_csv([NAME]).replace(b'"N"', b'"Q"'), f"{NAME} has the unknown vote 'Q'"),
        ("summaryTable", summary_csv([NAME]).replace(b'"N"', b'"N:Q"'), f"{NAME} has the unknown vote 'N:Q'"),
        (
            "summaryTable",
            summary_csv([NAME]) + summary_csv([NAME]).split(b"\n")[1].replace(b'"N"', b'"A"'),
            f"two votes on {NAME}, N and A",
        ),
        ("tabulatedVotes", b'"","fileName"\n"1","x"\n', "no column 'agreement'"),
        (
            "tabulatedVotes",
            b'"","fileName","agreement"\n"100001","x","NA"\n',
            r"tabulatedVotes\.csv: could not convert",
        ),
    ],
)
def test_a_table_that_cannot_be_trusted_is_an_error_that_names_it(tmp_path, table, content, problem):
    touch(tmp_path, f"{NAME}.wav", **{"summaryTable": summary_csv([NAME]), table: content})
    with pytest.raises(UserError, match=problem) as raised:
        listing(tmp_path)
    assert "\n" not in raised.value.problem + raised.value.remedy
    assert table in raised.value.problem and "again" in raised.value.remedy


def test_a_table_of_other_clips_is_an_error_with_the_first_names(tmp_path):
    names = list(clip_names((1001,)))
    touch(tmp_path, *(f"{name}.wav" for name in names[:-10]), summaryTable=summary_csv(names))
    with pytest.raises(UserError, match=r"10 of 82 .*summaryTable\.csv.*: 1001_.* 5 more"):
        listing(tmp_path)


@pytest.mark.parametrize("name", ["1092_DFA_NEU_XX", "1001_ABC_NEU_XX", "1001_DFA_CAL_XX", "1001_DFA_NEU", "hello"])
def test_a_wav_named_like_nothing_is_an_error_that_names_it(tmp_path, name):
    with pytest.raises(UserError, match=rf"{name}\.wav: not a file name of CREMA-D"):
        listing(touch(tmp_path, f"{name}.wav", "1001_DFA_NEU_XX.wav"))


@pytest.mark.parametrize(
    ("name", "title"),
    [("03-01-06-01-02-01-12.wav", "RAVDESS"), ("0011_000351.wav", "ESD")],
)
def test_the_folder_of_another_corpus_is_recognised(tmp_path, name, title):
    with pytest.raises(UserError, match=rf"no CREMA-D clips in there. It looks like {title} \(1 "):
        listing(touch(tmp_path, f"some/{name}", "README.md"))


def test_mp3s_alone_are_not_the_corpus(tmp_path):
    with pytest.raises(UserError, match="no CREMA-D clips"):
        listing(touch(tmp_path, "AudioMP3/1001_DFA_ANG_XX.mp3", "VideoFlash/1001_DFA_ANG_XX.flv"))


def test_a_missing_source_is_an_error_with_the_address_of_the_audio():
    with pytest.raises(UserError, match="github.com/CheyneyComputerScience/CREMA-D.*git lfs pull.*--raw"):
        listing(None)


def test_file_names_are_four_known_parts():
    assert FILE_NAME.fullmatch("1091_WSI_DIS_XX.wav") and FILE_NAME.fullmatch("1040_ITH_SAD_X.WAV")
    assert not FILE_NAME.fullmatch("1000_WSI_DIS_XX.wav")
    assert not FILE_NAME.fullmatch("1001_WSI_DIS_XX.mp3")
    assert len(SENTENCES) == 12


def test_a_miniature_is_prepared_whole(tmp_path):
    raw = write_crema_d(tmp_path / "raw", actors=(1001, 1010, 1015), **SMALL)
    shutil.rmtree(raw / "AudioMP3")
    report = prepare("crema_d", raw, tmp_path / "out", num_workers=1, progress=False)
    assert [(row.split, row.emotion, row.num_clips) for row in report.rows] == [
        (split, emotion, 1) for split in ("train", "validation", "test") for emotion in ("neutral", "angry")
    ]
    card = (tmp_path / "out/README.md").read_text()
    assert "Open Database License" in card and "license: odbl" in card


def test_the_longer_header_of_some_wavs_costs_no_sample(tmp_path):
    longer = next(name for name in clip_names((1003,)) if clip_bytes(name)[16] == 18)
    (tmp_path / f"{longer}.wav").write_bytes(clip_bytes(longer))
    builder = make_builder("crema_d", tmp_path)
    ((row,),) = (list(builder.rows(shard, Tally())) for shard in builder.shards()[0])
    assert row["duration_s"] == pytest.approx((len(clip_bytes(longer)) - 46) / 2 / 16_000, abs=1e-4)
