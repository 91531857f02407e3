"""Watch an instance become ready, node by node, and tell each way in which exo does not get there.

As seen on real nodes: a runner can hang for ever before it says that it connects, and its node then ignores every later
instance; a failed load is retried five times and the instance then vanishes; runners of deleted instances stay listed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from exo_kimi.errors import ExoDeletedError, ExoError, ExoLoadError, ExoUnreachableError
from exo_kimi.plugin.control.http import ExoClient
from exo_kimi.plugin.control.instance import NodeAssignment
from exo_kimi.plugin.control.state import ANSWERS, ClusterState, Runner
from exo_kimi.units import format_seconds

_BEFORE_LOADING = ("", "RunnerIdle", "RunnerConnecting")
_FETCHING = ("DownloadOngoing", "DownloadFailed")


@dataclass(frozen=True, slots=True, kw_only=True)
class Deadlines:
    """Seconds, and how many failures of one runner are enough.

    Args:
        create_s: until exo lists the instance.
        connect_s: until every runner has found the others.
        quiet_s: without any change while loading and warming up.
        answer_s: for the first token.
        delete_s: until a deleted instance is gone.
        settle_s: for free memory to be measured again.
        links_s: for a node that has just come to be measured and to find the others; exo took 15 s.
        poll_s: between two looks.
        lost_looks: looks in a row that may fail before exo counts as gone.
        failures: of one runner; exo itself tries five times.
    """

    create_s: float = 20.0
    connect_s: float = 60.0
    quiet_s: float = 600.0
    answer_s: float = 300.0
    delete_s: float = 20.0
    settle_s: float = 3.0
    links_s: float = 45.0
    poll_s: float = 1.0
    lost_looks: int = 5
    failures: int = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """The clock, so that tests need not wait."""

    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadingProgress:
    """Where one node is. `phase` is exo's word without `Runner`, or `Waiting` before it has one."""

    name: str
    phase: str
    layers_loaded: int
    layers: int


