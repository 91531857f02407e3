"""The report of `exo-kimi inspect`: architecture, bytes, bits, files and problems of a checkpoint, from its headers."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from exo_kimi.arch.config import KimiConfig
from exo_kimi.arch.geometry import (
    active_parameters,
    kv_bytes_per_token,
    mean_routed_experts,
    state_bytes_per_sequence,
    total_parameters,
)
from exo_kimi.arch.modules import ModuleSpec
from exo_kimi.checkpoint.checkpoint import Checkpoint
from exo_kimi.checkpoint.manifest import StageManifest, examine
from exo_kimi.checkpoint.shares import share_notes
from exo_kimi.checkpoint.sources import ModuleSource
from exo_kimi.checkpoint.text_files import read_json
from exo_kimi.checkpoint.vision import tower_findings
from exo_kimi.errors import CheckpointError, CheckpointProblems, ExoKimiError, NotACheckpointError
from exo_kimi.units import format_bytes, format_gb

MOST_PROBLEMS = 100  # of a report for a terminal


@dataclass(frozen=True, slots=True, kw_only=True)
class PackingRow:
    """How one family of modules is stored. `layers` is empty for what lies outside the layers."""

    family: str
    packing: str
    layers: tuple[int, ...]
    modules: int
    disk_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """Report of `inspect`; a field that a problem leaves unknown is None or empty.

    `layer_bytes` are (on disk, resident) per layer; `outside_bytes` those of embedding, final norm and head together.
    """

    directory: Path
    config: KimiConfig | None = None
    layouts: tuple[str, ...] = ()
    files: int = 0
    tensors: int = 0
    disk_bytes: int = 0
    resident_bytes: int = 0
    layer_bytes: tuple[tuple[int, int], ...] = ()
    outside_bytes: tuple[int, int] = (0, 0)
    packing: tuple[PackingRow, ...] = ()
    text_files: dict[str, bool] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    problems: tuple[ExoKimiError, ...] = ()
    fingerprint: str | None = None

    @property
    def ok(self) -> bool:
        """Whether the checkpoint can be loaded."""
        return not self.problems

    def to_json(self) -> str:
        """One JSON document; keys are only ever added."""
        return json.dumps(self._as_dict(), indent=2, ensure_ascii=False)

    def to_text(self) -> str:
        """For a terminal."""
        return render(self)

    def _as_dict(self) -> dict[str, Any]:
        config = self.config
        return {
            "directory": str(self.directory),
            "ok": self.ok,
            "architecture": None if config is None else architecture_facts(config),
            "layouts": list(self.layouts),
            "files": self.files,
            "tensors": self.tensors,
            "disk_bytes": self.disk_bytes,
            "resident_bytes": self.resident_bytes,
            "layers": [
                {"layer": layer, "disk_bytes": disk, "resident_bytes": held}
                for layer, (disk, held) in enumerate(self.layer_bytes)
            ],
            "outside_layers": {"disk_bytes": self.outside_bytes[0], "resident_bytes": self.outside_bytes[1]},
            "packing": [
                {
                    "family": row.family,
                    "packing": row.packing,
                    "layers": list(row.layers),
                    "modules": row.modules,
                    "disk_bytes": row.disk_bytes,
                }
                for row in self.packing
            ],
            "text_files": self.text_files,
            "notes": list(self.notes),
            "problems": [
                {
                    "kind": type(problem).__name__,
                    "what": problem.what,
                    "expected": problem.expected,
                    "found": problem.found,
                    "where": problem.where,
                    "fix": problem.fix,
                }
                for problem in self.problems
            ],
            "fingerprint": self.fingerprint,
        }


def inspect(directory: str | Path) -> Report:
    """Look at a checkpoint directory without reading a weight.

    Args:
        directory: a checkpoint directory; one with problems gives a report that lists all of them.

    Raises:
        NotACheckpointError: there is no such directory.
    """
    root = Path(directory)
    if not root.is_dir():
        raise NotACheckpointError("no such checkpoint directory", found=root, fix="give the folder of config.json")
    text_files = _text_files(root)
    checkpoint = Checkpoint(root)
    try:
        index = checkpoint.index
    except CheckpointProblems as error:
        return Report(directory=root, text_files=text_files, problems=error.problems)
    except CheckpointError as error:
        return Report(directory=root, config=_config_alone(checkpoint), text_files=text_files, problems=(error,))
    manifest, problems = examine(index)
    note, of_tower = tower_findings(index)
    sources = manifest.sources
    outside = [source for source in sources if source.spec.layer is None]
    layers: list[list[ModuleSource]] = [[] for _ in range(index.config.num_hidden_layers)]
    for source in sources:
        if source.spec.layer is not None:
            layers[source.spec.layer].append(source)
    return Report(
        directory=root,
        config=index.config,
        layouts=tuple(sorted({source.layout for source in sources if source.spec.quantizable})),
        files=len({entry.file for entry in index.tensors.values()}),
        tensors=len(index.tensors),
        disk_bytes=manifest.disk_bytes,
        resident_bytes=manifest.resident_bytes,
        layer_bytes=tuple(_bytes(sources) for sources in layers),
        outside_bytes=_bytes(outside),
        packing=_packing_rows(manifest),
        text_files=text_files,
        notes=(*manifest.notes, *note, *share_notes(index)),
        problems=(*problems, *of_tower),
        fingerprint=index.fingerprint,
    )


def _config_alone(checkpoint: Checkpoint) -> KimiConfig | None:
    try:
        return checkpoint.config
    except CheckpointError:
        return None


def _bytes(sources: list[ModuleSource]) -> tuple[int, int]:
    return sum(source.disk_bytes for source in sources), sum(source.resident_bytes for source in sources)


def _packing_rows(manifest: StageManifest) -> tuple[PackingRow, ...]:
    rows: dict[tuple[str, str], list[ModuleSource]] = {}
    for source in manifest.sources:
        rows.setdefault((_family(source.spec), _describe(source)), []).append(source)
    return tuple(
        PackingRow(
            family=family,
            packing=packing,
            layers=tuple(sorted({source.spec.layer for source in sources if source.spec.layer is not None})),
            modules=len(sources),
            disk_bytes=sum(source.disk_bytes for source in sources),
        )
        for (family, packing), sources in rows.items()
    )


def _describe(source: ModuleSource) -> str:
    if source.quant is not None:
        return source.quant.describe() + (" (compressed-tensors)" if source.layout == "int4" else "")
    if source.layout == "fp8":
        return "fp8 e4m3, blocks of 128 x 128"
    return source.dtype.lower()


_FAMILIES = {
    "norm": "norms",
    "router": "router",
    "embedding": "embedding",
    "conv": "short convolutions",
    "decay": "decays",
}


def _family(spec: ModuleSpec) -> str:
    name = spec.path.rpartition(".")[2]
    if spec.kind == "experts":
        return f"experts {name}"
    if spec.kind in _FAMILIES:
        return _FAMILIES[spec.kind]
    if ".self_attn." in spec.path:
        return "attention"
    if ".shared_experts." in spec.path:
        return "shared experts"
    return "dense mlp" if spec.layer is not None else "head"


def _text_files(root: Path) -> dict[str, bool]:
    found = {name: (root / name).is_file() for name in ("tiktoken.model", "tokenizer_config.json")}
    try:
        embedded = "chat_template" in read_json(root / "tokenizer_config.json")
    except (OSError, ValueError, TypeError):
        embedded = False
    found["chat template"] = embedded or (root / "chat_template.jinja").is_file()
    found["generation_config.json"] = (root / "generation_config.json").is_file()
    return found


def render(report: Report) -> str:
    """The whole report; problems come last, where a reader's eye rests."""
    blocks = [[str(report.directory)]]
    if report.config is not None:
        blocks.append(_architecture(report.config))
    if report.config is not None and report.tensors:
        blocks += [_sizes(report, report.config), _packing(report), _layers(report)]
    if report.text_files:
        present = ", ".join(f"{name} {'yes' if there else 'MISSING'}" for name, there in report.text_files.items())
        blocks.append([f"text     {present}"])
    blocks.append([f"note     {note}" for note in report.notes])
    count = len(report.problems)
    blocks.append(["no problems" if report.ok else f"{count} problem{'' if count == 1 else 's'}"])
    blocks[-1] += [f"{type(problem).__name__}: {problem}" for problem in report.problems[:MOST_PROBLEMS]]
    if count > MOST_PROBLEMS:
        blocks[-1].append(f"... and {count - MOST_PROBLEMS:,} more (--json has all; `exo-kimi doctor DIR` groups them)")
    return "\n\n".join("\n".join(block) for block in blocks if block) + "\n"


