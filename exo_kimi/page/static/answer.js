// One answer that is being made: the stream's pieces go into its node, with their times.

import { LostError, events } from "./api.js";

/** Ask the server for the next message and let it grow in `node`; `onChange` is told after each piece.
 *
 *  @param node the assistant's message, empty or to be gone on with.
 *  @param body of the request.
 */
export async function stream(node, body, signal, onChange) {
  const start = performance.now();
  const before = node.stats?.tokens ?? 0;
  const times = { first: null, last: null, content: null, reasoning: null };
  const calls = [];
  let finish = null;
  node.status = "streaming";
  node.error = null;
  onChange();
  try {
    await events("/v1/chat/completions", { method: "POST", body, signal }, (data) => {
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) {
        node.error = chunk.error.message;
        return;
      }
      if (chunk.warnings?.length) node.warnings = chunk.warnings;
      const choice = chunk.choices?.[0];
      if (choice) {
        take(node, choice.delta, calls, times);
        finish = choice.finish_reason ?? finish;
      }
      if (chunk.usage) count(node, chunk.usage, before);
      measure(node, times, start);
      onChange();
    });
    if (node.error) node.status = "failed";
    else if (finish === null) node.status = "broken";
    else node.status = finish === "length" ? "cut" : "done";
  } catch (error) {
    if (error.name === "AbortError") node.status = "stopped";
    else if (error instanceof LostError) node.status = "broken";
    else {
      node.status = "failed";
      node.error = error.message;
    }
  }
  onChange();
}

function take(node, delta, calls, times) {
  const now = performance.now();
  if (delta.reasoning_content || delta.content || delta.tool_calls) {
    times.first ??= now;
    times.last = now;
  }
  if (delta.reasoning_content) {
    times.reasoning ??= now;
    node.reasoning = (node.reasoning ?? "") + delta.reasoning_content;
  }
  if (delta.content || delta.tool_calls) times.content ??= now;
  if (delta.content) node.content += delta.content;
  for (const piece of delta.tool_calls ?? []) {
    if (calls[piece.index] === undefined) {
      calls[piece.index] = { id: piece.id, name: piece.function.name, arguments: "" };
      (node.calls ??= []).push(calls[piece.index]);
    }
    calls[piece.index].arguments += piece.function.arguments ?? "";
  }
}

function count(node, usage, before) {
  node.stats = {
    ...node.stats,
    tokens: before + usage.completion_tokens,
    own: usage.completion_tokens,
    prompt: usage.prompt_tokens,
    cached: usage.prompt_tokens_details?.cached_tokens ?? 0,
  };
}

function measure(node, times, start) {
  if (times.first === null) return;
  const stats = (node.stats ??= {});
  stats.ttft ??= (times.first - start) / 1000;
  if (times.reasoning !== null) stats.thought = ((times.content ?? times.last) - times.reasoning) / 1000;
  if (stats.own > 1 && times.last > times.first) stats.speed = (stats.own - 1) / ((times.last - times.first) / 1000);
}
