// The picture of a reply at a step. Each token has its place: that of its word where the word is known (a mask is the
// word, unseen), of one width where it is not yet. So nothing moves when a word comes.

const RETURN = "↵";

/** [space before, what is seen, space behind] of a token's text. */
const cut = text => text.match(/^(\s*)(.*?)(\s*)$/s).slice(1);

const element = (name, className, text = "") => Object.assign(document.createElement(name), { className, textContent: text });

export class TokenView {
  #places = []; // a span for each token
  #words = [];
  #blocks = []; // [[from, to), its span]
  #end = null;

  constructor(box) {
    this.box = box;
  }

  /** Lay out the places of a recording, between the texts that it fills. `asCells`: all of one width, as long as words are to come. */
  layOut(recording, asCells, [before, after] = ["", ""]) {
    this.#words = recording.words;
    this.box.classList.toggle("cells", asCells);
    this.box.classList.remove("waiting");
    this.#blocks = recording.blocks.map(block => [block, element("span", "block")]);
    const parts = [];
    this.#places = this.#words.map((word, place) => {
      const around = this.#blocks.find(([[from, to]]) => from <= place && place < to)?.[1];
      const [span, ...nodes] = asCells ? this.#cell() : this.#place(place > 0 || before ? word : word?.trimStart() ?? null);
      // The space before a block's first word is not a part of its frame.
      if (around && parts.at(-1) !== around) parts.push(...(typeof nodes[0] === "string" ? [nodes.shift()] : []), around);
      if (around) around.append(...nodes);
      else parts.push(...nodes);
      return span;
    });
    this.#end = element("span", "token end", "end");
    this.box.replaceChildren(before, ...parts, ...(asCells ? [] : [this.#end]), after);
  }

  #cell() {
    const cell = element("span", "token masked");
    cell.append(element("span", "fit"));
    return [cell, cell];
  }

  #place(word) {
    const span = element("span", "token masked");
    if (word === null) {
      span.classList.add("unknown");
      return [span, " ", span];
    }
    const [before, seen, behind] = cut(word);
    const isBreak = seen === "" && /\n/.test(word);
    span.textContent = seen || (isBreak ? RETURN : "");
    // A break is made behind its sign, so that the sign has a line to stand on.
    return isBreak ? [span, span, before] : [span, before, span, behind].filter(part => part !== "");
  }

  /** Show the recording as it was at `step`, coloured by "step" or "confidence". */
  show(recording, step, colour) {
    const { tokens, block, hasEnd, isOver } = recording.at(step);
    const asCells = this.box.classList.contains("cells");
    this.#places.forEach((span, place) => {
      const token = tokens[place];
      const isKnown = Boolean(token) && token.text !== null;
      span.classList.toggle("masked", !isKnown);
      span.classList.toggle("known", isKnown && token.step !== null);
      span.classList.toggle("given", isKnown && token.step === null);
      span.classList.toggle("fresh", isKnown && !isOver && token.step === step - 1);
      span.style.visibility = token || !asCells ? "" : "hidden";
      span.title = isKnown ? describe(token) : "";
      if (isKnown) span.style.setProperty("--at", recording.shade(token, colour).toFixed(3));
      if (asCells) return fit(span, isKnown ? token.text : "");
      // A rule that takes tokens back may have had another word here than that which stayed, and whose place this is.
      const isOther = isKnown && token.text !== this.#words[place];
      span.classList.toggle("other", isOther);
      if (isOther) span.dataset.other = token.text.trim();
    });
    for (const [[from], span] of this.#blocks) span.classList.toggle("now", block !== null && from === block[0]);
    this.#end.hidden = recording.finishReason !== "stop";
    this.#end.classList.toggle("masked", !hasEnd);
  }

}

/** A word in a cell, narrowed where it is too long for it. */
function fit(cell, text) {
  const inner = cell.firstChild, seen = cut(text)[1] || (/\n/.test(text) ? RETURN : "");
  if (inner.textContent === seen) return;
  inner.textContent = seen;
  inner.style.transform = "";
  const wide = inner.offsetWidth, room = cell.clientWidth - 4;
  if (wide > room) inner.style.transform = `scaleX(${room / wide})`;
}

function describe({ step, confidence }) {
  if (step === null) return "given";
  return `step ${step + 1}` + (confidence === null ? "" : `, confidence ${Math.round(100 * confidence)} %`);
}
