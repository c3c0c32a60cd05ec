// Microphone, player, resampling, WAV. Outside this file audio is 24 kHz mono in frames of 80 ms.

export const RATE = 24000;
export const FRAME = 1920;

// An error whose message is shown to the user.
export class Problem extends Error {}

// Streaming resampler: windowed sinc, -80 dB above the lower Nyquist frequency. The result does not depend on chunk
// boundaries and is delayed by `delay` input samples.
export class Resampler {
  constructor(from, to) {
    const divisor = (a, b) => (b ? divisor(b, a % b) : a);
    const common = divisor(from, to);
    this.up = to / common;
    this.down = from / common;
    this.phase = 0; // of the next output sample, in 1/up of an input sample
    if (from === to) return;
    const scale = Math.min(1, to / from);
    const half = Math.ceil(32 / scale); // taps on each side
    const cutoff = 0.92 * scale; // of the input's Nyquist frequency: the transition ends at `scale`
    const bessel = (x, term = 1, k = 1) => (term < 1e-10 ? term : term + bessel(x, term * (x / 2 / k) ** 2, k + 1));
    this.delay = half;
    this.taps = Array.from({ length: this.up }, (_, phase) => {
      const filter = new Float32Array(2 * half + 1);
      for (let i = 0; i < filter.length; i++) {
        const t = i - half - phase / this.up;
        const window = Math.abs(t) < half ? bessel(8 * Math.sqrt(1 - (t / half) ** 2)) / bessel(8) : 0;
        filter[i] = window * (t ? Math.sin(Math.PI * cutoff * t) / (Math.PI * t) : cutoff);
      }
      return filter;
    });
    this.history = new Float32Array(2 * half);
  }

  process(input) {
    if (this.up === this.down) return input;
    const signal = new Float32Array(this.history.length + input.length);
    signal.set(this.history);
    signal.set(input, this.history.length);
    const output = [];
    for (; this.phase < input.length * this.up; this.phase += this.down) {
      const start = Math.floor(this.phase / this.up);
      const filter = this.taps[this.phase % this.up];
      let sum = 0;
      for (let i = 0; i < filter.length; i++) sum += filter[i] * signal[start + i];
      output.push(sum);
    }
    this.phase -= input.length * this.up;
    this.history = signal.slice(input.length);
    return Float32Array.from(output);
  }
}

export function toPcm16(samples) {
  return Int16Array.from(samples, (x) => Math.round(Math.max(-1, Math.min(1, x)) * 32767));
}

export function fromPcm16(pcm) {
  return Float32Array.from(pcm, (x) => x / 32768);
}

// Frames of inaudible noise, deterministic by index: the models were not trained on digital silence.
const noise = () => Float32Array.from({ length: FRAME }, () => (6 * Math.random() - 3) / 32768);
const ROOM = Array.from({ length: 16 }, noise);
export const room = (index) => ROOM[index % ROOM.length];

export function rms(samples) {
  return Math.sqrt(samples.reduce((sum, x) => sum + x * x, 0) / Math.max(1, samples.length));
}

export function concat(chunks) {
  const all = new Int16Array(chunks.reduce((sum, chunk) => sum + chunk.length, 0));
  chunks.reduce((offset, chunk) => (all.set(chunk, offset), offset + chunk.length), 0);
  return all;
}

// Returns a stereo WAV file from two Int16Arrays of the same length.
export function wav(left, right) {
  const bytes = 4 * left.length;
  const view = new DataView(new ArrayBuffer(44 + bytes));
  const text = (offset, value) => [...value].forEach((c, i) => view.setUint8(offset + i, c.charCodeAt(0)));
  text(0, "RIFF");
  view.setUint32(4, 36 + bytes, true);
  text(8, "WAVEfmt ");
  view.setUint32(16, 16, true); // size of the format
  view.setUint16(20, 1, true); // PCM
  view.setUint16(22, 2, true); // channels
  view.setUint32(24, RATE, true);
  view.setUint32(28, 4 * RATE, true); // bytes a second
  view.setUint16(32, 4, true); // bytes of both channels' sample
  view.setUint16(34, 16, true); // bits
  text(36, "data");
  view.setUint32(40, bytes, true);
  for (let i = 0; i < left.length; i++) {
    view.setInt16(44 + 4 * i, left[i], true);
    view.setInt16(46 + 4 * i, right[i], true);
  }
  return new Blob([view], { type: "audio/wav" });
}