@dataclass(slots=True)
class _Watch:
    client: ExoClient
    instance_id: str
    model_id: str
    assignments: Mapping[str, NodeAssignment]
    runners: Mapping[str, str]
    deadlines: Deadlines
    report: Callable[[Sequence[LoadingProgress]], None]
    timing: Timing
    layers_seen: dict[str, int] = field(default_factory=dict)
    failures: dict[str, list[str]] = field(default_factory=dict)
    last: tuple[LoadingProgress, ...] = ()
    created: bool = False
    began: float = 0.0
    changed: float = 0.0
    lost: int = 0

    def run(self, until_ready: bool) -> Mapping[str, int]:
        self.began = self.changed = self.timing.clock()
        while True:
            state = self._look()
            if state is not None:
                self._follow(state)
                if self.created and not until_ready:
                    return self.layers_seen
                if self.last and all(f"Runner{each.phase}" in ANSWERS for each in self.last):
                    return self.layers_seen
            self.timing.sleep(self.deadlines.poll_s)

    def _look(self) -> ClusterState | None:
        try:
            state = self.client.state()
        except ExoUnreachableError as error:
            self.lost += 1
            if self.lost < self.deadlines.lost_looks:
                return None
            raise ExoLoadError(
                "exo went away while the model was loading",
                found=error.what,
                where=self.client.url,
                fix=f"start exo there again; another node can delete the instance {self.instance_id}",
            ) from error
        self.lost = 0
        return state

    def _follow(self, state: ClusterState) -> None:
        now = self.timing.clock()
        self._nodes_are_there(state)
        if state.instance(self.instance_id) is None:
            self._not_listed(now)
            return
        self.created = True
        self._files_are_there(state)
        progress = tuple(self._progress(state, node_id) for node_id in self.runners)
        if progress != self.last:
            self.last, self.changed = progress, now
            self.report(progress)
        self._connects(now)
        if now - self.changed > self.deadlines.quiet_s:
            raise ExoLoadError(
                f"nothing has changed for {format_seconds(self.deadlines.quiet_s)}",
                found=", ".join(f"{each.name}: {each.phase}" for each in progress),
                fix="look at exo's log on these machines; restart exo on the one that stands still",
            )

    def _nodes_are_there(self, state: ClusterState) -> None:
        gone = [assignment.name for node_id, assignment in self.assignments.items() if state.node(node_id) is None]
        if gone:
            raise ExoLoadError(
                f"{' and '.join(gone)} left the cluster while the model was loading",
                found=", ".join(state.names.values()) or "no nodes",
                fix=f"start exo on {' and '.join(gone)} again, see it in `exo-kimi exo status`, then apply again",
            )

    def _not_listed(self, now: float) -> None:
        told = [f"{name}: {messages[-1]}" for name, messages in self.failures.items()]
        if self.created and told:
            raise ExoLoadError(
                "exo deleted the instance after its retries",
                found="; ".join(told),
                fix="look at exo's log on these machines",
            )
        if self.created:
            raise ExoDeletedError(
                "the instance was deleted while it was loading",
                found="no runner said why",
                fix="somebody else did: apply again",
            )
        if now - self.began > self.deadlines.create_s:
            raise ExoLoadError(
                "exo took the instance and does not show it",
                expected=f"{self.instance_id} within {format_seconds(self.deadlines.create_s)}",
                fix="restart exo on the machine that is the master",
            )

    def _files_are_there(self, state: ClusterState) -> None:
        for node_id, assignment in self.assignments.items():
            download = state.downloads.get((node_id, self.model_id))
            if download is None or download.status not in _FETCHING:
                continue
            raise ExoLoadError(
                f"{assignment.name} does not have the model",
                expected=f"a complete directory {self.model_id.replace('/', '--')} in its EXO_MODELS_DIRS",
                found=download.message or "exo began to download all of it",
                fix="`exo-kimi exo prepare` makes it there; exo looks again within a minute, or when it is restarted",
            )

    def _progress(self, state: ClusterState, node_id: str) -> LoadingProgress:
        assignment = self.assignments[node_id]
        runner = state.runners.get(self.runners[node_id])
        if runner is not None and runner.phase == "RunnerLoading" and runner.total_layers:
            self._loads_what_was_planned(assignment, runner)
        before = next((each.phase for each in self.last if each.name == assignment.name), "")
        if runner is not None and runner.phase == "RunnerFailed" and before != "Failed":
            self._failed(assignment, runner)
        return LoadingProgress(
            name=assignment.name,
            phase=runner.phase.removeprefix("Runner") if runner else "Waiting",
            layers_loaded=runner.layers_loaded if runner else 0,
            layers=assignment.layers,
        )

    def _loads_what_was_planned(self, assignment: NodeAssignment, runner: Runner) -> None:
        self.layers_seen[assignment.name] = runner.total_layers
        if runner.total_layers != assignment.layers:
            raise ExoLoadError(
                f"{assignment.name} loads other layers than planned",
                expected=f"{assignment.layers} layers ({assignment.start_layer}:{assignment.end_layer})",
                found=f"{runner.total_layers} layers",
            )

    def _failed(self, assignment: NodeAssignment, runner: Runner) -> None:
        messages = self.failures.setdefault(assignment.name, [])
        said = runner.message or "no message"
        for node_id, each in self.assignments.items():
            said = said.replace(node_id, each.name)
        messages.append(said)
        if len(messages) >= self.deadlines.failures:
            raise ExoLoadError(
                f"the runner on {assignment.name} failed {len(messages)} times",
                found=messages[-1],
                fix=f"look at exo's log on {assignment.name}; `exo-kimi inspect DIR` says whether the files are sound",
            )

    def _connects(self, now: float) -> None:
        phases = {each.name: "" if each.phase == "Waiting" else f"Runner{each.phase}" for each in self.last}
        if len(phases) < 2 or not all(phase in _BEFORE_LOADING for phase in phases.values()):
            return
        if now - max(self.began, self.changed) <= self.deadlines.connect_s:
            return
        silent = [name for name, phase in phases.items() if phase != "RunnerConnecting"] or list(phases)
        raise ExoLoadError(
            f"the runner on {' and '.join(silent)} hangs while the nodes connect",
            expected=f"connected within {format_seconds(self.deadlines.connect_s)}",
            found=", ".join(f"{each.name}: {each.phase}" for each in self.last),
            fix=f"restart exo on {' and '.join(silent)}: it ignores every later instance until then",
        )


def watch(
    client: ExoClient,
    instance_id: str,
    model_id: str,
    assignments: Mapping[str, NodeAssignment],
    runners: Mapping[str, str],
    *,
    until_ready: bool,
    deadlines: Deadlines,
    report: Callable[[Sequence[LoadingProgress]], None],
    timing: Timing,
) -> Mapping[str, int]:
    """Look until every runner is ready.

    Args:
        client: a node of the cluster.
        instance_id: what was created.
        model_id: its model.
        assignments: node id -> what it was given.
        runners: node id -> our own runner id; exo also lists those of instances that are gone.
        until_ready: False returns as soon as exo lists the instance.
        deadlines: of the phases.
        report: called when anything has changed.
        timing: clock and sleep.

    Returns:
        Node name -> layers that exo said it was loading.

    Raises:
        ExoLoadError: it will not become ready, with the node and what to do there.
    """
    return _Watch(client, instance_id, model_id, assignments, runners, deadlines, report, timing).run(until_ready)


def take_back(client: ExoClient, instance_id: str, deadlines: Deadlines, timing: Timing) -> bool:
    """Delete an instance and wait until it is gone; False when that cannot be seen.

    exo may list an instance later than it was asked to delete it, so two looks must agree.
    """
    end = timing.clock() + deadlines.delete_s
    unseen = 0
    try:
        while unseen < 2:
            listed = client.delete(instance_id) or client.state().instance(instance_id) is not None
            unseen = 0 if listed else unseen + 1
            if timing.clock() > end:
                return False
            if unseen < 2:
                timing.sleep(deadlines.poll_s)
    except ExoError:
        return False
    return True
