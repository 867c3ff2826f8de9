// The drawer: every knob that the endpoint says a request may set, with its default and its help in the endpoint's words.

const FIRST = ["max_tokens", "steps", "block_length", "threshold", "temperature", "seed"]; // what most people turn
const SIDES = ["A", "B"];
// What chooses a rule of unmasking and its numbers: a request may ask for one rule.
const OF_RULES = ["remasking", "schedule", "threshold", "factor", "entropy_bound", "error_bound", "leap_threshold", "leap_anchor", "leap_radius",
  "remdm_cap", "p2_eta"];
const OF_DRAWING = ["top_p", "top_k", "min_p", "stratified"]; // mean nothing without a temperature, unless the rule has its own

const element = (name, properties = {}, ...children) => {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
};

/** The schema of a value of the field, null left aside. */
const valueSchema = field => field.anyOf?.find(option => option.type !== "null") ?? field;

/** What the side beside these settings begins with: the same, but that it commits all that it is sure of at once, whatever their rule is. */
export function beside(values, defaults) {
  const isDrawn = (values.temperature ?? defaults.temperature ?? null) !== null;
  const left = [...OF_RULES, ...(isDrawn ? [] : OF_DRAWING)];
  return { ...Object.fromEntries(Object.entries(values).filter(([name]) => !left.includes(name))), threshold: 0.9 };
}

export class Settings {
  system = "";
  #values = [{}, {}]; // of the two sides: {name: value} of what was changed
  #side = 0;
  #isComparing = false;

  /** `fields`: {name: JSON schema} of the knobs; `defaults`: {name: value}, what a request gets that says nothing. */
  constructor(dialog, { fields, defaults, onChange }) {
    this.dialog = dialog;
    this.body = dialog.querySelector("#settings-body");
    Object.assign(this, { fields, defaults, onChange });
    dialog.querySelector("#reset-settings").addEventListener("click", () => this.#reset());
    dialog.querySelector("#close-settings").addEventListener("click", () => dialog.close());
    dialog.addEventListener("click", event => event.target === dialog && dialog.close()); // beside it
    this.#build();
  }

  open() {
    this.dialog.showModal();
  }

  /** Two settings side by side. */
  set isComparing(isComparing) {
    this.#isComparing = isComparing;
    this.#side = 0;
    if (isComparing && !Object.keys(this.#values[1]).length && "threshold" in this.fields)
      this.#values[1] = beside(this.#values[0], this.defaults);
    this.#build();
    this.onChange();
  }

  get sides() {
    return this.#isComparing ? [0, 1] : [0];
  }

  /** What a request of this side sends. */
  values(side) {
    return { ...this.#values[side] };
  }

  /** In a line: what differs from the defaults. */
  summary(side) {
    const changed = Object.entries(this.#values[side]).map(([name, value]) => `${name} ${spell(value)}`);
    return changed.join(", ") || "default settings";
  }

  #reset() {
    this.#values = [{}, {}];
    this.system = "";
    this.#build();
    this.onChange();
  }

  #build() {
    const open = this.body.querySelector("details")?.open ?? false;
    const names = Object.keys(this.fields);
    const first = FIRST.filter(name => names.includes(name));
    const others = names.filter(name => !first.includes(name));
    const more = element("details", { open },
      element("summary", { textContent: `All others (${others.length})` }),
      element("div", {}, ...others.map(name => this.#knob(name))));
    this.body.replaceChildren(
      this.#systemPrompt(),
      ...(this.#isComparing ? [this.#sideChoice()] : []),
      ...first.map(name => this.#knob(name)),
      more);
  }

  #systemPrompt() {
    const input = element("textarea", { id: "system", rows: 2, value: this.system });
    input.setAttribute("aria-describedby", "system-help");
    input.addEventListener("input", () => { this.system = input.value; });
    return element("div", { className: "knob wide" },
      element("label", { htmlFor: "system", textContent: "System prompt" }),
      input,
      element("p", { id: "system-help", className: "help", textContent: "Stands before the conversation. Gaps are filled without it." }));
  }

  #sideChoice() {
    const choice = element("fieldset", { className: "choice" }, element("legend", { className: "sr", textContent: "Settings of" }));
    SIDES.forEach((name, side) => {
      const input = element("input", { type: "radio", name: "side", checked: side === this.#side });
      input.addEventListener("change", () => {
        this.#side = side;
        this.#build();
        this.body.querySelectorAll("[name=side]")[side].focus();
      });
      choice.append(element("label", {}, input, element("span", { textContent: `Side ${name}` })));
    });
    return choice;
  }

  #knob(name) {
    const field = this.fields[name], schema = valueSchema(field), id = `knob-${name}`;
    const input = control(schema, this.defaults[name]);
    input.id = id;
    input.setAttribute("aria-describedby", `${id}-help`);
    const chosen = this.#values[this.#side][name];
    if (chosen !== undefined) input.value = spell(chosen);
    const row = element("div", { className: schema.type === "object" ? "knob wide" : "knob" },
      element("label", { htmlFor: id, textContent: name }),
      input,
      element("p", { id: `${id}-help`, className: "help", textContent: (field.description ?? "").replaceAll("`", "") }));
    row.classList.toggle("changed", chosen !== undefined);
    input.addEventListener("change", () => {
      const value = read(schema, input);
      const values = this.#values[this.#side];
      if (value === undefined) delete values[name];
      else values[name] = value;
      row.classList.toggle("changed", value !== undefined);
      this.onChange();
    });
    return row;
  }
}

/** The input for a value of this schema; empty, it stands for the default, which it shows. */
function control(schema, fallback) {
  const shown = fallback === undefined || fallback === null ? "none" : spell(fallback);
  const options = schema.enum ?? (schema.type === "boolean" ? [true, false] : null);
  if (options) {
    const select = element("select", {}, element("option", { value: "", textContent: `default (${shown})` }));
    select.append(...options.map(option => element("option", { value: spell(option), textContent: spell(option) })));
    return select;
  }
  if (schema.type === "object") return element("textarea", { rows: 2, placeholder: '{"0": "Once"}', spellcheck: false });
  if (schema.type === "integer" || schema.type === "number") {
    const input = element("input", { type: "number", placeholder: shown, step: schema.type === "integer" ? "1" : "any" });
    for (const [limit, name] of [["minimum", "min"], ["maximum", "max"]]) if (schema[limit] !== undefined) input[name] = schema[limit];
    return input;
  }
  return element("input", { type: "text", placeholder: shown, spellcheck: false, autocapitalize: "off" });
}

/** The value in an input; undefined: the default. What is no value of the schema goes out as it is, to be refused by name. */
function read(schema, input) {
  const text = input.value.trim();
  if (text === "" && !input.validity.badInput) return undefined;
  if (schema.type === "string") return text;
  if (/^-?\d+$/.test(text) && !Number.isSafeInteger(Number(text))) return BigInt(text); // a seed, say: no digit is lost
  if (input.type === "number" && text !== "") return input.valueAsNumber; // ".5" is no JSON
  try {
    return JSON.parse(text);
  } catch {
    return text;
  }
}

const spell = value => (["string", "bigint"].includes(typeof value) ? String(value) : JSON.stringify(value));
