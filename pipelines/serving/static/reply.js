// One reply on the page: the picture, the controls that replay it, and what it took.

import { Recording } from "./recording.js";
import { TokenView } from "./tokens.js";

const REPLAY_MS = 4500; // of a whole reply, whatever its steps
const SHORTEST_MS = 30, LONGEST_MS = 180; // of a step
const LIVE_MS = 40; // of a step while more are to come
const GRACE_MS = 350; // a reply that is complete by then is laid out by its own words from the beginning

const calm = matchMedia("(prefers-reduced-motion: reduce)");
const MARKUP = `
  <p class="name" aria-hidden="true" hidden></p>
  <div class="tokens waiting" aria-hidden="true"></div>
  <p class="sr text"></p>
  <div class="player" hidden>
    <button type="button" class="play">Play</button>
    <input type="range" min="0" value="0" step="1" aria-label="Step of the reply">
    <span class="count"></span>
  </div>
  <div class="actions" hidden>
    <button type="button" class="quiet copy">Copy</button>
    <button type="button" class="quiet again">Regenerate</button>
    <button type="button" class="quiet replay">Replay</button>
    <span class="figures"></span>
    <span class="legend" hidden><span class="low"></span><i aria-hidden="true"></i><span class="high"></span></span>
  </div>`;

export class Reply {
  recording = new Recording();
  problem = null;
  #step = 0; // that is shown
  #timer = null;
  #laidOut = null; // {isExact, numTokens, blocks}
  #firstDraft = null; // when it came
  #colour;
  #around;
  #began = performance.now();

