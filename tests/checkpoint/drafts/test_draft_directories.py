"""A head's directory is read strictly, in every spelling, and everything that can be wrong with it has a name."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from exo_kimi.arch.draft_config import DraftConfig
from exo_kimi.arch.draft_modules import draft_kv_bytes_per_token, draft_modules, feature_bytes_per_token
from exo_kimi.checkpoint.checkpoint import Checkpoint
from exo_kimi.checkpoint.doctor.findings import Diagnosis
from exo_kimi.checkpoint.drafts.doctor import DoctorOptions, examine_any
from exo_kimi.checkpoint.drafts.manifest import resolve_draft
from exo_kimi.checkpoint.drafts.report import DraftReport, inspect_any
from exo_kimi.checkpoint.tiny.draft import draft_raw_config, make_tiny_draft
from exo_kimi.checkpoint.tiny.make import make_tiny
from exo_kimi.errors import CheckpointError, CheckpointProblems, ConfigError, UsageError
from exo_kimi.runtime.loading.draft import load_draft_head

DATA = Path(str(files("exo_kimi").joinpath("data")))
TINY, HEAD = DATA / "tiny-kimi-k2", DATA / "tiny-kimi-k2-draft"
Tensors = dict[str, Any]


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint(make_tiny(tmp_path_factory.mktemp("target"), layout="bf16", dtype="F32"))


@pytest.fixture
def head(tmp_path: Path, target: Checkpoint) -> Path:
    return make_tiny_draft(tmp_path / "head", target.config, draft_vocab_size=64, version="3.1", dtype="F32")


def change(head: Path, edit: Callable[[Tensors], None]) -> None:
    """Rewrite the head's tensors."""
    tensors = load_file(head / "model.safetensors")
    edit(tensors)
    save_file(tensors, head / "model.safetensors")


def configure(head: Path, **more: Any) -> None:
    path = head / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | more))


def diagnosed(head: Path, target: Path | None = None, **more: Any) -> Diagnosis:
    return examine_any(head, DoctorOptions(target=target, **more))


def words(diagnosis: Diagnosis) -> str:
    return "\n".join(str(finding.error) for finding in diagnosis.findings)


def test_the_shipped_head_is_healthy_and_its_targets() -> None:
    diagnosis = diagnosed(HEAD, TINY, deep=True)
    assert diagnosis.healthy and not diagnosis.findings
    assert any("trained on this target" in note for note in diagnosis.notes)
    assert sum(path.stat().st_size for path in HEAD.iterdir()) < 1_000_000
    report = inspect_any(HEAD)
    assert isinstance(report, DraftReport) and not report.problems
    assert "EAGLE-3.1, MLA" in report.to_text() and "embedding of its target" in report.to_text()
    assert json.loads(report.to_json())["draft_head"]["draft_vocab_size"] == 1024


def test_a_head_of_a_target_in_other_bits_is_its_head_and_one_of_another_training_is_not(
    tmp_path: Path, target: Checkpoint
) -> None:
    from exo_kimi.checkpoint.fingerprint import norms_fingerprint

    same = [make_tiny(tmp_path / name, layout=name, seed=0) for name in ("mlx", "int4", "bf16")]  # type: ignore[arg-type]
    assert len({norms_fingerprint(Checkpoint(each).manifest()) for each in same}) == 1
    noted = {"target_fingerprint": norms_fingerprint(Checkpoint(same[0]).manifest())}
    head = make_tiny_draft(tmp_path / "head", target.config, config=noted)
    assert all(diagnosed(head, each).healthy for each in same)
    other = make_tiny(tmp_path / "other", seed=1)
    assert "trained on another model" in words(diagnosed(head, other))


