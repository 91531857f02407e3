"""The commands of `exo-kimi train` and `exo-kimi eval`: a small Kimi K2 from scratch, and what a checkpoint knows."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from exo_kimi.cli.values import argument, flag, one_of, option, positive, rates, real, share, whole
from exo_kimi.errors import UsageError

Matrices = Literal["muon", "adamw"]


def tiny(
    directory: Annotated[Path, argument("DIR", "new, or of an interrupted training")],
    steps: Annotated[
        int | None,
        option("--steps", parser=positive, metavar="N", help="updates (default: those of the shipped model)"),
    ] = None,
    matrices: Annotated[
        Matrices | None, option("--matrices", metavar=one_of(Matrices), help="optimizer of the matrices (default muon)")
    ] = None,
    aware_share: Annotated[
        float | None,
        option(
            "--aware-share",
            parser=share,
            metavar="X",
            help="of the steps, the last, with INT4 experts; 0: rounded at the end",
        ),
    ] = None,
    seed: Annotated[int, option("--seed", parser=whole, metavar="N", help="of weights and texts (default 0)")] = 0,
) -> None:
    """From nothing to a native INT4 checkpoint; run it again to go on."""
    from exo_kimi.train.command import train_tiny
    from exo_kimi.train.recipe import TrainingRecipe

    options: dict[str, Any] = {"steps": steps, "matrices": matrices, "aware_share": aware_share}
    given = {name: value for name, value in options.items() if value is not None}
    print(train_tiny(directory, TrainingRecipe(seed=seed, **given)).to_text())


def draft(
    directory: Annotated[Path, argument("DIR", "a small Kimi, as the tiny one")],
    output: Annotated[Path, argument("OUT", "new, or of an interrupted training")],
    steps: Annotated[
        int | None,
        option("--steps", parser=positive, metavar="N", help="updates (default: those of the shipped head)"),
    ] = None,
    seed: Annotated[int, option("--seed", parser=whole, metavar="N", help="of weights and texts (default 0)")] = 0,
) -> None:
    """A draft head for a small Kimi, in the published format; run it again to go on."""
    from exo_kimi.fetch.directories import weights_directory
    from exo_kimi.train.draft.command import train_draft
    from exo_kimi.train.draft.recipe import DraftRecipe

    given = {} if steps is None else {"steps": steps}
    print(train_draft(weights_directory(directory), output, DraftRecipe(seed=seed, **given)).to_text())


def grpo(
    directory: Annotated[Path, argument("DIR", "a small Kimi, as the tiny one; it stays the reference")],
    output: Annotated[Path, argument("OUT", "new, or of an interrupted training")],
    steps: Annotated[
        int | None,
        option("--steps", parser=positive, metavar="N", help="rounds of rollouts (default: as for the shipped model)"),
    ] = None,
    prompts_per_step: Annotated[
        int | None, option("--prompts", parser=positive, metavar="N", help="groups of a round")
    ] = None,
    num_generations: Annotated[
        int | None, option("--num-generations", parser=positive, metavar="N", help="completions of a group (default 8)")
    ] = None,
    num_iterations: Annotated[
        int | None, option("--num-iterations", parser=positive, metavar="N", help="updates on a round's completions")
    ] = None,
    learning_rate: Annotated[
        float | None, option("--learning-rate", parser=share, metavar="X", help="the highest, after a few steps")
    ] = None,
    beta: Annotated[
        float | None, option("--beta", parser=real, metavar="X", help="weight of the KL divergence to DIR")
    ] = None,
    epsilon: Annotated[
        float | None,
        option("--epsilon", parser=share, metavar="X", help="ratios are clipped below 1 - X (default 0.2)"),
    ] = None,
    epsilon_high: Annotated[
        float | None, option("--epsilon-high", parser=real, metavar="X", help="and above 1 + X (default 0.28)")
    ] = None,
    no_importance_sampling: Annotated[
        bool,
        flag("--no-importance-sampling", help="do not weigh tokens by the trainer's probability over the sampler's"),
    ] = False,
    weight_sync_steps: Annotated[
        int | None,
        option(
            "--weight-sync-steps", parser=positive, metavar="N", help="the sampler's weights are new each N (default 1)"
        ),
    ] = None,
    stages: Annotated[
        int,
        option("--stages", parser=positive, metavar="N", help="of the engine that draws, each a process (default 1)"),
    ] = 1,
    seed: Annotated[int, option("--seed", parser=whole, metavar="N", help="of prompts and rollouts (default 0)")] = 0,
) -> None:
    """Reinforce a small Kimi on its own tasks: GRPO with rollouts by the engine; run it again to go on."""
    from exo_kimi.fetch.directories import weights_directory
    from exo_kimi.train.rl.command import train_grpo
    from exo_kimi.train.rl.recipe import GrpoRecipe

    options: dict[str, Any] = {"steps": steps, "prompts_per_step": prompts_per_step, "num_generations": num_generations}
    options |= {"num_iterations": num_iterations, "learning_rate": learning_rate, "beta": beta, "epsilon": epsilon}
    options |= {"epsilon_high": epsilon_high, "weight_sync_steps": weight_sync_steps}
    given = {name: value for name, value in options.items() if value is not None}
    recipe = GrpoRecipe(importance_sampling_correction=not no_importance_sampling, seed=seed, **given)
    print(train_grpo(weights_directory(directory), output, recipe, stages=stages).to_text())


def compare(
    steps: Annotated[
        int, option("--steps", parser=positive, metavar="N", help="updates of each run (default 200)")
    ] = 200,
    tried: Annotated[
        Sequence[float],
        option("--rates", parser=rates, metavar="R,R", help="rates to try (default 0.002,0.004,0.008)"),
    ] = (0.002, 0.004, 0.008),
    seeds: Annotated[int, option("--seeds", parser=positive, metavar="N", help="seeds of each rate (default 1)")] = 1,
) -> None:
    """AdamW and Muon on the same budget and texts, a smaller model."""
    from exo_kimi.train.compare import compare

    print(compare(steps, tried, range(seeds)).to_text())


def requantize(
    directory: Annotated[Path, argument("DIR", "a checkpoint in any layout, small enough for memory")],
    output: Annotated[Path, argument("OUT", "a new directory")],
    recipe: Annotated[
        str,
        option("--recipe", metavar="RECIPE", help="bits per module, as `plan` has (default q34+q6)"),
    ] = "q34+q6",
) -> None:
    """Any Kimi checkpoint in MLX's layout with other bits."""
    from exo_kimi.fetch.directories import weights_directory
    from exo_kimi.train.export import requantize

    requantize(weights_directory(directory), output, recipe=recipe)
    print(f"{recipe} is in {output}")


