import io
import zipfile

import numpy as np
import pytest
import soundfile

from hf_csm.testing.ravdess import DUPLICATE, ORIGINAL, STEREO, clip_bytes, clip_names, known_words, write_ravdess


def chunk_names(content):
    names, position = [], 12
    while position < len(content):
        names.append(content[position : position + 4])
        size = int.from_bytes(content[position + 4 : position + 8], "little")
        position += 8 + size + size % 2
    return names


def test_the_grid_is_that_of_the_corpus():
    speech, song = list(clip_names("01", range(1, 25))), list(clip_names("02", range(1, 25)))
    assert (len(set(speech)), len(set(song))) == (1_440, 1_012)
    assert not [name for name in song if name.endswith("-18")]
    assert {*STEREO, DUPLICATE, ORIGINAL} <= {*speech, *song}


def test_a_file_is_48_khz_with_the_extra_chunks_and_about_as_large_as_the_real_ones():
    content = clip_bytes("03-01-01-01-01-01-03")
    assert chunk_names(content) == [b"bext", b"fmt ", b"FLLR", b"data", b"LIST", b"_PMX"]
    info = soundfile.info(io.BytesIO(content))
    assert (info.samplerate, info.subtype, info.channels) == (48_000, "PCM_16", 1)
    assert 2.9 < info.duration < 5.3
    assert len(content) - 2 * info.frames == pytest.approx(53_000, abs=100)


def test_defects_are_written_unless_left_out():
    name = min(STEREO)
    samples, _ = soundfile.read(io.BytesIO(clip_bytes(name)))
    assert samples.shape[1] == 2 and np.array_equal(samples[:, 0], samples[:, 1])
    assert soundfile.info(io.BytesIO(clip_bytes(name, defects=False))).channels == 1
    assert clip_bytes(DUPLICATE) == clip_bytes(ORIGINAL)
    assert clip_bytes(DUPLICATE, defects=False) != clip_bytes(ORIGINAL, defects=False)


def test_the_zips_have_a_folder_for_every_actor_and_no_top_folder(tmp_path):
    small = {"emotions": ("calm",), "statements": (1,), "repetitions": (1,), "intensities": (1,)}
    write_ravdess(tmp_path, actors=(18, 19), song=True, **small)
    with zipfile.ZipFile(tmp_path / "Audio_Song_Actors_01-24.zip") as archive:
        assert archive.namelist() == ["Actor_18/", "Actor_19/", "Actor_19/03-02-02-01-01-01-19.wav"]
        assert archive.read("Actor_19/03-02-02-01-01-01-19.wav") == clip_bytes("03-02-02-01-01-01-19")
    with zipfile.ZipFile(tmp_path / "Audio_Speech_Actors_01-24.zip") as archive:
        assert archive.testzip() is None
        assert len(archive.namelist()) == 4


def test_known_words_cover_the_audible_part():
    name = "03-01-05-02-02-01-09"
    samples, sample_rate = soundfile.read(io.BytesIO(clip_bytes(name)))
    words = known_words(name)
    assert " ".join(word["word"] for word in words) == "Dogs are sitting by the door"
    start, end = (round(time * sample_rate) for time in (words[0]["start_s"], words[-1]["end_s"]))
    assert samples[start:end].std() > 20 * samples[:start].std()
    assert samples[end:].std() < 2 * samples[:start].std()
