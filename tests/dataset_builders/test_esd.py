import shutil
import zipfile
from collections import Counter, defaultdict

import pytest

import hf_csm
from dataset_builders.esd import FILE_NAME
from hf_csm.corpora import make_builder
from hf_csm.data.schema import UTTERANCE_FEATURES
from hf_csm.errors import UserError
from hf_csm.prepare.run import prepare
from tests.doubles.esd import (
    OLD_ENCODINGS,
    SHORTENED,
    SPACED,
    encode_transcript,
    folder_of,
    sentence,
    transcript_rows,
    write_esd,
)


EDGES = (1, 20, 21, 50, 51, 350, 351)
"""Numbers around the ends of partitions and emotions."""
HELD_OUT = "speaker and sentence are of two splits"


def listing(raw, **options):
    shards, tally = make_builder("esd", raw, **options).shards()
    return {u.id.removeprefix("esd-"): u for shard in shards for u in shard.utterances}, tally


def write_silent(folder, speaker, numbers, transcript, layout="flat"):
    """Write empty clips of a speaker and a transcript of the given bytes."""
    home = folder / f"{speaker:04d}"
    for number in numbers:
        path = home / folder_of(number, layout) / f"{speaker:04d}_{number:06d}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    (home / f"{speaker:04d}.txt").write_bytes(transcript)
    return folder


def rows_of(speaker, numbers, **options):
    return "\n".join(transcript_rows(speaker, numbers, **options))


@pytest.fixture(scope="module")
def whole_grid(tmp_path_factory):
    """Return the listing of every name of the old release, from a zip of empty files and whole transcripts."""
    path = tmp_path_factory.mktemp("grid") / "Emotional Speech Dataset (ESD).zip"
    with zipfile.ZipFile(path, "w") as archive:
        for speaker, encoding in OLD_ENCODINGS.items():
            home = f"Emotional Speech Dataset (ESD)/{speaker:04d}"
            archive.writestr(f"{home}/.DS_Store", b"\0\1Bud1")
            archive.writestr(
                f"{home}/{speaker:04d}.txt", encode_transcript(rows_of(speaker, range(1, 1_751)), encoding)
            )
            for number in range(1, 1_751):
                name = f"{speaker:04d}_{number:06d}.wav"
                archive.writestr(f"{home}/{folder_of(number, 'partitioned')}/{name}", b"")
    return listing(path)


def test_every_clip_of_the_corpus_is_known_and_counted(whole_grid):
    utterances, tally = whole_grid
    assert tally.counts == {("dropped", HELD_OUT): 35_000 - 18_000 - 400 - 600}
    by_cell = Counter((u.split, u.emotion_raw) for u in utterances.values())
    for emotion in ("Neutral", "Angry", "Happy", "Sad", "Surprise"):
        assert [by_cell[split, emotion] for split in ("train", "validation", "test")] == [3_600, 80, 120]
    assert Counter((u.split, u.language) for u in utterances.values()) == {
        **{("train", "en"): 9_000, ("validation", "en"): 200, ("test", "en"): 300},
        **{("train", "zh"): 9_000, ("validation", "zh"): 200, ("test", "zh"): 300},
    }


def test_speakers_and_sentences_are_in_one_split_each(whole_grid):
    splits = defaultdict(set)
    for u in whole_grid[0].values():
        splits[u.speaker_id].add(u.split)
        splits[u.sentence_id].add(u.split)
    assert len(splits) == 20 + 2 * 350
    assert all(len(found) == 1 for found in splits.values())


