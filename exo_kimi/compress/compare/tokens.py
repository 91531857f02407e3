"""Next-token probabilities of two models at the same places of the same texts, as measures of each place.

Where only the likeliest tokens of a place are known, all others count as one: KL is then a lower bound, by the data processing
inequality, and close to it where the known tokens hold nearly all of the probability.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from exo_kimi.compress.compare.intervals import Estimate, mean_of_texts
from exo_kimi.compress.texts.encoding import Encoded
from exo_kimi.compress.texts.vocabulary import VocabularyPrint
from exo_kimi.errors import UsageError

VERSION = 2
LEAST_PROBABILITY = 1e-6
"""What is left for all other tokens at least: float32 rounds the others, which may leave less than nothing."""

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenPairs:
    """M places, one counted token each.

    Args:
        kl: (M,) KL(reference || subject) in nats.
        reference_loss, loss: (M,) -log p of the token that is there.
        same: (M,) whether both find the same token likeliest.
        text_of: (M,) index of the text.
        domains: of each text.
        bound: whether `kl` is a lower bound.
    """

    kl: Floats
    reference_loss: Floats
    loss: Floats
    same: NDArray[np.bool_]
    text_of: NDArray[np.int64]
    domains: tuple[str, ...]
    bound: bool = False

    def of_domain(self, domain: str) -> TokenPairs:
        """The places of one domain."""
        texts = np.array([each == domain for each in self.domains])
        chosen = texts[self.text_of]
        return TokenPairs(
            kl=self.kl[chosen],
            reference_loss=self.reference_loss[chosen],
            loss=self.loss[chosen],
            same=self.same[chosen],
            text_of=self.text_of[chosen],
            domains=self.domains,
            bound=self.bound,
        )

    def summary(self) -> DistanceSummary:
        """Means with their intervals; at least one place is needed."""
        change = mean_of_texts(self.loss - self.reference_loss, self.text_of)
        ratio = Estimate(value=math.exp(change.value), low=math.exp(change.low), high=math.exp(change.high))
        return DistanceSummary(
            tokens=len(self.kl),
            texts=len(np.unique(self.text_of)),
            kl=mean_of_texts(self.kl, self.text_of),
            kl_median=float(np.median(self.kl)),
            kl_99=float(np.percentile(self.kl, 99)),
            same=mean_of_texts(self.same.astype(np.float64), self.text_of),
            perplexity=math.exp(float(self.loss.mean())),
            reference_perplexity=math.exp(float(self.reference_loss.mean())),
            perplexity_ratio=ratio,
            bound=self.bound,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class DistanceSummary:
    """How far two models lie apart on some texts.

    Args:
        kl: mean KL(reference || subject) in nats a token; `kl_median` and `kl_99` of its places.
        same: share of places where both find the same token likeliest.
        perplexity: of the subject; `perplexity_ratio` over the reference's, token by token.
        bound: whether the KL is a lower bound.
    """

    tokens: int
    texts: int
    kl: Estimate
    kl_median: float
    kl_99: float
    same: Estimate
    perplexity: float
    reference_perplexity: float
    perplexity_ratio: Estimate
    bound: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedTokens:
    """What one model said of some texts, for a second run on another machine.

    Args:
        name: of the model.
        texts: what it read, as token ids: the second run reads the same.
        target: (M,) log p of each counted token.
        ids, logs: (M, T) the likeliest tokens, best first, and their log p.
        vocabulary: of the model; None where a server chose the tokens and a directory of this machine read them.
        extra: what else the run said of its model, such as its replies.
    """

    name: str
    texts: tuple[Encoded, ...]
    target: Floats
    ids: NDArray[np.int64]
    logs: Floats
    vocabulary: VocabularyPrint | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    def save(self, path: Path) -> None:
        """Write one .npz file; log-probabilities in float32.

        Raises:
            UsageError: it cannot be written.
        """
        head = {
            "version": VERSION,
            "name": self.name,
            "domains": [text.domain for text in self.texts],
            "vocabulary": None if self.vocabulary is None else self.vocabulary.to_json(),
            "extra": self.extra,
        }
        stream = io.BytesIO()
        np.savez(
            stream,
            head=np.frombuffer(json.dumps(head).encode(), np.uint8),
            target=self.target.astype(np.float32),
            ids=self.ids.astype(np.int32),
            logs=self.logs.astype(np.float32),
            lengths=np.array([len(text.ids) for text in self.texts], np.int32),
            text_ids=np.concatenate([text.ids for text in self.texts]),
            counted=np.concatenate([text.counted for text in self.texts]),
        )
        try:
            path.write_bytes(stream.getvalue())
        except OSError as error:
            raise UsageError("cannot write the file", found=error.strerror, where=f"--save {path}") from None

    @classmethod
    def read(cls, path: Path) -> SavedTokens:
        """Read such a file; nothing in it is run.

        Raises:
            UsageError: it is not one.
        """
        try:
            with np.load(path, allow_pickle=False) as data:
                head = json.loads(data["head"].tobytes())
                if head["version"] != VERSION:
                    raise ValueError(f"version {head['version']}")
                saved = cls(
                    name=str(head["name"]),
                    texts=_cut(data, list(map(str, head["domains"]))),
                    vocabulary=None if head["vocabulary"] is None else VocabularyPrint.from_json(head["vocabulary"]),
                    extra=dict(head["extra"]),
                    target=data["target"].astype(np.float64),
                    ids=data["ids"].astype(np.int64),
                    logs=data["logs"].astype(np.float64),
                )
                if len(saved.target) != len(text_of(saved.texts)) or saved.ids.shape != saved.logs.shape:
                    raise ValueError("its arrays do not belong together")
                return saved
        except OSError as error:
            raise UsageError("the saved run cannot be read", found=error.strerror or error, where=path) from None
        except (ValueError, KeyError, TypeError, AttributeError, EOFError, BadZipFile) as error:
            raise UsageError(
                "not a saved run",
                expected=f"what `exo-kimi compare DIR --save FILE` writes, version {VERSION}",
                found=f"{type(error).__name__}: {error}",
                where=path,
            ) from None


def _cut(data: Mapping[str, NDArray[Any]], domains: Sequence[str]) -> tuple[Encoded, ...]:
    """Texts laid end to end, each by itself."""
    ends = np.cumsum(data["lengths"])[:-1]
    ids, counted = np.split(data["text_ids"].astype(np.int32), ends), np.split(data["counted"].astype(bool), ends)
    return tuple(
        Encoded(ids=each, counted=some, domain=domain) for each, some, domain in zip(ids, counted, domains, strict=True)
    )


def text_of(texts: Sequence[Encoded]) -> NDArray[np.int64]:
    """(M,) the index of each counted token's text."""
    return np.repeat(np.arange(len(texts)), [int(text.counted[1:].sum()) for text in texts]).astype(np.int64)


