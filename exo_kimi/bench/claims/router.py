"""Tokens that a router in bf16 sends to other experts than one in fp32: ours and mlx-lm's, on random K2-shaped routers.

Ratios are the share of tokens whose set of experts differs from that of a router computed in float64 from the same bf16
inputs and weights. Our bar is none; the lower rows are theirs, which computes its logits in bf16.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import mlx.core as mx
import numpy as np

from exo_kimi.arch.config import KimiConfig
from exo_kimi.bench.frame import Result, Row, finish
from exo_kimi.checkpoint.tiny.config import text_config
from exo_kimi.models.moe import Router

HIDDEN, EXPERTS, CHOSEN = 7168, 384, 8


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it, print a table and one JSON line."""
    parser = argparse.ArgumentParser(
        prog="exo-kimi bench router", description="tokens sent to other experts than fp32's"
    )
    parser.add_argument("--tokens", type=int, default=512, help="of each router (default 512)")
    parser.add_argument("--routers", type=int, default=3, help="with other random weights (default 3)")
    options = parser.parse_args(arguments)
    return finish(measure(options.tokens, options.routers), options)


def measure(tokens: int, routers: int) -> Result:
    """A row for each router."""
    return Result(
        bench="router",
        against=f"mlx-lm {version('mlx-lm')}",
        rows=[_row(seed, tokens) for seed in range(routers)],
        notes=[f"{EXPERTS} experts, top {CHOSEN}, D {HIDDEN}; ratio: ours that differ, of all tokens"],
    )


def _row(seed: int, tokens: int) -> Row:
    from mlx_lm.models.deepseek_v3 import ModelArgs, MoEGate

    generator = np.random.default_rng(seed)

    def bf16(scale: float, *shape: int) -> mx.array:
        return mx.array(generator.standard_normal(shape, np.float32) * scale).astype(mx.bfloat16)

    x = bf16(1.0, tokens, HIDDEN)
    weight = bf16(HIDDEN**-0.5, EXPERTS, HIDDEN)
    bias = mx.array(generator.standard_normal(EXPERTS, np.float32) * 0.05)
    shape: dict[str, Any] = {"hidden_size": HIDDEN, "n_routed_experts": EXPERTS, "num_experts_per_tok": CHOSEN}
    ours = Router(KimiConfig.from_dict(text_config(shape, dtype="BF16"), where="the bench"), EXPERTS)
    theirs = MoEGate(ModelArgs(**shape, norm_topk_prob=True, routed_scaling_factor=2.827))
    for router in (ours, theirs):
        router.weight, router.e_score_correction_bias = weight, bias
    exact = _exact(*(np.array(each.astype(mx.float32), np.float64) for each in (x, weight, bias)))
    wrong = [_differing(np.array(router(x)[0]), exact) for router in (ours, theirs)]
    return Row(
        name=f"router {seed}",
        ours=wrong[0],
        theirs=wrong[1],
        unit="tokens",
        ratio=wrong[0] / tokens,
        bar=0.0,
        direction="at most",
        note=f"of {tokens:,}; theirs {wrong[1] / tokens:.1%}",
    )


def _exact(x: np.ndarray[Any, Any], weight: np.ndarray[Any, Any], bias: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The chosen experts in float64, by sorting."""
    ranking = 1 / (1 + np.exp(-(x @ weight.T))) + bias
    return np.argsort(-ranking, axis=-1)[:, :CHOSEN]


def _differing(found: np.ndarray[Any, Any], exact: np.ndarray[Any, Any]) -> int:
    return int((np.sort(found, -1) != np.sort(exact, -1)).any(axis=-1).sum())


if __name__ == "__main__":
    sys.exit(main())
