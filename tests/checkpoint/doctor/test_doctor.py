"""The doctor: all findings at once, each under its name, with what a reader needs, and fixable or not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from exo_kimi.checkpoint.doctor.checks.template import built_in_template
from exo_kimi.checkpoint.doctor.doctor import doctor
from exo_kimi.checkpoint.doctor.findings import Diagnosis, Finding
from exo_kimi.errors import (
    ConfigError,
    DtypeError,
    MissingTensorError,
    NotACheckpointError,
    QuantizationError,
    TemplateError,
    TensorFileError,
    TokenizerError,
    UnsupportedModelError,
)

INDEX = "model.safetensors.index.json"


def the_finding(diagnosis: Diagnosis) -> Finding:
    (finding,) = diagnosis.findings
    return finding


@pytest.mark.parametrize("layout", ["mlx", "int4", "fp8", "bf16"])
@pytest.mark.parametrize("prefix", [False, True])
def test_a_sound_checkpoint_is_healthy(make, layout: str, prefix: bool) -> None:
    diagnosis = doctor(make(layout=layout, prefix=prefix, vision=prefix), deep=True)
    assert diagnosis.healthy
    assert diagnosis.findings == ()
    assert diagnosis.to_text().endswith("healthy (weights were read)")


def test_every_room_is_looked_at_in_spite_of_the_others(make, edit_config) -> None:
    directory = make(recipe="uniform4")
    edit_config(directory, lambda raw: raw.update(model_type="deepseek_v2"))
    edit_config(directory, lambda raw: raw["quantization"].update(bits=3))
    (directory / INDEX).write_text("{")
    (directory / "chat_template.jinja").unlink()
    (directory / "generation_config.json").write_text('{"eos_token_id": 5}')
    lines = (directory / "tiktoken.model").read_bytes().splitlines(keepends=True)
    (directory / "tiktoken.model").write_bytes(b"".join(lines[:-4]))
    shard = max(directory.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-10])
    diagnosis = doctor(directory)
    kinds = {(finding.severity, type(finding.error)) for finding in diagnosis.findings}
    assert kinds == {
        ("error", UnsupportedModelError),
        ("error", TensorFileError),
        ("error", TokenizerError),
        ("warning", QuantizationError),
        ("warning", TemplateError),
        ("warning", TokenizerError),
    }
    severities = [finding.severity for finding in diagnosis.findings]
    assert severities == sorted(severities)
    assert not diagnosis.healthy


def test_files_are_looked_at_without_a_config(make) -> None:
    directory = make()
    (directory / "config.json").write_text("{")
    shard = min(directory.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-10])
    assert [type(finding.error) for finding in doctor(directory).findings] == [ConfigError, TensorFileError]


def test_a_missing_directory_is_raised(tmp_path: Path) -> None:
    with pytest.raises(NotACheckpointError):
        doctor(tmp_path / "nowhere")


def test_an_empty_directory_lacks_everything(tmp_path: Path) -> None:
    whats = "\n".join(finding.error.what for finding in doctor(tmp_path).findings)
    for part in ("config.json", "no weights", "tiktoken.model", "tokenizer_config.json", "chat template"):
        assert part in whats


def test_the_text_is_what_a_reader_needs(make) -> None:
    directory = make(recipe="uniform3", config={"quantization": {"bits": 4, "group_size": 64}})
    modules = sum(name.endswith(".scales") for name in json.loads((directory / INDEX).read_text())["weight_map"])
    text = doctor(directory).to_text().replace(str(directory), "DIR")
    head, *blocks, verdict = text.split("\n\n")
    assert head == "DIR"
    assert verdict.endswith("(headers only; --deep reads the weights too); --fix repairs 3")
    assert len(blocks) == 3  # one for each width: the numbers of columns differ
    assert blocks[0].startswith("warning  QuantizationError: config.json is wrong about ")
    assert "found     config.json says 4-bit, group 64" in text
    assert "the shapes say 3-bit, group 64: 12 columns = 128 * 3 / 32, where 4-bit would be 16 = 128 * 4 / 32" in text
    assert "repair    `exo-kimi doctor DIR --fix` does it" in text
    assert modules > 20


def test_json_holds_all_findings(make) -> None:
    directory = make()
    (directory / "chat_template.jinja").unlink()
    document: dict[str, Any] = json.loads(doctor(directory).to_json())
    assert (document["healthy"], document["errors"], document["warnings"]) == (True, 0, 1)
    assert document["findings"][0]["kind"] == "TemplateError"
    assert set(document["findings"][0]) == {
        "severity", "kind", "what", "expected", "found", "where", "fix", "fixable",
    }  # fmt: skip


@pytest.mark.parametrize("wrong", ["deepseek_v2", "llama", None, "kimi_k25"])
def test_a_wrong_model_type_is_told_from_the_tensors(make, edit_config, wrong: str | None) -> None:
    directory = make()
    edit_config(directory, lambda raw: raw.update(model_type=wrong))
    finding = the_finding(doctor(directory))
    assert finding.fixable
    assert finding.error.expected == "'kimi_k2'"


def test_a_nested_config_must_say_so(make, edit_config) -> None:
    directory = make(prefix=True)
    edit_config(directory, lambda raw: raw.update(model_type="kimi_k2"))
    finding = the_finding(doctor(directory))
    assert finding.fixable
    assert finding.error.expected == "'kimi_k25' with text_config 'kimi_k2'"


def test_a_model_without_kimis_router_keeps_its_model_type(make, edit_config, edit_header) -> None:
    directory = make(shards=1)
    edit_config(directory, lambda raw: raw.update(model_type="deepseek_v2"))

    def rename(header: dict[str, Any]) -> None:
        for name in [name for name in header if name.endswith("e_score_correction_bias")]:
            header[name.replace("e_score_correction_bias", "bias")] = header.pop(name)

    edit_header(directory / "model.safetensors", rename)
    assert not the_finding(doctor(directory)).fixable


def test_names_that_nest_otherwise_than_the_config_are_told(make) -> None:
    directory, flat = make(prefix=True), make()
    (directory / "config.json").write_text((flat / "config.json").read_text())
    finding = the_finding(doctor(directory))
    assert (finding.severity, type(finding.error)) == ("warning", ConfigError)
    assert "language_model." in str(finding.error)


def test_rope_parameters_need_a_theta_that_is_never_guessed(make, edit_config) -> None:
    directory = make()

    def change(raw: dict[str, Any]) -> None:
        raw["rope_parameters"] = {**raw.pop("rope_scaling"), "rope_type": "yarn"}
        del raw["rope_theta"]

    edit_config(directory, change)
    finding = the_finding(doctor(directory))
    assert "rope_theta is missing" in finding.error.what
    assert not finding.fixable


def test_a_context_that_yarn_does_not_reach_is_told(make, edit_config) -> None:
    directory = make()
    edit_config(directory, lambda raw: raw.update(max_position_embeddings=262144))
    finding = the_finding(doctor(directory))
    assert finding.severity == "warning"
    assert "131,072 = factor 32 * 4096" in str(finding.error.expected)


def test_experts_that_disagree_are_named(make, edit_header) -> None:
    directory = make(layout="bf16", shards=1)
    name = "model.layers.1.mlp.experts.2.up_proj.weight"
    edit_header(directory / "model.safetensors", lambda header: header[name].update(dtype="F16"))
    errors = [finding.error for finding in doctor(directory).findings]
    assert {type(error) for error in errors} == {QuantizationError, DtypeError}
    assert all(name in error.what for error in errors)


def test_an_index_is_fixable_only_while_the_files_hold_everything(make) -> None:
    directory = make(shards=3)
    (directory / INDEX).write_text("{")
    assert the_finding(doctor(directory)).fixable
    (directory / "model-00002-of-00003.safetensors").unlink()
    findings = doctor(directory).findings
    assert findings
    assert not any(finding.fixable for finding in findings)


def test_several_files_without_an_index_are_a_warning(make) -> None:
    directory = make(shards=2)
    (directory / INDEX).unlink()
    finding = the_finding(doctor(directory))
    assert (finding.severity, finding.fixable) == ("warning", True)


def test_a_tensor_in_no_file_is_missing(make, edit_header) -> None:
    directory = make(shards=1)

    def drop(header: dict[str, Any]) -> None:
        last = max((n for n in header if n != "__metadata__"), key=lambda n: header[n]["data_offsets"][1])
        header[f"{last}.old"] = header.pop(last)

    edit_header(directory / "model.safetensors", drop)
    assert MissingTensorError in {type(finding.error) for finding in doctor(directory).findings}


@pytest.mark.parametrize(
    ("special", "model_type", "family"),
    [({}, "kimi_k2", "instruct"), ({"<think>": 1}, "kimi_k2", "thinking"), ({"<think>": 1}, "kimi_k25", "k25")],
)
def test_the_built_in_template_is_the_chat_rooms(make, special: dict[str, int], model_type: str, family: str) -> None:
    from exo_kimi.chat.template import ChatTemplate
    from exo_kimi.chat.tokenizer import KimiTokenizer

    told, text = built_in_template(special, model_type)
    directory = make()
    (directory / "chat_template.jinja").write_text(text)
    tokenizer = KimiTokenizer.from_directory(directory)
    messages = [{"role": "user", "content": "x"}]
    assert told == family
    assert (
        ChatTemplate.from_directory(directory, tokenizer).render(messages).text
        == ChatTemplate.built_in(family, tokenizer).render(messages).text
    )


def test_published_templates_are_sound(make) -> None:
    folder = Path(__file__).parents[3].parent / "shared" / "data" / "templates"
    if not folder.is_dir():
        pytest.skip("the published templates are not beside the repository")
    templates = sorted(folder.glob("*.jinja"))
    assert templates
    for path in templates:
        directory = make()
        (directory / "chat_template.jinja").write_text(path.read_text())
        found = doctor(directory)
        if "tool_calls" in path.read_text():
            assert found.findings == ()
        else:  # the first day's: past calls are not in the prompt
            assert not found.errors
            assert "no past tool calls" in the_finding(found).error.what


def test_a_template_in_the_tokenizer_config_counts(make) -> None:
    directory = make()
    path = directory / "tokenizer_config.json"
    raw = json.loads(path.read_text())
    text = (directory / "chat_template.jinja").read_text()
    (directory / "chat_template.jinja").unlink()
    for stated in (text, [{"name": "default", "template": text}], {"default": text, "tool_use": text}):
        path.write_text(json.dumps({**raw, "chat_template": stated}))
        assert doctor(directory).findings == ()
    path.write_text(json.dumps({**raw, "chat_template": {"other": text}}))
    assert the_finding(doctor(directory)).error.what == "the chat template is malformed"


def test_a_kept_generation_block_is_no_damage(make) -> None:
    directory = make()
    path = directory / "chat_template.jinja"
    path.write_text(path.read_text() + "{% generation %}{% endgeneration %}")
    assert doctor(directory).findings == ()


def test_ids_beyond_the_embedding_are_found(make, edit_config) -> None:
    directory = make()
    path = directory / "tiktoken.model"
    path.write_bytes(path.read_bytes() + b"AAAAAAAA 384\n")
    whats = [finding.error.what for finding in doctor(directory).findings]
    assert "the tokenizer has ids beyond the embedding" in whats
    assert "control tokens have the ids of ordinary tokens" in whats
