"""Scratch of long contexts: what a step cannot do without, not the whole context expanded."""

from __future__ import annotations

import pytest

from exo_kimi.arch.config import KimiConfig
from exo_kimi.arch.scratch import CHUNK_FLOOR, fitting_chunk, scratch_needed
from exo_kimi.checkpoint.tiny.config import text_config
from exo_kimi.planner.workload import EXPANDED_BYTES, make_workload
from exo_kimi.units import GIB


def linear() -> KimiConfig:
    """Kimi Linear 48B-A3B, as far as scratch asks for it."""
    sizes = {"hidden_size": 2304, "num_attention_heads": 32, "kv_lora_rank": 512, "qk_nope_head_dim": 128}
    sizes |= {"qk_rope_head_dim": 64, "v_head_dim": 128, "intermediate_size": 9216, "moe_intermediate_size": 1024}
    return KimiConfig.from_dict(text_config({"model_type": "kimi_linear", **sizes}, dtype="BF16"))


@pytest.mark.parametrize("context", [8192, 131_072, 1_048_576])
def test_what_is_planned_lets_a_step_run_in_half_of_it(context: int) -> None:
    """On Metal a stage takes half, for the graph of one layer is built while another runs."""
    config = linear()
    planned_bytes = make_workload(config, context=context).scratch_bytes(config)
    chunk = fitting_chunk(config, 512, context, scratch_bytes=planned_bytes // 2)
    assert chunk >= 4 * CHUNK_FLOOR
    assert scratch_needed(config, chunk, context) <= planned_bytes // 2


def test_a_million_tokens_take_four_gib_and_not_forty() -> None:
    config = linear()
    assert make_workload(config, context=1_048_576).scratch_bytes(config) == EXPANDED_BYTES == 4 * GIB
