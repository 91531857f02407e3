"""Whether two models read the same tokens: divergences between models of other vocabularies mean nothing."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from operator import itemgetter
from typing import Any, Self

from exo_kimi.chat.tokenizer_files import MODEL_FILE, TokenizerFiles, read_tokenizer_files
from exo_kimi.checkpoint.checkpoint import Checkpoint
from exo_kimi.errors import TokenizerError, UsageError

_FIX = "compare forms of one model, each with the tokenizer that it came with"


@dataclass(frozen=True, slots=True, kw_only=True)
class VocabularyPrint:
    """What a saved run keeps of its model's vocabulary.

    Args:
        size: `vocab_size`.
        tokens: hash of the bytes of every token by its id; empty where the directory had no tokenizer.
        special: control token name to id.
    """

    size: int
    tokens: str
    special: Mapping[str, int]

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> Self:
        """That of a directory.

        Raises:
            TokenizerError: the tokenizer's files are malformed.
        """
        size = checkpoint.config.vocab_size
        if not (checkpoint.directory / MODEL_FILE).is_file():
            return cls(size=size, tokens="", special={})
        files = read_tokenizer_files(checkpoint.directory)
        digest = hashlib.sha256()
        for token, rank in sorted(files.ranks.items(), key=itemgetter(1)):
            digest.update(b"%d %d " % (rank, len(token)) + token)
        return cls(size=size, tokens=digest.hexdigest(), special=dict(files.special))

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> Self:
        """Read what `to_json` gave.

        Raises:
            KeyError, TypeError, ValueError: it is something else.
        """
        special = {str(name): int(number) for name, number in raw["special"].items()}
        return cls(size=int(raw["size"]), tokens=str(raw["tokens"]), special=special)

    def to_json(self) -> dict[str, Any]:
        """For the file of a saved run."""
        return {"size": self.size, "tokens": self.tokens, "special": dict(self.special)}

    def check_same(self, other: VocabularyPrint, *, where: str) -> None:
        """Refuse another one; `where` names both sides.

        Raises:
            UsageError: another vocab_size.
            TokenizerError: other tokens, or a control token under another id.
        """
        _check_sizes(self.size, other.size, where)
        if not (self.tokens and other.tokens):
            return
        moved = _moved(self.special, other.special)
        if self.tokens != other.tokens or moved:
            raise TokenizerError(
                "the models have other tokenizers",
                expected=f"tokens {self.tokens[:16]}, as the run was saved with",
                found=f"tokens {other.tokens[:16]}, {moved} control tokens under other ids",
                where=where,
                fix=_FIX,
            )


def check_same_vocabulary(first: Checkpoint, second: Checkpoint) -> None:
    """Refuse two checkpoints whose token ids are not the same texts.

    A control token that only one of them names is no difference: K2-Thinking names ids that K2-Instruct reserves. A directory
    without a tokenizer is judged by its vocab_size alone.

    Raises:
        UsageError: another vocab_size.
        TokenizerError: other tokens, a control token under another id, or a tokenizer's files are malformed.
    """
    where = f"{first.directory} and {second.directory}"
    _check_sizes(first.config.vocab_size, second.config.vocab_size, where)
    if not all((checkpoint.directory / MODEL_FILE).is_file() for checkpoint in (first, second)):
        return
    ours, theirs = (read_tokenizer_files(checkpoint.directory) for checkpoint in (first, second))
    other, moved = _differing(ours, theirs), _moved(ours.special, theirs.special)
    if other or len(ours.ranks) != len(theirs.ranks) or moved:
        raise TokenizerError(
            "the models have other tokenizers",
            expected="the same text behind every token id",
            found=f"{len(ours.ranks):,} and {len(theirs.ranks):,} tokens, {other:,} of the first's not alike, "
            f"{moved} control tokens under other ids",
            where=where,
            fix=_FIX,
        )


def _check_sizes(one: int, other: int, where: str) -> None:
    if one != other:
        raise UsageError(
            "the models have other vocabularies", expected="one vocab_size", found=[one, other], where=where
        )


def _differing(ours: TokenizerFiles, theirs: TokenizerFiles) -> int:
    return sum(theirs.ranks.get(token) != rank for token, rank in ours.ranks.items())


def _moved(ours: Mapping[str, int], theirs: Mapping[str, int]) -> int:
    return sum(name in theirs and theirs[name] != number for name, number in ours.items())