def test_the_held_out_speakers_are_women_and_men_of_both_languages(whole_grid):
    speakers = {(u.split, u.language, u.gender, u.speaker_id[4:]) for u in whole_grid[0].values()}
    assert sorted(speaker for speaker in speakers if speaker[0] != "train") == [
        ("test", "en", "female", "0018"),
        ("test", "en", "male", "0020"),
        ("test", "zh", "female", "0009"),
        ("test", "zh", "male", "0010"),
        ("validation", "en", "female", "0017"),
        ("validation", "en", "male", "0014"),
        ("validation", "zh", "female", "0007"),
        ("validation", "zh", "male", "0008"),
    ]
    men = {speaker for _, _, gender, speaker in speakers if gender == "male"}
    assert men == {f"{speaker:04d}" for speaker in (4, 5, 6, 8, 10, 11, 12, 13, 14, 20)}


@pytest.mark.parametrize("name", sorted((*SPACED, "0001_000051", "0003_000401", "0016_000699")))
def test_the_text_of_a_row_is_read_with_any_separator(whole_grid, name):
    speaker, number = int(name[:4]), int(name[5:])
    expected = sentence(speaker, number)
    if speaker == 16:
        expected = expected.replace("'", "’")
    if name == SHORTENED:
        expected = expected.partition(" ")[2]
    assert whole_grid[0][name].text == expected


def test_a_sentence_is_its_number_even_if_its_text_differs_between_emotions(whole_grid):
    shortened, whole = (whole_grid[0][name] for name in (SHORTENED, "0015_000131"))
    assert shortened.text != whole.text
    assert shortened.sentence_id == whole.sentence_id == "esd-en-131"


@pytest.mark.parametrize("layout", ["partitioned", "flat"])
def test_both_releases_give_the_same_clips(tmp_path, layout):
    raw = write_esd(tmp_path, speakers=(1, 7, 9, 12), numbers=EDGES, layout=layout)
    utterances, tally = listing(raw)
    assert {name: (u.emotion_raw, u.split, u.sentence_id) for name, u in utterances.items()} == {
        "0001_000051": ("Neutral", "train", "esd-zh-051"),
        "0001_000350": ("Neutral", "train", "esd-zh-350"),
        "0007_000001": ("Neutral", "validation", "esd-zh-001"),
        "0007_000020": ("Neutral", "validation", "esd-zh-020"),
        "0007_000351": ("Angry", "validation", "esd-zh-001"),
        "0009_000021": ("Neutral", "test", "esd-zh-021"),
        "0009_000050": ("Neutral", "test", "esd-zh-050"),
        "0012_000051": ("Neutral", "train", "esd-en-051"),
        "0012_000350": ("Neutral", "train", "esd-en-350"),
    }
    assert tally.counts == {("dropped", HELD_OUT): 4 * len(EDGES) - 9}
    assert all(u.member.read()[:4] == b"RIFF" for u in utterances.values())


@pytest.mark.parametrize(
    "move", ["English/0011", "Emotional Speech Dataset (ESD)/Emotion Speech Dataset/0011", "Happy/0011"]
)
def test_the_top_folders_do_not_matter(tmp_path, move):
    raw = write_esd(tmp_path / "raw", speakers=(11,), numbers=(51, 351, 401))
    (tmp_path / "moved" / move).parent.mkdir(parents=True)
    shutil.move(raw / "0011", tmp_path / "moved" / move)
    assert {name: u.emotion_raw for name, u in listing(tmp_path / "moved")[0].items()} == {
        "0011_000051": "Neutral",
        "0011_000401": "Angry",
    }


def test_both_releases_in_one_folder_count_once(tmp_path):
    for layout in ("partitioned", "flat"):
        write_esd(tmp_path, speakers=(11,), numbers=(51, 401), layout=layout)
    (tmp_path / "Emotion Speech Dataset/0011/0011.txt").write_bytes(b"the topmost transcript is read")
    utterances, tally = listing(tmp_path)
    assert len(utterances) == 2
    assert tally.counts == {("dropped", "second copy of a file"): 2}