def evaluate(
    directory: Annotated[Path | None, argument("DIR", "a checkpoint; or --tools URL")] = None,
    against: Annotated[
        str | None,
        option(
            "--against", metavar="DIR2|URL2", help="a reference: KL and shared choices, or the calls of two servers"
        ),
    ] = None,
    tools: Annotated[
        str | None,
        option("--tools", metavar="URL", help="judge a server's tool calls instead: how often, how valid, how alike"),
    ] = None,
    requests: Annotated[
        Path | None,
        option("--requests", metavar="FILE", help="with --tools: chat requests of your own, one a line"),
    ] = None,
    api_key: Annotated[
        str | None,
        option("--api-key", metavar="KEY", envvar="EXO_KIMI_API_KEY", help="with --tools: sent to the servers"),
    ] = None,
    text: Annotated[
        list[Path],
        option("--text", metavar="FILE", help="perplexity and KL on these, as `calibrate` reads them (repeatable)"),
    ] = [],  # noqa: B006 (typer's way to say none)
    adapter: Annotated[
        Path | None, option("--adapter", metavar="PATH", help="with this LoRA or DoRA adapter of DIR")
    ] = None,
    count: Annotated[
        int, option("--count", parser=positive, metavar="N", help="questions of each task (default 100)")
    ] = 100,
    seed: Annotated[int, option("--seed", parser=whole, metavar="N", help="of the questions (default 0)")] = 0,
    wrong: Annotated[int, option("--wrong", parser=whole, metavar="N", help="wrong answers to show (default 0)")] = 0,
) -> None:
    """Ask a checkpoint held-out questions: right answers, tool calls, perplexity. Or judge a server's tool calls."""
    report: Any
    if tools is not None:
        from exo_kimi.train.evaluation.tool_calls import evaluate_tools

        given = {"requests": requests, "count": count, "seed": seed, "api_key": api_key}
        report = evaluate_tools(tools, say=_progress, against=against, **given)  # type: ignore[arg-type]
    elif directory is not None:
        options = {"count": count, "seed": seed, "files": text, "adapter": adapter}
        report = _evaluated(directory, against, **options)
    else:
        raise UsageError("nothing to evaluate", expected="a checkpoint, or --tools URL")
    print(report.to_text(wrong), report.to_json(), sep="\n")


def _evaluated(directory: Path, against: str | None, **options: Any) -> Any:
    from exo_kimi.fetch.directories import named_weights, weights_directory
    from exo_kimi.train.evaluation.evaluate import evaluate

    reference = None if against is None else Path(named_weights(against))
    return evaluate(weights_directory(directory), say=_progress, against=reference, **options)


def _progress(text: str) -> None:
    print(text, file=sys.stderr)
