"""A model's name where a directory is expected: planned from headers alone, served after its share has come."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from hub_stand_in import BigFile, HubStandIn
from huggingface_hub import constants

from exo_kimi.arch.config import KimiConfig
from exo_kimi.arch.modules import ModuleSpec, stage_modules
from exo_kimi.checkpoint.checkpoint import Checkpoint
from exo_kimi.checkpoint.tiny.config import text_config
from exo_kimi.checkpoint.tiny.weights import resolve_recipe
from exo_kimi.cli import main
from exo_kimi.errors import UsageError
from exo_kimi.fetch.directories import (
    ServedPart,
    headers_directory,
    local_layers,
    named_weights,
    pulled_directory,
    weights_directory,
)
from exo_kimi.fetch.hub import HubSource
from exo_kimi.fetch.names import directory_of, model_of
from exo_kimi.fetch.pull import PullOptions, pull
from tests.checkpoint.conftest import K2

Hub = Callable[..., HubStandIn]
CLUSTER = "m3-ultra-512, m2-ultra-192"
ELEMENT_BYTES = {"U32": 4, "BF16": 2, "F32": 4}


@pytest.fixture
def at_hub(monkeypatch: pytest.MonkeyPatch, hub: Hub) -> Callable[..., HubStandIn]:
    """Start a stand-in and make it the hub of this process."""

    def start(files: Any, **settings: Any) -> HubStandIn:
        served = hub(files, **settings)
        monkeypatch.setattr(constants, "ENDPOINT", served.url)
        template = served.url + "/{repo_id}/resolve/{revision}/{filename}"  # made of it when the library is imported
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        return served

    return start


@pytest.mark.parametrize("text", ["org/kimi", "mlx-community/Kimi-K2.5", "a/b.c_d"])
def test_names_are_told_from_paths(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert model_of(text) == model_of(Path(text)) == text
    Path(text).mkdir(parents=True)
    assert model_of(text) is None


@pytest.mark.parametrize("text", ["/a/b", "./a", "a", "a/b/c", "~/kimi", "../kimi", "a/", "org/..", "a b/c", "org/-x"])
def test_other_texts_are_no_names(text: str) -> None:
    assert model_of(text) is None


def test_plan_inspect_and_doctor_take_a_name_and_read_headers_only(
    at_hub: Hub, whole: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    served = at_hub(whole)
    assert main(["plan", "org/kimi", "--cluster", CLUSTER, "--context", "64", "-o", str(tmp_path / "plan.json")]) == 0
    named = capsys.readouterr().out
    assert main(["plan", str(whole), "--cluster", CLUSTER, "--context", "64"]) == 0
    assert named == capsys.readouterr().out
    assert main(["inspect", "org/kimi"]) == 0
    assert main(["doctor", "org/kimi"]) == 0
    weights = sum(path.stat().st_size for path in whole.glob("*.safetensors"))
    assert served.sent_bytes < weights / 20
    assert "no layer" in capsys.readouterr().out
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert plan["model"]["hash"] == Checkpoint(whole).fingerprint


def test_plan_of_a_model_of_k2s_size_reads_less_than_5_mb(
    at_hub: Hub, whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """121 files of 4 GB, as mlx-community has them."""
    raw = text_config(K2, dtype="BF16")
    files = {path.name: path for path in whole.iterdir() if path.suffix != ".safetensors"}
    config, tokenizer = whole.parent / "k2-config.json", whole.parent / "k2-tiktoken.model"
    config.write_text(json.dumps(raw))
    tokenizer.write_bytes(os.urandom(2_800_000))  # as long as Kimi K2's
    served = at_hub({**files, "config.json": config, "tiktoken.model": tokenizer, **big_files(raw, 121)})
    assert sum(served.size(name) for name in served.files) > 495e9
    assert main(["plan", "org/kimi", "--cluster", CLUSTER, "--context", "4096"]) == 0
    assert "61" in capsys.readouterr().out
    assert served.sent_bytes < 5e6, served.sent_bytes
    before = served.sent_bytes
    assert main(["plan", "org/kimi", "--cluster", CLUSTER, "--context", "8192"]) == 0
    assert served.sent_bytes == before
    capsys.readouterr()
    assert main(["pull", "org/kimi", "--layers", "44:61", "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "layers 44:61" in said and "GiB" in said


def test_a_pulled_model_is_found_by_its_name_without_the_hub(
    at_hub: Hub, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = at_hub(whole)
    pull(HubSource("org/kimi"), directory_of("org/kimi"), PullOptions(layers=(3, 7)))
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert headers_directory(Path("org/kimi")) == weights_directory(Path("org/kimi")) == directory_of("org/kimi")
    assert served.requests


def test_headers_that_were_read_are_planned_from_without_the_hub(
    at_hub: Hub, whole: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    at_hub(whole)
    plan = ["plan", "org/kimi", "--cluster", CLUSTER, "--context", "64"]
    assert main(plan) == 0
    online = capsys.readouterr().out
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert main(plan) == 0
    said = capsys.readouterr()
    assert said.out == online
    assert "the hub cannot be reached for org/kimi: taking the headers of 0123456789ab, read before" in said.err
    assert main(["plan", "org/other", *plan[2:]]) == 1
    assert "cannot be reached for org/other" in capsys.readouterr().err


def test_a_model_in_the_hubs_own_cache_is_found(tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "hub-cache"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    folder = cache / "models--org--kimi"
    shutil.copytree(whole, folder / "snapshots" / "c0ffee")
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("c0ffee")
    assert weights_directory(Path("org/kimi")) == folder / "snapshots" / "c0ffee"


def test_weights_that_were_not_pulled_are_said(at_hub: Hub, whole: Path) -> None:
    with pytest.raises(UsageError, match="no model of this name was pulled") as error:
        weights_directory(Path("org/kimi"))
    assert "exo-kimi pull org/kimi" in str(error.value)


NAMED_COMMANDS = [
    ["layer", "org/kimi", "0"],
    ["convert", "org/kimi", "out", "--recipe", "uniform-4"],
    ["calibrate", "org/kimi", "--text", "text.txt", "-o", "scores.json"],
    ["prune", "org/kimi", "out", "--keep", "4", "--scores", "scores.json"],
    ["compare", "org/kimi", "other", "--text", "text.txt"],
    ["compare", "org/kimi", "--save", "run.npz", "--text", "text.txt"],
    ["trace", "record", "org/kimi", "--text", "text.txt", "-o", "trace.npz"],
    ["eval", "org/kimi"],
    ["train", "requantize", "org/kimi", "out", "--recipe", "uniform-4"],
    ["train", "draft", "org/kimi", "out"],
    ["exo", "prepare", "org/kimi", "--models-dir", "models"],
]


@pytest.mark.parametrize("words", NAMED_COMMANDS, ids=lambda words: " ".join(words[:2]))
def test_every_command_that_takes_a_directory_takes_a_name_or_says_how_to_get_it(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("text.txt", "scores.json"):
        Path(name).write_text("{}")
    assert main(words) != 0
    said = capsys.readouterr().err
    assert "no model of this name was pulled" in said and "`exo-kimi pull org/kimi`" in said


def test_a_pulled_model_is_converted_and_prepared_for_exo_by_its_name(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(whole, directory_of("org/kimi"))
    assert main(["convert", "org/kimi", "out", "--recipe", "uniform-4", "--dry-run"]) == 0
    assert main(["convert", str(whole), "out", "--recipe", "uniform-4", "--dry-run"]) == 0
    Path("models").mkdir()
    assert main(["exo", "prepare", "org/kimi", "--models-dir", "models"]) == 0
    prepared = next(Path("models").iterdir())
    assert files_of(prepared) >= files_of(whole)
    assert pulled_directory("org/kimi") == directory_of("org/kimi")
    assert named_weights(str(whole)) == str(whole) and named_weights("http://host:1") == "http://host:1"


def files_of(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir() if path.suffix == ".safetensors"}


@pytest.mark.parametrize(
    ("part", "layers"),
    [
        ({}, None),
        ({"split": "3,4"}, None),
        ({"split": "3,4", "stage": ["10.0.0.2:1"]}, (0, 3)),
        ({"split": "1,2,4", "stage": ["10.0.0.2:1"]}, (0, 3)),
        ({"split": "3,4", "stage": ["10.0.0.2:1", "10.0.0.3:1"]}, None),
        ({"stage": ["10.0.0.2:1"]}, (0, 4)),
    ],
)
def test_serve_needs_the_layers_of_its_own_stages(
    whole: Path, part: dict[str, Any], layers: tuple[int, int] | None
) -> None:
    assert local_layers(Checkpoint(whole), ServedPart(**part)) == layers


def test_serve_fetches_its_share_and_answers_with_the_rest_elsewhere(hub: Hub, whole: Path, tmp_path: Path) -> None:
    """Two machines of one host: a stage with layers 3:7 that it pulled, and `serve ORG/NAME`, which pulls the first three."""
    served = hub(whole)
    environment = {**os.environ, "HF_ENDPOINT": served.url}
    run = [sys.executable, "-m", "exo_kimi"]
    there = {**environment, "EXO_KIMI_MODELS": str(tmp_path / "there")}
    here = {**environment, "EXO_KIMI_MODELS": str(tmp_path / "here")}
    subprocess.run([*run, "pull", "org/kimi", "--layers", "3:7"], env=there, check=True, capture_output=True)
    stage_log, server_log = tmp_path / "stage.log", tmp_path / "server.log"
    stage = subprocess.Popen(
        [*run, "stage", "--listen", "127.0.0.1:0", "--model", "org/kimi"],
        env=there,
        stdout=subprocess.PIPE,
        stderr=stage_log.open("w"),
        text=True,
    )
    try:
        address = stage.stdout.readline().split()[2].rstrip(",")
        command = ["serve", "org/kimi", "--split", "3,4", "--stage", address, "--port", "0", "--kv-bytes", "20MB"]
        server = subprocess.Popen(
            [*run, *command, "--dtype", "float32"],
            env=here,
            stdout=subprocess.PIPE,
            stderr=server_log.open("w"),
            text=True,
        )
        try:
            url = server.stdout.readline().split()[2]
            body = {"model": "kimi", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 4}
            answer = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60)
            assert answer.status_code == 200 and answer.json()["usage"]["completion_tokens"] >= 1, answer.text
            named = answer.headers["x-request-id"]
        finally:
            server.terminate()
            server.wait(20)
    finally:
        stage.terminate()
        stage.wait(20)
    assert f"{named} begins: " in stage_log.read_text()  # the other machine's own log
    assert f"stage 0: INFO {named} begins: " in server_log.read_text()
    assert f"INFO {named} POST " in server_log.read_text()
    assert "HTTP Request" not in server_log.read_text()  # a line for each range that came
    share = Checkpoint(tmp_path / "here" / "org" / "kimi")
    share.manifest(0, 3).check_here()
    total = sum(path.stat().st_size for path in whole.iterdir() if path.is_file())
    assert served.sent_bytes < 1.15 * total  # each byte went to one of the two, but for texts and headers


def big_files(raw: dict[str, Any], count: int) -> dict[str, BigFile]:
    """Weight files of a Kimi K2 in MLX's layout: headers, and zeros where the weights would be."""
    config = KimiConfig.from_dict(raw)
    choose = resolve_recipe("mixed346", 64)
    shapes: dict[str, tuple[str, tuple[int, ...]]] = {}
    for spec in stage_modules(config, 0, config.num_hidden_layers):
        shapes |= _shapes(spec, choose(spec))
    names = list(shapes)
    files = {}
    for number in range(count):
        header: dict[str, Any] = {}
        offset = 0
        for name in names[number * len(names) // count : (number + 1) * len(names) // count]:
            dtype, shape = shapes[name]
            size = ELEMENT_BYTES[dtype]
            for dim in shape:
                size *= dim
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + size]}
            offset += size
        text = json.dumps(header).encode()
        head = len(text).to_bytes(8, "little") + text
        files[f"model-{number + 1:05d}-of-{count:05d}.safetensors"] = BigFile(head, len(head) + offset)
    return files


def _shapes(spec: ModuleSpec, packing: tuple[int, int] | None) -> dict[str, tuple[str, tuple[int, ...]]]:
    if packing is None:
        found = {"weight": ("BF16", spec.shape)}
    else:
        *rows, into = spec.shape
        bits, group = packing
        scales = ("BF16", (*rows, into // group))
        found = {"weight": ("U32", (*rows, into * bits // 32)), "scales": scales, "biases": scales}
    if spec.kind == "router":
        found["e_score_correction_bias"] = ("F32", spec.shape[:1])
    return {f"{spec.path}.{part}": value for part, value in found.items()}
