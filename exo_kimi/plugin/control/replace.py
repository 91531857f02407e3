"""Replacing what is placed: its memory counted back before anything ends, and the same placed again when the new one fails."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from exo_kimi.errors import ExoError, ExoPlacementError, ExoRefusedError
from exo_kimi.planner.workload import RESERVE_BYTES
from exo_kimi.plugin.control.http import ExoClient
from exo_kimi.plugin.control.instance import NodeAssignment, renamed
from exo_kimi.plugin.control.state import ClusterState, Instance
from exo_kimi.plugin.control.watch import Deadlines, Timing, take_back, watch


def with_memory_back(state: ClusterState, older: Sequence[Instance]) -> ClusterState:
    """The cluster as it would be at most without these instances.

    exo tells no runner's memory, and caches grow with use. So on their nodes everything counts as theirs but the reserve that a
    plan leaves anyway, and the weights of other instances.
    """
    leaving = {instance.instance_id for instance in older}
    freed = {shard.node_id for instance in older for shard in instance.shards}
    others: dict[str, int] = dict.fromkeys(freed, 0)
    for instance in state.instances:
        for shard in instance.shards:
            if instance.instance_id not in leaving and shard.node_id in freed:
                others[shard.node_id] += _weight_bytes(instance, shard.end_layer - shard.start_layer, shard.kind)
    nodes = tuple(
        replace(
            node,
            available_bytes=max(node.available_bytes, node.total_bytes - RESERVE_BYTES - others[node.node_id]),
        )
        if node.node_id in freed
        else node
        for node in state.nodes
    )
    return replace(state, nodes=nodes)


def _weight_bytes(instance: Instance, layers: int, kind: str) -> int:
    card = instance.card
    storage_bytes = int(card["storageSize"]["inBytes"])
    if kind != "Pipeline":
        return storage_bytes // len(instance.shards)
    return storage_bytes * layers // max(int(card["nLayers"]), 1)


@dataclass(slots=True)
class Replacement:
    """Older instances of a model, ended one after another, and placed again when what replaces them fails.

    Args:
        client: a node of the cluster.
        older: as exo listed them.
        deadlines: of the phases.
        timing: clock and sleep.
        say: told what is done.
    """

    client: ExoClient
    older: Sequence[Instance]
    deadlines: Deadlines
    timing: Timing
    say: Callable[[str], None]
    ended: list[Instance] = field(default_factory=list)

    def end(self) -> None:
        """End them all, and wait until their memory is measured as free.

        Raises:
            ExoPlacementError: one does not end.
        """
        for instance in self.older:
            self.say(f"ending {instance.model_id}, instance {instance.instance_id}")
            self.ended.append(instance)
            if not take_back(self.client, instance.instance_id, self.deadlines, self.timing):
                self.ended.remove(instance)
                raise ExoPlacementError(
                    "an older instance does not end", found=instance.instance_id, fix="restart exo on its nodes"
                )
        if self.older:
            self.timing.sleep(self.deadlines.settle_s)  # exo measures free memory once a second

    def put_back(self, *, until_ready: bool) -> str:
        """Place again what was ended, in the same shape with new ids.

        Args:
            until_ready: wait until it is; else until exo lists it.

        Returns:
            One sentence on what was done; empty when nothing had been ended.
        """
        told = [self._place_again(instance, until_ready) for instance in self.ended]
        self.ended.clear()
        for sentence in told:
            self.say(sentence)
        return "; ".join(told)

    def _place_again(self, instance: Instance, until_ready: bool) -> str:
        self.say(f"placing again what was there before: {instance.model_id}, as instance {instance.instance_id} was")
        again = renamed(instance.placed)
        body = next(iter(again.values()))
        try:
            self._create(again)
            names = self.client.state().names
            watch(
                self.client,
                body["instanceId"],
                instance.model_id,
                {
                    shard.node_id: NodeAssignment(
                        node_id=shard.node_id,
                        name=names.get(shard.node_id, shard.node_id),
                        start_layer=shard.start_layer,
                        end_layer=shard.end_layer,
                        need_bytes=0,
                    )
                    for shard in instance.shards
                },
                body["shardAssignments"]["nodeToRunner"],
                until_ready=until_ready,
                deadlines=self.deadlines,
                report=lambda progress: None,
                timing=self.timing,
            )
        except ExoError as error:
            return f"what was there before could not be placed again ({error.what}): apply its plan"
        state = "ready" if until_ready else "loading"
        return f"what was there before is placed again, instance {body['instanceId']}, and {state}"

    def _create(self, instance: dict[str, object]) -> None:
        """Ask for it until the memory of what failed is free: exo refuses before that."""
        end = self.timing.clock() + self.deadlines.delete_s
        while True:
            try:
                self.client.create(instance)
                return
            except ExoRefusedError:
                if self.timing.clock() > end:
                    raise
                self.timing.sleep(self.deadlines.poll_s)
