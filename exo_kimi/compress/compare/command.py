"""`exo-kimi compare`: two sides, each a directory, a saved run or a running server, and what is measured of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from exo_kimi.checkpoint.checkpoint import Checkpoint
from exo_kimi.compress.compare.comparison import ModelComparison
from exo_kimi.compress.compare.gates import gates_of
from exo_kimi.compress.compare.replies import Behaviour, ModelReplier, Replier, behave
from exo_kimi.compress.compare.score import Score
from exo_kimi.compress.compare.server import ModelServer, server_tokens
from exo_kimi.compress.compare.tokens import SavedTokens, TokenPairs, pair_saved
from exo_kimi.compress.compare.walks import (
    TOP,
    LayerError,
    compare_walks,
    compare_with_saved,
    save_walk,
)
from exo_kimi.compress.compare.weights import WeightError, weight_errors
from exo_kimi.compress.layers import LayerWalk
from exo_kimi.compress.prune.mask import mask, masking
from exo_kimi.compress.prune.plan import PLAN_NAME, PrunePlan, read_plan
from exo_kimi.compress.texts.encoding import Encoded, Encoder
from exo_kimi.compress.texts.prompts import DomainPrompt, domain_prompts
from exo_kimi.compress.texts.reading import GivenConversation, read_texts
from exo_kimi.compress.texts.vocabulary import VocabularyPrint, check_same_vocabulary
from exo_kimi.errors import UsageError
from exo_kimi.planner.weights.bytes import ModelBytes, bytes_of_manifest
from exo_kimi.planner.weights.measured import pruned_bytes
from exo_kimi.runtime.loading.loader import load
from exo_kimi.runtime.stage.memory import free_memory
from exo_kimi.runtime.stage.resident import give_back_memory
from exo_kimi.units import format_bytes

Say = Callable[[str], None]
_SCORES = ("without_loop", "closed", "called", "calls_valid")


@dataclass(frozen=True, slots=True, kw_only=True)
class CompareOptions:
    """What the command line says, see `exo-kimi compare --help`.

    Args:
        files: texts to read; the project's prompts with their replies when there are none.
        count: prompts of each domain.
        seed: of the prompts.
        domains: of the prompts; all when empty.
        most_tokens: of the texts together; None for all.
        max_tokens: of a reply.
        replies: whether both are asked.
        weights: whether weights are compared module by module.
        dtype: of activations; None as stored.
        api_key: for servers.
        plan: to try out on the first.
        top: tokens of a place that a saved run keeps.
    """

    files: tuple[Path, ...] = ()
    count: int = 20
    seed: int = 0
    domains: tuple[str, ...] = ()
    most_tokens: int | None = None
    max_tokens: int = 256
    replies: bool = True
    weights: bool = False
    dtype: str | None = None
    api_key: str | None = None
    plan: Path | None = None
    top: int = TOP


@dataclass(frozen=True, slots=True, kw_only=True)
class _DirectorySide:
    """A checkpoint, perhaps behind a plan's mask."""

    checkpoint: Checkpoint
    plan: PrunePlan | None = None

    @property
    def name(self) -> str:
        name = self.checkpoint.directory.name
        return name if self.plan is None else f"{name}, {self.plan.keep_text} of {self.plan.experts} experts"

    def walk(self, dtype: str | None) -> LayerWalk:
        if self.plan is None:
            return LayerWalk(checkpoint=self.checkpoint, dtype=dtype)
        return LayerWalk(
            checkpoint=self.checkpoint,
            dtype=dtype,
            change=masking(self.plan, self.checkpoint.config),
            skipped=self.plan.dropped_layers,
        )

    def replier(self, encoder: Encoder, options: CompareOptions) -> Replier | None:
        """The model in memory; None where it does not fit."""
        if self.checkpoint.manifest().resident_bytes > free_memory().free_bytes:
            return None
        model = load(self.checkpoint.directory, dtype=options.dtype)
        if self.plan is not None:
            mask(model, self.plan)
        return ModelReplier(
            model=model, tokenizer=encoder.tokenizer, template=encoder.template, max_tokens=options.max_tokens
        )


_Side = _DirectorySide | SavedTokens | ModelServer


def save(directory: Path, output: Path, options: CompareOptions, *, say: Say) -> None:
    """The first of two runs: one model's log-probabilities and replies, for a second run on another machine.

    Raises:
        UsageError: no text, or the file cannot be written.
        CheckpointError, StageOutOfMemoryError: the model cannot be read, or a layer does not fit.
    """
    side = _directory(directory, options)
    encoder = Encoder.from_directory(directory)
    prompts, texts = _texts(encoder, options)
    saved = save_walk(side.walk(options.dtype), texts, name=side.name, top=options.top, say=say)
    behaviour, notes = _behaviour(side, encoder, prompts, options, say)
    extra: dict[str, Any] = {"notes": notes, "plan": "" if side.plan is None else side.plan.hash}
    if behaviour is not None:
        extra["behaviour"] = {name: [each.right, each.count] for name, each in _scores(behaviour)}
    replace(saved, extra=extra).save(output)


