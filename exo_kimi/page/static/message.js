// One message as it is shown: text, thoughts, pictures, tool calls, figures, and what can be done with it.

import { fill, h, say } from "./dom.js";
import * as format from "./format.js";
import { MarkdownView, copyText } from "./markdown.js";
import { siblings } from "./tree.js";

export class MessageView {
  /** @param actions `edit(node, text)`, `again(node)`, `goOn(node)`, `choose(node, index)`, `results(node, texts)` */
  constructor(conversation, node, words, actions) {
    this.conversation = conversation;
    this.node = node;
    this.words = words;
    this.actions = actions;
    this.body = h("div", { class: "text" });
    this.markdown = new MarkdownView(this.body, words);
    this.thoughts = null;
    this.calls = h("div", { class: "calls" });
    this.callViews = [];
    this.note = h("p", { class: "note", hidden: true });
    this.foot = h("div", { class: "foot" });
    const who = { user: words.you, assistant: words.model, tool: words.toolResult }[node.role];
    this.head = h("h2", { class: "who" }, who);
    this.element = h("article", { class: `message ${node.role}`, "aria-label": who }, this.head, this.pictures(), this.body, this.calls, this.note, this.foot);
    this.update();
  }

  pictures() {
    const { pictures } = this.node;
    if (!pictures?.length) return null;
    return h("div", { class: "pictures" }, pictures.map((url, index) => h("img", { src: url, alt: `${this.words.picture} ${index + 1}`, loading: "lazy" })));
  }

  /** Show the message as it is now. */
  update() {
    const { node } = this;
    if (node.role === "assistant") this.markdown.show(node.content);
    else if (node.role === "tool") fill(this.body, h("pre", { tabindex: "0", role: "region", "aria-label": this.words.toolResult }, node.content));
    else if (this.body.dataset.shown !== "yes") {
      fill(this.body, h("div", { class: "plain" }, node.content));
      this.body.dataset.shown = "yes";
    }
    this.showThoughts();
    this.showCalls();
    this.showNote();
    this.showFoot();
  }

  showThoughts() {
    const { node, words } = this;
    if (!node.reasoning) return;
    if (this.thoughts === null) {
      this.thoughtText = h("div", { class: "thoughts-text" });
      this.thoughtTitle = h("summary", {}, words.thinking);
      this.thoughts = h("details", { class: "thoughts" }, this.thoughtTitle, this.thoughtText);
      this.body.before(this.thoughts);
    }
    const thinking = node.status === "streaming" && !node.content && !node.calls?.length;
    const time = node.stats?.thought;
    say(this.thoughtTitle, thinking ? `${words.thinking}…` : time === undefined ? words.thought : `${words.thoughtFor} ${format.seconds(time)}`);
    say(this.thoughtText, node.reasoning);
  }

  showCalls() {
    const calls = this.node.calls ?? [];
    calls.forEach((call, index) => {
      if (this.callViews[index] === undefined) {
        const text = h("pre", { tabindex: "0", role: "region", "aria-label": call.name });
        this.callViews[index] = text;
        this.calls.append(h("figure", { class: "call" }, h("figcaption", {}, `${this.words.calls} `, h("strong", {}, call.name)), text));
      }
      say(this.callViews[index], pretty(call.arguments));
    });
    const open = calls.length > 0 && this.node.status === "done" && !this.conversation.children[this.node.id]?.length;
    if (open && !this.results) {
      this.results = this.resultForm(calls);
      this.calls.append(this.results);
    } else if (!open && this.results) {
      this.results.remove();
      this.results = null;
    }
  }

  resultForm(calls) {
    const fields = calls.map((call) => h("textarea", { rows: "2", "aria-label": `${this.words.answerTool}: ${call.name}`, placeholder: `${this.words.answerTool}: ${call.name}` }));
    return h(
      "form",
      {
        class: "results",
        onsubmit: (event) => {
          event.preventDefault();
          this.actions.results(
            this.node,
            fields.map((field) => field.value),
          );
        },
      },
      fields,
      h("button", { type: "submit", class: "primary" }, this.words.sendResult),
    );
  }