def test_without_emotion_folders_the_number_gives_the_emotion(tmp_path):
    raw = write_esd(tmp_path / "raw", speakers=(11,), numbers=(51, 401, 1_101))
    for path in [*raw.rglob("*.wav"), *raw.rglob("0011.txt")]:
        path.rename(tmp_path / path.name)
    shutil.rmtree(raw)
    assert [u.emotion_raw for u in listing(tmp_path)[0].values()] == ["Neutral", "Angry", "Sad"]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16-le", "utf-16", "gb2312", "gb18030"])
@pytest.mark.parametrize("speaker", [1, 11])
def test_a_transcript_is_read_in_every_encoding_of_the_releases(tmp_path, encoding, speaker):
    numbers = (51, 52, 121)
    write_silent(tmp_path, speaker, numbers, encode_transcript(rows_of(speaker, numbers), encoding))
    texts = [u.text.replace("’", "'") for u in listing(tmp_path)[0].values()]
    assert texts == [sentence(speaker, number) for number in numbers]


@pytest.mark.parametrize(
    ("text", "encoding"),
    [
        ("It’s an “old” café", "cp1252"),
        ("It’s mine.", "cp1252"),
        ("It's an old café", "latin-1"),
        ("It’s an “old” house", "gb18030"),
        ("It’s an “old” café", "utf-8"),
    ],
)
def test_quotes_and_accents_of_english_survive_its_encoding(tmp_path, text, encoding):
    write_silent(tmp_path, 11, (51,), f"0011_000051\t{text}\tNeutral\r\n".encode(encoding))
    assert [u.text for u in listing(tmp_path)[0].values()] == [text]


def test_chinese_emotions_do_not_make_an_english_transcript_mandarin(tmp_path):
    write_silent(tmp_path, 16, (51,), "0016_000051\tIt’s mine.\t中立\n".encode("gb2312"))
    assert [u.text for u in listing(tmp_path)[0].values()] == ["It’s mine."]


@pytest.mark.parametrize(
    ("speaker", "content"),
    [
        (11, rows_of(11, (51,)).encode("utf-16-le")),
        (11, rows_of(11, (51,)).encode("utf-16")[:-1]),
        (11, b"0011_000051\tIt\x00s mine.\tNeutral"),
        (11, "0011_000051\tIt\ufffds mine.\tNeutral".encode()),
        (1, "0001_000051\t打远\ufffd看\t中立".encode()),
        (1, b"0001_000051\tDa yuan yi kan.\tNeutral"),
        (1, "0001_000051\tDa yuan yi kan.\t中立".encode()),
        (1, rows_of(1, (51,)).encode().decode("latin-1").encode()),
        (1, b""),
    ],
    ids=[
        "utf-16 without mark",
        "utf-16 cut short",
        "control character",
        "replacement character",
        "replacement character in Mandarin",
        "Mandarin in Latin letters",
        "emotions alone in Mandarin",
        "UTF-8 twice",
        "empty",
    ],
)
def test_a_transcript_that_would_be_garbage_is_an_error_that_names_it(tmp_path, speaker, content):
    write_silent(tmp_path, speaker, (51,), content)
    with pytest.raises(UserError, match=rf"{speaker:04d}\.txt: no (English|Mandarin) text in UTF-8") as raised:
        listing(tmp_path)
    assert "Save it as UTF-8" in raised.value.remedy
    assert "\n" not in raised.value.problem + raised.value.remedy


def full_speaker(folder, change=lambda rows: rows):
    """Write a speaker with 200 empty clips, whose transcript rows go through `change`."""
    numbers = range(51, 251)
    rows = change(list(transcript_rows(11, numbers, defects=False)))
    return write_silent(folder, 11, numbers, "\n".join(rows).encode())


