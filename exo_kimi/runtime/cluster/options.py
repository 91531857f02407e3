"""How a cluster of stages is run: options of the user, and settings of one run that the leader and all its stages share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from exo_kimi.runtime.cluster.child_process import STAGE_COMMAND
from exo_kimi.runtime.protocol.messages import Hello, LinkKind
from exo_kimi.runtime.protocol.versions import Versions
from exo_kimi.runtime.transport.keys import ClusterKey


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterOptions:
    """How to run a plan.

    Args:
        context: most positions of one sequence; None takes the model's.
        kv_bytes: budget of each stage for caches; None takes what is free.
        planned_kv_bytes: what a plan keeps for the caches of each stage, stage 0 first, which none of them exceeds; empty without
            a plan.
        heartbeat_s: how often leader and stages say that they live.
        stall_s: silence after which a stage counts as stalled.
        connect_s: how long to try to reach a stage.
        reconnect_s: the same for a stage on another machine that was lost; it is tried again and again, and requests
            wait meanwhile.
        child_command: starts a local stage.
        prefix_disk_bytes: budget of each stage for prefixes on its disk; 0 writes none.
        prefix_directory: where, on each machine; None takes its user's cache directory.
        link: how hidden states go from stage to stage; all else goes over ZeroMQ.
    """

    context: int | None = None
    kv_bytes: int | None = None
    planned_kv_bytes: tuple[int, ...] = ()
    heartbeat_s: float = 1.0
    stall_s: float = 30.0
    connect_s: float = 15.0
    reconnect_s: float = 3.0
    child_command: tuple[str, ...] = STAGE_COMMAND
    prefix_disk_bytes: int = 0
    prefix_directory: str | None = None
    link: LinkKind = "zmq"


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSettings:
    """What all stages of one run have in common.

    Args:
        session: names the run.
        options: of the user.
        key: for stages on other machines.
        versions: installed here.
        socket_directory: where local stages listen.
    """

    session: str
    options: ClusterOptions
    key: ClusterKey | None
    versions: Versions
    socket_directory: Path

    def hello(self) -> Hello:
        """The leader's introduction."""
        return Hello(
            role="leader",
            session=self.session,
            exo_kimi=self.versions.exo_kimi,
            mlx=self.versions.mlx,
            mlx_lm=self.versions.mlx_lm,
            heartbeat_s=self.options.heartbeat_s,
            silence_s=self.options.stall_s,
        )
