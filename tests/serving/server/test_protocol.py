import numpy as np
import pytest
import sphn

from hf_csm.serving.server import protocol as wire
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
def test_opus_is_decoded_as_moshis_server_does_however_it_is_cut(num_bytes):
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


def test_opus_goes_out_through_one_writer():
    audio = speech(5)
    ours = OpusAudio()
    assert [ours.encode(frame) for frame in audio.reshape(5, -1)] == as_opus(audio)


@pytest.mark.parametrize("start", [b"\x1a\x45\xdf\xa3webm", b"RIFFxxxxWAVE", b"", b"OggS\x09"])
def test_what_is_not_ogg_opus_is_refused(start):
    with pytest.raises(BadAudio, match="not Ogg Opus"):
        list(Framer(OpusAudio()).frames(start + bytes(60)))


def test_a_panic_of_the_decoder_is_refused_and_an_interrupt_is_not():
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


def test_a_packet_that_never_ends_is_refused_before_it_fills_the_memory():
    audio = OpusAudio()
    list(audio.decode(as_opus(speech(1))[0]))
    endless = ogg_page(bytes(255 * 255), [255] * 255)
    with pytest.raises(BadAudio, match="hold no sound"):
        for number in range(100):
            list(audio.decode(endless if number == 0 else ogg_page(bytes(255 * 255), [255] * 255, flags=1)))
    assert number <= 2


def test_a_large_message_is_decoded_only_as_far_as_frames_are_taken(monkeypatch):
    stream = b"".join(as_opus(speech(100)))
    monkeypatch.setattr(wire, "SLICE_BYTES", 1024)
    framer = Framer(OpusAudio())
    next(framer.frames(stream))
    assert 0 < framer.num_samples < 10 * SAMPLES_PER_FRAME


def test_pcm_may_be_cut_anywhere():
    samples = np.arange(-2 * SAMPLES_PER_FRAME, 2 * SAMPLES_PER_FRAME).astype("<i2")
    stream, framer = samples.tobytes(), Framer(PcmAudio())
    frames = [frame for start in range(0, len(stream), 1001) for frame in framer.frames(stream[start : start + 1001])]
    assert [frame.shape for frame in frames] == [(SAMPLES_PER_FRAME,)] * 4
    np.testing.assert_array_equal(np.concatenate(frames) * 32768, samples)
    assert frames[0].dtype == np.float32


def test_pcm_goes_out_clipped():
    sent = np.frombuffer(PcmAudio().encode(np.array([0, 1, -1, 3, -3, 0.5], dtype=np.float32)), "<i2")
    assert sent.tolist() == [0, 32767, -32767, 32767, -32767, 16384]


@pytest.mark.parametrize("value", [np.nan, np.inf, 9.0])
def test_what_no_microphone_gives_is_refused(value):
    class Decoder:
        def decode(self, payload):
            yield np.array([0.0, value, 0.0], dtype=np.float32)

    with pytest.raises(BadAudio, match="full scale"):
        list(Framer(Decoder()).frames(b""))


def test_pieces_are_worded_as_moshis_server_does():
    assert text_message("▁hello") == b"\x02 hello"
    assert text_message("<0xE2>") == b"\x02<0xE2>"