def architecture_facts(config: KimiConfig) -> dict[str, Any]:
    """The numbers of an architecture that `inspect` prints."""
    layers = config.num_hidden_layers
    return {
        "model_type": config.model_type,
        "num_hidden_layers": layers,
        "hidden_size": config.hidden_size,
        "num_attention_heads": config.num_attention_heads,
        "n_routed_experts": config.n_routed_experts,
        "n_routed_experts_per_layer": config.n_routed_experts_per_layer,
        "num_experts_per_tok": config.num_experts_per_tok,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_position_embeddings,
        "key_prefix": config.key_prefix,
        "parameters": total_parameters(config),
        "active_parameters": active_parameters(config),
        "kv_bytes_per_token": kv_bytes_per_token(config, 0, layers),
        "state_bytes_per_sequence": state_bytes_per_sequence(config, 0, layers),
    }


def spans(layers: Iterable[int]) -> str:
    """`0-3, 5`: inclusive runs, for people; empty for none."""
    runs: list[list[int]] = []
    for layer in sorted(layers):
        if runs and layer == runs[-1][1] + 1:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def _architecture(config: KimiConfig) -> list[str]:
    facts = architecture_facts(config)
    dense = spans(layer for layer in range(config.num_hidden_layers) if not config.is_moe(layer))
    return [
        f"model    {config.model_type}{_outer(config)}, {config.num_hidden_layers} layers"
        f" (dense: {dense or 'none'}), hidden {config.hidden_size}, vocabulary {config.vocab_size:,},"
        f" context {config.max_position_embeddings:,}",
        f"experts  {experts_text(config)}, {config.num_experts_per_tok} a token, {config.n_shared_experts} shared",
        f"size     {_count(facts['parameters'])} parameters, {_count(facts['active_parameters'])} active;"
        f" {facts['kv_bytes_per_token']:,} cache bytes a token (16-bit)",
        *_states(config, facts),
    ]


