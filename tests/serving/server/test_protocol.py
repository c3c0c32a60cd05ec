import numpy as np
import pytest
import sphn

from hf_csm.serving.server import protocol
from hf_csm.serving.server.protocol import BadAudio, Framer, OpusAudio, PcmAudio, text_message
from hf_csm.units import SAMPLE_RATE, SAMPLES_PER_FRAME


def speech(num_frames, seed=0):
    random = np.random.default_rng(seed)
    return (0.1 * random.normal(size=num_frames * SAMPLES_PER_FRAME)).astype(np.float32)


def as_opus(audio):
    writer = sphn.OpusStreamWriter(SAMPLE_RATE)
    return [writer.append_pcm(frame) for frame in audio.reshape(-1, SAMPLES_PER_FRAME)]


def ogg_page(body, lacing, flags=0):
    return b"OggS\0" + bytes([flags]) + bytes(8) + b"\x2a\0\0\0" + bytes(8) + bytes([len(lacing), *lacing]) + body


@pytest.mark.parametrize("num_bytes", [1, 97, 10_000])
def test_opus_is_decoded_as_in_moshi_server_for_any_message_size(num_bytes):
    messages = as_opus(speech(12))
    reader = sphn.OpusStreamReader(SAMPLE_RATE)
    expected = np.concatenate([reader.append_bytes(message) for message in messages])
    framer, stream = Framer(OpusAudio()), b"".join(messages)
    frames = [
        frame
        for start in range(0, len(stream), num_bytes)
        for frame in framer.frames(stream[start : start + num_bytes])
    ]
    np.testing.assert_array_equal(np.concatenate(frames), expected)
    assert framer.num_samples == len(expected)


def test_opus_is_encoded_with_one_writer():
    audio = speech(5)
    ours = OpusAudio()
    assert [ours.encode(frame) for frame in audio.reshape(5, -1)] == as_opus(audio)


@pytest.mark.parametrize("start", [b"\x1a\x45\xdf\xa3webm", b"RIFFxxxxWAVE", b"", b"OggS\x09"])
def test_other_formats_are_refused(start):
    with pytest.raises(BadAudio, match="not Ogg Opus"):
        list(Framer(OpusAudio()).frames(start + bytes(60)))


def test_decoder_panic_is_bad_audio_but_interrupts_propagate():
    class Panic(BaseException):
        pass

    class Reader:
        def __init__(self, error):
            self.error = error

        def append_bytes(self, part):
            raise self.error

    audio = OpusAudio()
    audio._reader = Reader(Panic("index out of bounds"))
    with pytest.raises(BadAudio, match="index out of bounds"):
        list(audio.decode(b"OggS"))
    audio._reader = Reader(KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        list(audio.decode(b"OggS"))


def test_endless_packet_is_refused_with_bounded_memory():
    audio = OpusAudio()
    list(audio.decode(as_opus(speech(1))[0]))
    endless = ogg_page(bytes(255 * 255), [255] * 255)
    with pytest.raises(BadAudio, match="contain no samples"):
        for number in range(100):
            list(audio.decode(endless if number == 0 else ogg_page(bytes(255 * 255), [255] * 255, flags=1)))
    assert number <= 2


def test_large_message_is_decoded_lazily(monkeypatch):
    stream = b"".join(as_opus(speech(100)))
    monkeypatch.setattr(protocol, "SLICE_BYTES", 1024)
    framer = Framer(OpusAudio())
    next(framer.frames(stream))
    assert 0 < framer.num_samples < 10 * SAMPLES_PER_FRAME


def test_pcm_may_be_split_anywhere():
    samples = np.arange(-2 * SAMPLES_PER_FRAME, 2 * SAMPLES_PER_FRAME).astype("<i2")
    stream, framer = samples.tobytes(), Framer(PcmAudio())
    frames = [frame for start in range(0, len(stream), 1001) for frame in framer.frames(stream[start : start + 1001])]
    assert [frame.shape for frame in frames] == [(SAMPLES_PER_FRAME,)] * 4
    np.testing.assert_array_equal(np.concatenate(frames) * 32768, samples)
    assert frames[0].dtype == np.float32


def test_pcm_is_clipped():
    sent = np.frombuffer(PcmAudio().encode(np.array([0, 1, -1, 3, -3, 0.5], dtype=np.float32)), "<i2")
    assert sent.tolist() == [0, 32767, -32767, 32767, -32767, 16384]


@pytest.mark.parametrize("value", [np.nan, np.inf, 9.0])
def test_samples_out_of_range_are_refused(value):
    class Decoder:
        def decode(self, payload):
            yield np.array([0.0, value, 0.0], dtype=np.float32)

    with pytest.raises(BadAudio, match="full scale"):
        list(Framer(Decoder()).frames(b""))


def test_text_messages_match_moshi_server():
    assert text_message("▁hello") == b"\x02 hello"
    assert text_message("<0xE2>") == b"\x02<0xE2>"
