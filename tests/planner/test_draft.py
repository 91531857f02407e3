"""A draft head in a plan: its bytes to the last one, what travels, what a step costs, and when it pays."""

from __future__ import annotations

from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from exo_kimi.checkpoint.checkpoint import Checkpoint
from exo_kimi.checkpoint.tiny.draft import make_tiny_draft
from exo_kimi.checkpoint.tiny.make import make_tiny
from exo_kimi.errors import CheckpointProblems, PlanError, UsageError
from exo_kimi.planner.command import plan_answer
from exo_kimi.planner.search.cost import PlacedSplit, decode_stages_s, drafted_step_s, hops_s, ttft_s
from exo_kimi.planner.search.tables import need_table
from exo_kimi.planner.show.draft import break_even, chance_of, drafted_tokens_per_s, expected_tokens
from exo_kimi.planner.weights.draft import WAITING_ROWS, draft_bytes
from exo_kimi.runtime.loading.draft import load_draft_head
from exo_kimi.runtime.stage import drafting

FOUNDING = "m3-ultra-512, m2-ultra-192"


def planned(draft: str | None = "kimi-k2.6-mla@4", **more: Any) -> PlacedSplit:
    given = {"cluster": FOUNDING, "model": "kimi-k2.6", "recipe": "q34+q6", "draft": draft}
    return plan_answer(**(given | more)).split  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint(make_tiny(tmp_path_factory.mktemp("target")))


@pytest.mark.parametrize("kind", ["mha", "mla"])
@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("own", [True, False])
def test_bytes_of_a_head_are_those_that_it_takes_when_loaded(
    tmp_path: Path, target: Checkpoint, kind: Any, bits: int | None, own: bool
) -> None:
    size = 100 if own else None
    make_tiny_draft(
        tmp_path, target.config, kind=kind, bits=bits, own_embedding=own, own_head=own, draft_vocab_size=size
    )
    counted, head = draft_bytes(tmp_path, target.config), load_draft_head(tmp_path, target)
    held = sum(value.nbytes for _, value in tree_flatten(head.parameters()))
    ids = head.to_target_ids(mx.arange(1)).dtype.size * 100 if own else 0
    assert counted.resident_bytes == held + ids
    caches = head.make_cache()
    fused = head.fuse(mx.zeros((256, 3 * target.config.hidden_size), mx.bfloat16))
    head(mx.zeros((256,), mx.int32), fused.astype(mx.bfloat16), [(256, caches)])
    assert caches[0].nbytes == 256 * counted.kv_token_bytes
    assert (counted.borrows_embedding, counted.borrows_head) == (not own, not own)


def test_the_need_of_every_range_is_that_of_its_table() -> None:
    for more in ({}, {"concurrency": 3}):
        question = planned(**more).question
        table = need_table(question)
        for start, end in ((0, 61), (0, 1), (0, 45), (45, 61), (60, 61), (2, 31), (30, 58)):
            assert table[start, end] == question.need(start, end).total_bytes


def test_only_the_last_stage_holds_the_head_and_every_stage_its_features() -> None:
    split = planned()
    question, head = split.question, split.question.draft
    assert head is not None
    bare = planned(None).question
    (first, last), chunk = split.stages, question.workload.prefill_chunk
    more = [
        question.need(each.start_layer, each.end_layer).total_bytes
        - bare.need(each.start_layer, each.end_layer).total_bytes
        for each in (first, last)
    ]
    assert more[0] == chunk * 2 * 14_336
    kv_bytes = question.workload.kv_tokens * 1_152
    features = (chunk + WAITING_ROWS) * 3 * 14_336
    assert more[1] == head.resident_bytes + question.model.embedding_bytes + kv_bytes + features
    assert WAITING_ROWS == drafting.MOST_WAITING


def test_features_travel_with_the_hidden_state() -> None:
    split, bare = planned(split="44,17", force=True), planned(None, split="44,17")
    link = split.question.cluster.link(*(stage.machine for stage in split.stages))
    for tokens in (1, 512):
        (with_features,), (without,) = hops_s(split, tokens), hops_s(bare, tokens)
        assert with_features - without == pytest.approx(
            link.transfer_s(3 * tokens * 14_336) - link.transfer_s(tokens * 14_336)
        )
    # A boundary at a feature's layer sends it anyway: it is the hidden state.
    assert planned(split="30,31", force=True).question.draft.features_before(30) == 1  # type: ignore[union-attr]


