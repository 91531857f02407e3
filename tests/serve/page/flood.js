// Feeds the cluster's view with 200 states a second for so many seconds; tells how large it was, and what it shows.
async (seconds) => {
  const { ClusterView } = await import("/page/cluster.js");
  const words = (await import("/page/words/en.js")).default;
  const place = document.createElement("div");
  document.body.append(place);
  const view = new ClusterView(place, { words });
  const stage = (index, n) => ({
    ...{ id: String(index), name: `m${index}`, address: "a", state: n % 7 ? "ready" : "stalled" },
    ...{ start_layer: 0, end_layer: 4, silent_s: 0, loaded_bytes: 0, total_bytes: 0, weights_bytes: 2 ** 30 },
    ...{ kv_bytes: n, peak_bytes: n, memory_bytes: 2 ** 36, sequences: 1, restarts: 0, compute_s: n / 400 },
    ...{ last_error: null, plan: null },
  });
  const request = (n) => ({
    ...{ id: `r${n % 50}`, state: "prefill", prompt_tokens: 100, prompt_done: n % 100 },
    ...{ cached_tokens: 0, generated_tokens: 0 },
  });
  const state = (n) => ({
    ...{ kind: "exo-kimi", time_s: n / 200, ready: true, reason: null, model: "m", version: "1", context: 1 },
    ...{ kv_capacity_tokens: 10 ** 9, kv_reserved_tokens: n, kv_prefix_tokens: 0 },
    ...{ stages: [stage(0, n), stage(1, n)], requests: [request(n)], prediction: null },
    totals: { generated_tokens: n * 3, prompt_tokens: n, cached_tokens: 0, steps: n, draft_tokens: 0 },
    events: Array.from({ length: 64 }, (_, index) => `event ${n - index}`),
  });
  const nodes = [];
  let sent = 0;
  for (const end = performance.now() + seconds * 1000; performance.now() < end; ) {
    for (let i = 0; i < 10; i += 1) view.take(JSON.parse(JSON.stringify(state(++sent))));
    await new Promise((go) => setTimeout(go, 50));
    if (sent % 200 === 0) nodes.push(place.querySelectorAll("*").length);
  }
  await new Promise((go) => requestAnimationFrame(() => requestAnimationFrame(go)));
  const text = place.innerText;
  place.remove();
  return { sent, nodes, text };
}
