"""--fix: what can be derived is written once, completely, beside a copy of the old; weights are never touched."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from exo_kimi.checkpoint.doctor.doctor import doctor
from exo_kimi.checkpoint.doctor.repair import repair
from exo_kimi.checkpoint.index import open_index
from exo_kimi.checkpoint.manifest import resolve
from exo_kimi.errors import NotACheckpointError, UsageError

INDEX = "model.safetensors.index.json"


def config_of(directory: Path) -> dict[str, Any]:
    raw: dict[str, Any] = json.loads((directory / "config.json").read_text())
    return raw


def mlx_reads(section: dict[str, Any], path: str) -> tuple[int, int]:
    """Bits and group as mlx-lm takes them from `quantization`: the module's own entry, else the default."""
    entry = section.get(path, section)
    return entry["bits"], entry["group_size"]


@pytest.mark.parametrize(
    ("recipe", "section"),
    [
        ("uniform3", {"bits": 4, "group_size": 64}),
        ("mixed346", {"bits": 8, "group_size": 32, "mode": "affine"}),
        ("mixed346", {"bits": 4, "group_size": 64, "model.layers.1.mlp.switch_mlp.up_proj": {"bits": 6, "group_size": 64}}),
        ("dq3", {"q_bits": 2, "q_group_size": 64, "modules_to_not_convert": ["lm_head"]}),
        ("uniform6", {"bits": 6, "group_size": 64, "lm_head": False}),
        ("uniform4", {"bits": 4, "group_size": 64, "mode": "mxfp4"}),
        ("mixed346", {}),
    ],
)  # fmt: skip
@pytest.mark.parametrize("prefix", [False, True])
def test_bits_are_rewritten_from_the_shapes(make, recipe: str, section: dict[str, Any], prefix: bool) -> None:
    directory = make(recipe=recipe, prefix=prefix, config={"quantization": section, "quantization_config": section})
    assert doctor(directory).warnings
    assert repair(directory).findings == ()
    raw = config_of(directory)
    manifest = resolve(open_index(directory))
    assert manifest.corrections == {}
    for source in manifest.sources:
        if source.quant is not None and "bits" in raw["quantization"]:
            key = ("language_model." if prefix else "") + source.spec.path
            assert mlx_reads(raw["quantization"], key) == (source.quant.bits, source.quant.group_size)
    if "quantization_config" in raw:
        assert raw["quantization_config"] == raw["quantization"]


def test_a_right_default_is_kept_and_only_what_differs_gets_an_entry(make) -> None:
    directory = make(config={"quantization": {"bits": 6, "group_size": 64}})
    repair(directory)
    section = config_of(directory)["quantization"]
    assert (section["bits"], section["group_size"]) == (6, 64)
    assert all("switch_mlp" in key for key in section if "." in key)


def test_entries_for_plain_modules_are_removed(make) -> None:
    section = {"bits": 4, "group_size": 64, "lm_head": {"bits": 4, "group_size": 64}}
    directory = make(recipe={"*": 4, "lm_head": None}, config={"quantization": section})
    assert repair(directory).findings == ()
    assert "lm_head" not in config_of(directory)["quantization"]


@pytest.mark.parametrize("prefix", [False, True])
def test_int4_numbers_are_mended_where_hugging_face_keeps_them(make, edit_config, prefix: bool) -> None:
    directory = make(layout="int4", prefix=prefix)
    before = config_of(directory)

    def change(raw: dict[str, Any]) -> None:
        section = raw.get("text_config", raw)["quantization_config"]
        section["config_groups"]["group_0"]["weights"].update(num_bits=8, group_size=128)
        section["ignore"].append("re:.*experts.*")

    edit_config(directory, change)
    assert doctor(directory).warnings
    assert repair(directory).findings == ()
    assert config_of(directory) == before


