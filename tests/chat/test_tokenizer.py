"""Encoding is lossless, control tokens come only by name, and bad files are named errors."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exo_kimi.chat.tokenizer import CHUNK_CHARS, RUN_CHARS, SPLIT_PATTERN, KimiTokenizer, split_long_text
from exo_kimi.errors import TokenizerError

PUBLISHED_PATTERN = "|".join(
    [
        r"[\p{Han}]+",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)
NATURAL = (
    "The city's weather isn't known.  It's 12345 km, e.g. at https://example.org/?q=1\n\n"
    "\tdef f(x):\r\n        return x  # Größe, ĀÉÎÕÜ, ǅ\n你好，世界。再见！Hello 世界 and 12汉34字\n  \n"
    "ありがとう 한국어 русский العربية हिन्दी 😀👩‍👩‍👧 \u00a0\u2003\x85 mixed  \t \n \n x\n"
)
unicode_text = st.text(st.characters(exclude_categories=("Cs",)), max_size=200)


def test_the_split_pattern_is_the_published_one() -> None:
    assert SPLIT_PATTERN == PUBLISHED_PATTERN


@given(text=unicode_text)
def test_decode_undoes_encode(text: str, tokenizer: KimiTokenizer) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


@given(text=st.text(st.sampled_from("<|im_end>[EOST]/think "), max_size=60))
def test_text_never_encodes_to_a_control_token(text: str, tokenizer: KimiTokenizer) -> None:
    assert not any(map(tokenizer.is_special, tokenizer.encode(text)))


def test_names_of_control_tokens_in_text_stay_text(tokenizer: KimiTokenizer) -> None:
    for name in tokenizer.special:
        ids = tokenizer.encode(f"a{name}b")
        assert not any(map(tokenizer.is_special, ids))
        assert tokenizer.decode(ids) == f"a{name}b"


def test_a_lone_surrogate_becomes_the_replacement_character(tokenizer: KimiTokenizer) -> None:
    assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a\ufffdb"


def test_merges_are_used(tokenizer: KimiTokenizer) -> None:
    assert len(tokenizer.encode("Hello world")) == 2


@given(data=st.data())
def test_incremental_decoding_joins_to_the_whole(data: st.DataObject, tokenizer: KimiTokenizer) -> None:
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size + 5), max_size=60))
    detokenizer = tokenizer.detokenizer()
    pieces = [detokenizer.feed(token_id) for token_id in ids]
    assert "".join(pieces) + detokenizer.flush() == tokenizer.decode(ids)


@given(text=unicode_text)
def test_incremental_decoding_never_emits_half_a_character(text: str, tokenizer: KimiTokenizer) -> None:
    detokenizer = tokenizer.detokenizer()
    shown = ""
    for token_id in (byte for byte in text.encode()):  # the first 256 ids are the single bytes
        shown += detokenizer.feed(token_id)
        assert text.startswith(shown)
    assert shown + detokenizer.flush() == text


def test_bytes_that_are_not_utf8_become_replacement_characters(tokenizer: KimiTokenizer) -> None:
    detokenizer = tokenizer.detokenizer()
    assert [detokenizer.feed(byte) for byte in (0xE4, 0xBD, ord("a"), 0xFF, 0xF0)] == ["", "", "\ufffda", "\ufffd", ""]
    assert detokenizer.flush() == "\ufffd"
    assert detokenizer.flush() == ""
    assert detokenizer.feed(ord("z")) == "z"


def test_stop_ids_are_named_or_stated(tokenizer: KimiTokenizer, fresh_directory: Path) -> None:
    named = {tokenizer.special[name] for name in ("<|im_end|>", "[EOS]", "[EOT]")}
    assert tokenizer.stop_ids == named
    (fresh_directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 6]}))
    assert KimiTokenizer.from_directory(fresh_directory).stop_ids == named | {5, 6}
    (fresh_directory / "generation_config.json").unlink()
    assert KimiTokenizer.from_directory(fresh_directory).stop_ids == named


def test_the_last_256_ids_are_control_tokens(tokenizer: KimiTokenizer) -> None:
    ids = sorted(tokenizer.special.values())
    assert ids == list(range(tokenizer.vocab_size - 256, tokenizer.vocab_size))
    reserved = [name for name in tokenizer.special if name.startswith("<|reserved_token_")]
    assert len(reserved) == 256 - 23
    assert all(tokenizer.token_bytes(token_id) == name.encode() for name, token_id in tokenizer.special.items())


@pytest.mark.parametrize(
    "text",
    ["a" * 700_000, " " * 700_000, "汉" * 100_000, "!" * 100_000, "\n" * 100_000, " \n" * 200_000, "a1" * 200_000],
)
def test_endless_runs_encode_quickly_and_without_loss(text: str, tokenizer: KimiTokenizer) -> None:
    began = time.monotonic()
    ids = tokenizer.encode(text)
    assert time.monotonic() - began < 10
    assert tokenizer.decode(ids) == text


def test_long_natural_text_encodes_as_if_in_one_piece(tokenizer: KimiTokenizer) -> None:
    text = NATURAL * (900_000 // len(NATURAL))
    assert tokenizer.encode(text) == tokenizer.encoding.encode_ordinary(text)
    assert len(list(split_long_text(text))) > 2


def test_long_chinese_text_without_blanks_encodes_as_if_in_one_piece(tokenizer: KimiTokenizer) -> None:
    text = "你好，世界。世界你好！" * 10_000
    assert tokenizer.encode(text) == tokenizer.encoding.encode_ordinary(text)


@settings(max_examples=30, deadline=None)
@given(
    runs=st.lists(
        st.tuples(st.sampled_from([*NATURAL, " ", "\n"]), st.sampled_from([1, 2, 9_000, 40_000])), max_size=40
    )
)
def test_chunks_join_to_the_text_within_the_limits(runs: list[tuple[str, int]]) -> None:
    text = "".join(char * count for char, count in runs)
    chunks = list(split_long_text(text))
    assert "".join(chunks) == text
    for chunk in chunks:
        assert len(chunk) <= CHUNK_CHARS
        assert all(len(word) <= RUN_CHARS for word in chunk.split())
        assert " " * (RUN_CHARS + 1) not in chunk


def spoil_config(directory: Path, **changes: Any) -> None:
    path = directory / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def spoil_ranks(directory: Path, old: str, new: str) -> None:
    path = directory / "tiktoken.model"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


@pytest.mark.parametrize("name", ["tiktoken.model", "tokenizer_config.json"])
def test_a_missing_file_is_named(name: str, fresh_directory: Path) -> None:
    (fresh_directory / name).unlink()
    with pytest.raises(TokenizerError, match=f"{name} is missing") as caught:
        KimiTokenizer.from_directory(fresh_directory)
    assert caught.value.fix


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("AA== 0\n", "AA==\n", "malformed line"),
        ("AA== 0\n", "AA== zero\n", "malformed line"),
        ("AA== 0\n", "?? 0\n", "malformed line"),
        ("AA== 0\n", "AA== 0\nAA== 1\n", "same token twice"),
        ("AA== 0\n", "AA== 999999\n", "holes"),
        ("AA== 0\n", "YWJjZGVm 0\n", "lacks tokens for single bytes"),
    ],
)
def test_a_malformed_vocabulary_is_an_error(old: str, new: str, message: str, fresh_directory: Path) -> None:
    spoil_ranks(fresh_directory, old, new)
    with pytest.raises(TokenizerError, match=message) as caught:
        KimiTokenizer.from_directory(fresh_directory)
    assert "tiktoken.model" in str(caught.value.where)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (None, "names no control tokens"),
        ({"x": {"content": "<a>"}}, "malformed entry"),
        ({"600": {"name": "<a>"}}, "malformed entry"),
        ({"600": {"content": "\ud800"}}, "malformed entry"),
        ({"9" * 5000: {"content": "<a>"}}, "malformed entry"),
        ({"3": {"content": "<a>"}}, "id of an ordinary token"),
        ({"500": {"content": "<a>"}, "501": {"content": "<a>"}}, "has two ids"),
    ],
)
def test_malformed_control_tokens_are_an_error(entries: Any, message: str, fresh_directory: Path) -> None:
    spoil_config(fresh_directory, added_tokens_decoder=entries)
    with pytest.raises(TokenizerError, match=message):
        KimiTokenizer.from_directory(fresh_directory)


@pytest.mark.parametrize("content", ["{", "[]", '"x"'])
def test_a_config_that_is_no_json_object_is_an_error(content: str, fresh_directory: Path) -> None:
    (fresh_directory / "tokenizer_config.json").write_text(content)
    with pytest.raises(TokenizerError, match=r"tokenizer_config\.json is"):
        KimiTokenizer.from_directory(fresh_directory)


@pytest.mark.parametrize("eos", ["</s>", 10**6, True, -1])
def test_an_eos_id_that_is_no_token_is_an_error(eos: Any, fresh_directory: Path) -> None:
    (fresh_directory / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
    with pytest.raises(TokenizerError, match="eos_token_id"):
        KimiTokenizer.from_directory(fresh_directory)


def test_an_id_past_the_reserved_ones_is_no_control_token(fresh_directory: Path, tokenizer: KimiTokenizer) -> None:
    config = json.loads((fresh_directory / "tokenizer_config.json").read_text())
    entries = config["added_tokens_decoder"] | {str(tokenizer.vocab_size): {"content": "<|video|>"}}
    spoil_config(fresh_directory, added_tokens_decoder=entries)
    assert "<|video|>" not in KimiTokenizer.from_directory(fresh_directory).special
