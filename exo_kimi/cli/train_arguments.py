"""The options of `exo-kimi train` and `exo-kimi eval`; it knows nothing of what the commands do."""

from __future__ import annotations

from pathlib import Path

from exo_kimi.cli.values import Commands, command, positive, rates, share


def add_train(commands: Commands) -> None:
    """The group and its commands."""
    summary = "train a small Kimi K2 that really answers, on the CPU"
    group = commands.add_parser("train", help=summary, description=summary)
    inner = group.add_subparsers(title="commands", metavar="COMMAND", required=True)
    tiny = command(inner, "tiny", "from nothing to a native INT4 checkpoint; run it again to go on", room="train")
    tiny.add_argument("directory", type=Path, metavar="DIR", help="new, or of an interrupted training")
    tiny.add_argument("--steps", type=positive, metavar="N", help="updates (default: those of the shipped model)")
    tiny.add_argument("--matrices", choices=("muon", "adamw"), help="optimizer of the matrices (default muon)")
    tiny.add_argument(
        "--aware-share",
        type=share,
        metavar="X",
        help="of the steps, the last, with INT4 experts; 0: rounded at the end",
    )
    tiny.add_argument("--seed", type=int, default=0, help="of weights and texts (default 0)")
    _add_compare(inner)
    _add_requantize(inner)


def _add_compare(commands: Commands) -> None:
    parser = command(commands, "compare", "AdamW and Muon on the same budget and texts, a smaller model", room="train")
    parser.add_argument("--steps", type=positive, default=200, metavar="N", help="updates of each run (default 200)")
    parser.add_argument(
        "--rates",
        type=rates,
        default=(0.002, 0.004, 0.008),
        metavar="R,R",
        help="rates to try (default 0.002,0.004,0.008)",
    )
    parser.add_argument("--seeds", type=positive, default=1, metavar="N", help="seeds of each rate (default 1)")


def _add_requantize(commands: Commands) -> None:
    parser = command(commands, "requantize", "any Kimi checkpoint in MLX's layout with other bits", room="train")
    parser.add_argument(
        "directory", type=Path, metavar="DIR", help="a checkpoint in any layout, small enough for memory"
    )
    parser.add_argument("output", type=Path, metavar="OUT", help="a new directory")
    parser.add_argument(
        "--recipe", default="mixed346", help="bits per module (default mixed346: experts 3 and 4, rest 6)"
    )


def add_eval(commands: Commands) -> None:
    """What a checkpoint knows."""
    parser = command(commands, "eval", "ask a checkpoint held-out questions: right answers, tool calls, perplexity")
    parser.add_argument("directory", type=Path, metavar="DIR")
    parser.add_argument("--against", type=Path, metavar="DIR2", help="a reference: adds KL and shared choices")
    parser.add_argument("--count", type=positive, default=100, metavar="N", help="questions of each task (default 100)")
    parser.add_argument("--seed", type=int, default=0, help="of the questions (default 0)")
    parser.add_argument("--wrong", type=int, default=0, metavar="N", help="wrong answers to show (default 0)")
