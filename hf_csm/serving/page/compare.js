// Comparison: sends the recorded question to two adapters in real time and records both answers.

import { FRAME, RATE, Problem, concat, fromPcm16, rms, room, toPcm16 } from "./audio.js";
import { Conversation } from "./chat.js";

const QUESTION_S = 60;
const LEAD_IN_S = 1; // silence before the question, during which the emotion prefix is forced, as in training
const MIN_QUESTION_S = 0.3;
const RELEASE_S = 5; // the server may need a moment to free the slot of the previous conversation

const frames = (seconds) => Math.round((seconds * RATE) / FRAME);
export const clock = (seconds) => `${Math.floor(seconds / 60)}:${String(Math.floor(seconds % 60)).padStart(2, "0")}`;

// The latest microphone frames, at most one minute.
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

  // Number of frames up to the last one with speech.
  get length() {
    const threshold = Math.max(0.004, 0.1 * this.levels.reduce((a, b) => Math.max(a, b), 0));
    return this.levels.findLastIndex((level) => level > threshold) + 1;
  }

  get durationS() {
    return (this.length * FRAME) / RATE;
  }

  // End of the question, from the start of an answer.
  get endS() {
    return this.durationS + (frames(LEAD_IN_S) * FRAME) / RATE;
  }

  get isLongEnough() {
    return this.durationS > MIN_QUESTION_S;
  }

  // The frames to send: room tone, the question with the recorded silence after it, room tone.
  source(answerS) {
    const [recorded, begin] = [[...this.frames], frames(LEAD_IN_S)];
    const end = begin + this.length + frames(answerS);
    return (index) => (index < end ? (recorded[index - begin] ?? toPcm16(room(index))) : null);
  }
}

// One of the two answers: its settings, transcript and player.
export class Answer {
  constructor(article, name, onPlay) {
    this.onPlay = onPlay;
    article.append(document.getElementById("answer").content.cloneNode(true));
    for (const part of ["adapter", "emotion", "play", "seek", "time", "save", "said"])
      this[part] = article.querySelector(`.${part}`);
    for (const [part, label] of [["adapter", "adapter"], ["emotion", "emotion"], ["seek", "position"]])
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

  // Send the question and record the whole answer; throws a Problem on failure.
  async record({ question, answerS, query, token, onFrame }) {
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
    this.finish(question.endS);
  }

  cancel() {
    this.conversation?.fail("Stopped.");
  }

  finish(endS) {
    const { left, right, durationS } = this.conversation;
    if (!right.length) throw new Problem("The server sent no answer.");
    const [user, moshi] = [left, right].map((side) => fromPcm16(concat(side)));
    this.samples = moshi.map((x, i) => Math.max(-1, Math.min(1, x + 0.5 * user[i])));
    this.level = rms(moshi);
    this.seek.max = durationS;
    this.showTime(Math.max(0, Math.min(endS - 0.5, durationS)));
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
