// The chat: conversations at the side, their messages, and the field to ask.

import { stream } from "./answer.js";
import { download, fill, h } from "./dom.js";
import { MessageView } from "./message.js";
import { editSettings, toRequest } from "./settings.js";
import * as store from "./store.js";
import { above, add, checked, choose, newConversation, path, toMessages } from "./tree.js";

const SAVE_MS = 400;
const NAME = "exo-kimi.conversation";
const LIVE = "exo-kimi.live"; // answers that were being made when the page went away

export async function open(main, page) {
  const view = new ChatView(main, page);
  await view.start();
  return () => view.leave();
}

class ChatView {
  constructor(main, page) {
    this.page = page;
    this.words = page.words;
    this.main = main;
    this.running = new Map(); // id of a conversation to what stops its answer
    this.views = new Map();
    this.pictures = [];
    this.saving = new Map();
    this.frame = null;
  }

  async start() {
    this.conversations = await store.all();
    this.build();
    this.takeLive();
    for (const conversation of this.conversations) {
      for (const node of Object.values(conversation.nodes)) if (node.status === "streaming") node.status = "interrupted";
    }
    const last = sessionStorage.getItem(NAME);
    this.select(this.conversations.find(({ id }) => id === last) ?? this.conversations[0] ?? this.fresh());
    addEventListener("pagehide", (this.onHide = () => this.keepLive()));
    this.field.focus();
  }

  leave() {
    removeEventListener("pagehide", this.onHide);
    for (const controller of this.running.values()) controller.abort();
  }

  build() {
    const { words, page } = this;
    this.list = h("ul", { class: "list" });
    this.file = h("input", { type: "file", accept: ".json,application/json", hidden: true, onchange: () => void this.importFile() });
    this.log = h("div", { class: "log", role: "region", "aria-label": words.chat, tabindex: "0" });
    this.field = h("textarea", { rows: "1", placeholder: words.ask, "aria-label": words.ask, onkeydown: (event) => this.onKey(event), oninput: () => this.grow(), onpaste: (event) => this.onPaste(event) });
    this.thumbs = h("div", { class: "pictures" });
    this.pick = h("input", { type: "file", accept: "image/*", multiple: true, hidden: true, onchange: () => void this.attach([...this.pick.files]) });
    this.sendButton = h("button", { type: "submit", class: "primary" }, words.send);
    this.stopButton = h("button", { type: "button", class: "danger", onclick: () => this.stop() }, words.stop);
    const composer = h(
      "form",
      {
        class: "composer",
        onsubmit: (event) => {
          event.preventDefault();
          this.send();
        },
      },
      this.thumbs,
      this.field,
      h(
        "div",
        { class: "row" },
        page.about.pictures ? h("button", { type: "button", onclick: () => this.pick.click() }, words.attach) : null,
        h("button", { type: "button", onclick: () => this.settings() }, words.settings),
        h("span", { class: "grow" }),
        this.stopButton,
        this.sendButton,
      ),
      this.pick,
    );
    const side = h(
      "details",
      { class: "side", open: matchMedia("(min-width: 60rem)").matches },
      h("summary", {}, words.conversations),
      h("div", { class: "row wrap" }, h("button", { type: "button", onclick: () => this.select(this.fresh()) }, words.newConversation)),
      this.list,
      h(
        "div",
        { class: "row wrap" },
        h("button", { type: "button", class: "small", onclick: () => this.exportAll() }, words.exportAll),
        h("button", { type: "button", class: "small", onclick: () => this.file.click() }, words.importFile),
        this.file,
      ),
    );
    const column = h("section", { class: "column" }, this.log, composer);
    column.addEventListener("dragover", (event) => event.preventDefault());
    column.addEventListener("drop", (event) => {
      event.preventDefault();
      void this.attach([...event.dataTransfer.files]);
    });
    fill(this.main, side, column);
  }

  // Conversations

  fresh() {
    const empty = this.conversations.find(({ nodes }) => Object.keys(nodes).length === 0);
    if (empty) return empty;
    const conversation = newConversation();
    this.conversations.unshift(conversation);
    return conversation;
  }

  select(conversation) {
    this.conversation = conversation;
    sessionStorage.setItem(NAME, conversation.id);
    this.views.clear();
    fill(this.log);
    this.show();
    this.showList();
    this.log.scrollTop = this.log.scrollHeight;
  }

