"""Tensor parallel: every machine holds a slice of every layer. Costed to say where it wins; exo-kimi itself does not run it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from exo_kimi.planner.machines.hardware import Machine
from exo_kimi.planner.question import Question
from exo_kimi.planner.search.laws import attention_flops
from exo_kimi.planner.weights.bytes import ModelBytes

DEGREES = (2, 4, 8)
# Beside bytes / bandwidth, a token takes this long whatever the degree. Source: least deviation over eight published points
# (exo with RDMA on M3 Ultra, 1, 2 and 4 machines; `planner/published/`), 4.4 % at most. Their prompts were short.
FIXED_S = 23.8e-3
# Slices are equal, so the smallest machine decides; beyond this ratio most of the largest would lie idle.
MOST_UNEQUAL = 1.34


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorOption:
    """Tensor parallel over some machines: bytes of each, and seconds per token."""

    machines: tuple[str, ...]
    bytes_each: int
    tpot_s: float


def tensor_tpot_s(active_bytes: float, bandwidth_bytes_per_s: float, degree: int) -> float:
    """Seconds per token: bytes / (N * bandwidth) + 23.8 ms. Source: see FIXED_S; only with RDMA (122 all-reduces a token)."""
    return active_bytes / (degree * bandwidth_bytes_per_s) + FIXED_S


def tensor_decode_s(model: ModelBytes, machines: Sequence[Machine], *, cached_tokens: float) -> float:
    """Seconds per token of a model over equal shares: its weights and the heads' arithmetic are divided, and every machine reads
    the whole latent.

    Args:
        model: bytes.
        machines: all of them; the slowest decides.
        cached_tokens: of the one sequence.
    """
    degree = len(machines)
    latent_bytes = cached_tokens * model.kv_token_bytes
    flops = sum(attention_flops(model.config, layer, cached_tokens) for layer in range(model.layers))
    bandwidth = min(machine.bandwidth.number for machine in machines)
    arithmetic_s = flops / degree / min(machine.attention_speed.number for machine in machines)
    return tensor_tpot_s(model.active_bytes() + degree * latent_bytes, bandwidth, degree) + arithmetic_s


def tensor_options(question: Question) -> tuple[TensorOption, ...]:
    """Every degree that the machines allow: RDMA on all of them, memories nearly equal, and a slice that fits each.

    Of the machines with RDMA the largest are taken. None where layers have different numbers of experts: exo's own engine, which
    would run it, builds all layers alike.
    """
    if not question.model.config.is_even:
        return ()
    able = sorted((m for m in question.machines if m.rdma), key=lambda m: (-m.limit_bytes, -m.bandwidth.number, m.name))
    options = (_option(question, able[:degree]) for degree in DEGREES if degree <= len(able))
    return tuple(option for option in options if option is not None)


def _option(question: Question, machines: Sequence[Machine]) -> TensorOption | None:
    model, workload, degree = question.model, question.workload, len(machines)
    if model.config.num_attention_heads % degree:
        return None
    limits = [machine.limit_bytes for machine in machines]
    # The latent is one head: every machine holds it.
    kv_bytes = model.cache_bytes(0, model.layers, tokens=workload.kv_tokens, sequences=workload.concurrency)
    own_bytes = -(-model.total_bytes // degree) + kv_bytes
    other_bytes = question.scratch_bytes + workload.reserve_bytes + workload.server_bytes
    if max(limits) > MOST_UNEQUAL * min(limits) or own_bytes + other_bytes > min(limits):
        return None
    return TensorOption(
        machines=tuple(machine.name for machine in machines),
        bytes_each=own_bytes,
        tpot_s=tensor_decode_s(model, machines, cached_tokens=workload.mean_cached_tokens),
    )
