"""Starts our server and its peer, `mlx_lm.server`, on one checkpoint; the peer on a copy that it can read.

The peer's tokenizer code wants a `tokenizer.json`, which Kimi's checkpoints do not have, so the copy gets one with the same
tokens, merges, split pattern and control tokens. Weights are links.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import httpx

from exo_kimi.chat.tokenizer import SPLIT_PATTERN, KimiTokenizer
from exo_kimi.errors import UsageError

START_S = 90.0
STOP_S = 15.0


@contextlib.contextmanager
def peer_server(checkpoint: Path) -> Iterator[str]:
    """The base URL of an `mlx_lm.server` on a checkpoint, in a process that ends with the context.

    Args:
        checkpoint: a directory in mlx layout.

    Raises:
        UsageError: it did not start.
    """
    with tempfile.TemporaryDirectory(prefix="peer-") as temporary:
        root = Path(temporary)
        copy = copy_for_peer(checkpoint, root / checkpoint.name)
        (root / "home" / "hub").mkdir(parents=True)  # the peer's /v1/models fails when there is no such folder
        environment = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(root / "home")}
        with _server(["mlx_lm", "server", "--model", str(copy)], environment) as url:
            yield url


@contextlib.contextmanager
def our_server(checkpoint: Path, *options: str) -> Iterator[str]:
    """The base URL of `exo-kimi serve` on a checkpoint, with two stages.

    Args:
        checkpoint: a directory.
        options: more of `exo-kimi serve`.

    Raises:
        UsageError: it did not start.
    """
    with _server(["exo_kimi", "serve", str(checkpoint), "--dtype", "float32", *options], {}) as url:
        yield url


@contextlib.contextmanager
def _server(arguments: list[str], environment: dict[str, str]) -> Iterator[str]:
    port = _free_port()
    command = [sys.executable, "-m", *arguments, "--port", str(port)]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env={**os.environ, **environment}
        )
        try:
            url = f"http://127.0.0.1:{port}"
            _wait(url, process, log, arguments[0])
            yield url
        finally:
            process.terminate()
            try:
                process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def copy_for_peer(checkpoint: Path, target: Path) -> Path:
    """A directory with links to the weights, and tokenizer files that transformers reads without code of the checkpoint."""
    target.mkdir(parents=True)
    for file in checkpoint.iterdir():
        if file.suffix == ".safetensors":
            (target / file.name).symlink_to(file.resolve())
        elif file.suffix in (".json", ".jinja"):
            shutil.copyfile(file, target / file.name)
    _rewrite(target / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
    # The name of the same architecture that transformers knows; without it the peer's tokenizer does not load.
    _rewrite(target / "config.json", model_type="deepseek_v3")
    tokenizer = KimiTokenizer.from_directory(checkpoint)
    (target / "tokenizer.json").write_text(json.dumps(tokenizer_json(tokenizer)), encoding="utf-8")
    return target


def tokenizer_json(tokenizer: KimiTokenizer) -> dict[str, Any]:
    """Our tokenizer in the format of the `tokenizers` library: byte-level BPE whose merges are ordered by rank."""
    letters = _byte_letters()

    def spelled(token: bytes) -> str:
        return "".join(letters[byte] for byte in token)

    ordinary = [tokenizer.token_bytes(rank) for rank in range(tokenizer.vocab_size - len(tokenizer.special))]
    known = set(ordinary)
    rank_of = {token: rank for rank, token in enumerate(ordinary)}
    merges: list[tuple[str, str]] = []
    for token in ordinary:
        cuts = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
        pairs = [(left, right) for left, right in cuts if left in known and right in known]
        pairs.sort(key=lambda pair: (rank_of[pair[0]], rank_of[pair[1]]))
        merges += [(spelled(left), spelled(right)) for left, right in pairs]
    added = [
        {
            "id": token_id,
            "content": name,
            "special": True,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
        }
        for name, token_id in sorted(tokenizer.special.items(), key=lambda item: item[1])
    ]
    split = {"type": "Split", "pattern": {"Regex": SPLIT_PATTERN}, "behavior": "Isolated", "invert": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {
        "version": "1.0",
        "added_tokens": added,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "ignore_merges": True,
            "vocab": {spelled(token): rank for rank, token in enumerate(ordinary)},
            "merges": merges,
        },
    }


def _rewrite(path: Path, **values: str) -> None:
    config = json.loads(path.read_text(encoding="utf-8"))
    config.pop("auto_map", None)
    path.write_text(json.dumps({**config, **values}), encoding="utf-8")


def _byte_letters() -> list[str]:
    """The printable letter that byte-level BPE writes for each byte. Source: GPT-2's `bytes_to_unicode`."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _wait(url: str, process: subprocess.Popen[bytes], log: IO[bytes], name: str) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(f"{url}/health", timeout=5, trust_env=False).status_code == 200:
                return
        time.sleep(0.2)
    log.seek(0)
    tail = log.read().decode("utf-8", errors="replace")[-2000:]
    raise UsageError(f"{name} did not start", found=tail)