  showList() {
    const { words } = this;
    fill(
      this.list,
      this.conversations.map((conversation) => {
        const current = conversation === this.conversation;
        return h(
          "li",
          { class: current ? "current" : null },
          h("button", { type: "button", class: "title", "aria-current": current ? "true" : null, onclick: () => this.select(conversation) }, conversation.title || words.untitled),
          current ? h("button", { type: "button", class: "small", onclick: () => this.export([conversation]) }, words.exportOne) : null,
          current ? h("button", { type: "button", class: "small", onclick: () => void this.delete(conversation) }, words.deleteConversation) : null,
        );
      }),
    );
  }

  async delete(conversation) {
    if (Object.keys(conversation.nodes).length > 0 && !confirm(this.words.deleteSure)) return;
    this.running.get(conversation.id)?.abort();
    this.conversations = this.conversations.filter((other) => other !== conversation);
    await store.remove(conversation.id);
    this.select(this.conversations[0] ?? this.fresh());
  }

  export(conversations) {
    download("exo-kimi-conversations.json", "application/json", JSON.stringify({ "exo-kimi": "conversations", conversations }, null, 1));
  }

  exportAll() {
    this.export(this.conversations.filter(({ nodes }) => Object.keys(nodes).length > 0));
  }

  async importFile() {
    const [file] = this.file.files;
    this.file.value = "";
    if (!file) return;
    try {
      const value = JSON.parse(await file.text());
      const read = value.conversations.map(checked);
      if (read.length === 0) throw new Error("empty");
      this.conversations.unshift(...read);
      for (const conversation of read) await store.save(conversation);
      this.select(read[0]);
    } catch {
      this.page.notice(this.words.importBad);
    }
  }

  save(conversation) {
    if (this.saving.has(conversation.id)) return;
    this.saving.set(
      conversation.id,
      setTimeout(() => void this.saveNow(conversation), SAVE_MS),
    );
  }

  async saveNow(conversation) {
    clearTimeout(this.saving.get(conversation.id));
    this.saving.delete(conversation.id);
    if (Object.keys(conversation.nodes).length === 0 || !this.conversations.includes(conversation)) return;
    try {
      await store.save(conversation);
    } catch (error) {
      this.page.notice(error.message); // the browser's disk is full, say
    }
  }

  settings() {
    const { conversation } = this;
    editSettings(conversation.settings, this.page, (settings) => {
      conversation.settings = settings;
      this.save(conversation);
    });
  }

  /** A page that goes away has no time for the database, but session storage is written at once. */
  keepLive() {
    const live = this.conversations.flatMap(({ id, nodes }) =>
      Object.values(nodes)
        .filter(({ status }) => status === "streaming")
        .map((node) => ({ conversation: id, node })),
    );
    if (live.length > 0) sessionStorage.setItem(LIVE, JSON.stringify(live));
    void this.saveNow(this.conversation);
  }

  takeLive() {
    const live = JSON.parse(sessionStorage.getItem(LIVE) ?? "[]");
    sessionStorage.removeItem(LIVE);
    for (const { conversation: id, node } of live) {
      const conversation = this.conversations.find((each) => each.id === id);
      if (conversation && node.id in conversation.nodes) Object.assign(conversation.nodes[node.id], node);
    }
  }

  // Messages

  show() {
    const near = this.log.scrollHeight - this.log.scrollTop - this.log.clientHeight < 80;
    const nodes = path(this.conversation);
    const elements = nodes.map((node) => this.viewOf(node).element);
    const shown = [...this.log.children];
    if (elements.length !== shown.length || elements.some((element, index) => element !== shown[index])) fill(this.log, elements);
    const busy = this.running.has(this.conversation.id);
    this.stopButton.hidden = !busy;
    this.sendButton.hidden = busy;
    if (near) this.log.scrollTop = this.log.scrollHeight;
  }

  viewOf(node) {
    let view = this.views.get(node.id);
    if (view === undefined) {
      view = new MessageView(this.conversation, node, this.words, {
        edit: (old, text) => this.edit(old, text),
        again: (old) => this.answer(old.parent ? this.conversation.nodes[old.parent] : null),
        goOn: (old) => this.goOn(old),
        choose: (old, index) => {
          choose(this.conversation, old, index);
          this.refresh();
        },
        results: (old, texts) => this.results(old, texts),
      });
      this.views.set(node.id, view);
    }
    return view;
  }

