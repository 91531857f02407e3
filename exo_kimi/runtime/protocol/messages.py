"""What the leader and the stages say to each other beside steps: one class a message, decoded strictly by msgspec.

    leader                                stage
      Hello            ->                 (first frame on every connection)
                       <-                 HelloAck, or Refused
      Load             ->
                       <-                 Progress ... Loaded, or StageFault
      Join(epoch)      ->                 ends every sequence, connects to the next stage
                       <-                 Joined, or StageFault
      Ping             ->                 each heartbeat
                       <-                 Progress, each heartbeat
      (PairOffer, PairAnswer between a stage and the next, when a Join asks for it)
      Step             -> first stage ... last stage -> StepResult
                       <-                 BlocksChanged, when its disk has written or lost prefixes
      Goodbye          ->                 frees the weights; a local child ends

A frame's header is the JSON of one of these classes (`frames`), with its `kind` and the `version` of the protocol. A member that
is missing, unknown, of another type or out of bounds is refused. `_bytes` are counts of bytes, `_s` are seconds.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal, get_args
from urllib.parse import quote, unquote_to_bytes

from msgspec import Meta, Struct

from exo_kimi.experts.budget import DEFAULT_PREFETCH, ExpertCache, LayerProfile
from exo_kimi.experts.policies import DEFAULT_POLICY
from exo_kimi.runtime.requests import StageState
from exo_kimi.runtime.steps import HeldCaches

PROTOCOL_VERSION: Literal[9] = 9

Count = Annotated[int, Meta(ge=0, le=2**63 - 1)]
Positive = Annotated[int, Meta(ge=1, le=2**63 - 1)]
Name = Annotated[str, Meta(max_length=1024)]
"""A version, a machine, an address, a device."""
DirectoryPath = Annotated[str, Meta(max_length=3 * 4096)]
"""A path as `encode_path` writes it."""

_SAFE = "".join(chr(code) for code in range(0x20, 0x7F) if chr(code) != "%")

Backend = Literal["ring", "jaccl"]
LinkKind = Literal["zmq", "ring", "jaccl"]
LINK_KINDS: tuple[LinkKind, ...] = ("zmq", "ring", "jaccl")

Role = Literal["leader", "upstream"]
FaultKind = Literal["oom", "error", "protocol", "link", "checkpoint"]
FreeScope = Literal["host", "process"]


class Header(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="kind"):
    """The first part of a frame. `version` is checked before anything else is read (see `frames.decode`)."""

    version: Literal[9] = PROTOCOL_VERSION


class Hello(Header, frozen=True, kw_only=True, tag="hello"):
    """Opens a connection and says who connects. The stage gives the leader up after `silence_s` without a frame.

    Args:
        role: the leader, or the stage before this one on the leader's behalf.
        session: names one run of a leader.
        exo_kimi, mlx, mlx_lm: installed versions.
        heartbeat_s: how often a Ping comes.
        silence_s: the leader's stall deadline.
    """

    role: Role
    session: Name
    exo_kimi: Name
    mlx: Name
    mlx_lm: Name
    heartbeat_s: float
    silence_s: float


class HelloAck(Header, frozen=True, kw_only=True, tag="hello_ack"):
    """Answers a Hello and says who listens. Versions that differ are reported; only the protocol must agree.

    Args:
        exo_kimi, mlx, mlx_lm: installed versions.
        pid: process id.
        host: equal for stages of one machine, which share its memory.
        held_bytes: weights that the stage holds now and that a Load would give back first.
        free_bytes, free_scope: as in Joined.
        expert_cache_bytes: what the stage was started with for routed experts, which goes before the leader's; None takes that.
    """

    exo_kimi: Name
    mlx: Name
    mlx_lm: Name
    pid: Count
    host: Name
    held_bytes: Count
    free_bytes: Count
    free_scope: FreeScope
    expert_cache_bytes: Count | None = None


class Refused(Header, frozen=True, kw_only=True, tag="refused"):
    """The stage does not serve this peer; `retry` says that it may do so later."""

    message: str
    retry: bool


class Ping(Header, frozen=True, kw_only=True, tag="ping"):
    """The leader's heartbeat."""


