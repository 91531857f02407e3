// The cluster as it is now: each machine's layers and memory, the requests, and what happened. Fed by one stream of whole states.

import { LostError, events } from "./api.js";
import { fill, h, say, width } from "./dom.js";
import * as format from "./format.js";

const WINDOW_S = 5; // over which speeds are measured
const PARTS = ["weights", "kv", "scratch", "reserve", "headroom", "macos"];

export function open(main, page) {
  const view = new ClusterView(main, page);
  void view.listen();
  return () => view.leave();
}

export class ClusterView {
  constructor(main, { words }) {
    this.words = words;
    this.controller = new AbortController();
    this.states = [];
    this.latest = null;
    this.frame = null;
    this.stages = new Map();
    this.status = h("p", { class: "status", role: "status" }, `${words.connecting}…`);
    this.totals = h("dl", { class: "totals" });
    this.totalViews = new Map();
    this.machines = h("div", { class: "machines" });
    this.hint = h("p", { class: "hint", hidden: true }, words.noPlan);
    this.requests = h("div", { class: "requests" });
    this.requestViews = new Map();
    this.idle = h("p", { class: "hint" }, words.noRequests);
    this.events = h("ol", { class: "events", tabindex: "0", "aria-label": words.events });
    this.shownEvents = null;
    fill(
      main,
      h("section", { class: "panel wide" }, this.status, this.totals),
      h("section", { class: "panel wide" }, h("h2", {}, words.machines), legend(words), this.machines, this.hint),
      h("section", { class: "panel" }, h("h2", {}, words.requests), this.idle, this.requests),
      h("section", { class: "panel" }, h("h2", {}, words.events), this.events),
    );
  }

  leave() {
    this.controller.abort();
  }

  async listen() {
    const { signal } = this.controller;
    while (!signal.aborted) {
      try {
        await events("/v1/cluster/events", { signal }, (data, name) => {
          if (name === "state") this.take(JSON.parse(data));
        });
      } catch (error) {
        if (signal.aborted) return;
        if (!(error instanceof LostError)) say(this.status, error.message);
      }
      if (signal.aborted) return;
      this.states = [];
      this.status.className = "status bad";
      say(this.status, `${this.words.reconnecting}…`);
      await new Promise((resolve) => setTimeout(resolve, 1500));
    }
  }

  /** However many states come, one is shown a frame, and it is the newest. */
  take(state) {
    this.latest = state;
    this.states.push(state);
    while (this.states.length > 2 && state.time_s - this.states[1].time_s >= WINDOW_S) this.states.shift();
    if (this.states.length > 600) this.states.splice(1, 1);
    this.frame ??= requestAnimationFrame(() => {
      this.frame = null;
      this.show(this.latest);
    });
  }

  /** How fast a total grew lately; null before there are two states. */
  rate(read) {
    const first = this.states[0];
    const last = this.latest;
    const passed_s = last.time_s - first.time_s;
    return passed_s > 0.2 ? Math.max(0, read(last) - read(first)) / passed_s : null;
  }

  show(state) {
    const { words } = this;
    this.status.className = state.ready ? "status good" : "status bad";
    const version = state.version ? ` · exo-kimi ${state.version}` : "";
    say(this.status, `${state.model ?? ""} · ${state.ready ? words.ready : (state.reason ?? words.starting)}${version}`);
    this.showTotals(state);
    this.showStages(state);
    this.showRequests(state);
    this.showEvents(state.events);
  }