@pytest.mark.parametrize(
    ("row", "reasons"),
    [
        ("", {"no row in its speaker's transcript": 1}),
        ("0011_000060", {"no row in its speaker's transcript": 1, "not a transcript row: name, text, emotion": 1}),
        (
            "0011_000060\t\tNeutral",
            {"no row in its speaker's transcript": 1, "not a transcript row: name, text, emotion": 1},
        ),
        (
            "0011_000060\tIt is mine.\tBored",
            {"no row in its speaker's transcript": 1, "not a transcript row: name, text, emotion": 1},
        ),
        (
            "0011_000660\tIt is mine.\tAngry",
            {"no row in its speaker's transcript": 1, "transcript row without a wav": 1},
        ),
        ("0011_000060\tIt is mine.", {}),
        ("0011_000060 It is mine.\tneutral", {}),
        ("0011_000060 It is mine. Neutral", {}),
        ("0011_000060   It is mine.  愤怒", {}),
        ("0011_000060\t\tIt is\tmine.\t\t愤怒\t", {}),
    ],
)
def test_a_row_that_is_wrong_or_missing_is_counted_and_its_clip_dropped(tmp_path, row, reasons):
    def change(rows):
        return [row if line.startswith("0011_000060") else line for line in rows]

    utterances, tally = listing(full_speaker(tmp_path, change))
    assert tally.counts == {("dropped", reason): count for reason, count in reasons.items()}
    if reasons:
        assert "0011_000060" not in utterances and len(utterances) == 199
    else:
        assert utterances["0011_000060"].text == "It is mine."


def test_the_name_of_another_emotion_ends_a_sentence(tmp_path):
    write_silent(tmp_path, 11, (51, 52), b"0011_000051 I am Happy\n0011_000052 I am Neutral")
    assert [utterance.text for utterance in listing(tmp_path)[0].values()] == ["I am Happy", "I am"]


def test_two_rows_for_a_clip_that_differ_are_noted(tmp_path):
    write_silent(tmp_path, 11, (51,), b"0011_000051\tOne.\tNeutral\n0011_000051\tTwo.\tNeutral")
    utterances, tally = listing(tmp_path)
    assert utterances["0011_000051"].text == "One."
    assert tally.counts == {("noted", "two different transcript rows: the first is used"): 1}


def test_too_many_clips_without_a_row_are_an_error_with_their_names(tmp_path):
    with pytest.raises(UserError, match=r"6 of 200 .*no row in its speaker's transcript: 0011_000245\.wav, "):
        listing(full_speaker(tmp_path, lambda rows: rows[:-6]))


def test_a_speaker_without_transcript_is_an_error(tmp_path):
    write_silent(tmp_path, 11, (51, 52), b"")
    (tmp_path / "0011/0011.txt").unlink()
    with pytest.raises(UserError, match="2 of 2 .*no row"):
        listing(tmp_path)


def test_only_the_selected_languages_are_read_and_the_rest_is_counted(tmp_path):
    write_esd(tmp_path, speakers=(1, 11), numbers=(51, 52))
    (tmp_path / "0001/0001.txt").write_bytes(b"\xff\xfe\xff")
    utterances, tally = listing(tmp_path, languages="en")
    assert sorted(utterances) == ["0011_000051", "0011_000052"]
    assert tally.counts == {("dropped", "Mandarin was not selected"): 2}
    with pytest.raises(UserError, match="no ESD clips.*2 English was not selected"):
        shutil.rmtree(tmp_path / "0001")
        listing(tmp_path, languages=["zh"])


@pytest.mark.parametrize("languages", ["fr", (), ("en", "de"), "enzh"])
def test_other_languages_are_an_error(languages):
    with pytest.raises(UserError, match="esd: unknown languages"):
        make_builder("esd", "raw", languages=languages)


