"""The commands that make a checkpoint smaller by leaving things out, and that say what it cost."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any, Literal

from exo_kimi.cli.output import write_text
from exo_kimi.cli.values import Dtype, argument, flag, kept_experts, layer_list, names, one_of, option, positive, whole

Criterion = Literal["leave-one-out", "reap", "mean-gate", "man", "msan", "ean", "frequency", "weight-norm", "random"]
WHAT_STAYS, EVIDENCE = "What stays", "Evidence"


def calibrate(
    directory: Annotated[Path, argument("DIR", "a checkpoint")],
    text: Annotated[
        list[Path],
        option("--text", metavar="FILE", help="prose, or .jsonl with messages, text or ids a line (repeatable)"),
    ],
    output: Annotated[
        Path | None, option("-o", "--output", metavar="SCORES.json", help="where the scores go, for `prune`")
    ] = None,
    inputs: Annotated[
        Path | None,
        option("--inputs", metavar="FILE", help="where mean squares of inputs go, for `convert --calibration`"),
    ] = None,
    domain: Annotated[
        str, option("--domain", metavar="NAME", help='what the texts are about, such as "code and tools"')
    ] = "general",
    tokens: Annotated[
        int | None, option("--tokens", parser=positive, metavar="N", help="of the texts at most (default: all)")
    ] = None,
    dtype: Annotated[
        Dtype | None, option("--dtype", metavar=one_of(Dtype), help="of activations (default: as stored)")
    ] = None,
) -> None:
    """What each expert and layer is worth: one pass over texts, a layer at a time; run it again to go on."""
    from exo_kimi.compress.calibrate.command import calibrate_directory
    from exo_kimi.compress.calibrate.inputs import write_inputs
    from exo_kimi.errors import UsageError
    from exo_kimi.fetch.directories import weights_directory

    if output is None and inputs is None:
        raise UsageError("say where to", expected="-o SCORES.json, --inputs FILE, or both", where="calibrate")
    directory = weights_directory(directory)
    if inputs is not None:
        count = write_inputs(directory, text, inputs, most_tokens=tokens, dtype=dtype, say=_say)
        print(f"inputs of {count} modules are in {inputs}")
    if output is not None:
        calibrate_directory(directory, text, output, domain=domain, most_tokens=tokens, dtype=dtype, say=_say)
        print(f"scores are in {output}")


def prune(
    directory: Annotated[Path, argument("DIR", "a checkpoint in any layout")],
    out: Annotated[Path | None, argument("OUT", "a new directory, or of an interrupted run")] = None,
    keep: Annotated[
        Any,
        option(
            "--keep",
            parser=kept_experts,
            metavar="N|PLAN.json",
            help="experts of a layer that stay (default: three quarters, 288 of 384), or a plan",
            panel=WHAT_STAYS,
        ),
    ] = None,
    scores: Annotated[
        Path | None,
        option("--scores", metavar="SCORES.json", help="of `exo-kimi calibrate`", panel=WHAT_STAYS),
    ] = None,
    criterion: Annotated[
        Criterion,
        option("--by", metavar="CRITERION", help=f"{one_of(Criterion)} (default leave-one-out)", panel=WHAT_STAYS),
    ] = "leave-one-out",
    budgeted: Annotated[
        bool,
        flag(
            "--budgeted",
            help="divide the experts over the layers by worth; exo-kimi alone serves that",
            panel=WHAT_STAYS,
        ),
    ] = False,
    drop_layers: Annotated[
        Any,
        option(
            "--drop-layers",
            parser=layer_list,
            metavar="N,N|bi:N",
            help="layers to take out, or how many of the least block influence (needs --research)",
            panel=WHAT_STAYS,
        ),
    ] = (),
    no_protect: Annotated[
        bool, flag("--no-protect", help="let super experts go as any other", panel=WHAT_STAYS)
    ] = False,
    seed: Annotated[
        int, option("--seed", parser=whole, metavar="N", help="of --by random (default 0)", panel=WHAT_STAYS)
    ] = 0,
    domain: Annotated[
        str, option("--domain", metavar="NAME", help="what it is for (default: as calibrated)", panel=EVIDENCE)
    ] = "",
    report: Annotated[
        Path | None,
        option(
            "--report",
            metavar="REPORT.json",
            help="of `exo-kimi compare DIR --plan PLAN.json --json`: its gates, and figures for the card",
            panel=EVIDENCE,
        ),
    ] = None,
    research: Annotated[
        bool, flag("--research", help="write what nothing speaks for: under half, or without layers", panel=EVIDENCE)
    ] = False,
    dry_run: Annotated[bool, flag("--dry-run", help="tell the bytes and write nothing")] = False,
    output: Annotated[
        Path | None, option("-o", "--output", metavar="PLAN.json", help="write the plan, for --keep and compare")
    ] = None,
) -> None:
    """A smaller checkpoint without some of its experts, by copying packed bytes."""
    from exo_kimi.compress.prune.command import PruneOptions
    from exo_kimi.compress.prune.command import prune as prune_directory
    from exo_kimi.fetch.directories import weights_directory

    options = PruneOptions(
        keep=keep,
        scores=scores,
        criterion=criterion,
        budgeted=budgeted,
        drop_layers=drop_layers,
        protect=not no_protect,
        seed=seed,
        domain=domain,
        report=report,
        research=research,
        dry_run=dry_run,
    )
    plan = prune_directory(weights_directory(directory), out, options, plan_file=output is not None, say=_say)
    if output is not None:
        write_text(output, plan.to_json(), option="-o")


def compare(
    first: Annotated[str, argument("DIR", "the reference: a checkpoint, a file of --save, or a server's address")],
    second: Annotated[str | None, argument("DIR2", "the model to judge: the same; or --plan")] = None,
    text: Annotated[
        list[Path],
        option("--text", metavar="FILE", help="texts, as `calibrate` reads them (default: the project's prompts)"),
    ] = [],  # noqa: B006 (typer's way to say none)
    plan: Annotated[
        Path | None,
        option("--plan", metavar="PLAN.json", help="judge DIR with a pruning plan's mask, before anything is written"),
    ] = None,
    save: Annotated[
        Path | None,
        option("--save", metavar="FILE", help="only run DIR, for a second run where the other model is"),
    ] = None,
    count: Annotated[
        int, option("--count", parser=positive, metavar="N", help="prompts of each domain (default 20)")
    ] = 20,
    seed: Annotated[int, option("--seed", parser=whole, metavar="N", help="of the prompts (default 0)")] = 0,
    only: Annotated[
        Any,
        option(
            "--only",
            parser=names,
            metavar="DOMAIN,...",
            help="of maths, code, english, chinese, tools, long context (default: all)",
        ),
    ] = (),
    tokens: Annotated[
        int | None, option("--tokens", parser=positive, metavar="N", help="of all texts at most (default: all)")
    ] = None,
    max_tokens: Annotated[
        int, option("--max-tokens", parser=positive, metavar="N", help="of a reply (default 256)")
    ] = 256,
    no_replies: Annotated[
        bool, flag("--no-replies", help="ask nothing: no loops, think tags, tools and gates")
    ] = False,
    weights: Annotated[bool, flag("--weights", help="errors of weights too, module by module")] = False,
    dtype: Annotated[
        Dtype | None, option("--dtype", metavar=one_of(Dtype), help="of activations (default: as stored)")
    ] = None,
    api_key: Annotated[
        str | None, option("--api-key", metavar="KEY", envvar="EXO_KIMI_API_KEY", help="sent to servers")
    ] = None,
    json: Annotated[
        Path | None, option("--json", metavar="FILE", help="write the report, for `prune --report` and `plan`")
    ] = None,
    html: Annotated[
        Path | None, option("--html", metavar="FILE", help="write the report as one page with plots")
    ] = None,
) -> int:
    """What a smaller model lost: KL, perplexity, likeliest tokens, loops, think tags, tools, layer by layer."""
    from exo_kimi.compress.compare import command
    from exo_kimi.fetch.directories import named_weights

    options = command.CompareOptions(
        files=tuple(text),
        plan=plan,
        count=count,
        seed=seed,
        domains=tuple(only),
        most_tokens=tokens,
        max_tokens=max_tokens,
        replies=not no_replies,
        weights=weights,
        dtype=dtype,
        api_key=api_key,
    )
    if save is not None:
        command.save(Path(named_weights(first)), save, options, say=_say)
        print(f"the run is in {save}")
        return 0
    sides = (named_weights(first), None if second is None else named_weights(second))
    found = command.compare(*sides, options, say=_say)
    print(found.to_text())
    if json is not None:
        write_text(json, found.to_json(), option="--json")
    if html is not None:
        write_text(html, found.to_html(), option="--html")
    return 0 if found.passed else 1


def _say(text: str) -> None:
    print(text, file=sys.stderr)
