"""On the real exo, two nodes on loopback, with our engine inside its runners (`exo-kimi exo run`).

How to run (Linux; about four minutes):

    EXO_SRC=CHECKOUT EXO_PYTHON=VENV/bin/python python -m pytest tests/plugin/runner/test_real_exo.py -m exo

EXO_SRC and EXO_PYTHON as in control/test_real_exo.py. EXO_PYTHON also needs pyzmq and llguidance, in its own environment or in a
folder that EXO_PYTHONPATH names. Nodes bind our names through the stand-in's NODE_PLUGIN, as `launch.run` does.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import exo_kimi
from exo_kimi.checkpoint.checkpoint import Checkpoint
from exo_kimi.checkpoint.index import open_index
from exo_kimi.checkpoint.manifest import resolve
from exo_kimi.checkpoint.tiny.make import make_tiny
from exo_kimi.compress.convert.conversion import make_conversion
from exo_kimi.compress.convert.run import convert
from exo_kimi.compress.prune.plan import everything
from exo_kimi.compress.prune.prune import write_pruned
from exo_kimi.dialogue.speaker import Speaker
from exo_kimi.errors import ExoLoadError
from exo_kimi.experts.layout import layouts_of
from exo_kimi.planner.weights.recipes import load_recipe
from exo_kimi.plugin.control.apply import Applied, apply_plan
from exo_kimi.plugin.control.http import ExoClient
from exo_kimi.plugin.control.plan import exo_plan
from exo_kimi.plugin.control.prepare import prepare
from exo_kimi.plugin.control.watch import Deadlines
from tests.plugin.seeing import picture, text_about

pytestmark = [pytest.mark.exo, pytest.mark.timeout(600)]

MODEL, CALLER, BROKEN, SEEING, LLAMA, PRUNED, CONVERTED = (
    "lab/kimi-k2-tiny",
    "lab/kimi-k2-caller",
    "lab/kimi-k2-broken",
    "lab/kimi-k2-seeing",
    "lab/llama-tiny",
    "lab/kimi-k2-pruned",
    "lab/kimi-k2-converted",
)
PROMPTS = ("Tell me about the sea.", "How many layers has a cake?", "今天天气怎么样?")
LONG = "river"  # what the tiny Kimi answers to this is long
TOKENS = 24
TRAINED = Path(exo_kimi.__file__).parent / "data" / "tiny-kimi-k2"
DEADLINES = Deadlines(poll_s=0.3, connect_s=150.0, quiet_s=180.0)
LOST = "model.layers.6.self_attn.o_proj.weight"
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "strict": True,
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "enum": ["Oslo"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}


@pytest.fixture(scope="module")
def smaller(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What `prune` and `convert` made of the tiny Kimi, by exo's name: layers with 6 to 16 experts, and other bits."""
    root, checkpoint = tmp_path_factory.mktemp("smaller"), Checkpoint(tiny)
    full = everything(checkpoint.config)
    kept = {layer: ids[: 6 + 2 * (layer % 6)] for layer, ids in full.kept.items()}
    write_pruned(checkpoint, replace(full, kept=kept), root / "pruned")
    convert(make_conversion(checkpoint, root / "converted", load_recipe("uniform-4")))
    return {PRUNED: root / "pruned", CONVERTED: root / "converted"}


