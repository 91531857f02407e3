"""The commands of `exo-kimi trace`: which experts a workload asks for, and what slots and policies would make of it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from exo_kimi.cli.output import write_text
from exo_kimi.cli.values import Dtype, argument, counts, names, one_of, option, positive, real, whole

Kind = Literal["uniform", "zipf", "scan"]


def record(
    directory: Annotated[Path, argument("DIR", "a checkpoint")],
    text: Annotated[
        list[Path],
        option("--text", metavar="FILE", help="prose, or .jsonl with messages, text or ids a line (repeatable)"),
    ],
    output: Annotated[Path, option("-o", "--output", metavar="TRACE.npz", help="where the trace goes")],
    tokens: Annotated[
        int | None, option("--tokens", parser=positive, metavar="N", help="of the texts at most (default: all)")
    ] = None,
    dtype: Annotated[
        Dtype | None, option("--dtype", metavar=one_of(Dtype), help="of activations (default: as stored)")
    ] = None,
) -> None:
    """Which experts the tokens of texts are routed to: one pass, with one layer in memory at a time."""
    from exo_kimi.compress.routes import record_directory
    from exo_kimi.fetch.directories import weights_directory

    print(record_directory(weights_directory(directory), text, output, most_tokens=tokens, dtype=dtype, say=_say))


def replay(
    traces: Annotated[
        list[Path],
        argument("TRACE", "of `trace record`, `trace make`, or `serve --trace-experts`: a file for each stage"),
    ],
    slots: Annotated[
        Sequence[int],
        option(
            "--slots", parser=counts, metavar="N,N,...", help="of a layer (default: from 1/16 of its experts to all)"
        ),
    ] = (),
    policies: Annotated[
        Sequence[str],
        option(
            "--policy", parser=names, metavar="NAME,...", help="lru, slru, lfu, s3fifo, pinned, belady (default: all)"
        ),
    ] = (),
    learnt: Annotated[
        Path | None,
        option(
            "--learnt", metavar="TRACE.npz", help="whose most used experts `pinned` keeps (default: the trace's own)"
        ),
    ] = None,
    output: Annotated[
        Path | None,
        option("-o", "--output", metavar="FILE", help="write the first policy's hit rates, for `plan --stream --hits`"),
    ] = None,
    svg: Annotated[Path | None, option("--svg", metavar="FILE", help="write a plot")] = None,
) -> None:
    """What slots and policies make of a trace: a table of hit rates, then one JSON line."""
    from exo_kimi.experts.traces.report import EVERY_POLICY, ReplayTable
    from exo_kimi.experts.traces.trace import read_trace, read_traces

    chosen = tuple(policies) or EVERY_POLICY
    other = None if learnt is None else read_trace(learnt)
    table = ReplayTable.of(read_traces(traces), slots=slots, policies=chosen, learnt=other)
    print(f"{table.to_text()}\n{table.to_json()}")
    if output:
        write_text(output, table.curve(chosen[0]), option="-o")
    if svg:
        write_text(svg, table.svg(), option="--svg")


def make(
    output: Annotated[Path, argument("TRACE.npz", "where the trace goes")],
    kind: Annotated[
        Kind, option("--kind", metavar=one_of(Kind), help="how experts are chosen (default uniform)")
    ] = "uniform",
    experts: Annotated[int, option("--experts", parser=positive, metavar="N", help="of a layer (default 384)")] = 384,
    chosen: Annotated[int, option("--chosen", parser=positive, metavar="K", help="a token (default 8)")] = 8,
    tokens: Annotated[int, option("--tokens", parser=positive, metavar="N", help="how many (default 4000)")] = 4000,
    layers: Annotated[int, option("--layers", parser=positive, metavar="N", help="how many (default 1)")] = 1,
    exponent: Annotated[float, option("--exponent", parser=real, metavar="S", help="of Zipf's law (default 1)")] = 1.0,
    seed: Annotated[int, option("--seed", parser=whole, metavar="N", help="of the draws (default 0)")] = 0,
) -> None:
    """A made-up trace with a known answer: uniform, by Zipf's law, or scans."""
    from exo_kimi.experts.traces.synthetic import made

    trace = made(kind, exponent=exponent, experts=experts, chosen=chosen, tokens=tokens, layers=layers, seed=seed)
    trace.save(output)
    print(f"{trace.source}: {tokens} tokens, {layers} layers, {chosen} of {experts} experts a token are in {output}")


def _say(text: str) -> None:
    print(text, file=sys.stderr)
