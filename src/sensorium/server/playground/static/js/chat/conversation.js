// A conversation: a tree of messages. Editing and trying again add branches; nothing is overwritten.
//
// Message: {id, parent, role, text, created, attachments, answer}. `answer`, of assistants alone, says how
// it was made: {model, finish, usage, metrics, client, reasoning, calls, tokens, error}.

export const VERSION = 1;
export const FORMAT = "sensorium-conversations";
const LIMITS = { conversations: 1000, messages: 5000, text: 4_000_000, attachments: 64, title: 200 };
const ROLES = new Set(["user", "assistant"]);
export const KINDS = ["image", "video", "audio", "document"];
const TYPE = /^[\w.+-]+\/[\w.+-]+$/; // a media type without parameters

let last = 0;

/** Return an id that sorts by time and that no other browser makes. */
export function newId() {
  last = Math.max(Date.now(), last + 1);
  const random = crypto.getRandomValues(new Uint32Array(2));
  return `${last.toString(36)}-${random[0].toString(36)}${random[1].toString(36)}`;
}

export function newConversation(model = "") {
  const now = Date.now();
  return { id: newId(), title: "", created: now, updated: now, model, system: "", messages: {}, leaf: null };
}

/** Add a message below `parent` and make it the end of the branch that is shown. */
export function addMessage(conversation, parent, role, text, attachments = []) {
  const message = { id: newId(), parent, role, text, created: Date.now(), attachments };
  conversation.messages[message.id] = message;
  conversation.leaf = message.id;
  conversation.updated = message.created;
  if (!conversation.title && role === "user") conversation.title = titleOf(message);
  return message;
}

export function titleOf({ text, attachments = [] }) {
  const line = text.trim().split("\n", 1)[0].slice(0, 80);
  return line || attachments[0]?.name?.slice(0, 80) || "";
}

/** Return the messages from the first to the end of the branch that is shown. */
export function path(conversation, leaf = conversation.leaf) {
  const found = [];
  const seen = new Set();
  for (let id = leaf; id && conversation.messages[id] && !seen.has(id); id = conversation.messages[id].parent) {
    seen.add(id);
    found.push(conversation.messages[id]);
  }
  return found.reverse();
}

/** Return the messages that begin where `message` does, oldest first. */
export function siblings(conversation, message) {
  return Object.values(conversation.messages)
    .filter((other) => other.parent === message.parent)
    .sort((a, b) => (a.id < b.id ? -1 : 1));
}

/** Show the branch that goes through `message`, to its newest end. */
export function showBranch(conversation, message) {
  const children = new Map();
  for (const other of Object.values(conversation.messages)) {
    const newest = children.get(other.parent);
    if (!newest || newest.id < other.id) children.set(other.parent, other);
  }
  let end = message;
  const seen = new Set([end.id]);
  for (let next = children.get(end.id); next && !seen.has(next.id); next = children.get(end.id)) {
    seen.add(next.id);
    end = next;
  }
  conversation.leaf = end.id;
}

/** Return the ids of the files that conversations refer to. */
export function fileIds(conversations) {
  const messages = conversations.flatMap((conversation) => Object.values(conversation.messages));
  return new Set(messages.flatMap((message) => message.attachments.map((attachment) => attachment.file)));
}

/**
 * Return the conversations in an exported file, with new ids, and the files in it.
 *
 * What is not in the form is refused with an Error whose message is a sentence; unknown members are left
 * out, so nothing that a file says can reach what the page does not expect.
 */
