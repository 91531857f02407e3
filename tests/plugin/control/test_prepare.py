"""A prepared directory holds one node's share, linked, with what exo needs beside it and nothing that would mislead it."""

from __future__ import annotations

import base64
import json
import re
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from exo_kimi.chat.template import ChatTemplate
from exo_kimi.chat.tokenizer import SPLIT_PATTERN, KimiTokenizer
from exo_kimi.checkpoint.doctor.checks.template import built_in_template
from exo_kimi.checkpoint.doctor.doctor import doctor
from exo_kimi.checkpoint.doctor.repair import repair
from exo_kimi.checkpoint.index import open_index
from exo_kimi.checkpoint.manifest import resolve
from exo_kimi.checkpoint.tiny.make import make_tiny
from exo_kimi.dialogue.speaker import Speaker
from exo_kimi.errors import CheckpointProblems, SplitError, TokenizerError, UsageError
from exo_kimi.plugin.control.model_names import check_model_id, default_model_id, directory_name
from exo_kimi.plugin.control.plan import exo_plan
from exo_kimi.plugin.control.prepare import prepare
from exo_kimi.plugin.control.texts import prepared_text

MODEL = "lab/kimi-k2-tiny"
INDEX = "model.safetensors.index.json"


def read(path: Path) -> Any:
    return json.loads(path.read_text())


