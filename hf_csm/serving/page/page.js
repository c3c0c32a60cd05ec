// Controls and messages of the page.

import { unsupportedReason, rms } from "./audio.js";
import { Conversation, fetchInfo } from "./chat.js";
import { Answer, Question, clock } from "./compare.js";

const TOKEN_KEY = "hf-csm-token";
const SILENT_S = 3;
const BASE = "base"; // the base model, without an adapter
const NEW_LINE_S = 1.5;
const SUSPENDED = "Audio is suspended. Tap the page or press a key to resume.";
const CONNECTED = "Connected. Speak at any time.";
const DEBOUNCE_MS = 100; // arrow keys and sliders pass through intermediate values
const PREVIOUS_EMOTION = "The previous emotion still affects the voice. Stop and start again to clear it.";

const $ = (id) => document.getElementById(id);
const question = new Question();
const answers = ["A", "B"].map((name) => {
  return new Answer($(`answer-${name.toLowerCase()}`).parentElement, name, stopPlaying);
});
let info = null;
let live = null; // the running conversation
let last = null; // the last conversation, for download
let isComparing = false;
let isChosen = false; // until the user chooses, the server's default applies
let current = null; // steering in effect, as reported by the server
let pending = null; // steering that waits for a pause
let unsent = null; // changes not sent yet
let sending = null; // timer that sends them
let hadPrefix = false; // an emotion prefix was used in this conversation
let wakeLock = null;

// ---- access token: from the URL fragment (never sent to servers) or the form; kept for this tab ----

