// One conversation over the wire: frames of sound to the server, sound, text and steering back; both sides recorded.

import { FRAME, RATE, Problem, concat, fromPcm16, openAudio, room, toPcm16, wav } from "./audio.js";

const HANDSHAKE = 0;
const AUDIO = 1;
const TEXT = 2;
const LATE_S = 10;
const HANDSHAKE_S = 15;
const RECORDED_S = 3600;
const UNSENT_BYTES = 4 * RATE; // two seconds of sound that wait in this browser
const BEHIND_S = 3; // sound that the server has not answered

export async function fetchInfo(token) {
  let response;
  try {
    response = await fetch("api/info", token ? { headers: { Authorization: `Bearer ${token}` } } : {});
  } catch {
    throw new Problem("The server does not answer. Is it running, and is this machine online?");
  }
  if (response.status === 401) {
    const problem = new Problem(token ? "The server does not know this token." : "This server wants a token.");
    problem.wantsToken = true;
    throw problem;
  }
  const answer = await response.json().catch(() => ({}));
  if (!response.ok) throw new Problem(`The server refuses: ${answer.error ?? response.statusText} (${response.status})`);
  return answer;
}

// SentencePiece falls back to bytes, spelled <0xE2>; words are given on when they are whole.
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
    if (end > 0) this.give(end);
    clearTimeout(this.timer);
    this.timer = setTimeout(() => this.give(this.rest.length), 500);
  }

  give(end) {
    clearTimeout(this.timer);
    const words = this.rest.slice(0, end);
    this.rest = this.rest.slice(end);
    if (words.trim()) this.onWords(words);
  }
}

const BUSY = 1013;
const REFUSED =
  "The server refuses the conversation. If this page comes through a proxy or tunnel, start hf-csm serve with " +
  `--allow-origin ${location.origin}.`;
const ENDINGS = {
  1001: () => "The server is shutting down. The conversation up to here can be downloaded.",
  1006: () => "The connection is lost. The conversation up to here can be downloaded.",
  1008: (reason) => `The server ended the conversation: ${reason || "it does not allow this"}.`,
  1009: () => "The server ended the conversation: a message was too large.",
  1011: () => "The server ended the conversation: it has failed. Its log says more.",
  [BUSY]: (reason) => `The server is ${reason || "busy: try again later"}.`,
};

export class Conversation {
  // `source(index)` gives the user's frames (Int16Array; null: no more); without it the microphone does.
  // Handlers: onStart(), onWords(text), onSteering(message), onComplaint(text), onFrame(frame), onEnd(Problem or null).
  constructor({ query, token, source, ...handlers }) {
    Object.assign(this, { source, handlers, left: [], right: [], sent: 0, received: 0, started: false, ended: false });
    this.query = { ...query, audio: "pcm", events: "1", ...(token && { token }) };
    this.words = new Words((text) => handlers.onWords?.(text));
  }

  async open() {
    const opening = openAudio({
      microphone: !this.source,
      onFrame: (frame) => this.frame(frame),
      onLost: () => this.fail("The microphone is gone. Plug it in and start again."),
    });
    opening.catch(() => null); // it is looked at later
    try {
      await fetchInfo(this.query.token); // a WebSocket that is refused does not say why
      this.audio = await opening;
    } catch (error) {
      opening.then((audio) => audio.close()).catch(() => null);
      return this.end(error instanceof Problem ? error : new Problem(`Sound cannot be opened: ${error.message}`));
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
    this.timer = setTimeout(() => this.fail("The server does not begin. Try again later."), 1000 * HANDSHAKE_S);
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
    if (message.type === "error") this.handlers.onComplaint?.(message.message);
  }

  frame(frame) {
    if (!this.started || this.socket.readyState !== WebSocket.OPEN) return;
    // What neither network nor server keep up with is left out, so that the delay stays bounded.
    const behindS = (this.sent - this.received) / RATE;
    const isStuck = behindS > BEHIND_S || this.socket.bufferedAmount > UNSENT_BYTES;
    const index = this.sent / FRAME;
    const speak = () => toPcm16(frame.mic.map((x, i) => x + room(index)[i])); // a muted microphone gives zeros
    let pcm = this.source ? !isStuck && this.source(index) : speak();
    if (pcm && !isStuck) {
      const message = new Uint8Array(1 + pcm.byteLength);
      message[0] = AUDIO;
      message.set(new Uint8Array(pcm.buffer), 1);
      this.socket.send(message);
      this.sent += FRAME;
    } else if (pcm === null && this.hasHeardAll(frame.queuedS)) return this.end();
    pcm ||= new Int16Array(FRAME); // a question waits for its server
    if (this.left.length * FRAME < RECORDED_S * RATE) {
      this.left.push(pcm);
      this.right.push(toPcm16(frame.played));
    }
    // From the user's sample to Moshi's answer to it in the loudspeaker, without what the devices add.
    const delayS = this.received ? behindS + frame.queuedS : null;
    this.handlers.onFrame?.({ ...frame, pcm, delayS, isStuck });
  }

  // After the last frame: nothing came and nothing was played for half a second, or the server is far too late.
  hasHeardAll(queuedS) {
    this.endedAt ??= this.left.length;
    const progress = this.received - queuedS;
    if (progress !== this.progress) this.quietSince = this.left.length;
    this.progress = progress;
    const seconds = (frames) => (frames * FRAME) / RATE;
    return seconds(this.left.length - this.quietSince) > 0.5 || seconds(this.left.length - this.endedAt) > LATE_S;
  }

  steer(change) {
    if (!this.started || this.socket.readyState !== WebSocket.OPEN) return;
    this.socket.send(JSON.stringify({ type: "steer", ...change }));
  }

  fail(text) {
    this.end(new Problem(text));
  }

  // `problem` is null when the user or the server ended it in good order.
  end(problem = null) {
    if (this.ended) return;
    this.ended = true;
    clearTimeout(this.timer);
    this.words.give(this.words.rest.length);
    this.socket?.close();
    this.audio?.close();
    this.handlers.onEnd?.(problem);
  }

  get durationS() {
    return (this.left.length * FRAME) / RATE;
  }

  // The recording: the user left, Moshi right, as they were heard.
  wav() {
    return wav(concat(this.left), concat(this.right));
  }
}