def test_the_search_knows_what_features_cost_on_a_slow_link(tmp_path: Path) -> None:
    """A boundary behind layer 30 sends one more row of every token; the search finds the least of all splits that fit."""
    entry = '[[machine]]\nname = "{}"\nchip = "m3-ultra"\nmemory = "512GiB"\n'
    link = '[[link]]\nbetween = ["a", "b"]\nlatency_s = 1e-4\nbandwidth_bytes_per_s = 1e7\n'
    (tmp_path / "cluster.toml").write_text(entry.format("a") + entry.format("b") + link)
    asked: dict[str, Any] = {"cluster": tmp_path / "cluster.toml", "recipe": None, "objective": "ttft"}
    best, bare = planned(**asked), planned(None, **asked)
    times = {}
    for cut in range(28, 34):
        with suppress(PlanError):
            times[cut] = ttft_s(planned(**asked, split=f"{cut},{61 - cut}"))
    assert min(times) < 30 < 31 < max(times)
    assert ttft_s(best) == pytest.approx(min(times.values()), rel=1e-6)
    assert best.stages[0].end_layer <= 30 < bare.stages[0].end_layer, "another one than without a head"


def test_a_step_with_guesses_costs_what_it_reads() -> None:
    split = planned()
    head, machine = split.question.draft, split.stages[-1].machine
    assert head is not None
    for guesses in (1, 3):
        each_bytes = head.step_bytes + split.question.workload.mean_cached_tokens * head.kv_token_bytes
        chain_s = guesses * (each_bytes / machine.bandwidth.number + machine.overhead.number)
        chain_s += head.enter_bytes / machine.bandwidth.number
        verify_s = sum(decode_stages_s(split, batch=guesses + 1)) + sum(hops_s(split, guesses + 1))
        assert drafted_step_s(split, guesses) == pytest.approx(verify_s + chain_s)
    assert all(one < other for one, other in pairwise(break_even(split, guesses) for guesses in range(7)))
    plain = split.prediction.decode_tokens_per_s
    for guesses in range(1, 7):
        even = chance_of(break_even(split, guesses), guesses)
        assert drafted_tokens_per_s(split, guesses, even) == pytest.approx(plain, rel=1e-6)


def test_chances_and_tokens_are_each_others_inverse() -> None:
    assert expected_tokens(0.5, 3) == 1.875
    for chance in np.linspace(0.05, 0.95, 7):
        assert chance_of(expected_tokens(float(chance), 3), 3) == pytest.approx(chance, abs=1e-9)


def test_the_text_says_bytes_links_and_break_even(tmp_path: Path, target: Checkpoint) -> None:
    text = plan_answer(cluster=FOUNDING, model="kimi-k2.6", recipe="q34+q6", draft="kimi-k2.6-mla@4").text
    assert "Draft head" in text and "pays from" in text and "published: 2.32" in text
    assert "2 more hidden states of 3 a token, 28,672 bytes" in text
    make_tiny_draft(tmp_path, target.config, bits=4)
    text = plan_answer(cluster="m4-max-128", directory=target.directory, draft=tmp_path).text
    size = draft_bytes(tmp_path, target.config).resident_bytes
    assert f"({size} bytes) of weights" in text and "headers" in text


def test_a_published_head_with_attention_as_in_llama_keeps_more_of_each_token() -> None:
    split = planned("kimi-k2.5-mha@4", model="kimi-k2.5", raise_limits=True)
    head = split.question.draft
    assert head is not None and not head.borrows_embedding
    assert head.kv_token_bytes == 2 * 64 * 128 * 2
    assert head.layers == (2, 30, 58)


def test_a_wrong_head_is_refused(tmp_path: Path, target: Checkpoint) -> None:
    with pytest.raises(UsageError, match="no such draft head"):
        planned("kimi-k9")
    with pytest.raises(UsageError, match="no such draft head"):
        planned("kimi-k2.6-mla@5")
    make_tiny_draft(tmp_path, target.config)
    with pytest.raises(CheckpointProblems, match="hidden_size"):
        draft_bytes(tmp_path, planned().question.model.config)
    with pytest.raises(UsageError, match="drafts nothing"):
        planned(ends_everywhere=True)