  showTotals(state) {
    const { words } = this;
    const figures = [];
    const totals = state.totals;
    if (totals) {
      const generated = this.rate(({ totals: t }) => t.generated_tokens);
      const predicted = state.prediction?.decode_tokens_per_s;
      figures.push([words.generation, `${speed(generated)}${predicted ? ` (${words.predicted} ${format.speed(predicted)})` : ""}`]);
      figures.push([words.prefill, speed(this.rate(({ totals: t }) => t.prompt_tokens - t.cached_tokens))]);
      const steps = this.rate(({ totals: t }) => t.steps);
      figures.push([words.inFlight, steps === null ? "–" : `${steps.toFixed(1)} ${words.perSecond}`]);
      if (totals.prompt_tokens > 0) figures.push([words.prefixHits, `${((100 * totals.cached_tokens) / totals.prompt_tokens).toFixed(0)} %`]);
      if (totals.draft_tokens > 0) figures.push([words.drafts, `${((100 * totals.draft_tokens_accepted) / totals.draft_tokens).toFixed(0)} %`]);
    }
    if (state.kv_capacity_tokens > 0) {
      figures.push([words.memoryTokens, `${format.count(state.kv_reserved_tokens)} + ${format.count(state.kv_prefix_tokens)} / ${format.count(state.kv_capacity_tokens)}`]);
    }
    if (state.context > 0) figures.push([words.context, format.count(state.context)]);
    for (const [name, value] of figures) {
      if (!this.totalViews.has(name)) {
        const number = h("dd");
        this.totalViews.set(name, number);
        this.totals.append(h("div", {}, h("dt", {}, name), number));
      }
      say(this.totalViews.get(name), value);
    }
  }

  showStages(state) {
    const names = state.stages.map((stage) => stage.id);
    for (const [name, view] of this.stages) {
      if (!names.includes(name)) {
        view.element.remove();
        this.stages.delete(name);
      }
    }
    const busy = state.stages.map((stage, index) => (stage.compute_s === null ? null : this.rate((past) => past.stages[index]?.compute_s ?? stage.compute_s)));
    const [most, second] = busy.map((share) => share ?? 0).sort((one, other) => other - one);
    state.stages.forEach((stage, index) => {
      let view = this.stages.get(stage.id);
      if (view === undefined) {
        view = new StageCard(this.words);
        this.stages.set(stage.id, view);
        this.machines.append(view.element);
      }
      const slow = busy[index] === most && most > 0.05 && most > 1.2 * (second ?? most);
      view.show(stage, { busy: busy[index], slow, largest: Math.max(...state.stages.map((each) => total(each))) });
    });
    this.hint.hidden = state.kind !== "exo-kimi" || state.stages.length === 0 || state.stages.some((stage) => stage.plan);
  }

  showRequests(state) {
    const requests = state.requests ?? [];
    this.idle.hidden = requests.length > 0;
    const ids = new Set(requests.map((request) => request.id));
    for (const [id, view] of this.requestViews) {
      if (!ids.has(id)) {
        view.element.remove();
        this.requestViews.delete(id);
      }
    }
    for (const request of requests) {
      let view = this.requestViews.get(request.id);
      if (view === undefined) {
        const text = h("span", { class: "request-text" });
        const bar = h("progress", { max: "1", "aria-label": this.words.prefill });
        view = { text, bar, element: h("div", { class: "request" }, text, bar) };
        this.requestViews.set(request.id, view);
        this.requests.append(view.element);
      }
      const what = { waiting: this.words.waiting, prefill: this.words.prefilling, decode: this.words.decoding }[request.state];
      const cached = request.cached_tokens ? `, ${this.words.cached} ${format.count(request.cached_tokens)}` : "";
      say(view.text, `${what} · ${this.words.promptTokens} ${format.count(request.prompt_tokens)}${cached} · ${format.count(request.generated_tokens)} ${this.words.tokens}`);
      view.bar.hidden = request.state !== "prefill";
      view.bar.value = request.prompt_tokens ? request.prompt_done / request.prompt_tokens : 0;
    }
  }

  showEvents(lines) {
    const key = `${lines.length}${lines[lines.length - 1] ?? ""}`;
    if (key === this.shownEvents) return;
    this.shownEvents = key;
    fill(this.events, lines.length === 0 ? h("li", {}, this.words.noEvents) : [...lines].reverse().map((line) => h("li", {}, line)));
  }
}

function speed(rate) {
  return rate === null ? "–" : format.speed(rate);
}

function legend(words) {
  return h(
    "p",
    { class: "legend" },
    PARTS.map((part) => h("span", {}, h("i", { class: `swatch part-${part}` }), words[part])),
  );
}

function total(stage) {
  return stage.plan?.memory_bytes ?? stage.memory_bytes ?? stage.weights_bytes + stage.kv_bytes;
}

