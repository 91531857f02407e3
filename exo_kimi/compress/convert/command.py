"""`exo-kimi convert`: arguments to a conversion, said before it runs, run, and reported."""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from exo_kimi.checkpoint.checkpoint import Checkpoint
from exo_kimi.checkpoint.drafts.report import is_draft
from exo_kimi.compress.convert.affine import Rounding
from exo_kimi.compress.convert.budget import choose, recipe_of, recipe_text
from exo_kimi.compress.convert.conversion import Conversion, make_conversion
from exo_kimi.compress.convert.draft import DraftConversion, convert_draft
from exo_kimi.compress.convert.encoding import encode
from exo_kimi.compress.convert.fuse import FusedModule, fuse, plan_fusion
from exo_kimi.compress.convert.importance import read_importance, read_worth
from exo_kimi.compress.convert.link import link_job
from exo_kimi.compress.convert.measure import ModuleErrors, errors_text, measure
from exo_kimi.compress.convert.rows import SourceRows
from exo_kimi.compress.convert.run import convert, processors
from exo_kimi.compress.convert.targets import BLOCK_WEIGHTS, ModuleTarget
from exo_kimi.compress.output.journal import write_whole
from exo_kimi.compress.output.shards import SHARD_BYTES
from exo_kimi.compress.output.writer import CheckpointWriter, Written
from exo_kimi.compress.ranges import RangeReader
from exo_kimi.errors import UsageError
from exo_kimi.planner.weights.recipes import Recipe, Rule
from exo_kimi.units import format_bytes, format_gb, format_seconds

_TIMED = 3  # blocks of each kind, of which the fastest counts


@dataclass(frozen=True, slots=True, kw_only=True)
class ConvertOptions:
    """What the command line says.

    Args:
        directory: the source.
        output: where to; None to measure or choose only.
        recipe: bits of each module; None with `link`, `measure` or `budget_bytes`.
        layers: a half-open range; all by default.
        link: copy no weight.
        dry_run: say bytes, time and room, and write nothing.
        rounding: how codes are chosen.
        keep_kv_b: leave kv_b_proj whole.
        shard_bytes: most bytes of a file.
        workers: threads; as many as processors by default.
        measure: print what candidate bits cost each module, and write nothing.
        budget_bytes: choose bits for so many bytes of the text model.
        recipe_out: where the chosen recipe goes.
        calibration: mean squares of the inputs' columns, see `read_importance`.
        adapter: put this adapter into the weights, and change nothing else.
    """

    directory: Path
    output: Path | None
    recipe: Recipe | None
    layers: tuple[int, int] | None = None
    link: bool = False
    dry_run: bool = False
    rounding: Rounding = "search"
    keep_kv_b: bool = False
    shard_bytes: int = SHARD_BYTES
    workers: int | None = None
    measure: bool = False
    budget_bytes: int | None = None
    recipe_out: Path | None = None
    calibration: Path | None = None
    adapter: Path | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Outlook:
    """What a conversion will cost, from headers and a few blocks.

    Args:
        text_bytes: of the text model's tensors, as the planner counts them.
        carried_bytes: of the vision tower.
        files: weight files.
        file_bytes: of all of them, headers included.
        free_bytes: on the disk of the output.
        seconds: from the speed of a few blocks of each kind; reading and writing at the disk's own speed come on top.
        modules: kinds of bits, in words -> number of modules.
        notes: what else a user should know.
    """

    text_bytes: int
    carried_bytes: int
    files: int
    file_bytes: int
    free_bytes: int
    seconds: float
    modules: dict[str, int]
    notes: tuple[str, ...]

    def to_text(self) -> str:
        """For people."""
        lines = [
            f"tensors   {_size(self.text_bytes)} ({self.text_bytes:,} bytes), as `exo-kimi plan` counts them",
            f"files     {self.files}, {format_bytes(self.file_bytes)}; {format_bytes(self.free_bytes)} are free there",
            f"time      about {format_seconds(self.seconds)} of arithmetic on {processors()} processors",
            *(f"bits      {kind}: {count} modules" for kind, count in self.modules.items()),
        ]
        if self.carried_bytes:
            lines.insert(1, f"vision    {format_bytes(self.carried_bytes)}, copied")
        return "\n".join([*lines, *(f"note      {note}" for note in self.notes)])

    def to_json(self) -> str:
        """For programs: one line."""
        names = ("text_bytes", "carried_bytes", "files", "file_bytes", "free_bytes", "seconds", "modules", "notes")
        return json.dumps({name: getattr(self, name) for name in names})


