"use strict";
const make = (tag, text, kind) => Object.assign(document.createElement(tag), { textContent: text, className: kind || "" });

function say(text) {                    // what stands between ` is code
  return text.split("`").map((part, i) => make(i % 2 ? "code" : "span", part));
}

function kindOf(schema, all) {          // a schema in a few words
  if (schema.$ref) return schema.$ref.split("/").pop();
  // That null stands for nothing goes without saying.
  if (schema.anyOf) return schema.anyOf.filter(option => option.type !== "null").map(option => kindOf(option, all)).join(" or ");
  if (schema.enum) return schema.enum.filter(value => value !== null).map(value => JSON.stringify(value)).join(", ");
  if ("const" in schema) return JSON.stringify(schema.const);
  if (schema.type === "array") return "list of (" + kindOf(schema.items || {}, all) + ")";
  let kind = [].concat(schema.type || "anything").join(" or ");
  const bounds = [["minimum", "≥"], ["exclusiveMinimum", ">"], ["maximum", "≤"], ["exclusiveMaximum", "<"]];
  for (const [name, sign] of bounds) if (name in schema) kind += ` ${sign} ${schema[name].toLocaleString("en")}`;
  return kind;
}

function fields(schema, all, seen) {     // its fields, and those of what they refer to
  const list = document.createElement("dl"), required = schema.required || [];
  // What must be sent comes first, then what is explained, then what only labels a request, then what is refused.
  const rank = ([name, field]) => required.includes(name) ? 0
    : (field.description || "").startsWith("Not supported") ? 3 : field.description || field.$ref ? 1 : 2;
  for (const [name, field] of Object.entries(schema.properties || {}).sort((a, b) => rank(a) - rank(b))) {
    const term = document.createElement("dt");
    term.append(make("code", name), make("span", " " + kindOf(field, all) +
      (required.includes(name) ? ", required" : "") +
      ("default" in field ? ", default " + JSON.stringify(field.default) : ""), "dim"));
    const said = document.createElement("dd");
    said.append(...say(field.description || ""));
    const refs = JSON.stringify(field).match(/#\/components\/schemas\/\w+/g) || [];
    for (const ref of new Set(refs)) {
      const inner = ref.split("/").pop();
      if (!seen.includes(inner)) said.append(fields(all[inner], all, [...seen, inner]));
    }
    list.append(term, said);
  }
  return list;
}

fetch("openapi.json").then(answer => answer.json()).then(api => {
  document.getElementById("title").textContent = document.title = `${api.info.title} ${api.info.version}: routes`;
  document.getElementById("about").textContent = api.info.description + " What is null asks for nothing.";
  const all = api.components.schemas;
  for (const [path, ways] of Object.entries(api.paths)) for (const [way, route] of Object.entries(ways)) {
    const box = document.createElement("details"), head = document.createElement("summary");
    head.append(make("b", way.toUpperCase() + " "), make("code", path), make("span", " ", "dim"));
    head.lastChild.append(...say(route.summary));
    box.append(head);
    const show = (title, content) => {
      const ref = content && content["application/json"] && content["application/json"].schema.$ref;
      if (!ref) return;
      const name = ref.split("/").pop();
      box.append(make("h2", title), fields(all[name], all, [name]));
    };
    show("Body", route.requestBody && route.requestBody.content);
    show("Answer", route.responses["200"].content);
    document.getElementById("routes").append(box);
  }
}).catch(error => { document.getElementById("about").textContent = `The schema cannot be read: ${error.message}.`; });
