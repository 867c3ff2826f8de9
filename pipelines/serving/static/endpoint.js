// The endpoint's HTTP side: what is served, and replies as they come.

/** A refusal or failure in the endpoint's words. `code` and `param` are OpenAI's. */
export class EndpointError extends Error {
  constructor({ message, code = null, param = null }) {
    super(message);
    Object.assign(this, { code, param });
  }
}

const FOREIGN = /[^\x21-\x7e]/u; // to an API key, as the endpoint has them

let key = sessionStorage.getItem("api-key");

/** From now on, requests carry this API key. */
export function setKey(given) {
  key = given;
}

/** Whether they carry one. */
export const hasKey = () => Boolean(key);

/** Throws EndpointError for a key that cannot be sent: one was pasted with something that is not seen, say. */
function checkKey() {
  const foreign = key?.match(FOREIGN);
  if (!foreign) return;
  const code = foreign[0].codePointAt(0).toString(16).toUpperCase().padStart(4, "0");
  const message = `character ${foreign.index + 1} of this API key is U+${code}, which no key has: copy the key again`;
  throw new EndpointError({ message, code: "invalid_api_key" });
}

/** The endpoint's answer to a request. Throws EndpointError for a refusal. */
async function ask(path, options = {}) {
  checkKey();
  const authorization = key ? { Authorization: `Bearer ${key}` } : {};
  const response = await fetch(path, { ...options, headers: { ...options.headers, ...authorization } });
  if (response.ok) {
    // The key has been found good: it outlives a reload of this tab.
    if (key) sessionStorage.setItem("api-key", key);
    return response;
  }
  const answer = await response.json().catch(() => ({}));
  throw new EndpointError({ message: `the endpoint answers with status ${response.status}`, ...answer.error });
}

const readJson = async path => (await ask(path)).json();

/** The card of the model that is served: its name, and what else the endpoint says of it. */
export const loadModel = async () => (await readJson("v1/models")).data[0];

/** {name: JSON schema} of the fields of a chat request. */
export async function loadFields() {
  const { paths, components } = await readJson("openapi.json");
  const { $ref } = paths["/v1/chat/completions"].post.requestBody.content["application/json"].schema;
  return components.schemas[$ref.split("/").at(-1)].properties;
}

/** A body as JSON. An integer that no number holds is a bigint, which JSON.stringify does not take. */
const spell = body =>
  `{${Object.entries(body).map(([name, value]) => `"${name}":${typeof value === "bigint" ? value : JSON.stringify(value)}`).join()}}`;

/** The chunks of a streamed reply. Throws EndpointError for a refusal, also one in the stream's middle. */
export async function* stream(path, body, signal) {
  const response = await ask(path, {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: spell({ ...body, stream: true, stream_options: { include_usage: true, include_drafts: true } }),
    signal,
  });
  let rest = "";
  for await (const text of pieces(response.body)) {
    const events = (rest + text).split("\n\n");
    rest = events.pop();
    for (const event of events) {
      const data = event.split("\n").find(line => line.startsWith("data: "))?.slice(6);
      if (data === undefined || data === "[DONE]") continue;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new EndpointError(chunk.error);
      yield chunk;
    }
  }
}

async function* pieces(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    yield value;
  }
}