class StageCard {
  constructor(words) {
    this.words = words;
    this.name = h("h3", {});
    this.badge = h("span", { class: "badge" });
    this.layers = h("span", { class: "layers" });
    this.bar = h("div", { class: "bar", role: "img" });
    this.parts = Object.fromEntries(PARTS.map((part) => [part, h("span", { class: `part part-${part}` })]));
    this.mark = h("span", { class: "limit-mark" });
    fill(this.bar, Object.values(this.parts), this.mark);
    this.loading = h("progress", { max: "1", hidden: true, "aria-label": words.loading });
    this.figures = h("p", { class: "figures" });
    this.error = h("p", { class: "note bad", hidden: true });
    this.element = h("article", { class: "machine" }, h("header", {}, this.name, this.layers, this.badge), this.bar, this.loading, this.figures, this.error);
  }

  show(stage, { busy, slow, largest }) {
    const { words } = this;
    const { plan } = stage;
    say(this.name, stage.name);
    say(this.layers, stage.end_layer === null ? "" : `${words.layers} ${stage.start_layer}:${stage.end_layer}`);
    say(this.badge, words[stage.state] ?? stage.state);
    this.badge.className = `badge ${stage.state}`;
    const sizes = this.sizes(stage);
    const whole = Math.max(1, total(stage));
    width(this.bar, whole / Math.max(1, largest));
    for (const part of PARTS) width(this.parts[part], sizes[part] / whole);
    const limit = plan?.limit_bytes ?? null;
    this.mark.hidden = limit === null;
    if (limit !== null) {
      const left = `${((100 * limit) / whole).toFixed(2)}%`;
      if (this.mark.style.left !== left) this.mark.style.left = left;
    }
    this.loading.hidden = stage.state !== "loading";
    this.loading.value = stage.total_bytes ? stage.loaded_bytes / stage.total_bytes : 0;
    const texts = [`${words.weights} ${format.bytes(stage.weights_bytes)}`, `${words.kv} ${format.bytes(stage.kv_bytes)}`];
    if (plan) texts.push(`${words.headroom} ${format.bytes(plan.headroom_bytes)}`, `${words.limit} ${format.bytes(plan.limit_bytes)}`);
    if (stage.peak_bytes) texts.push(`${words.peak} ${format.bytes(stage.peak_bytes)}`);
    if (busy !== null) texts.push(`${words.busy} ${(100 * Math.min(1, busy)).toFixed(0)} %${slow ? ` (${words.slowest})` : ""}`);
    if (stage.experts_asked) texts.push(`${words.experts} ${((100 * stage.experts_held) / stage.experts_asked).toFixed(0)} %`, `${format.bytes(stage.experts_read_bytes)}`);
    if (stage.silent_s > 2) texts.push(`${words.silent} ${format.seconds(stage.silent_s)}`);
    if (stage.restarts) texts.push(`${words.restarts} ${stage.restarts}`);
    say(this.figures, texts.join(" · "));
    const label = texts.slice(0, 4).join(", ");
    if (this.bar.getAttribute("aria-label") !== label) this.bar.setAttribute("aria-label", label);
    this.error.hidden = !stage.last_error || stage.state === "ready";
    say(this.error, stage.last_error ?? "");
  }

  /** Bytes of each part of the bar: with a plan up to the whole memory, else what is held. */
  sizes(stage) {
    const { plan } = stage;
    if (!plan) {
      const used = stage.weights_bytes + stage.kv_bytes;
      return { weights: stage.weights_bytes, kv: stage.kv_bytes, scratch: 0, reserve: 0, headroom: Math.max(0, (stage.memory_bytes ?? used) - used), macos: 0 };
    }
    const reserve = plan.reserve_bytes + plan.server_bytes;
    const used = plan.weight_bytes + plan.kv_bytes + plan.scratch_bytes + reserve;
    return {
      weights: plan.weight_bytes,
      kv: plan.kv_bytes,
      scratch: plan.scratch_bytes,
      reserve,
      headroom: Math.max(0, plan.limit_bytes - used),
      macos: Math.max(0, plan.memory_bytes - Math.max(plan.limit_bytes, used)),
    };
  }
}
