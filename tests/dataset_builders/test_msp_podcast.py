import dataclasses
import json
import shutil

import pytest

from hf_csm.corpora import make_builder
from hf_csm.data.schema import UTTERANCE_FEATURES
from hf_csm.errors import UserError
from hf_csm.prepare.utterance import Tally
from tests.doubles.msp_podcast import CROSSING, STEREO, UNKNOWN_WORD, plan_clips, text_grid, write_msp_podcast


HEADER = "FileName,EmoClass,EmoAct,EmoVal,EmoDom,SpkrID,Gender,Split_Set"
NUM_CLIPS = 16
REASON_NO_ROW = "audio without a row in the consensus table"
REASON_NO_AUDIO = "row of the consensus table without audio"


def row(number, split="Train", speaker="30", emotion="N", gender="Male", attributes="2.2,4.0,2.6"):
    return f"MSP-PODCAST_0001_{number:04d}.wav,{emotion},{attributes},{speaker},{gender},{split}"


def write(folder, *rows, header=HEADER, table="labels_consensus.csv", detailed=None, text=True):
    """Write tables as given, and for each row an empty wav and a transcript."""
    for name in ("Audios", "Labels", "Transcripts"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for line in rows:
        name = line.partition(",")[0]
        (folder / "Audios" / name).write_bytes(b"RIFF")
        if text:
            (folder / "Transcripts" / name.replace(".wav", ".txt")).write_text("Hello there.\n")
    (folder / "Labels" / table).write_text("\n".join([header, *rows]) + "\n")
    if detailed is not None:
        (folder / "Labels" / "labels_detailed.csv").write_text("\n".join(detailed) + "\n")
    return folder


def listing(raw, **options):
    shards, tally = make_builder("msp_podcast", raw, **options).shards()
    return {u.id.removeprefix("msp_podcast-"): u for shard in shards for u in shard.utterances}, tally


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    """A small corpus with every defect that its size allows. Do not write to it."""
    return write_msp_podcast(tmp_path_factory.mktemp("msp") / "raw", num_clips=NUM_CLIPS, duration_s=(1.5, 2.5))


@pytest.fixture(scope="module")
def rows(raw):
    builder = make_builder("msp_podcast", raw)
    tally = Tally()
    found = [row for shard in builder.shards()[0] for row in builder.rows(shard, tally)]
    return {row["id"].removeprefix("msp_podcast-"): row for row in found}, tally


@pytest.fixture(scope="module")
def clips():
    return {clip.name.removeprefix("MSP-PODCAST_"): clip for clip in plan_clips(NUM_CLIPS, 20, (1.5, 2.5))}


def test_the_example_of_the_corpus_reads_as_its_authors_say(tmp_path):
    write(
        tmp_path,
        "MSP-PODCAST_0001_0008.wav,N,2.2,4.0,2.6,30,Male,Test1",
        "MSP-PODCAST_0047_0295_0001.wav,U,3.777778,3.555556,3.777778,0039,Female,Development",
    )
    found, tally = listing(tmp_path)
    first, second = found["0001_0008"], found["0047_0295_0001"]
    assert (first.emotion_raw, first.emotion_perceived_raw, first.emotion_agreement) == ("N", "N", None)
    assert (first.arousal, first.valence, first.dominance) == pytest.approx((0.2, 0.5, 1.6 / 6))
    assert (first.speaker_id, first.gender, first.split) == ("msp_podcast-30", "male", "test")
    assert (second.speaker_id, second.gender, second.split) == ("msp_podcast-0039", "female", "validation")
    assert first.sentence_id is None and first.language == "en"
    assert not tally.counts


@pytest.mark.parametrize(
    ("release", "options"),
    [
        ("1.6", {}),
        ("1.8", {}),
        ("1.11", {"zipped_text": True}),
        ("2.0", {"nested": True}),
        ("2.0", {"nested": True, "zipped_text": True}),
    ],
)
def test_every_release_and_layout_gives_the_same_clips(tmp_path, raw, release, options):
    write_msp_podcast(tmp_path, num_clips=NUM_CLIPS, duration_s=(1.5, 2.5), release=release, **options)
    expected, expected_tally = listing(raw)
    found, tally = listing(tmp_path)

    def facts(utterances):
        return [dataclasses.replace(utterance, member=None, sidecars=()) for utterance in utterances.values()]

    assert facts(found) == facts(expected)
    assert tally.counts == expected_tally.counts
    complete = make_builder("msp_podcast", tmp_path).complete
    texts = [complete(utterance, Tally()).text for utterance in found.values()]
    assert texts == [complete(utterance, Tally()).text for utterance in expected.values()]
    assert [id_ for id_, text in zip(found, texts, strict=True) if text is None] == ["test3_0001"]


def test_codes_become_the_shared_emotions_and_no_agreement_becomes_none(rows):
    shared = ("angry", "sad", "happy", "surprised", "fearful", "disgust", "contempt", "neutral", "other")
    names = dict(zip("ASHUFDCNO", shared, strict=True))
    found = {row["emotion_raw"]: row for row in rows[0].values()}
    for code, row in found.items():
        for column in ("emotion", "emotion_perceived"):
            index = row[column]
            assert (None if index is None else UTTERANCE_FEATURES[column].int2str(index)) == names.get(code)
    assert found.keys() > {"X", "O", None}


def test_words_have_the_times_of_the_text_grid_and_the_spelling_of_the_transcript(rows, clips):
    sources = {id_: row["alignment_source"] for id_, row in rows[0].items() if id_ in clips}
    assert set(sources.values()) == {0}, "corpus"
    for id_ in sources:
        row = rows[0][id_]
        assert " ".join(word["word"] for word in row["words"]) == row["text"] == clips[id_].text
        assert 0 < row["words"][0]["start_s"] < row["words"][-1]["end_s"] < row["duration_s"]
    unknown = list(clips)[UNKNOWN_WORD]
    assert rows[0][unknown]["words"][0]["word"] == clips[unknown].text.split()[0]


def test_the_defects_of_the_audio_are_repaired_and_counted(rows, clips):
    odd = list(clips)[STEREO]
    assert rows[0][odd]["text"] == clips[odd].text
    assert rows[1].counts == {("repaired", "2 channels averaged to one"): 1}
    assert all(row["audio"]["bytes"][:4] == b"fLaC" for row in rows[0].values())


def test_the_defects_of_the_tables_are_handled_and_counted(raw, clips):
    found, tally = listing(raw)
    assert tally.counts == {
        ("dropped", "clip of an earlier release"): 1,
        ("dropped", "its speaker is also in test"): 1,
        ("dropped", "unknown speaker, possibly of another split"): 2,
        ("noted", "Test3: no label and no speaker"): 1,
        ("noted", "two ratings of a rater: the last is used"): 1,
        ("noted", "a rating with an unknown emotion"): 1,
    }
    assert list(clips)[CROSSING] not in found
    test3 = found["test3_0001"]
    assert (test3.split, test3.speaker_id, test3.gender) == ("test", "msp_podcast-test3-0001", None)
    assert test3.emotion_raw is test3.arousal is test3.text is None


def test_a_few_missing_files_are_dropped_and_counted(tmp_path):
    write(tmp_path, *(row(number) for number in range(300)))
    (tmp_path / "Audios" / "MSP-PODCAST_0001_0007.wav").unlink()
    (tmp_path / "Transcripts" / "MSP-PODCAST_0001_0008.txt").unlink()
    (tmp_path / "Audios" / "MSP-PODCAST_0002_0001.wav").write_bytes(b"RIFF")
    (tmp_path / "Audios" / "copy").mkdir()
    shutil.copy(tmp_path / "Audios" / "MSP-PODCAST_0001_0001.wav", tmp_path / "Audios" / "copy")
    found, tally = listing(tmp_path)
    assert tally.rows() == [
        ["dropped", REASON_NO_ROW, 1, "MSP-PODCAST_0002_0001.wav"],
        ["dropped", REASON_NO_AUDIO, 1, "MSP-PODCAST_0001_0007.wav"],
        ["dropped", "second copy of a file", 1, "MSP-PODCAST_0001_0001.wav"],
        ["noted", "no transcript", 1, "MSP-PODCAST_0001_0008.wav"],
    ]
    assert len(found) == 299 and found["0001_0008"].sidecars == ()


@pytest.mark.parametrize(
    ("folder", "suffix", "reason"),
    [("Audios", "wav", REASON_NO_AUDIO), ("Labels", "csv", REASON_NO_ROW), ("Transcripts", "txt", "no transcript")],
)
def test_many_missing_files_are_an_error_that_names_five(tmp_path, folder, suffix, reason):
    lines = [row(number) for number in range(100)]
    write(tmp_path, *lines)
    if folder == "Labels":
        (tmp_path / "Labels" / "labels_consensus.csv").write_text("\n".join([HEADER, *lines[7:]]) + "\n")
    else:
        for number in range(7):
            (tmp_path / folder / f"MSP-PODCAST_0001_{number:04d}.{suffix}").unlink()
    with pytest.raises(UserError, match=rf"7 of .* {reason}: .*_0000.wav, .*_0004.wav and 2 more"):
        listing(tmp_path)


def test_speakers_of_two_partitions_stay_in_test_before_validation_before_train(tmp_path):
    write(
        tmp_path,
        *(row(1, "Train", "1"), row(2, "Development", "1"), row(3, "Test2", "1")),
        *(row(4, "Train", "2"), row(5, "Development", "2")),
        *(row(6, "Train", "3"), row(7, "Test1", "4"), row(8, "Test2", "4")),
    )
    found, tally = listing(tmp_path)
    assert {id_: u.split for id_, u in found.items()} == {
        "0001_0003": "test",
        "0001_0005": "validation",
        "0001_0006": "train",
        "0001_0007": "test",
        "0001_0008": "test",
    }
    assert tally.counts == {
        ("dropped", "its speaker is also in test"): 2,
        ("dropped", "its speaker is also in validation"): 1,
    }


def test_only_the_selected_test_sets_are_read_and_speakers_of_the_others_do_not_train(tmp_path):
    write(tmp_path, row(1, "Train", "1"), row(2, "Train", "2"), row(3, "Test1", "3"), row(4, "Test2", "2"))
    (tmp_path / "Audios" / "MSP-PODCAST_test3_0001.wav").write_bytes(b"RIFF")
    found, tally = listing(tmp_path, test_sets=("Test1",))
    assert sorted(found) == ["0001_0001", "0001_0003"]
    assert tally.counts == {
        ("dropped", "its speaker is also in test"): 1,
        ("dropped", "Test2 was not selected"): 1,
        ("dropped", "Test3 was not selected"): 1,
    }
    assert sorted(listing(tmp_path, test_sets="Test3")[0]) == ["0001_0001", "test3_0001"]
    with pytest.raises(UserError, match="test_sets"):
        listing(tmp_path, test_sets=("Test4",))


def test_clips_of_unknown_speakers_are_dropped_or_kept_each_as_its_own(tmp_path):
    write(tmp_path, row(1), row(2, speaker="Unknown", gender="Unknown"), row(3, "Test1", "Unknown"))
    assert sorted(listing(tmp_path)[0]) == ["0001_0001"]
    found, tally = listing(tmp_path, keep_unknown_speakers=True)
    assert [u.speaker_id for u in found.values()] == [
        "msp_podcast-30",
        "msp_podcast-unknown-0001_0002",
        "msp_podcast-unknown-0001_0003",
    ]
    assert found["0001_0002"].gender is None
    assert tally.counts == {("noted", "unknown speaker, kept, possibly of another split"): 2}


RATINGS = [
    ("WORKER00000001", "Other-confused; or, amused"),
    ("WORKER00000018", "Neutral"),
    ("WORKER00000021", "Sad"),
    ("WORKER00000021", "Neutral"),
    ("WORKER00000044", "Surprise"),
    ("WORKER00000045", "NaN"),
]


@pytest.mark.parametrize("schema", ["EmoDetail", "WorkerID", "Workers"])
def test_agreement_is_the_share_of_raters_who_chose_the_label(tmp_path, schema):
    def lines(number):
        name = f"MSP-PODCAST_0001_{number:04d}.wav"
        if schema == "EmoDetail":
            tail = "Concerned,Confused; A:3.000000; V:3.000000; D:4.000000;"
            return [f'{name},"{rater}; {emotion}; {tail}"' for rater, emotion in RATINGS]
        return [f'4.0,{rater},"{emotion}",,NaN,3,3,{name}' for rater, emotion in RATINGS]

    columns = f"EmoDom,{schema},EmoClass_Major,EmoClass_Second,EmoAct,EmoVal,Extra,FileName"
    detailed = ["FileName,EmoDetail" if schema == "EmoDetail" else columns, *lines(1), *lines(2), *lines(3)]
    write(tmp_path, row(1), row(2, emotion="O"), row(3, emotion="X"), row(4), detailed=detailed)
    found, tally = listing(tmp_path)
    agreements = [found[f"0001_000{number}"].emotion_agreement for number in (1, 2, 3, 4)]
    assert agreements == [0.5, 0.25, None, None]
    assert tally.counts == {
        ("noted", "two ratings of a rater: the last is used"): 3,
        ("noted", "a rating with an unknown emotion"): 3,
    }


def test_columns_go_by_name_and_missing_values_are_none(tmp_path):
    header = "Split_Set,EmoDom,EmoVal,EmoAct,Gender,SpkrID,More,EmoClass,FileName"
    line = "Train,7,NaN,1,,12,?,H,MSP-PODCAST_0001_0001.wav"
    write(tmp_path, row(1))
    (tmp_path / "Labels" / "labels_consensus.csv").write_bytes(b"\xef\xbb\xbf" + f"{header}\r\n{line}\r\n".encode())
    (utterance,) = listing(tmp_path)[0].values()
    assert (utterance.arousal, utterance.valence, utterance.dominance) == (0.0, None, 1.0)
    assert (utterance.speaker_id, utterance.gender, utterance.emotion_raw) == ("msp_podcast-12", None, "H")


def test_the_json_table_is_read_where_there_is_no_csv(tmp_path):
    write(tmp_path, row(1))
    (tmp_path / "Labels" / "labels_consensus.csv").unlink()
    fields = {"EmoClass": "H", "EmoAct": 4, "EmoVal": "4.0", "EmoDom": 4.0, "SpkrID": 30, "Gender": "Male"}
    table = {"MSP-PODCAST_0001_0001.wav": {**fields, "Split_Set": "Validation"}}
    (tmp_path / "Labels" / "labels_consensus.json").write_text(json.dumps(table))
    (utterance,) = listing(tmp_path)[0].values()
    assert (utterance.emotion_raw, utterance.speaker_id, utterance.valence) == ("H", "msp_podcast-30", 0.5)


def test_earlier_releases_beside_this_one_count_for_nothing(tmp_path):
    write(tmp_path, row(1))
    write(tmp_path / "Previous_releases_information" / "previous_releases_info" / "v1.0", row(1, emotion="A"), row(2))
    found, tally = listing(tmp_path)
    assert [(id_, u.emotion_raw, len(u.sidecars)) for id_, u in found.items()] == [("0001_0001", "N", 1)]
    assert tally.counts == {("dropped", "clip of an earlier release"): 2}


def test_copies_of_one_table_are_one_and_two_tables_are_mixed_releases(tmp_path):
    write(tmp_path, row(1))
    write(tmp_path / "again", row(1), table="labels_concensus.csv")
    assert len(listing(tmp_path)[0]) == 1
    write(tmp_path / "again", row(1, emotion="H"), table="labels_concensus.csv")
    with pytest.raises(UserError, match=r"labels_consensus\.csv.*labels_concensus\.csv differ"):
        listing(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"emotion": "Q"}, r"_0002\.wav: unknown emotion label 'Q'"),
        ({"split": "Test9"}, r"labels_consensus\.csv: row 3: unknown Split_Set 'Test9'"),
        ({"attributes": "0.5,4,4"}, r"row 3: EmoAct is '0\.5'"),
        ({"attributes": "4,7.5,4"}, r"row 3: EmoVal is '7\.5'"),
        ({"attributes": "4,4,high"}, r"row 3: EmoDom is 'high'"),
        ({"attributes": "4,4"}, r"cannot be read after row 2 \(7 cells under 8 columns\)"),
        ({"speaker": '"30'}, r"cannot be read after row 2"),
    ],
)
def test_a_row_that_makes_no_sense_is_an_error_that_names_it(tmp_path, changes, message):
    write(tmp_path, row(1), row(2, **changes))
    with pytest.raises(UserError, match=message) as error:
        listing(tmp_path)
    assert len(str(error.value).splitlines()) == 2


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda raw: (raw / "Labels/labels_consensus.csv").unlink(), r"no labels_consensus\.csv"),
        (
            lambda raw: (raw / "Labels/labels_consensus.csv").write_text("FileName,EmoClass,Split_Set\na,N,Train\n"),
            r"row 2: no column EmoAct, EmoDom, EmoVal, Gender, SpkrID",
        ),
        (lambda raw: (raw / "Labels/labels_consensus.csv").write_bytes(b"\xff\xfeF\0"), "not UTF-8 text"),
        (
            lambda raw: (raw / "Labels/labels_consensus.csv").write_text(
                "\n".join([HEADER, row(1), row(1), row(1, emotion="H")])
            ),
            r"row 4: a second, different row for MSP-PODCAST_0001_0001\.wav",
        ),
        (lambda raw: (raw / "Labels/labels_detailed.csv").write_text("FileName,Rating\na,b\n"), "no column EmoDetail"),
        (lambda raw: (raw / "Labels/labels_detailed.csv").write_text("FileName,EmoDetail\na,b\n"), "is not a rating"),
        (lambda raw: shutil.rmtree(raw / "Transcripts"), "no transcripts; releases before 1.11"),
        (
            lambda raw: [shutil.rmtree(raw / "Audios"), (raw / "Audios.tar.gz").write_bytes(b"x")],
            r"Audios\.tar\.gz: the clips are still packed",
        ),
        (lambda raw: shutil.rmtree(raw / "Audios"), "no MSP-Podcast clips in there"),
    ],
)
def test_an_incomplete_or_damaged_corpus_is_an_error(tmp_path, break_it, message):
    break_it(write(tmp_path, row(1)))
    with pytest.raises(UserError, match=message) as error:
        listing(tmp_path)
    assert len(str(error.value).splitlines()) == 2


