import codecs
import io

import pytest
import soundfile

from tests.doubles.esd import (
    FLAT_ROOT,
    NUMBERS,
    OLD_ENCODINGS,
    SHORTENED,
    SPACED,
    SPEAKERS,
    WITH_TAB_INSIDE,
    clip_bytes,
    sentence,
    transcript_rows,
    write_esd,
)


def files(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_the_old_release_has_a_folder_for_every_partition(tmp_path):
    write_esd(tmp_path, speakers=(1,), numbers=(20, 21, 351, 1_451))
    assert files(tmp_path) == [
        "0001/.DS_Store",
        "0001/0001.txt",
        "0001/Angry/evaluation/0001_000351.wav",
        "0001/Neutral/evaluation/0001_000020.wav",
        "0001/Neutral/test/0001_000021.wav",
        "0001/Surprise/train/0001_001451.wav",
        "ReadMe.txt",
    ]


def test_the_flat_release_has_none_and_nothing_of_macos_without_defects(tmp_path):
    write_esd(tmp_path, speakers=(12,), numbers=(20, 1_400), layout="flat", defects=False)
    home = f"{FLAT_ROOT}/0012"
    assert files(tmp_path) == [
        f"{home}/0012.txt",
        f"{home}/Neutral/0012_000020.wav",
        f"{home}/Sad/0012_001400.wav",
        f"{FLAT_ROOT}/ReadMe.txt",
    ]


def test_a_clip_is_16_khz_mono_and_of_its_speaker_and_number():
    content = clip_bytes(1, 401)
    info = soundfile.info(io.BytesIO(content))
    assert (info.samplerate, info.subtype, info.channels) == (16_000, "PCM_16", 1)
    assert 1.0 < info.duration < 5.0
    assert content == clip_bytes(1, 401) != clip_bytes(2, 401) != clip_bytes(1, 402) != clip_bytes(1, 401, seed=1)


@pytest.mark.parametrize("speaker", [1, 11])
def test_a_language_has_350_sentences_which_all_speakers_say_in_all_emotions(speaker):
    texts = [sentence(speaker, number) for number in NUMBERS]
    assert len(set(texts)) == 350
    assert texts == texts[:350] * 5 == [sentence(speaker + 9, number) for number in NUMBERS]


def test_the_first_sentences_are_those_of_the_corpus():
    assert sentence(11, 1) == "The nine the eggs, I keep."
    assert sentence(1, 1_401) == "打远一看，它们的确很是美丽，"


def test_transcripts_have_the_encodings_of_the_old_release(tmp_path):
    # the apostrophe of sentence 3 is curly where English has a Chinese encoding
    write_esd(tmp_path / "old", speakers=(1, 3, 11, 16), numbers=(3,))
    old = {speaker: (tmp_path / f"old/{speaker:04d}/{speaker:04d}.txt").read_bytes() for speaker in (1, 3, 11, 16)}
    assert "0001_000003" in old[1].decode("gb2312")
    with pytest.raises(UnicodeDecodeError):
        old[1].decode()
    assert old[3].startswith(codecs.BOM_UTF16_LE) and "中立" in old[3].decode("utf-16")
    assert old[11].isascii() and b"miller's" in old[11]
    assert "miller’s" in old[16].decode("gb2312")
    assert OLD_ENCODINGS.keys() == set(SPEAKERS)


def test_encodings_can_be_chosen(tmp_path):
    write_esd(tmp_path, speakers=(1,), numbers=(3,), layout="flat", encodings={1: "utf-16-le"})
    write_esd(tmp_path / "utf-8", speakers=(1,), numbers=(3,), layout="flat")
    path = f"{FLAT_ROOT}/0001/0001.txt"
    assert (tmp_path / path).read_bytes().decode("utf-16") == (tmp_path / "utf-8" / path).read_text(encoding="utf-8")


def test_the_defects_of_transcripts_are_there_and_can_be_left_out():
    assert list(transcript_rows(15, (350, 351)))[1] == ""
    with_defects, without = (
        {row[:11]: row for speaker in (1, 14, 15) for row in transcript_rows(speaker, NUMBERS, defects=defects)}
        for defects in (True, False)
    )
    assert with_defects["0001_000351"] == "0001_000351\t打远一看，它们的确很是美丽，\t生气"
    assert without["0001_000351"] == "0001_000351\t打远一看，它们的确很是美丽，\tAngry"
    assert {name for name, row in with_defects.items() if row[11:12] == " "} == {n for n in SPACED if n[:4] == "0015"}
    assert with_defects[WITH_TAB_INSIDE].count("\t") == 3
    assert with_defects[SHORTENED].split()[1] != without[SHORTENED].split()[1]
    assert all(row.count("\t") == 2 for row in without.values())