  /** Show every message anew: which versions there are has changed. */
  refresh() {
    for (const node of path(this.conversation)) this.views.get(node.id)?.update();
    this.show();
    this.save(this.conversation);
  }

  send() {
    const text = this.field.value.trim();
    if ((text === "" && this.pictures.length === 0) || this.running.has(this.conversation.id)) return;
    const nodes = path(this.conversation);
    const node = add(this.conversation, nodes[nodes.length - 1]?.id, { role: "user", content: text, pictures: this.pictures });
    if (!this.conversation.title) this.conversation.title = text.slice(0, 60);
    this.field.value = "";
    this.pictures = [];
    this.showPictures();
    this.grow();
    this.showList();
    this.answer(node);
  }

  edit(node, text) {
    if (this.running.has(this.conversation.id)) return;
    this.answer(add(this.conversation, node.parent, { role: "user", content: text, pictures: node.pictures }));
  }

  results(node, texts) {
    let at = node;
    node.calls.forEach((call, index) => {
      at = add(this.conversation, at.id, { role: "tool", callId: call.id, content: texts[index] });
    });
    this.answer(at);
  }

  answer(asked) {
    if (this.running.has(this.conversation.id)) return;
    const messages = toMessages(above(this.conversation, asked), this.conversation.settings.system);
    const node = add(this.conversation, asked?.id, { role: "assistant", content: "" });
    void this.run(node, messages);
  }

  goOn(node) {
    if (this.running.has(this.conversation.id)) return;
    const messages = toMessages(above(this.conversation, node), this.conversation.settings.system);
    Object.assign(messages[messages.length - 1], { partial: true });
    void this.run(node, messages);
  }

  async run(node, messages) {
    const { conversation } = this;
    const controller = new AbortController();
    this.running.set(conversation.id, controller);
    const body = { model: this.page.about.model, messages, stream: true, stream_options: { include_usage: true }, ...toRequest(conversation.settings) };
    this.refresh();
    this.log.scrollTop = this.log.scrollHeight;
    await stream(node, body, controller.signal, () => this.changed(conversation, node));
    this.running.delete(conversation.id);
    await this.saveNow(conversation);
    if (this.conversation === conversation) this.refresh();
  }

  /** Once a frame, however fast the pieces come. */
  changed(conversation, node) {
    this.save(conversation);
    if (this.conversation !== conversation || this.frame !== null) return;
    this.frame = requestAnimationFrame(() => {
      this.frame = null;
      if (this.conversation !== conversation) return;
      const near = this.log.scrollHeight - this.log.scrollTop - this.log.clientHeight < 80;
      this.views.get(node.id)?.update();
      if (near) this.log.scrollTop = this.log.scrollHeight;
    });
  }

  stop() {
    this.running.get(this.conversation.id)?.abort();
  }

  // The field

  onKey(event) {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      this.send();
    }
  }

  grow() {
    this.field.style.height = "auto";
    this.field.style.height = `${Math.min(this.field.scrollHeight + 2, innerHeight / 3)}px`;
  }

  onPaste(event) {
    const files = [...event.clipboardData.files];
    if (files.length === 0) return;
    event.preventDefault();
    void this.attach(files);
  }

  async attach(files) {
    this.pick.value = "";
    for (const file of files) {
      if (!this.page.about.pictures) this.page.notice(this.words.noPictures);
      else if (!file.type.startsWith("image/")) this.page.notice(`${this.words.notPicture} ${file.name}`);
      else this.pictures.push(await dataUrl(file));
      if (!this.page.about.pictures) break;
    }
    this.showPictures();
  }

  showPictures() {
    fill(
      this.thumbs,
      this.pictures.map((url, index) =>
        h(
          "span",
          { class: "thumb" },
          h("img", { src: url, alt: `${this.words.picture} ${index + 1}` }),
          h(
            "button",
            {
              type: "button",
              class: "small",
              "aria-label": `${this.words.removePicture} ${index + 1}`,
              onclick: () => {
                this.pictures.splice(index, 1);
                this.showPictures();
              },
            },
            "×",
          ),
        ),
      ),
    );
  }
}

function dataUrl(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(file);
  });
}
