// A reply as it came to be: its draft after each forward, so that it can be shown again at any step.

const MASK = { text: null, step: null, confidence: null };

export class Recording {
  drafts = [];
  text = "";
  isComplete = false;
  finishReason = null;
  usage = null;
  denoising = null;
  #longest = 0; // of the drafts: what the canvas had room for

  /** Take a chunk of the stream. */
  add(chunk) {
    if (chunk.draft) {
      this.#longest = Math.max(this.#longest, chunk.draft.tokens.length);
      while (this.drafts.length < chunk.draft.forwards - 1) this.drafts.push(this.#before(chunk.draft));
      this.drafts.push(chunk.draft);
    }
    for (const choice of chunk.choices) {
      this.text += choice.delta?.content ?? choice.text ?? "";
      this.finishReason ??= choice.finish_reason;
    }
    if (chunk.usage) this.usage = chunk.usage;
    if (chunk.denoising) this.denoising = chunk.denoising;
  }

  /** The draft of the next forward, which a slow reader was not sent, from one that came later: it says what came when. */
  #before(later) {
    const forwards = this.drafts.length + 1;
    const isThere = later.steps.map(step => step === null || step < forwards);
    const only = values => Array.from({ length: this.#longest }, (_, place) => (isThere[place] ? values[place] : null));
    return { forwards, block: later.block, tokens: only(later.tokens), steps: only(later.steps), confidences: only(later.confidences) };
  }

  /** No more is to come. */
  close() {
    this.isComplete = true;
  }

  /** Steps that can be shown, one for each forward; step 0 is the canvas before the first forward. */
  get numSteps() {
    return this.drafts.length;
  }

  /** Places to show: those of the text once it is complete, before that those of the canvas. */
  get numTokens() {
    return this.isComplete ? this.drafts.at(-1)?.tokens.length ?? 0 : this.#longest;
  }

  /** The text of each token as far as it has come, whenever that was: what its place must hold. null: it has not. */
  get words() {
    const words = Array(this.numTokens).fill(null);
    for (const draft of this.drafts)
      for (let place = 0; place < words.length; place++) words[place] = draft.tokens[place] ?? words[place];
    return words;
  }

  /** The blocks [from, to) that were worked on, in order. */
  get blocks() {
    const blocks = new Map(this.drafts.map(({ block }) => [block.join(), block]));
    return [...blocks.values()].sort((a, b) => a[0] - b[0]);
  }

  /**
   * What stands at each place at `step`: {text (null: a mask), step it came from (null: it was given), confidence}, or
   * undefined behind the end of the text; the block that is worked on next (null: none); whether the text has its end, and all its words.
   */
  at(step) {
    const draft = this.drafts[step - 1] ?? this.drafts[0];
    if (!draft) return { tokens: [], block: null, hasEnd: false, isOver: this.isComplete };
    const length = step === 0 ? this.#longest : draft.tokens.length;
    const tokens = Array.from({ length: this.numTokens }, (_, place) => {
      if (place >= length) return undefined;
      const found = { text: draft.tokens[place] ?? null, step: draft.steps[place] ?? null, confidence: draft.confidences[place] ?? null };
      return step === 0 && found.step !== null ? MASK : found;
    });
    const isOver = this.isComplete && step === this.numSteps;
    const hasEnd = length < this.#longest && length <= this.numTokens;
    return { tokens, block: isOver ? null : draft.block, hasEnd, isOver };
  }

  /** Where on the scale of colours a token stands, 0 to 1: by the step that it came from, or by the model's doubt. */
  shade(token, colour) {
    if (colour === "confidence") return 1 - (token.confidence ?? 1);
    return (token.step ?? 0) / Math.max(1, this.numSteps - 1);
  }
}
