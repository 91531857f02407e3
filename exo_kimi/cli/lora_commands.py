"""`exo-kimi train lora`: an adapter for any Kimi that fits in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from exo_kimi.cli.values import Dtype, argument, flag, names, one_of, option, positive, real, share, whole
from exo_kimi.errors import UsageError

FineTuneType = Literal["lora", "dora"]
Format = Literal["mlx", "peft"]
Backend = Literal["auto", "mlx", "numpy"]


def lora(
    directory: Annotated[Path, argument("DIR", "any Kimi that fits in memory, in whatever bits: the base")],
    output: Annotated[Path, argument("OUT", "new, or of an interrupted training: the adapter")],
    data: Annotated[
        Path,
        option(
            "--data", metavar="FILE", help="conversations, one a line; or a folder with train.jsonl and valid.jsonl"
        ),
    ],
    written_as: Annotated[
        Format, option("--format", metavar=one_of(Format), help="whose adapter files (default mlx)")
    ] = "mlx",
    fine_tune_type: Annotated[
        FineTuneType | None, option("--fine-tune-type", metavar=one_of(FineTuneType), help="default lora")
    ] = None,
    rank: Annotated[int | None, option("--rank", parser=positive, metavar="N", help="default 8")] = None,
    scale: Annotated[
        float | None, option("--scale", parser=real, metavar="X", help="of the adapter's product (default 20)")
    ] = None,
    alpha: Annotated[
        float | None, option("--alpha", parser=real, metavar="X", help="PEFT's way to say it: scale = alpha / rank")
    ] = None,
    dropout: Annotated[float | None, option("--dropout", parser=share, metavar="X", help="default 0")] = None,
    keys: Annotated[
        Any,
        option("--keys", parser=names, metavar="KEY,KEY", help="modules (default: attention and shared experts)"),
    ] = None,
    num_layers: Annotated[
        int | None, option("--num-layers", metavar="N", help="the last N layers, -1 for all (default 16)")
    ] = None,
    batch_size: Annotated[
        int | None, option("--batch-size", parser=positive, metavar="N", help="rows of a step (default 4)")
    ] = None,
    learning_rate: Annotated[
        float | None, option("--learning-rate", parser=real, metavar="X", help="of AdamW (default 1e-5)")
    ] = None,
    iters: Annotated[int | None, option("--iters", parser=positive, metavar="N", help="steps (default 1000)")] = None,
    max_seq_length: Annotated[
        int | None, option("--max-seq-length", parser=positive, metavar="N", help="rows are cut there (default 2048)")
    ] = None,
    grad_checkpoint: Annotated[
        bool, flag("--grad-checkpoint", help="compute layers twice instead of keeping what they computed")
    ] = False,
    backend: Annotated[
        Backend,
        option(
            "--backend",
            metavar=one_of(Backend),
            help="whose gradients (default: MLX's; NumPy's for a small K2 where MLX has no GPU)",
        ),
    ] = "auto",
    dtype: Annotated[
        Dtype | None, option("--dtype", metavar=one_of(Dtype), help="of activations (default: the checkpoint's)")
    ] = None,
    seed: Annotated[
        int, option("--seed", parser=whole, metavar="N", help="of values, order and dropout (default 0)")
    ] = 0,
) -> None:
    """LoRA or DoRA on your conversations, loss on the assistant's tokens; run it again to go on."""
    from exo_kimi.fetch.directories import weights_directory
    from exo_kimi.train.lora.command import LoraData, train_lora
    from exo_kimi.train.lora.recipe import LoraRecipe

    given = {name: value for name, value in locals().items() if name in _RECIPE and value is not None}
    given |= {} if keys is None else {"keys": tuple(keys)}
    recipe = LoraRecipe(**_scaled(given, alpha))
    found = train_lora(
        weights_directory(directory),
        output,
        LoraData.at(data),
        recipe,
        written_as=written_as,
        backend=backend,
        dtype=dtype,
    )
    print(found.to_text())


_RECIPE = (
    "fine_tune_type",
    "rank",
    "scale",
    "dropout",
    "keys",
    "num_layers",
    "batch_size",
    "learning_rate",
    "iters",
    "max_seq_length",
    "grad_checkpoint",
    "seed",
)


def _scaled(given: dict[str, Any], alpha: float | None) -> dict[str, Any]:
    if alpha is None:
        return given
    if "scale" in given:
        raise UsageError("--scale and --alpha say the same thing twice", fix="give one of them")
    return {**given, "scale": alpha / given.get("rank", 8)}
