// The page: what its controls do, and what it says.

import { missing, rms } from "./audio.js";
import { Conversation, fetchInfo } from "./chat.js";
import { Answer, Question, clock } from "./compare.js";

const TOKEN_KEY = "hf-csm-token";
const SILENT_S = 3;
const BASE = "base"; // the voice without adapter
const NEW_LINE_S = 1.5;
const SUSPENDED = "The sound is suspended. Touch the page, or press a key, to go on.";
const CONNECTED = "Connected. Speak at any time.";
const CHOOSING_MS = 100; // arrow keys and sliders pass through what is not meant
const COLOURED = "What was asked for before still colours what Moshi says. Stop and start again to be rid of it.";

const $ = (id) => document.getElementById(id);
const question = new Question();
const answers = ["A", "B"].map((name) => {
  return new Answer($(`answer-${name.toLowerCase()}`).parentElement, name, stopPlaying);
});
let info = null;
let live = null; // the conversation that runs
let last = null; // the one that can be downloaded
let isComparing = false;
let isChosen = false; // before, the server's own choice stands
let current = null; // how Moshi speaks, in the server's words
let pending = null; // what the server has yet to do of what was chosen
let unsent = null; // what was chosen and not sent yet
let sending = null; // the timer that sends it
let wasTold = false; // Moshi was told an emotion in this conversation
let wakeLock = null;

// ---- token: from the fragment, which browsers do not send, or the field; kept for this tab ----

function takeToken() {
  const token = new URLSearchParams(location.hash.slice(1)).get("token");
  if (!token) return;
  sessionStorage.setItem(TOKEN_KEY, token);
  history.replaceState(null, "", location.pathname);
}

const token = () => sessionStorage.getItem(TOKEN_KEY);

$("access").onsubmit = (event) => {
  event.preventDefault();
  sessionStorage.setItem(TOKEN_KEY, $("token").value);
  load();
};

// ---- what the page says ----

function show(id, text) {
  if ($(id).textContent !== text) $(id).textContent = text; // the same again would be read out again
}

const say = (text) => show("status", text);

function complain(problem) {
  $("problem").textContent = problem?.message ?? "";
  if (problem?.wantsToken) {
    $("access").hidden = false;
    $("token").focus();
  }
}

function addWords(words) {
  const log = $("transcript");
  const seconds = live.durationS;
  let line = log.lastElementChild;
  if (!line?.matches(".said") || seconds - line.until > NEW_LINE_S) {
    line = addLine("said", "");
    line.prepend(Object.assign(document.createElement("span"), { className: "when", textContent: clock(seconds) }));
    words = words.trimStart();
  }
  line.until = seconds;
  line.append(words);
  log.scrollTop = log.scrollHeight;
}

function addLine(className, text) {
  const line = document.createElement("p");
  line.className = className;
  line.textContent = text;
  $("transcript").append(line);
  return line;
}

// ---- choosing ----

const chosen = (name) => document.querySelector(`input[name=${name}]:checked`)?.value || null;
const voiceNamed = (name) => info.voices.find((voice) => voice.name === name);
const knows = (voice, emotion) => !emotion || voice.emotions.includes(emotion);
const inWords = ({ voice, emotion, strength }) =>
  [voice, emotion === null ? "no emotion" : emotion, strength?.toFixed(2)].filter((part) => part != null).join(", ");

function fillChoices(id, name, options) {
  $(id).querySelector(".choices").replaceChildren(
    ...options.map(([value, text], i) => {
      const label = document.createElement("label");
      const input = Object.assign(document.createElement("input"), { type: "radio", name, value, checked: i === 0 });
      label.append(input, Object.assign(document.createElement("span"), { textContent: text }));
      return label;
    }),
  );
  $(id).disabled = false;
}

function choose(name, value) {
  for (const input of document.getElementsByName(name)) input.checked = input.value === (value ?? "");
  $("strength").disabled = chosen("voice") === BASE; // there is no adapter to weigh
}

function chooseBoth({ voice, emotion }) {
  choose("voice", voice);
  choose("emotion", emotion);
}

// A voice speaks only the emotions it learnt: choosing another emotion finds a voice for it, and the other way round.
// The base is what others are compared with: going there and back keeps the emotion.
function chooseEmotion() {
  const emotion = chosen("emotion");
  if (!knows(voiceNamed(chosen("voice")), emotion))
    choose("voice", info.voices.find((voice) => knows(voice, emotion)).name);
  if (emotion) fillAnswer(answers[1], chosen("voice"), emotion);
  steer({ voice: chosen("voice"), emotion });
}

