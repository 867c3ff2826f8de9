// Text with gaps: each underscore is a token to be written.

import { stream } from "./endpoint.js";

export const GAP = "____";

export const hasGap = text => text.includes("_");

/** The texts before the first gap and behind the last. */
export const around = text => [text.slice(0, text.indexOf("_")), text.slice(text.lastIndexOf("_") + 1)];

/** The chunks of what stands between them. */
export async function* fill({ model, text, values, signal }) {
  const [prompt, suffix] = around(text);
  const length = text.length - prompt.length - suffix.length;
  yield* stream("v1/completions", { model, prompt, suffix, ...values, max_tokens: length }, signal);
}
