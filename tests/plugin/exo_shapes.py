"""Things in the shapes of exo b5375f8ce, without exo: instances on loopback, and checkpoints that are damaged."""

from __future__ import annotations

import dataclasses
import json
import shutil
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from exo_kimi.dialogue.speaker import Speaker
from exo_kimi.plugin.runner.chunks import ExoTypes

CANCEL_ALL = "CANCEL_ALL_TASKS"


class Record(SimpleNamespace):
    """A value that remembers which of exo's types it would be."""

    @classmethod
    def of(cls, kind: str) -> Callable[..., Record]:
        return lambda **fields: cls(kind=kind, **fields)


def exo_types() -> ExoTypes:
    """Records in place of exo's types."""
    names = [field.name for field in dataclasses.fields(ExoTypes) if field.name not in ("Memory", "cancel_all")]
    memory = SimpleNamespace(from_bytes=lambda count: count)
    return ExoTypes(**{name: Record.of(name) for name in names}, Memory=memory, cancel_all=CANCEL_ALL)


def task_params(prompt: str, **options: Any) -> Any:
    """exo's TextGenerationTaskParams, as its chat API fills it."""
    defaults: dict[str, Any] = dict.fromkeys(
        "instructions max_output_tokens top_p tools top_k stop seed enable_thinking top_logprobs min_p "
        "repetition_penalty presence_penalty frequency_penalty reasoning_effort repetition_context_size".split()
    )
    messages = [{"role": "user", "content": prompt}]
    fixed = {"temperature": 0.0, "logprobs": False, "images": [], "input": [], "chat_template_messages": messages}
    fixed |= {"bench": False, "use_prefix_cache": False}
    return SimpleNamespace(**(defaults | fixed | options))


class PipelineShardMetadata(SimpleNamespace):
    """A shard; exo's plan tells shards apart by class."""


class TensorShardMetadata(SimpleNamespace):
    """A slice of every layer."""


class MlxRingInstance(SimpleNamespace):
    """An instance over TCP."""


class MlxJacclInstance(SimpleNamespace):
    """An instance over RDMA."""


class Instances:
    """Makes the instances of one placement, one for each rank; all ranks of a call series share ports and ids."""

    params = staticmethod(task_params)

    def __init__(self) -> None:
        self._made: dict[tuple[int, ...], tuple[str, int]] = {}
        self._count = 0

    def __call__(self, split: Sequence[int], rank: int, **changes: Any) -> Any:
        key = tuple(split)
        if rank == 0 or key not in self._made:
            self._count += 1
            self._made[key] = (f"instance-{self._count}", free_port())
        instance_id, port = self._made[key]
        return bound_instance(split, rank, instance_id=instance_id, port=port, **changes)


def bound_instance(
    split: Sequence[int],
    rank: int,
    *,
    instance_id: str = "instance",
    port: int = 50000,
    model_id: str = "lab/kimi-k2-tiny",
    family: str = "kimi",
    shard: type = PipelineShardMetadata,
    kind: type = MlxRingInstance,
    ips: Sequence[str] = ("127.0.0.1", "127.0.0.2", "127.0.0.3", "127.0.0.4"),
    ranges: Sequence[tuple[int, int]] | None = None,
    context: int = 0,
) -> Any:
    """exo's BoundInstance of a rank; a rank sees its neighbours in the ring, as exo fills it."""
    count = len(split)
    ranges = ranges or [(sum(split[:i]), sum(split[: i + 1])) for i in range(count)]
    card = SimpleNamespace(model_id=model_id, family=family, context_length=context)
    shards = {
        f"runner{i}": shard(
            model_card=card,
            device_rank=i,
            world_size=count,
            start_layer=start,
            end_layer=end,
            n_layers=sum(split),
        )
        for i, (start, end) in enumerate(ranges)
    }
    assigned = SimpleNamespace(
        model_id=model_id, runner_to_shard=shards, node_to_runner={f"node{i}": f"runner{i}" for i in range(count)}
    )
    hosts = {f"node{i}": [_host(i, j, count, ips[j], port) for j in range(count)] for i in range(count)}
    where: dict[str, Any] = {"hosts_by_node": hosts}
    if kind is MlxJacclInstance:
        devices = [[None if i == j else f"rdma_en{j}" for j in range(count)] for i in range(count)]
        coordinators = {f"node{i}": f"{ips[0] if i else '0.0.0.0'}:{port}" for i in range(count)}
        where = {"jaccl_devices": devices, "jaccl_coordinators": coordinators}
    instance = kind(instance_id=instance_id, shard_assignments=assigned, **where)
    return SimpleNamespace(
        instance=instance,
        bound_runner_id=f"runner{rank}",
        bound_node_id=f"node{rank}",
        bound_shard=shards[f"runner{rank}"],
    )


def _host(viewer: int, rank: int, count: int, ip: str, port: int) -> Any:
    if viewer == rank:
        return SimpleNamespace(ip="0.0.0.0", port=port)
    if (viewer - rank) % count in (1, count - 1):
        return SimpleNamespace(ip=ip, port=port)
    return SimpleNamespace(ip="198.51.100.1", port=0)


def free_port() -> int:
    """A port that is free on both loopback addresses for now."""
    with socket.socket() as first:
        first.bind(("127.0.0.1", 0))
        return int(first.getsockname()[1])


def lose_tensor(source: Path, target: Path, name: str) -> None:
    """A copy of a checkpoint without one tensor, as an interrupted conversion would leave it: not in the index either."""
    from safetensors.numpy import load_file, save_file

    if source != target:
        shutil.copytree(source, target)
    path = target / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    file = target / index["weight_map"].pop(name)
    path.write_text(json.dumps(index))
    tensors = load_file(file)
    del tensors[name]
    file.unlink()  # it may be a link to the checkpoint that is whole
    save_file(tensors, file)


def greedy_text(directory: Path, prompt: str, tokens: int) -> str:
    """The oracle: the whole model in this process, token by token."""
    import mlx.core as mx

    from exo_kimi import load

    speaker, model = Speaker.from_directory(directory), load(directory)
    cache, found = model.make_cache(), []
    ids = speaker.template.render([{"role": "user", "content": prompt}]).ids
    for _ in range(tokens):
        token = int(mx.argmax(model(mx.array([ids]), cache)[0, -1]).item())
        if token in speaker.tokenizer.stop_ids:
            break
        found.append(token)
        ids = [token]
    return speaker.tokenizer.decode(found)