def test_a_copied_embedding_tells_the_target(tmp_path: Path, target: Checkpoint, head: Path) -> None:
    assert "another model's" in words(diagnosed(head, target.directory))
    rows = {}
    for path in target.directory.glob("*.safetensors"):
        rows |= {name: value for name, value in load_file(path).items() if "embed_tokens" in name}

    def copy(tensors: Tensors) -> None:
        tensors["embed_tokens.weight"] = rows["model.embed_tokens.weight"]

    change(head, copy)
    diagnosis = diagnosed(head, target.directory)
    assert diagnosis.healthy and any("are the target's" in note for note in diagnosis.notes)
    change(head, lambda tensors: tensors.update({"embed_tokens.weight": tensors["embed_tokens.weight"] * 1.01 + 0.01}))
    diagnosis = diagnosed(head, target.directory)
    assert diagnosis.healthy and "another revision" in words(diagnosis)
    packed = make_tiny(tmp_path / "packed", recipe="uniform4")
    assert any("as far as bits tell" in note for note in diagnosed(head, packed).notes)


def test_ids_that_were_added_already_are_refused_with_and_without_their_marks(head: Path, target: Checkpoint) -> None:
    def add(tensors: Tensors) -> None:
        tensors["d2t"] = tensors["d2t"] + np.arange(len(tensors["d2t"]))

    change(head, add)
    assert "t2d are of two vocabularies" in words(diagnosed(head)) or "leaves the target's" in words(diagnosed(head))
    change(head, lambda tensors: tensors.pop("t2d"))
    assert "nothing is to be added" in words(diagnosed(head)) or "added twice" in words(diagnosed(head))
    with pytest.raises(CheckpointError):
        load_draft_head(head, target)


def test_ids_added_already_that_stay_inside_are_refused_too(tmp_path: Path, target: Checkpoint) -> None:
    """Of the first tokens of a vocabulary, twice their ids are ids as well."""
    head = make_tiny_draft(tmp_path, target.config, draft_vocab_size=64, dtype="F32")

    def small(tensors: Tensors) -> None:
        tensors["d2t"] = np.arange(64) * 2  # the ids 0, 2, 4 ... themselves, in place of 0, 1, 2 ...
        tensors.pop("t2d")

    change(head, small)
    assert "added twice" in words(diagnosed(head))


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda t: t.pop("midlayer.mlp.up_proj.weight"), "layers.0.mlp.up_proj.weight is missing"),
        (lambda t: t.pop("fc_norm.1.weight"), "fc_norm.1.weight is missing"),
        (lambda t: t.pop("lm_head.weight"), "lm_head.weight is missing"),
        (lambda t: t.pop("d2t"), "d2t is missing"),
        (lambda t: t.update({"extra.weight": np.zeros(3, np.float32)}), "no module consumes it"),
        (lambda t: t.update({"model.norm.weight": t["norm.weight"]}), "the same weight under another name"),
        (lambda t: t.update({"fc.weight": t["fc.weight"][:, :-1].copy()}), "its shape fits no reading"),
        (lambda t: t.update({"d2t": t["d2t"][:-1].copy()}), "d2t"),
        (lambda t: t.update({"d2t": t["d2t"].astype(np.float32)}), "d2t"),
        (lambda t: t.update({"d2t": np.zeros_like(t["d2t"]) - np.arange(64)}), "two tokens of the head one id"),
    ],
)
def test_what_is_missing_left_over_or_of_another_shape_is_named(
    head: Path, target: Checkpoint, edit: Callable[[Tensors], None], said: str
) -> None:
    change(head, edit)
    assert said in words(diagnosed(head))
    assert inspect_any(head).problems
    with pytest.raises(CheckpointError):
        load_draft_head(head, target)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"num_hidden_layers": 2}, "num_hidden_layers is not implemented"),
        ({"hidden_act": "gelu"}, "hidden_act is not implemented"),
        ({"rope_theta": None}, "rope_theta is missing"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"draft_vocab_size": 10**6}, "draft_vocab_size at most vocab_size"),
        ({"attention_window": 5}, "may change the maths"),
        ({"norm_output": "yes"}, "norm_output has the wrong type"),
        ({"eagle_aux_hidden_state_layer_ids": [1, 2]}, "stands twice"),
        ({"eagle_config": {"use_aux_hidden_state": False}}, "use_aux_hidden_state true"),
        (
            {"eagle_config": {"eagle_aux_hidden_state_layer_ids": [1, 2]}, "num_aux_hidden_states": 3},
            "3 feature layers",
        ),
    ],
)
def test_a_config_that_asks_for_other_maths_is_refused(head: Path, more: dict[str, Any], said: str) -> None:
    configure(head, **more)
    assert said in words(diagnosed(head))


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"target_hidden_size": 96}, "another hidden_size"),
        ({"vocab_size": 4096}, "another vocab_size"),
        ({"eagle_config": {"eagle_aux_hidden_state_layer_ids": [1, 2, 60]}}, "layers that its target does not have"),
        ({"eagle_config": {"eagle_aux_hidden_state_layer_ids": [3, 2, 1]}}, "do not ascend"),
    ],
)
def test_a_head_for_another_target_is_refused_by_name(
    tmp_path: Path, target: Checkpoint, more: dict[str, Any], said: str
) -> None:
    head = make_tiny_draft(tmp_path, target.config, config=more)
    assert said in words(diagnosed(head, target.directory))
    with pytest.raises(CheckpointError, match=said):
        load_draft_head(head, target)


