// The page: its views, language, theme and key.

import * as api from "./api.js";
import { fill, h } from "./dom.js";
import { NAMES, chooseLanguage, language, words as readWords } from "./words.js";

const VIEWS = {
  chat: () => import("./chat.js"),
  cluster: () => import("./cluster.js"),
  planner: () => import("./planner.js"),
};
const THEME = "exo-kimi.theme";
const notices = document.getElementById("notices");
let leave = () => {};
let shown = null;

/** A message at the foot of the page, for a while. */
function notice(text) {
  const line = h("p", { class: "notice" }, text);
  notices.append(line);
  setTimeout(() => line.remove(), 8000);
}

function applyTheme() {
  const theme = localStorage.getItem(THEME);
  if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
  else delete document.documentElement.dataset.theme;
}

function askKey(words) {
  return (wrong) =>
    new Promise((resolve) => {
      const field = h("input", { type: "password", autocomplete: "current-password", required: true, "aria-label": words.keyTitle });
      const dialog = h(
        "dialog",
        { "aria-labelledby": "key-title" },
        h(
          "form",
          {
            method: "dialog",
            onsubmit: (event) => {
              event.preventDefault();
              dialog.remove();
              resolve(field.value);
            },
          },
          h("h2", { id: "key-title" }, words.keyTitle),
          h("p", {}, wrong ? words.keyWrong : words.keyAsk),
          field,
          h(
            "div",
            { class: "row end" },
            h(
              "button",
              {
                type: "button",
                onclick: () => {
                  dialog.remove();
                  resolve(null);
                },
              },
              words.cancel,
            ),
            h("button", { type: "submit", class: "primary" }, words.ok),
          ),
        ),
      );
      dialog.addEventListener("cancel", () => {
        dialog.remove();
        resolve(null);
      });
      document.body.append(dialog);
      dialog.showModal();
    });
}

function tools(words) {
  const themes = h(
    "select",
    {
      "aria-label": words.theme,
      onchange: () => {
        localStorage.setItem(THEME, themes.value);
        applyTheme();
      },
    },
    h("option", { value: "auto" }, words.themeAuto),
    h("option", { value: "light" }, words.themeLight),
    h("option", { value: "dark" }, words.themeDark),
  );
  themes.value = localStorage.getItem(THEME) ?? "auto";
  const languages = h(
    "select",
    {
      "aria-label": words.languageLabel,
      onchange: () => {
        chooseLanguage(languages.value);
        location.reload();
      },
    },
    Object.entries(NAMES).map(([tag, name]) => h("option", { value: tag, lang: tag }, name)),
  );
  languages.value = language();
  const forget = h(
    "button",
    {
      type: "button",
      class: "small",
      onclick: () => {
        api.forgetKey();
        location.reload();
      },
    },
    words.keyForget,
  );
  fill(document.getElementById("tools"), api.storedKey() === null ? null : forget, languages, themes);
}

async function show(about, words) {
  const wished = location.hash.slice(2).split("/")[0];
  const view = about.views.includes(wished) ? wished : about.views[0];
  if (view === shown) return;
  shown = view;
  leave();
  leave = () => {};
  const main = document.getElementById("view");
  fill(main);
  main.className = view;
  fill(
    document.getElementById("views"),
    about.views.map((name) => h("a", { href: `#/${name}`, "aria-current": name === view ? "page" : null }, words[name])),
  );
  const { open } = await VIEWS[view]();
  if (shown === view) leave = (await open(main, { about, words, notice })) ?? leave;
}

async function start() {
  applyTheme();
  const words = await readWords();
  api.onKeyNeeded(askKey(words));
  tools(words);
  for (;;) {
    try {
      const about = await api.json("/v1/page");
      document.title = about.model ? `${about.model} · exo-kimi` : "exo-kimi";
      tools(words);
      window.addEventListener("hashchange", () => void show(about, words));
      await show(about, words);
      return;
    } catch (error) {
      if (error instanceof api.LostError) {
        fill(document.getElementById("view"), h("p", { class: "empty", role: "status" }, words.reconnecting));
        await new Promise((resolve) => setTimeout(resolve, 2000));
        continue;
      }
      fill(
        document.getElementById("view"),
        h("p", { class: "empty", role: "alert" }, error.message),
        h("p", { class: "empty" }, h("button", { type: "button", onclick: () => location.reload() }, words.keyTitle)),
      );
      return;
    }
  }
}

void start();
