// The page: what is asked, with which settings, and where the replies go.

import { Conversation } from "./conversation.js";
import { hasKey, loadFields, loadModel, setKey } from "./endpoint.js";
import { EXAMPLES, facts, play } from "./welcome.js";
import { around, fill, GAP, hasGap } from "./infill.js";
import { Reply } from "./reply.js";
import { Settings } from "./settings.js";

const $ = id => document.getElementById(id);
const talk = $("talk"), text = $("text");
const conversation = new Conversation();
const MODES = {
  chat: { label: "Message", how: "", keys: "Enter sends, Shift+Enter makes a new line, Esc stops.", rows: 1, send: "Send" },
  infill: { label: "Text with gaps", how: "Each _ is a token to be written: ____ is a gap of four.", keys: "Ctrl+Enter fills.", rows: 3, send: "Fill" },
};
const PATIENCE_MS = 2000;
let model = null, settings = null;
let mode = "chat", colour = "step";
let running = null; // an AbortController
let latest = []; // replies of the last turn
let shown = []; // replies of all turns

const element = (name, className, content = "") => Object.assign(document.createElement(name), { className, textContent: content });

// --- A turn ----------------------------------------------------------------------------------------------------------------

/** Put a question onto the page and stream its replies, one for each side. */
async function ask(question, askedIn = mode) {
  for (const reply of shown) reply.fold();
  const turn = element("article", "turn");
  const said = element("p", "said");
  said.append(element("span", "sr", "You: "), question);
  turn.append(said);
  talk.append(turn);
  if (askedIn === "chat") conversation.ask(question);
  await answer(turn, question, askedIn);
}

/** Stream replies into a turn, in the place of those that are there. */
async function answer(turn, question, askedIn) {
  if (askedIn === "chat") conversation.answer(null);
  // What was pressed to ask (an example, Regenerate) goes away.
  const losesFocus = [$("welcome"), turn].some(part => part.contains(document.activeElement));
  $("welcome").hidden = true;
  explain(model.id);
  turn.querySelector(".replies")?.remove();
  turn.querySelector(".trimmed")?.remove();
  const sides = settings.sides;
  const replies = element("div", sides.length > 1 ? "replies two" : "replies");
  turn.append(replies);
  latest = sides.map(side => new Reply({
    name: sides.length > 1 ? `${"AB"[side]}: ${settings.summary(side)}` : "",
    colour,
    around: askedIn === "infill" ? around(question) : undefined,
    onAgain: () => running || answer(turn, question, askedIn),
  }));
  replies.append(...latest.map(reply => reply.element));
  shown = [...shown.filter(reply => reply.element.isConnected), ...latest];
  if (losesFocus) latest[0].element.focus({ preventScroll: true });
  turn.scrollIntoView({ block: "start" });
  const mine = latest;
  running = new AbortController();
  $("send").textContent = "Stop";
  $("status").textContent = "The reply is being written.";
  const signal = running.signal;
  await Promise.all(sides.map(side => receive(latest[side], askedIn === "chat"
    ? conversation.reply({
      model: model.id, system: settings.system, values: settings.values(side), length: settings.defaults.max_tokens, signal,
      onTrim: number => note(turn, number),
    })
    : fill({ model: model.id, text: question, values: settings.values(side), signal }))));
  running = null;
  $("send").textContent = MODES[mode].send;
  if (latest !== mine) { // "New" was pressed meanwhile
    $("status").textContent = "";
    return;
  }
  // Side by side, the talk goes on with the first that has said something.
  if (askedIn === "chat") conversation.answer(latest.map(reply => reply.recording.text).find(said => said) ?? null);
  $("status").textContent = latest.map(reply => reply.problem?.message ?? reply.text).join("\n");
  const locked = latest.find(reply => reply.problem?.code === "invalid_api_key");
  if (!locked) return;
  // The key is no longer one: the question is asked again with the next one.
  turn.append($("ask-key"), $("trouble"));
  await askKey(locked.problem.message, [question, ""].includes(text.value));
  if (latest === mine) answer(turn, question, askedIn);
  else explain(model.id);
}

async function receive(reply, chunks) {
  try {
    for await (const chunk of chunks) reply.add(chunk);
    reply.close();
  } catch (error) {
    reply.close(error);
  }
}

function note(turn, number) {
  const said = turn.querySelector(".trimmed") ?? turn.insertBefore(element("p", "note trimmed"), turn.querySelector(".replies"));
  said.textContent = number === 1 ? "The oldest turn no longer fits and is left out." : `The ${number} oldest turns no longer fit and are left out.`;
  $("status").textContent = said.textContent;
}

// --- What one types --------------------------------------------------------------------------------------------------------

function setMode(next) {
  mode = next;
  const { label, how, keys, rows } = MODES[mode];
  document.body.classList.toggle("infilling", mode === "infill");
  document.querySelector("label[for=text]").textContent = text.placeholder = label;
  $("how").textContent = how;
  document.querySelector(".keys").textContent = keys;
  text.rows = rows;
  $("add-gap").hidden = mode !== "infill";
  if (!running) $("send").textContent = MODES[mode].send;
  document.querySelector(`[name=mode][value=${mode}]`).checked = true;
  grow();
}

