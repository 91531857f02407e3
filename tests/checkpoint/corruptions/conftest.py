"""Hundreds of seeded corruptions of small checkpoints in every layout: how they are made, and what must hold for each.

Each is reported under a named error before a weight is read, or proven to leave the same model behind; none is loaded as
another model; nothing but our own errors comes out. What no header can show is not tried: another number in config.json
that no shape confirms (rope_theta), two tensors of one shape changing places, another token of the same form.

A test file has a table KINDS: function, named errors of which one must be reported ("" for any or none), times, and words of
the layouts that can suffer it ("" for all).
"""

from __future__ import annotations

import dataclasses
import io
import json
import os
import random
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from exo_kimi.arch.config import KimiConfig
from exo_kimi.chat.template import ChatTemplate
from exo_kimi.chat.tokenizer import KimiTokenizer
from exo_kimi.checkpoint.doctor.doctor import doctor, text_errors
from exo_kimi.checkpoint.doctor.findings import Diagnosis
from exo_kimi.checkpoint.doctor.repair import repair
from exo_kimi.checkpoint.hints import read_hints
from exo_kimi.checkpoint.index import open_index
from exo_kimi.checkpoint.manifest import resolve
from exo_kimi.checkpoint.tiny.make import make_tiny
from exo_kimi.errors import CheckpointProblems, ExoKimiError

