"""What `inspect` tells: a golden text, JSON that adds up, and every problem of a broken directory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from exo_kimi.checkpoint.doctor.report import inspect, spans
from exo_kimi.checkpoint.tiny.make import LAYOUTS
from exo_kimi.errors import NotACheckpointError

GOLDEN = """\
DIR

model    kimi_k2, 3 layers (dense: 0), hidden 128, vocabulary 640, context 131,072
experts  4, 2 a token, 1 shared
size     0.8 M parameters, 0.6 M active; 960 cache bytes a token (16-bit)

weights  538.91 KiB, 5.84 bits a weight, layout mlx; 113 tensors in 2 files
memory   538.91 KiB when loaded as stored
"""


def test_the_text_begins_with_the_architecture_and_its_bytes(make) -> None:
    directory = make(config={"quantization": {"bits": 4, "group_size": 64}})
    text = inspect(directory).to_text().replace(str(directory), "DIR")
    assert text.startswith(GOLDEN)
    rows = {tuple(" ".join(line.split()).split(" ")) for line in text.splitlines()}
    assert any(row[:6] == ("experts", "down_proj", "4-bit,", "group", "64", "1-2") for row in rows)
    assert any(row[:6] == ("experts", "gate_proj", "3-bit,", "group", "64", "1-2") for row in rows)
    assert any(row[:5] == ("attention", "6-bit,", "group", "64", "0-2") for row in rows)
    assert "tiktoken.model yes" in text
    assert "the shapes say 3-bit" in text
    assert text.endswith("\nno problems\n")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_json_adds_up(make, layout: str) -> None:
    directory = make(layout=layout)
    report = json.loads(inspect(directory).to_json())
    layers = report["layers"]
    assert report["ok"] is True
    assert [row["layer"] for row in layers] == [0, 1, 2]
    for key in ("disk_bytes", "resident_bytes"):
        assert sum(row[key] for row in layers) + report["outside_layers"][key] == report[key]
    assert sum(row["disk_bytes"] for row in report["packing"]) == report["disk_bytes"]
    assert report["problems"] == []
    assert set(report) == {
        "directory",
        "ok",
        "architecture",
        "layouts",
        "files",
        "tensors",
        "disk_bytes",
        "resident_bytes",
        "layers",
        "outside_layers",
        "packing",
        "text_files",
        "notes",
        "problems",
        "fingerprint",
    }


def test_all_problems_are_listed_and_the_rest_is_still_told(make) -> None:
    directory = make(layout="bf16", shards=1)
    path = directory / "model.safetensors"
    content = path.read_bytes().replace(b".0.up_proj", b".0.up_prjo")
    path.write_bytes(content[:-10])
    report = inspect(directory)
    assert not report.ok
    assert report.disk_bytes > 0
    text = report.to_text()
    assert "4 problems\n" not in text
    for words in ("is truncated: 10 bytes", "up_prjo.weight: no module consumes it"):
        assert words in text
    assert {problem["kind"] for problem in json.loads(report.to_json())["problems"]} == {
        "TensorFileError",
        "UnexpectedTensorError",
    }


@pytest.mark.parametrize("broken", ["config", "weights", "model_type"])
def test_a_directory_that_cannot_be_indexed_still_gives_a_report(make, edit_config, broken: str) -> None:
    directory = make()
    if broken == "config":
        edit_config(directory, lambda raw: [raw.pop(key) for key in ("hidden_size", "rope_theta")])
    elif broken == "model_type":
        edit_config(directory, lambda raw: raw.update(model_type="llama"))
    else:
        for path in directory.glob("*.safetensors*"):
            path.unlink()
    report = inspect(directory)
    assert not report.ok
    assert len(report.problems) == (2 if broken == "config" else 1)
    assert (report.config is None) == (broken != "weights")
    assert "problem" in report.to_text()
    assert json.loads(report.to_json())["ok"] is False


def test_a_missing_directory_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(NotACheckpointError):
        inspect(tmp_path / "nowhere")


def test_files_for_text_are_looked_for(make) -> None:
    directory = make(template=None)
    (directory / "tiktoken.model").unlink()
    assert "tiktoken.model MISSING, tokenizer_config.json yes, chat template MISSING" in inspect(directory).to_text()
    (directory / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ messages }}"}))
    assert inspect(directory).text_files["chat template"] is True


def test_layer_spans_are_inclusive_runs() -> None:
    assert spans([]) == ""
    assert spans([4, 0, 1, 2, 7, 6]) == "0-2, 4, 6-7"
