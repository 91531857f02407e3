"""Headers that are derived from others by their law, and never where it does not hold."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hub_stand_in import BigFile, HubStandIn
from huggingface_hub import constants

from exo_kimi.arch.config import KimiConfig
from exo_kimi.arch.modules import ModuleSpec, stage_modules
from exo_kimi.checkpoint.tiny.config import INT4_CONFIG, text_config
from exo_kimi.cli import main
from exo_kimi.fetch import skeleton
from exo_kimi.fetch.alike import derive_header
from exo_kimi.fetch.hub import HubSource
from exo_kimi.fetch.skeleton import header_of, is_derived, read_skeleton
from tests.checkpoint.conftest import K2

Hub = Callable[..., HubStandIn]
ELEMENT_BYTES = {"I32": 4, "BF16": 2, "F32": 4}
CLUSTER = "m3-ultra-512, m3-ultra-512"


def text(layer: int, *, name: str = "w", shape: int = 4, fill: bool = True) -> bytes:
    header = {f"model.layers.{layer}.{name}": {"dtype": "U8", "shape": [shape], "data_offsets": [0, 4]}}
    found = json.dumps(header, separators=(",", ":")).encode()
    return found + b" " * (-len(found) % 8 if fill else 0)


@pytest.mark.parametrize("fill", [True, False])
@pytest.mark.parametrize("layer", [3, 17, 123_456])
def test_a_header_with_another_layers_number_follows(layer: int, fill: bool) -> None:
    other = text(layer, fill=fill)
    assert derive_header(text(5, fill=fill), begin=other[:30], length=len(other)) == other


@pytest.mark.parametrize(
    ("known", "begin", "length"),
    [
        (text(5), text(7)[:30], len(text(7)) + 8),  # more follows
        (text(5), text(7, name="v")[:30], len(text(7))),  # another name
        (text(5), text(7, shape=8)[:60], len(text(7))),  # another shape
        (text(5), b'{"__metadata__":{}', len(text(7))),  # no layer's name yet
        (text(5)[:-1] + b"," + text(6)[1:], text(7)[:30], len(text(7))),  # two layers
        (text(5), text(7)[:30] + text(8)[:30], len(text(7))),
    ],
)
def test_no_other_header_follows(known: bytes, begin: bytes, length: int) -> None:
    assert derive_header(known, begin=begin, length=length) is None


@pytest.fixture
def native(hub: Hub, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., HubStandIn]:
    """A Kimi in INT4 with a tensor an expert, a file a layer, at the hub of this process."""

    def start(**numbers: int) -> HubStandIn:
        raw = {**text_config(numbers, dtype="BF16"), "quantization_config": INT4_CONFIG}
        files: dict[str, Any] = {path.name: path for path in whole.iterdir() if path.suffix != ".safetensors"}
        for name, data in (("config.json", json.dumps(raw).encode()), ("tiktoken.model", os.urandom(2_800_000))):
            files[name] = tmp_path / name
            files[name].write_bytes(data)
        served = hub({**files, **layer_files(raw)})
        monkeypatch.setattr(constants, "ENDPOINT", served.url)
        template = served.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        return served

    return start


def test_plan_of_native_int4_of_k2s_size_reads_less_than_5_mb(
    native: Callable[..., HubStandIn], capsys: pytest.CaptureFixture[str]
) -> None:
    """61 files, 594 GB, 207,360 tensors of experts; what was derived is what is there."""
    served = native(**K2)
    headers = {name: file.header for name, file in served.files.items() if isinstance(file, BigFile)}
    assert sum(map(len, headers.values())) > 25e6
    assert sum(header.count(b'"dtype"') for header in headers.values()) > 60 * 384 * 3 * 3
    assert main(["plan", "org/kimi", "--cluster", CLUSTER, "--context", "4096"]) == 0
    assert served.sent_bytes < 5e6, served.sent_bytes
    assert "are derived from one of them" in capsys.readouterr().err
    before, source = served.sent_bytes, HubSource("org/kimi")
    derived = read_skeleton(source, source.listing(), derive=True)
    assert served.sent_bytes == before and is_derived(derived)
    assert {name: header_of(derived, name) for name in headers} == headers


def test_an_odd_file_among_those_of_one_size_is_read_and_the_others_follow(
    native: Callable[..., HubStandIn], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first of a kind, from which no other follows."""
    monkeypatch.setattr(skeleton, "READ_ALL_BYTES", 0)
    monkeypatch.setattr(skeleton, "READERS", 1)
    served = native(num_hidden_layers=12)
    name = sorted(name for name in served.files if name.endswith(".safetensors"))[1]
    sound = served.files[name]
    one, other = b"experts.0.up_proj.weight_packed", b"experts.1.up_proj.weight_packed"
    odd = BigFile(sound.header.replace(one, b"@").replace(other, one).replace(b"@", other), sound.size)
    served.files = {**served.files, name: odd}
    source = HubSource("org/kimi")
    before = served.sent_bytes
    derived = read_skeleton(source, source.listing(), derive=True)
    headers = {name: file.header for name, file in served.files.items() if isinstance(file, BigFile)}
    assert {name: header_of(derived, name) for name in headers} == headers
    texts = sum(path.stat().st_size for path in derived.iterdir() if path.suffix != ".safetensors")
    begun = len(headers) * skeleton.BEGIN_BYTES
    assert served.sent_bytes - before - texts - begun < 4 * max(map(len, headers.values()))