def experts_text(config: KimiConfig) -> str:
    """`384`, or `96 to 384 (288 on the average)` where layers differ."""
    if config.n_routed_experts_per_layer is None:
        return str(config.n_routed_experts)
    least = min(filter(None, config.n_routed_experts_per_layer))
    return f"{least} to {config.n_routed_experts} ({mean_routed_experts(config):.4g} on the average)"


def _outer(config: KimiConfig) -> str:
    """What the text model is nested in."""
    if not config.key_prefix:
        return ""
    return " in kimi_k25" if config.k3 is None else " in kimi_k3"


def _states(config: KimiConfig, facts: Mapping[str, Any]) -> list[str]:
    if config.linear_attention is None:
        return []
    return [
        f"states   {format_bytes(facts['state_bytes_per_sequence'])} a sequence of any length in"
        f" {len(config.linear_attention.layers)} layers with Kimi Delta Attention"
        f" ({spans(config.linear_attention.layers)})"
    ]


def _sizes(report: Report, config: KimiConfig) -> list[str]:
    bits = report.disk_bytes * 8 / total_parameters(config)
    return [
        f"weights  {_both(report.disk_bytes)}, {bits:.2f} bits a weight, layout {' + '.join(report.layouts) or 'unknown'};"
        f" {report.tensors:,} tensors in {report.files} files",
        f"memory   {_both(report.resident_bytes)} when loaded as stored",
    ]


def _packing(report: Report) -> list[str]:
    rows = [(row.family, row.packing, spans(row.layers), format_bytes(row.disk_bytes)) for row in report.packing]
    return _table(("modules", "packing", "layers", "on disk"), rows)


def _layers(report: Report) -> list[str]:
    # Layers of one size are one row: sixty equal lines would hide the one that differs.
    by_size: dict[tuple[int, int], list[int]] = {}
    for layer, sizes in enumerate(report.layer_bytes):
        by_size.setdefault(sizes, []).append(layer)
    rows = [(spans(layers), format_bytes(disk), format_bytes(held)) for (disk, held), layers in by_size.items()]
    rows.append(("outside", format_bytes(report.outside_bytes[0]), format_bytes(report.outside_bytes[1])))
    return _table(("layers", "on disk, each", "in memory, each"), rows)


def _both(size_bytes: int) -> str:
    binary = format_bytes(size_bytes)
    return binary if size_bytes < 10**8 else f"{format_gb(size_bytes)} ({binary})"


def _count(number: int) -> str:
    return f"{number / 1e9:,.1f} B" if number >= 1e9 else f"{number / 1e6:,.1f} M"


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> list[str]:
    lines = [head, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    return ["  ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
