"""Audio and text processing of the page in Chromium: resampling, WAV, words, the jitter buffer."""

import pytest
import soundfile

from hf_csm.units import SAMPLE_RATE


pytestmark = pytest.mark.slow

CASES = [
    (48000, 24000, 1000),
    (48000, 24000, 10000),
    (48000, 24000, 12500),
    (44100, 24000, 1000),
    (44100, 24000, 15000),
    (24000, 48000, 5000),
    (24000, 44100, 5000),
    (16000, 24000, 3000),
]
"""From, to, and the frequency of a tone."""


def test_resampling_has_no_aliases_and_is_independent_of_chunks(page):
    levels = page.evaluate(
        """async (cases) => {
      const { Resampler, rms } = await import('/audio.js');
      const result = [];
      for (const [from, to, hertz] of cases) {
        const tone = Float32Array.from({ length: from }, (_, i) => Math.sin((2 * Math.PI * hertz * i) / from));
        const whole = new Resampler(from, to).process(tone);
        const pieces = new Resampler(from, to);
        const parts = [];
        for (let i = 0, n = 1; i < from; i += n, n = (n * 7) % 1013)
          parts.push(...pieces.process(tone.slice(i, i + n)));
        const difference = Math.max(...whole.map((x, i) => Math.abs(x - parts[i])));
        result.push({ hertz, to, count: whole.length, same: parts.length === whole.length && difference === 0,
                      level: rms(whole.slice(2000)) * Math.SQRT2 });
      }
      return result;
    }""",
        CASES,
    )
    for tone in levels:
        assert tone["same"] and tone["count"] == tone["to"]
        if tone["hertz"] in (12500, 15000):  # beyond what 24 kHz can carry
            assert tone["level"] < 1e-3
        else:
            assert tone["level"] == pytest.approx(1, abs=0.01)


def test_recording_is_a_stereo_wav(page, tmp_path):
    content = page.evaluate(
        """async () => {
      const { wav } = await import('/audio.js');
      const blob = wav(Int16Array.of(1, -32768, 3), Int16Array.of(32767, 0, -2));
      return [...new Uint8Array(await blob.arrayBuffer())];
    }"""
    )
    (tmp_path / "x.wav").write_bytes(bytes(content))
    samples, rate = soundfile.read(tmp_path / "x.wav", dtype="int16")
    assert rate == SAMPLE_RATE and samples.tolist() == [[1, 32767], [-32768, 0], [3, -2]]


def test_words_are_emitted_when_complete(page):
    said = page.evaluate(
        """async () => {
      const { Words } = await import('/chat.js');
      const said = [];
      const words = new Words((text) => said.push(text));
      for (const piece of ' he|llo| caf|<0xC3>|<0xA9>| |<0xFF>|<0x0A>| bye'.split('|')) words.add(piece);
      const before = [...said];
      await new Promise((resolve) => setTimeout(resolve, 700));
      return [before, said];
    }"""
    )
    assert said[0] == [" hello", " café"] and "".join(said[1]).split() == ["hello", "café", "bye"]


WORKLET = """(source) => {
  let made;
  const port = { postMessage() {} };
  class AudioWorkletProcessor { port = port; }
  const registerProcessor = (name, kind) => (made = kind);
  const sampleRate = 24000;
  eval(source);
  const duplex = new made();
  const frame = (level) => port.onmessage({ data: new Float32Array(1920).fill(level) });
  const hear = (quanta) => {
    const heard = [];
    for (let i = 0; i < quanta; i++) {
      const out = new Float32Array(128);
      duplex.process([[]], [[out]]);
      heard.push(out[127]);
    }
    return heard;
  };
  %s
}"""


def test_jitter_buffer_fills_before_playback_and_recovers_from_underrun(bare_page, worklet):
    begun, dry, again, underruns = bare_page.evaluate(
        WORKLET
        % """
      frame(0.5);
      const early = hear(3);           // 80 ms are not enough to begin with
      frame(0.5);
      const begun = [...early, ...hear(30)];
      const dry = hear(5);
      frame(0.25); frame(0.25); frame(0.25);
      return [begun, dry, hear(10), duplex.underruns];""",
        worklet,
    )
    assert begun[:3] == [0, 0, 0] and begun[4:32] == [0.5] * 28
    assert dry[-4:] == [0, 0, 0, 0] and underruns == 1
    assert again[2:] == [0.25] * 8


def test_player_catches_up_in_quiet_parts_only(bare_page, worklet):
    loud, caught_up, bounded = bare_page.evaluate(
        WORKLET
        % """
      for (let i = 0; i < 10; i++) frame(0.5);
      hear(1);
      const loud = duplex.queued;
      hear(9 * 15);
      for (let i = 0; i < 10; i++) frame(0.001);
      hear(16);
      const caughtUp = duplex.queued;
      for (let i = 0; i < 50; i++) frame(0.5);
      hear(1);
      return [loud, caughtUp, duplex.queued];""",
        worklet,
    )
    assert loud == 10 * 1920 - 128  # words are not left out
    assert caught_up <= 0.28 * SAMPLE_RATE
    assert bounded <= 2 * SAMPLE_RATE
