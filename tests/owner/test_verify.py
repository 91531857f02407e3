"""`exo-kimi verify` passes here, and each of its checks fails when its subject is broken on purpose."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from exo_kimi.client.demo import shipped_model
from exo_kimi.errors import AddressError, UsageError
from exo_kimi.owner.verify import machine, ops
from exo_kimi.owner.verify.check import CheckResult, VerifyCheck, run_check
from exo_kimi.owner.verify.ops import MOVES, OPERATIONS, verify_ops
from exo_kimi.owner.verify.run import Measures, VerifyOptions, to_json, verify
from exo_kimi.planner.machines.cluster import read_cluster
from exo_kimi.runtime.loading.single_layer import run_layer

PACKAGE = Path(__file__).parents[2] / "exo_kimi"
PROFILE = {"measured": {"bandwidth_bytes_per_s": 1e9, "prefill_flops_per_s": 1e12, "overhead_per_layer_s": 1e-5}}


def test_every_operation_is_right_here() -> None:
    found = verify_ops()
    assert found.verdict == "ok", found.found
    assert found.values["errors"].keys() == OPERATIONS.keys()


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_that_is_off_by_a_little_is_found(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    operation = OPERATIONS[name]
    covered = operation.covers[0]

    def spoil(real: Callable[..., Any]) -> Callable[..., Any]:
        def wrong(*arguments: Any, **options: Any) -> Any:
            found = real(*arguments, **options)
            if (
                covered == "quantize"
            ):  # all codes one step up and down are within what it may lose; a wrong scale is not
                codes, scales, biases = found
                return codes, scales * 1.2, biases
            return found[..., ::-1] if operation.exact else found * 1.05

        return wrong

    if covered == "matmul":  # an operator: nothing to put in its place
        broken = ops.Operation(
            covers=("matmul",), run=lambda dtype: (operation.run(dtype)[0] * 1.05, operation.run(dtype)[1])
        )
        assert verify_ops({name: broken}).verdict == "failed"
        return
    if covered == "compile":
        monkeypatch.setattr(ops, "swiglu", spoil(ops.swiglu))
    else:
        owner = mx.fast if covered.startswith("fast.") else mx
        short = covered.removeprefix("fast.")
        monkeypatch.setattr(owner, short, spoil(getattr(owner, short)))
    if covered == "argpartition":  # in any order: the wrong half
        monkeypatch.setattr(mx, "argpartition", lambda x, kth, axis: mx.argsort(-x, axis=axis))
    if covered == "topk":
        monkeypatch.setattr(mx, "topk", lambda x, k, axis: -mx.sort(-x, axis=axis)[..., 1 : k + 1])
    found = verify_ops({name: operation})
    assert found.verdict == "failed", found.found
    assert name in found.found


def test_no_operation_of_the_model_is_left_out() -> None:
    used = set()
    for folder in ("models", "runtime/stage"):
        for path in (PACKAGE / folder).rglob("*.py"):
            used |= set(re.findall(r"\bmx\.((?:fast\.)?[a-z_0-9]+)\(", path.read_text()))
    covered = {name for operation in OPERATIONS.values() for name in operation.covers}
    machinery = {name for name in used if re.search("memory|cache|device|stream|limit|default", name)}
    assert used - covered - MOVES - machinery == set()


def test_the_tiny_kimi_answers_and_with_a_broken_layer_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    assert machine.tiny_answers().verdict == "ok"
    real = machine.load_stage

    def broken(*arguments: Any, **options: Any) -> Any:
        model = real(*arguments, **options)
        norm = model.layers[0].input_layernorm
        norm.weight = -norm.weight
        return model

    monkeypatch.setattr(machine, "load_stage", broken)
    found = machine.tiny_answers()
    assert found.verdict == "failed" and "?" in found.found


def test_reads_land_in_arrays_and_wrong_or_missing_bytes_are_seen() -> None:
    assert machine.read_into_arrays().verdict == "ok"

    def flipped(descriptor: int, views: list[memoryview], position: int) -> int:
        count = os.preadv(descriptor, views, position)
        views[0][7] ^= 1
        return count

    def short(descriptor: int, views: list[memoryview], position: int) -> int:
        return 0 if position else os.preadv(descriptor, [views[0][:4096]], position)

    for preadv in (flipped, short):
        assert machine.read_into_arrays(preadv).verdict == "failed"


@pytest.mark.parametrize(("other", "slow", "verdict"), [(0.0, 1.0, "ok"), (1e-3, 1.0, "failed"), (0.0, 2.0, "failed")])
def test_early_pieces_must_give_the_same_and_cost_nothing(
    monkeypatch: pytest.MonkeyPatch, other: float, slow: float, verdict: str
) -> None:
    def decode(model: Any) -> tuple[np.ndarray[Any, Any], float]:
        early = model.piece_layers > 0
        return np.ones(3) + (other if early else 0.0), slow if early else 1.0

    monkeypatch.setattr(machine, "_decode", decode)
    monkeypatch.setattr(machine, "load_stage", lambda *_, **__: SimpleNamespace(piece_layers=3))
    assert machine.early_pieces().verdict == verdict


def test_early_pieces_give_the_same_numbers_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "STEPS", 4)
    assert machine.early_pieces().values["same"]


def test_a_wired_limit_below_the_plan_s_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    plan = SimpleNamespace(stages=[SimpleNamespace(wired_limit_mb=490_000)])
    monkeypatch.setattr(machine, "read_plan", lambda _: plan)
    monkeypatch.setattr(mx, "set_wired_limit", lambda _: 0)
    found = [machine.wired_limit(tmp_path, lambda now=now: now).verdict for now in (None, 0, 489_999, 490_000)]
    assert found == ["skipped", "failed", "failed", "ok"]
    assert machine.wired_limit(None, lambda: 0).verdict == "ok"


def test_a_layer_that_is_slow_or_not_finite_is_found() -> None:
    assert machine.real_layer(None, PROFILE).verdict == "skipped"
    good = run_layer(shipped_model(), 1, dtype="float32", tokens=4, decode_steps=2)
    expected_s = good.decode_bytes / 1e9 + 1e-5
    for share, finite, verdict in ((1.0, True, "ok"), (1.4, True, "ok"), (1.6, True, "failed"), (1.0, False, "failed")):
        values = {
            name: getattr(good, name)
            for name in ("decode_bytes", "prefill_tokens", "prefill_s", "load_s", "disk_bytes")
        }
        report = SimpleNamespace(**values, decode_s=share * expected_s, output_is_finite=finite)
        found = machine.real_layer(shipped_model(), PROFILE, slack=1.5, run=lambda *_, report=report, **__: report)
        assert found.verdict == verdict, found.found
    assert machine.real_layer(shipped_model(), PROFILE, layer=1).verdict == "ok"


def test_a_link_that_is_slow_or_silent_is_found() -> None:
    def measured(latency_s: float, rate: float) -> CheckResult:
        return machine.link("mac:1", lambda *_: {"latency_s": latency_s, "bandwidth_bytes_per_s": rate})

    assert machine.link(None, lambda *_: {}).verdict == "skipped"
    assert [measured(1e-4, 1e9).verdict, measured(1e-2, 1e9).verdict, measured(1e-4, 1e7).verdict] == [
        "ok",
        "failed",
        "failed",
    ]

    def silent(*_: object) -> dict[str, float]:
        raise AddressError("the other machine does not answer")

    found, _ = run_check(VerifyCheck(name="link", shows="", run=lambda: machine.link("mac:1", silent)))
    assert found.verdict == "failed" and "does not answer" in found.found


def test_one_file_has_all_of_it_and_plan_takes_it_as_a_profile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "tiny_answers", lambda: 1 / 0)
    measured = {**PROFILE["measured"], "attention_flops_per_s": 1e12}
    whole = {"chip": "Test", "memory_gib": 64.0, "measured": measured, "source": {}}
    said: list[str] = []
    only = ("answers", "wired", "profile")
    measures = Measures(machine=lambda: whole, link=lambda *_: {})
    table, good = verify(VerifyOptions(only=only), measures, say=said.append)
    assert not good and len(said) == 3
    verdicts = {row["name"]: row["verdict"] for row in json.loads(to_json(table))["checks"]}
    assert verdicts == {"answers": "failed", "wired": "skipped", "profile": "ok"}
    assert "ZeroDivisionError" in said[0]
    (tmp_path / "studio.json").write_text(to_json(table))
    cluster = tmp_path / "cluster.toml"
    cluster.write_text('[[machine]]\nname = "studio"\nprofile = "studio.json"\n')
    (found,) = read_cluster(cluster).machines
    assert (found.bandwidth.number, found.bandwidth.status) == (1e9, "measured")
    (tmp_path / "studio.json").write_text('{"checks": []}')
    with pytest.raises(UsageError, match="not a file of `exo-kimi verify`"):
        read_cluster(cluster)
    whole["measured"] = {**measured, "bandwidth_bytes_per_s": 0.0}
    assert not verify(VerifyOptions(only=("profile",)), measures)[1]
    with pytest.raises(UsageError, match="no check is called 'x'"):
        verify(VerifyOptions(only=("x",)), measures)
