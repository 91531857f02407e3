"""Kimi's tokenizer, built from `tiktoken.model` and `tokenizer_config.json`."""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import tiktoken

from exo_kimi.chat.tokenizer_files import TokenizerFiles, read_tokenizer_files
from exo_kimi.errors import ContextLengthError

# Kimi's pre-tokenizer, in this order (tokenization_kimi.py of every published K2). Ordinary letters exclude Han, which
# forms words of its own.
_LETTER_HEAD = r"[^\r\n\p{L}\p{N}]?"
_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
SPLIT_PATTERN = "|".join(
    (
        r"[\p{Han}]+",
        f"{_LETTER_HEAD}{_UPPER}*{_LOWER}+{_CONTRACTION}",
        f"{_LETTER_HEAD}{_UPPER}+{_LOWER}*{_CONTRACTION}",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)
STOP_NAMES = ("<|im_end|>", "[EOS]", "[EOT]")
_UNKNOWN = "\ufffd".encode()
CHUNK_CHARS = 400_000
RUN_CHARS = 25_000
_RUN = re.compile(r"\S+|\s+")
# Before a blank that follows a word; after a line end that precedes one; between Chinese punctuation and a Han character.
_SAFE_CUT = re.compile(r"(?<=\S)(?=[ \t])|(?<=\n)(?=\S)|(?<=[，。！？；：、])(?=[\u4e00-\u9fff])")


class KimiTokenizer:
    """Encoder of text to token ids, and back; text never becomes a control token, which exists only by its id or name.

    Args:
        files: what the tokenizer files of a checkpoint say.
    """

    def __init__(self, files: TokenizerFiles) -> None:
        self.special: Mapping[str, int] = dict(files.special)
        self.stop_ids: frozenset[int] = files.eos_ids | {
            files.special[name] for name in STOP_NAMES if name in files.special
        }
        self.named_tokens: Mapping[str, str] = dict(files.named_tokens)
        self.encoding = tiktoken.Encoding(
            name="kimi",
            pat_str=SPLIT_PATTERN,
            mergeable_ranks=dict(files.ranks),
            special_tokens=dict(files.special),
        )
        self._bytes: dict[int, bytes] = {rank: token for token, rank in files.ranks.items()}
        self._bytes.update((token_id, name.encode()) for name, token_id in files.special.items())
        self._longest_token_bytes = max(map(len, self._bytes.values()))
        self._special_ids = frozenset(files.special.values())

    @classmethod
    def from_directory(cls, path: Path | str) -> KimiTokenizer:
        """Build the tokenizer of a checkpoint directory.

        Raises:
            TokenizerError: a file is missing or malformed.
        """
        return cls(read_tokenizer_files(Path(path)))

    @property
    def vocab_size(self) -> int:
        """Number of ids, control tokens included; a model's embedding may have more rows."""
        return len(self._bytes)

    @property
    def longest_token_bytes(self) -> int:
        """Bytes of the longest token: no text has fewer tokens than its bytes divided by this."""
        return self._longest_token_bytes

    def encode(self, text: str, *, most_tokens: int | None = None) -> list[int]:
        """Token ids of ordinary text; names of control tokens inside it are ordinary text too.

        A lone surrogate (JSON can carry one) is encoded as U+FFFD.

        Args:
            text: of any length.
            most_tokens: give up where there are more; None never does.

        Raises:
            ContextLengthError: there are more.
        """
        ids: list[int] = []
        for chunk in split_long_text(text):
            ids += self.encoding.encode_ordinary(chunk)
            if most_tokens is not None and len(ids) > most_tokens:
                raise ContextLengthError(
                    "the text is far longer than the context can hold",
                    code="context_length_exceeded",
                    found=f"over {most_tokens} tokens",
                )
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Text of token ids, control tokens by their names; bytes that are not UTF-8 become U+FFFD."""
        return b"".join(self.token_bytes(token_id) for token_id in ids).decode("utf-8", "replace")

    def token_bytes(self, token_id: int) -> bytes:
        """Bytes of one token; an id that only the embedding knows (padding rows) reads as U+FFFD."""
        return self._bytes.get(token_id, _UNKNOWN)

    def is_special(self, token_id: int) -> bool:
        """Whether the id is a control token, named or reserved."""
        return token_id in self._special_ids

    def detokenizer(self) -> Detokenizer:
        """Make an incremental decoder for one sequence."""
        return Detokenizer(self)


class Detokenizer:
    """Incremental decoder of one sequence: fed and flushed, the pieces join to what `decode` gives for the whole."""

    def __init__(self, tokenizer: KimiTokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, token_id: int) -> str:
        """Text completed by this token; the bytes of an unfinished character (at most three) wait for the next."""
        return self._decoder.decode(self._tokenizer.token_bytes(token_id))

    def flush(self) -> str:
        """The bytes that wait, as U+FFFD; the decoder can be fed again."""
        rest = self._decoder.decode(b"", True)
        self._decoder.reset()
        return rest


def split_long_text(text: str) -> Iterator[str]:
    """Cut long text where the split pattern cuts anyway: pieces that join to `text`, one piece when it is short.

    tiktoken's regex engine works on one string at a time and fails or slows down on huge ones, so Kimi's own tokenizer hands
    it at most 400,000 characters, with no run of whitespace or of non-whitespace over 25,000. It cuts at exactly those
    places, which splits words. Here a cut goes to the last place where the pattern splits whatever stands around it, and
    only text that has no such place (an endless word) is cut bluntly.
    """
    start = 0
    while len(text) - start > RUN_CHARS:
        limit = min(start + CHUNK_CHARS, len(text))
        for run in _RUN.finditer(text, start, limit):
            if run.end() - run.start() > RUN_CHARS:
                limit = run.start() + RUN_CHARS
                break
        if limit == len(text):
            break
        cut = limit
        for match in _SAFE_CUT.finditer(text, max(start + 1, limit - RUN_CHARS), limit + 1):
            if match.start() <= limit:
                cut = match.start()
        yield text[start:cut]
        start = cut
    yield text[start:]
