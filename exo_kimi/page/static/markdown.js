// A model's Markdown as elements. Elements are made one by one and texts stay texts: there is no markup to be cleaned.

import { h } from "./dom.js";
import { math } from "./tex.js";

const MOST_DEPTH = 12;

/** Shows texts in an element; blocks that did not change since the last time keep their elements, as an answer grows. */
export class MarkdownView {
  constructor(element, words) {
    this.element = element;
    this.words = words;
    this.sources = [];
  }

  show(text) {
    const blocks = split(text);
    let same = 0;
    while (same < blocks.length && same < this.sources.length && blocks[same] === this.sources[same]) same += 1;
    while (this.element.childNodes.length > same) this.element.lastChild.remove();
    for (const block of blocks.slice(same)) this.element.append(renderBlock(block, this.words, 0));
    this.sources = blocks;
  }
}

const FENCE = /^ {0,3}(`{3,}|~{3,})(.*)$/;
const ITEM = /^( {0,9})([-*+]|\d{1,9}[.)])( +|$)(.*)$/;
const RULE = /^ {0,3}([-*_])( *\1){2,} *$/;
const HEADING = /^ {0,3}(#{1,6})(?: +(.*?))?(?: +#+)? *$/;
const TABLE_RULE = /^ *\|? *:?-+:? *(\| *:?-+:? *)*\|? *$/;

/** The blocks of a text, each as its source. */
function split(text) {
  const lines = text.replace(/\r\n?/g, "\n").split("\n");
  const blocks = [];
  let at = 0;
  while (at < lines.length) {
    if (lines[at].trim() === "") {
      at += 1;
      continue;
    }
    const end = endOfBlock(lines, at);
    blocks.push(lines.slice(at, end).join("\n"));
    at = end;
  }
  return blocks;
}

function endOfBlock(lines, start) {
  const first = lines[start];
  const fence = FENCE.exec(first);
  if (fence) {
    const closing = new RegExp(`^ {0,3}${fence[1][0] === "`" ? "`" : "~"}{${fence[1].length},} *$`);
    const end = lines.findIndex((line, index) => index > start && closing.test(line));
    return end < 0 ? lines.length : end + 1;
  }
  const opened = /^ *(\$\$|\\\[)/.exec(first);
  if (opened) {
    const close = opened[1] === "$$" ? "$$" : "\\]";
    for (let at = start; at < lines.length; at += 1) {
      const text = at === start ? first.slice(opened[0].length) : lines[at];
      if (text.includes(close)) return at + 1;
    }
    return lines.length;
  }
  if (HEADING.test(first) || RULE.test(first)) return start + 1;
  if (ITEM.test(first)) {
    let at = start + 1;
    while (at < lines.length) {
      const blank = lines[at].trim() === "";
      if (blank && !(at + 1 < lines.length && (/^ {2,}\S/.test(lines[at + 1]) || ITEM.test(lines[at + 1])))) break;
      if (!blank && !/^ /.test(lines[at]) && !ITEM.test(lines[at]) && starts(lines, at)) break;
      at += 1;
    }
    return at;
  }
  let at = start + 1;
  const quoted = first.trimStart().startsWith(">");
  while (at < lines.length && lines[at].trim() !== "") {
    if (quoted ? !lines[at].trimStart().startsWith(">") && starts(lines, at) : starts(lines, at)) break;
    at += 1;
  }
  return at;
}

/** Whether a line begins a block of its own in the middle of a paragraph. */
function starts(lines, at) {
  const line = lines[at];
  return FENCE.test(line) || HEADING.test(line) || RULE.test(line) || /^ {0,3}>/.test(line) || /^ {0,3}([-*+]|1[.)]) +\S/.test(line) || /^ *(\$\$|\\\[)/.test(line);
}

function renderBlock(source, words, depth) {
  const lines = source.split("\n");
  const fence = FENCE.exec(lines[0]);
  if (fence) return code(lines, fence, words);
  const formula = /^\s*(?:\$\$([\s\S]*?)(?:\$\$\s*|$)|\\\[([\s\S]*?)(?:\\\]\s*|$))$/.exec(source);
  if (formula) return h("p", { class: "display" }, math(formula[1] ?? formula[2], true));
  const heading = HEADING.exec(lines[0]);
  if (heading) return h(`h${Math.min(6, heading[1].length + 2)}`, {}, inline(heading[2] ?? "", 0));
  if (RULE.test(lines[0])) return h("hr");
  if (depth < MOST_DEPTH && ITEM.test(lines[0])) return list(lines, words, depth);
  if (depth < MOST_DEPTH && lines[0].trimStart().startsWith(">")) {
    const inner = lines.map((line) => line.replace(/^ {0,3}> ?/, "")).join("\n");
    return h("blockquote", {}, split(inner).map((block) => renderBlock(block, words, depth + 1)));
  }
  if (lines.length > 1 && lines[0].includes("|") && TABLE_RULE.test(lines[1]) && lines[1].includes("-")) return table(lines);
  return h("p", {}, inline(source, 0));
}

function code(lines, fence, words) {
  const closed = lines.length > 1 && new RegExp(`^ {0,3}${fence[1][0]}{${fence[1].length},} *$`).test(lines[lines.length - 1]);
  const text = lines.slice(1, closed ? -1 : undefined).join("\n");
  const language = fence[2].trim().split(/\s/)[0].slice(0, 30);
  const copy = h("button", { type: "button", class: "small", onclick: () => copyText(text, copy, words) }, words.copy);
  return h(
    "figure",
    { class: "code" },
    h("figcaption", {}, h("span", {}, language || words.code), copy),
    h("pre", { tabindex: "0", role: "region", "aria-label": language || words.code }, h("code", {}, text)),
  );
}

export async function copyText(text, button, words) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    // Without https a browser has no clipboard for pages, but still copies what is selected.
    const area = h("textarea", { class: "offscreen", value: text });
    document.body.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
  }
  const before = button.textContent;
  button.textContent = words.copied;
  setTimeout(() => (button.textContent = before), 1500);
}

function list(lines, words, depth) {
  const first = ITEM.exec(lines[0]);
  const ordered = /\d/.test(first[2]);
  const base = first[1].length;
  const items = [];
  let loose = false;
  for (const line of lines) {
    const item = ITEM.exec(line);
    if (item && item[1].length <= base + 1 && /\d/.test(item[2]) === ordered) {
      items.push({ indent: item[1].length + item[2].length + 1, lines: [item[4]] });
    } else {
      const { indent, lines: inner } = items[items.length - 1];
      if (line.trim() === "") loose = true;
      inner.push(line.replace(new RegExp(`^ {0,${indent}}`), ""));
    }
  }
  const start = ordered ? Number.parseInt(first[2], 10) : 1;
  return h(
    ordered ? "ol" : "ul",
    { start: start === 1 ? null : start },
    items.map((item) => {
      const blocks = split(item.lines.join("\n"));
      const task = /^\[([ xX])\] /.exec(blocks[0] ?? "");
      if (task) blocks[0] = `${task[1] === " " ? "☐" : "☑"} ${blocks[0].slice(4)}`;
      const nodes = blocks.map((block) => renderBlock(block, words, depth + 1));
      if (!loose && nodes[0]?.tagName === "P") nodes[0] = h("span", {}, ...nodes[0].childNodes);
      return h("li", {}, nodes);
    }),
  );
}

function cells(line) {
  const trimmed = line.trim().replace(/^\|/, "").replace(/(?<!\\)\|$/, "");
  return trimmed.split(/(?<!\\)\|/).map((cell) => cell.trim().replace(/\\\|/g, "|"));
}

function table(lines) {
  const sides = cells(lines[1]).map((cell) => (cell.endsWith(":") ? (cell.startsWith(":") ? "center" : "right") : null));
  const row = (line, tag) => h("tr", {}, cells(line).slice(0, sides.length).map((cell, index) => h(tag, { class: sides[index], scope: tag === "th" ? "col" : null }, inline(cell, 0))));
  return h(
    "div",
    { class: "table", tabindex: "0", role: "region", "aria-label": "table" },
    h("table", {}, h("thead", {}, row(lines[0], "th")), h("tbody", {}, lines.slice(2).filter((line) => line.trim()).map((line) => row(line, "td")))),
  );
}

// Code, formulas and links first: what is inside of them has no other meaning.
const SPECIAL = /(`+)([\s\S]*?[^`])\1(?!`)|\\\(([\s\S]+?)\\\)|\$\$([\s\S]+?)\$\$|\$(?=\S)((?:[^$\n\\]|\\.)+?)(?<=\S)\$(?!\d)|(!?)\[((?:[^[\]\\]|\\.|\[[^\]]*\])*)\]\(\s*<?([^\s<>()]*(?:\([^\s()]*\)[^\s<>()]*)*)>?(?:\s+"[^"]*")?\s*\)|<?(https?:\/\/[^\s<>"'`)\]]+[^\s<>"'`)\].,;:!?])>?|\\([\\`*_{}[\]()#+.!|~$>-])/;
const STYLES = [
  [/\*\*(?=\S)([\s\S]*?\S)\*\*(?!\*)/, "strong"],
  [/(?<![\p{L}\p{N}_])__(?=\S)([\s\S]*?\S)__(?![\p{L}\p{N}_])/u, "strong"],
  [/~~(?=\S)([\s\S]*?\S)~~/, "del"],
  [/\*(?=[^\s*])([\s\S]*?[^\s*])\*(?!\*)/, "em"],
  [/(?<![\p{L}\p{N}_])_(?=[^\s_])([\s\S]*?[^\s_])_(?![\p{L}\p{N}_])/u, "em"],
];

function inline(text, depth) {
  // Placeholders for what is done already, from a part of Unicode that stands for nothing.
  const done = [];
  const keep = (node) => String.fromCharCode(0xe000 + (done.push(node) - 1));
  let rest = text.replace(/[\ue000-\uf8ff]/g, "\ufffd");
  let plain = "";
  for (let found; done.length < 6000 && (found = SPECIAL.exec(rest)); ) {
    plain += rest.slice(0, found.index) + keep(special(found, depth));
    rest = rest.slice(found.index + found[0].length);
  }
  return styled(plain + rest, done, depth);
}

function special(found, depth) {
  const [, , codeText, paren, display, dollar, bang, label, target, address, escaped] = found;
  if (codeText !== undefined) return h("code", {}, codeText.replace(/^ (.*) $/s, "$1").replace(/\n/g, " "));
  const formula = paren ?? display ?? dollar;
  if (formula !== undefined) return math(formula, display !== undefined);
  if (escaped !== undefined) return document.createTextNode(escaped);
  if (address !== undefined) return link(address, [address]);
  // A picture from elsewhere would tell its server who reads: its address is shown instead.
  return link(target, bang ? [label || target] : depth < MOST_DEPTH ? inline(label, depth + 1) : [label]);
}

function link(address, children) {
  let url = null;
  try {
    url = new URL(address);
  } catch {
    // a relative link leads nowhere from here
  }
  if (url === null || !["http:", "https:", "mailto:"].includes(url.protocol)) return h("span", {}, children, ` (${address})`);
  return h("a", { href: url.href, target: "_blank", rel: "noopener noreferrer nofollow", title: url.href }, children);
}

function styled(text, done, depth) {
  if (depth < MOST_DEPTH) {
    for (const [pattern, tag] of STYLES) {
      const found = pattern.exec(text);
      if (!found) continue;
      return [
        ...styled(text.slice(0, found.index), done, depth + 1),
        h(tag, {}, styled(found[1], done, depth + 1)),
        ...styled(text.slice(found.index + found[0].length), done, depth),
      ];
    }
  }
  const nodes = [];
  for (const part of text.split(/([\ue000-\uf8ff]|\n)/)) {
    if (part === "\n") nodes.push(h("br"));
    else if (part.length === 1 && part >= "\ue000" && part <= "\uf8ff") nodes.push(done[part.charCodeAt(0) - 0xe000]);
    else if (part !== "") nodes.push(part);
  }
  return nodes;
}
