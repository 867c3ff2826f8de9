// Text with gaps: each underscore is a token to be written.

import { stream } from "./endpoint.js";

export const GAP = "____";

export const hasGap = text => text.includes("_");

/** The text before the first gap, then the length of each gap and the text behind it. */
const parts = text => text.split(/(_+)/).map((part, place) => (place % 2 ? part.length : part));

/** The texts before the first gap and behind the last. */
export const around = text => [parts(text)[0], parts(text).at(-1)];

/** The chunks of what stands between them. */
export async function* fill({ model, text, values, signal }) {
  const [prompt, length, ...behind] = parts(text);
  const suffix = behind.length === 1 ? behind[0] : behind.filter(part => part !== "");
  yield* stream("v1/completions", { model, prompt, suffix, ...values, max_tokens: length }, signal);
}
