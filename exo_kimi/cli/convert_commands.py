"""`exo-kimi convert`: any Kimi checkpoint with other bits."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from exo_kimi.cli.values import argument, byte_count, flag, layer_range, one_of, option, positive

Rounding = Literal["search", "mlx"]


def convert(
    directory: Annotated[Path, argument("DIR", "a checkpoint in any layout: FP8, bf16, INT4, MLX of any bits")],
    output: Annotated[
        Path | None, argument("OUT", "a new directory, or that of an interrupted run, which goes on")
    ] = None,
    recipe: Annotated[
        str | None,
        option("--recipe", metavar="RECIPE", help="bits per module, as `plan` has: a name, or a TOML file"),
    ] = None,
    budget: Annotated[
        Any, option("--budget", parser=byte_count, metavar="SIZE", help="choose bits per module for so many bytes")
    ] = None,
    recipe_out: Annotated[
        Path | None, option("--recipe-out", metavar="FILE", help="with --budget: write the recipe; OUT may be left out")
    ] = None,
    measure: Annotated[
        bool, flag("--measure", help="print what candidate bits cost each module, and write nothing")
    ] = False,
    calibration: Annotated[
        Path | None,
        option("--calibration", metavar="FILE", help="of `calibrate --inputs`: how much each input column counts"),
    ] = None,
    adapter: Annotated[
        Path | None,
        option(
            "--adapter", metavar="PATH", help="put this LoRA or DoRA adapter into the weights; nothing else changes"
        ),
    ] = None,
    layers: Annotated[
        Any,
        option("--layers", parser=layer_range, metavar="A:B", help="only these layers, half-open: a machine's share"),
    ] = None,
    link: Annotated[
        bool, flag("--link", help="keep the source's bits: link its weight files, and write config and index only")
    ] = False,
    dry_run: Annotated[bool, flag("--dry-run", help="say bytes, time and room on the disk, and write nothing")] = False,
    rounding: Annotated[
        Rounding,
        option("--rounding", metavar=one_of(Rounding), help="least error for each group (default), or mx.quantize's"),
    ] = "search",
    keep_kv_b: Annotated[
        bool, flag("--keep-kv-b", help="leave kv_b_proj whole (mlx-lm quantizes a packed one again, badly)")
    ] = False,
    shard_size: Annotated[
        int, option("--shard-size", parser=byte_count, metavar="SIZE", help="most bytes of a file (default 5GB)")
    ] = 5 * 10**9,
    workers: Annotated[
        int | None, option("--workers", parser=positive, metavar="N", help="threads (default: one a processor)")
    ] = None,
) -> None:
    """A checkpoint in MLX's mixed bits by a recipe, a block of rows at a time; a run that was cut off goes on."""
    from exo_kimi.compress.convert.command import ConvertOptions, run_convert
    from exo_kimi.fetch.directories import weights_directory
    from exo_kimi.planner.weights.recipes import load_recipe

    options = ConvertOptions(
        directory=weights_directory(directory),
        output=output,
        recipe=None if recipe is None else load_recipe(recipe),
        layers=layers,
        link=link,
        dry_run=dry_run,
        rounding=rounding,
        keep_kv_b=keep_kv_b,
        shard_bytes=shard_size,
        workers=workers,
        measure=measure,
        budget_bytes=budget,
        recipe_out=recipe_out,
        calibration=calibration,
        adapter=adapter,
    )
    print(run_convert(options))
