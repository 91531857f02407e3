"""Whether two checkpoints read the same tokens: divergences between models of other vocabularies mean nothing."""

from __future__ import annotations

from exo_kimi.chat.tokenizer_files import MODEL_FILE, read_tokenizer_files
from exo_kimi.checkpoint.checkpoint import Checkpoint
from exo_kimi.errors import TokenizerError, UsageError


def check_same_vocabulary(first: Checkpoint, second: Checkpoint) -> None:
    """Refuse two checkpoints whose token ids are not the same texts.

    A control token that only one of them names is no difference: K2-Thinking names ids that K2-Instruct reserves. A directory
    without a tokenizer is judged by its vocab_size alone.

    Raises:
        UsageError: another vocab_size, other tokens, or a control token under another id.
        TokenizerError: a tokenizer's files are malformed.
    """
    sizes = [checkpoint.config.vocab_size for checkpoint in (first, second)]
    where = f"{first.directory} and {second.directory}"
    if sizes[0] != sizes[1]:
        raise UsageError("the models have other vocabularies", expected="one vocab_size", found=sizes, where=where)
    if not all((checkpoint.directory / MODEL_FILE).is_file() for checkpoint in (first, second)):
        return
    ours, theirs = (read_tokenizer_files(checkpoint.directory) for checkpoint in (first, second))
    other = sum(theirs.ranks.get(token) != rank for token, rank in ours.ranks.items())
    moved = [name for name, number in ours.special.items() if name in theirs.special and theirs.special[name] != number]
    if other or len(ours.ranks) != len(theirs.ranks) or moved:
        raise TokenizerError(
            "the models have other tokenizers",
            expected="the same text behind every token id",
            found=f"{len(ours.ranks):,} and {len(theirs.ranks):,} tokens, {other:,} of the first's not alike, "
            f"{len(moved)} control tokens under other ids",
            where=where,
            fix="compare forms of one model, each with the tokenizer that it came with",
        )