def run_convert(options: ConvertOptions) -> str:
    """Do what the options say; returns what to print.

    Raises:
        UsageError: options that contradict each other, or an output of something else.
        MachineError: no room on the disk.
        CheckpointError: the source cannot be converted.
    """
    _check(options)
    if is_draft(options.directory):
        return convert_draft(_of_draft(options))
    checkpoint = Checkpoint(options.directory)
    if options.measure or options.budget_bytes is not None:
        modules = _measured(options, checkpoint)
        if options.measure:
            return errors_text(modules)
        recipe, told = _chosen(options, checkpoint, modules)
        if options.output is None:
            return told
        print(told, file=sys.stderr)
        options = replace(options, recipe=recipe)
    output = options.output
    if output is None:
        raise UsageError("say where to", expected="OUT, a new directory", where="convert")
    if options.adapter is not None:
        return _fuse(checkpoint, options.adapter, output, dry_run=options.dry_run)
    if options.link:
        return _link(options, checkpoint, output)
    if options.recipe is None:
        raise UsageError("say which bits", expected="--recipe, --budget, or --link", where="convert")
    conversion = make_conversion(
        checkpoint,
        output,
        options.recipe,
        layers=options.layers,
        rounding=options.rounding,
        keep_kv_b=options.keep_kv_b,
        shard_bytes=options.shard_bytes,
        importance=None if options.calibration is None else read_importance(options.calibration, checkpoint),
    )
    if options.dry_run:
        return outlook(conversion, workers=options.workers).to_text()
    for note in conversion.notes():
        print(f"note: {note}", file=sys.stderr)
    began = time.monotonic()
    with _bar(conversion.job.weight_bytes) as bar:
        task = bar.add_task("", total=conversion.job.weight_bytes)
        written = convert(conversion, workers=options.workers, progress=lambda count: bar.advance(task, count))
    return _report(written, time.monotonic() - began)


def outlook(conversion: Conversion, *, workers: int | None = None) -> Outlook:
    """What a conversion will cost; writes nothing."""
    kinds = Counter(
        "plain" if target.packing is None else target.packing.describe()
        for target in conversion.targets
        if target.spec.quantizable
    )
    existing = next(path for path in (conversion.job.directory, *conversion.job.directory.parents) if path.exists())
    return Outlook(
        text_bytes=conversion.text_bytes,
        carried_bytes=conversion.carried_bytes,
        files=len(conversion.job.shards),
        file_bytes=sum(shard.file_bytes for shard in conversion.job.shards),
        free_bytes=shutil.disk_usage(existing).free,
        seconds=_seconds(conversion, workers or processors()),
        modules=dict(kinds.most_common()),
        notes=tuple(conversion.notes()),
    )


def _seconds(conversion: Conversion, workers: int) -> float:
    """Arithmetic of all blocks, by the time of a few of each kind: layout and bits of the source, bits of the target."""
    weights: Counter[tuple[object, ...]] = Counter()
    examples: dict[tuple[object, ...], ModuleTarget] = {}
    for target in conversion.targets:
        kind: tuple[object, ...] = (
            target.source.layout,
            target.source.quant,
            target.packing,
            target.moved,
            target.heads is None,
        )
        weights[kind] += target.spec.parameters
        if kind not in examples or examples[kind].spec.parameters < target.spec.parameters:
            examples[kind] = target
    total = 0.0
    with RangeReader(conversion.manifest.directory) as reader:
        for kind, target in examples.items():
            rows = SourceRows(reader, target.source)
            block = next(iter(target.blocks()))
            size = (block.end - block.first) * target.spec.shape[-1]
            total += weights[kind] / size * _time_of(conversion, target, rows)
    return total / workers


