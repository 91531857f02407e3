"""The report of `exo-kimi inspect` as text for a terminal; it measures nothing."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from exo_kimi.arch.config import KimiConfig
from exo_kimi.arch.geometry import active_parameters, kv_bytes_per_token, total_parameters
from exo_kimi.units import format_bytes, format_gb

if TYPE_CHECKING:
    from exo_kimi.checkpoint.doctor.report import Report


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
    blocks[-1] += [f"{type(problem).__name__}: {problem}" for problem in report.problems]
    return "\n\n".join("\n".join(block) for block in blocks if block) + "\n"


def architecture_facts(config: KimiConfig) -> dict[str, Any]:
    """The numbers of an architecture that `inspect` tells."""
    layers = config.num_hidden_layers
    return {
        "model_type": config.model_type,
        "num_hidden_layers": layers,
        "hidden_size": config.hidden_size,
        "num_attention_heads": config.num_attention_heads,
        "n_routed_experts": config.n_routed_experts,
        "num_experts_per_tok": config.num_experts_per_tok,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_position_embeddings,
        "key_prefix": config.key_prefix,
        "parameters": total_parameters(config),
        "active_parameters": active_parameters(config),
        "kv_bytes_per_token": kv_bytes_per_token(config, 0, layers),
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
        f"model    {config.model_type}{' in kimi_k25' if config.key_prefix else ''}, {config.num_hidden_layers} layers"
        f" (dense: {dense or 'none'}), hidden {config.hidden_size}, vocabulary {config.vocab_size:,},"
        f" context {config.max_position_embeddings:,}",
        f"experts  {config.n_routed_experts}, {config.num_experts_per_tok} a token, {config.n_shared_experts} shared",
        f"size     {_count(facts['parameters'])} parameters, {_count(facts['active_parameters'])} active;"
        f" {facts['kv_bytes_per_token']:,} cache bytes a token (16-bit)",
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
