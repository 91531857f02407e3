"""Every command and option of the command line, with units and defaults; it knows nothing of what commands do."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from exo_kimi.cli.exo_arguments import add_exo, add_exo_legacy
from exo_kimi.cli.train_arguments import add_eval, add_train
from exo_kimi.cli.values import (
    OBJECTIVES,
    Commands,
    byte_count,
    command,
    counts,
    deadline,
    guesses,
    key,
    port,
    positive,
)

DEFAULT_PORT = 52415
LAYOUTS = ("mlx", "int4", "fp8", "bf16")
BENCHES = (  # modules of exo_kimi.bench, with - for _
    "all",
    "attention",
    "cache-8bit",
    "conformance",
    "exo",
    "kv-b",
    "link_speed",
    "load",
    "pipeline",
    "plan",
    "prefill-memory",
    "prefix-restart",
    "router",
    "speculation",
    "step",
    "turns",
)


def build_parser() -> argparse.ArgumentParser:
    """Every command and option, with the units and defaults that `--help` shows."""
    parser = argparse.ArgumentParser(
        prog="exo-kimi",
        description="Moonshot's Kimi K2 on the Macs you own: exact splits, strict loading, an honest server.",
    )
    parser.add_argument(
        "--version", action=_Version, nargs=0, default=argparse.SUPPRESS, help="print the version and exit"
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_demo(commands)
    _add_tiny(commands)
    _add_inspect(commands)
    _add_serve(commands)
    _add_stage(commands)
    _add_chat(commands)
    _add_layer(commands)
    _add_plan(commands)
    _add_machine(commands)
    _add_doctor(commands)
    _add_bench(commands)
    add_train(commands)
    add_eval(commands)
    add_exo(commands)
    add_exo_legacy(commands)
    return parser


def _add_demo(commands: Commands) -> None:
    parser = command(
        commands, "demo", "the tiny trained model, two local stages, a chat with a tool, then an open server"
    )
    parser.add_argument("--stages", type=positive, default=2, help="stage processes (default 2)")
    parser.add_argument("--host", default="127.0.0.1", help="address of the API (default 127.0.0.1)")
    parser.add_argument("--port", type=port, default=DEFAULT_PORT, help=f"port of the API (default {DEFAULT_PORT})")
    parser.add_argument("--once", action="store_true", help="stop after the chat instead of serving on")


def _add_tiny(commands: Commands) -> None:
    parser = command(commands, "tiny", "write a small random Kimi K2 in a published on-disk format")
    parser.add_argument("directory", type=Path, metavar="DIR", help="a new or empty directory")
    parser.add_argument("--layout", choices=LAYOUTS, default="mlx", help="weight layout (default mlx)")
    parser.add_argument("--recipe", help="bits per module of the mlx layout (default mixed346)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the weights (default 0)")
    parser.add_argument("--absorbed", action="store_true", help="write embed_q and unembed_out instead of kv_b_proj")
    parser.add_argument("--prefix", action="store_true", help="write keys under language_model., as K2.5 and later")
    parser.add_argument("--shards", type=positive, default=2, help="safetensors files (default 2; 1 writes no index)")


def _add_inspect(commands: Commands) -> None:
    parser = command(commands, "inspect", "what a checkpoint holds: architecture, bytes, bits, problems")
    parser.add_argument("directory", type=Path, metavar="DIR")
    parser.add_argument("--json", action="store_true", help="one JSON document instead of text")


def _add_serve(commands: Commands) -> None:
    parser = command(commands, "serve", "serve a checkpoint, split over stages, behind a ChatGPT-compatible API")
    parser.add_argument("directory", type=Path, metavar="DIR")
    parser.add_argument(
        "--split", metavar="N,N,...", help="layers per stage, such as 44,17 (default: balanced by bytes)"
    )
    parser.add_argument("--plan", type=Path, metavar="PLAN.json", help="the split of an `exo-kimi plan` file")
    parser.add_argument("--stages", type=positive, help="number of stages (default 2, or one local and every --stage)")
    parser.add_argument(
        "--stage",
        action="append",
        default=[],
        metavar="ADDR",
        help="a running `exo-kimi stage`; repeat for more, last layers last",
    )
    parser.add_argument("--host", default="127.0.0.1", help="address of the API (default 127.0.0.1: this machine only)")
    parser.add_argument("--port", type=port, default=DEFAULT_PORT, help=f"port of the API (default {DEFAULT_PORT})")
    parser.add_argument(
        "--api-key",
        type=key,
        default=os.environ.get("EXO_KIMI_API_KEY") or None,
        help="required of clients (or EXO_KIMI_API_KEY)",
    )
    parser.add_argument(
        "--context", type=positive, metavar="N", help="tokens of one request at most (default: the model's)"
    )
    parser.add_argument("--model-id", help="the model's name in the API (default: the directory's name)")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="of activations and KV (default: as stored)"
    )
    parser.add_argument(
        "--kv-bytes", type=byte_count, metavar="SIZE", help="KV memory of each stage (default: what is free)"
    )
    parser.add_argument("--kv-bits", type=int, choices=(8,), help="bits of the KV cache (default: those of the dtype)")
    parser.add_argument("--prefill-chunk", type=positive, metavar="N", help="prompt tokens of one step at most")
    parser.add_argument(
        "--prefix-cache-bytes",
        type=byte_count,
        metavar="SIZE",
        help="KV memory of each stage for prompts answered before (default: all that is left; 0: none)",
    )
    parser.add_argument(
        "--prefix-disk-bytes",
        type=byte_count,
        metavar="SIZE",
        help="the same on each stage's disk, where it outlives restarts (default: none)",
    )
    parser.add_argument(
        "--prefix-dir", type=Path, metavar="DIR", help="where on the disk (default: in the user's cache directory)"
    )
    parser.add_argument("--queue-limit", type=positive, metavar="N", help="requests that may wait")
    parser.add_argument(
        "--speculate",
        type=guesses,
        default="auto",
        metavar="off|auto|K",
        help="guess tokens from the text so far: where it saves bytes (default), or up to K whenever it repeats",
    )
    parser.add_argument(
        "--link",
        choices=("zmq", "ring", "jaccl"),
        help="how hidden states travel: ZeroMQ, or unencrypted over mx.distributed's ring or jaccl (RDMA, unproven) "
        "(default: the plan's, else zmq)",
    )
    parser.add_argument(
        "--stall-deadline", type=deadline, default=30.0, metavar="TIME", help="silence of a stage (default 30s)"
    )
    parser.add_argument("--key-file", type=Path, help="cluster key for stages on other machines (or EXO_KIMI_KEY)")


def _add_stage(commands: Commands) -> None:
    parser = command(commands, "stage", "a stage on this machine, for `serve --stage ADDR` on another")
    parser.add_argument("--listen", required=True, metavar="ADDR", help="HOST:PORT to listen on")
    parser.add_argument(
        "--model", type=Path, metavar="DIR", help="the checkpoint here (default: the path the server names)"
    )
    parser.add_argument("--key-file", type=Path, help="cluster key; made when there is none (or EXO_KIMI_KEY)")


def _add_chat(commands: Commands) -> None:
    parser = command(commands, "chat", "a terminal chat against any ChatGPT-compatible server")
    parser.add_argument("--url", default=f"http://127.0.0.1:{DEFAULT_PORT}", help="the server (default: this machine)")
    parser.add_argument("--model", help="the model's id (default: the first that the server lists)")
    parser.add_argument(
        "--api-key",
        type=key,
        default=os.environ.get("EXO_KIMI_API_KEY") or None,
        help="the server's key (or EXO_KIMI_API_KEY)",
    )
    parser.add_argument("--system", help="a system prompt")


def _add_layer(commands: Commands) -> None:
    parser = command(commands, "layer", "load one layer, run it, report shapes, time and peak memory")
    parser.add_argument("directory", type=Path, metavar="DIR")
    parser.add_argument("layer", type=int, metavar="N", help="layer index, from 0")
    parser.add_argument("--tokens", type=positive, default=32, help="prompt tokens of the run (default 32)")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="of activations (default: as stored)"
    )


def _add_plan(commands: Commands) -> None:
    parser = command(
        commands, "plan", "an exact split over the machines you have, what it takes and how fast it will be"
    )
    parser.add_argument(
        "directory", type=Path, metavar="DIR", nargs="?", help="a checkpoint; its headers give the bytes"
    )
    parser.add_argument("--model", help="a published model instead of DIR, before downloading anything")
    parser.add_argument("--recipe", help="bits per module of --model: a name or a TOML file (default: as published)")
    parser.add_argument("--cluster", required=True, help='cluster.toml, or a list such as "m3-ultra-512, m2-ultra-192"')
    parser.add_argument("--context", type=positive, metavar="N", help="tokens of one sequence (default 40960)")
    parser.add_argument("--concurrency", type=positive, metavar="N", help="sequences at once (default 1)")
    parser.add_argument(
        "--objective", choices=OBJECTIVES, default="request", help="what is minimised (default request)"
    )
    parser.add_argument(
        "--prompt-tokens", type=positive, metavar="N", help="of the request that is timed (default 4096)"
    )
    parser.add_argument("--new-tokens", type=positive, metavar="N", help="that it generates (default 512)")
    parser.add_argument(
        "--raise-limits", action="store_true", help="count on raised wired limits; the sysctl lines are shown"
    )
    parser.add_argument("--kv-bits", type=int, choices=(8,), help="bits of the KV cache, as serve's (default: 16)")
    parser.add_argument("--split", type=counts, metavar="N,N,...", help="judge this split instead of searching")
    parser.add_argument(
        "--explain", dest="explained", action="store_true", help="why this split, what binds, and what would change it"
    )
    parser.add_argument("-o", "--output", type=Path, metavar="PLAN.json", help="write the plan, for `serve --plan`")
    parser.add_argument("--svg", type=Path, metavar="FILE", help="write the picture of the plan")


def _add_machine(commands: Commands) -> None:
    parser = command(commands, "machine", "this machine's profile for `plan`: declared from the chip, or measured")
    parser.add_argument("--measure", action="store_true", help="measure bandwidth, compute and overhead (a minute)")
    parser.add_argument(
        "--link",
        metavar="HOST:PORT",
        help="measure the network to a machine that runs `exo-kimi bench link_speed --listen`",
    )
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="write the profile as TOML")


def _add_doctor(commands: Commands) -> None:
    parser = command(
        commands, "doctor", "everything that is wrong with a checkpoint directory, and a repair of config files"
    )
    parser.add_argument("directory", type=Path, metavar="DIR")
    parser.add_argument("--fix", action="store_true", help="write what can be derived, with backups; never weights")
    parser.add_argument("--deep", action="store_true", help="also read the weights and look for NaN and infinity")
    parser.add_argument("--json", action="store_true", help="one JSON document instead of text")


def _add_bench(commands: Commands) -> None:
    parser = command(commands, "bench", "measure a claim: a table, then one JSON line")
    parser.add_argument("name", choices=BENCHES, help="which claim")
    parser.add_argument("rest", nargs=argparse.REMAINDER, metavar="...", help="options of that benchmark")


class _Version(argparse.Action):
    """Prints the version only when asked, so that the package metadata is not read at every start."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        import exo_kimi

        print(f"exo-kimi {exo_kimi.__version__}")
        parser.exit()