function chooseVoice() {
  const voice = chosen("voice");
  if (voice !== BASE && !knows(voiceNamed(voice), chosen("emotion"))) choose("emotion", null);
  choose("voice", voice);
  steer({ voice, emotion: chosen("emotion") });
}

function steer(change) {
  isChosen ||= !("strength" in change);
  if (!live?.started) return;
  if (!("strength" in change)) pending = { ...pending, ...change }; // strength does not wait
  unsent = { ...unsent, ...change };
  clearTimeout(sending);
  sending = setTimeout(send, CHOOSING_MS);
  showSteering();
}

function send(more = {}) {
  clearTimeout(sending);
  live?.steer({ ...unsent, ...more });
  unsent = null;
}

const isTold = ({ voice, emotion }) => Boolean(emotion) && voiceNamed(voice)?.control === "prefix";

function showSteering() {
  const now = current ? `Now: ${inWords(current)}.` : "";
  show("steering", pending ? `${now} At Moshi's next pause: ${inWords(pending)}.` : now);
  if (!pending && document.activeElement === $("now")) document.querySelector("[name=emotion]:checked").focus();
  $("now").hidden = !pending;
  show("coloured", wasTold && current && !isTold(pending ?? current) ? COLOURED : "");
}

function forgetSteering() {
  clearTimeout(sending);
  current = pending = unsent = null;
  wasTold = false;
}

function onSteering(message) {
  if (!current || inWords(message) !== inWords(current)) addLine("mark", inWords(message));
  current = message;
  wasTold ||= isTold(message);
  if (unsent?.voice === undefined) {
    pending = message.pending;
    chooseBoth(pending ?? current);
  }
  showSteering();
}

function onComplaint(text) {
  complain({ message: text });
  pending = null;
  if (current) chooseBoth(current);
  showSteering();
}

$("voices").onchange = chooseVoice;
$("emotions").onchange = chooseEmotion;
$("now").onclick = () => send({ ...pending, ...unsent, now: true });
$("strength").oninput = () => {
  $("strength-value").textContent = Number($("strength").value).toFixed(2);
  steer({ strength: Number($("strength").value) });
};

// ---- talking ----

const query = (voice, emotion) => ({ voice, emotion, strength: $("strength").value });

function talk() {
  if (live) return live.end();
  complain(null);
  answers.forEach((answer) => answer.stop());
  $("transcript").replaceChildren();
  show("asked", "");
  question.clear();
  forgetSteering();
  say("Connecting: your browser may ask for the microphone.");
  let silentS = 0;
  live = new Conversation({
    query: query(isChosen ? chosen("voice") : null, isChosen ? chosen("emotion") : null),
    token: token(),
    onStart: () => {
      const { context } = live.audio;
      context.onstatechange = () => {
        if (live?.audio?.context === context) say(context.state === "running" ? CONNECTED : SUSPENDED);
      };
      context.onstatechange();
      keepAwake();
    },
    onWords: addWords,
    onSteering,
    onComplaint,
    onFrame: (frame) => {
      const level = rms(frame.mic);
      question.add(frame.pcm, level);
      silentS = level > 1e-5 ? 0 : silentS + 0.08;
      $("mic-level").value = Math.min(1, 5 * level);
      $("moshi-level").value = Math.min(1, 5 * rms(frame.played));
      show("time", clock(live.durationS));
      if (frame.delayS !== null) show("delay", `${frame.delayS.toFixed(2)} s`);
      if (frame.isStuck) say("Server or network are too slow: Moshi misses parts of what you say.");
      else if (silentS > SILENT_S) say("Nothing comes from the microphone. Is it muted?");
      else say(CONNECTED);
      showState();
    },
    onEnd: (problem) => {
      if (live.durationS) last = live;
      say(live.started ? `Ended after ${clock(live.durationS)}.` : "Not connected.");
      live = null;
      forgetSteering();
      complain(problem);
      showSteering();
      for (const id of ["mic-level", "moshi-level"]) $(id).value = 0;
      wakeLock?.release();
      showState();
    },
  });
  live.open();
  showState();
}

async function keepAwake() {
  wakeLock = await navigator.wakeLock?.request("screen").catch(() => null);
}

// A phone that rang, or a tab that slept, leaves the sound suspended until the user comes back.
for (const event of ["pointerdown", "keydown", "visibilitychange"])
  document.addEventListener(event, () => live?.audio?.context.resume());

