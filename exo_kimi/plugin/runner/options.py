"""Options of our engine inside exo's runners, which a node hands on to them by its environment."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from exo_kimi.errors import UsageError
from exo_kimi.experts.budget import DEFAULT_PREFETCH, ExpertCache
from exo_kimi.experts.direct import DEFAULT_READS
from exo_kimi.experts.options import ExpertOptions
from exo_kimi.experts.policies import DEFAULT_POLICY
from exo_kimi.experts.traces.growing import trace_file
from exo_kimi.runtime.engine.draft_policy import MOST_HEAD_DRAFTS, DraftTokens
from exo_kimi.units import parse_bytes

EXPERT_CACHE, EXPERT_POLICY = "EXO_KIMI_EXPERT_CACHE", "EXO_KIMI_EXPERT_POLICY"
EXPERT_PREFETCH, EXPERT_READS = "EXO_KIMI_EXPERT_PREFETCH", "EXO_KIMI_EXPERT_READS"
EXPERT_PROFILE, EXPERT_TRACE = "EXO_KIMI_EXPERT_PROFILE", "EXO_KIMI_TRACE_EXPERTS"
DRAFT, DRAFT_TOKENS = "EXO_KIMI_DRAFT", "EXO_KIMI_DRAFT_TOKENS"
ADAPTER = "EXO_KIMI_ADAPTER"
CONTEXT, KV_BYTES, PREFIX_BYTES = "EXO_KIMI_CONTEXT", "EXO_KIMI_KV_BYTES", "EXO_KIMI_PREFIX_CACHE_BYTES"


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions:
    """What a user may limit. Rank 0's node decides for all ranks of an instance.

    Args:
        context: most tokens of one sequence; None, or more than the placed plan or the model has, takes theirs.
        kv_bytes: budget of each rank for caches; None takes what is free.
        prefix_cache_bytes: of that, for prompts answered before; None takes what is left, 0 keeps none.
        draft: the directory of a draft head, on this node and on the last rank's, at a path of its own on each; None has none.
        draft_tokens: guesses of the head in a step: `auto`, or always so many.
    """

    context: int | None = None
    kv_bytes: int | None = None
    prefix_cache_bytes: int | None = None
    draft: Path | None = None
    draft_tokens: DraftTokens = "auto"

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] | None = None) -> EngineOptions:
        """Those of a runner.

        Raises:
            UsageError: a variable does not hold a number that makes sense, or asks for an adapter.
        """
        given = os.environ if environment is None else environment
        if given.get(ADAPTER):
            raise UsageError(
                "adapters are not served inside exo, whose requests name one model",
                found=given[ADAPTER],
                where=ADAPTER,
                fix="place what `exo-kimi convert DIR OUT --adapter PATH` makes, or serve by `exo-kimi serve --adapter`",
            )
        context = given.get(CONTEXT)
        if context is not None and (not context.isdecimal() or int(context) < 1):
            raise UsageError(
                f"{CONTEXT} is not a number of tokens", expected="a whole number of at least 1", found=context
            )
        return cls(
            context=None if context is None else int(context),
            kv_bytes=_size(given, KV_BYTES),
            prefix_cache_bytes=_size(given, PREFIX_BYTES),
            draft=draft_of(given),
            draft_tokens=_draft_tokens(given),
        )

    def to_environment(self) -> dict[str, str]:
        """The variables of what is set."""
        values = {
            CONTEXT: self.context,
            KV_BYTES: self.kv_bytes,
            PREFIX_BYTES: self.prefix_cache_bytes,
            DRAFT: self.draft,
            DRAFT_TOKENS: None if self.draft_tokens == "auto" else self.draft_tokens,
        }
        return {name: str(value) for name, value in values.items() if value is not None}


def draft_of(environment: Mapping[str, str] | None = None) -> Path | None:
    """Where this node has the draft head; None where nothing is said."""
    text = (os.environ if environment is None else environment).get(DRAFT)
    return Path(text).expanduser() if text else None


def _draft_tokens(given: Mapping[str, str]) -> DraftTokens:
    text = given.get(DRAFT_TOKENS, "auto")
    if text == "auto":
        return "auto"
    if not text.isdecimal() or int(text) > MOST_HEAD_DRAFTS:
        raise UsageError(
            f"{DRAFT_TOKENS} is not a number of guesses", expected=f"auto, or 0 to {MOST_HEAD_DRAFTS}", found=text
        )
    return int(text)


def expert_cache_of(environment: Mapping[str, str] | None = None) -> ExpertCache | None:
    """What this node may hold of the routed experts of its layers, each node for itself; None where nothing is said.

    Raises:
        UsageError: a variable does not hold a size, or names nothing that there is.
    """
    given = os.environ if environment is None else environment
    budget_bytes = _size(given, EXPERT_CACHE)
    if budget_bytes is None:
        return None
    profile = given.get(EXPERT_PROFILE)
    options = ExpertOptions(
        budget_bytes=budget_bytes,
        policy=given.get(EXPERT_POLICY, DEFAULT_POLICY),
        prefetch=given.get(EXPERT_PREFETCH, DEFAULT_PREFETCH),
        reads=given.get(EXPERT_READS, DEFAULT_READS),
        profile=None if profile is None else Path(profile).expanduser(),
    )
    return options.cache()


def expert_trace_of(stage: int, stages: int, environment: Mapping[str, str] | None = None) -> Path | None:
    """A stage's file for which experts are asked for: several nodes of one machine have one of their own each, named as those of
    `serve`. None where nothing is said."""
    given = os.environ if environment is None else environment
    text = given.get(EXPERT_TRACE)
    return None if not text else trace_file(Path(text).expanduser(), stage, stages)


def _size(given: Mapping[str, str], name: str) -> int | None:
    if (text := given.get(name)) is None:
        return None
    try:
        return parse_bytes(text)
    except UsageError as error:
        raise UsageError(f"{name} is not a size", expected="such as 64GB", found=text) from error