function grow() {
  text.style.height = "";
  text.style.height = `${text.scrollHeight + 2}px`;
}

function submit() {
  if (running) return running.abort();
  const question = mode === "chat" ? text.value.trim() : text.value;
  if (!question.trim() || !settings) return;
  if (mode === "infill" && !hasGap(question)) {
    $("how").textContent = $("status").textContent = "There is no gap yet: type _ for each token that is to be written.";
    return;
  }
  if (mode === "chat") text.value = "";
  grow();
  ask(question);
}

$("composer").addEventListener("submit", event => {
  event.preventDefault();
  submit();
});
text.addEventListener("input", grow);
text.addEventListener("keydown", event => {
  const isSend = event.key === "Enter" && !event.isComposing && (mode === "chat" ? !event.shiftKey : event.ctrlKey || event.metaKey);
  if (!isSend) return;
  event.preventDefault();
  if (!running) submit();
});
document.addEventListener("keydown", event => {
  if (event.key === "Escape" && running && !$("settings").open) running.abort();
});
$("add-gap").addEventListener("click", () => {
  text.setRangeText(GAP, text.selectionStart, text.selectionEnd, "end");
  text.focus();
  grow();
});
document.querySelectorAll("[name=mode]").forEach(input => input.addEventListener("change", () => setMode(input.value)));
document.querySelectorAll("[name=colour]").forEach(input => input.addEventListener("change", () => {
  colour = input.value;
  for (const reply of shown) reply.colour = colour;
}));
$("clear").addEventListener("click", () => {
  running?.abort();
  conversation.clear();
  latest = shown = [];
  $("examples").before($("ask-key"), $("trouble"));
  talk.replaceChildren();
  $("welcome").hidden = false;
  text.value = "";
  grow();
  text.focus();
});
$("compare").addEventListener("click", () => {
  const isComparing = $("compare").getAttribute("aria-pressed") !== "true";
  $("compare").setAttribute("aria-pressed", String(isComparing));
  document.body.classList.toggle("comparing", isComparing);
  settings.isComparing = isComparing;
});
$("open-settings").addEventListener("click", () => settings.open());

// --- The beginning ---------------------------------------------------------------------------------------------------------

setMode("chat");
play($("claim").textContent, $("picture"));
text.focus({ preventScroll: true });
$("examples").append(...EXAMPLES.map(({ mode: of, text: example }) => {
  const button = element("button", "", example);
  button.type = "button";
  button.append(element("small", "", of === "chat" ? "Chat" : "Fill gaps"));
  button.addEventListener("click", () => {
    if (running) return;
    setMode(of);
    if (of === "infill") text.value = example;
    grow();
    ask(example);
  });
  return button;
}));

// What needs the model's card.
const later = [$("compare"), $("open-settings"), $("send"), ...$("examples").children];
for (const button of later) button.disabled = true;

/** Say what is served or why that is not known: in the heading, and a reason beside the form for a key, which is there if one is wanted. */
function explain(state, { reason = "", wantsKey = false } = {}) {
  if (!wantsKey && $("ask-key").contains(document.activeElement)) text.focus();
  $("ask-key").hidden = !wantsKey;
  $("model").textContent = state;
  $("trouble").textContent = reason;
  $("trouble").hidden = !reason;
  $("key").setAttribute("aria-invalid", String(Boolean(reason)));
  if ($("status").textContent !== reason) $("status").textContent = reason; // said once, as often as it is found again
}

/** The key that is given next. */
const nextKey = () => new Promise(resolve => {
  $("ask-key").onsubmit = event => {
    event.preventDefault();
    $("key").value = $("key").value.trim();
    if ($("ask-key").reportValidity()) resolve($("key").value);
  };
});

/** Ask for a key, say why the last one was not taken, and go on with the one that is given. */
async function askKey(reason, takesFocus) {
  explain("locked", { reason, wantsKey: true });
  $("key").select();
  if (takesFocus) $("key").focus();
  $("trouble").scrollIntoView({ block: "nearest" }); // from below a phone's keyboard
  setKey(await nextKey());
}

/** The model's card and the fields of a request, as soon as the endpoint is there, takes the key and has started. */
async function learn() {
  for (;;) {
    try {
      const card = await loadModel();
      if (card.defaults) return { card, fields: await loadFields() };
      explain(`${card.id} is starting`);
    } catch (error) {
      if (error.code === "invalid_api_key") {
        await askKey(hasKey() ? error.message : "", !text.value);
        explain("…", { wantsKey: true });
        continue;
      }
      explain("the endpoint is away", { reason: `${error.message}; this page tries again by itself` });
    }
    await new Promise(resolve => setTimeout(resolve, PATIENCE_MS));
  }
}

const { card, fields } = await learn();
model = card;
explain(card.id);
document.title = card.id;
$("facts").append(...facts(card).map(([name, value]) => {
  const pair = document.createElement("div");
  pair.append(element("dt", "", name), element("dd", "", value));
  return pair;
}));
const names = [...new Set([...Object.keys(card.defaults), "seed"])];
const knobs = Object.fromEntries(names.map(name => [name, fields[name]]));
settings = new Settings($("settings"), { fields: knobs, defaults: card.defaults, onChange: () => {} });
for (const button of later) button.disabled = false;
