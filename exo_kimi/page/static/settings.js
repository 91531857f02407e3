// What a conversation asks of the model beside its messages: kept with the conversation.

import { h } from "./dom.js";

/** A dialog over a conversation's settings; `onSave(settings)` is called when they changed. */
export function editSettings(settings, { about, words, notice }, onSave) {
  const sampling = about.sampling ?? {};
  const number = (name, label, attributes, fallback) => {
    const field = h("input", { type: "number", ...attributes, value: settings[name] ?? "", placeholder: fallback, id: `set-${name}` });
    return { name, field, row: h("div", { class: "field" }, h("label", { for: `set-${name}` }, label), field) };
  };
  const recommended = (value) => (value === undefined || value === null ? "" : `${value} (${words.recommended})`);
  const numbers = [
    number("temperature", words.temperature, { min: "0", max: "2", step: "any" }, recommended(sampling.temperature)),
    number("top_p", words.topP, { min: "0", max: "1", step: "any" }, recommended(sampling.top_p)),
    number("max_tokens", words.maxTokens, { min: "1", step: "1" }, about.context ? String(about.context) : ""),
    number("seed", words.seed, { min: "0", step: "1" }, words.random),
  ];
  const system = h("textarea", { id: "set-system", rows: "4", value: settings.system ?? "" });
  const tools = h("textarea", { id: "set-tools", rows: "4", class: "mono", value: settings.tools ?? "", spellcheck: "false" });
  const thinking = h(
    "select",
    { id: "set-thinking" },
    h("option", { value: "" }, words.thinkingDefault),
    h("option", { value: "enabled" }, words.thinkingOn),
    h("option", { value: "disabled" }, words.thinkingOff),
  );
  thinking.value = settings.thinking ?? "";
  const dialog = h(
    "dialog",
    { class: "wide", "aria-labelledby": "settings-title", onclose: () => dialog.remove() },
    h(
      "form",
      {
        method: "dialog",
        onsubmit: (event) => {
          event.preventDefault();
          if (tools.value.trim() && readTools(tools.value) === null) {
            notice(words.toolsBad);
            return;
          }
          const chosen = { system: system.value.trim(), tools: tools.value.trim(), thinking: thinking.value };
          for (const { name, field } of numbers) if (field.value !== "") chosen[name] = Number(field.value);
          dialog.close();
          onSave(Object.fromEntries(Object.entries(chosen).filter(([, value]) => value !== "")));
        },
      },
      h("h2", { id: "settings-title" }, words.settings),
      h("div", { class: "field" }, h("label", { for: "set-system" }, words.system), system),
      h("div", { class: "fields" }, numbers.map(({ row }) => row), h("div", { class: "field" }, h("label", { for: "set-thinking" }, words.thinkingMode), thinking)),
      h("div", { class: "field" }, h("label", { for: "set-tools" }, words.tools), tools),
      h("div", { class: "row end" }, h("button", { type: "button", onclick: () => dialog.close() }, words.cancel), h("button", { type: "submit", class: "primary" }, words.ok)),
    ),
  );
  document.body.append(dialog);
  dialog.showModal();
}

/** The list of tools in a text; null where it is none. */
export function readTools(text) {
  try {
    const tools = JSON.parse(text);
    return Array.isArray(tools) ? tools : null;
  } catch {
    return null;
  }
}

/** The members of a request that the settings ask for. */
export function toRequest(settings) {
  const body = {};
  for (const name of ["temperature", "top_p", "max_tokens", "seed"]) if (settings[name] !== undefined) body[name] = settings[name];
  if (settings.thinking) body.thinking = { type: settings.thinking };
  if (settings.tools) body.tools = readTools(settings.tools);
  return body;
}