export function parseExport(text) {
  let data;
  try {
    data = JSON.parse(text);
  } catch {
    throw new Error("The file is no JSON.");
  }
  if (data?.format !== FORMAT) throw new Error("The file is no export of conversations of this page.");
  if (data.version !== VERSION) throw new Error(`The file has version ${String(data.version).slice(0, 20)}; this page reads version ${VERSION}.`);
  const given = Array.isArray(data.conversations) ? data.conversations : [];
  if (given.length > LIMITS.conversations) throw new Error(`The file has more than ${LIMITS.conversations} conversations.`);
  const files = new Map();
  const names = new Map();
  for (const [id, file] of Object.entries(isObject(data.files) ? data.files : {})) {
    const match = /^data:([\w.+-]{1,80}\/[\w.+-]{1,80})(?:;[\w=.+" ,-]{0,80})?;base64,([A-Za-z0-9+/=\s]*)$/.exec(String(file));
    if (!match) continue;
    names.set(id, { id: newId(), type: match[1] });
    files.set(names.get(id).id, { type: match[1], base64: match[2] });
  }
  return { conversations: given.filter(isObject).map((conversation) => parseConversation(conversation, names)), files };
}

function parseConversation(given, names) {
  const conversation = newConversation(string(given.model, 500));
  conversation.title = string(given.title, LIMITS.title);
  conversation.system = string(given.system, LIMITS.text);
  conversation.created = moment(given.created);
  conversation.updated = moment(given.updated);
  const messages = Object.values(isObject(given.messages) ? given.messages : {}).filter((m) => isObject(m) && ROLES.has(m.role));
  if (messages.length > LIMITS.messages) throw new Error(`A conversation of the file has more than ${LIMITS.messages} messages.`);
  messages.sort((a, b) => (String(a.id) < String(b.id) ? -1 : 1));
  const ids = new Map(messages.map((message) => [message.id, newId()]));
  for (const message of messages) {
    const id = ids.get(message.id);
    conversation.messages[id] = {
      id,
      parent: ids.get(message.parent) ?? null,
      role: message.role,
      text: string(message.text, LIMITS.text),
      created: moment(message.created),
      attachments: (Array.isArray(message.attachments) ? message.attachments : []).filter(isObject).slice(0, LIMITS.attachments)
        .map((attachment) => parseAttachment(attachment, names)).filter(Boolean),
      ...(message.role === "assistant" ? { answer: parseAnswer(message.answer) } : {}),
    };
  }
  conversation.leaf = ids.get(given.leaf) ?? messages.map((message) => ids.get(message.id)).at(-1) ?? null;
  return conversation;
}

function parseAttachment(given, names) {
  if (!KINDS.includes(given.kind) || !names.has(given.file)) return null;
  const size = Number.isFinite(given.size) ? given.size : 0;
  const file = names.get(given.file);
  const type = string(given.type, 100);
  return { id: newId(), kind: given.kind, name: string(given.name, 200), type: TYPE.test(type) ? type : file.type, size, file: file.id };
}

function parseAnswer(given) {
  if (!isObject(given)) return {};
  const answer = { model: string(given.model, 500), finish: string(given.finish, 40), reasoning: string(given.reasoning, LIMITS.text) };
  if (isObject(given.error)) answer.error = { message: string(given.error.message, 2000) };
  for (const name of ["usage", "metrics", "client"]) if (isObject(given[name])) answer[name] = plain(given[name], 4);
  if (Array.isArray(given.tokens)) answer.tokens = given.tokens.slice(0, 100_000).map((token) => plain(token, 3)).filter(isObject);
  if (Array.isArray(given.calls)) {
    answer.calls = given.calls.filter(isObject).slice(0, 64)
      .map((call) => ({ name: string(call.name, 200), arguments: string(call.arguments, LIMITS.text) }));
  }
  return answer;
}

/** Return numbers, texts, and lists and objects of them, without anything else. */
function plain(value, depth) {
  if (typeof value === "number" || typeof value === "boolean" || value === null) return value;
  if (typeof value === "string") return value.slice(0, 2000);
  if (depth === 0) return null;
  if (Array.isArray(value)) return value.slice(0, 1000).map((inner) => plain(inner, depth - 1));
  if (!isObject(value)) return null;
  return Object.fromEntries(Object.entries(value).slice(0, 100).filter(([name]) => name !== "__proto__").map(([name, inner]) => [name, plain(inner, depth - 1)]));
}

function isObject(value) {
  return typeof value === "object" && value !== null && !Array.isArray(value);
}

function string(value, most) {
  return typeof value === "string" ? value.slice(0, most) : "";
}

function moment(value) {
  return Number.isFinite(value) && value > 0 && value < 4e15 ? value : Date.now();
}
