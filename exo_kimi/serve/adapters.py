"""`--adapter [NAME=]PATH`: the adapters of a server, by the names by which requests ask for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from exo_kimi.checkpoint.adapters.manifest import AdapterManifest, resolve_adapter
from exo_kimi.checkpoint.checkpoint import Checkpoint
from exo_kimi.errors import UsageError
from exo_kimi.planner.plan import Plan
from exo_kimi.runtime.cluster.cluster_plan import ClusterPlan
from exo_kimi.runtime.requests import ServedAdapter
from exo_kimi.units import format_bytes

WHERE = "--adapter"


def find_adapters(given: Sequence[str], checkpoint: Checkpoint, *, taken: Sequence[str]) -> dict[str, AdapterManifest]:
    """The adapters that a command line names.

    Args:
        given: `NAME=PATH`, or a path whose last part is the name.
        checkpoint: that they are for.
        taken: names of the model itself.

    Raises:
        UsageError: a name is taken or cannot be asked for, or two adapters have it.
        CheckpointError: an adapter cannot be read, or is not for this checkpoint.
    """
    found: dict[str, AdapterManifest] = {}
    for text in given:
        name, path = _named(text)
        if name in found or name in taken:
            raise UsageError(
                "a name that is taken", found=name, where=f"{WHERE} {text}", fix=f"{WHERE} ANOTHER_NAME={path}"
            )
        found[name] = resolve_adapter(path, checkpoint)
    return found


def served(adapters: Mapping[str, AdapterManifest]) -> dict[str, ServedAdapter]:
    """The same as requests carry them."""
    return {name: ServedAdapter(name=name, fingerprint=each.fingerprint) for name, each in adapters.items()}


def check_planned_room(planned: Plan, cluster: ClusterPlan, adapters: Mapping[str, AdapterManifest]) -> None:
    """Refuse adapters that a plan does not count and has no room for.

    Raises:
        UsageError: a stage is short, with the numbers.
    """
    for stage, made in zip(planned.stages, cluster.stages, strict=True):
        load = made.load
        needed = sum(each.bytes_within(load.start_layer, load.end_layer) for each in adapters.values())
        counted = stage.weight_bytes + stage.expert_cache_bytes
        short = min(needed, made.bytes_with(None) - counted) - stage.headroom_bytes
        if short > 0:
            raise UsageError(
                f"the plan has no room for the adapters on stage {load.stage}",
                expected=f"{format_bytes(needed)} beside what is planned",
                found=f"{format_bytes(stage.headroom_bytes)}",
                where=WHERE,
                fix="plan again with --adapter, and with a smaller --context or --concurrency if it does not fit",
            )


def _named(text: str) -> tuple[str, Path]:
    name, equals, path = text.partition("=")
    if not equals or Path(text).exists():
        name, path = Path(text).resolve().name, text
    if not name or not path or not name.isprintable() or any(each.isspace() for each in name):
        raise UsageError(
            "no name that a request can ask for",
            expected="NAME=PATH, the name without blanks",
            found=repr(text),
            where=WHERE,
        )
    return name, Path(path)
