"""`exo-kimi serve`: from a directory and options to a running server."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from exo_kimi.checkpoint.checkpoint import Checkpoint
from exo_kimi.checkpoint.doctor.doctor import text_errors
from exo_kimi.checkpoint.fingerprint import tower_fingerprint
from exo_kimi.checkpoint.vision import NoVision, VisionManifest, chosen_tower
from exo_kimi.dialogue.pictures import PicturePrompts
from exo_kimi.dialogue.speaker import Speaker
from exo_kimi.errors import CheckpointProblems, UsageError
from exo_kimi.experts.budget import DEFAULT_PREFETCH, ExpertCache
from exo_kimi.experts.direct import DEFAULT_READS
from exo_kimi.experts.options import ExpertOptions
from exo_kimi.experts.policies import DEFAULT_POLICY
from exo_kimi.experts.traces.growing import begin_file, trace_file
from exo_kimi.pictures.fetching import fetch_picture
from exo_kimi.pictures.picture import PixelRules
from exo_kimi.pictures.reader import PictureReader
from exo_kimi.planner.matching import check_matches, check_tower_planned
from exo_kimi.planner.plan import Plan, check_headroom, read_plan
from exo_kimi.planner.weights.bytes import bytes_of_manifest
from exo_kimi.runtime.cluster.cluster_plan import make_plan
from exo_kimi.runtime.cluster.supervisor import ClusterOptions, StageCluster
from exo_kimi.runtime.descriptors import raise_descriptor_limit
from exo_kimi.runtime.engine.draft_policy import DraftTokens
from exo_kimi.runtime.engine.engine import Engine
from exo_kimi.runtime.engine.prefix_cache import PrefixOptions
from exo_kimi.runtime.engine.speculation import Drafter, Speculate
from exo_kimi.runtime.engine.survival import SURVIVE_S
from exo_kimi.runtime.protocol.messages import LinkKind
from exo_kimi.runtime.transport.keys import ENVIRONMENT_NAME, find_key
from exo_kimi.serve.adapters import check_planned_room, find_adapters, served
from exo_kimi.serve.app import create_app
from exo_kimi.serve.drafts import check_room as check_draft_room
from exo_kimi.serve.drafts import (
    draft_need,
    find_head,
    head_policy,
    is_planned,
    planned_scratch_bytes,
    planned_waiting_rows,
)
from exo_kimi.serve.gate import allowed_hosts
from exo_kimi.serve.prefixes import prefix_disk_options
from exo_kimi.serve.server import DEFAULT_HOST, DEFAULT_PORT, Served, run
from exo_kimi.units import format_bytes

STREAMING_CHUNK = 2048
"""Prompt tokens of a step where experts stay on disk and nobody says otherwise: each chunk reads nearly all of them once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeOptions:
    """What `exo-kimi serve` was told; None leaves the choice to the room concerned."""

    directory: Path
    host: str = DEFAULT_HOST
    port: int = DEFAULT_PORT
    split: str | None = None
    plan: Path | None = None
    force: bool = False
    stages: int | None = None
    stage: Sequence[str] = field(default_factory=tuple)
    api_key: str | None = None
    allowed_host: Sequence[str] = field(default_factory=tuple)
    strict_api: bool = False
    context: int | None = None
    model_id: str | None = None
    served_model_name: Sequence[str] = field(default_factory=tuple)
    any_model: bool = False
    cors_origin: Sequence[str] = field(default_factory=tuple)
    dtype: str | None = None
    kv_bytes: int | None = None
    kv_bits: int | None = None
    expert_cache: int | None = None
    expert_policy: str = DEFAULT_POLICY
    expert_prefetch: str = DEFAULT_PREFETCH
    expert_reads: str = DEFAULT_READS
    expert_profile: Path | None = None
    trace_experts: Path | None = None
    prefill_chunk: int | None = None
    queue_limit: int | None = None
    stall_deadline: float = 30.0
    survive: float = SURVIVE_S
    speculate: Speculate = "auto"
    adapter: Sequence[str] = field(default_factory=tuple)
    draft: Path | None = None
    draft_tokens: DraftTokens = "auto"
    link: LinkKind | None = None
    key_file: Path | None = None
    prefix_cache_bytes: int | None = None
    prefix_disk_bytes: int | None = None
    prefix_dir: Path | None = None
    vision: Path | None = None
    no_vision: bool = False
    fetch_images: bool = False
    no_ui: bool = False


