"""Comparisons of two models: what is measured is what whole models say, on one machine, over two runs, and by a server."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import httpx
import mlx.core as mx
import numpy as np
import pytest

from exo_kimi.checkpoint.checkpoint import Checkpoint
from exo_kimi.checkpoint.tiny.make import make_tiny
from exo_kimi.cli import main
from exo_kimi.compress.compare.command import CompareOptions, compare
from exo_kimi.compress.compare.gates import gates_of
from exo_kimi.compress.compare.replies import Behaviour
from exo_kimi.compress.compare.score import Score
from exo_kimi.compress.compare.server import ModelServer, server_tokens
from exo_kimi.compress.compare.tool_validity import call_problem
from exo_kimi.compress.compare.walks import compare_walks, compare_with_saved, save_walk
from exo_kimi.compress.compare.weights import weight_errors
from exo_kimi.compress.layers import LayerWalk
from exo_kimi.compress.prune.mask import mask, masking
from exo_kimi.compress.prune.plan import read_plan
from exo_kimi.compress.prune.prune import PruneWish, make_plan, write_pruned
from exo_kimi.compress.texts.encoding import Encoded, Encoder
from exo_kimi.compress.texts.prompts import DOMAINS, domain_prompts
from exo_kimi.compress.texts.tool_requests import TOOLS
from exo_kimi.errors import UsageError
from exo_kimi.planner.weights.bytes import bytes_of_manifest
from exo_kimi.planner.weights.measured import pruned_bytes, read_report
from exo_kimi.runtime.loading.loader import load
from tests.compress.conftest import Maker

FAST = ["--count", "1", "--only", "maths,tools", "--max-tokens", "4", "--dtype", "float32"]


def _walk(directory: Path) -> LayerWalk:
    return LayerWalk(checkpoint=Checkpoint(directory), dtype="float32")


def test_a_walk_says_what_the_whole_models_say(tiny: Maker, texts: list[Encoded]) -> None:
    pairs, layers = compare_walks(_walk(tiny("bf16")), _walk(tiny("int4")), texts)
    kl, same, losses = [], [], []
    one, other = (load(tiny(name), dtype="float32") for name in ("bf16", "int4"))
    for text in texts:
        rows = np.flatnonzero(text.counted[1:])
        logs = []
        for model in (one, other):
            logits = model(mx.array(text.ids)[None])[0][mx.array(rows)]
            logs.append(np.array(logits - mx.logsumexp(logits, axis=-1, keepdims=True)).astype(np.float64))
        kl += (np.exp(logs[0]) * (logs[0] - logs[1])).sum(-1).tolist()
        same += (logs[0].argmax(-1) == logs[1].argmax(-1)).tolist()
        losses += (-logs[1][np.arange(len(rows)), text.ids[1:][rows]]).tolist()
    np.testing.assert_allclose(pairs.kl, kl, rtol=1e-2, atol=1e-5)
    np.testing.assert_allclose(pairs.loss, losses, rtol=1e-4)
    assert pairs.same.tolist() == same
    assert pairs.text_of.max() == len(texts) - 1
    assert [layer.layer for layer in layers] == [0, 1, 2, 3]
    assert layers[0].mlp < 1e-6 < 0.01 < layers[1].mlp < 0.5  # int4 rounds experts, and nothing else
    assert all(layer.attention < 1e-5 for layer in layers)


def test_a_mask_in_a_walk_is_the_pruned_model(tiny: Maker, texts: list[Encoded], tmp_path: Path) -> None:
    checkpoint = Checkpoint(tiny("int4"))
    plan = make_plan(checkpoint, PruneWish(keep=8, criterion="random", drop_layers=(2,)))
    write_pruned(checkpoint, plan, tmp_path / "out")
    masked = replace(_walk(tiny("int4")), change=masking(plan, checkpoint.config), skipped=plan.dropped_layers)
    found, _ = compare_walks(_walk(tmp_path / "out"), masked, texts)
    np.testing.assert_allclose(found.kl, 0, atol=1e-9)
    assert found.same.all()


def test_two_runs_are_nearly_one(tiny: Maker, texts: list[Encoded]) -> None:
    """The second run with the first one's likeliest tokens: KL from below and close, everything else exact."""
    exact, _ = compare_walks(_walk(tiny("bf16")), _walk(tiny("int4")), texts)
    for top, near in ((64, 0.2), (1024, 1e-3)):
        saved = save_walk(_walk(tiny("bf16")), texts, name="first", top=top)
        found = compare_with_saved(saved, _walk(tiny("int4")))
        assert (found.kl <= exact.kl + 1e-4).all()
        assert found.kl.mean() >= (1 - near) * exact.kl.mean()
        np.testing.assert_allclose(found.loss, exact.loss, rtol=1e-5)
        np.testing.assert_array_equal(found.same, exact.same)
    with pytest.raises(UsageError, match="another vocabulary"):
        compare_with_saved(replace(saved, ids=saved.ids + 5000), _walk(tiny("int4")))


