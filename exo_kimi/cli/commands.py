"""The commands, each a call of one room's function.

Frameworks are imported inside the commands, so that `--help` and a mistyped option answer at once.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from exo_kimi.cli.expert_options import (
    STREAM,
    CacheOption,
    PolicyOption,
    PrefetchOption,
    ProfileOption,
    ReadsOption,
    TraceOption,
)
from exo_kimi.cli.output import awake, write_text
from exo_kimi.cli.values import (
    DEFAULT_PORT,
    Dtype,
    KvBits,
    Objective,
    argument,
    byte_count,
    byte_rate,
    counts,
    deadline,
    draft_tokens,
    flag,
    guesses,
    host_name,
    key,
    layer_or_tower,
    model_name,
    one_of,
    option,
    origin,
    port,
    positive,
    seconds,
    whole,
)
from exo_kimi.errors import UsageError
from exo_kimi.logs import log_to

Layout = Literal["mlx", "int4", "mxfp4", "fp8", "bf16"]
Family = Literal["k2", "linear", "k3"]
Link = Literal["zmq", "ring", "jaccl"]
Bench = Literal[  # modules of exo_kimi.bench, with - for _
    "all",
    "attention",
    "cache-8bit",
    "conformance",
    "convert",
    "drafts",
    "exo",
    "expert-peers",
    "expert-reads",
    "expert-streaming",
    "grammar",
    "kda",
    "kv-b",
    "link-speed",
    "load",
    "pipeline",
    "plan",
    "prefill-memory",
    "prefix-restart",
    "prune",
    "router",
    "share",
    "soak",
    "speculation",
    "step",
    "turns",
    "link_speed",  # as it was spelled until 0.2
]
BENCHES: tuple[str, ...] = tuple(name for name in get_args(Bench) if name != "link_speed")

Directory = Annotated[Path, argument("DIR", "a checkpoint, or a model of the hub as ORG/NAME")]
LOG_JSON = "log lines as JSON objects, each with the id of its request"
SPLIT, MEMORY, PREFIXES, PICTURES = "Model and split", "Memory", "Prefix cache", "Pictures"
NETWORK, SPEED, WORKLOAD, OUTPUT = "Network and keys", "Speculation", "Workload", "Output"


def demo(
    stages: Annotated[int, option("--stages", parser=positive, metavar="N", help="stage processes (default 2)")] = 2,
    host: Annotated[str, option("--host", metavar="HOST", help="address of the API (default 127.0.0.1)")] = "127.0.0.1",
    api_port: Annotated[
        int, option("--port", parser=port, metavar="PORT", help=f"port of the API (default {DEFAULT_PORT})")
    ] = DEFAULT_PORT,
    once: Annotated[bool, flag("--once", help="stop after the chat instead of serving on")] = False,
) -> None:
    """The tiny trained model, two local stages, a chat with a tool, then an open server."""
    from exo_kimi.client.demo import demo

    demo(stages=stages, host=host, port=api_port, once=once)


def tiny(
    directory: Annotated[Path, argument("DIR", "a new or empty directory")],
    layout: Annotated[Layout, option("--layout", metavar=one_of(Layout), help="weight layout (default mlx)")] = "mlx",
    recipe: Annotated[
        str | None,
        option("--recipe", metavar="RECIPE", help="bits per module of the mlx layout, as `plan` has (default q34+q6)"),
    ] = None,
    seed: Annotated[int, option("--seed", parser=whole, metavar="N", help="seed of the weights (default 0)")] = 0,
    absorbed: Annotated[bool, flag("--absorbed", help="write embed_q and unembed_out instead of kv_b_proj")] = False,
    prefix: Annotated[bool, flag("--prefix", help="write keys under language_model., as K2.5 and later")] = False,
    vision: Annotated[
        bool, flag("--vision", help="with a vision tower and K2.5's chat template (writes --prefix's keys too)")
    ] = False,
    family: Annotated[
        Family, option("--family", metavar=one_of(Family), help="which Kimi: k2, linear, or k3 (default k2)")
    ] = "k2",
    shards: Annotated[
        int,
        option("--shards", parser=positive, metavar="N", help="safetensors files (default 2; 1 writes no index)"),
    ] = 2,
) -> None:
    """Write a small random Kimi in a published on-disk format."""
    options: dict[str, Any] = locals()
    from exo_kimi.checkpoint.tiny.make import make_tiny

    if recipe is not None:
        from exo_kimi.planner.weights.recipes import load_recipe

        options["recipe"] = load_recipe(recipe)
    path = make_tiny(**options, template="k25" if vision else "instruct")
    print(f"a tiny Kimi {family.upper() if family != 'linear' else 'Linear'} ({layout}) is in {path}")


def inspect(
    directory: Directory,
    json: Annotated[bool, flag("--json", help="one JSON document instead of text")] = False,
) -> int:
    """What a checkpoint or a draft head holds: architecture, bytes, bits, problems."""
    from exo_kimi.checkpoint.drafts.report import inspect_any
    from exo_kimi.fetch.directories import headers_directory

    report = inspect_any(headers_directory(directory))
    print(report.to_json() if json else report.to_text())
    return 1 if report.problems else 0


def serve(
    directory: Directory,
    split: Annotated[
        str | None,
        option(
            "--split",
            metavar="N,N,...",
            help="layers per stage, such as 44,17 (default: balanced by bytes)",
            panel=SPLIT,
        ),
    ] = None,
    plan: Annotated[
        Path | None, option("--plan", metavar="PLAN.json", help="the split of an `exo-kimi plan` file", panel=SPLIT)
    ] = None,
    force: Annotated[
        bool, flag("--force", help="take --plan even where a machine is over its limit", panel=SPLIT)
    ] = False,
    stages: Annotated[
        int | None,
        option(
            "--stages",
            parser=positive,
            metavar="N",
            help="number of stages (default 2, or one local and every --stage)",
            panel=SPLIT,
        ),
    ] = None,
    stage: Annotated[
        list[str],
        option(
            "--stage",
            metavar="ADDR",
            help="a running `exo-kimi stage`, or the name of one that was paired; repeat for more, last layers last",
            panel=SPLIT,
        ),
    ] = [],  # noqa: B006 (typer's way to say none)
    pair: Annotated[
        str | None,
        option(
            "--pair",
            metavar="CODE[@ADDR]",
            help="pair with the stage that shows this code, and use it behind the others",
            panel=SPLIT,
        ),
    ] = None,
    context: Annotated[
        int | None,
        option(
            "--context",
            parser=positive,
            metavar="N",
            help="tokens of one request at most (default: the model's)",
            panel=SPLIT,
        ),
    ] = None,
    model_id: Annotated[
        str | None,
        option(
            "--model-id",
            metavar="NAME",
            help="the model's name in the API (default: the directory's name)",
            panel=SPLIT,
        ),
    ] = None,
    served_model_name: Annotated[
        list[str],
        option(
            "--served-model-name",
            parser=model_name,
            metavar="NAME ...",
            help="names that clients may ask for, the first being the model's own (default: --model-id)",
            panel=SPLIT,
        ),
    ] = [],  # noqa: B006
    any_model: Annotated[
        bool, flag("--any-model", help="take every other name, too, for agents that ask for their own", panel=SPLIT)
    ] = False,
    dtype: Annotated[
        Dtype | None,
        option("--dtype", metavar=one_of(Dtype), help="of activations and KV (default: as stored)", panel=MEMORY),
    ] = None,
    kv_bytes: Annotated[
        int | None,
        option(
            "--kv-bytes",
            parser=byte_count,
            metavar="SIZE",
            help="KV memory of each stage (default: what is free)",
            panel=MEMORY,
        ),
    ] = None,
    kv_bits: Annotated[
        KvBits | None,
        option(
            "--kv-bits", metavar=one_of(KvBits), help="bits of the KV cache (default: those of the dtype)", panel=MEMORY
        ),
    ] = None,
    expert_cache: CacheOption = None,
    expert_policy: PolicyOption = "lru",
    expert_profile: ProfileOption = None,
    expert_prefetch: PrefetchOption = "auto",
    expert_reads: ReadsOption = "auto",
    trace_experts: TraceOption = None,
    prefill_chunk: Annotated[
        int | None,
        option("--prefill-chunk", parser=positive, metavar="N", help="prompt tokens of one step at most", panel=MEMORY),
    ] = None,
    queue_limit: Annotated[
        int | None,
        option("--queue-limit", parser=positive, metavar="N", help="requests that may wait", panel=MEMORY),
    ] = None,
    prefix_cache_bytes: Annotated[
        int | None,
        option(
            "--prefix-cache-bytes",
            parser=byte_count,
            metavar="SIZE",
            help="KV memory of each stage for prompts answered before (default: all that is left; 0: none)",
            panel=PREFIXES,
        ),
    ] = None,
    prefix_disk_bytes: Annotated[
        int | None,
        option(
            "--prefix-disk-bytes",
            parser=byte_count,
            metavar="SIZE",
            help="the same on each stage's disk, where it outlives restarts (default: none)",
            panel=PREFIXES,
        ),
    ] = None,
    prefix_dir: Annotated[
        Path | None,
        option(
            "--prefix-dir",
            metavar="DIR",
            help="where on the disk (default: in the user's cache directory)",
            panel=PREFIXES,
        ),
    ] = None,
    vision: Annotated[
        Path | None,
        option(
            "--vision",
            metavar="DIR",
            help="where the vision tower's tensors are, if not beside the text model's",
            panel=PICTURES,
        ),
    ] = None,
    no_vision: Annotated[
        bool, flag("--no-vision", help="take no pictures, and do not load what reads them", panel=PICTURES)
    ] = False,
    fetch_images: Annotated[
        bool,
        flag(
            "--fetch-images",
            help="get pictures from http(s) addresses too (never private ones); else data: URLs only",
            panel=PICTURES,
        ),
    ] = False,
    host: Annotated[
        str,
        option(
            "--host", metavar="HOST", help="address of the API (default 127.0.0.1: this machine only)", panel=NETWORK
        ),
    ] = "127.0.0.1",
    port: Annotated[
        int,
        option("--port", parser=port, metavar="PORT", help=f"port of the API (default {DEFAULT_PORT})", panel=NETWORK),
    ] = DEFAULT_PORT,
    allowed_host: Annotated[
        list[str],
        option(
            "--allowed-host",
            parser=host_name,
            metavar="NAME",
            help="a further name in `Host` and `Origin`, beside loopback's and --host (repeatable; * is any)",
            panel=NETWORK,
        ),
    ] = [],  # noqa: B006 (typer's way to say none)
    no_ui: Annotated[bool, flag("--no-ui", help="no page for browsers at /", panel=NETWORK)] = False,
    strict_api: Annotated[
        bool,
        flag(
            "--strict-api",
            help="refuse fields of a chat request that cannot be honoured, instead of naming them in the answer",
            panel=NETWORK,
        ),
    ] = False,
    cors_origin: Annotated[
        list[str],
        option(
            "--cors-origin",
            parser=origin,
            metavar="URL",
            help="a web page's origin that may call the API from a browser (repeatable; * is any; default: none)",
            panel=NETWORK,
        ),
    ] = [],  # noqa: B006
    api_key_file: Annotated[
        Path | None,
        option(
            "--api-key-file",
            metavar="FILE",
            help="file, mode 600, with the key that clients must send (or EXO_KIMI_API_KEY)",
            panel=NETWORK,
        ),
    ] = None,
    api_key: Annotated[
        str | None,
        option(
            "--api-key",
            parser=key,
            metavar="KEY",
            help="the same in sight of every user of this machine (ps)",
            panel=NETWORK,
        ),
    ] = None,
    key_file: Annotated[
        Path | None,
        option(
            "--key-file",
            metavar="FILE",
            help="cluster key for stages on other machines (or EXO_KIMI_KEY)",
            panel=NETWORK,
        ),
    ] = None,
    link: Annotated[
        Link | None,
        option(
            "--link",
            metavar=one_of(Link),
            help="how hidden states travel: ZeroMQ, or unencrypted over mx.distributed's ring or jaccl (RDMA, unproven) "
            "(default: the plan's, else zmq)",
            panel=NETWORK,
        ),
    ] = None,
    stall_deadline: Annotated[
        float,
        option(
            "--stall-deadline",
            parser=deadline,
            metavar="TIME",
            help="silence of a stage (default 30s)",
            panel=NETWORK,
        ),
    ] = 30.0,
    survive: Annotated[
        float,
        option(
            "--survive",
            parser=seconds,
            metavar="TIME",
            help="how long stages may be away before the answers that they lost end with an error; until then these wait and "
            "go on (default 5min; 0s: an error at once)",
            panel=NETWORK,
        ),
    ] = 300.0,
    speculate: Annotated[
        Any,
        option(
            "--speculate",
            parser=guesses,
            metavar="off|auto|K",
            help="guess tokens from the text so far: where it saves bytes (default), or up to K whenever it repeats",
            panel=SPEED,
        ),
    ] = "auto",
    adapter: Annotated[
        list[str],
        option(
            "--adapter",
            metavar="[NAME=]PATH",
            help="a LoRA or DoRA adapter of this model, for requests that ask for NAME as their model (repeatable)",
            panel=SPLIT,
        ),
    ] = [],  # noqa: B006 (typer's way to say none)
    draft: Annotated[
        Path | None,
        option(
            "--draft",
            metavar="HEAD_DIR",
            help="an EAGLE-3 draft head of this model: it guesses tokens, which the model verifies",
            panel=SPEED,
        ),
    ] = None,
    draft_tokens: Annotated[
        Any,
        option(
            "--draft-tokens",
            parser=draft_tokens,
            metavar="auto|0..6",
            help="guesses of the head in a step: as many as pay (default), or always so many",
            panel=SPEED,
        ),
    ] = "auto",
    log_json: Annotated[bool, flag("--log-json", help=LOG_JSON, panel=OUTPUT)] = False,
) -> None:
    """Serve a checkpoint, split over stages, behind a ChatGPT-compatible API."""
    options: dict[str, Any] = locals()
    from exo_kimi.runtime.transport.api_key import ENVIRONMENT_NAME, find_api_key
    from exo_kimi.serve.launch import ServeOptions, serve

    log_to(as_json=options.pop("log_json"))
    _find_stages_and_weights(options)
    options["api_key"] = find_api_key(
        key_file=options.pop("api_key_file"), option=api_key, environment_text=os.environ.get(ENVIRONMENT_NAME)
    )
    with awake():
        serve(ServeOptions(**options))


def stage(
    listen: Annotated[
        str | None,
        option("--listen", metavar="ADDR", help="HOST:PORT to listen on (once paired: as before, else 0.0.0.0:52500)"),
    ] = None,
    pair: Annotated[
        bool, flag("--pair", help="show a code for `serve --pair CODE` on another machine, then serve it")
    ] = False,
    model: Annotated[
        Path | None,
        option("--model", metavar="DIR", help="the checkpoint here (default: the path the server names)"),
    ] = None,
    key_file: Annotated[
        Path | None,
        option("--key-file", metavar="FILE", help="cluster key; made when there is none (or EXO_KIMI_KEY)"),
    ] = None,
    expert_cache: CacheOption = None,
    expert_policy: PolicyOption = "lru",
    expert_profile: ProfileOption = None,
    expert_prefetch: PrefetchOption = "auto",
    expert_reads: ReadsOption = "auto",
    trace_experts: TraceOption = None,
    draft: Annotated[
        Path | None,
        option("--draft", metavar="HEAD_DIR", help="the draft head here (default: the path the server names)"),
    ] = None,
    log_json: Annotated[bool, flag("--log-json", help=LOG_JSON)] = False,
) -> None:
    """A stage on this machine, for `serve --stage ADDR` on another."""
    from exo_kimi.experts.options import ExpertOptions
    from exo_kimi.pairing.command import announced_stage, stage_place

    experts = ExpertOptions(
        budget_bytes=expert_cache,
        policy=expert_policy,
        prefetch=expert_prefetch,
        reads=expert_reads,
        profile=expert_profile,
    )
    place = stage_place(listen, pair=pair, key_file=key_file)
    log_to(as_json=log_json)
    with announced_stage(place.listen), awake():
        _serve_stage(place, _weights(model), experts, trace_experts, draft)


def chat(
    url: Annotated[
        str, option("--url", metavar="URL", help="the server (default: this machine)")
    ] = f"http://127.0.0.1:{DEFAULT_PORT}",
    model: Annotated[
        str | None,
        option("--model", metavar="ID", help="the model's id (default: the first that the server lists)"),
    ] = None,
    api_key_file: Annotated[
        Path | None,
        option("--api-key-file", metavar="FILE", help="file, mode 600, with the server's key (or EXO_KIMI_API_KEY)"),
    ] = None,
    api_key: Annotated[
        str | None,
        option(
            "--api-key",
            parser=key,
            metavar="KEY",
            help="the same in sight of every user of this machine (ps)",
        ),
    ] = None,
    system: Annotated[str | None, option("--system", metavar="TEXT", help="a system prompt")] = None,
) -> None:
    """A terminal chat against any ChatGPT-compatible server."""
    from exo_kimi.client.terminal import chat
    from exo_kimi.runtime.transport.api_key import ENVIRONMENT_NAME, find_api_key

    found = find_api_key(key_file=api_key_file, option=api_key, environment_text=os.environ.get(ENVIRONMENT_NAME))
    chat(url, model=model, api_key=found, system=system)


def layer(
    directory: Directory,
    index: Annotated[
        Any, argument("N", "layer index, from 0; or `vision`, the tower for pictures", parser=layer_or_tower)
    ],
    tokens: Annotated[
        int, option("--tokens", parser=positive, metavar="N", help="prompt tokens of the run (default 32)")
    ] = 32,
    dtype: Annotated[
        Dtype | None, option("--dtype", metavar=one_of(Dtype), help="of activations (default: as stored)")
    ] = None,
) -> None:
    """Load one layer, run it, report shapes, time and peak memory."""
    from exo_kimi.fetch.directories import weights_directory

    if index == "vision":
        from exo_kimi.runtime.loading.single_tower import run_tower

        print(run_tower(weights_directory(directory), dtype=dtype).to_text())
        return
    from exo_kimi.runtime.loading.single_layer import run_layer

    print(run_layer(weights_directory(directory), index, tokens=tokens, dtype=dtype).to_text())


def plan(
    cluster: Annotated[
        str,
        option("--cluster", metavar="CLUSTER", help='cluster.toml, or a list such as "m3-ultra-512, m2-ultra-192"'),
    ],
    directory: Annotated[
        Path | None, argument("DIR", "a checkpoint, or a model of the hub as ORG/NAME; its headers give the bytes")
    ] = None,
    model: Annotated[
        str | None,
        option("--model", metavar="NAME", help="a published model instead of DIR, before downloading anything"),
    ] = None,
    recipe: Annotated[
        str | None,
        option(
            "--recipe",
            metavar="RECIPE",
            help="bits per module of --model: a name or a TOML file (default: as published)",
        ),
    ] = None,
    context: Annotated[
        int | None,
        option(
            "--context", parser=positive, metavar="N", help="tokens of one sequence (default 40960)", panel=WORKLOAD
        ),
    ] = None,
    concurrency: Annotated[
        int | None,
        option("--concurrency", parser=positive, metavar="N", help="sequences at once (default 1)", panel=WORKLOAD),
    ] = None,
    objective: Annotated[
        Objective,
        option("--objective", metavar=one_of(Objective), help="what is minimised (default request)", panel=WORKLOAD),
    ] = "request",
    prompt_tokens: Annotated[
        int | None,
        option(
            "--prompt-tokens",
            parser=positive,
            metavar="N",
            help="of the request that is timed (default 4096)",
            panel=WORKLOAD,
        ),
    ] = None,
    new_tokens: Annotated[
        int | None,
        option("--new-tokens", parser=positive, metavar="N", help="that it generates (default 512)", panel=WORKLOAD),
    ] = None,
    prefill_chunk: Annotated[
        int | None,
        option(
            "--prefill-chunk",
            parser=positive,
            metavar="N",
            help="prompt tokens of one step, as serve's (default 512)",
            panel=WORKLOAD,
        ),
    ] = None,
    raise_limits: Annotated[
        bool, flag("--raise-limits", help="count on raised wired limits; the sysctl lines are shown")
    ] = False,
    kv_bits: Annotated[
        KvBits | None,
        option("--kv-bits", metavar=one_of(KvBits), help="bits of the KV cache, as serve's (default: 16)"),
    ] = None,
    split: Annotated[
        Sequence[int] | None,
        option("--split", parser=counts, metavar="N,N,...", help="judge this split instead of searching"),
    ] = None,
    force: Annotated[bool, flag("--force", help="take --split even where a machine is over its limit")] = False,
    vision: Annotated[
        Path | None,
        option(
            "--vision", metavar="DIR", help="where the vision tower is, if not in DIR; with it there, it is counted"
        ),
    ] = None,
    no_vision: Annotated[bool, flag("--no-vision", help="count no vision tower: serve text alone")] = False,
    draft: Annotated[
        str | None,
        option(
            "--draft",
            metavar="HEAD_DIR|NAME",
            help="a draft head beside it: its bytes, what it sends, and from which acceptance on it pays",
        ),
    ] = None,
    adapter: Annotated[
        list[Path],
        option("--adapter", metavar="PATH", help="an adapter that is served beside it, counted too (repeatable)"),
    ] = [],  # noqa: B006 (typer's way to say none)
    stream: Annotated[
        bool,
        flag("--stream", help="where layers do not fit, read experts from disk, with the same weights", panel=STREAM),
    ] = False,
    ssd_bytes_per_s: Annotated[
        float | None,
        option(
            "--ssd",
            parser=byte_rate,
            metavar="SPEED",
            help="of the machines' disks, such as 6GB/s (default: measured, or as published of the chip)",
            panel=STREAM,
        ),
    ] = None,
    hits: Annotated[
        Path | None,
        option(
            "--hits",
            metavar="FILE",
            help="hit rates by `trace replay -o FILE` (default: what others have published)",
            panel=STREAM,
        ),
    ] = None,
    explained: Annotated[
        bool, flag("--explain", help="why this split, what binds, and what would change it", panel=OUTPUT)
    ] = False,
    reports: Annotated[
        list[Path],
        option(
            "--report",
            metavar="FILE",
            help="of `compare --json`: a smaller form and what it costs, for --explain and --fit (repeatable)",
        ),
    ] = [],  # noqa: B006 (typer's way to say none)
    fit: Annotated[
        bool, flag("--fit", help="the best quality that fits: as it is, a measured form, or a recipe")
    ] = False,
    output: Annotated[
        Path | None,
        option("-o", "--output", metavar="PLAN.json", help="write the plan, for `serve --plan`", panel=OUTPUT),
    ] = None,
    svg: Annotated[
        Path | None, option("--svg", metavar="FILE", help="write the picture of the plan", panel=OUTPUT)
    ] = None,
) -> None:
    """An exact split over the machines you have, what it takes and how fast it will be."""
    options: dict[str, Any] = {name: value for name, value in locals().items() if name not in ("output", "svg")}
    from exo_kimi.fetch.directories import headers_directory
    from exo_kimi.planner.command import plan_answer

    options["directory"] = None if directory is None else headers_directory(directory, derive=True)
    answer = plan_answer(**options)
    print(answer.text)
    if output:
        write_text(output, answer.plan.to_json(), option="-o")
    if svg:
        write_text(svg, answer.svg, option="--svg")


def machine(
    measured: Annotated[
        bool, flag("--measure", help="measure bandwidth, compute, overhead and disk (a minute)")
    ] = False,
    disk: Annotated[
        Path | None,
        option(
            "--disk",
            metavar="DIR",
            help="with --measure: on the disk that experts would be read from (default: that of temporary files)",
        ),
    ] = None,
    link: Annotated[
        str | None,
        option(
            "--link",
            metavar="HOST:PORT",
            help="measure the network to a machine that runs `exo-kimi bench link-speed --listen`",
        ),
    ] = None,
    output: Annotated[Path | None, option("-o", "--output", metavar="FILE", help="write the profile as TOML")] = None,
) -> None:
    """This machine's profile for `plan`: declared from the chip, or measured."""
    from exo_kimi.planner.machines.local import local_profile
    from exo_kimi.planner.machines.profile_text import profile_answer, profile_toml

    if link:
        _measure_link(link)
        return
    if disk is not None and not (measured and disk.is_dir()):
        raise UsageError("no disk to measure", expected="--measure --disk DIR, a directory", found=disk, where="--disk")
    table = _measure(disk) if measured else local_profile()
    print(profile_answer(table), end="")
    if output:
        write_text(output, profile_toml(table), option="-o")