def test_pull_holds_a_plan_of_derived_headers_against_every_header(
    native: Callable[..., HubStandIn],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Somebody wrote two experts of one layer in another order: the same size, length and beginning."""
    monkeypatch.setattr(skeleton, "READ_ALL_BYTES", 0)
    served = native()
    name = "model-00005-of-000007.safetensors"
    sound, plan = served.files[name], str(tmp_path / "plan.json")
    one, other = b"experts.8.up_proj.weight_packed", b"experts.9.up_proj.weight_packed"
    odd = BigFile(sound.header.replace(one, b"@").replace(other, one).replace(b"@", other), sound.size)
    for file, status in ((sound, 0), (odd, 1)):
        shutil.rmtree(tmp_path / "cache", ignore_errors=True)
        served.files = {**served.files, name: file}
        assert main(["plan", "org/kimi", "--cluster", CLUSTER, "--context", "64", "-o", plan]) == 0
        planned = json.loads(Path(plan).read_text())
        machine = planned["stages"][0]["machine"]
        source = HubSource("org/kimi")
        assert is_derived(read_skeleton(source, source.listing(), derive=True))
        pull = ["pull", "org/kimi", "--plan", plan, "--machine", machine, "--dry-run", "-o", str(tmp_path / "here")]
        capsys.readouterr()
        assert main(pull) == status
    assert "the plan was made for another checkpoint" in capsys.readouterr().err
    source = HubSource("org/kimi")
    assert not is_derived(
        read_skeleton(source, source.listing(), derive=True)
    )  # all are here now: the next plan is right


def layer_files(raw: dict[str, Any]) -> dict[str, BigFile]:
    """A file a layer, as Moonshot writes them: names sorted, embedding in the first, head in the last."""
    config = KimiConfig.from_dict(raw)
    by_layer: dict[int, dict[str, tuple[str, tuple[int, ...]]]] = {n: {} for n in range(config.num_hidden_layers)}
    for spec in stage_modules(config, 0, config.num_hidden_layers):
        last = config.num_hidden_layers - 1
        layer = spec.layer if spec.layer is not None else 0 if spec.kind == "embedding" else last
        by_layer[layer] |= _shapes(spec)
    files = {}
    for number, shapes in enumerate(by_layer.values(), start=1):
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for name, (dtype, shape) in sorted(shapes.items()):
            end = offset + ELEMENT_BYTES[dtype] * math.prod(shape)
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, end]}
            offset = end
        found = json.dumps(header, separators=(",", ":")).encode()
        found += b" " * (-len(found) % 8)
        head = len(found).to_bytes(8, "little") + found
        files[f"model-{number:05d}-of-{len(by_layer):06d}.safetensors"] = BigFile(head, len(head) + offset)
    return files


def _shapes(spec: ModuleSpec) -> dict[str, tuple[str, tuple[int, ...]]]:
    if spec.kind != "experts":
        found = {f"{spec.path}.weight": ("BF16", spec.shape)}
        if spec.kind == "router":
            found[f"{spec.path}.e_score_correction_bias"] = ("F32", spec.shape[:1])
        return found
    experts, rows, into = spec.shape
    parts = {
        "weight_packed": ("I32", (rows, into // 8)),
        "weight_scale": ("BF16", (rows, into // 32)),
        "weight_shape": ("I32", (2,)),
    }
    return {
        f"{spec.path.replace('switch_mlp', f'experts.{expert}')}.{part}": value
        for expert in range(experts)
        for part, value in parts.items()
    }
