"""`exo-kimi exo status|plan|apply|prepare`: plain arguments in, text out; the command line only prints.

print(status("http://127.0.0.1:52415"))
print(plan("http://127.0.0.1:52415", "/models/mlx-community--Kimi-K2-Thinking", output="PLAN.json"))
print(apply("http://127.0.0.1:52415", "PLAN.json", echo=print))
print(make_directory("/downloads/k2", "/models", model_id="lab/kimi-k2-mixed", layers="44:61"))
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from exo_kimi.errors import UsageError
from exo_kimi.planner.plan import read_plan
from exo_kimi.planner.workload import RESERVE_BYTES, Objective
from exo_kimi.plugin.control.apply import apply_plan
from exo_kimi.plugin.control.engines import ask_engines
from exo_kimi.plugin.control.http import DEFAULT_URL, ExoClient
from exo_kimi.plugin.control.plan import exo_plan
from exo_kimi.plugin.control.prepare import Linking, prepare
from exo_kimi.plugin.control.texts import applied_text, planned_text, prepared_text, progress_line, status_text
from exo_kimi.plugin.control.watch import Deadlines

_MODEL_DIRS = ("EXO_MODELS_READ_ONLY_DIRS", "EXO_MODELS_DIRS", "EXO_DEFAULT_MODELS_DIR")


def status(url: str = DEFAULT_URL) -> str:
    """Machines, memory, engines, links and instances of a running exo.

    Raises:
        ExoUnreachableError, ExoVersionError: as `ExoClient.state`.
    """
    with ExoClient(url) as client:
        state = client.state()
        return status_text(state, where=client.url, engines=ask_engines(client, state))


def plan(
    url: str,
    model: str,
    *,
    output: str | Path | None = None,
    model_id: str | None = None,
    recipe: str | None = None,
    context: int | None = None,
    concurrency: int = 1,
    objective: Objective = "request",
    reserve_bytes: int = RESERVE_BYTES,
    raise_limits: bool = False,
    our_engine: bool = False,
    split: Sequence[int] | None = None,
    nodes: Sequence[str] | None = None,
    force: bool = False,
) -> str:
    """Our plan for the cluster as exo sees it, with exo's own beside it; written to `output` when given.

    Raises:
        ExoKimiError: as `exo_plan`.
    """
    with ExoClient(url) as client:
        state = client.state()
    made = exo_plan(
        state,
        model,
        model_id=model_id,
        recipe=recipe,
        models_dirs=model_directories(os.environ),
        context=context,
        concurrency=concurrency,
        objective=objective,
        reserve_bytes=reserve_bytes,
        our_engine=our_engine,
        raise_limits=raise_limits,
        split=split,
        nodes=nodes or (),
        force=force,
    )
    if output is not None:
        made.plan.save(output)
    return planned_text(made, output=output, url=client.url)


def apply(
    url: str,
    path: str | Path,
    *,
    model_id: str | None = None,
    nodes: Sequence[str] = (),
    tensor: bool = False,
    replace: bool = False,
    force: bool = False,
    wait: bool = True,
    our_engine: bool = False,
    connect_s: float | None = None,
    echo: Callable[[str], None] = lambda line: None,
) -> str:
    """Place a plan; `echo` gets a line whenever a node gets further.

    Args:
        url: of any node.
        path: the plan.
        model_id: as exo names it, where the plan does not say.
        nodes: `MACHINE=NODE` where names differ.
        tensor: as tensor parallel, which exo's own engine runs.
        replace: end what is placed of this model first; it is placed again when the plan fails.
        force: place a plan that has a machine over its limit.
        wait: until it answers.
        our_engine: exo was started by `exo-kimi exo run`; the plan knows, and must agree.
        connect_s: until the nodes have found each other.
        echo: for progress.

    Raises:
        ExoKimiError: as `apply_plan`.
    """
    pairs = node_pairs(nodes)
    deadlines = Deadlines() if connect_s is None else Deadlines(connect_s=connect_s)
    with ExoClient(url) as client:
        applied = apply_plan(
            client,
            read_plan(path),
            model_id=model_id,
            nodes=pairs,
            tensor=tensor,
            replace=replace,
            force=force,
            wait=wait,
            our_engine=our_engine or None,  # a flag that was not given says nothing
            deadlines=deadlines,
            report=lambda progress: echo(progress_line(progress)),
            say=echo,
        )
    return applied_text(applied, url=client.url)


def make_directory(
    directory: str | Path,
    models_dir: str | Path,
    *,
    model_id: str | None = None,
    layers: str | None = None,
    symbolic: bool = False,
) -> str:
    """A directory that exo accepts.

    Args:
        directory: the checkpoint.
        models_dir: one of exo's models directories.
        model_id: `org/name` with `kimi-k2`; made of the directory's name when not given.
        layers: `44:61` for one node's share; all when not given.
        symbolic: symbolic links instead of hard ones.

    Raises:
        ExoKimiError: as `prepare`.
    """
    start, end = (0, None) if layers is None else _range(layers)
    linking: Linking = "symbolic" if symbolic else "hard"
    made = prepare(directory, models_dir, model_id=model_id, start_layer=start, end_layer=end, linking=linking)
    return prepared_text(made)


def model_directories(environment: Mapping[str, str]) -> tuple[Path, ...]:
    """Where exo looks for models on this machine, by its own variables, then its default."""
    named = [part for key in _MODEL_DIRS for part in environment.get(key, "").split(":") if part]
    return (*(Path(part).expanduser() for part in named), Path("~/.exo/models").expanduser())


def node_pairs(texts: Sequence[str]) -> dict[str, str]:
    """Machine of a plan -> node, as `--node MACHINE=NODE` says.

    Raises:
        UsageError: not of this form.
    """
    return dict(_pair(text) for text in texts)


def _pair(text: str) -> tuple[str, str]:
    machine, equals, node = text.partition("=")
    if not (machine and equals and node):
        raise UsageError("cannot read a node", expected="MACHINE=NODE", found=repr(text), where="--node")
    return machine, node


def _range(text: str) -> tuple[int, int]:
    start, colon, end = text.partition(":")
    if not (colon and start.isdecimal() and end.isdecimal()):
        raise UsageError(
            "cannot read a layer range", expected="START:END, such as 44:61", found=repr(text), where="--layers"
        )
    return int(start), int(end)