// Returns why this browser or address is not supported, or null.
export function unsupportedReason() {
  const port = location.port || 80;
  if (!("WebSocket" in window)) return "This browser does not support WebSocket. Use a current Chrome, Edge, Firefox or Safari.";
  if (!window.isSecureContext)
    return (
      "Browsers allow the microphone only on https:// and localhost pages, " +
      `and this page is at ${location.origin}. Start hf-csm serve with --ssl and a certificate, or forward its ` +
      `port to your machine (ssh -L ${port}:localhost:${port} ${location.hostname}) and open http://localhost:${port}/.`
    );
  if (!window.AudioContext || !window.AudioWorkletNode)
    return "This browser does not support AudioWorklet. Use a current Chrome, Edge, Firefox or Safari.";
  if (!navigator.mediaDevices?.getUserMedia)
    return "This browser does not support microphone access. Use a current Chrome, Edge, Firefox or Safari.";
  return null;
}

const DENIALS = {
  NotAllowedError:
    "Microphone access is blocked. Allow it for this page (icon in the address bar) and in the system settings, then " +
    "start again.",
  NotFoundError: "No microphone found. Connect one or select one in the system settings, then start again.",
  NotReadableError: "The microphone is not available: another program may be using it. Close that program and start again.",
};

async function openMicrophone() {
  try {
    return await navigator.mediaDevices.getUserMedia({
      audio: { channelCount: 1, echoCancellation: true, noiseSuppression: true, autoGainControl: true },
    });
  } catch (error) {
    throw new Problem(DENIALS[error.name] ?? `Cannot open the microphone: ${error.message}`);
  }
}

// Opens the player and, optionally, the microphone. Call it from a user gesture: phones do not start audio otherwise.
// `onFrame({mic, played, queuedS, underruns})` receives 80 ms of each side (Float32Array); `onLost()` is called when the
// microphone is disconnected.
export async function openAudio({ microphone, onFrame, onLost }) {
  let context = new AudioContext({ sampleRate: RATE, latencyHint: "interactive" });
  context.resume();
  let stream = null;
  const close = () => {
    stream?.getTracks().forEach((track) => track.stop());
    if (context.state !== "closed") context.close();
  };
  try {
    let source = null;
    if (microphone) {
      stream = await openMicrophone();
      try {
        source = context.createMediaStreamSource(stream);
      } catch {
        context.close(); // Firefox cannot connect a microphone to a context of a different sample rate
        context = new AudioContext({ latencyHint: "interactive" });
        source = context.createMediaStreamSource(stream);
      }
      stream.getAudioTracks()[0].onended = onLost;
    }
    await context.audioWorklet.addModule("worklet.js");
    const mono = { outputChannelCount: [1], channelCount: 1, channelCountMode: "explicit" };
    const node = new AudioWorkletNode(context, "duplex", mono);
    const [micDown, playedDown] = [0, 1].map(() => new Resampler(context.sampleRate, RATE));
    const up = new Resampler(RATE, context.sampleRate);
    let [mic, played] = [new Float32Array(0), new Float32Array(0)];
    const join = (a, b) => {
      const both = new Float32Array(a.length + b.length);
      both.set(a);
      both.set(b, a.length);
      return both;
    };
    node.port.onmessage = ({ data }) => {
      mic = join(mic, micDown.process(data.mic));
      played = join(played, playedDown.process(data.played));
      for (; mic.length >= FRAME; mic = mic.slice(FRAME), played = played.slice(FRAME))
        onFrame({ ...data, mic: mic.slice(0, FRAME), played: played.slice(0, FRAME) });
    };
    source?.connect(node);
    node.connect(context.destination);
    return { context, close, push: (samples) => node.port.postMessage(up.process(samples)) };
  } catch (error) {
    close();
    throw error;
  }
}