  /** `name`: what tells it from the reply beside it; `around`: the texts that it stands between; `onAgain`: asked for another one. */
  constructor({ name, colour, around = ["", ""], onAgain }) {
    this.element = document.createElement("div");
    this.element.className = "reply";
    this.element.setAttribute("role", "group");
    this.element.setAttribute("aria-label", name || "Reply");
    this.element.setAttribute("aria-busy", "true");
    this.element.tabIndex = -1; // the page may put the focus here
    this.element.innerHTML = MARKUP;
    this.#colour = colour;
    this.#around = around;
    const find = selector => this.element.querySelector(selector);
    this.parts = Object.fromEntries(
      ["name", "tokens", "text", "player", "play", "legend", "actions", "copy", "again", "replay", "figures"].map(part => [part, find(`.${part}`)]));
    this.slider = find("input");
    this.count = find(".count");
    this.view = new TokenView(this.parts.tokens);
    this.parts.name.hidden = !name;
    this.parts.name.textContent = name;
    this.slider.addEventListener("input", () => {
      this.pause();
      this.#show(Number(this.slider.value));
    });
    this.parts.play.addEventListener("click", () => (this.#timer ? this.pause() : this.play()));
    this.parts.again.addEventListener("click", onAgain);
    this.parts.replay.addEventListener("click", () => {
      this.element.classList.remove("folded");
      this.play();
      this.parts.play.focus();
    });
    this.parts.copy.addEventListener("click", () => this.#copy());
  }

  /** All of the text, with what it stands between. */
  get text() {
    return this.#around.join(this.recording.text);
  }

  set colour(colour) {
    this.#colour = colour;
    this.#show(this.#step);
  }

  /** Take a chunk of the stream. */
  add(chunk) {
    this.recording.add(chunk);
    if (this.recording.numSteps === 0) return;
    this.#firstDraft ??= performance.now();
    if (!this.#timer && !calm.matches) this.#tick();
  }

  /** No more is to come: the whole text, or why it broke off. */
  close(problem = null) {
    this.problem = problem;
    this.recording.close();
    const { recording, parts } = this;
    this.element.removeAttribute("aria-busy");
    parts.text.textContent = this.text;
    parts.tokens.classList.remove("waiting");
    parts.figures.textContent = problem ? "" : this.#figures();
    parts.actions.hidden = false;
    parts.copy.hidden = !recording.text;
    if (problem) {
      const isStopped = problem.name === "AbortError";
      const note = Object.assign(document.createElement("p"), { className: isStopped ? "note" : "note bad" });
      note.textContent = isStopped ? "Stopped." : problem.message;
      parts.tokens.after(note);
    }
    if (recording.numSteps === 0) return;
    parts.player.hidden = parts.legend.hidden = false;
    this.slider.max = recording.numSteps;
    if (calm.matches) this.#show(recording.numSteps);
    else if (!this.#timer) this.#tick();
  }

  /** Show the steps one after the other, from the beginning where the end is shown. */
  play() {
    if (this.#step >= this.recording.numSteps) this.#show(0);
    this.#tick();
  }

  pause() {
    clearTimeout(this.#timer);
    this.#timer = null;
    this.parts.play.textContent = "Play";
  }

  /** Only the text: another turn has begun. */
  fold() {
    this.pause();
    if (this.recording.numSteps) this.#show(this.recording.numSteps);
    this.parts.again.remove();
    this.element.classList.add("folded");
  }

  #tick() {
    const { recording } = this;
    this.parts.play.textContent = "Pause";
    const isHeld = this.#step === 0 && !recording.isComplete && performance.now() - this.#firstDraft < GRACE_MS;
    if (!isHeld) {
      const behind = recording.numSteps - this.#step;
      if (behind > 0) this.#show(this.#step + (recording.isComplete ? 1 : Math.ceil(behind / 8)));
      else if (recording.isComplete) {
        this.#show(this.#step); // as text, if it was shown to its end before that was known
        return this.pause();
      }
    }
    const pace = recording.isComplete ? Math.min(LONGEST_MS, Math.max(SHORTEST_MS, REPLAY_MS / recording.numSteps)) : LIVE_MS;
    this.#timer = setTimeout(() => this.#tick(), pace);
  }

  #show(step) {
    const { recording } = this;
    if (recording.numSteps === 0) return;
    this.#step = step;
    // What was laid out in cells stays so until it has come to its end: then it becomes text, once.
    const isExact = recording.isComplete && (this.#laidOut === null || this.#laidOut.isExact || step === recording.numSteps);
    const layout = { isExact, numTokens: recording.numTokens, blocks: recording.blocks.join(";") };
    if (JSON.stringify(layout) !== JSON.stringify(this.#laidOut)) {
      this.#laidOut = layout;
      this.view.layOut(recording, !isExact, this.#around);
    }
    this.view.show(recording, step, this.#colour);
    this.slider.value = step;
    this.count.textContent = `step ${step} of ${recording.numSteps}`;
    this.slider.setAttribute("aria-valuetext", [this.count.textContent, ...this.#cameAt(step)].join(": "));
    const [low, high] = this.#colour === "step" ? ["first", "last"] : ["sure", "unsure"];
    this.parts.legend.querySelector(".low").textContent = low;
    this.parts.legend.querySelector(".high").textContent = high;
  }

  /** The words that a step has written, for who does not see them appear. */
  #cameAt(step) {
    const words = this.recording.at(step).tokens.filter(token => token && token.text !== null && token.step === step - 1).map(token => token.text.trim());
    return words.some(word => word) ? [words.filter(word => word).join(", ")] : [];
  }

  #figures() {
    const { usage, denoising } = this.recording;
    const seconds = ((performance.now() - this.#began) / 1000).toFixed(1);
    const count = (number, noun) => `${number} ${noun}${number === 1 ? "" : "s"}`;
    return [
      count(usage.completion_tokens, "token"),
      count(denoising.forwards, "forward"),
      `${denoising.tokens_per_forward.toFixed(1)} tokens per forward`,
      `${seconds} s`,
    ].join(" · ");
  }

  async #copy() {
    const { text } = this;
    try {
      await navigator.clipboard.writeText(text);
    } catch {
      // Browsers have no clipboard for pages over plain HTTP, but from this machine.
      const box = Object.assign(document.createElement("textarea"), { value: text, className: "sr" });
      document.body.append(box);
      box.select();
      document.execCommand("copy");
      box.remove();
      this.parts.copy.focus();
    }
    this.parts.copy.textContent = "Copied";
    setTimeout(() => { this.parts.copy.textContent = "Copy"; }, 1500);
  }
}