@pytest.mark.parametrize("command", ["compare", "eval", "saved"])
def test_other_tokenizers_and_vocabularies_are_refused_by_name(
    command: str, tiny: Maker, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two ids that change places leave every size as it was."""
    first, second = tiny("bf16"), tmp_path / "other"
    shutil.copytree(first, second)
    lines = (second / "tiktoken.model").read_text(encoding="utf-8").splitlines()
    (left, a), (right, b) = lines[300].split(), lines[301].split()
    lines[300:302] = [f"{right} {a}", f"{left} {b}"]
    (second / "tiktoken.model").write_text("\n".join(lines) + "\n", encoding="utf-8")
    saved = command == "saved"
    if saved:
        run = str(tmp_path / "run.npz")
        assert main(["compare", str(first), "--save", run, *FAST]) == 0
        command, sides = "compare", [run, str(second)]
        assert main(["compare", run, str(first), *FAST]) == 0
    else:
        sides = [str(first), str(second)] if command == "compare" else [str(first), "--against", str(second)]
    assert main([command, *sides]) != 0
    said = capsys.readouterr().err
    assert "the models have other tokenizers" in said
    assert ("as the run was saved with" if saved else "2 of the first's not alike") in said
    larger = make_tiny(tmp_path / "larger", layout="bf16", config={"vocab_size": 2048})
    sides[-1] = str(larger)
    assert main([command, *sides]) != 0
    assert "the models have other vocabularies" in capsys.readouterr().err


def test_the_command_makes_a_page_a_report_and_a_second_run(
    tiny: Maker, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page, report, run = tmp_path / "r.html", tmp_path / "r.json", tmp_path / "run"
    sides = [str(tiny("bf16")), str(tiny("int4"))]
    status = main(["compare", *sides, *FAST, "--weights", "--html", str(page), "--json", str(report)])
    said = capsys.readouterr().out
    assert status in (0, 1)
    assert "all texts" in said
    assert "tool calls valid" in said
    raw = json.loads(report.read_text(encoding="utf-8"))
    assert raw["overall"]["kl"]["low"] <= raw["overall"]["kl"]["value"] <= raw["overall"]["kl"]["high"]
    assert set(raw["by_domain"]) == {"maths", "tools"}
    assert status == (0 if all(gate["passed"] for gate in raw["gates"]) else 1)
    errors = {each["path"]: each["error"] for each in raw["weights"]}
    assert 0.01 < errors["model.layers.1.mlp.switch_mlp.up_proj"] < 0.2
    assert errors["model.layers.1.self_attn.o_proj"] == 0
    html = page.read_text(encoding="utf-8")
    assert html.count("<svg") == 3
    assert not re.search(r"(?:src|href)=|https?://(?!www\.w3\.org/2000/svg)", html)  # nothing from elsewhere
    assert main(["compare", sides[0], "--save", str(run), *FAST]) == 0
    assert main(["compare", str(run), sides[1], *FAST, "--json", str(report)]) == status
    again = json.loads(report.read_text(encoding="utf-8"))
    assert again["overall"]["bound"]
    assert again["overall"]["kl"]["value"] == pytest.approx(raw["overall"]["kl"]["value"], rel=0.2)
    assert again["behaviours"] == raw["behaviours"]


def test_a_plan_is_judged_before_it_is_written(tiny: Maker, tmp_path: Path) -> None:
    directory, plan, report = tiny("int4"), tmp_path / "plan.json", tmp_path / "report.json"
    assert main(["prune", str(directory), "--by", "random", "--keep", "8", "-o", str(plan)]) == 0
    main(["compare", str(directory), "--plan", str(plan), *FAST, "--json", str(report)])
    raw = json.loads(report.read_text(encoding="utf-8"))
    assert raw["plan"] == read_plan(plan).hash
    written = read_report(report, bytes_of_manifest(Checkpoint(directory).manifest()))
    assert written.kl == raw["overall"]["kl"]["value"]
    assert raw["overall"]["kl"]["value"] > 0.01
    out = tmp_path / "out"
    written = ["prune", str(directory), str(out), "--keep", str(plan), "--domain", "sums", "--report", str(report)]
    assert (main(written) == 0) == all(gate["passed"] for gate in raw["gates"])
    assert main([*written, "--research"]) == 0
    card = (out / "README.md").read_text(encoding="utf-8")
    assert raw["notes"][0] in card


@pytest.mark.parametrize(("variant", "dropped"), [("mlx", ()), ("int4", (2,)), ("bf16", ()), ("groups", ())])
def test_a_masks_bytes_are_those_of_the_checkpoint_to_be(
    variant: str, dropped: tuple[int, ...], tiny: Maker, tmp_path: Path
) -> None:
    checkpoint = Checkpoint(tiny(variant))
    plan = make_plan(checkpoint, PruneWish(keep=12, criterion="random", drop_layers=dropped))
    write_pruned(checkpoint, plan, tmp_path / "out")
    keep = {layer: len(ids) for layer, ids in plan.kept.items()}
    expected = bytes_of_manifest(Checkpoint(tmp_path / "out").manifest())
    found = pruned_bytes(bytes_of_manifest(checkpoint.manifest()), keep, plan.dropped_layers)
    for name in ("layer_bytes", "expert_bytes", "expert_disk_bytes", "widened_bytes", "total_bytes"):
        assert getattr(found, name) == getattr(expected, name), name
    assert found.config.n_routed_experts == 12


def test_weights_of_a_pruned_model_are_those_of_the_experts_that_stayed(tiny: Maker, tmp_path: Path) -> None:
    checkpoint = Checkpoint(tiny("fp8"))
    plan = make_plan(checkpoint, PruneWish(keep=8, criterion="random", drop_layers=(1,)))
    write_pruned(checkpoint, plan, tmp_path / "out")
    errors = list(weight_errors(checkpoint, Checkpoint(tmp_path / "out"), plan))
    assert {each.error for each in errors} == {0.0}
    assert "model.layers.3.mlp.switch_mlp.down_proj" in {each.path for each in errors}
    assert not [each for each in errors if ".layers.1." in each.path]


class _Served:
    """A server whose model is one of the tiny ones, asked a token at a time."""

    def __init__(self, directory: Path) -> None:
        self.model = load(directory, dtype="float32")
        self.tokenizer = Encoder.from_directory(directory).tokenizer

    def __call__(self, request: httpx.Request) -> httpx.Response:
        if request.url.path == "/v1/models":
            return httpx.Response(200, json={"data": [{"id": "tiny"}]})
        body = json.loads(request.content)
        ids, tokens, logs, tops = list(body["prompt"]), [], [], []
        for _ in range(body["max_tokens"]):
            logits = self.model(mx.array([ids]))[0, -1]
            found = np.array(logits - mx.logsumexp(logits))
            best = np.argsort(-found)[: body["logprobs"]]
            ids.append(int(best[0]))
            tokens.append(self._text(best[0]))
            logs.append(float(found[best[0]]))
            tops.append({self._text(token): float(found[token]) for token in best})
        return httpx.Response(
            200,
            json={"choices": [{"logprobs": {"tokens": tokens, "token_logprobs": logs, "top_logprobs": tops}}]},
        )

    def _text(self, token: int) -> str:
        return self.tokenizer.token_bytes(int(token)).decode("utf-8", errors="replace")


def test_a_server_is_judged_by_its_log_probabilities(tiny: Maker) -> None:
    directory = tiny("int4")
    server = ModelServer.open(
        "http://tiny/v1", api_key="k", max_tokens=6, transport=httpx.MockTransport(_Served(directory))
    )
    encoder = Encoder.from_directory(directory)
    prompts = domain_prompts(3, 0, ("maths", "chinese"))
    saved = server_tokens(server, prompts, encoder, say=lambda _: None)
    assert 1 <= len(saved.texts) <= 6
    same = compare_with_saved(saved, _walk(directory))
    np.testing.assert_allclose(same.kl, 0, atol=1e-6)
    np.testing.assert_allclose(same.loss, same.reference_loss, atol=1e-3)
    other = compare_with_saved(saved, _walk(tiny("mlx")))
    assert other.kl.mean() > 10 * same.kl.mean()


def test_gates_close_where_replies_got_worse() -> None:
    def behaviour(right: int, calls: int = 10) -> Behaviour:
        good, used = Score(right=right, count=100), Score(right=calls, count=10)
        return Behaviour(without_loop=good, closed=good, called=used, calls_valid=used)

    assert all(gate.passed for gate in gates_of(behaviour(97), behaviour(95)))
    closed = [gate.name for gate in gates_of(behaviour(97), behaviour(94, calls=9)) if not gate.passed]
    assert len(closed) == 4
    none = Score(right=0, count=0)
    silent = replace(behaviour(97), calls_valid=none)
    assert [gate.name for gate in gates_of(behaviour(97), silent) if not gate.passed] == ["tool calls valid"]
    assert len(gates_of(silent, behaviour(97))) == 3


@pytest.mark.parametrize(
    ("name", "arguments", "problem"),
    [
        ("get_weather", '{"city": "Oslo"}', None),
        ("get_weather", '{"town": "Oslo"}', "get_weather"),
        ("get_weather", '{"city": ', "no JSON"),
        ("fly", "{}", "not declared"),
    ],
)
def test_a_call_is_valid_or_its_problem_is_named(name: str, arguments: str, problem: str | None) -> None:
    found = call_problem(name, arguments, TOOLS)
    assert (found is None) if problem is None else (found is not None and problem in found)


def test_prompts_are_the_same_each_time_all_different_and_their_calls_valid() -> None:
    prompts = domain_prompts(40, 3)
    assert prompts == domain_prompts(40, 3)
    assert prompts != domain_prompts(40, 4)
    assert {prompt.domain for prompt in prompts} == set(DOMAINS)
    asked = [str(prompt.messages[0]["content"]) for prompt in prompts]
    assert len(set(asked)) == len(asked) == 40 * len(DOMAINS)
    calls = [call for prompt in prompts for call in prompt.messages[-1].get("tool_calls", ())]
    assert len(calls) > 20
    assert not [
        call
        for call in calls
        if call_problem(call["function"]["name"], call["function"]["arguments"], TOOLS) is not None
    ]
    for prompt in prompts:
        found = re.fullmatch(
            r"What is the sum of all whole numbers from (\d+) to (\d+)\?", asked[prompts.index(prompt)]
        )
        if found:
            assert f"= {sum(range(int(found[1]), int(found[2]) + 1))}." in prompt.messages[-1]["content"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["{int4}"], "nothing to compare with"),
        (["{int4}", "{bf16}", "--only", "verse"], "no such domain"),
        (["{int4}", "{nowhere}"], "no such checkpoint"),
        (["{int4}", "http://127.0.0.1:9/v1"], "no server answers"),
    ],
)
def test_what_cannot_be_compared_is_said(
    words: list[str], said: str, tiny: Maker, capsys: pytest.CaptureFixture[str]
) -> None:
    places = {"int4": str(tiny("int4")), "bf16": str(tiny("bf16")), "nowhere": "/nowhere"}
    assert main(["compare", *(word.format(**places) for word in words)]) != 0
    assert said in capsys.readouterr().err


def test_a_model_that_fits_no_memory_is_not_asked(
    tiny: Maker, texts: list[Encoded], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its layers fit one by one: it is measured, and the report says why nobody asked it."""
    largest = _walk(tiny("int4")).largest_bytes
    from exo_kimi.compress.compare import command
    from exo_kimi.runtime.stage.memory import FreeMemory

    monkeypatch.setattr(command, "free_memory", lambda: FreeMemory(free_bytes=largest, scope="host"))
    options = CompareOptions(count=1, domains=("maths",), dtype="float32")
    found = compare(str(tiny("int4")), str(tiny("int4")), options, say=lambda _: None)
    assert found.behaviours is None
    assert "serve it and give the address" in found.notes[0]
    assert found.overall.kl.value == pytest.approx(0, abs=1e-9)


def test_a_masked_whole_model_replies_as_the_pruned_one(tiny: Maker, tmp_path: Path) -> None:
    checkpoint = Checkpoint(tiny("mlx"))
    plan = make_plan(checkpoint, PruneWish(keep=12, criterion="random", drop_layers=(2,)))
    write_pruned(checkpoint, plan, tmp_path / "out")
    masked = load(tiny("mlx"), dtype="float32")
    mask(masked, plan)
    tokens = mx.array([[5, 9, 100, 42]])
    assert mx.array_equal(masked(tokens), load(tmp_path / "out", dtype="float32")(tokens)).item()