def test_a_release_without_transcripts_is_taken_if_that_is_asked_for(tmp_path):
    write(tmp_path, row(1), row(2), text=False)
    found, tally = listing(tmp_path, allow_missing_text=True)
    assert [u.text for u in found.values()] == [None, None]
    assert tally.counts == {("noted", "no transcript"): 2}


def timed(*words):
    times = [{"word": word, "start_s": 0.1 + 0.5 * i, "end_s": 0.6 + 0.5 * i} for i, word in enumerate(words)]
    return text_grid(times)


@pytest.mark.parametrize(
    ("transcript", "grid", "text", "words", "noted"),
    [
        ("It's  well-known!\n", timed("it's", "well-known"), "It's well-known!", "It's|well-known!", []),
        ("So it is.", timed("so", "<unk>", "is"), "So it is.", "So|it|is.", []),
        ("So it is.", timed("so", "it", "was"), "So it is.", None, ["transcript and TextGrid differ"]),
        ("So it is.", None, "So it is.", None, []),
        (None, timed("so", "<unk>", "is"), "so is", "so|is", []),
        (" \n", timed("so"), "so", "so", []),
        (" \n", timed("<unk>"), None, None, ["no transcript"]),
        ("...", None, None, None, ["no transcript"]),
    ],
)
def test_text_and_words_combine_transcript_and_text_grid(tmp_path, transcript, grid, text, words, noted):
    write(tmp_path, row(1), row(2), text=False)
    for content, folder, suffix in ((transcript, "Transcripts", "txt"), (grid, "ForceAligned", "TextGrid")):
        (tmp_path / folder).mkdir(exist_ok=True)
        if content is not None:
            (tmp_path / folder / f"MSP-PODCAST_0001_0001.{suffix}").write_text(content)
    found, _ = listing(tmp_path, allow_missing_text=True)
    done = make_builder("msp_podcast", tmp_path).complete(found["0001_0001"], tally := Tally())
    assert (done.text, [reason for _, reason in tally.counts]) == (text, noted)
    assert (None if done.words is None else "|".join(word for word, _, _ in done.words)) == words


def test_a_transcript_in_another_encoding_is_an_error_that_names_it(tmp_path):
    write(tmp_path, row(1))
    (tmp_path / "Transcripts" / "MSP-PODCAST_0001_0001.txt").write_bytes(b"caf\xe9")
    (utterance,) = listing(tmp_path)[0].values()
    with pytest.raises(UserError, match=r"MSP-PODCAST_0001_0001\.txt: not UTF-8"):
        make_builder("msp_podcast", tmp_path).complete(utterance, Tally())


def test_without_a_readable_source_the_error_names_a_remedy():
    with pytest.raises(UserError, match=r"cannot be downloaded.*\n.*lab-msp\.com"):
        listing(None)
    with pytest.raises(UserError, match=r"raw/Audios\.tar\.gz.* packed"):
        listing("raw/Audios.tar.gz")
