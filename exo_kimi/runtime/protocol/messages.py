"""What the leader and the stages say to each other beside steps; knows nothing of bytes (see `wire`) or sockets (see `link`).

    leader                                stage
      Hello            ->                 (first frame on every connection)
                       <-                 HelloAck, or Refused
      Load             ->
                       <-                 Progress ... Loaded, or StageFault
      Join(epoch)      ->                 drops every sequence, connects to the next stage
                       <-                 Joined, or StageFault
      Ping             ->                 each heartbeat
                       <-                 Progress, each heartbeat
      (PairOffer, PairAnswer between a stage and the next, when a Join asks for it)
      Step             -> first stage ... last stage -> StepResult
                       <-                 BlocksChanged, when its disk has written or lost prefixes
      Goodbye          ->                 frees the weights; a local child ends

Bytes are counts of bytes, `_s` are seconds. Integers are never negative.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from exo_kimi.runtime.requests import StageState

Backend = Literal["ring", "jaccl"]
LinkKind = Literal["zmq", "ring", "jaccl"]
LINK_KINDS: tuple[LinkKind, ...] = ("zmq", "ring", "jaccl")

Role = Literal["leader", "upstream"]
FaultKind = Literal["oom", "error", "protocol", "link", "checkpoint"]
FreeScope = Literal["host", "process"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Hello:
    """Who connects. `session` names one run of a leader. After `silence_s` without a frame the stage gives the leader up."""

    role: Role
    session: str
    exo_kimi: str
    mlx: str
    mlx_lm: str
    heartbeat_s: float
    silence_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class HelloAck:
    """Who listens. `host` is equal for stages of one machine, which share its memory; `held_bytes` is what a Load would
    give back first, `free_bytes` as in Joined. Versions
    that differ are reported; only the protocol must agree."""

    exo_kimi: str
    mlx: str
    mlx_lm: str
    pid: int
    host: str
    held_bytes: int
    free_bytes: int
    free_scope: FreeScope


@dataclass(frozen=True, slots=True, kw_only=True)
class Refused:
    """The stage does not serve this peer; `retry` says that it may do so later."""

    message: str
    retry: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Ping:
    """The leader is alive."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """Which layers to hold, half-open, as stage `stage`. The stage's own directory goes before `directory`. `fingerprint` is
    that of these layers in the leader's checkpoint (see `fingerprint`). Loading again what is held costs nothing.
    `scratch_bytes` is what a step may take beside weights and caches; None leaves it to the stage's free memory. `kv_bits`
    is 8, or None for caches in the dtype of the activations."""

    stage: int
    directory: str
    start_layer: int
    end_layer: int
    dtype: str | None
    fingerprint: str
    scratch_bytes: int | None = None
    kv_bits: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """A heartbeat. `busy_s` is how long the current load, join or step has taken so far, 0 when idle."""

    state: StageState
    epoch: int
    busy_s: float
    loaded_bytes: int
    total_bytes: int
    kv_bytes: int
    active_bytes: int
    peak_bytes: int
    sequences: int
    pid: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """The layers of a Load are in memory. `cache_step`: a cache grows by so many tokens at a time."""

    start_layer: int
    end_layer: int
    weights_bytes: int
    cache_step: int
    kv_bytes_per_token: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Join:
    """A new epoch begins: every sequence is gone. `next_address` is None for the last stage; hidden
    states go to it over `link`. With `prefix_disk_bytes` the
    stage keeps prefixes of `block_tokens` tokens each on its disk, in `prefix_directory` or else in its user's cache."""

    epoch: int
    next_address: str | None
    link: LinkKind
    block_tokens: int
    prefix_disk_bytes: int
    prefix_directory: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Joined:
    """The stage is empty and linked to the next. `free_bytes` is what it could still take: of the machine as a whole when
    `free_scope` is `host`; as if no other stage ran there when it is `process`. On its disk is room for `disk_blocks` blocks
    of tokens, and there are `blocks`, the one that was not used for longest first (see `prefix_key.pack_keys`)."""

    epoch: int
    free_bytes: int
    free_scope: FreeScope
    disk_blocks: int
    blocks: str


@dataclass(frozen=True, slots=True, kw_only=True)
class BlocksChanged:
    """Blocks that are on the stage's disk from now on, and blocks that are not: lost, or not written when told to. Both as
    in Joined."""

    epoch: int
    added: str
    gone: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PairOffer:
    """From a stage to the next: hidden states of an epoch shall go over `mx.distributed` (see `pairing`). `sender` is where
    this side listens meanwhile, `host` the address of the next stage as seen from here."""

    epoch: int
    backend: Backend
    sender: str
    sender_device: str | None
    host: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PairAnswer:
    """The answer to PairOffer: a process that receives is being started, and listens at `receiver` meanwhile."""

    epoch: int
    receiver: str
    receiver_device: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class StageFault:
    """A load, join or step that failed, as the error's own fields; the stage itself lives and takes a Join."""

    epoch: int
    step_id: int | None
    cause: FaultKind
    what: str
    expected: str | None = None
    found: str | None = None
    where: str | None = None
    fix: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Goodbye:
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
CONTROL_KINDS: dict[str, type[Control]] = {
    "hello": Hello,
    "hello_ack": HelloAck,
    "refused": Refused,
    "ping": Ping,
    "load": Load,
    "progress": Progress,
    "loaded": Loaded,
    "join": Join,
    "joined": Joined,
    "blocks_changed": BlocksChanged,
    "pair_offer": PairOffer,
    "pair_answer": PairAnswer,
    "stage_fault": StageFault,
    "goodbye": Goodbye,
}