@pytest.fixture(scope="module")
def models(tiny: Path, smaller: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Kimi, smaller ones of it, one that makes a tool call, one that lacks a tensor, and a tiny Llama."""
    folder = tmp_path_factory.mktemp("models")
    prepare(tiny, folder, model_id=MODEL)
    for name, directory in smaller.items():
        prepare(directory, folder, model_id=name)
    caller = make_tiny(tmp_path_factory.mktemp("caller") / "kimi", layout="bf16", dtype="F32")
    teach_a_call(caller)
    prepare(caller, folder, model_id=CALLER)
    seeing = make_tiny(
        tmp_path_factory.mktemp("seeing") / "kimi", layout="bf16", dtype="F32", vision=True, template="k25"
    )
    prepare(seeing, folder, model_id=SEEING)
    prepare(tiny, folder, model_id=BROKEN)
    lose_a_tensor(folder / BROKEN.replace("/", "--"))
    return folder


@pytest.fixture(scope="module")
def cluster(exo_head: Any, real_exo: Any, models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Two nodes with our engine."""
    if isinstance(exo_head, str) or (reason := exo_head.cannot_import_us()):
        pytest.skip(exo_head if isinstance(exo_head, str) else reason)
    root = tmp_path_factory.mktemp("exo")
    write_llama(models / LLAMA.replace("/", "--"))
    extra = {"EXO_KIMI_PREFIX_CACHE_BYTES": "0"}  # so that what ended holds no memory, which is looked at
    with real_exo.exo_cluster(exo_head, root, models, plugin=real_exo.BIND_US, extra=extra) as running:
        yield running


@pytest.fixture
def client(cluster: Any) -> Iterator[ExoClient]:
    with ExoClient(cluster.url) as opened:
        yield opened


@pytest.fixture(scope="module")
def alone(tiny: Path, exo_shapes: Any) -> dict[str, str]:
    """What the model answers in one process, without exo, by prompt."""
    return {prompt: exo_shapes.greedy_text(tiny, prompt, TOKENS) for prompt in PROMPTS}


def place(client: ExoClient, directory: Path, model: str, split: tuple[int, ...]) -> Applied:
    """Plan a split for the cluster as it is, place it, wait for an answer."""
    plan = exo_plan(client.state(), directory, model_id=model, context=4096, split=split, our_engine=True).plan
    return apply_plan(client, plan, model_id=model, replace=True, our_engine=True, deadlines=DEADLINES)


def ask(url: str, prompt: str, *, model: str = MODEL, tokens: int = TOKENS, **options: Any) -> dict[str, Any]:
    body = {"model": model, "messages": [{"role": "user", "content": prompt}], "max_tokens": tokens, "temperature": 0}
    reply = httpx.post(f"{url}/v1/chat/completions", json=body | options, timeout=120, trust_env=False)
    return dict(reply.json())


def text_of(reply: dict[str, Any]) -> str:
    return str(reply["choices"][0]["message"]["content"])


def stream(url: str, prompt: str, *, tokens: int, stop_after: int | None = None) -> list[dict[str, Any]]:
    """The chunks of a streamed answer; the connection is closed after `stop_after` of them."""
    body = {"model": MODEL, "messages": [{"role": "user", "content": prompt}], "max_tokens": tokens, "temperature": 0}
    chunks: list[dict[str, Any]] = []
    url = f"{url}/v1/chat/completions"
    with httpx.stream("POST", url, json=body | {"stream": True}, timeout=120, trust_env=False) as reply:
        for line in reply.iter_lines():
            if line.startswith("data: {"):
                chunks.append(json.loads(line.removeprefix("data: ")))
            if len(chunks) == stop_after:
                break
    return chunks


def streamed_text(chunks: list[dict[str, Any]]) -> str:
    return "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks)


def ranks_in_logs(cluster: Any) -> set[str]:
    """What the runners said they hold, such as `0 of 2: layers 0:5`."""
    return {found for node in cluster.nodes for found in re.findall(r"rank (\d of 2: layers \d:\d)", _log(node))}


def held(node: Any) -> list[str]:
    """What all ranks together held, whenever the heartbeats told of a change, such as `1 sequences, 1146880 bytes`."""
    return re.findall(r"the ranks hold (.*?) of caches", _log(node))


@pytest.mark.parametrize("split", [(5, 2), (2, 5)])
def test_a_split_answers_as_one_process_does(
    cluster: Any, client: ExoClient, tiny: Path, alone: dict[str, str], split: tuple[int, int]
) -> None:
    place(client, tiny, MODEL, split)
    assert {prompt: text_of(ask(cluster.url, prompt)) for prompt in PROMPTS} == alone
    cut = split[0]
    assert {f"0 of 2: layers 0:{cut}", f"1 of 2: layers {cut}:7"} <= ranks_in_logs(cluster)


def test_nodes_that_read_experts_from_disk_answer_the_same(
    exo_head: Any, real_exo: Any, models: Path, tiny: Path, alone: dict[str, str], tmp_path: Path
) -> None:
    """Both nodes with slots for a part of their experts, and memory to read ahead into."""
    if isinstance(exo_head, str) or (reason := exo_head.cannot_import_us()):
        pytest.skip(exo_head if isinstance(exo_head, str) else reason)
    layouts = layouts_of(resolve(open_index(tiny)).sources, floats=None)
    each_bytes = max(layout.slot_bytes for layout in layouts.values())
    extra = {
        "EXO_KIMI_EXPERT_CACHE": str(5 * 3 * each_bytes),
        "EXO_KIMI_EXPERT_PREFETCH": "on",
        "EXO_KIMI_EXPERT_READS": "direct",
    }
    with (
        real_exo.exo_cluster(exo_head, tmp_path, models, plugin=real_exo.BIND_US, extra=extra) as running,
        ExoClient(running.url) as client,
    ):
        place(client, tiny, MODEL, (5, 2))
        assert {prompt: text_of(ask(running.url, prompt)) for prompt in PROMPTS} == alone
        assert all("have a slot, the others are read" in _log(node) for node in running.nodes)


def test_a_draft_head_beside_the_last_rank_answers_the_same(
    exo_head: Any, real_exo: Any, exo_shapes: Any, tmp_path: Path
) -> None:
    """The trained tiny Kimi with its head, by EXO_KIMI_DRAFT on both nodes: the tokens are those without, in far fewer steps."""
    if isinstance(exo_head, str) or (reason := exo_head.cannot_import_us()):
        pytest.skip(exo_head if isinstance(exo_head, str) else reason)
    (tmp_path / "models").mkdir()
    prepare(TRAINED, tmp_path / "models", model_id=MODEL)
    question = "What is 17 + 25?"
    expected = exo_shapes.greedy_text(TRAINED, question, 64)
    extra = {"EXO_KIMI_DRAFT": str(TRAINED.with_name("tiny-kimi-k2-draft")), "EXO_KIMI_DRAFT_TOKENS": "3"}
    with (
        real_exo.exo_cluster(exo_head, tmp_path, tmp_path / "models", plugin=real_exo.BIND_US, extra=extra) as running,
        ExoClient(running.url) as client,
    ):
        layers = Checkpoint(TRAINED).config.num_hidden_layers
        place(client, TRAINED, MODEL, (layers - 2, 2))
        reply = ask(running.url, question, tokens=64)
        assert text_of(reply) == expected.rpartition("</think>")[2]
        details = reply["usage"]["completion_tokens_details"]
        accepted, generated = details["accepted_prediction_tokens"], reply["usage"]["completion_tokens"]
        assert accepted >= generated // 2, (details, reply)
        assert any("draft head" in _log(node) for node in running.nodes)


@pytest.mark.parametrize(("model", "split"), [(PRUNED, (5, 2)), (PRUNED, (7,)), (CONVERTED, (2, 5))])
def test_pruned_and_converted_directories_answer_as_one_process_does(
    cluster: Any, client: ExoClient, smaller: dict[str, Path], exo_shapes: Any, model: str, split: tuple[int, ...]
) -> None:
    place(client, smaller[model], model, split)
    found = {prompt: text_of(ask(cluster.url, prompt, model=model)) for prompt in PROMPTS}
    assert found == {prompt: exo_shapes.greedy_text(smaller[model], prompt, TOKENS) for prompt in PROMPTS}


def test_one_node_with_all_layers_answers_the_same(
    cluster: Any, client: ExoClient, tiny: Path, alone: dict[str, str]
) -> None:
    place(client, tiny, MODEL, (7,))
    assert text_of(ask(cluster.url, PROMPTS[0])) == alone[PROMPTS[0]]


def test_two_streams_at_once_answer_as_each_alone(
    cluster: Any, client: ExoClient, tiny: Path, alone: dict[str, str]
) -> None:
    place(client, tiny, MODEL, (5, 2))
    found: dict[str, tuple[float, float, str]] = {}

    def run(prompt: str) -> None:
        begun = time.monotonic()
        chunks = stream(cluster.url, prompt, tokens=TOKENS)
        found[prompt] = (begun, time.monotonic(), streamed_text(chunks))

    threads = [threading.Thread(target=run, args=(prompt,)) for prompt in PROMPTS[:2]]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert {prompt: text for prompt, (_, _, text) in found.items()} == {prompt: alone[prompt] for prompt in PROMPTS[:2]}
    assert max(begun for begun, _, _ in found.values()) < min(end for _, end, _ in found.values())


def test_a_stream_that_nobody_reads_any_more_frees_its_memory(
    cluster: Any, real_exo: Any, client: ExoClient, tiny: Path
) -> None:
    place(client, tiny, MODEL, (5, 2))
    time.sleep(2)  # what `apply` asked is told by the heartbeats
    before = {node.number: len(held(node)) for node in cluster.nodes}

    def news() -> list[str]:
        return [line for node in cluster.nodes for line in held(node)[before[node.number] :]]

    assert len(stream(cluster.url, LONG, tokens=20_000, stop_after=100)) == 100  # 20,000 would take minutes
    real_exo.wait_until(lambda: news()[-1:] == ["0 sequences, 0 bytes"], 10, cluster.tail)
    assert news()[0].startswith("1 sequences")


def test_a_refused_request_is_an_error_and_the_next_is_served(
    cluster: Any, client: ExoClient, tiny: Path, alone: dict[str, str]
) -> None:
    place(client, tiny, MODEL, (2, 5))
    body = {"model": MODEL, "messages": [{"role": "user", "content": "a " * 5000}], "stream": True}
    with httpx.stream("POST", f"{cluster.url}/v1/chat/completions", json=body, timeout=60, trust_env=False) as reply:
        text = reply.read().decode()
    assert reply.status_code == 400 and "the context holds 4096" in text
    assert text_of(ask(cluster.url, PROMPTS[0])) == alone[PROMPTS[0]]


def test_a_killed_runner_is_an_error_at_once_and_exo_starts_it_again(
    cluster: Any, real_exo: Any, client: ExoClient, tiny: Path, alone: dict[str, str]
) -> None:
    place(client, tiny, MODEL, (5, 2))
    for number in (0, 1):
        killed_s: list[float] = []

        def kill(victim: int = cluster.nodes[number].runner(), times: list[float] = killed_s) -> None:
            time.sleep(2)
            times.append(time.monotonic())
            os.kill(victim, signal.SIGKILL)

        thread = threading.Thread(target=kill)
        thread.start()
        last = stream(cluster.url, LONG, tokens=20_000)[-1]
        thread.join()
        assert "error" in last
        assert time.monotonic() - killed_s[0] < 10
        real_exo.wait_until(lambda: not _all_ready(client), 30, cluster.tail)
        real_exo.wait_until(lambda: _all_ready(client), 90, cluster.tail)
        assert text_of(ask(cluster.url, PROMPTS[0])) == alone[PROMPTS[0]]


def test_a_killed_node_takes_its_runner_along_and_apply_works_when_it_is_back(
    cluster: Any, real_exo: Any, client: ExoClient, tiny: Path, alone: dict[str, str]
) -> None:
    place(client, tiny, MODEL, (5, 2))
    node = cluster.nodes[1]
    runner = node.runner()
    os.kill(node.process.pid, signal.SIGKILL)
    node.process.wait(10)
    real_exo.wait_until(lambda: not Path(f"/proc/{runner}").exists(), 10, cluster.tail)
    real_exo.wait_until(lambda: len(client.state().nodes) == 1, 90, cluster.tail)
    cluster.start(2)
    cluster.wait_seen()
    place(client, tiny, MODEL, (2, 5))
    assert text_of(ask(cluster.url, PROMPTS[0])) == alone[PROMPTS[0]]


def test_a_tool_call_arrives_as_a_tool_call(cluster: Any, client: ExoClient, models: Path) -> None:
    directory = models / CALLER.replace("/", "--")
    _delete_all(client)
    place(client, directory, CALLER, (4, 3))
    choice = ask(cluster.url, "Weather in Oslo?", model=CALLER, tools=[WEATHER], tokens=200)["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    (call,) = choice["message"]["tool_calls"]
    assert call["id"] == "functions.get_weather:0"
    assert call["function"]["name"] == "get_weather"
    assert json.loads(call["function"]["arguments"]) == {"city": "Oslo"}


def test_a_missing_tensor_is_refused_by_name_before_anything_is_loaded(
    cluster: Any, client: ExoClient, tiny: Path
) -> None:
    _delete_all(client)
    with pytest.raises(ExoLoadError) as refused:
        place(client, tiny, BROKEN, (5, 2))
    assert LOST in str(refused.value)
    assert not [e for e in cluster.events() if "RunnerLoading" in json.dumps(e) and BROKEN in json.dumps(e)]


def test_a_llama_runs_on_exos_own_engine_unchanged(cluster: Any, client: ExoClient, models: Path) -> None:
    _delete_all(client)
    directory = models / LLAMA.replace("/", "--")
    client.add_model(LLAMA)
    preview = next(
        p for p in client.previews(LLAMA) if p.instance and p.sharding == "Pipeline" and len(p.node_ids) == 2
    )
    assert preview.instance is not None
    client.create(preview.instance)
    deadline = time.monotonic() + 120
    while not _all_ready(client):
        assert time.monotonic() < deadline, cluster.tail()
        time.sleep(0.5)
    assert text_of(ask(cluster.url, "one two three", model=LLAMA, tokens=12)) == mlx_lm_text(directory, 12)
    assert f"exo's own engine runs {LLAMA}: not a Kimi" in _log(cluster.nodes[0])


def _all_ready(client: ExoClient) -> bool:
    state = client.state()
    wanted = [shard.runner_id for instance in state.instances for shard in instance.shards]
    return bool(wanted) and all(each in state.runners and state.runners[each].phase == "RunnerReady" for each in wanted)


def _delete_all(client: ExoClient) -> None:
    for instance in client.state().instances:
        client.delete(instance.instance_id)
    deadline = time.monotonic() + 30
    while client.state().instances and time.monotonic() < deadline:
        time.sleep(0.3)


def _log(node: Any) -> str:
    return str(node.log.read_text(errors="replace"))


def teach_a_call(directory: Path) -> None:
    """Make a tiny Kimi begin and end a tool call after any prompt; what is between, the grammar of strict tools dictates.

    With silent layers, the hidden state is the last token's embedding, so the head alone says which token follows which.
    """
    special = Speaker.from_directory(directory).tokenizer.special
    index = open_index(directory)
    arrays = {}
    for entry in index.tensors.values():
        silent = entry.name.endswith(("o_proj.weight", "down_proj.weight"))
        if silent or entry.name in ("model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"):
            shape = tuple(entry.shape)
            arrays[entry.name] = np.memmap(directory / entry.file, "<f4", "r+", entry.start, shape)
        if silent:
            arrays[entry.name][:] = 0
    embedding, head = arrays["model.embed_tokens.weight"], arrays["lm_head.weight"]
    arrays["model.norm.weight"][:] = 1
    head[:] = 0
    order = [
        "<|im_middle|>",
        "<|tool_calls_section_begin|>",
        "<|tool_call_begin|>",
        "<|tool_call_end|>",
        "<|tool_calls_section_end|>",
        "<|im_end|>",
    ]
    for before, after in ((0, 1), (1, 2), (3, 4), (4, 5)):
        seen = embedding[special[order[before]]]
        head[special[order[after]]] += 10 * seen / np.linalg.norm(seen)
    for array in arrays.values():
        array.flush()


def lose_a_tensor(directory: Path) -> None:
    """As an interrupted conversion would: not in the file, and not in the index."""
    path = directory / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    file = directory / index["weight_map"].pop(LOST)
    path.write_text(json.dumps(index))
    tensors = load_file(file)
    del tensors[LOST]
    file.unlink()  # it may be a link to the checkpoint that is whole
    save_file(tensors, file)


def write_llama(directory: Path) -> None:
    """Two layers of random weights, and a tokenizer of bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: index for index, letter in enumerate([*alphabet, "<s>", "</s>"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    wrapped.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    shutil.rmtree(directory, ignore_errors=True)
    wrapped.save_pretrained(directory)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 64,
        "num_hidden_layers": 4,
        "intermediate_size": 128,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-5,
        "vocab_size": len(vocabulary),
        "max_position_embeddings": 2048,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "eos_token_id": vocabulary["</s>"],
        "bos_token_id": vocabulary["<s>"],
    }
    (directory / "config.json").write_text(json.dumps(config))
    draw = np.random.default_rng(5)
    shapes = {"model.embed_tokens": (258, 64), "lm_head": (258, 64)}
    for layer in range(4):
        at = f"model.layers.{layer}"
        shapes |= {f"{at}.self_attn.{name}_proj": (64, 64) for name in "qkvo"}
        shapes |= {f"{at}.mlp.{name}_proj": (128, 64) for name in ("gate", "up")}
        shapes[f"{at}.mlp.down_proj"] = (64, 128)
    weights = {f"{name}.weight": draw.normal(0, 0.2, shape).astype(np.float32) for name, shape in shapes.items()}
    norms = ["model.norm", *(f"model.layers.{i}.{n}_layernorm" for i in range(4) for n in ("input", "post_attention"))]
    weights |= {f"{name}.weight": np.ones(64, np.float32) for name in norms}
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    size = sum(array.nbytes for array in weights.values())
    index = {"metadata": {"total_size": size}, "weight_map": dict.fromkeys(weights, "model.safetensors")}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def mlx_lm_text(directory: Path, tokens: int) -> str:
    """What exo's own mlx-lm answers without exo, greedily."""
    code = (
        "import sys; from mlx_lm import load, generate; m, t = load(sys.argv[1]); "
        "p = t.apply_chat_template([{'role': 'user', 'content': 'one two three'}], add_generation_prompt=True); "
        "sys.stdout.buffer.write(generate(m, t, prompt=p, max_tokens=int(sys.argv[2])).encode())"
    )
    command = [os.environ["EXO_PYTHON"], "-c", code, str(directory), str(tokens)]
    done = subprocess.run(command, capture_output=True, check=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    return done.stdout.decode()


def test_a_picture_is_answered_as_one_process_answers(
    cluster: Any, client: ExoClient, models: Path, exo_shapes: Any
) -> None:
    directory = models / SEEING.replace("/", "--")
    assert place(client, directory, SEEING, (5, 2)).answer is not None
    for color in ("red", "blue"):
        url = {"url": f"data:image/png;base64,{picture(color)}"}
        parts = [{"type": "text", "text": "What?"}, {"type": "image_url", "image_url": url}]
        body = {"messages": [{"role": "user", "content": parts}], "enable_thinking": False}
        reply = ask(cluster.url, "", model=SEEING, tokens=8, **body)
        shown = [{"role": "user", "content": [parts[0], {"type": "image"}]}]
        params = exo_shapes.task_params(
            "", images=[picture(color)], chat_template_messages=shown, enable_thinking=False, max_output_tokens=8
        )
        assert text_of(reply) == text_about(directory, params, 8), color