def same_texts(one: Sequence[Encoded], other: Sequence[Encoded]) -> bool:
    """Whether two runs read the same tokens and count the same of them."""
    return len(one) == len(other) and all(
        np.array_equal(a.ids, b.ids) and np.array_equal(a.counted, b.counted) for a, b in zip(one, other, strict=True)
    )


def exact_kl(reference: Floats, subject: Floats) -> Floats:
    """(M,) KL of log-probabilities (M, vocab)."""
    kl: Floats = (np.exp(reference) * (reference - subject)).sum(axis=-1)
    return kl


def bounded_kl(reference: Floats, subject: Floats) -> Floats:
    """(M,) KL over T known tokens and all others together.

    Args:
        reference, subject: (M, T) log p of the same tokens; NaN where one is not known in either.
    """
    known = np.isfinite(reference) & np.isfinite(subject)
    p, q = (np.where(known, np.exp(np.where(known, each, 0.0)), 0.0) for each in (reference, subject))
    terms = np.where(known, p * (np.where(known, reference, 0.0) - np.where(known, subject, 0.0)), 0.0)
    rest_p, rest_q = (np.maximum(1 - each.sum(axis=-1), LEAST_PROBABILITY) for each in (p, q))
    kl: Floats = terms.sum(axis=-1) + rest_p * np.log(rest_p / rest_q)
    return np.maximum(kl, 0.0)


def pair_saved(reference: SavedTokens, subject: SavedTokens) -> TokenPairs:
    """Two saved runs over the same texts.

    Raises:
        UsageError: they are of other texts.
    """
    if not same_texts(reference.texts, subject.texts):
        raise UsageError(
            "the runs are over other texts, or with another vocabulary",
            expected=f"the {len(reference.texts)} texts of {reference.name}",
            found=f"the {len(subject.texts)} of {subject.name}",
            fix="compare the first run with the other directory: it then reads the same texts",
        )
    found = np.full(reference.logs.shape, np.nan)
    for place in range(len(found)):
        order = np.argsort(subject.ids[place])
        at = order[np.searchsorted(subject.ids[place], reference.ids[place], sorter=order).clip(max=len(order) - 1)]
        matches = subject.ids[place][at] == reference.ids[place]
        found[place][matches] = subject.logs[place][at[matches]]
    return TokenPairs(
        kl=bounded_kl(reference.logs, found),
        reference_loss=-reference.target,
        loss=-subject.target,
        same=reference.ids[:, 0] == subject.ids[:, 0],
        text_of=text_of(reference.texts),
        domains=tuple(text.domain for text in reference.texts),
        bound=True,
    )
