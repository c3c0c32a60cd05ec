import io

import numpy as np
import pytest
import soundfile

from hf_csm.data.audio import decode_audio, encode_flac, hash_samples, read_audio, resample, to_int16
from hf_csm.errors import UserError
from hf_csm.testing.ravdess import wav_bytes


def tone(num_samples=4_800, sample_rate=48_000):
    return (0.3 * np.sin(2 * np.pi * 220 * np.arange(num_samples) / sample_rate)).astype(np.float32)


def as_file(samples, sample_rate=48_000, **options):
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, sample_rate, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("num_channels", [1, 2])
def test_a_wav_with_extra_chunks_reads_as_libsndfile_reads_it(num_channels):
    content = wav_bytes(tone(), num_channels)
    samples, sample_rate, channels = read_audio(content)
    expected, _ = soundfile.read(io.BytesIO(content), dtype="float32", always_2d=True)
    assert (sample_rate, channels) == (48_000, num_channels)
    np.testing.assert_array_equal(samples, expected.mean(axis=1))


@pytest.mark.parametrize(
    "options",
    [{"format": "WAV", "subtype": "PCM_24"}, {"format": "WAV", "subtype": "FLOAT"}, {"format": "FLAC"}],
)
def test_other_formats_read_too(options):
    samples, _, _ = read_audio(as_file(tone(), **options))
    np.testing.assert_allclose(samples, tone(), atol=1e-4)


def test_channels_are_averaged():
    samples, _, channels = read_audio(as_file(np.stack([tone(), 0 * tone()], axis=1), format="WAV"))
    assert channels == 2
    np.testing.assert_allclose(samples, tone() / 2, atol=1e-4)


@pytest.mark.parametrize("content", [b"", b"this is not a wav", b"RIFF\x10\0\0\0WAVEjunkjunk"])
def test_a_file_that_is_not_audio_is_an_error_that_names_it(content):
    with pytest.raises(UserError, match="clip.wav"):
        read_audio(content, "clip.wav")


def test_a_truncated_wav_is_an_error():
    content = wav_bytes(tone())
    with pytest.raises(UserError, match="truncated"):
        read_audio(content[: len(content) * 3 // 4], "clip.wav")


def test_a_wav_without_samples_is_an_error():
    with pytest.raises(UserError, match="no samples"):
        read_audio(wav_bytes(tone(0)))


def test_a_missing_file_is_an_error(tmp_path):
    with pytest.raises(UserError, match=r"gone\.wav"):
        read_audio(tmp_path / "gone.wav")


def test_flac_keeps_every_sample():
    pcm = to_int16(resample(tone(), 48_000))
    decoded = decode_audio({"bytes": encode_flac(pcm), "path": "x.flac"})
    np.testing.assert_array_equal(to_int16(decoded), pcm)
    assert len(pcm) == 2_400


def test_int16_rounds_and_clips():
    samples = np.array([0.0, 0.5, -1.0, 1.0, 1.7, -2.0, 1.6 / 32768], np.float32)
    assert to_int16(samples).tolist() == [0, 16384, -32768, 32767, 32767, -32768, 2]


def test_the_hash_is_of_the_samples_not_of_the_file():
    pcm = to_int16(tone())
    flac, wav = read_audio(encode_flac(pcm, 48_000))[0], read_audio(as_file(pcm, format="WAV"))[0]
    assert hash_samples(to_int16(flac)) == hash_samples(to_int16(wav)) == hash_samples(pcm)
    assert hash_samples(pcm) != hash_samples(pcm[::-1].copy())


@pytest.mark.parametrize(
    ("loudest", "message"),
    [(np.nan, "no finite numbers"), (-np.inf, "no finite numbers"), (9_000.0, "samples reach 9,000")],
)
def test_invalid_float_samples_are_an_error(loudest, message):
    samples = tone()
    samples[7] = loudest
    with pytest.raises(UserError, match=rf"clip\.wav: .*{message}") as error:
        read_audio(as_file(samples, format="WAV", subtype="FLOAT"), "clip.wav")
    assert len(str(error.value).splitlines()) == 2


@pytest.mark.parametrize("options", [{"format": "AIFF"}, {"format": "AU"}, {"format": "OGG", "subtype": "VORBIS"}])
@pytest.mark.parametrize("share", [0.75, 0.97])
def test_truncated_files_of_other_formats_are_errors(options, share):
    content = as_file(np.random.default_rng(0).normal(0, 0.1, 48_000), **options)
    assert len(read_audio(content)[0]) == 48_000
    with pytest.raises(UserError, match="truncated"):
        read_audio(content[: int(len(content) * share)], "clip")


@pytest.mark.parametrize("size", [0x7FFFF024, 0xFFFFFFFF])
def test_the_placeholder_size_of_a_piped_wav_is_ignored(size):
    content = bytearray(as_file(tone(), format="WAV", subtype="FLOAT"))
    content[4:8] = size.to_bytes(4, "little")
    assert len(read_audio(bytes(content))[0]) == len(tone())
