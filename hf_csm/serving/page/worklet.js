// The audio thread: microphone in, Moshi's voice out. One processor does both, so what it reports of a stretch of time
// are the two sides of the same instant, and recordings are aligned by construction. All lengths are in samples.

const FADE = 128; // one quantum of Web Audio: long enough that an edge does not click
const QUIET = 0.01; // peak below which a quantum may be left out to catch up

class Duplex extends AudioWorkletProcessor {
  constructor() {
    super();
    this.chunks = []; // Moshi's samples that wait to be played, oldest first
    this.offset = 0; // how much of chunks[0] is played
    this.queued = 0;
    this.target = 0.12 * sampleRate; // what has to wait before playing starts: the jitter buffer
    this.playing = false;
    this.underruns = 0;
    this.reportSize = 128 * Math.round((5 * sampleRate) / 24000); // a third of a frame at 24 kHz
    this.newReport();
    this.port.onmessage = ({ data }) => {
      this.chunks.push(data);
      this.queued += data.length;
    };
  }

  newReport() {
    this.mic = new Float32Array(this.reportSize);
    this.played = new Float32Array(this.reportSize);
    this.filled = 0;
  }

  take(out, length) {
    for (let done = 0; done < length; ) {
      const part = this.chunks[0].subarray(this.offset, this.offset + length - done);
      out.set(part, done);
      done += part.length;
      this.offset += part.length;
      if (this.offset === this.chunks[0].length) {
        this.chunks.shift();
        this.offset = 0;
      }
    }
    this.queued -= length;
  }

  // Fill `out` with Moshi's voice, or silence. Too late: wait until the buffer, now longer, is full again. Too much:
  // leave out quiet parts, and at two seconds whatever is too much, so that a hiccup of the network delays only once.
  play(out) {
    const size = out.length;
    if (!this.playing) {
      if (this.queued < this.target) return;
      this.playing = true;
      this.take(out, size);
      for (let i = 0; i < FADE; i++) out[i] *= i / FADE;
      return;
    }
    if (this.queued < size) {
      const rest = this.queued;
      this.take(out, rest);
      for (let i = 0; i < rest; i++) out[i] *= 1 - i / rest;
      this.playing = false;
      this.underruns++;
      this.target = Math.min(this.target + 0.04 * sampleRate, 0.4 * sampleRate);
      return;
    }
    this.take(out, size);
    while (this.queued > this.target + 0.16 * sampleRate) {
      if (this.queued < 2 * sampleRate && out.some((sample) => Math.abs(sample) > QUIET)) break;
      this.take(out, size);
    }
  }

  process([input], [[out]]) {
    this.play(out);
    if (input.length) this.mic.set(input[0], this.filled);
    this.played.set(out, this.filled);
    this.filled += out.length;
    if (this.filled === this.reportSize) {
      const { mic, played, queued, underruns } = this;
      this.port.postMessage({ mic, played, queuedS: queued / sampleRate, underruns }, [mic.buffer, played.buffer]);
      this.newReport();
    }
    return true;
  }
}

registerProcessor("duplex", Duplex);
