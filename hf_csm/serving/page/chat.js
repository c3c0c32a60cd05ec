// One conversation over a WebSocket: sends audio frames, receives audio, text and steering, and records both sides.

import { FRAME, RATE, Problem, concat, fromPcm16, openAudio, room, toPcm16, wav } from "./audio.js";

const HANDSHAKE = 0;
const AUDIO = 1;
const TEXT = 2;
const MAX_WAIT_S = 10;
const HANDSHAKE_S = 15;
const RECORDED_S = 3600;
const UNSENT_BYTES = 4 * RATE; // two seconds of audio waiting in the browser
const BEHIND_S = 3; // audio sent but not answered yet

export async function fetchInfo(token) {
  let response;
  try {
    response = await fetch("api/info", token ? { headers: { Authorization: `Bearer ${token}` } } : {});
  } catch {
    throw new Problem("Cannot reach the server. Is it running, and are you online?");
  }
  if (response.status === 401) {
    const problem = new Problem(token ? "The server rejected this token." : "This server requires a token.");
    problem.needsToken = true;
    throw problem;
  }
  const answer = await response.json().catch(() => ({}));
  if (!response.ok) throw new Problem(`Request refused: ${answer.error ?? response.statusText} (${response.status})`);
  return answer;
}

// Joins SentencePiece pieces into whole words. Byte-fallback pieces look like <0xE2>.
export class Words {
  constructor(onWords) {
    this.onWords = onWords;
    this.decoder = new TextDecoder();
    this.rest = "";
  }

  add(piece) {
    const byte = /^<0x([0-9A-F]{2})>$/.exec(piece);
    const bytes = byte ? Uint8Array.of(parseInt(byte[1], 16)) : new TextEncoder().encode(piece);
    this.rest += this.decoder.decode(bytes, { stream: true }).replace(/[\uFFFD\p{Cc}]/gu, "");
    const end = this.rest.lastIndexOf(" ");
    if (end > 0) this.emit(end);
    clearTimeout(this.timer);
    this.timer = setTimeout(() => this.emit(this.rest.length), 500);
  }

  emit(end) {
    clearTimeout(this.timer);
    const words = this.rest.slice(0, end);
    this.rest = this.rest.slice(end);
    if (words.trim()) this.onWords(words);
  }
}

const BUSY = 1013;
const REFUSED =
  "The server refused the connection. If you use a proxy or tunnel, start hf-csm serve with " +
  `--allow-origin ${location.origin}.`;
const ENDINGS = {
  1001: () => "The server is shutting down. You can still download the recording.",
  1006: () => "Connection lost. You can still download the recording.",
  1008: (reason) => `The server ended the conversation: ${reason || "not allowed"}.`,
  1009: () => "The server ended the conversation: a message was too large.",
  1011: () => "The server ended the conversation: internal error. See the server log.",
  [BUSY]: (reason) => `The server is ${reason || "busy; try again later"}.`,
};

export class Conversation {
  // `source(index)` returns the user's frames (Int16Array, null at the end); without it the microphone is used.
  // Handlers: onStart(), onWords(text), onSteering(message), onError(text), onFrame(frame), onEnd(Problem or null).
  constructor({ query, token, source, ...handlers }) {
    Object.assign(this, { source, handlers, left: [], right: [], sent: 0, received: 0, started: false, ended: false });
    this.query = { ...query, audio: "pcm", events: "1", ...(token && { token }) };
    this.words = new Words((text) => handlers.onWords?.(text));
  }