class PinnedExperts(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`budget.LayerProfile` with its bounds."""

    layer: Count
    experts: Annotated[tuple[Count, ...], Meta(max_length=65_536)]


class LoadAdapter(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An adapter that a stage is to hold its layers' part of.

    Args:
        name: by which sequences ask for it.
        directory: the leader's.
        fingerprint: of its files (see `adapters.manifest`).
    """

    name: Name
    directory: DirectoryPath
    fingerprint: Name


class Load(Header, frozen=True, kw_only=True, tag="load"):
    """Asks the stage to hold the layers `[start_layer, end_layer)`. Loading again what is held costs nothing.

    Args:
        stage: its index.
        directory: the leader's checkpoint; a directory that the stage was started with goes before it.
        start_layer, end_layer: half-open.
        dtype: of the weights that are not quantized; None takes the checkpoint's.
        fingerprint: of these layers in the leader's checkpoint (see `checkpoint.fingerprint`).
        scratch_bytes: what a step may take beside weights and caches; None leaves it to the stage's free memory.
        kv_bits: 8, or None for caches in the dtype of the activations.
        vision: whether this stage, the first, holds the vision tower too.
        vision_directory: where the tower's tensors are, if not beside the layers.
        expert_cache_bytes: what the stage may hold of its routed experts; the others stay on its disk. None holds all.
        expert_policy, expert_prefetch, expert_reads: how it uses that memory (see `experts.budget.ExpertCache`).
        expert_profile: what the policy `pinned` keeps, of each layer.
        expert_trace: the file into which the stage writes which experts are asked for; None writes none.
        feature_layers: whose features a draft head reads, ascending; empty without one.
        draft_directory: the leader's directory of the head, which this stage, the last, holds too; None for all others.
        draft_fingerprint: of the head's tensors.
        adapters: LoRA and DoRA adapters, which sequences may ask for.
        draft_waiting_rows: positions of all sequences whose features wait for the head, at most, as a plan has room for; None has
            room for those of as many sequences as may run.
    """

    stage: Count
    directory: DirectoryPath
    start_layer: Count
    end_layer: Count
    dtype: Name | None
    fingerprint: Name
    scratch_bytes: Count | None = None
    kv_bits: Count | None = None
    vision: bool = False
    vision_directory: DirectoryPath | None = None
    expert_cache_bytes: Count | None = None
    expert_policy: Name = DEFAULT_POLICY
    expert_prefetch: Name = DEFAULT_PREFETCH
    expert_reads: Name = "auto"
    expert_profile: tuple[PinnedExperts, ...] = ()
    expert_trace: DirectoryPath | None = None
    feature_layers: tuple[Count, ...] = ()
    draft_directory: DirectoryPath | None = None
    draft_fingerprint: Name | None = None
    adapters: Annotated[tuple[LoadAdapter, ...], Meta(max_length=64)] = ()
    draft_waiting_rows: Count | None = None

    def expert_cache(self) -> ExpertCache | None:
        """None where all experts are held."""
        if self.expert_cache_bytes is None:
            return None
        return ExpertCache(
            budget_bytes=self.expert_cache_bytes,
            policy=self.expert_policy,
            prefetch=self.expert_prefetch,
            reads=self.expert_reads,
            profile=tuple(LayerProfile(layer=each.layer, experts=each.experts) for each in self.expert_profile),
        )


class ExpertTotals(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`requests.ExpertHealth` with its bounds."""

    slots: Count
    slot_bytes: Count
    hits: Count
    misses: Count
    evictions: Count
    read_bytes: Count
    read_s: float
    stall_s: float
    failed_reads: Count
    prefetched_bytes: Count = 0
    prefetch_used_bytes: Count = 0
    prefetch_wasted_bytes: Count = 0
    prefetch_experts: Count = 0


class Progress(Header, frozen=True, kw_only=True, tag="progress"):
    """The stage's heartbeat. `busy_s` is how long the current load, join or step has taken so far, 0 when idle, without what was
    spent on reading that went on; `compute_s` is what all steps took together. `experts` is None where all of them are held."""

    state: StageState
    epoch: Count
    busy_s: float
    compute_s: float
    loaded_bytes: Count
    total_bytes: Count
    kv_bytes: Count
    active_bytes: Count
    peak_bytes: Count
    sequences: Count
    pid: Count
    experts: ExpertTotals | None = None


class Loaded(Header, frozen=True, kw_only=True, tag="loaded"):
    """The layers of a Load are in memory. `cache_step`: a cache grows by so many tokens at a time. `waiting_bytes`: what features
    that wait for a draft head take at most, all sequences together. `state_bytes`: what a sequence of any length takes beside its
    cached tokens, where layers have recurrent states; `snapshot_bytes`: what a snapshot of these takes."""

    start_layer: Count
    end_layer: Count
    weights_bytes: Count
    cache_step: Count
    kv_bytes_per_token: Count
    waiting_bytes: Count = 0
    state_bytes: Count = 0
    snapshot_bytes: Count = 0


class Join(Header, frozen=True, kw_only=True, tag="join"):
    """Begins a new epoch: the stage ends every sequence and links to the next stage.

    Args:
        epoch: counts from 1.
        keep: keep what is whole of the sequences' caches, for others to begin from; False drops them.
        next_address: of the next stage; None for the last one.
        link: how hidden states go to the next stage.
        block_tokens: tokens of a block of a prefix on disk.
        prefix_disk_bytes: budget of the stage's disk for prefixes; 0 keeps none.
        prefix_directory: where; None takes the cache directory of the stage's user.
    """

    epoch: Count
    keep: bool = False
    next_address: DirectoryPath | None
    link: LinkKind
    block_tokens: Count
    prefix_disk_bytes: Count
    prefix_directory: DirectoryPath | None


class KeptCaches(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`steps.HeldCaches` with its bounds."""

    seq_id: Count
    tokens: Count
    least_tokens: Count = 0

    def held(self) -> HeldCaches:
        """As the leader takes it."""
        return HeldCaches(seq_id=self.seq_id, tokens=self.tokens, least_tokens=self.least_tokens)


class Joined(Header, frozen=True, kw_only=True, tag="joined"):
    """The stage runs no sequence and is linked to the next.

    Args:
        epoch: of the Join.
        kept: caches that it kept; `kept_bytes` is what they take.
        free_bytes: what the stage could still allocate.
        free_scope: `host`: of the machine as a whole; `process`: as if no other stage ran there.
        disk_blocks: blocks of tokens for which its disk has room.
        disk_snapshots: snapshots of states for which it has room without blocks.
        blocks: keys of what is there, the one that was not used for longest first (see `prefix_key.pack_keys`).
    """

    epoch: Count
    kept: Annotated[tuple[KeptCaches, ...], Meta(max_length=1_000_000)] = ()
    kept_bytes: Count = 0
    free_bytes: Count
    free_scope: FreeScope
    disk_blocks: Count
    disk_snapshots: Count
    blocks: str


class BlocksChanged(Header, frozen=True, kw_only=True, tag="blocks_changed"):
    """Blocks that are on the stage's disk from now on (`added`), and blocks that are not (`gone`): lost, or not written when
    told to. Keys packed as in Joined."""

    epoch: Count
    added: str
    gone: str


class PairOffer(Header, frozen=True, kw_only=True, tag="pair_offer"):
    """Proposes to the next stage that hidden states of an epoch go over `mx.distributed` (see `pairs.pairing`).

    Args:
        epoch: of the Join.
        backend: of `mx.distributed`.
        sender: `IP:PORT` where the sending side listens while the pair is made.
        sender_device: its RDMA device; None for the ring.
        host: the IP of the next stage as seen from the sender.
    """

    epoch: Count
    backend: Backend
    sender: Name
    sender_device: Name | None
    host: Name


class PairAnswer(Header, frozen=True, kw_only=True, tag="pair_answer"):
    """Accepts a PairOffer: a process that receives is being started, and listens at `receiver` (`IP:PORT`) meanwhile."""

    epoch: Count
    receiver: Name
    receiver_device: Name | None


class StageFault(Header, frozen=True, kw_only=True, tag="stage_fault"):
    """A load, join or step that failed, as the error's own fields; the stage itself lives and takes a Join."""

    epoch: Count
    step_id: Count | None
    cause: FaultKind
    what: str
    expected: str | None = None
    found: str | None = None
    where: str | None = None
    fix: str | None = None


class Goodbye(Header, frozen=True, kw_only=True, tag="goodbye"):
    """The leader leaves on purpose."""


Control = (
    Hello
    | HelloAck
    | Refused
    | Ping
    | Load
    | Progress
    | Loaded
    | Join
    | Joined
    | BlocksChanged
    | PairOffer
    | PairAnswer
    | StageFault
    | Goodbye
)
CONTROL_KINDS: dict[str, type[Control]] = {str(cls.__struct_config__.tag): cls for cls in get_args(Control)}


def encode_path(path: str | Path) -> str:
    """A path as a message holds it: percent-encoded but for what ASCII can show, since the name of a file need not be UTF-8."""
    return quote(os.fsencode(path), safe=_SAFE)


def decode_path(text: str) -> Path:
    """The path of `encode_path`."""
    return Path(os.fsdecode(unquote_to_bytes(text)))