  showNote() {
    const { node, words } = this;
    const told = { stopped: words.stopped, cut: words.cut, broken: words.lost, interrupted: words.interrupted, failed: node.error }[node.status];
    const text = [told, ...(node.warnings ?? [])].filter(Boolean).join("\n");
    this.note.hidden = text === "";
    this.note.className = node.status === "failed" || node.status === "broken" ? "note bad" : "note";
    say(this.note, text);
  }

  showFoot() {
    const { node, words } = this;
    if (node.status === "streaming") {
      const text = node.stats?.ttft === undefined ? `${words.waitingServer}…` : "";
      if (this.foot.dataset.state !== `streaming${text}`) fill(this.foot, text ? h("span", { class: "figures" }, text) : null);
      this.foot.dataset.state = `streaming${text}`;
      this.element.setAttribute("aria-busy", "true");
      return;
    }
    this.element.removeAttribute("aria-busy");
    this.foot.dataset.state = "done";
    const { all, index } = siblings(this.conversation, node);
    const button = (text, action, label = text) => h("button", { type: "button", class: "small", onclick: action, "aria-label": label }, text);
    const copy = button(words.copy, () => copyText(node.content, copy, words));
    fill(
      this.foot,
      all.length > 1
        ? h(
            "span",
            { class: "versions" },
            h("button", { type: "button", class: "small", disabled: index === 0, "aria-label": words.previous, onclick: () => this.actions.choose(node, index - 1) }, "‹"),
            `${index + 1}/${all.length}`,
            h("button", { type: "button", class: "small", disabled: index === all.length - 1, "aria-label": words.following, onclick: () => this.actions.choose(node, index + 1) }, "›"),
          )
        : null,
      node.content ? copy : null,
      node.role === "user" ? button(words.edit, () => this.edit()) : null,
      node.role === "assistant" ? button(words.regenerate, () => this.actions.again(node)) : null,
      node.role === "assistant" && ["stopped", "cut", "broken", "interrupted", "failed"].includes(node.status) && node.content && !node.calls?.length
        ? button(words.goOn, () => this.actions.goOn(node))
        : null,
      h("span", { class: "figures" }, figures(node.stats, words)),
    );
  }

  edit() {
    const field = h("textarea", { class: "edit", rows: String(Math.min(12, this.node.content.split("\n").length + 1)), value: this.node.content, "aria-label": this.words.edit });
    const back = () => {
      this.body.dataset.shown = "no";
      this.update();
    };
    fill(
      this.body,
      h(
        "form",
        {
          onsubmit: (event) => {
            event.preventDefault();
            const text = field.value;
            back(); // this version stays as it was
            this.actions.edit(this.node, text);
          },
          onkeydown: (event) => {
            if (event.key === "Escape") back();
          },
        },
        field,
        h("div", { class: "row end" }, h("button", { type: "button", onclick: back }, this.words.cancel), h("button", { type: "submit", class: "primary" }, this.words.save)),
      ),
    );
    field.focus();
  }
}

function figures(stats, words) {
  if (!stats?.tokens) return "";
  const parts = [`${format.count(stats.tokens)} ${words.tokens}`];
  if (stats.speed !== undefined) parts.push(format.speed(stats.speed));
  if (stats.ttft !== undefined) parts.push(`${words.firstToken} ${format.seconds(stats.ttft)}`);
  parts.push(`${words.promptTokens} ${format.count(stats.prompt)}${stats.cached ? `, ${words.cached} ${format.count(stats.cached)}` : ""}`);
  return parts.join(" · ");
}

function pretty(text) {
  try {
    return JSON.stringify(JSON.parse(text), null, 2);
  } catch {
    return text; // still growing
  }
}
