"""One rank of mlx-lm's own pipeline on the ring: its model, its generators, its split. Started by `ring.Ring`.

Every rank gets the same orders, one JSON line each on stdin, and answers each with one JSON line; rank 0 has the tokens.
Requests run through `BatchGenerator`, which is what `mlx_lm.server` drives, one as well as several; without the server around
it, so without what its HTTP and its sharing of requests between ranks cost. An order with `alone` takes `generate_step`, which
is what mlx-lm's library offers for one request.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm.generate import BatchGenerator, generate_step
from mlx_lm.utils import load_model

Streams = dict[str, list[Any]]


def one(model: Any, prompt: list[int], new_tokens: int) -> Streams:
    """One request alone, in mlx-lm's generator with one step enqueued ahead."""
    started_s = time.perf_counter()
    tokens, times = [], []
    for token, _ in generate_step(mx.array(prompt), model, max_tokens=new_tokens):
        tokens.append(int(token))
        times.append(time.perf_counter() - started_s)
    return {"tokens": [tokens], "times": [times]}


def batch(model: Any, prompts: list[list[int]], new_tokens: list[int], after: list[int]) -> Streams:
    """Requests of which the one at `i` is submitted once the first has `after[i]` tokens; prefill steps of 2,048, as in
    the server by default. Times count from the start."""
    generator = BatchGenerator(model, stream=mx.default_stream(mx.default_device()))
    started_s = time.perf_counter()
    tokens: list[list[int]] = [[] for _ in prompts]
    times: list[list[float]] = [[] for _ in prompts]
    submitted: dict[int, float] = {}
    index_of: dict[int, int] = {}
    left = len(prompts)
    while left:
        for index, wanted in enumerate(after):
            if index not in submitted and len(tokens[0]) >= wanted:
                (uid,) = generator.insert([prompts[index]], [new_tokens[index]])
                index_of[uid] = index
                submitted[index] = time.perf_counter() - started_s
        for response in generator.next()[1]:
            index = index_of[response.uid]
            tokens[index].append(int(response.token))
            times[index].append(time.perf_counter() - started_s)
            left -= response.finish_reason is not None
    generator.close()
    return {"tokens": tokens, "times": times, "submitted": [submitted[index] for index in range(len(prompts))]}


def main(directory: str) -> None:
    """Load, then carry out orders until stdin ends."""
    group = mx.distributed.init(strict=True, backend="ring")
    # The steps of mlx_lm.utils.sharded_load, without the tokenizer, which token ids do not need.
    model, _ = load_model(Path(directory), lazy=True, strict=False)
    model.model.pipeline(group)
    mx.eval(model.parameters())
    mx.eval(mx.distributed.all_sum(mx.array(1.0), stream=mx.cpu))
    print(json.dumps({"rank": group.rank(), "layers": len(model.model.pipeline_layers)}), flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        after = order.get("after") or [0] * len(order["prompts"])
        if order.get("alone"):
            answer = one(model, order["prompts"][0], order["new_tokens"][0])
        else:
            answer = batch(model, order["prompts"], order["new_tokens"], after)
        mx.clear_cache()
        print(json.dumps(answer if group.rank() == 0 else {}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
