"""Checkpoints and their slow oracles for the tests on legacy exo: what one process answers, greedily, in fp32."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx

from exo_kimi.chat.template import ChatTemplate
from exo_kimi.chat.tokenizer import KimiTokenizer
from exo_kimi.runtime.loading.loader import load

LLAMA_CARD, LLAMA_REPO = "llama-3.2-1b", "mlx-community--Llama-3.2-1B-Instruct-4bit"
_WORDS = "the sea is deep and blue under a sky of grey stones where birds sing and ships sleep until morning".split()


def kimi_reply(directory: Path, prompt: str, tokens: int) -> list[int]:
    """Greedy tokens of one process with all layers, to the first stop id; the whole prompt in one pass."""
    tokenizer = KimiTokenizer.from_directory(directory)
    template = ChatTemplate.from_directory(directory, tokenizer)
    return greedy(directory, template.render([{"role": "user", "content": prompt}]).ids, tokens)


def greedy(directory: Path, ids: list[int], tokens: int) -> list[int]:
    """The same, of a prompt's ids."""
    tokenizer, model = KimiTokenizer.from_directory(directory), load(directory)
    caches = model.make_cache()
    x = mx.array(ids)
    found: list[int] = []
    while len(found) < tokens:
        logits = model.logits(model.forward_ragged(x, [(x.shape[0], caches)])[-1:])
        found.append(int(mx.argmax(logits[0]).item()))
        if found[-1] in tokenizer.stop_ids:
            break
        x = mx.array(found[-1:])
    return found


def ending(source: Path, target: Path, token: int) -> Path:
    """A copy that says end of turn where the source says `token`: the two rows of its head are swapped."""
    from safetensors.numpy import load_file, save_file

    shutil.copytree(source, target)
    end = KimiTokenizer.from_directory(source).special["<|im_end|>"]
    index = json.loads((target / "model.safetensors.index.json").read_text())["weight_map"]
    for file in {file for name, file in index.items() if name.startswith("lm_head.")}:
        tensors = load_file(target / file)
        for name in (name for name in tensors if name.startswith("lm_head.")):
            tensors[name][[end, token]] = tensors[name][[token, end]]
        (target / file).unlink()
        save_file(tensors, target / file, metadata={"format": "mlx"})
    return target


def make_llama(directory: Path) -> Path:
    """A tiny random Llama of 16 layers with a tokenizer of a few words, as Hugging Face would store it."""
    from mlx_lm.models.llama import Model, ModelArgs
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    directory.mkdir(parents=True)
    vocabulary = {word: number for number, word in enumerate(["<unk>", "<end>", *dict.fromkeys(_WORDS)])}
    vocabulary |= {f"w{number}": number for number in range(len(vocabulary), 128)}
    config: dict[str, Any] = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 64,
        "num_hidden_layers": 16,
        "intermediate_size": 128,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-5,
        "vocab_size": 128,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "eos_token_id": 1,
    }
    (directory / "config.json").write_text(json.dumps(config))
    mx.random.seed(7)
    model = Model(ModelArgs.from_dict(config))
    weights = {name: mx.random.normal(value.shape) * 0.2 for name, value in _flat(model)}
    mx.save_safetensors(str(directory / "model.safetensors"), weights, metadata={"format": "mlx"})
    index = {"metadata": {}, "weight_map": dict.fromkeys(weights, "model.safetensors")}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", eos_token="<end>")
    fast.chat_template = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
    fast.save_pretrained(str(directory))
    return directory


def llama_reply(directory: Path, prompt: str, tokens: int) -> list[int]:
    """Greedy tokens of mlx-lm itself."""
    from mlx_lm.models.cache import make_prompt_cache
    from mlx_lm.utils import load_model
    from transformers import AutoTokenizer

    model = load_model(directory)[0]
    tokenizer = AutoTokenizer.from_pretrained(str(directory))
    text = tokenizer.apply_chat_template([{"role": "user", "content": prompt}], tokenize=False)
    cache, x, found = make_prompt_cache(model), mx.array([tokenizer.encode(text)]), []
    while len(found) < tokens:
        found.append(int(mx.argmax(model(x, cache=cache)[0, -1]).item()))
        if found[-1] == 1:
            break
        x = mx.array([found[-1:]])
    return found


def give_to_exo(llama: Path, home: Path) -> None:
    """As if exo had downloaded it on a node: its files, and the answers that it remembers from the model's repository."""
    shutil.copytree(llama, home / "exo" / "downloads" / LLAMA_REPO)
    remembered = home / "tmp" / "exo"
    (remembered / LLAMA_REPO).mkdir(parents=True)
    shutil.copy(llama / "model.safetensors.index.json", remembered / LLAMA_REPO)
    files = [{"path": path.name, "size": path.stat().st_size} for path in sorted(llama.iterdir())]
    (remembered / f"{LLAMA_REPO}--main--file_list.json").write_text(json.dumps(files))


def _flat(model: Any) -> list[tuple[str, Any]]:
    from mlx.utils import tree_flatten

    return list(tree_flatten(model.parameters()))
