"""The plan of a served cluster: which stage holds which layers on which machine, checked before anything is started."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from exo_kimi.arch.config import KimiConfig
from exo_kimi.arch.geometry import check_quantizable
from exo_kimi.checkpoint.adapters.manifest import AdapterManifest
from exo_kimi.checkpoint.checkpoint import Checkpoint
from exo_kimi.checkpoint.drafts.manifest import DraftManifest
from exo_kimi.checkpoint.fingerprint import stage_fingerprint
from exo_kimi.checkpoint.manifest import StageManifest
from exo_kimi.checkpoint.vision import VisionManifest
from exo_kimi.errors import UsageError
from exo_kimi.experts.budget import ExpertCache, shares_of, slots_for
from exo_kimi.experts.layout import FLOAT_NAMES, layouts_of
from exo_kimi.experts.traces.growing import trace_file
from exo_kimi.planner.split import balanced_split, parse_split
from exo_kimi.planner.weights.bytes import bytes_of_manifest
from exo_kimi.runtime.protocol.messages import Load, LoadAdapter, PinnedExperts, encode_path
from exo_kimi.runtime.transport.address import Address, parse_address
from exo_kimi.runtime.transport.keys import ClusterKey, require_key

DEFAULT_STAGES = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class StagePlan:
    """One stage.

    Args:
        load: what it is to hold.
        remote: None for a process of this machine, which the leader starts.
        resident_bytes: what its weights take in memory, with all their experts.
        expert_bytes: of that, routed experts.
        from_previous: where the stage before reaches it, if another address than the leader's.
    """

    load: Load
    remote: Address | None
    resident_bytes: int
    expert_bytes: int = 0
    from_previous: Address | None = None

    def bytes_with(self, own_cache_bytes: int | None) -> int:
        """What its weights take where routed experts may stay on disk.

        Args:
            own_cache_bytes: what the stage was started with for them; None leaves it to the order.
        """
        cache_bytes = self.load.expert_cache_bytes if own_cache_bytes is None else own_cache_bytes
        if cache_bytes is None or cache_bytes >= self.expert_bytes:
            return self.resident_bytes
        return self.resident_bytes - self.expert_bytes + cache_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterPlan:
    """All stages, in order, of one checkpoint; `key` is for those on other machines."""

    directory: Path
    config: KimiConfig
    stages: tuple[StagePlan, ...]
    key: ClusterKey | None


def make_plan(
    checkpoint: Checkpoint,
    *,
    split: str | None = None,
    stages: int | None = None,
    remotes: Sequence[str] = (),
    key: ClusterKey | None = None,
    dtype: str | None = None,
    scratch_bytes: int | None = None,
    kv_bits: int | None = None,
    vision: VisionManifest | None = None,
    expert_cache: ExpertCache | None = None,
    planned_caches: Sequence[ExpertCache | None] = (),
    expert_trace: Path | None = None,
    draft: DraftManifest | None = None,
    adapters: Mapping[str, AdapterManifest] | None = None,
    draft_waiting_rows: int | None = None,
) -> ClusterPlan:
    """Place every layer of a checkpoint.

    Local stages come first, for a stage on another machine could not reach one here; `remotes` are the last ones, in order.

    Args:
        checkpoint: with all its layers.
        split: layers per stage, such as `44,17`; None balances bytes.
        stages: how many, remotes included; None takes `split`'s number, or one here and each remote, or 2.
        remotes: addresses of `exo-kimi stage` processes.
        key: the cluster key.
        dtype: see `loader.load`.
        scratch_bytes, kv_bits: see `messages.Load`.
        vision: the tower, which the first stage holds; None takes no pictures.
        expert_cache: what this machine may hold of the routed experts of its stages, which share it by their bytes; None holds
            all.
        planned_caches: the same of each stage, as a plan has it, which counts where `expert_cache` says nothing.
        expert_trace: where the stages of this machine write which experts are asked for, each into a file of its own if there
            are several (see `trace_file`).
        draft: the draft head, which the last stage holds; None guesses from the text so far alone.
        adapters: by name; each stage holds its layers' part of them.
        draft_waiting_rows: see `messages.Load`.

    Raises:
        CheckpointError: the directory cannot be served.
        SplitError, AddressError, KeyMismatchError, UsageError: an option cannot be followed.
    """
    addresses = [parse_address(text, option="--stage") for text in remotes]
    _check_remotes(addresses, key)
    config = checkpoint.config
    if kv_bits is not None:
        check_quantizable(config)
    checkpoint.manifest()  # what is wrong anywhere in the model is told before what is wrong with an option
    feature_layers: tuple[int, ...] = ()
    if draft is not None:
        draft.config.check_target(config, where=draft.directory)
        feature_layers = draft.config.feature_layers(config.num_hidden_layers)
    ranges = stage_ranges(checkpoint, split=split, stages=stages, remotes=len(addresses), vision=vision)
    local = len(ranges) - len(addresses)
    placed: list[Address | None] = [*[None] * local, *addresses]
    manifests = [checkpoint.manifest(start, end) for start, end in ranges]
    shares = [*_shares(expert_cache, manifests[:local], dtype), *[None] * len(addresses)]
    for stage, planned in enumerate(planned_caches):
        if planned is not None and shares[stage] is None:
            shares[stage] = planned.budget_bytes
    used = next((cache for cache in (expert_cache, *planned_caches) if cache is not None), ExpertCache(budget_bytes=0))
    plans = []
    for stage, ((start, end), remote) in enumerate(zip(ranges, placed, strict=True)):
        manifest = manifests[stage]
        if remote is None:
            manifest.check_here()
        tower = vision if stage == 0 else None
        head = draft if stage == len(ranges) - 1 else None
        load = Load(
            stage=stage,
            directory=encode_path(checkpoint.directory.resolve()),
            start_layer=start,
            end_layer=end,
            dtype=dtype,
            fingerprint=stage_fingerprint(manifest),
            scratch_bytes=scratch_bytes,
            kv_bits=kv_bits,
            vision=tower is not None,
            vision_directory=_apart(tower, checkpoint.directory),
            expert_cache_bytes=shares[stage],
            expert_trace=_trace_path(expert_trace, stage, len(ranges)) if remote is None else None,
            expert_policy=used.policy,
            expert_prefetch=used.prefetch,
            expert_reads=used.reads,
            expert_profile=tuple(
                PinnedExperts(layer=each.layer, experts=each.experts)
                for each in used.profile
                if start <= each.layer < end
            ),
            feature_layers=feature_layers,
            draft_directory=None if head is None else encode_path(head.directory.resolve()),
            draft_fingerprint=None if head is None else head.fingerprint,
            adapters=tuple(
                LoadAdapter(name=name, directory=encode_path(each.directory.resolve()), fingerprint=each.fingerprint)
                for name, each in (adapters or {}).items()
            ),
            draft_waiting_rows=None if head is None else draft_waiting_rows,
        )
        weights_bytes = manifest.resident_bytes + manifest.widened_bytes
        if tower is not None:
            weights_bytes += tower.resident_bytes + tower.kept_bytes
        if head is not None:
            weights_bytes += head.resident_bytes + borrowed_bytes(head, checkpoint, manifest)
        weights_bytes += sum(each.bytes_within(start, end) for each in (adapters or {}).values())
        expert_bytes = sum(each.resident_bytes for each in manifest.sources if each.spec.kind == "experts")
        plans.append(StagePlan(load=load, remote=remote, resident_bytes=weights_bytes, expert_bytes=expert_bytes))
    return ClusterPlan(directory=checkpoint.directory, config=config, stages=tuple(plans), key=key)


def _trace_path(path: Path | None, stage: int, stages: int) -> str | None:
    return None if path is None else encode_path(trace_file(path, stage, stages).absolute())


def borrowed_bytes(draft: DraftManifest, checkpoint: Checkpoint, stage: StageManifest) -> int:
    """What a head takes of its target that the stage beside it does not hold: the embedding, where it has none of its own."""
    if draft.parts.embeds or stage.start_layer == 0:
        return 0
    return sum(
        source.resident_bytes
        for source in checkpoint.manifest(0, 1).sources
        if source.spec.path.rpartition(".")[2] == "embed_tokens"
    )


def _shares(cache: ExpertCache | None, manifests: Sequence[StageManifest], dtype: str | None) -> list[int | None]:
    """What each stage of this machine may hold of its routed experts.

    Raises:
        UsageError: not one expert for each of their layers.
    """
    if cache is None:
        return [None] * len(manifests)
    floats = FLOAT_NAMES[dtype] if dtype is not None else None
    stages = [list(layouts_of(manifest.sources, floats=floats).values()) for manifest in manifests]
    every = [layout for layouts in stages for layout in layouts]
    experts = {each.layer: each.experts for each in every}
    slots_for(cache.budget_bytes, {each.layer: each.slot_bytes for each in every}, experts)
    whole = [sum(layout.experts * layout.slot_bytes for layout in layouts) for layouts in stages]
    return list(shares_of(cache.budget_bytes, whole))


def stage_ranges(
    checkpoint: Checkpoint,
    *,
    split: str | None,
    stages: int | None,
    remotes: int,
    vision: VisionManifest | None = None,
) -> Sequence[tuple[int, int]]:
    """Half-open layer ranges of all stages, those of this machine first; the last `remotes` are on others.

    Args:
        checkpoint: its headers are enough.
        split, stages, vision: see `make_plan`.
        remotes: how many stages are on other machines.

    Raises:
        CheckpointError: the directory cannot be served.
        SplitError, UsageError: an option cannot be followed.
    """
    if split is not None:
        ranges = parse_split(split, checkpoint.config.num_hidden_layers)
        if stages is not None and stages != len(ranges):
            raise UsageError("--split and --stages disagree", expected=f"{stages} stages", found=f"--split {split}")
    else:
        count = stages if stages is not None else remotes + 1 if remotes else DEFAULT_STAGES
        ranges = balanced_split(bytes_of_manifest(checkpoint.manifest()).with_tower(vision), count)
    if remotes > len(ranges):
        raise UsageError(
            "more --stage addresses than stages", expected=f"at most {len(ranges)}", found=remotes, where="--stage"
        )
    return ranges


def _apart(tower: VisionManifest | None, directory: Path) -> str | None:
    """Where the tower's tensors are, if not beside the layers."""
    if tower is None or tower.directory.resolve() == directory.resolve():
        return None
    return encode_path(tower.directory.resolve())


def _check_remotes(addresses: Sequence[Address], key: ClusterKey | None) -> None:
    for address in addresses:
        if not address.is_loopback:
            require_key(key, address)
    if len(set(addresses)) < len(addresses):
        raise UsageError(
            "the same --stage twice", expected="another address for each", found=[str(a) for a in addresses]
        )
    for before, after in pairwise(addresses):
        if after.is_loopback and not before.is_loopback:
            raise UsageError(
                f"the stage at {before} cannot reach the next one at {after}",
                expected="an address that other machines can reach",
                found=after,
                where="--stage",
                fix="name the loopback stages first, or give the machine's own address",
            )