def test_a_second_repair_changes_nothing(make, edit_config) -> None:
    directory = make(config={"quantization": {"bits": 2, "group_size": 64}})
    edit_config(directory, lambda raw: raw.update(model_type="deepseek_v2"))
    (directory / INDEX).write_text("{")
    for name in ("chat_template.jinja", "generation_config.json"):
        (directory / name).unlink()
    first = repair(directory)
    assert first.findings == ()
    assert [change.file for change in first.changes] == [
        INDEX, "config.json", "generation_config.json", "chat_template.jinja",
    ]  # fmt: skip
    files = {path.name: path.stat() for path in directory.iterdir()}
    assert repair(directory).changes == ()
    assert {path.name: path.stat() for path in directory.iterdir()} == files


def test_backups_are_numbered_and_never_overwritten(make, edit_config) -> None:
    directory = make()
    kept = []
    for number, wrong in enumerate(("deepseek_v2", "llama"), start=1):
        edit_config(directory, lambda raw, wrong=wrong: raw.update(model_type=wrong))
        kept.append((directory / "config.json").read_text())
        (change,) = repair(directory).changes
        assert change.backup == f"config.json.bak-{number}"
        assert change.changes == (f"model_type: '{wrong}' -> 'kimi_k2'",)
    assert [(directory / f"config.json.bak-{number}").read_text() for number in (1, 2)] == kept


def test_the_rebuilt_index_is_the_one_that_was_there(make) -> None:
    directory = make(shards=3)
    before = json.loads((directory / INDEX).read_text())
    for damage in ("{", json.dumps({"weight_map": {**before["weight_map"], "x": "model-9.safetensors"}})):
        (directory / INDEX).write_text(damage)
        assert repair(directory).findings == ()
        assert json.loads((directory / INDEX).read_text()) == before


def test_a_link_into_a_cache_is_replaced_and_its_target_left_alone(make, tmp_path: Path, edit_config) -> None:
    directory = make()
    edit_config(directory, lambda raw: raw.update(model_type="llama"))
    blob = tmp_path / "blob"
    (directory / "config.json").rename(blob)
    (directory / "config.json").symlink_to(blob)
    content = blob.read_bytes()
    assert repair(directory).findings == ()
    assert blob.read_bytes() == content
    assert not (directory / "config.json").is_symlink()


def test_stop_ids_keep_what_is_right(make) -> None:
    directory = make()
    path = directory / "generation_config.json"
    vocab = config_of(directory)["vocab_size"]
    eos, end = vocab - 256 + 1, vocab - 256 + 2
    path.write_text(json.dumps({"eos_token_id": [eos, 5], "temperature": 0.6}))
    assert {finding.severity for finding in doctor(directory).findings} == {"error", "warning"}
    assert repair(directory).findings == ()
    assert json.loads(path.read_text()) == {"eos_token_id": [end, eos], "temperature": 0.6}


def test_weights_and_rope_are_never_repaired(make, edit_config) -> None:
    directory = make()
    edit_config(directory, lambda raw: raw.pop("rope_theta"))
    shard = max(directory.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1])
    files = {path.name: path.read_bytes() for path in directory.iterdir()}
    diagnosis = repair(directory)
    assert len(diagnosis.errors) == 2
    assert diagnosis.changes == ()
    assert {path.name: path.read_bytes() for path in directory.iterdir()} == files


def test_what_was_changed_is_told(make, edit_config) -> None:
    directory = make()
    edit_config(directory, lambda raw: raw.update(model_type="llama"))
    text = repair(directory).to_text()
    assert "wrote    config.json; the old one is config.json.bak-1\n  model_type: 'llama' -> 'kimi_k2'" in text


def test_a_repair_that_cannot_write_says_so(make, edit_config, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = make()
    edit_config(directory, lambda raw: raw.update(model_type="llama"))
    before = (directory / "config.json").read_bytes()

    def refuse(*_: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(UsageError, match="cannot be written"):
        repair(directory)
    assert (directory / "config.json").read_bytes() == before


def test_a_missing_directory_is_raised(tmp_path: Path) -> None:
    with pytest.raises(NotACheckpointError):
        repair(tmp_path / "nowhere")