def doctor(
    directory: Directory,
    fix: Annotated[bool, flag("--fix", help="write what can be derived, with backups; never weights")] = False,
    deep: Annotated[
        bool, flag("--deep", help="also read the weights: NaN, zeros, copies, files that are not the hub's")
    ] = False,
    sha256: Annotated[
        Path | None,
        option("--sha256", metavar="FILE", help="a list as sha256sum writes it to hold the files against (reads them)"),
    ] = None,
    target: Annotated[
        Path | None, option("--target", metavar="DIR", help="of a draft head: the model that it is to be for")
    ] = None,
    json: Annotated[bool, flag("--json", help="one JSON document instead of text")] = False,
) -> int:
    """Everything that is wrong with a checkpoint or a draft head, and a repair of config files."""
    from exo_kimi.checkpoint.drafts.doctor import DoctorOptions, examine_any
    from exo_kimi.fetch.directories import headers_directory, weights_directory

    directory = (weights_directory if deep or fix or sha256 else headers_directory)(directory)
    diagnosis = examine_any(directory, DoctorOptions(fix=fix, deep=deep, sha256=sha256, target=target))
    print(diagnosis.to_json() if json else diagnosis.to_text())
    return 0 if diagnosis.healthy else 1


def bench(
    name: Annotated[Bench, argument("NAME", f"which claim: {', '.join(BENCHES)}")],
    rest: Annotated[list[str], argument("...", "options of that benchmark")] = [],  # noqa: B006
) -> int:
    """Measure a claim: a table, then one JSON line."""
    from importlib import import_module

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # the servers and nodes that it started end with it
    module = "all" if name == "all" else f"claims.{name.replace('-', '_')}"
    return int(import_module(f"exo_kimi.bench.{module}").main(rest) or 0)


