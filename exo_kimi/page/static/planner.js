// The planner: machines, a model and a context, and the split that is best, before anything is downloaded.

import * as api from "./api.js";
import { download, fill, h } from "./dom.js";

const NAME = "exo-kimi.planner";
const FOUNDING = {
  machines: [
    { name: "m3-ultra", memory: 512 },
    { name: "m2-ultra", memory: 192 },
  ],
  model: "kimi-k2-thinking",
  recipe: "q34+q6",
  context: 40960,
  concurrency: 1,
  objective: "request",
  raise_limits: true,
};

export async function open(main, page) {
  const choices = await api.json("/v1/plan/choices");
  new PlannerView(main, page, choices);
}

class PlannerView {
  constructor(main, { words }, choices) {
    this.words = words;
    this.choices = choices;
    this.asked = remembered() ?? structuredClone(FOUNDING);
    this.machines = h("div", { class: "machine-rows" });
    this.answer = h("section", { class: "panel wide", "aria-live": "polite" });
    const select = (name, options) => h("select", { id: `plan-${name}`, onchange: (event) => (this.asked[name] = event.target.value) }, options.map(([value, text]) => h("option", { value, selected: (this.asked[name] ?? "") === value }, text)));
    const number = (name, least) => h("input", { id: `plan-${name}`, type: "number", min: least, step: "1", required: true, value: this.asked[name], oninput: (event) => (this.asked[name] = Number(event.target.value)) });
    const field = (name, label, control) => h("div", { class: "field" }, h("label", { for: `plan-${name}` }, label), control);
    this.asked.model ??= choices.models[0];
    const raise = h("input", { type: "checkbox", checked: this.asked.raise_limits === true, onchange: () => (this.asked.raise_limits = raise.checked) });
    const stream = h("input", { id: "plan-stream", type: "checkbox", checked: this.asked.stream === true, onchange: () => (this.asked.stream = stream.checked) });
    this.button = h("button", { type: "submit", class: "primary" }, words.plan);
    const form = h(
      "form",
      {
        onsubmit: (event) => {
          event.preventDefault();
          void this.plan();
        },
      },
      h("fieldset", {}, h("legend", {}, words.machines), this.machines, h("button", { type: "button", class: "small", onclick: () => this.add() }, words.addMachine)),
      h(
        "div",
        { class: "fields" },
        field("model", words.published, select("model", choices.models.map((name) => [name, name]))),
        field("recipe", words.recipe, select("recipe", [["", words.asPublished], ...choices.recipes.map((name) => [name, name])])),
        field("context", words.context, number("context", "1")),
        field("concurrency", words.concurrency, number("concurrency", "1")),
        field("objective", words.objective, select("objective", choices.objectives.map((name) => [name, words[`objective_${name}`] ?? name]))),
        field("kv_bits", words.kvBits, select("kv_bits", [["", words.kv16], ["8", words.kv8]])),
        field("ssd", words.ssd, h("input", { id: "plan-ssd", type: "number", min: "0.1", max: "1000", step: "any", value: this.asked.ssd ?? "", placeholder: words.ssdKnown, oninput: (event) => (this.asked.ssd = event.target.value) })),
        field("hits", words.hits, h("input", { id: "plan-hits", type: "file", accept: ".toml", onchange: async (event) => (this.hits = await event.target.files[0]?.text()) })),
        field("split", words.split, h("input", { id: "plan-split", type: "text", inputmode: "numeric", value: this.asked.split ?? "", placeholder: "44,17", oninput: (event) => (this.asked.split = event.target.value) })),
      ),
      h("label", { class: "check" }, raise, ` ${words.raiseLimits}`),
      h("label", { class: "check" }, stream, ` ${words.streamExperts}`),
      h("div", { class: "row" }, this.button),
    );
    fill(main, h("section", { class: "panel wide" }, h("h2", {}, words.planner), form), this.answer);
    this.showMachines();
  }