function readToken() {
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

// ---- messages ----

function show(id, text) {
  if ($(id).textContent !== text) $(id).textContent = text; // screen readers announce every write
}

const setStatus = (text) => show("status", text);

function showProblem(problem) {
  $("problem").textContent = problem?.message ?? "";
  if (problem?.needsToken) {
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

// ---- steering ----

const chosen = (name) => document.querySelector(`input[name=${name}]:checked`)?.value || null;
const findAdapter = (name) => info.voices.find((voice) => voice.name === name);
const supports = (voice, emotion) => !emotion || voice.emotions.includes(emotion);
const describe = ({ voice, emotion, strength }) =>
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

function select(name, value) {
  for (const input of document.getElementsByName(name)) input.checked = input.value === (value ?? "");
  $("strength").disabled = chosen("voice") === BASE; // no adapter to scale
}

function selectBoth({ voice, emotion }) {
  select("voice", voice);
  select("emotion", emotion);
}

// An adapter supports only the emotions it was trained on: choosing another emotion selects an adapter that supports
// it, and vice versa. The base model is for comparison: switching to it and back keeps the emotion.
function chooseEmotion() {
  const emotion = chosen("emotion");
  if (!supports(findAdapter(chosen("voice")), emotion))
    select("voice", info.voices.find((voice) => supports(voice, emotion)).name);
  if (emotion) fillAnswer(answers[1], chosen("voice"), emotion);
  steer({ voice: chosen("voice"), emotion });
}

function chooseAdapter() {
  const voice = chosen("voice");
  if (voice !== BASE && !supports(findAdapter(voice), chosen("emotion"))) select("emotion", null);
  select("voice", voice);
  steer({ voice, emotion: chosen("emotion") });
}

function steer(change) {
  isChosen ||= !("strength" in change);
  if (!live?.started) return;
  if (!("strength" in change)) pending = { ...pending, ...change }; // strength applies at once
  unsent = { ...unsent, ...change };
  clearTimeout(sending);
  sending = setTimeout(send, DEBOUNCE_MS);
  showSteering();
}

function send(more = {}) {
  clearTimeout(sending);
  live?.steer({ ...unsent, ...more });
  unsent = null;
}

const hasPrefix = ({ voice, emotion }) => Boolean(emotion) && findAdapter(voice)?.control === "prefix";

function showSteering() {
  const now = current ? `Now: ${describe(current)}.` : "";
  show("steering", pending ? `${now} At Moshi's next pause: ${describe(pending)}.` : now);
  if (!pending && document.activeElement === $("now")) document.querySelector("[name=emotion]:checked").focus();
  $("now").hidden = !pending;
  show("previous-emotion", hadPrefix && current && !hasPrefix(pending ?? current) ? PREVIOUS_EMOTION : "");
}

function resetSteering() {
  clearTimeout(sending);
  current = pending = unsent = null;
  hadPrefix = false;
}

function onSteering(message) {
  if (!current || describe(message) !== describe(current)) addLine("mark", describe(message));
  current = message;
  hadPrefix ||= hasPrefix(message);
  if (unsent?.voice === undefined) {
    pending = message.pending;
    selectBoth(pending ?? current);
  }
  showSteering();
}

function onServerError(text) {
  showProblem({ message: text });
  pending = null;
  if (current) selectBoth(current);
  showSteering();
}

$("adapters").onchange = chooseAdapter;
$("emotions").onchange = chooseEmotion;
$("now").onclick = () => send({ ...pending, ...unsent, now: true });
$("strength").oninput = () => {
  $("strength-value").textContent = Number($("strength").value).toFixed(2);
  steer({ strength: Number($("strength").value) });
};

// ---- conversation ----

const query = (voice, emotion) => ({ voice, emotion, strength: $("strength").value });

function toggleConversation() {
  if (live) return live.end();
  showProblem(null);
  answers.forEach((answer) => answer.stop());
  $("transcript").replaceChildren();
  show("comparison", "");
  question.clear();
  resetSteering();
  setStatus("Connecting. Your browser may ask for access to the microphone.");
  let silentS = 0;
  live = new Conversation({
    query: query(isChosen ? chosen("voice") : null, isChosen ? chosen("emotion") : null),
    token: token(),
    onStart: () => {
      const { context } = live.audio;
      context.onstatechange = () => {
        if (live?.audio?.context === context) setStatus(context.state === "running" ? CONNECTED : SUSPENDED);
      };
      context.onstatechange();
      keepAwake();
    },
    onWords: addWords,
    onSteering,
    onError: onServerError,
    onFrame: (frame) => {
      const level = rms(frame.mic);
      question.add(frame.pcm, level);
      silentS = level > 1e-5 ? 0 : silentS + 0.08;
      $("mic-level").value = Math.min(1, 5 * level);
      $("moshi-level").value = Math.min(1, 5 * rms(frame.played));
      show("time", clock(live.durationS));
      if (frame.delayS !== null) show("delay", `${frame.delayS.toFixed(2)} s`);
      if (frame.isStuck) setStatus("The server or the network is too slow: parts of your speech are skipped.");
      else if (silentS > SILENT_S) setStatus("No sound from the microphone. Is it muted?");
      else setStatus(CONNECTED);
      showState();
    },
    onEnd: (problem) => {
      if (live.durationS) last = live;
      setStatus(live.started ? `Ended after ${clock(live.durationS)}.` : "Not connected.");
      live = null;
      resetSteering();
      showProblem(problem);
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

// A phone call or a sleeping tab suspends audio until the next user gesture.
for (const event of ["pointerdown", "keydown", "visibilitychange"])
  document.addEventListener(event, () => live?.audio?.context.resume());

function save(conversation, name) {
  const url = URL.createObjectURL(conversation.wav());
  const stamp = new Date().toISOString().slice(0, 16).replace(":", "-");
  Object.assign(document.createElement("a"), { href: url, download: `${name}-${stamp}.wav` }).click();
  setTimeout(() => URL.revokeObjectURL(url), 60000);
}

// ---- comparison ----

function stopPlaying(other) {
  answers.filter((answer) => answer !== other).forEach((answer) => answer.stop());
}

function fillAnswer(answer, voice, emotion) {
  const options = (values) => values.map((value) => new Option(value || "none", value));
  answer.adapter.replaceChildren(...options(info.voices.map(({ name }) => name)));
  answer.adapter.onchange = () => {
    const before = answer.emotion.value;
    answer.emotion.replaceChildren(...options(["", ...findAdapter(answer.adapter.value).emotions]));
    answer.emotion.value = supports(findAdapter(answer.adapter.value), before) ? before : "";
  };
  answer.adapter.value = voice;
  answer.adapter.onchange();
  answer.emotion.value = emotion ?? "";
}

async function compare() {
  if (isComparing) return answers.forEach((answer) => answer.cancel());
  isComparing = true;
  live?.end();
  showProblem(null);
  answers.forEach((answer) => answer.clear());
  showState();
  const answerS = Math.max(1, Math.min(60, Number($("answer-s").value) || 8));
  const seed = info.seeds ? Math.floor(Math.random() * 2 ** 31) : null;
  try {
    for (const [i, answer] of answers.entries()) {
      show("comparison", `Getting answer ${"AB"[i]}.`);
      const onFrame = () => {
        $("progress").value = (i + answer.conversation.durationS / (question.endS + answerS)) / 2;
      };
      const steering = { ...query(answer.adapter.value, answer.emotion.value || null), seed };
      await answer.record({ question, answerS, query: steering, token: token(), onFrame });
    }
    show("comparison", "Comparison complete.");
  } catch (problem) {
    show("comparison", "Comparison incomplete.");
    showProblem(problem);
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
  $("compare").textContent = isComparing ? "Stop comparing" : "Compare";
  $("compare").disabled = !info || !(isComparing || question.isLongEnough);
  $("new-question").disabled = isComparing || !question.frames.length;
  $("progress").hidden = !isComparing;
  const length = `Your question: ${question.durationS.toFixed(1)} s.`;
  show("question", question.isLongEnough ? length : "No question yet. Start talking first.");
}

async function load() {
  showProblem(null);
  const unsupported = unsupportedReason();
  if (unsupported) {
    setStatus("This browser is not supported.");
    return showProblem({ message: unsupported });
  }
  try {
    info = await fetchInfo(token());
  } catch (problem) {
    setStatus("Not connected.");
    return showProblem(problem);
  }
  $("access").hidden = true;
  const names = info.voices.map(({ name }) => name).filter((name) => name !== BASE);
  $("model").textContent = [info.base_model.split("/").slice(-2).join("/"), ...names].join(" · ");
  fillChoices("adapters", "voice", info.voices.map(({ name }) => [name, name === BASE ? "base (no adapter)" : name]));
  fillChoices("emotions", "emotion", [["", "none"], ...info.emotions.map((emotion) => [emotion, emotion])]);
  $("emotions").hidden = !info.emotions.length;
  for (const [key, value] of Object.entries(info.strength)) $("strength")[{ default: "value" }[key] ?? key] = value;
  select("voice", info.voices[0].name);
  const base = findAdapter(BASE) ?? info.voices[0];
  fillAnswer(answers[0], base.name, null);
  fillAnswer(answers[1], info.voices[0].name, info.voices[0].emotions[0]);
  $("seeds").textContent = info.seeds ? "Both use the same random seed." : "Seeds differ: try several times.";
  setStatus(info.free_slots ? "Ready." : `Busy: all ${info.slots} slots are in use.`);
  showState();
}

$("talk").onclick = toggleConversation;
$("compare").onclick = compare;
$("new-question").onclick = () => {
  question.clear();
  showState();
};
$("download").onclick = () => save(live ?? last, "conversation");
answers.forEach((answer, i) => (answer.save.onclick = () => save(answer.conversation, `answer-${"ab"[i]}`)));
window.addEventListener("hashchange", () => (readToken(), load()));
readToken();
load();