@pytest.mark.parametrize(("start", "end"), [(0, 7), (0, 2), (5, 7), (2, 5)])
def test_a_share_has_its_layers_and_the_ends(tiny: Path, tmp_path: Path, start: int, end: int) -> None:
    made = prepare(tiny, tmp_path, model_id=MODEL, start_layer=start, end_layer=end)
    assert made.directory == tmp_path / "lab--kimi-k2-tiny"
    resolve(open_index(made.directory), start, end)
    names = read(made.directory / INDEX)["weight_map"]
    layers = {int(found[1]) for name in names if (found := re.search(r"layers\.(\d+)\.", name))}
    assert set(range(start, end)) <= layers
    assert {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"} <= set(names)


def test_every_file_of_the_index_is_there_and_no_weight_was_copied(tiny: Path, tmp_path: Path) -> None:
    made = prepare(tiny, tmp_path, model_id=MODEL, start_layer=5, end_layer=7)
    files = set(read(made.directory / INDEX)["weight_map"].values())
    assert files == set(made.weight_files) == {path.name for path in made.directory.glob("*.safetensors")}
    assert len(files) < 4
    for file in files:
        assert (made.directory / file).samefile(tiny / file)


def test_symbolic_links_serve_where_wanted(tiny: Path, tmp_path: Path) -> None:
    made = prepare(tiny, tmp_path, model_id=MODEL, linking="symbolic")
    assert all((made.directory / file).is_symlink() for file in made.weight_files)
    resolve(open_index(made.directory))


def test_the_total_is_that_of_the_whole_model(tiny: Path, tmp_path: Path) -> None:
    whole = read(tiny / INDEX)["metadata"]["total_size"]
    share = prepare(tiny, tmp_path / "one", model_id=MODEL, start_layer=5, end_layer=7)
    again = prepare(share.directory, tmp_path / "two", model_id=MODEL, start_layer=5, end_layer=7)
    assert share.total_bytes == again.total_bytes == whole
    assert read(again.directory / INDEX)["metadata"]["total_size"] == whole


def test_a_single_file_gets_the_index_that_exo_wants(tmp_path: Path) -> None:
    one = make_tiny(tmp_path / "one", shards=1)
    made = prepare(one, tmp_path / "models", model_id=MODEL)
    assert set(read(made.directory / INDEX)["weight_map"].values()) == {"model.safetensors"}
    assert made.total_bytes == open_index(one).disk_bytes


def test_exos_mlx_lm_finds_the_bits_of_both_halves_of_kv_b(tiny: Path, tmp_path: Path) -> None:
    made = prepare(tiny, tmp_path, model_id=MODEL)
    bits = read(made.directory / "config.json")["quantization"]
    for layer in range(7):
        attention = f"model.layers.{layer}.self_attn"
        assert bits[f"{attention}.embed_q"] == bits[f"{attention}.unembed_out"] == bits[f"{attention}.kv_b_proj"]
        assert bits[f"{attention}.kv_b_proj"]["bits"] == 6


def test_bits_that_the_shapes_refute_are_corrected(tmp_path: Path) -> None:
    """exo believes config.json: a 3-bit tensor read with 4 bits was the founding error."""
    wrong = make_tiny(tmp_path / "wrong", config={"quantization": {"group_size": 64, "bits": 4, "mode": "affine"}})
    made = prepare(wrong, tmp_path / "models", model_id=MODEL)
    assert made.notes
    bits = read(made.directory / "config.json")["quantization"]
    true = {source.spec.path: source.quant for source in resolve(open_index(wrong)).sources if source.quant}
    for path, quant in true.items():
        assert bits.get(path, bits)["bits"] == quant.bits, path


def test_names_of_nested_models_keep_their_prefix(tmp_path: Path) -> None:
    nested = make_tiny(tmp_path / "nested", prefix=True)
    made = prepare(nested, tmp_path / "models", model_id=MODEL)
    bits = read(made.directory / "config.json")["quantization"]
    assert "language_model.model.layers.0.self_attn.embed_q" in bits
    assert "model.layers.0.self_attn.embed_q" not in bits


def test_a_missing_tensor_is_named_here_and_not_made_up_by_exo(tmp_path: Path) -> None:
    whole = make_tiny(tmp_path / "whole", shards=4)
    lost = whole / "model-00002-of-00004.safetensors"
    lost.unlink()
    index = read(whole / INDEX)
    index["weight_map"] = {name: file for name, file in index["weight_map"].items() if file != lost.name}
    (whole / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointProblems, match=r"model\.layers\.\d+\.\S+"):
        prepare(whole, tmp_path / "models", model_id=MODEL)
    assert not (tmp_path / "models").exists()


def test_layers_that_the_model_has_not_are_refused(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(SplitError):
        prepare(tiny, tmp_path, model_id=MODEL, start_layer=5, end_layer=9)


def test_nothing_that_is_not_ours_is_ever_deleted(tiny: Path, tmp_path: Path) -> None:
    made = prepare(tiny, tmp_path, model_id=MODEL)
    again = prepare(tiny, tmp_path, model_id=MODEL, start_layer=5)
    assert len(again.weight_files) < len(made.weight_files), "an older share makes way"
    foreign = tmp_path / directory_name("lab/kimi-k2-mine")
    foreign.mkdir()
    (foreign / "model.safetensors").write_bytes(b"somebody's")
    with pytest.raises(UsageError, match="not empty"):
        prepare(tiny, tmp_path, model_id="lab/kimi-k2-mine")
    assert (foreign / "model.safetensors").read_bytes() == b"somebody's"


def test_a_directory_is_not_prepared_onto_itself(tiny: Path, tmp_path: Path) -> None:
    made = prepare(tiny, tmp_path, model_id=MODEL)
    with pytest.raises(UsageError, match="already there"):
        prepare(made.directory, tmp_path)


@pytest.mark.parametrize("model_id", ["kimi-k2", "lab/kimi-k3", "lab/../kimi-k2", "a/b/kimi-k2", "lab--kimi-k2/x", ""])
def test_an_id_that_exo_would_not_take_for_a_kimi_is_refused(model_id: str) -> None:
    with pytest.raises(UsageError):
        check_model_id(model_id)


def test_an_id_of_any_case_is_a_kimi() -> None:
    assert check_model_id("mlx-community/Kimi-K2-Thinking") == "mlx-community/Kimi-K2-Thinking"


def test_no_code_of_a_checkpoint_is_handed_on(tmp_path: Path) -> None:
    """mlx-lm runs `model_file` unasked; exo runs two files of the directory and puts it on Python's path."""
    own = make_tiny(tmp_path / "own", prefix=True)
    foreign = "raise SystemExit('code of the checkpoint was run')\n"
    for name in ("tokenization_kimi.py", "tool_declaration_ts.py", "json.py", "modeling_kimi.py"):
        (own / name).write_text(foreign)
    (own / "more").mkdir()
    (own / "more" / "hidden.py").write_text(foreign)
    (own / "preprocessor_config.json").write_text(json.dumps({"auto_map": {"AutoProcessor": "processing.Kimi"}}))
    config = read(own / "config.json")
    config |= {"model_file": "modeling_kimi.py", "auto_map": {"AutoModel": "modeling_kimi.Kimi"}}
    config["text_config"]["auto_map"] = {"AutoConfig": "configuration_kimi.Kimi"}
    (own / "config.json").write_text(json.dumps(config))
    tokenizer = read(own / "tokenizer_config.json")
    (own / "tokenizer_config.json").write_text(json.dumps({**tokenizer, "auto_map": {"AutoTokenizer": ["t.T", None]}}))

    made = prepare(own, tmp_path / "models", model_id=MODEL)
    assert {path.name for path in made.directory.iterdir()} - {path.name for path in own.glob("*.safetensors")} == {
        "chat_template.jinja",
        "config.json",
        "exo_kimi_share.json",
        "exo_model_card.toml",
        "generation_config.json",
        "model.safetensors.index.json",
        "tiktoken.model",
        "tokenization_kimi.py",
        "tokenizer_config.json",
        "tool_declaration_ts.py",
    }
    for path in made.directory.iterdir():
        if path.suffix in (".py", ".json", ".jinja"):
            assert not re.search(r"auto_map|model_file|code of the checkpoint", path.read_text()), path
    assert read(made.directory / "tokenizer_config.json") == tokenizer
    assert "left out: json.py, modeling_kimi.py, more/hidden.py" in prepared_text(made)


def test_the_doctor_names_code_and_removes_what_mlx_lm_would_run(tmp_path: Path) -> None:
    own = make_tiny(tmp_path / "own")
    assert not [note for note in doctor(own).notes if "code" in note]
    (own / "configuration_kimi.py").write_text("")
    (own / "config.json").write_text(
        json.dumps({**read(own / "config.json"), "auto_map": {"AutoConfig": "configuration_kimi.C"}})
    )
    diagnosis = doctor(own)
    assert not diagnosis.findings, "Moonshot publishes such files as well"
    assert any("configuration_kimi.py, auto_map in config.json" in note for note in diagnosis.notes)
    (own / "config.json").write_text(json.dumps({**read(own / "config.json"), "model_file": "configuration_kimi.py"}))
    (warning,) = doctor(own).warnings
    assert "names a program that mlx-lm and exo run unasked" in str(warning.error) and warning.fixable
    assert not repair(own).findings
    assert "model_file" not in read(own / "config.json") and "auto_map" in read(own / "config.json")


def test_our_tokenizer_code_cuts_as_kimi_does(tiny: Path, tmp_path: Path) -> None:
    """Its pattern is the one of `chat.tokenizer`; the file itself runs where exo's transformers is (marked `exo`)."""
    code = (prepare(tiny, tmp_path, model_id=MODEL).directory / "tokenization_kimi.py").read_text()
    names: dict[str, Any] = {"base64": base64}
    line = next(line for line in code.splitlines() if line.startswith("SPLIT_PATTERN"))
    exec(line, names)
    assert names["SPLIT_PATTERN"] == SPLIT_PATTERN
    compile(code, "tokenization_kimi.py", "exec")


def test_our_tokenizer_code_declares_tools_as_the_template_of_k25_wants(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As exo loads it: the declarations first, then the tokenizer, from a directory on Python's path."""
    pytest.importorskip("transformers")
    source = make_tiny(tmp_path / "k25", template="k25", prefix=True)
    (source / "chat_template.jinja").write_text(built_in_template({}, "kimi_k25")[1])
    made = prepare(source, tmp_path / "models", model_id=MODEL)
    monkeypatch.syspath_prepend(str(made.directory))
    names: dict[str, Any] = {"__name__": "tokenization_kimi"}
    try:
        exec((made.directory / "tokenization_kimi.py").read_text(), names)
        tokenizer = names["TikTokenTokenizer"].from_pretrained(made.directory)
    finally:
        sys.modules.pop("tool_declaration_ts", None)
    function = {"name": "find", "parameters": {"type": "object", "properties": {"place": {"type": "string"}}}}
    tools = [{"type": "function", "function": function}]
    messages = [{"role": "user", "content": "Hi"}]
    ours = ChatTemplate.from_directory(made.directory, KimiTokenizer.from_directory(made.directory))
    told = tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=True)
    assert told == ours.render(messages, tools=tools).text
    assert "type find = (_: {" in told


def test_a_checkpoint_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    bare = make_tiny(tmp_path / "bare")
    (bare / "tiktoken.model").unlink()
    with pytest.raises(TokenizerError, match="no Kimi tokenizer"):
        prepare(bare, tmp_path / "models", model_id=MODEL)
    half = tmp_path / "models" / directory_name(MODEL)
    assert not (half / INDEX).exists(), "exo takes no directory without an index"
    (bare / "tiktoken.model").write_bytes((make_tiny(tmp_path / "other") / "tiktoken.model").read_bytes())
    assert prepare(bare, tmp_path / "models", model_id=MODEL).directory == half


def test_the_card_is_toml_with_the_models_bytes(tiny: Path, tmp_path: Path) -> None:
    made = prepare(tiny, tmp_path, model_id=MODEL, start_layer=5)
    card = tomllib.loads((made.directory / "exo_model_card.toml").read_text())
    assert (card["model_id"], card["n_layers"], card["hidden_size"]) == (MODEL, 7, 256)
    assert card["storage_size"]["in_bytes"] == made.total_bytes
    assert card["tasks"] == ["TextGeneration"]
    assert (card["capabilities"], card["reasoning_dialect"]) == (["text"], "none")
    defaults = Speaker.from_directory(tiny).defaults.sampling()
    assert card["sampling_defaults"] == {"temperature": defaults.temperature, "top_p": defaults.top_p}


def test_the_card_of_a_model_that_thinks_has_the_toggle_and_both_samplings(tmp_path: Path) -> None:
    thinker = make_tiny(tmp_path / "thinker", config={"num_hidden_layers": 2}, template="k25")
    made = prepare(thinker, tmp_path / "models", model_id=MODEL)
    card = tomllib.loads((made.directory / "exo_model_card.toml").read_text())
    assert card["capabilities"] == ["text", "thinking", "thinking_toggle"]
    defaults = Speaker.from_directory(thinker).defaults
    for name, thinking in (("thinking", True), ("non_thinking", False)):
        chosen = defaults.sampling(thinking)
        assert card["sampling_defaults"][name] == {"temperature": chosen.temperature, "top_p": chosen.top_p}
    assert card["reasoning_dialect"] == "suffix"


@pytest.mark.parametrize(
    ("name", "model_id"),
    [
        ("lab--kimi-k2-mixed", "lab/kimi-k2-mixed"),
        ("mlx-community--Kimi-K2-Thinking", "mlx-community/Kimi-K2-Thinking"),
        ("lab--mixed", "lab/kimi-k2-mixed"),
        ("Kimi-K2.6", "local/Kimi-K2.6"),
        ("k2 mixed (3 bits)", "local/kimi-k2-k2-mixed-3-bits"),
        ("a--b--c", "a/kimi-k2-b-c"),
        ("_--_", "local/kimi-k2"),
        ("models--lab--Kimi-K2/snapshots/0f3a", "lab/Kimi-K2"),
    ],
)
def test_an_id_is_made_of_the_directorys_name(name: str, model_id: str, tmp_path: Path) -> None:
    assert default_model_id(tmp_path / name) == model_id
    assert check_model_id(model_id) == model_id


def test_without_an_id_prepare_and_plan_agree_on_one(tiny: Path, tmp_path: Path, make_exo: Any, client_of: Any) -> None:
    source = tmp_path / "my toy"
    source.symlink_to(tiny)
    made = prepare(source, tmp_path / "models")
    assert made.model_id == f"local/kimi-k2-{tiny.name}" and made.directory.name == f"local--kimi-k2-{tiny.name}"
    state = client_of(make_exo()).state()
    assert exo_plan(state, source, context=4096).plan.model.name == made.model_id
    assert exo_plan(state, made.directory, context=4096).plan.model.name == made.model_id


def test_a_checkpoint_whose_end_of_turn_exo_does_not_know_is_told(tiny: Path, tmp_path: Path) -> None:
    """The tiny Kimi has a small vocabulary; exo's engine would wait for token 163586."""
    (note,) = [note for note in prepare(tiny, tmp_path).notes if "163586" in note]
    assert "max_tokens" in note and "--our-engine" in note


def test_a_checkpoint_whose_end_of_turn_exo_knows_needs_no_word(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "exo_kimi.plugin.control.prepare.EXO_END_TOKEN", min(KimiTokenizer.from_directory(tiny).stop_ids)
    )
    assert not any("max_tokens" in note for note in prepare(tiny, tmp_path).notes)
