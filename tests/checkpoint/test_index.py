"""A directory's headers, all of them and nothing else; what is wrong with files is carried or raised, never lost."""

from __future__ import annotations

import builtins
import io
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from exo_kimi.checkpoint.index import CheckpointIndex, open_index
from exo_kimi.checkpoint.manifest import resolve
from exo_kimi.checkpoint.safetensors_io import StoredTensor, write_file
from exo_kimi.errors import (
    CheckpointProblems,
    ConfigError,
    NotACheckpointError,
    TensorFileError,
    UnexpectedTensorError,
    UnsafeFormatError,
    UnsupportedModelError,
)

ONE = {"x": StoredTensor("F32", np.ones(1, np.float32))}


def messages(index: CheckpointIndex) -> str:
    with pytest.raises(CheckpointProblems) as caught:
        resolve(index)
    assert all(problem.where for problem in caught.value.problems)
    return "\n".join(f"{type(problem).__name__} {problem}" for problem in caught.value.problems)


def test_no_weight_byte_is_read(make, flip_weights, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = make()
    before = resolve(open_index(directory))
    flip_weights(directory, open_index(directory).tensors)
    last_header_byte = {}
    for path in directory.glob("*.safetensors"):
        last_header_byte[path.name] = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    read_bytes: dict[str, int] = {}

    class Counting(io.FileIO):
        def read(self, size: int = -1) -> bytes:
            data = super().read(size)
            name = Path(names.get(self.name, str(self.name))).name
            read_bytes[name] = read_bytes.get(name, 0) + len(data)
            return data

    opened, os_opened = io.open, os.open
    names: dict[Any, str] = {}

    def os_spy(path: Any, *args: Any, **kwargs: Any) -> int:
        descriptor = os_opened(path, *args, **kwargs)
        names[descriptor] = str(path)
        return descriptor

    def spy(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if names.get(file, str(file)).endswith(".safetensors"):
            return Counting(file, "r")
        return opened(file, mode, *args, **kwargs)

    monkeypatch.setattr(os, "open", os_spy)
    monkeypatch.setattr(io, "open", spy)
    monkeypatch.setattr(builtins, "open", spy)
    manifest = resolve(open_index(directory))
    assert manifest.fingerprint == before.fingerprint
    assert manifest.sources == before.sources
    assert read_bytes == last_header_byte


@pytest.mark.parametrize("shards", [1, 2, 5])
def test_the_index_of_any_number_of_files_holds_the_same_tensors(make, shards: int) -> None:
    index = open_index(make(shards=shards))
    assert len({entry.file for entry in index.tensors.values()}) == shards
    assert {name: (e.dtype, e.shape) for name, e in index.tensors.items()} == {
        name: (e.dtype, e.shape) for name, e in open_index(make(shards=2)).tensors.items()
    }


def test_the_fingerprint_follows_headers_and_architecture_only(make, edit_config, flip_weights) -> None:
    directory = make()
    first = open_index(directory)
    flip_weights(directory, first.tensors)
    edit_config(directory, lambda raw: raw.update(transformers_version="5.0", quantization={"bits": 2}))
    assert open_index(directory).fingerprint == first.fingerprint
    edit_config(directory, lambda raw: raw.update(rope_theta=10000.0))
    assert open_index(directory).fingerprint != first.fingerprint
    assert open_index(make(recipe="uniform4")).fingerprint != first.fingerprint


def test_a_missing_directory_is_not_a_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(NotACheckpointError, match="no such checkpoint directory"):
        open_index(tmp_path / "nowhere")


def test_a_directory_without_config_or_weights_is_not_a_checkpoint(make, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(NotACheckpointError, match=r"no config\.json"):
        open_index(tmp_path / "empty")
    directory = make()
    for path in directory.glob("*.safetensors*"):
        path.unlink()
    with pytest.raises(NotACheckpointError, match="no weights"):
        open_index(directory)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "model.pt", "model.pth"])
def test_pickled_weights_are_refused_unread(make, name: str) -> None:
    directory = make()
    for path in directory.glob("*.safetensors*"):
        path.unlink()
    (directory / name).write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    with pytest.raises(UnsafeFormatError, match="pickled") as caught:
        open_index(directory)
    assert name in str(caught.value)


def test_an_index_that_names_pickles_is_refused(make) -> None:
    directory = make()
    index = {"weight_map": {"model.norm.weight": "pytorch_model.bin"}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UnsafeFormatError):
        open_index(directory)


@pytest.mark.parametrize(
    "file", ["../other/model.safetensors", "/etc/x.safetensors", "a/b.safetensors", "x.txt", 7, None]
)
def test_an_index_cannot_point_outside_the_directory(make, file: object) -> None:
    directory = make()
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": file}}))
    with pytest.raises(TensorFileError, match="cannot hold its weights"):
        open_index(directory)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": 3}', "{not json", "[" * 100_000])
def test_a_broken_index_is_one_clear_error(make, text: str) -> None:
    directory = make()
    (directory / "model.safetensors.index.json").write_text(text)
    with pytest.raises(TensorFileError, match="cannot be read"):
        open_index(directory)


def test_another_model_or_a_broken_config_is_refused(make, edit_config) -> None:
    directory = make()
    edit_config(directory, lambda raw: raw.update(model_type="llama"))
    with pytest.raises(UnsupportedModelError):
        open_index(directory)
    (directory / "config.json").write_text("{")
    with pytest.raises(ConfigError):
        open_index(directory)


def test_a_truncated_file_is_named_with_the_bytes_it_lacks(make) -> None:
    directory = make()
    path = directory / "model-00002-of-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    text = messages(open_index(directory))
    assert "TensorFileError model-00002-of-00002.safetensors is truncated: 1,000 bytes of its data are missing" in text
    assert "MissingTensorError" not in text


@pytest.mark.parametrize("with_index", [True, False])
def test_a_missing_file_is_one_problem_and_not_one_for_each_tensor(make, with_index: bool) -> None:
    directory = make(shards=3)
    (directory / "model-00002-of-00003.safetensors").unlink()
    if not with_index:
        (directory / "model.safetensors.index.json").unlink()
    with pytest.raises(CheckpointProblems) as caught:
        resolve(open_index(directory))
    assert len(caught.value.problems) == 1
    assert "model-00002-of-00003.safetensors is missing" in str(caught.value)


def test_a_file_with_a_broken_header_is_one_problem(make) -> None:
    directory = make(shards=3)
    (directory / "model-00002-of-00003.safetensors").write_bytes(b"<html>not found</html>")
    with pytest.raises(CheckpointProblems) as caught:
        resolve(open_index(directory))
    assert len(caught.value.problems) == 1
    assert "not a safetensors file" in str(caught.value)


def test_a_stage_needs_its_own_files_only(make) -> None:
    directory = make(shards=3, recipe="uniform4")
    last = {path.name for path in directory.glob("*.safetensors")} - {
        entry.file
        for source in resolve(open_index(directory), 0, 1).sources
        for p in source.parts.values()
        for entry in p
    }
    assert last
    for name in last:
        (directory / name).unlink()
    index = open_index(directory)
    assert resolve(index, 0, 1).disk_bytes > 0
    with pytest.raises(CheckpointProblems, match="is missing"):
        resolve(index, 1, 3)


def test_a_link_that_leads_nowhere_is_a_problem_of_that_file(make) -> None:
    directory = make(shards=2)
    path = directory / "model-00002-of-00002.safetensors"
    path.unlink()
    path.symlink_to("blob-that-was-never-downloaded")
    assert "model-00002-of-00002.safetensors cannot be read" in messages(open_index(directory))


@pytest.mark.parametrize("change", ["renamed", "moved", "unlisted"])
def test_an_index_that_disagrees_with_the_files_is_a_problem(make, change: str) -> None:
    directory = make()
    path = directory / "model.safetensors.index.json"
    raw = json.loads(path.read_text())
    name = "model.norm.weight"
    file = raw["weight_map"].pop(name)
    if change == "renamed":
        raw["weight_map"]["model.norm.other"] = file
    elif change == "moved":
        raw["weight_map"][name] = "model-00001-of-00002.safetensors"
    path.write_text(json.dumps(raw))
    text = messages(open_index(directory))
    assert "TensorFileError" in text
    assert "model.norm" in text
    assert "model.safetensors.index.json" in text


def test_a_tensor_in_two_files_is_a_problem(make) -> None:
    directory = make(shards=2)
    (directory / "model.safetensors.index.json").unlink()
    shutil.copy(directory / "model-00001-of-00002.safetensors", directory / "model-copy.safetensors")
    index = open_index(directory)
    assert all(isinstance(problem.error, UnexpectedTensorError) for problem in index.problems)
    assert "is in two files" in messages(index)


def test_files_that_the_index_does_not_name_are_noted(make) -> None:
    directory = make()
    write_file(directory / "adapters.safetensors", ONE)
    assert any("adapters.safetensors" in note for note in resolve(open_index(directory)).notes)


def test_unknown_tensors_are_unexpected_wherever_the_stage_is(make) -> None:
    index = open_index(make(extra_tensors={"model.layers.2.mlp.extra.weight": ONE["x"], "surprise": ONE["x"]}))
    for start, end in ((0, 1), (0, 3), (2, 3)):
        with pytest.raises(CheckpointProblems) as caught:
            resolve(index, start, end)
        assert [type(problem) for problem in caught.value.problems] == [UnexpectedTensorError] * 2


def test_tensors_of_rope_and_prediction_layers_are_skipped_and_counted(make) -> None:
    extra = {
        "language_model.model.layers.0.self_attn.rotary_emb.inv_freq": ONE["x"],
        "language_model.model.layers.3.eh_proj.weight": ONE["x"],
        "language_model.model.layers.3.self_attn.o_proj.weight": ONE["x"],
    }
    manifest = resolve(open_index(make(prefix=True, vision=True, extra_tensors=extra)))
    assert [note for note in manifest.notes if "skipped" in note] == [
        "2 tensors skipped: multi-token prediction layer",
        "1 tensor skipped: rope frequencies, which follow from config.json",
    ]


def test_tensors_of_a_tower_that_config_json_does_not_describe_are_skipped_and_counted(make, edit_config) -> None:
    root = make(prefix=True, vision=True)
    assert not [note for note in resolve(open_index(root)).notes if "skipped" in note]
    edit_config(root, lambda config: config.pop("vision_config"))
    assert [note for note in resolve(open_index(root)).notes if "skipped" in note] == [
        "6 tensors skipped: vision projector",
        "29 tensors skipped: vision tower",
    ]


def test_a_config_with_too_few_layers_does_not_cut_the_model_short(make, edit_config) -> None:
    directory = make()
    edit_config(directory, lambda raw: raw.update(num_hidden_layers=2))
    assert "config.json has num_hidden_layers 2" in messages(open_index(directory))


def test_the_same_weight_under_two_names_is_unexpected(make) -> None:
    directory = make(extra_tensors={"language_model.model.norm.weight": ONE["x"]})
    assert "is the same weight under another name" in messages(open_index(directory))


@pytest.mark.parametrize("count", [1, 2])
def test_an_expert_beyond_the_last_is_unexpected(make, edit_config: Callable[..., None], count: int) -> None:
    directory = make(layout="bf16")
    edit_config(directory, lambda raw: raw.update(n_routed_experts=4 - count))
    assert f"config.json has n_routed_experts {4 - count}" in messages(open_index(directory))
