// The body of a chat request, and the same request as curl, Python and JavaScript.

/** Sampling values that the settings offer: name in the request, label, and the form of the number. */
export const SAMPLING = [
  { name: "temperature", label: "Temperature", min: 0, max: 2, step: 0.05 },
  { name: "top_p", label: "Top p", min: 0, max: 1, step: 0.01 },
  { name: "top_k", label: "Top k", min: -1, max: 100000, step: 1, whole: true },
  { name: "min_p", label: "Min p", min: 0, max: 1, step: 0.01 },
  { name: "max_tokens", label: "Most tokens", min: 1, max: 1000000, step: 1, whole: true },
  { name: "seed", label: "Seed", min: 0, max: 4294967295, step: 1, whole: true },
  { name: "repetition_penalty", label: "Repetition penalty", min: 0.05, max: 2, step: 0.05 },
  { name: "presence_penalty", label: "Presence penalty", min: -2, max: 2, step: 0.1 },
  { name: "frequency_penalty", label: "Frequency penalty", min: -2, max: 2, step: 0.1 },
];
export const TOP_LOGPROBS = 5;

/**
 * Return the body for `messages` (those of the branch, the last one the user's).
 *
 * `source(attachment)` gives the address of a file: a data: URL to send, or a stand-in to show. `param`s
 * of the places of attachments are noted in `places`, if it is given.
 */
export function chatBody({ model, system, messages, settings = {}, logprobs = false, stream = true }, source, places = null) {
  const turns = system.trim() ? [{ role: "system", content: system }] : [];
  const failed = (message) => message?.role === "assistant" && !message.text; // before its first word
  for (const [i, message] of messages.entries()) {
    const isUnanswered = failed(messages[i + 1]) && i + 2 < messages.length;
    if (failed(message) || isUnanswered) continue; // or two turns of the user would stand in a row
    const at = turns.length;
    const parts = message.attachments.map((attachment, index) => {
      places?.set(`messages[${at}].content[${index}]`, attachment.id);
      return partOf(attachment, source(attachment));
    });
    if (parts.length && message.text) parts.push({ type: "text", text: message.text });
    turns.push({ role: message.role, content: parts.length ? parts : message.text });
  }
  const body = { model, messages: turns };
  for (const { name } of SAMPLING) if (Number.isFinite(settings[name])) body[name] = settings[name];
  const stop = (settings.stop ?? "").split("\n").filter(Boolean).map(unescapeStop);
  if (stop.length) body.stop = stop;
  if (logprobs) Object.assign(body, { logprobs: true, top_logprobs: TOP_LOGPROBS });
  if (stream) Object.assign(body, { stream: true, stream_options: { include_usage: true }, return_metrics: true });
  return body;
}

function unescapeStop(text) {
  return text.replace(/\\([nt\\])/g, (_, sign) => ({ n: "\n", t: "\t", "\\": "\\" })[sign]);
}

function partOf(attachment, url) {
  if (attachment.kind === "document") return { type: "file", file: { filename: attachment.name, file_data: url } };
  return { type: `${attachment.kind}_url`, [`${attachment.kind}_url`]: { url } };
}

/** Return the attachment that a place such as `messages[1].content[0].image_url` belongs to. */
export function attachmentAt(places, param) {
  for (const [place, id] of places) {
    if (param === place || param?.startsWith(`${place}.`) || param?.startsWith(`${place}[`)) return id;
  }
  return null;
}

const MARK = "\ue0f7"; // for private use: stands around a file's name in a body that is shown

/** Return the request as code: {curl, python, javascript}. Files are read from the folder they are run in. */
export function snippets(parameters, base, hasKey) {
  const clean = JSON.parse(JSON.stringify(parameters).replaceAll(MARK, "")); // nobody else's text stands for a file
  const body = chatBody({ ...clean, stream: false }, ({ type, name }) => `${MARK}${type}${MARK}${name.split(/[\\/]/).at(-1)}${MARK}`);
  return { curl: curl(body, base, hasKey), python: python(body, base, hasKey), javascript: javascript(body, base, hasKey) };
}

const FILE = new RegExp(`${MARK}([^${MARK}]*)${MARK}([^${MARK}]*)${MARK}`);
const EVERY_FILE = new RegExp(FILE.source, "g");