def serve(options: ServeOptions, *, announce: Callable[[str], None] | None = None) -> None:
    """Serve until Ctrl-C.

    Args:
        options: see `exo-kimi serve --help`.
        announce: told the base URL once connections are accepted; by default it is printed.

    Raises:
        CheckpointError, TokenizerError, TemplateError: the directory cannot be served; no weight was read.
        PlanError: the plan cannot be read, does not fit its machines, or is for another checkpoint.
        UsageError: an option cannot be followed, the address is taken, or the stages would have too few descriptors.
        RuntimeFault: the stages did not become ready the first time.
    """
    raise_descriptor_limit()
    key = find_key(key_file=options.key_file, environment_text=os.environ.get(ENVIRONMENT_NAME))
    checkpoint, scratch_bytes = Checkpoint(options.directory), None
    planned_kv_bytes: tuple[int, ...] = ()
    planned_caches: tuple[ExpertCache | None, ...] = ()
    caching = _experts(options).cache(checkpoint.config)
    planned = read_plan(options.plan) if options.plan is not None else None
    if planned is not None:
        options = _following(planned, options, checkpoint)
        planned_kv_bytes = tuple(stage.kv_bytes for stage in planned.stages)
        planned_caches = tuple(
            caching.sized(None if stage.expert_slots is None else stage.expert_cache_bytes) for stage in planned.stages
        )
    tower = _tower(options, checkpoint)
    names = _names(options)
    adapters = find_adapters(options.adapter, checkpoint, taken=names)
    for name, each in adapters.items():
        for note in each.notes:
            print(f"adapter {name}: {note}", file=sys.stderr, flush=True)
    head = find_head(options.draft, options.draft_tokens, checkpoint)
    if planned is not None:
        check_tower_planned(planned, checkpoint.manifest(), tower)
    in_plan = planned is not None and head is not None and is_planned(head, checkpoint, planned)
    if planned is not None:
        scratch_bytes = planned_scratch_bytes(planned, head if in_plan else None)
    if planned is not None and head is not None and not in_plan:
        need = draft_need(
            head,
            checkpoint,
            planned,
            element_bytes=4 if options.dtype == "float32" else 2,
            prefill_chunk=options.prefill_chunk or planned.workload.prefill_chunk,
        )
        check_draft_room(need, planned)
        planned_kv_bytes = (*planned_kv_bytes[:-1], planned_kv_bytes[-1] + need.kv_bytes)
    plan = make_plan(
        checkpoint,
        split=options.split,
        stages=options.stages,
        remotes=options.stage,
        key=key,
        dtype=options.dtype,
        scratch_bytes=scratch_bytes,
        kv_bits=options.kv_bits,
        vision=tower if isinstance(tower, VisionManifest) else None,
        expert_cache=caching.sized(options.expert_cache),
        planned_caches=planned_caches,
        expert_trace=options.trace_experts,
        draft=head,
        adapters=adapters,
        draft_waiting_rows=planned_waiting_rows(planned) if planned is not None and in_plan else None,
    )
    if planned is not None and adapters:
        check_planned_room(planned, plan, adapters)
    _begin_traces(options.trace_experts, stages=len(plan.stages), local=len(plan.stages) - len(options.stage))
    speaker = Speaker.from_directory(options.directory, raw_config=checkpoint.raw_config)
    speaker = replace(speaker, pictures=_pictures(options, tower))
    _check_texts(checkpoint)
    disk = prefix_disk_options(options.prefix_disk_bytes, options.prefix_dir, check=not options.stage)
    cluster_options = ClusterOptions(
        context=options.context,
        kv_bytes=options.kv_bytes,
        planned_kv_bytes=planned_kv_bytes,
        stall_s=options.stall_deadline,
        link=options.link or "zmq",
        **disk,
    )
    hosts = allowed_hosts(options.host, options.allowed_host)
    prefixes = PrefixOptions(memory_bytes=options.prefix_cache_bytes)
    sized = replace(bytes_of_manifest(checkpoint.manifest()), kv_bits=options.kv_bits)
    drafter = Drafter.of(options.speculate, sized, head=head_policy(head, options.draft_tokens, sized))
    given: dict[str, Any] = _given(options, "prefill_chunk", "queue_limit")
    if options.expert_cache is not None:
        given.setdefault("prefill_chunk", STREAMING_CHUNK)

    async def factory() -> Served:
        cluster = StageCluster(plan, cluster_options)
        engine = Engine(
            cluster,
            context=options.context,
            drafter=drafter,
            prefixes=prefixes,
            survive_s=options.survive,
            **given,
        )
        app = create_app(
            engine,
            speaker,
            model_id=names[0],
            further_names=names[1:],
            any_model=options.any_model,
            adapters=served(adapters),
            api_key=options.api_key,
            hosts=hosts,
            cors_origins=options.cors_origin,
            strict_api=options.strict_api,
            plan=planned,
            ui=not options.no_ui,
        )
        await cluster.start()
        await engine.start()

        async def wait_failed() -> None:
            await cluster.wait_ready()
            await engine.wait_broken()

        return Served(
            app=app, engine=engine, wait_failed=wait_failed, connection_closed=app.state.metrics.connection_closed
        )

    run(factory, host=options.host, port=options.port, announce=announce or _announce)


