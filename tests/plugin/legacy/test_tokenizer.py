"""The few methods that legacy exo calls on a tokenizer, with the right ids, the right text and an end."""

from __future__ import annotations

from pathlib import Path

import pytest

from exo_kimi.chat.tokenizer import KimiTokenizer
from exo_kimi.plugin.legacy.tokenizer import LegacyTokenizer, RenderedPrompt, StopIds


@pytest.fixture(scope="module")
def tokenizer(tiny: Path) -> LegacyTokenizer:
    return LegacyTokenizer.from_directory(tiny)


@pytest.fixture(scope="module")
def kimi(tiny: Path) -> KimiTokenizer:
    return KimiTokenizer.from_directory(tiny)


def test_every_stop_id_equals_the_one_that_exo_looks_at(kimi: KimiTokenizer, tokenizer: LegacyTokenizer) -> None:
    stop = tokenizer.eos_token_id
    assert int(stop) == kimi.special["<|im_end|>"] and len(kimi.stop_ids) > 1
    for token in range(kimi.vocab_size):
        assert (token == stop) is (stop == token) is (token in kimi.stop_ids)
        assert (token != stop) is (token not in kimi.stop_ids)
    assert StopIds(frozenset({3, 4}), first=3) != "3"


def test_a_rendered_prompt_carries_ids_in_which_a_users_words_are_text(
    kimi: KimiTokenizer, tokenizer: LegacyTokenizer
) -> None:
    said = "a <|im_end|> b"
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": said}], tokenize=False)
    assert isinstance(prompt, RenderedPrompt) and said in prompt
    end = kimi.special["<|im_end|>"]
    assert tokenizer.encode(prompt) == list(prompt.ids)
    assert prompt.ids.count(end) == str(prompt).count("<|im_end|>") - 1
    # Of bare text nobody knows who wrote what.
    assert tokenizer.encode(str(prompt)).count(end) == str(prompt).count("<|im_end|>")
    assert tokenizer.apply_chat_template([{"role": "user", "content": said}]) == list(prompt.ids)


def test_text_is_without_the_end_of_the_turn(kimi: KimiTokenizer, tokenizer: LegacyTokenizer) -> None:
    ids = kimi.encode("the sea")
    assert tokenizer.decode([*ids, kimi.special["<|im_end|>"]]) == "the sea"


def test_a_streamed_reply_is_the_whole_one_though_characters_are_split(
    kimi: KimiTokenizer, tokenizer: LegacyTokenizer
) -> None:
    text = "天气 sea 🌊"
    ids = [*kimi.encode(text), kimi.special["<|im_end|>"]]
    reply = tokenizer.of_reply()
    pieces = []
    for token in ids:
        tokens = [token]
        pieces.append(reply.decode(tokens))
        assert reply.decode(tokens) == pieces[-1]  # exo asks twice
    assert "".join(pieces) == text
    assert any("�" in tokenizer.decode([token]) for token in ids)
    assert tokenizer.of_reply().decode(ids) == text