function curl(body, base, hasKey) {
  const text = JSON.stringify(body, null, 2);
  const key = hasKey ? " \\\n  -H \"Authorization: Bearer $SENSORIUM_API_KEY\"" : "";
  const pieces = text.split(EVERY_FILE); // what the shell would read is escaped in all but the files
  let shown = "";
  for (let i = 0; i < pieces.length; i += 3) {
    shown += unexpanded(pieces[i]);
    if (i + 2 < pieces.length) shown += `data:${unexpanded(pieces[i + 1])};base64,$(base64 -w0 ${shellQuoted(JSON.parse(`"${pieces[i + 2]}"`))})`;
  }
  return `curl ${base}v1/chat/completions \\\n  -H "Content-Type: application/json"${key} \\\n  -d @- <<BODY\n${shown}\nBODY`;
}

function unexpanded(text) {
  return text.replace(/[\\$`]/g, "\\$&");
}

function shellQuoted(text) {
  return `'${text.replaceAll("'", "'\\''")}'`;
}

function python(body, base, hasKey) {
  const { model, messages, ...rest } = body;
  const known = new Set(["temperature", "top_p", "max_tokens", "seed", "presence_penalty", "frequency_penalty", "stop", "logprobs", "top_logprobs"]);
  const extra = Object.fromEntries(Object.entries(rest).filter(([name]) => !known.has(name)));
  const lines = Object.entries(rest).filter(([name]) => known.has(name)).map(([name, value]) => `    ${name}=${pythonValue(value, 1)},`);
  if (Object.keys(extra).length) lines.push(`    extra_body=${pythonValue(extra, 1)},`);
  const files = hasFiles(body);
  return [
    ...(files ? ["import base64", ""] : []),
    ...(hasKey ? ["import os", ""] : []),
    "from openai import OpenAI",
    "",
    ...(files ? ["", "def data_url(media_type, path):", '    with open(path, "rb") as file:', '        return f"data:{media_type};base64,{base64.b64encode(file.read()).decode()}"', "", ""] : []),
    `client = OpenAI(base_url=${JSON.stringify(`${base}v1`)}, api_key=${hasKey ? 'os.environ["SENSORIUM_API_KEY"]' : '"none"'})`,
    "answer = client.chat.completions.create(",
    `    model=${pythonValue(model, 1)},`,
    `    messages=${pythonValue(messages, 1)},`,
    ...lines,
    ")",
    "print(answer.choices[0].message.content)",
  ].join("\n");
}

function pythonValue(value, depth) {
  const pad = "    ".repeat(depth + 1);
  const end = "    ".repeat(depth);
  if (value === null) return "None";
  if (value === true) return "True";
  if (value === false) return "False";
  if (typeof value === "string") {
    const file = FILE.exec(value);
    return file ? `data_url(${JSON.stringify(file[1])}, ${JSON.stringify(file[2])})` : JSON.stringify(value);
  }
  if (Array.isArray(value)) return value.length ? `[\n${value.map((inner) => `${pad}${pythonValue(inner, depth + 1)},\n`).join("")}${end}]` : "[]";
  if (typeof value === "object") return `{\n${Object.entries(value).map(([name, inner]) => `${pad}${JSON.stringify(name)}: ${pythonValue(inner, depth + 1)},\n`).join("")}${end}}`;
  return String(value);
}

function javascript(body, base, hasKey) {
  const files = hasFiles(body);
  const key = hasKey ? "process.env.SENSORIUM_API_KEY" : '"none"';
  return [
    ...(files ? ['import { readFileSync } from "node:fs";'] : []),
    'import OpenAI from "openai";',
    "",
    ...(files ? ["const dataUrl = (type, path) => `data:${type};base64,${readFileSync(path).toString(\"base64\")}`;", ""] : []),
    `const client = new OpenAI({ baseURL: ${JSON.stringify(`${base}v1`)}, apiKey: ${key} });`,
    `const answer = await client.chat.completions.create(${javascriptValue(body, 0)});`,
    "console.log(answer.choices[0].message.content);",
  ].join("\n");
}

function javascriptValue(value, depth) {
  const pad = "  ".repeat(depth + 1);
  const end = "  ".repeat(depth);
  if (typeof value === "string") {
    const file = FILE.exec(value);
    return file ? `dataUrl(${JSON.stringify(file[1])}, ${JSON.stringify(file[2])})` : JSON.stringify(value);
  }
  if (Array.isArray(value)) return value.length ? `[\n${value.map((inner) => `${pad}${javascriptValue(inner, depth + 1)},\n`).join("")}${end}]` : "[]";
  if (value && typeof value === "object") return `{\n${Object.entries(value).map(([name, inner]) => `${pad}${/^\w+$/.test(name) ? name : JSON.stringify(name)}: ${javascriptValue(inner, depth + 1)},\n`).join("")}${end}}`;
  return JSON.stringify(value);
}

function hasFiles(body) {
  return body.messages.some((turn) => Array.isArray(turn.content) && turn.content.some((part) => part.type !== "text"));
}