def _find_stages_and_weights(options: dict[str, Any]) -> None:
    """Names of stages as addresses, a pairing that was asked for, and a model's name as its directory."""
    from exo_kimi.fetch.directories import ServedPart, served_directory
    from exo_kimi.pairing.command import paired_serve

    paired = paired_serve(options["stage"], options.pop("pair"), key_file=options["key_file"])
    options["stage"], options["key_file"] = paired.stages, paired.key_file
    options["directory"] = served_directory(options["directory"], ServedPart.of(options))


def _serve_stage(place: Any, model: str | None, experts: Any, expert_trace: Path | None, draft: Path | None) -> None:
    _begin_stage()
    from exo_kimi.runtime.stage.process import serve_stage

    serve_stage(
        place.listen,
        model=model,
        key_file=place.key_file,
        environment_key=os.environ.get("EXO_KIMI_KEY"),
        show_key=sys.stdout.isatty(),
        expert_cache=experts.cache().sized(experts.budget_bytes),
        expert_trace=expert_trace,
        draft=draft,
    )


def _begin_stage() -> None:
    """What comes before a stage's imports."""
    from exo_kimi.models.mlx_lm_package import skip_mlx_lm_init
    from exo_kimi.runtime.descriptors import raise_descriptor_limit

    raise_descriptor_limit()
    skip_mlx_lm_init()


def _weights(model: Path | None) -> str | None:
    from exo_kimi.fetch.directories import weights_directory

    return None if model is None else str(weights_directory(model))


def _measure(disk: Path | None) -> Any:
    from tempfile import gettempdir

    from exo_kimi.bench.claims.machine import measure

    return measure(disk or Path(gettempdir()))


def _measure_link(address: str) -> None:
    from exo_kimi.bench.claims.link_speed import main

    main([address])
