"""From options and exo's arguments to a pinned plan and a checked share of the checkpoint; exo is not imported."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from exo_kimi.arch.config import KimiConfig
from exo_kimi.checkpoint.checkpoint import Checkpoint
from exo_kimi.checkpoint.doctor.doctor import text_errors
from exo_kimi.errors import CheckpointError, CheckpointProblems, PlanMismatchError, UsageError
from exo_kimi.planner.matching import check_matches
from exo_kimi.planner.plan import Plan, check_headroom, read_plan
from exo_kimi.plugin.legacy.plan import PinnedPlan, pin
from exo_kimi.plugin.legacy.tokenizer import LegacyTokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class LegacyOptions:
    """What `exo-kimi exo-legacy` was told, or a patched exo's environment.

    Args:
        plan: our plan file.
        model: the checkpoint on this machine, at least this node's layers; None looks into exo's own downloads.
        name: the model's in exo's API; None takes the plan's.
        nodes: `MACHINE=NODE_ID` where a node is not named after its machine.
        preload: load at start, and ask the other nodes to.
        source: a checkout of exo; None takes the installed one.
        api_host: where exo's API listens; None leaves it to exo, which takes every interface.
        force: take a plan that has a machine over its limit.
    """

    plan: Path
    model: Path | None = None
    name: str | None = None
    nodes: Sequence[str] = ()
    preload: bool = False
    source: Path | None = None
    api_host: str | None = None
    force: bool = False

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> LegacyOptions:
        """For a patched exo, started bare: EXO_KIMI_PLAN, and as wanted EXO_KIMI_MODEL, EXO_KIMI_NAME, EXO_KIMI_NODES
        (`MACHINE=NODE_ID,...`), EXO_KIMI_PRELOAD=1, EXO_KIMI_API_HOST and EXO_KIMI_FORCE=1."""
        model = environment.get("EXO_KIMI_MODEL")
        return cls(
            plan=Path(environment["EXO_KIMI_PLAN"]),
            model=Path(model) if model else None,
            name=environment.get("EXO_KIMI_NAME") or None,
            nodes=[part for part in environment.get("EXO_KIMI_NODES", "").split(",") if part],
            preload=environment.get("EXO_KIMI_PRELOAD", "") not in ("", "0"),
            api_host=environment.get("EXO_KIMI_API_HOST") or None,
            force=environment.get("EXO_KIMI_FORCE", "") not in ("", "0"),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class LegacySetup:
    """All that is needed before exo is touched.

    Args:
        options: as given.
        pinned: the plan with this node's place.
        directory: the checkpoint here.
        config: its architecture.
        tokenizer: its tokenizer and template.
        repo: stands for the directory inside exo.
        arguments: exo's, completed.
        sysctl: raises this machine's wired limit to what the plan counts on; None where the default is enough.
    """

    options: LegacyOptions
    pinned: PinnedPlan
    directory: Path
    config: KimiConfig
    tokenizer: LegacyTokenizer
    repo: str
    arguments: tuple[str, ...]
    sysctl: str | None


def prepare_legacy(options: LegacyOptions, arguments: Sequence[str]) -> LegacySetup:
    """Check everything that can be checked without exo; only headers are read.

    Args:
        options: see there.
        arguments: exo's own.

    Raises:
        UsageError: an option or exo's arguments cannot be followed.
        PlanError: the plan cannot be read, does not fit its machines, or is for another checkpoint.
        CheckpointError: this node's layers are not there; what is missing is named.
        TokenizerError, TemplateError: the tokenizer's files are not there.
    """
    plan = read_plan(options.plan)
    check_headroom(plan, force=options.force, where=options.plan)
    theirs = _their_arguments(arguments)
    pinned = pin(plan, node_id=theirs.node_id, nodes=options.nodes, name=options.name)
    directory = _directory(options, plan)
    checkpoint = Checkpoint(directory)
    _check_share(plan, checkpoint, pinned)
    config, model_type = checkpoint.config, checkpoint.raw_config["model_type"]
    if errors := text_errors(directory, vocab_size=config.vocab_size, model_type=model_type):
        raise CheckpointProblems(errors, where=f"{directory} (exo-kimi doctor --fix may mend it)")
    return LegacySetup(
        options=options,
        pinned=pinned,
        directory=directory,
        config=config,
        tokenizer=LegacyTokenizer.from_directory(directory),
        repo=f"exo-kimi/{pinned.name}",
        arguments=_completed(arguments, theirs, pinned.name),
        sysctl=plan.stages[pinned.stage].sysctl,
    )


def _their_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """What we must know of exo's arguments; exo reads them all itself."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for option in ("--node-id", "--inference-engine", "--default-model"):
        parser.add_argument(option)
    try:
        known, _ = parser.parse_known_args(list(arguments))
    except argparse.ArgumentError as error:
        raise UsageError("cannot read exo's arguments", found=error, where="after the two dashes") from None
    if known.inference_engine not in (None, "mlx"):
        raise UsageError(
            "a Kimi runs on exo's MLX engine",
            expected="--inference-engine mlx, or nothing",
            found=known.inference_engine,
        )
    return known


def _completed(arguments: Sequence[str], theirs: argparse.Namespace, name: str) -> tuple[str, ...]:
    """With exo's own default model, a mistyped name would download another model and take the Kimi's place."""
    engine = () if theirs.inference_engine else ("--inference-engine", "mlx")
    default = () if theirs.default_model else ("--default-model", name)
    return (*arguments, *engine, *default)


def _directory(options: LegacyOptions, plan: Plan) -> Path:
    if options.model is not None:
        return options.model
    home = Path(os.environ.get("EXO_HOME") or Path("~/.cache/exo").expanduser())
    found = home / "downloads" / plan.model.name
    if not (found / "config.json").exists():
        raise UsageError(
            "where is the checkpoint on this machine?",
            expected=f"--model DIR, or exo's own download in {found}",
            found="neither",
            fix="give --model DIR; this node needs its own layers, config.json and the tokenizer's files there",
        )
    return found


def _check_share(plan: Plan, checkpoint: Checkpoint, pinned: PinnedPlan) -> None:
    """This node's layers are there, and as far as the directory can tell they are the plan's."""
    config, own = checkpoint.config, pinned.own
    if (config.num_hidden_layers, config.hidden_size) != (plan.model.layers, plan.model.hidden_size):
        raise PlanMismatchError(
            "the plan was made for another architecture",
            expected=f"{plan.model.layers} layers of width {plan.model.hidden_size}",
            found=f"{config.num_hidden_layers} layers of width {config.hidden_size}",
            where=checkpoint.directory,
            fix="plan again for this checkpoint: `exo-kimi plan DIR --cluster ...`",
        )
    checkpoint.manifest(own.start_layer, own.end_layer)
    try:
        whole = checkpoint.manifest()
    except CheckpointError:
        return  # a share only: the rest is on other machines
    check_matches(plan, whole)
