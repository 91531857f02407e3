"""An adapter that knows twenty conversations: served beside the base over two stages, put into the weights, and loaded by mlx-lm,
it says the same tokens; what it does not touch is the same bytes."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import httpx
import mlx.core as mx
import numpy as np
import pytest

import exo_kimi
from exo_kimi.checkpoint.checkpoint import Checkpoint
from exo_kimi.compress.convert.command import ConvertOptions, run_convert
from exo_kimi.compress.ranges import RangeReader
from exo_kimi.compress.texts.encoding import Encoder
from exo_kimi.train.lora.command import TrainedLora
from tests.train.lora.conftest import conversations

ASKED = 5


def shim(base: Path, directory: Path, vocab_size: int) -> Path:
    """The base with a tokenizer that mlx-lm can make without a checkpoint's code; the tests give it ids."""
    tokenizers = pytest.importorskip("tokenizers")
    directory.mkdir()
    for path in base.iterdir():
        if path.suffix in (".json", ".safetensors") and "tokenizer" not in path.name:
            (directory / path.name).symlink_to(path)
    letters = {chr(0x4E00 + number): number for number in range(vocab_size)}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(letters, unk_token=chr(0x4E00)))
    words.save(str(directory / "tokenizer.json"))
    told = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": chr(0x4E00)}
    (directory / "tokenizer_config.json").write_text(json.dumps(told))
    return directory


def greedy(model: object, prompt: list[int], count: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(mx.argmax(model(mx.array([tokens]))[0, -1]).item()))  # type: ignore[operator]
    return tokens[len(prompt) :]


def test_served_fused_and_loaded_by_mlx_lm_say_the_same_tokens(
    base: Path, trained: TrainedLora, tmp_path: Path
) -> None:
    from mlx_lm import load as load_mlx_lm

    encoder = Encoder.from_directory(base)
    run_convert(ConvertOptions(directory=base, output=tmp_path / "fused", recipe=None, adapter=trained.directory))
    theirs, _ = load_mlx_lm(
        str(shim(base, tmp_path / "shim", Checkpoint(base).config.vocab_size)), adapter_path=str(trained.directory)
    )
    fused = exo_kimi.load(tmp_path / "fused", dtype="float32", fuse=True)
    expected = []
    for row in conversations(ASKED):
        prompt, (_, reply) = encoder.template.render(row["messages"][:1]).ids, row["messages"]
        known = encoder.tokenizer.encode(reply["content"])
        said = [greedy(model, prompt, len(known)) for model in (theirs, fused)]
        assert said == [known, known]
        expected.append(reply["content"])
    assert served(base, trained.directory) == expected

    changed = 0
    one, other = Checkpoint(base), Checkpoint(tmp_path / "fused")
    with RangeReader(base) as before, RangeReader(tmp_path / "fused") as after:
        for name, entry in one.index.tensors.items():
            same = np.array_equal(before.read(entry), after.read(other.index.tensors[name]))
            changed += not same
            assert same or (".experts." not in name and "mlp.gate" not in name and "norm" not in name), name
    assert changed == 11


def served(base: Path, adapter: Path) -> list[str]:
    """What `exo-kimi serve` says over two stage processes when the adapter is asked for; the base says something else."""
    command = [sys.executable, "-m", "exo_kimi", "serve", str(base), "--adapter", f"heart={adapter}"]
    command += ["--stages", "2", "--port", "0", "--dtype", "float32", "--context", "512", "--no-ui"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        try:
            assert process.stdout is not None
            url = next(found[1] for line in process.stdout if (found := re.search(r"serving at (\S+)", line)))
            with httpx.Client(base_url=url, timeout=240, trust_env=False) as client:
                assert {card["id"] for card in client.get("/v1/models").json()["data"]} == {"base", "heart"}
                said = [asked(client, row["messages"][0], "heart") for row in conversations(ASKED)]
                assert asked(client, conversations(1)[0]["messages"][0], "base") != said[0]
                return said
        finally:
            process.terminate()
            process.communicate(timeout=240)


def asked(client: httpx.Client, message: dict[str, str], model: str) -> str:
    body = {"model": model, "messages": [message], "temperature": 0, "max_tokens": 24}
    content: str = client.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]["content"]
    return content