def test_a_clip_in_the_folder_of_another_emotion_is_an_error(tmp_path):
    write_silent(tmp_path, 11, (51,), rows_of(11, (51,)).encode())
    (tmp_path / "0011/Neutral").rename(tmp_path / "0011/Sad")
    with pytest.raises(UserError, match=r"0011_000051\.wav.* Sad.* 51 is Neutral"):
        listing(tmp_path)


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("0021_000051.wav", "not a file name of ESD"),
        ("0011_51.wav", "not a file name of ESD"),
        ("hello.wav", "not a file name of ESD"),
        ("0011_000000.wav", "unknown clip number 0"),
        ("0011_001751.wav", "unknown clip number 1,751"),
    ],
)
def test_a_clip_that_esd_does_not_have_is_an_error_that_names_it(tmp_path, name, problem):
    write_silent(tmp_path, 11, (51,), f"0011_000051\tA.\tNeutral\n{name[:-4]}\tA.\tNeutral".encode())
    (tmp_path / "0011" / name).write_bytes(b"")
    with pytest.raises(UserError, match=rf"{name}: {problem}"):
        listing(tmp_path)


@pytest.mark.parametrize(
    ("corpus", "name", "title"),
    [
        ("esd", "03-01-06-01-02-01-12.wav", "RAVDESS"),
        ("esd", "1001_DFA_ANG_XX.wav", "CREMA-D"),
        ("ravdess", "1001_DFA_ANG_XX.wav", "CREMA-D"),
        ("ravdess", "0011_000351.wav", "ESD"),
    ],
)
def test_the_folder_of_another_corpus_is_recognised(tmp_path, corpus, name, title):
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(UserError, match=rf"no {corpus.upper()} clips in there. It looks like {title} \(1 "):
        make_builder(corpus, tmp_path).shards()


def test_a_missing_source_is_an_error_with_the_address_of_the_authors():
    with pytest.raises(UserError, match="cannot be downloaded") as raised:
        listing(None)
    assert "https://hltsingapore.github.io/ESD" in raised.value.remedy


def test_file_names_are_speaker_and_number():
    assert FILE_NAME.fullmatch("0001_000001.wav") and FILE_NAME.fullmatch("0020_001750.WAV")
    assert not FILE_NAME.fullmatch("0000_000001.wav")
    assert not FILE_NAME.fullmatch("0021_000001.wav")
    assert not FILE_NAME.fullmatch("0001_0001.wav")


def test_a_miniature_in_mandarin_and_english_is_prepared_whole(tmp_path):
    raw = write_esd(tmp_path / "raw", speakers=(1, 7, 9, 16), numbers=EDGES)
    report = prepare("esd", raw, tmp_path / "out", num_workers=1, progress=False)
    assert [(row.split, row.emotion, row.num_clips) for row in report.rows] == [
        ("train", "neutral", 4),
        ("validation", "neutral", 2),
        ("validation", "angry", 1),
        ("test", "neutral", 2),
    ]
    assert report.adjustments == [["dropped", HELD_OUT, 19, "0001_000351.wav"]]
    card = (tmp_path / "out/README.md").read_text()
    assert "research only" in card and "license: other" in card


def test_every_mandarin_character_is_a_word_with_its_time(tmp_path):
    raw = write_esd(tmp_path, speakers=(7,), numbers=(1,))
    (row,) = hf_csm.load_corpus("esd", raw, split="validation")
    names = UTTERANCE_FEATURES
    assert (row["id"], row["text"], row["language"]) == ("esd-0007_000001", "打远一看，它们的确很是美丽，", "zh")
    assert [word["word"] for word in row["words"]] == [*"打远一", "看，", *"它们的确很是美", "丽，"]
    times = [time for word in row["words"] for time in (word["start_s"], word["end_s"])]
    assert times == sorted(times) and 0 < times[0] < times[-1] < row["duration_s"]
    assert (row["emotion_raw"], names["emotion"].int2str(row["emotion"])) == ("Neutral", "neutral")
    assert (row["speaker_id"], row["sentence_id"], row["license"]) == ("esd-0007", "esd-zh-001", "other")
    assert row["intensity"] is row["emotion_perceived"] is row["emotion_agreement"] is None


def test_esd_is_not_to_be_published():
    assert "research" in make_builder("esd", "raw").NOT_TO_BE_PUBLISHED