def _experts(options: ServeOptions) -> ExpertOptions:
    return ExpertOptions(
        budget_bytes=options.expert_cache,
        policy=options.expert_policy,
        prefetch=options.expert_prefetch,
        reads=options.expert_reads,
        profile=options.expert_profile,
    )


def _begin_traces(path: Path | None, *, stages: int, local: int) -> None:
    """Make the files that stages of this machine will write into, which go on with what they find when they start again."""
    files = [] if path is None else [trace_file(path, stage, stages) for stage in range(local)]
    for file in files:
        try:
            begin_file(file)
        except OSError as error:
            raise UsageError(
                "the trace cannot be written", found=error.strerror, where=f"--trace-experts {file}"
            ) from None


def _tower(options: ServeOptions, checkpoint: Checkpoint) -> VisionManifest | NoVision:
    """The tower to load with the first stage; where config.json describes one that is not there, a line says so."""
    tower = chosen_tower(checkpoint.index, options.vision, no_vision=options.no_vision)
    if isinstance(tower, NoVision) and not options.no_vision and checkpoint.raw_config.get("vision_config") is not None:
        print(f"text only: {tower.reason}", file=sys.stderr, flush=True)
    return tower


def _pictures(options: ServeOptions, tower: VisionManifest | NoVision) -> PicturePrompts | NoVision:
    if isinstance(tower, NoVision):
        return tower
    rules = PixelRules.from_directory(tower.config, options.directory, tower=tower_fingerprint(tower))
    return PicturePrompts(tower.config, PictureReader(rules, fetch=fetch_picture if options.fetch_images else None))


def _names(options: ServeOptions) -> list[str]:
    """Of the model, the first its own."""
    names = [_utf8(options.model_id)] if options.model_id else []
    return names + ([*options.served_model_name] or ([] if names else [_utf8(options.directory.resolve().name)]))


def _utf8(name: str) -> str:
    """A name as JSON can hold it: a folder's may have any bytes."""
    return os.fsencode(name).decode("utf-8", errors="replace")


def _check_texts(checkpoint: Checkpoint) -> None:
    """Refuse what would load and then answer wrongly: without a known end of turn, generation never stops."""
    directory, model_type = checkpoint.directory, checkpoint.raw_config["model_type"]
    errors = text_errors(directory, vocab_size=checkpoint.config.vocab_size, model_type=model_type)
    if errors:
        raise CheckpointProblems(errors, where=f"{directory} (exo-kimi doctor --fix may mend it)")


def _following(plan: Plan, options: ServeOptions, checkpoint: Checkpoint) -> ServeOptions:
    """The options with split, context, link, prefill chunk and bits of the cache of a plan that is for this checkpoint.

    `--context` may ask for less, `--link` for another. Stages of this machine alone have no RDMA between them.
    """
    if options.split is not None:
        raise UsageError("--plan and --split both say how to split", fix="give one of them")
    check_headroom(plan, force=options.force, where=options.plan)
    check_matches(plan, checkpoint.manifest())
    planned = plan.workload.context
    if options.context is not None and options.context > planned:
        raise UsageError(
            "more context than the plan has room for",
            expected=f"at most {planned}",
            found=options.context,
            where="--context",
            fix=f"plan again with --context {options.context}",
        )
    _check_budgets(plan, options)
    return replace(
        options,
        split=plan.split,
        context=options.context or planned,
        link=options.link or ("jaccl" if plan.link == "jaccl" and options.stage else "zmq"),
        kv_bits=options.kv_bits or plan.model.kv_bits,
        prefill_chunk=options.prefill_chunk or plan.workload.prefill_chunk,
    )


def _check_budgets(plan: Plan, options: ServeOptions) -> None:
    """Refuse a budget above what the plan keeps for the caches of any stage; less is taken as given."""
    most_bytes, asked_bytes = max(stage.kv_bytes for stage in plan.stages), options.kv_bytes
    if asked_bytes is not None and asked_bytes > most_bytes:
        raise UsageError(
            "more KV memory than the plan has room for",
            expected=f"at most {most_bytes} bytes ({format_bytes(most_bytes)}) a stage",
            found=f"{asked_bytes} bytes ({format_bytes(asked_bytes)})",
            where="--kv-bytes",
            fix="leave it out, which takes what the plan keeps, or plan again with a larger --context or --concurrency",
        )


def _given(options: ServeOptions, *names: str) -> dict[str, int]:
    return {name: value for name in names if (value := getattr(options, name)) is not None}


def _announce(url: str) -> None:
    print(f"serving at {url} (Ctrl-C stops)", flush=True)