  async open() {
    const opening = openAudio({
      microphone: !this.source,
      onFrame: (frame) => this.frame(frame),
      onLost: () => this.fail("The microphone was disconnected. Plug it in and start again."),
    });
    opening.catch(() => null); // handled below
    try {
      await fetchInfo(this.query.token); // a refused WebSocket gives no reason
      this.audio = await opening;
    } catch (error) {
      opening.then((audio) => audio.close()).catch(() => null);
      return this.end(error instanceof Problem ? error : new Problem(`Cannot open audio: ${error.message}`));
    }
    if (this.ended) return this.audio.close();
    const url = new URL("api/chat", location.href.split("#")[0]);
    url.protocol = url.protocol.replace("http", "ws");
    for (const [name, value] of Object.entries(this.query)) if (value != null) url.searchParams.set(name, value);
    this.socket = new WebSocket(url);
    this.socket.binaryType = "arraybuffer";
    this.socket.onmessage = ({ data }) => (typeof data === "string" ? this.control(data) : this.binary(data));
    this.socket.onclose = ({ code, reason }) => {
      this.isBusy = code === BUSY;
      if (code === 1000) this.end();
      else if (code === 1006 && !this.started) this.fail(REFUSED);
      else this.fail(ENDINGS[code]?.(reason) ?? `The server ended the conversation (${code} ${reason}).`);
    };
    this.timer = setTimeout(() => this.fail("The server did not start the conversation. Try again later."), 1000 * HANDSHAKE_S);
  }

  binary(data) {
    const kind = new Uint8Array(data)[0];
    if (kind === HANDSHAKE) {
      clearTimeout(this.timer);
      this.started = true;
      this.handlers.onStart?.();
    } else if (kind === AUDIO) {
      const samples = fromPcm16(new Int16Array(data.slice(1, data.byteLength - ((data.byteLength - 1) % 2))));
      this.received += samples.length;
      this.audio.push(samples);
    } else if (kind === TEXT) this.words.add(new TextDecoder().decode(data.slice(1)));
  }

  control(data) {
    const message = JSON.parse(data);
    if (message.type === "steering") this.handlers.onSteering?.(message);
    if (message.type === "error") this.handlers.onError?.(message.message);
  }

  frame(frame) {
    if (!this.started || this.socket.readyState !== WebSocket.OPEN) return;
    // Skip frames that network or server cannot keep up with, so that the delay stays bounded.
    const behindS = (this.sent - this.received) / RATE;
    const isStuck = behindS > BEHIND_S || this.socket.bufferedAmount > UNSENT_BYTES;
    const index = this.sent / FRAME;
    const microphone = () => toPcm16(frame.mic.map((x, i) => x + room(index)[i])); // a muted microphone returns zeros
    let pcm = this.source ? !isStuck && this.source(index) : microphone();
    if (pcm && !isStuck) {
      const message = new Uint8Array(1 + pcm.byteLength);
      message[0] = AUDIO;
      message.set(new Uint8Array(pcm.buffer), 1);
      this.socket.send(message);
      this.sent += FRAME;
    } else if (pcm === null && this.isFinished(frame.queuedS)) return this.end();
    pcm ||= new Int16Array(FRAME); // the question waits until the server catches up
    if (this.left.length * FRAME < RECORDED_S * RATE) {
      this.left.push(pcm);
      this.right.push(toPcm16(frame.played));
    }
    // From the user's sample to Moshi's matching output, without the latency of the audio devices.
    const delayS = this.received ? behindS + frame.queuedS : null;
    this.handlers.onFrame?.({ ...frame, pcm, delayS, isStuck });
  }

  // After the last frame: no progress for half a second, or a timeout.
  isFinished(queuedS) {
    this.endedAt ??= this.left.length;
    const progress = this.received - queuedS;
    if (progress !== this.progress) this.quietSince = this.left.length;
    this.progress = progress;
    const seconds = (frames) => (frames * FRAME) / RATE;
    return seconds(this.left.length - this.quietSince) > 0.5 || seconds(this.left.length - this.endedAt) > MAX_WAIT_S;
  }

  steer(change) {
    if (!this.started || this.socket.readyState !== WebSocket.OPEN) return;
    this.socket.send(JSON.stringify({ type: "steer", ...change }));
  }

  fail(text) {
    this.end(new Problem(text));
  }

  // `problem` is null if the user or the server ended the conversation normally.
  end(problem = null) {
    if (this.ended) return;
    this.ended = true;
    clearTimeout(this.timer);
    this.words.emit(this.words.rest.length);
    this.socket?.close();
    this.audio?.close();
    this.handlers.onEnd?.(problem);
  }

  get durationS() {
    return (this.left.length * FRAME) / RATE;
  }

  // The recording: user left, Moshi right, aligned as played.
  wav() {
    return wav(concat(this.left), concat(this.right));
  }
}
