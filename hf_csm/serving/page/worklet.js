// Audio thread: microphone in, Moshi out. One processor handles both, so that recordings of the two sides are aligned.
// All lengths are in samples.

const FADE = 128; // one Web Audio quantum: long enough to avoid clicks
const QUIET = 0.01; // peak below which a quantum may be skipped to catch up

class Duplex extends AudioWorkletProcessor {
  constructor() {
    super();
    this.chunks = []; // Moshi's samples to play, oldest first
    this.offset = 0; // samples of chunks[0] already played
    this.queued = 0;
    this.target = 0.12 * sampleRate; // jitter buffer: samples to queue before playback starts
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

  // Fills `out` with Moshi's audio or silence. After an underrun the jitter buffer grows and is refilled. With too many
  // samples queued, quiet quanta are skipped, and above two seconds any, so that one network stall adds no lasting delay.
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