def _time_of(conversion: Conversion, target: ModuleTarget, rows: SourceRows) -> float:
    fastest = np.inf
    block = next(iter(target.blocks()))
    columns = conversion.importance_of(target, block.matrix)
    for _ in range(_TIMED):
        began = time.perf_counter()
        for _piece in encode(target, rows, block, conversion.rounding, importance=columns):
            pass
        fastest = min(fastest, time.perf_counter() - began)
    return float(fastest)


def _check(options: ConvertOptions) -> None:
    """Refuse options that contradict each other."""
    ways = [
        name
        for name, given in (
            ("--recipe", options.recipe is not None and not options.link),
            ("--link", options.link),
            ("--measure", options.measure),
            ("--budget", options.budget_bytes is not None),
            ("--adapter", options.adapter is not None),
        )
        if given
    ]
    if len(ways) > 1:
        fix = "put the adapter in first, then convert what comes out" if options.adapter is not None else None
        raise UsageError("these contradict each other", expected="one of them", found=" and ".join(ways), fix=fix)
    if options.adapter is not None and (options.layers is not None or options.keep_kv_b or options.calibration):
        raise UsageError(
            "--adapter keeps layout and bits of every layer",
            fix="leave --layers, --keep-kv-b and --calibration out",
            where="--adapter",
        )
    if options.recipe_out is not None and options.budget_bytes is None:
        raise UsageError("--recipe-out is for --budget", where="--recipe-out")
    if options.calibration is not None and (options.link or options.rounding != "search"):
        raise UsageError("--calibration is for codes that are searched", where="--calibration")


def _of_draft(options: ConvertOptions) -> DraftConversion:
    """The conversion of a head that the options ask for.

    Raises:
        UsageError: options that a head does not have.
    """
    foreign = {
        "--measure": options.measure,
        "--budget": options.budget_bytes is not None,
        "--link": options.link,
        "--layers": options.layers is not None,
        "--keep-kv-b": options.keep_kv_b,
    }
    found = [name for name, given in foreign.items() if given]
    if found or options.recipe is None or options.output is None:
        raise UsageError(
            "a draft head is converted whole, by a recipe",
            expected="convert HEAD_DIR OUT --recipe RECIPE",
            found=", ".join(found) or "no OUT or no --recipe",
        )
    return DraftConversion(
        directory=options.directory,
        output=options.output,
        recipe=options.recipe,
        rounding=options.rounding,
        dry_run=options.dry_run,
    )


def _measured(options: ConvertOptions, checkpoint: Checkpoint) -> tuple[ModuleErrors, ...]:
    importance = None if options.calibration is None else read_importance(options.calibration, checkpoint)
    with Progress(TextColumn("measuring"), BarColumn(), MofNCompleteColumn(), console=Console(stderr=True)) as bar:
        start, end = options.layers or (0, None)
        manifest = checkpoint.manifest(start, end)
        task = bar.add_task("", total=sum(source.spec.quantizable for source in manifest.sources))
        return measure(
            checkpoint,
            layers=options.layers,
            importance=importance,
            worths=None if options.calibration is None else read_worth(options.calibration),
            workers=options.workers,
            on_module=lambda _: bar.advance(task),
        )