def compare(first: str, second: str | None, options: CompareOptions, *, say: Say) -> ModelComparison:
    """Measure the second model by the first; with a plan and no second, the masked model by the whole one.

    Args:
        first: a directory, a saved run, or a server's address: the reference.
        second: the same of the subject.
        options: how.
        say: called with lines of progress.

    Raises:
        UsageError: sides that cannot be compared, or no text.
        TokenizerError: two directories whose tokenizers differ.
        CheckpointError, StageOutOfMemoryError: a model cannot be read, or a layer does not fit.
        RuntimeFault: a server went away.
    """
    if second is None and options.plan is None:
        raise UsageError("nothing to compare with", expected="DIR2, --plan PLAN.json, or --save FILE for a first run")
    plain = replace(options, plan=None)
    reference = _side(first, plain if second is None else options, masked=False)
    subject = _side(first if second is None else second, options, masked=True)
    if isinstance(reference, _DirectorySide) and isinstance(subject, _DirectorySide):
        check_same_vocabulary(reference.checkpoint, subject.checkpoint)
    elif (ours := _vocabulary(reference)) is not None and (theirs := _vocabulary(subject)) is not None:
        ours.check_same(theirs, where=f"{_name(reference)} and {_name(subject)}")
    encoder = _encoder(reference, subject)
    prompts, texts = _texts(encoder, options)
    measured = _measure(reference, subject, texts, prompts, encoder, options, say)
    behaviours, notes = _behaviours(reference, subject, encoder, prompts, options, say)
    plan = _plan_of(subject)
    return ModelComparison(
        reference=_name(reference),
        subject=_name(subject),
        plan="" if plan is None else plan.hash,
        overall=measured.pairs.summary(),
        by_domain=_by_domain(measured.pairs),
        kl=measured.pairs.kl,
        layers=measured.layers,
        weights=_weights(reference, subject) if options.weights else (),
        behaviours=behaviours,
        gates=() if behaviours is None else gates_of(*behaviours),
        model=_bytes(subject),
        notes=(*measured.notes, *notes),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Measured:
    pairs: TokenPairs
    layers: tuple[LayerError, ...] = ()
    notes: tuple[str, ...] = field(default=())


def _measure(
    reference: _Side,
    subject: _Side,
    texts: Sequence[Encoded],
    prompts: Sequence[DomainPrompt],
    encoder: Encoder | None,
    options: CompareOptions,
    say: Say,
) -> _Measured:
    if isinstance(reference, _DirectorySide) and isinstance(subject, _DirectorySide):
        pairs, layers = compare_walks(reference.walk(options.dtype), subject.walk(options.dtype), texts, say=say)
        return _Measured(pairs=pairs, layers=layers)
    bound = "KL counts all but the likeliest tokens of a place as one: it is a lower bound"
    if isinstance(reference, ModelServer) or isinstance(subject, ModelServer):
        server, other = (reference, subject) if isinstance(reference, ModelServer) else (subject, reference)
        if not isinstance(server, ModelServer) or not isinstance(other, _DirectorySide) or encoder is None:
            raise UsageError(
                "a server can be compared with a directory only",
                expected="DIR on the other side: it reads the tokens that the server chose",
            )
        said = server_tokens(server, prompts, encoder, say=say)
        notes = (bound, "measured on the server's own greedy replies, of which it tells 20 tokens a place")
        if server is reference:
            return _Measured(pairs=compare_with_saved(said, other.walk(options.dtype), say=say), notes=notes)
        mine = save_walk(other.walk(options.dtype), said.texts, name=other.name, top=options.top, say=say)
        return _Measured(pairs=pair_saved(mine, said), notes=notes)
    if isinstance(reference, SavedTokens) and isinstance(subject, SavedTokens):
        return _Measured(pairs=pair_saved(reference, subject), notes=(bound,))
    if isinstance(reference, SavedTokens):
        pairs = compare_with_saved(reference, _walk_of(subject, options), say=say)
        return _Measured(pairs=pairs, notes=(bound,))
    if not isinstance(subject, SavedTokens):  # no kind of side is left
        raise UsageError("these two cannot be compared")
    mine = save_walk(_walk_of(reference, options), subject.texts, name=_name(reference), top=options.top, say=say)
    return _Measured(pairs=pair_saved(mine, subject), notes=(bound,))


def _walk_of(side: _Side, options: CompareOptions) -> LayerWalk:
    if not isinstance(side, _DirectorySide):
        raise UsageError("a saved run can be compared with a directory or another run", found=_name(side))
    return side.walk(options.dtype)


def _texts(encoder: Encoder | None, options: CompareOptions) -> tuple[list[DomainPrompt], list[Encoded]]:
    prompts = domain_prompts(options.count, options.seed, options.domains)
    if encoder is None:  # two saved runs
        return prompts, []
    if options.files:
        return prompts, read_texts(options.files, encoder, most_tokens=options.most_tokens)
    texts = [
        encoder.encode(GivenConversation(messages=prompt.messages, tools=prompt.tools), domain=prompt.domain)
        for prompt in prompts
    ]
    if options.most_tokens is not None:
        total, kept = 0, []
        for text in texts:
            total += len(text.ids)
            kept += [text] if total <= options.most_tokens else []
        texts = kept
    return prompts, texts


def _side(text: str, options: CompareOptions, *, masked: bool) -> _Side:
    if text.startswith(("http://", "https://")):
        return ModelServer.open(text, api_key=options.api_key, max_tokens=options.max_tokens)
    path = Path(text)
    if path.is_file():
        return SavedTokens.read(path)
    return _directory(path, options if masked else replace(options, plan=None))


def _directory(path: Path, options: CompareOptions) -> _DirectorySide:
    checkpoint = Checkpoint(path)
    plan = None if options.plan is None else read_plan(options.plan)
    if plan is not None:
        plan.check(checkpoint.config)
    return _DirectorySide(checkpoint=checkpoint, plan=plan)


def _encoder(*sides: _Side) -> Encoder | None:
    directory = next((side.checkpoint.directory for side in sides if isinstance(side, _DirectorySide)), None)
    return None if directory is None else Encoder.from_directory(directory)


def _name(side: _Side) -> str:
    return side.url if isinstance(side, ModelServer) else side.name


def _vocabulary(side: _Side) -> VocabularyPrint | None:
    """None of a server, whose tokens come as text."""
    if isinstance(side, _DirectorySide):
        return VocabularyPrint.of(side.checkpoint)
    return side.vocabulary if isinstance(side, SavedTokens) else None


def _plan_of(side: _Side) -> PrunePlan | None:
    """The plan that made the subject: tried out on it, or in its directory."""
    if not isinstance(side, _DirectorySide):
        return None
    inside = side.checkpoint.directory / PLAN_NAME
    return side.plan or (read_plan(inside) if inside.is_file() else None)


def _behaviours(
    reference: _Side,
    subject: _Side,
    encoder: Encoder | None,
    prompts: Sequence[DomainPrompt],
    options: CompareOptions,
    say: Say,
) -> tuple[tuple[Behaviour, Behaviour] | None, tuple[str, ...]]:
    found, notes = [], []
    for side in (reference, subject):
        behaviour, told = _behaviour(side, encoder, prompts, options, say)
        notes += told
        if behaviour is None:
            return None, tuple(notes)
        found.append(behaviour)
    return (found[0], found[1]), tuple(notes)


def _behaviour(
    side: _Side, encoder: Encoder | None, prompts: Sequence[DomainPrompt], options: CompareOptions, say: Say
) -> tuple[Behaviour | None, list[str]]:
    if not options.replies:
        return None, []
    if isinstance(side, SavedTokens):
        raw = side.extra.get("behaviour")
        if raw is None:
            return None, [f"{side.name}: its run saved no replies"]
        return Behaviour(**{name: Score(right=raw[name][0], count=raw[name][1]) for name in _SCORES}), []
    if isinstance(side, ModelServer):
        say(f"{side.url}: {len(prompts)} prompts")
        return behave(side, prompts), []
    replier = None if encoder is None else side.replier(encoder, options)
    if replier is None:
        size = format_bytes(side.checkpoint.manifest().resident_bytes)
        return None, [
            f"{side.name}: no replies, {size} do not fit into this machine's memory; serve it and give the address"
        ]
    say(f"{side.name}: {len(prompts)} prompts")
    behaviour = behave(replier, prompts)
    del replier
    give_back_memory()
    return behaviour, []


def _scores(behaviour: Behaviour) -> list[tuple[str, Score]]:
    return [(name, getattr(behaviour, name)) for name in _SCORES]


def _by_domain(pairs: TokenPairs) -> dict[str, Any]:
    present = [pairs.domains[text] for text in sorted(set(pairs.text_of.tolist()))]
    domains = list(dict.fromkeys(present))
    return {domain: pairs.of_domain(domain).summary() for domain in domains} if len(domains) > 1 else {}


def _weights(reference: _Side, subject: _Side) -> tuple[WeightError, ...]:
    if not isinstance(reference, _DirectorySide) or not isinstance(subject, _DirectorySide):
        raise UsageError("weights are compared between two directories", where="--weights")
    return tuple(weight_errors(reference.checkpoint, subject.checkpoint, _plan_of(subject)))


def _bytes(side: _Side) -> ModelBytes | None:
    """What the subject takes in memory; behind a plan's mask, what it would take once it is written."""
    if not isinstance(side, _DirectorySide):
        return None
    model = bytes_of_manifest(side.checkpoint.manifest(), name=side.name)
    if side.plan is None:
        return model
    return pruned_bytes(model, {layer: len(ids) for layer, ids in side.plan.kept.items()}, side.plan.dropped_layers)
