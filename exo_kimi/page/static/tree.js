// A conversation is a tree: an edited question or another answer is a sibling, and `chosen` says which one is shown.

const ROOT = "root";

export function newId() {
  return crypto.randomUUID ? crypto.randomUUID() : Array.from(crypto.getRandomValues(new Uint8Array(16)), (b) => b.toString(16).padStart(2, "0")).join("");
}

export function newConversation() {
  const now = Date.now();
  return { id: newId(), title: "", created: now, updated: now, settings: {}, nodes: {}, children: { [ROOT]: [] }, chosen: {} };
}

/** Add a message below another (null: at the top) and choose it. */
export function add(conversation, parent, message) {
  const node = { id: newId(), parent: parent ?? null, ...message };
  conversation.nodes[node.id] = node;
  const above = parent ?? ROOT;
  (conversation.children[above] ??= []).push(node.id);
  conversation.chosen[above] = node.id;
  conversation.updated = Date.now();
  return node;
}

/** The messages that are shown, first to last. */
export function path(conversation) {
  const nodes = [];
  let at = ROOT;
  for (;;) {
    const below = conversation.children[at] ?? [];
    if (below.length === 0) return nodes;
    at = below.includes(conversation.chosen[at]) ? conversation.chosen[at] : below[below.length - 1];
    nodes.push(conversation.nodes[at]);
  }
}

/** The messages from the first down to this one. */
export function above(conversation, node) {
  const nodes = [];
  for (let at = node; at; at = at.parent ? conversation.nodes[at.parent] : null) nodes.unshift(at);
  return nodes;
}

/** This message and those beside it, and which it is. */
export function siblings(conversation, node) {
  const all = conversation.children[node.parent ?? ROOT];
  return { all, index: all.indexOf(node.id) };
}

export function choose(conversation, node, index) {
  const { all } = siblings(conversation, node);
  conversation.chosen[node.parent ?? ROOT] = all[index];
}

/** The messages as the API takes them. */
export function toMessages(nodes, system) {
  const messages = system ? [{ role: "system", content: system }] : [];
  for (const node of nodes) messages.push(toMessage(node));
  return messages;
}

function toMessage(node) {
  if (node.role === "user") {
    if (!node.pictures?.length) return { role: "user", content: node.content };
    const pictures = node.pictures.map((url) => ({ type: "image_url", image_url: { url } }));
    return { role: "user", content: [...pictures, { type: "text", text: node.content }] };
  }
  if (node.role === "tool") return { role: "tool", tool_call_id: node.callId, content: node.content };
  const message = { role: "assistant", content: node.content };
  if (node.reasoning) message.reasoning_content = node.reasoning;
  if (node.calls?.length) {
    message.tool_calls = node.calls.map(({ id, name, arguments: text }) => ({ id, type: "function", function: { name, arguments: text } }));
  }
  return message;
}

/** A conversation from a file; throws where it is none. */
export function checked(value) {
  const ok =
    value && typeof value.id === "string" && typeof value.nodes === "object" && typeof value.children === "object" && typeof value.chosen === "object";
  if (!ok) throw new Error("not a conversation of exo-kimi");
  const fresh = { ...newConversation(), title: String(value.title ?? ""), settings: value.settings ?? {}, chosen: value.chosen, children: value.children };
  for (const [id, node] of Object.entries(value.nodes)) {
    if (!["user", "assistant", "tool"].includes(node.role)) throw new Error("not a conversation of exo-kimi");
    fresh.nodes[id] = {
      ...node,
      id,
      content: String(node.content ?? ""),
      pictures: (node.pictures ?? []).filter((url) => /^data:image\/[a-z+.-]+;base64,/.test(url)),
    };
  }
  for (const ids of Object.values(fresh.children)) if (!ids.every((id) => id in fresh.nodes)) throw new Error("not a conversation of exo-kimi");
  return fresh;
}