  showMachines() {
    const { words, asked } = this;
    fill(
      this.machines,
      asked.machines.map((machine, index) => {
        const memories = this.choices.machines.find(({ name }) => name === machine.name)?.memory_gib ?? [machine.memory];
        if (!memories.includes(machine.memory)) machine.memory = memories[memories.length - 1];
        const chip = h(
          "select",
          {
            "aria-label": `${words.machine} ${index + 1}`,
            onchange: () => {
              machine.name = chip.value;
              this.showMachines();
            },
          },
          this.choices.machines.map(({ name }) => h("option", { value: name, selected: name === machine.name }, name)),
        );
        const memory = h(
          "select",
          { "aria-label": `${words.memory} ${index + 1}`, onchange: () => (machine.memory = Number(memory.value)) },
          memories.map((size) => h("option", { value: String(size), selected: size === machine.memory }, `${size} GB`)),
        );
        const remove = h(
          "button",
          {
            type: "button",
            class: "small",
            disabled: asked.machines.length === 1,
            "aria-label": `${words.remove} ${index + 1}`,
            onclick: () => {
              asked.machines.splice(index, 1);
              this.showMachines();
            },
          },
          "×",
        );
        return h("div", { class: "row" }, chip, memory, remove);
      }),
    );
  }

  add() {
    this.asked.machines.push({ ...this.asked.machines[this.asked.machines.length - 1] });
    this.showMachines();
  }

  async plan() {
    const { words, asked } = this;
    const body = { cluster: asked.machines.map(({ name, memory }) => `${name}-${memory}`).join(", "), model: asked.model, context: asked.context, concurrency: asked.concurrency, objective: asked.objective };
    if (asked.recipe) body.recipe = asked.recipe;
    if (asked.kv_bits) body.kv_bits = Number(asked.kv_bits);
    if (asked.raise_limits) body.raise_limits = true;
    if (asked.stream) body.stream = true;
    if (asked.stream && asked.ssd) body.ssd_bytes_per_s = Number(asked.ssd) * 1e9;
    if (asked.stream && this.hits) body.hits = this.hits;
    if (asked.split?.trim()) body.split = asked.split.trim();
    localStorage.setItem(NAME, JSON.stringify(asked));
    this.button.disabled = true;
    this.answer.setAttribute("aria-busy", "true");
    try {
      this.show(await api.json("/v1/plan", { method: "POST", body }));
    } catch (error) {
      fill(this.answer, h("pre", { class: "note bad", role: "alert", tabindex: "0" }, error instanceof api.LostError ? words.lost : error.message));
    }
    this.answer.removeAttribute("aria-busy");
    this.button.disabled = false;
  }

  show(answer) {
    const { words } = this;
    const picture = h("img", { class: "plan-picture", src: `data:image/svg+xml;charset=utf-8,${encodeURIComponent(answer.svg)}`, alt: answer.summary });
    fill(
      this.answer,
      h("h2", {}, words.plan),
      h("p", {}, answer.summary),
      picture,
      h(
        "div",
        { class: "row wrap" },
        h("button", { type: "button", onclick: () => download("plan.svg", "image/svg+xml", answer.svg) }, words.keepSvg),
        h("button", { type: "button", onclick: () => download("plan.json", "application/json", answer.plan_json) }, words.keepPlan),
      ),
      h("details", { open: true }, h("summary", {}, words.explanation), h("pre", { tabindex: "0", role: "region", "aria-label": words.explanation }, answer.text)),
      h("h3", {}, words.commands),
      h("pre", { tabindex: "0", role: "region", "aria-label": words.commands }, answer.command),
    );
  }
}

function remembered() {
  try {
    const asked = JSON.parse(localStorage.getItem(NAME));
    return Array.isArray(asked?.machines) && asked.machines.length > 0 ? asked : null;
  } catch {
    return null;
  }
}