def test_a_head_of_others_is_told_what_other_programs_read(head: Path, target: Checkpoint) -> None:
    layers = resolve_draft(head).config.feature_layers(target.config.num_hidden_layers)
    notes = diagnosed(head, target.directory).notes
    assert any(f"would be {[layer + 1 for layer in layers]}" in note for note in notes)
    assert not any("programs differ" in note for note in diagnosed(HEAD, TINY).notes)


def test_layers_are_those_of_the_config_or_the_published_default(target: Checkpoint) -> None:
    raw = draft_raw_config(target.config, kind="mla")
    assert DraftConfig.from_dict(raw | {"eagle_config": {}}).feature_layers(61) == (2, 30, 58)
    top = DraftConfig.from_dict(raw | {"eagle_config": {}, "eagle_aux_hidden_state_layer_ids": [0, 5, 61]})
    assert top.feature_layers(61) == (0, 5, 61)
    with pytest.raises(ConfigError, match="too few for the default"):
        DraftConfig.from_dict(raw | {"eagle_config": {}}).feature_layers(6)


def test_k2s_head_has_the_published_bytes() -> None:
    """About 2 GB in bf16 with 32,000 tokens, 1,152 bytes of cache and 43,008 of features a token."""
    from exo_kimi.planner.weights.catalog import published_model

    config = DraftConfig.from_dict(
        draft_raw_config(published_model("kimi-k2.6").config, kind="mla", draft_vocab_size=32_000)
    )
    own = [spec for spec in draft_modules(config) if spec.path != "embed_tokens"]
    assert sum(2 * spec.parameters for spec in own) == pytest.approx(1.8e9, rel=0.02)
    assert draft_kv_bytes_per_token(config) == 1_152
    assert feature_bytes_per_token(config) == 43_008


def test_every_finding_of_a_head_comes_at_once(head: Path) -> None:
    change(head, lambda tensors: [tensors.pop(name) for name in ("d2t", "norm.weight")])  # type: ignore[arg-type]
    with pytest.raises(CheckpointProblems) as caught:
        resolve_draft(head)
    assert len(caught.value.problems) == 2


def test_deep_reads_the_weights(head: Path) -> None:
    def damage(tensors: Tensors) -> None:
        tensors["fc.weight"][0, 0] = np.nan

    change(head, damage)
    assert diagnosed(head).healthy
    assert "NaN" in words(diagnosed(head, deep=True))


def test_doctor_takes_a_target_for_heads_alone_and_repairs_none(head: Path, target: Checkpoint) -> None:
    with pytest.raises(UsageError, match="--target is for a draft head"):
        diagnosed(target.directory, target.directory)
    with pytest.raises(UsageError, match="nothing of a draft head"):
        diagnosed(head, fix=True)


def test_the_commands_say_it_in_one_line_and_exit_1(head: Path, target: Checkpoint) -> None:
    run = [sys.executable, "-m", "exo_kimi", "doctor", str(head), "--target", str(target.directory)]
    done = subprocess.run(run, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "another model's" in done.stdout and "Traceback" not in done.stderr
