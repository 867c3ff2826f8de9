// The empty page: what this is, what one may ask, and what is served.

import { Recording } from "./recording.js";
import { TokenView } from "./tokens.js";

const STEP_MS = 110;

export const EXAMPLES = [
  { mode: "chat", text: "Tell me a story about a dog." },
  { mode: "chat", text: "What does os.path.join do?" },
  { mode: "infill", text: "Once upon a time, there was a ____ who loved to ____." },
];

const number = value => value.toLocaleString("en");

/** [name, value] pairs of what the model's card says. */
export function facts(card) {
  const told = [
    ["Parameters", card.num_parameters && number(card.num_parameters)],
    ["Context", card.context_length && `${number(card.context_length)} tokens`],
    ["Vocabulary", card.vocab_size && `${number(card.vocab_size)} tokens`],
    ["Mask", card.mask_token_id !== undefined && `token ${card.mask_token_id}`],
    ["Block", card.defaults?.block_length && `${number(card.defaults.block_length)} tokens`],
  ];
  return told.filter(([, value]) => value);
}

/** Show how a text comes to be, with a text of our own: a step for two words, in an order that only looks like a model's. */
export function play(text, box) {
  const words = text.match(/\s*\S+/g);
  const order = words.map((word, place) => [Math.sin(1e4 * (place + 1)) % 1 + place / words.length, place]).sort((a, b) => a[0] - b[0]);
  const steps = Array(words.length);
  order.forEach(([, place], rank) => { steps[place] = Math.floor(rank / 2); });
  const recording = new Recording();
  const numSteps = Math.max(...steps) + 1;
  for (let step = 0; step < numSteps; step++) recording.add({
    choices: [],
    draft: {
      forwards: step + 1,
      block: [0, words.length],
      tokens: words.map((word, place) => (steps[place] <= step ? word : null)),
      steps: steps.map(found => (found <= step ? found : null)),
      confidences: words.map(() => 1),
    },
  });
  recording.close();
  const view = new TokenView(box);
  view.layOut(recording, false);
  let step = matchMedia("(prefers-reduced-motion: reduce)").matches ? numSteps : 0;
  const next = () => {
    view.show(recording, step, "step");
    if (step++ < numSteps) setTimeout(next, STEP_MS);
  };
  next();
}
