// The same question to two voices: the user's sound is played to each as if it were spoken now, their answers are kept.

import { FRAME, RATE, Problem, concat, fromPcm16, rms, room, toPcm16 } from "./audio.js";
import { Conversation } from "./chat.js";

const QUESTION_S = 60;
const LEAD_IN_S = 1; // quiet before the question, in which Moshi is told the emotion, as in training
const LEAST_S = 0.3;
const RELEASE_S = 5; // a server may take a moment to free the slot of the conversation before

const frames = (seconds) => Math.round((seconds * RATE) / FRAME);
export const clock = (seconds) => `${Math.floor(seconds / 60)}:${String(Math.floor(seconds % 60)).padStart(2, "0")}`;

// What the user said last: frames of the microphone, at most a minute.
export class Question {
  constructor() {
    this.clear();
  }

  clear() {
    this.frames = [];
    this.levels = [];
  }

  add(pcm, level) {
    this.frames.push(pcm);
    this.levels.push(level);
    if (this.frames.length > frames(QUESTION_S)) {
      this.frames.shift();
      this.levels.shift();
    }
  }

  // Frames up to the last one with a voice in it; what follows in `frames` is the room.
  get length() {
    const threshold = Math.max(0.004, 0.1 * this.levels.reduce((a, b) => Math.max(a, b), 0));
    return this.levels.findLastIndex((level) => level > threshold) + 1;
  }

  get durationS() {
    return (this.length * FRAME) / RATE;
  }

  // When it has been asked, from the beginning of an answer.
  get askedS() {
    return this.durationS + (frames(LEAD_IN_S) * FRAME) / RATE;
  }

  get isAsked() {
    return this.durationS > LEAST_S;
  }

  // The frames to send: quiet, the question, the room as recorded, quiet.
  source(answerS) {
    const [recorded, begin] = [[...this.frames], frames(LEAD_IN_S)];
    const end = begin + this.length + frames(answerS);
    return (index) => (index < end ? (recorded[index - begin] ?? toPcm16(room(index))) : null);
  }
}

// One of the two answers: what to ask, what was said, and a player.
export class Answer {
  constructor(article, name, onPlay) {
    this.onPlay = onPlay;
    article.append(document.getElementById("answer").content.cloneNode(true));
    for (const part of ["voice", "emotion", "play", "seek", "time", "save", "said"])
      this[part] = article.querySelector(`.${part}`);
    for (const [part, label] of [["voice", "voice"], ["emotion", "emotion"], ["seek", "position"]])
      this[part].setAttribute("aria-label", `Answer ${name}: ${label}`);
    this.save.setAttribute("aria-label", `Download answer ${name}`);
    this.label = `answer ${name}`;
    this.showPlaying(false);
    this.play.onclick = () => (this.node ? this.stop() : this.start());
    this.seek.oninput = () => {
      const wasPlaying = Boolean(this.node);
      this.stop();
      this.showTime(Number(this.seek.value));
      if (wasPlaying) this.start();
    };
  }

  showPlaying(isPlaying) {
    this.play.textContent = isPlaying ? "Pause" : "Play";
    this.play.setAttribute("aria-label", `${isPlaying ? "Pause" : "Play"} ${this.label}`);
  }

  showTime(seconds) {
    this.seek.value = seconds;
    this.time.textContent = clock(seconds);
    this.seek.setAttribute("aria-valuetext", clock(seconds));
  }

  clear() {
    this.stop();
    this.samples = null;
    this.said.textContent = "";
    for (const control of [this.play, this.seek, this.save]) control.disabled = true;
    this.showTime(0);
  }

  // Ask and wait for the whole answer; throws the Problem that kept it from coming.
  async ask({ question, answerS, query, token, onFrame }) {
    this.clear();
    const deadline = Date.now() + 1000 * RELEASE_S;
    for (;;) {
      const problem = await new Promise((resolve) => {
        this.conversation = new Conversation({
          query,
          token,
          source: question.source(answerS),
          onWords: (words) => (this.said.textContent += words),
          onFrame,
          onEnd: resolve,
        });
        this.conversation.open();
      });
      if (!problem) break;
      if (!this.conversation.isBusy || Date.now() > deadline) throw problem;
      await new Promise((resolve) => setTimeout(resolve, 300));
    }
    this.finish(question.askedS);
  }

  cancel() {
    this.conversation?.fail("Stopped.");
  }

  finish(askedS) {
    const { left, right, durationS } = this.conversation;
    if (!right.length) throw new Problem("The server gave no answer.");
    const [user, moshi] = [left, right].map((side) => fromPcm16(concat(side)));
    this.samples = moshi.map((x, i) => Math.max(-1, Math.min(1, x + 0.5 * user[i])));
    this.level = rms(moshi);
    this.seek.max = durationS;
    this.showTime(Math.max(0, Math.min(askedS - 0.5, durationS)));
    this.said.textContent ||= "(no words)";
    for (const control of [this.play, this.seek, this.save]) control.disabled = false;
  }

  start() {
    this.onPlay(this);
    const context = new AudioContext();
    const buffer = context.createBuffer(1, this.samples.length, RATE);
    buffer.copyToChannel(this.samples, 0);
    this.node = new AudioBufferSourceNode(context, { buffer });
    this.node.connect(context.destination);
    this.node.onended = () => {
      this.stop();
      this.showTime(0);
    };
    const from = Number(this.seek.value) < Number(this.seek.max) - 0.1 ? Number(this.seek.value) : 0;
    this.node.start(0, from);
    this.timer = setInterval(() => this.showTime(from + context.currentTime), 200);
    this.showPlaying(true);
  }

  stop() {
    if (!this.node) return;
    clearInterval(this.timer);
    this.node.onended = null;
    this.node.context.close();
    this.node = null;
    this.showPlaying(false);
  }
}
