// The turns of a chat, and which of them still fit into the model's context.

import { EndpointError, stream } from "./endpoint.js";

export class Conversation {
  #turns = []; // {question, answer}; null: the answer is to come, or nothing came of the question

  ask(question) {
    this.#turns.push({ question, answer: null });
  }

  /** The answer of the last turn; null: there is none, and once another question is asked, this one is left aside. */
  answer(text) {
    this.#turns.at(-1).answer = text;
  }

  clear() {
    this.#turns = [];
  }

  /**
   * The chunks of the next answer. While prompt and answer do not fit into the context, the oldest turn is left out;
   * `onTrim` is told how many are. A question that does not even fit alone gets what room there is.
   */
  async *reply({ model, system, values, length, signal, onTrim }) {
    const turns = this.#turns.filter(turn => turn.answer !== null || turn === this.#turns.at(-1));
    let dropped = 0, room = values.max_tokens ?? length;
    for (;;) {
      const messages = turns.slice(dropped).flatMap(({ question, answer }) => [
        { role: "user", content: question },
        ...(answer === null ? [] : [{ role: "assistant", content: answer }]),
      ]);
      if (system.trim()) messages.unshift({ role: "system", content: system });
      const body = { model, messages, ...values, ...(room === undefined ? {} : { max_tokens: room }) };
      try {
        yield* stream("v1/chat/completions", body, signal);
        return;
      } catch (error) {
        if (!(error instanceof EndpointError) || error.code !== "context_length_exceeded") throw error;
        if (dropped < turns.length - 1) onTrim(++dropped);
        else if (room !== values.max_tokens) room = values.max_tokens;
        else throw error;
      }
    }
  }
}