def _chosen(options: ConvertOptions, checkpoint: Checkpoint, modules: tuple[ModuleErrors, ...]) -> tuple[Recipe, str]:
    """The recipe for a budget, and what to say of it."""
    budget = options.budget_bytes or 0
    start, end = options.layers or (0, None)
    plain = Recipe(name="", title="", source="", rules=(Rule(bits=16, group_size=64),), hash="")
    rest = sum(
        plain.weight_bytes(source.spec)
        for source in checkpoint.manifest(start, end).sources
        if not source.spec.quantizable
    )
    choice = choose(modules, budget - rest)
    name = options.recipe_out.stem if options.recipe_out is not None else f"budget-{_size(budget).replace(' ', '')}"
    text = recipe_text(choice, name=name, budget_bytes=budget)
    lines = [
        f"{_size(choice.nbytes + rest)} of {_size(budget)}; error^2 of the logits {choice.error:.3g}, "
        f"at most {choice.gap:.1%} above the least that there is"
    ]
    if options.recipe_out is not None:
        write_whole(options.recipe_out, text)
        lines.append(f"wrote {options.recipe_out}: `exo-kimi plan` and `exo-kimi convert` take it as --recipe")
    elif options.output is None:
        lines.append(text)
    return recipe_of(text), "\n".join(lines)


def _link(options: ConvertOptions, checkpoint: Checkpoint, output: Path) -> str:
    if options.keep_kv_b or options.rounding != "search":
        raise UsageError("--link changes no weight", fix="leave --keep-kv-b and --rounding out", where="--link")
    job = link_job(checkpoint, output, recipe=options.recipe, layers=options.layers)
    linked = sum(path.stat().st_size for path in job.links.values())
    if options.dry_run:
        return f"links     {len(job.links)} files, {format_bytes(linked)}; no weight is copied"
    with CheckpointWriter(job) as writer:
        written = writer.finish()
    return _report(written, 0.0)


def _fuse(checkpoint: Checkpoint, adapter: Path, output: Path, *, dry_run: bool) -> str:
    fusion = plan_fusion(checkpoint, adapter, output)
    for note in fusion.adapter.notes:
        print(f"note: {note}", file=sys.stderr)
    if dry_run:
        size = format_bytes(sum(shard.file_bytes for shard in fusion.job.shards))
        return f"files     {len(fusion.job.shards)}, {size}; {len(fusion.sources)} modules change"
    began = time.monotonic()
    with _bar(fusion.job.weight_bytes) as bar:
        task = bar.add_task("", total=fusion.job.weight_bytes)
        written, modules = fuse(fusion, lambda count: bar.advance(task, count))
    return "\n".join([_report(written, time.monotonic() - began), *_fused_lines(modules)])


def _fused_lines(modules: Sequence[FusedModule]) -> list[str]:
    """What became of the modules that were changed now; none after a run that found everything there."""
    if not modules:
        return []
    worst = max(modules, key=lambda each: each.error)
    lost = [each for each in modules if each.error > each.change]
    lines = [
        f"{len(modules)} modules have the adapter in them, every other tensor is the source's",
        f"they change by {np.mean([each.change for each in modules]):.2%} in the mean, and are stored to "
        f"{np.mean([each.error for each in modules]):.3%} (worst {worst.error:.3%}, {worst.path})",
    ]
    if lost:
        lines.append(
            f"{len(lost)} modules change by less than their bits can hold: serve the adapter beside the base, or fuse it "
            "into a base of more bits"
        )
    return lines


def _report(written: Written, seconds: float) -> str:
    if written.unchanged:
        return f"{written.directory} is complete already: nothing was changed"
    if written.linked_bytes:
        size = format_bytes(written.linked_bytes)
        return f"{written.files} files ({size}) are linked in {written.directory}; 0 bytes of weights were copied"
    kept = f"; {written.kept} of them were there from an earlier run" if written.kept else ""
    return (
        f"{_size(written.weight_bytes)} in {written.files} file{'' if written.files == 1 else 's'} of {written.directory}, "
        f"each read back and compared, in {format_seconds(seconds)}{kept}"
    )


def _size(count: int) -> str:
    """`470.6 GB`, or binary units below a gigabyte."""
    return format_gb(count) if count >= 10**9 else format_bytes(count)


def _bar(total: int) -> Progress:
    columns = (TextColumn("converting"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True), disable=total < BLOCK_WEIGHTS)