TINIEST = {
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "n_routed_experts": 3,
    "num_experts_per_tok": 2,
    "num_attention_heads": 2,
    "q_lora_rank": 32,
    "kv_lora_rank": 96,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 64,
    "vocab_size": 544,
}
LAYOUTS: dict[str, dict[str, Any]] = {
    "mlx": {"group_size": 32},
    "mlx k25": {"group_size": 32, "absorbed": True, "prefix": True, "vision": True, "template": "k25"},
    "int4": {"layout": "int4"},
    "int4 k25": {"layout": "int4", "prefix": True, "template": "k25", "shards": 3},
    "fp8": {"layout": "fp8", "template": "thinking"},
    "bf16": {"layout": "bf16"},
}
INDEX, CONFIG = "model.safetensors.index.json", "config.json"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test for each layout and each kind of damage that can befall it."""
    if "damage" in metafunc.fixturenames:
        cases = [
            (layout, damage, errors, times)
            for layout in LAYOUTS
            for damage, errors, times, layouts in metafunc.module.KINDS
            if not layouts or any(word in layout for word in layouts.split())
        ]
        ids = [f"{layout}-{damage.__name__}" for layout, damage, _, _ in cases]
        metafunc.parametrize(("layout", "damage", "errors", "times"), cases, ids=ids)
    elif "layout" in metafunc.fixturenames:
        metafunc.parametrize("layout", LAYOUTS)


class Patient:
    """A copy of a checkpoint whose files are hard links until they are written."""

    def __init__(self, root: Path, seed: str) -> None:
        self.root = root
        self.random = random.Random(zlib.crc32(seed.encode()))
        self.shards = sorted(path.name for path in root.glob("*.safetensors"))
        # A file with nothing of the text model, such as one of a vision tower alone, is none that any damage here means.
        self.shard = self.random.choice([shard for shard in self.shards if b"_proj." in self.text_names(shard)])

    def text_names(self, shard: str) -> bytes:
        """The header of a file, as far as it is of the text model."""
        header = json.loads((self.root / shard).read_bytes()[8 : self.header_bytes(shard)])
        return " ".join(name for name in header if "vision" not in name and "projector" not in name).encode()

    def write(self, name: str, data: bytes | str) -> None:
        (self.root / name).unlink(missing_ok=True)
        (self.root / name).write_bytes(data if isinstance(data, bytes) else data.encode())

    def edit(self, name: str, change: Callable[[bytearray], Any]) -> None:
        data = bytearray((self.root / name).read_bytes())
        replaced = change(data)
        self.write(name, bytes(data if replaced is None else replaced))

    def edit_json(self, name: str, change: Callable[[dict[str, Any]], Any]) -> None:
        value = json.loads((self.root / name).read_bytes())
        change(value)
        self.write(name, json.dumps(value))

    def text_config(self, change: Callable[[dict[str, Any]], Any]) -> None:
        self.edit_json(CONFIG, lambda raw: change(raw.get("text_config", raw)))

    def header_bytes(self, shard: str) -> int:
        return 8 + int.from_bytes((self.root / shard).read_bytes()[:8], "little")

    def edit_header(self, change: Callable[[dict[str, Any]], Any], shard: str | None = None) -> None:
        """Change a header and leave the data where it is, relative to the header."""

        def rewrite(data: bytearray) -> bytes:
            end = 8 + int.from_bytes(data[:8], "little")
            header = json.loads(data[8:end])
            changed = change(header)
            text = changed if isinstance(changed, bytes) else json.dumps(header).encode()
            return len(text).to_bytes(8, "little") + text + data[end:]

        self.edit(shard or self.shard, rewrite)

    def edit_tensors(self, change: Callable[[dict[str, tuple[str, list[int], bytes]]], Any], *, index: bool) -> None:
        """Change tensors (dtype, shape, data) and write a sound file again; the index too when asked."""
        data = (self.root / self.shard).read_bytes()
        end = self.header_bytes(self.shard)
        header = json.loads(data[8:end])
        header.pop("__metadata__", None)
        tensors = {
            name: (
                entry["dtype"],
                entry["shape"],
                data[end + entry["data_offsets"][0] : end + entry["data_offsets"][1]],
            )
            for name, entry in header.items()
        }
        before = set(tensors)
        change(tensors)
        entries, body = {}, b""
        for name, (dtype, shape, content) in tensors.items():
            entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(body), len(body) + len(content)]}
            body += content
        text = json.dumps(entries).encode()
        self.write(self.shard, len(text).to_bytes(8, "little") + text + body)
        if index:
            weight_map = json.loads((self.root / INDEX).read_bytes())["weight_map"]
            kept = {name: file for name, file in weight_map.items() if name in tensors or name not in before}
            kept.update(dict.fromkeys(tensors, self.shard))
            self.write(INDEX, json.dumps({"weight_map": kept}))

    def a_name(self, header: dict[str, Any], pattern: str = r"layers|embed|lm_head|model\.norm") -> str:
        return self.random.choice([name for name in header if re.search(pattern, name) and "vision" not in name])


@dataclass(frozen=True)
class Model:
    """All that decides what a checkpoint answers."""

    sources: Any
    config: KimiConfig
    special: Any
    stop_ids: Any
    ranks: Any
    template: str
    hints: Any


def load(root: Path) -> Model:
    """Refuses as serving would, before weights are read; no byte of a weight decides what comes next."""
    manifest = resolve(open_index(root))
    tokenizer = KimiTokenizer.from_directory(root)
    prompt = ChatTemplate.from_directory(root, tokenizer).render([{"role": "user", "content": "x"}])
    outer = json.loads((root / CONFIG).read_bytes())["model_type"]
    if errors := text_errors(root, vocab_size=manifest.config.vocab_size, model_type=outer):
        raise CheckpointProblems(errors, where=root)
    return Model(
        sources=manifest.sources,
        config=dataclasses.replace(manifest.config, ignored_keys=()),
        special=tokenizer.special,
        stop_ids=tokenizer.stop_ids,
        ranks=tokenizer.encoding._mergeable_ranks,
        template=prompt.text,
        hints=read_hints(json.loads((root / CONFIG).read_bytes())),
    )


@pytest.fixture(scope="session")
def healthy(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Model]]:
    """A sound checkpoint of a layout, made once, and the model in it."""
    made: dict[str, tuple[Path, Model]] = {}

    def get(layout: str) -> tuple[Path, Model]:
        if layout not in made:
            root = make_tiny(tmp_path_factory.mktemp("healthy") / "x", config=TINIEST, **LAYOUTS[layout])
            made[layout] = root, load(root)
        return made[layout]

    return get


class HeaderOnly(io.FileIO):
    """A weight file that may be read to the end of its header, as the header tells it."""

    def read(self, size: int | None = -1) -> bytes:
        start = self.tell()
        data = super().read(-1 if size is None else size)
        if start == 0:
            self.limit = 8 + int.from_bytes(data[:8], "little")
        assert self.tell() <= self.limit, "a weight was read"
        return data


@contextmanager
def headers_only() -> Iterator[None]:
    """Whoever reads past the header of a weight file fails."""
    opened, os_opened = io.open, os.open
    descriptors: set[int] = set()

    def os_spy(path: Any, *args: Any, **kwargs: Any) -> int:
        descriptor = os_opened(path, *args, **kwargs)
        descriptors.discard(descriptor)
        if str(path).endswith(".safetensors") and Path(str(path)).is_file():
            descriptors.add(descriptor)
        return descriptor

    def spy(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        weights = file in descriptors or (str(file).endswith(".safetensors") and Path(str(file)).is_file())
        return HeaderOnly(file, "r") if weights else opened(file, mode, *args, **kwargs)

    io.open, os.open = spy, os_spy
    try:
        yield
    finally:
        io.open, os.open = opened, os_opened


@pytest.fixture
def watch_headers() -> Callable[[], Any]:
    """The context in which no weight may be read."""
    return headers_only


@pytest.fixture
def endure(healthy: Callable[[str], tuple[Path, Model]], tmp_path: Path) -> Callable[..., None]:
    """Damage a copy of a sound checkpoint and hold the doctor, the loaders and the repair to their word."""

    def run(layout: str, damage: Callable[[Patient], None], errors: str, number: int) -> None:
        healthy_root, model = healthy(layout)
        root = tmp_path / str(number)
        root.mkdir()
        for path in healthy_root.iterdir():
            os.link(path, root / path.name)
        damage(Patient(root, f"{layout} {damage.__name__} {number}"))
        with headers_only():
            diagnosis = doctor(root)
        assert_honest(root, diagnosis, model, set(errors.split()))
        mend(root, diagnosis)

    return run


def assert_honest(root: Path, diagnosis: Diagnosis, model: Model, errors: set[str]) -> None:
    """What the doctor says and what is loaded fit together."""
    text = diagnosis.to_text()
    assert all(finding.error.what and finding.error.where for finding in diagnosis.findings), text
    assert json.loads(diagnosis.to_json())["healthy"] is diagnosis.healthy
    named = {type(finding.error).__name__ for finding in diagnosis.findings}
    assert not errors or named & errors, f"{named}\n{text}"
    try:
        with headers_only():
            loaded: Model | None = load(root)
    except ExoKimiError as error:
        loaded = None
        assert not diagnosis.healthy, f"refused, but the doctor found no error: {error}\n{text}"
    if loaded is not None:
        assert diagnosis.healthy, f"the doctor found an error, and it loads\n{text}"
        assert dataclasses.replace(loaded, hints=model.hints, template=model.template) == model, text
    if not diagnosis.findings:
        assert loaded is not None, text
        assert dataclasses.replace(loaded, hints=model.hints) == model, "changed, and nobody noticed"


def mend(root: Path, diagnosis: Diagnosis) -> None:
    """A repair cures what the doctor calls fixable, keeps the weights, is complete at once and leaves a copy."""
    before = {
        path.name: path.read_bytes() for path in root.iterdir() if path.is_file() and path.suffix != ".safetensors"
    }
    weights = {path.name: path.stat() for path in root.glob("*.safetensors")}
    with headers_only():
        mended = repair(root)
    assert bool(mended.changes) == any(finding.fixable for finding in diagnosis.findings), diagnosis.to_text()
    assert not any(finding.fixable for finding in mended.findings), mended.to_text()
    cured = {finding.error.what for finding in diagnosis.findings if finding.fixable}
    assert not cured & {finding.error.what for finding in mended.findings}, mended.to_text()
    assert {path.name: path.stat() for path in root.glob("*.safetensors")} == weights
    for change in mended.changes:
        assert (change.backup is None) == (change.file not in before)
        if change.backup:
            assert (root / change.backup).read_bytes() == before[change.file]
    files = sorted(path.name for path in root.iterdir())
    assert not mended.changes or repair(root).changes == ()
    assert sorted(path.name for path in root.iterdir()) == files