function save(conversation, name) {
  const url = URL.createObjectURL(conversation.wav());
  const stamp = new Date().toISOString().slice(0, 16).replace(":", "-");
  Object.assign(document.createElement("a"), { href: url, download: `${name}-${stamp}.wav` }).click();
  setTimeout(() => URL.revokeObjectURL(url), 60000);
}

// ---- the same question to two voices ----

function stopPlaying(other) {
  answers.filter((answer) => answer !== other).forEach((answer) => answer.stop());
}

function fillAnswer(answer, voice, emotion) {
  const options = (values) => values.map((value) => new Option(value || "none", value));
  answer.voice.replaceChildren(...options(info.voices.map(({ name }) => name)));
  answer.voice.onchange = () => {
    const before = answer.emotion.value;
    answer.emotion.replaceChildren(...options(["", ...voiceNamed(answer.voice.value).emotions]));
    answer.emotion.value = knows(voiceNamed(answer.voice.value), before) ? before : "";
  };
  answer.voice.value = voice;
  answer.voice.onchange();
  answer.emotion.value = emotion ?? "";
}

async function ask() {
  if (isComparing) return answers.forEach((answer) => answer.cancel());
  isComparing = true;
  live?.end();
  complain(null);
  answers.forEach((answer) => answer.clear());
  showState();
  const answerS = Math.max(1, Math.min(60, Number($("answer-s").value) || 8));
  const seed = info.seeds ? Math.floor(Math.random() * 2 ** 31) : null;
  try {
    for (const [i, answer] of answers.entries()) {
      show("asked", `Asking ${"AB"[i]}.`);
      const onFrame = () => {
        $("asking").value = (i + answer.conversation.durationS / (question.askedS + answerS)) / 2;
      };
      const steering = { ...query(answer.voice.value, answer.emotion.value || null), seed };
      await answer.ask({ question, answerS, query: steering, token: token(), onFrame });
    }
    show("asked", "Both have answered.");
  } catch (problem) {
    show("asked", "Not all was asked.");
    complain(problem);
  }
  isComparing = false;
  showState();
}

// ---- state ----

function showState() {
  $("talk").textContent = live ? "Stop" : "Start talking";
  $("talk").classList.toggle("stop", Boolean(live));
  $("talk").disabled = !info || isComparing;
  $("download").disabled = !(live?.durationS || last);
  $("ask").textContent = isComparing ? "Stop asking" : "Ask again";
  $("ask").disabled = !info || !(isComparing || question.isAsked);
  $("forget").disabled = isComparing || !question.frames.length;
  $("asking").hidden = !isComparing;
  const asked = `Your question: ${question.durationS.toFixed(1)} s.`;
  show("question", question.isAsked ? asked : "No question yet: talk first.");
}

async function load() {
  complain(null);
  const lacking = missing();
  if (lacking) {
    say("This browser cannot talk with Moshi.");
    return complain({ message: lacking });
  }
  try {
    info = await fetchInfo(token());
  } catch (problem) {
    say("Not connected.");
    return complain(problem);
  }
  $("access").hidden = true;
  const names = info.voices.map(({ name }) => name).filter((name) => name !== BASE);
  $("model").textContent = [info.base_model.split("/").slice(-2).join("/"), ...names].join(" · ");
  fillChoices("voices", "voice", info.voices.map(({ name }) => [name, name === BASE ? "base (no adapter)" : name]));
  fillChoices("emotions", "emotion", [["", "none"], ...info.emotions.map((emotion) => [emotion, emotion])]);
  $("emotions").hidden = !info.emotions.length;
  for (const [key, value] of Object.entries(info.strength)) $("strength")[{ default: "value" }[key] ?? key] = value;
  choose("voice", info.voices[0].name);
  const base = voiceNamed(BASE) ?? info.voices[0];
  fillAnswer(answers[0], base.name, null);
  fillAnswer(answers[1], info.voices[0].name, info.voices[0].emotions[0]);
  $("seeds").textContent = info.seeds ? "Both get the same random seed." : "Chance differs, too: ask more than once.";
  say(info.free_slots ? "Ready." : `Busy: all ${info.slots} conversations are taken right now.`);
  showState();
}

$("talk").onclick = talk;
$("ask").onclick = ask;
$("forget").onclick = () => {
  question.clear();
  showState();
};
$("download").onclick = () => save(live ?? last, "conversation");
answers.forEach((answer, i) => (answer.save.onclick = () => save(answer.conversation, `answer-${"ab"[i]}`)));
window.addEventListener("hashchange", () => (takeToken(), load()));
takeToken();
load();
