"""Kimi K2 (and the text model of K2.5-2.7) for any range of layers, on mlx-lm's contract.

mlx-lm's names: `ModelArgs`, `Model(args)`, `__call__(inputs, cache)`, `layers`, `make_cache`, `sanitize`; attribute names
are the checkpoint keys, and layers keep their number in a stage. On top: `forward_ragged` and `logits` for the engine.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from exo_kimi.arch.config import KimiConfig
from exo_kimi.arch.geometry import check_quantizable
from exo_kimi.arch.modules import FLOAT32_PARAMETERS, check_range
from exo_kimi.arch.scratch import fitting_chunk
from exo_kimi.checkpoint.keys import layer_of
from exo_kimi.errors import UsageError
from exo_kimi.models import ops, projection
from exo_kimi.models.blocks import pieces_of
from exo_kimi.models.decode import MOST_MASK_BYTES, DecodeStep, RMSNorm, mask_bytes
from exo_kimi.models.expert_bank import StreamedExperts
from exo_kimi.models.features import FeatureTap
from exo_kimi.models.latent_cache import LatentCache8
from exo_kimi.models.mla import Attention, Span
from exo_kimi.models.moe import MLP, MoE
from exo_kimi.models.ops import CACHE_STEP, KVCache
from exo_kimi.models.rope import Rope
from exo_kimi.models.sanitize import sanitize

__all__ = ["CACHE_STEP", "Model", "ModelArgs"]

ModelArgs = KimiConfig

PIECE_LAYERS = 2
"""How many layers' graph is handed over at a time when decoding. Measured with the least of whole steps on 61 thin layers (CPU):
1 to 4 all take off what building the graph takes; on Metal each piece is a command buffer at least."""


def _is_floating(dtype: mx.Dtype) -> bool:
    return bool(mx.issubdtype(dtype, mx.floating))


class DecoderLayer(nn.Module):
    """h + mlp(norm(h)) with h = x + attention(norm(x))."""

    def __init__(self, config: KimiConfig, layer: int, rope: Rope | None) -> None:
        super().__init__()
        self.self_attn = self.attention(config, layer, rope)
        experts = config.routed_experts(layer)
        self.mlp = MoE(config, experts) if experts else MLP(config.hidden_size, config.intermediate_size)
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    @staticmethod
    def attention(config: KimiConfig, layer: int, rope: Rope | None) -> Any:
        """The attention of a layer by its number."""
        return Attention(config, rope)

    def __call__(self, x: mx.array, positions: mx.array, spans: Sequence[Span], caches: Sequence[Any]) -> mx.array:
        """(N, D) to (N, D); arguments as in `Attention`."""
        h = x + self.self_attn(self.input_layernorm(x), positions, spans, caches)
        return h + self.mlp(self.post_attention_layernorm(h))

    def decode(self, x: mx.array, step: DecodeStep, caches: Sequence[Any]) -> mx.array:
        """The same of single tokens, (N, 1, 1, D) to (N, 1, 1, D); arguments as in `Attention.decode`."""
        h = x + self["self_attn"].decode(self["input_layernorm"].decode(x, step), step, caches)
        return h + self["mlp"].decode(self["post_attention_layernorm"].decode(h, step), step)


class KimiK2Model(nn.Module):
    """The decoder without its head. Layers outside the range are None, so that those inside keep their number."""

    layer_type: ClassVar = DecoderLayer

    def __init__(self, config: KimiConfig, start_layer: int, end_layer: int, *, embeds: bool, norms: bool) -> None:
        super().__init__()
        if embeds:
            self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        rope = None if config.rope_theta is None else Rope.of(config)
        owned = [self.layer_type(config, layer, rope) for layer in range(start_layer, end_layer)]
        self.rope, self.layers = rope, [None] * start_layer + owned
        if norms:
            self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)


class Model(nn.Module):
    """A Kimi K2, or the stage of it that owns the layers `start_layer` to `end_layer` (half-open).

    Args:
        args: the model's config.
        start_layer: a stage that starts at 0 owns the embedding and takes tokens; others take hidden states.
        end_layer: None for the last; a stage that ends there owns the final norm and head and gives logits.
        layers_only: own nothing but the layers, wherever they are.

    Attributes:
        decodes: whether `forward_ragged` takes single tokens through `decode`; `fuse_projections` sets it.
        piece_layers: how many layers' graph `decode` hands over at a time; 0 leaves everything to whoever evaluates the result,
            which is the oracle and what counts a whole graph.
        streamed: the layers whose experts stay on disk; None where all are held.

    Raises:
        SplitError: the range is empty or outside the model.
    """

    decoder_type: ClassVar = KimiK2Model

    def __init__(
        self, args: KimiConfig, start_layer: int = 0, end_layer: int | None = None, *, layers_only: bool = False
    ) -> None:
        super().__init__()
        end_layer = args.num_hidden_layers if end_layer is None else end_layer
        check_range(args, start_layer, end_layer)
        self.args = args
        self.model_type = args.model_type
        self.start_layer, self.end_layer = start_layer, end_layer
        self.is_first = start_layer == 0 and not layers_only
        self.is_last = end_layer == args.num_hidden_layers and not layers_only
        self.model = self.decoder_type(args, start_layer, end_layer, embeds=self.is_first, norms=self.is_last)
        if self.is_last:
            self.lm_head = nn.Linear(args.hidden_size, args.vocab_size, bias=False)
        self.decodes, self.piece_layers = False, PIECE_LAYERS
        self.set_scratch_bytes(ops.SCRATCH_BYTES)
        self.kv_bits: int | None = None
        self.streamed: StreamedExperts | None = None

    @property
    def layers(self) -> list[DecoderLayer]:
        """The owned layers, the first at index 0."""
        return [layer for layer in self.model.layers[self.start_layer :] if layer is not None]

    def set_scratch_bytes(self, scratch_bytes: int) -> None:
        """What a pass may take at most beside weights and caches: attention cuts its blocks by it, and `forward_ragged` its
        tokens (not into pieces below `arch.scratch.CHUNK_FLOOR`)."""
        self.scratch_bytes = scratch_bytes
        for layer in self.layers:
            layer.self_attn.scratch_bytes = scratch_bytes

    def set_kv_bits(self, kv_bits: int | None) -> None:
        """Bits of the caches made from now on: 8, or None for those of the activations.

        Raises:
            UsageError: other bits, or a model whose latents do not divide into groups.
        """
        if kv_bits not in (None, 8):
            raise UsageError("no such cache", expected="8 bits", found=kv_bits, where="--kv-bits")
        if kv_bits is not None:
            check_quantizable(self.args)
            ops.know_cache(LatentCache8)
        self.kv_bits = kv_bits

    def make_cache(self) -> list[Any]:
        """Empty caches of one sequence, one per owned layer, as its attention has them."""
        return [layer.self_attn.make_cache(self.kv_bits) for layer in self.layers]

    @staticmethod
    def cache_nbytes(caches: Sequence[Any]) -> int:
        """Bytes allocated by the caches of one sequence: its length rounded up to CACHE_STEP tokens."""
        return sum(int(cache.nbytes) for cache in caches)

    def __call__(self, inputs: mx.array, cache: Sequence[Any] | None = None) -> mx.array:
        """One pass over B sequences of L tokens each, as mlx-lm calls it.

        Args:
            inputs: (B, L) token ids on the first stage, else (B, L, D) hidden states.
            cache: one mlx-lm cache per owned layer, which grows by L; None keeps nothing.

        Returns:
            (B, L, vocab) logits on the last stage, else (B, L, D) hidden states.
        """
        caches = [None] * len(self.layers) if cache is None else list(cache)
        h = self.model.embed_tokens(inputs) if self.is_first else inputs
        batch, length, hidden = h.shape
        offset = 0 if caches[0] is None else caches[0].offset
        first = offset[:, None] if isinstance(offset, mx.array) else mx.array(offset)
        positions = mx.broadcast_to(first + mx.arange(length), (batch, length)).astype(mx.int32).reshape(-1)
        span = Span(batch, length, ops.attention_mask(h, caches[0]))
        h = h.reshape(batch * length, hidden)
        for layer, layer_cache in zip(self.layers, caches, strict=True):
            h = layer(h, positions, [span], [layer_cache])
        h = h.reshape(batch, length, hidden)
        return self.lm_head(self.model.norm(h)) if self.is_last else h

    def part(self, first: int, last: int) -> Model:
        """Some of the owned layers, [first, last) counted from the first, as a model that owns nothing else and shares them."""
        part = copy.copy(self)
        part.model = copy.copy(self.model)
        chosen: list[DecoderLayer | None] = [*self.layers[first:last]]
        part.model.layers = chosen
        part.start_layer, part.end_layer = 0, last - first
        part.is_first = part.is_last = False
        return part

    def embed(self, tokens: mx.array) -> mx.array:
        """(N,) token ids to (N, D), on the first stage."""
        vectors: mx.array = self.model.embed_tokens(tokens)
        return vectors

    def forward_ragged(
        self,
        x: mx.array,
        segments: Sequence[tuple[int, Sequence[KVCache]]],
        *,
        asked: Sequence[int] | None = None,
        tap: FeatureTap | None = None,
    ) -> mx.array:
        """One pass over several sequences laid end to end, prefill chunks and single tokens mixed.

        Args:
            x: (N,) int32 token ids on the first stage, else (N, D) hidden states; there too, where some tokens are not those
                of `embed`.
            segments: for each sequence its number of tokens here (they sum to N) and its caches, which grow by it.
            asked: for each segment how many tokens at its end somebody asks for, as a sampler for the last of a prompt; None:
                all. Of the others the last layer only takes in keys and values, and what is returned means nothing.
            tap: notes the features of these layers, of all tokens (what leaves the last layer: of those that are asked for).

        Returns:
            (N, D) hidden states, before the final norm on the last stage.
        """
        if self.takes_decode(segments):
            lengths = [length for length, _ in segments]
            return self.decode(x, [caches for _, caches in segments], lengths=lengths, tap=tap)
        total = sum(length for length, _ in segments)
        longest = max(caches[0].offset + length for length, caches in segments)
        element_bytes = self.layers[0].input_layernorm.weight.dtype.size
        chunk = fitting_chunk(self.args, total, longest, scratch_bytes=self.scratch_bytes, element_bytes=element_bytes)
        asked = [length for length, _ in segments] if asked is None else asked
        if chunk == total:
            return self._pass(x, segments, asked, tap)
        outputs: list[mx.array] = []
        for rows, pieces, ends in pieces_of(segments, asked, chunk):
            outputs.append(self._pass(x[rows], pieces, ends, tap))
            # Or the graph of the next piece would hold this one's arrays.
            noted = tap.rows if tap is not None else []
            mx.eval(outputs[-1], noted, [cache.state for _, caches in pieces for cache in caches])
        return mx.concatenate(outputs)

    def takes_decode(self, segments: Sequence[tuple[int, Sequence[Any]]]) -> bool:
        """Whether `forward_ragged` goes through `decode`: every sequence has a cache of ours, and one new token or, where all
        layers can, a run of few."""
        layers = self.layers
        first = layers[0].self_attn
        if not self.decodes or not all(first.takes(caches[0], length) for length, caches in segments):
            return False
        runs = [(length, caches) for length, caches in segments if length > 1]
        if not all(
            layer.self_attn.takes(cache, length)
            for length, caches in runs
            for layer, cache in zip(layers, caches, strict=True)
        ):
            return False
        masked = mask_bytes(
            [caches[0].offset for _, caches in runs],
            [length for length, _ in runs],
            heads=self.args.num_attention_heads,
            element_bytes=self.layers[0].input_layernorm.weight.dtype.size,
        )
        return masked <= MOST_MASK_BYTES

    def decode(
        self,
        x: mx.array,
        caches: Sequence[Sequence[Any]],
        *,
        lengths: list[int] | None = None,
        tap: FeatureTap | None = None,
    ) -> mx.array:
        """One new token of each sequence, or a few, in as few MLX primitives as possible; the layers' calls are its oracle.

        What a step can share is made once and not in each layer, and MLX begins with the first layers while Python builds the
        graph of those after them.

        Args:
            x: (N,) int32 token ids on the first stage, else (N, D) hidden states, those of a sequence in a row.
            caches: of each sequence, one per layer, which grow by its tokens.
            lengths: tokens of each; None for one.
            tap: see `forward_ragged`.

        Returns:
            (N, D) hidden states, before the final norm on the last stage.
        """
        h = self.embed(x) if x.ndim == 1 else x
        layers, tokens = self.layers, h.shape[0]
        offsets = [own[0].offset for own in caches]
        chosen = self.args.num_experts_per_tok
        step = DecodeStep(self.model.rope, offsets, h.dtype, chosen=chosen, lengths=lengths)
        h = h.reshape(tokens, 1, 1, -1)
        wanted = tap.layers if tap is not None else ()
        for number, (layer, own) in enumerate(zip(layers, zip(*caches, strict=True), strict=True), start=1):
            if tap is not None and self.start_layer + number - 1 in wanted:
                tap.note(self.start_layer + number - 1, h.reshape(tokens, -1))
            h = layer.decode(h, step, own)
            if self.piece_layers and number % self.piece_layers == 0:
                mx.async_eval(h)  # type: ignore[no-untyped-call]
        h = h.reshape(tokens, -1)
        if tap is not None and self.is_last:
            tap.note(self.end_layer, h)
        return h

    def _pass(
        self,
        x: mx.array,
        segments: Sequence[tuple[int, Sequence[KVCache]]],
        asked: Sequence[int],
        tap: FeatureTap | None,
    ) -> mx.array:
        positions = mx.concatenate(
            [mx.arange(caches[0].offset, caches[0].offset + length, dtype=mx.int32) for length, caches in segments]
        )
        spans = [_span(length) for length, _ in segments]
        h = self.embed(x) if x.ndim == 1 else x
        *layers, last = self.layers
        tap = tap if tap is not None else FeatureTap(())
        for index, layer in enumerate(layers):
            tap.note(self.start_layer + index, h)
            h = layer(h, positions, spans, [caches[index] for _, caches in segments])
        tap.note(self.end_layer - 1, h)
        own = [caches[-1] for _, caches in segments]
        if all(count == length for count, (length, _) in zip(asked, segments, strict=True)):
            h = last(h, positions, spans, own)
        else:
            h = _end(last, h, positions, [length for length, _ in segments], asked, own)
        if self.is_last:
            tap.note(self.end_layer, h)
        return h

    def logits(self, hidden: mx.array) -> mx.array:
        """(n, vocab) float32 logits of (n, D) hidden states, on the last stage."""
        return self.lm_head(self.model.norm(hidden)).astype(mx.float32)

    def groups(self) -> Iterator[tuple[str, Any, tuple[str, ...]]]:
        """Modules with projections that can lie in one array and do not: path, module, names of the projections."""
        for path, module in self.named_modules():
            names = getattr(module, "together", ())
            parts = [module[name] for name in names if name in module]
            if getattr(module, "bank", None) is not None:
                continue  # slots are written in place: they stay the memory that they are
            if names and len(parts) == len(names) and projection.agree(parts) and not projection.are_one(module, parts):
                yield path, module, names

    def fuse_projections(self) -> None:
        """Make decoding fast, once every weight is in place: `forward_ragged` takes single tokens through `decode`.

        Projections of one input share an array wherever their bits agree (one module at a time is held twice meanwhile), and
        router weights become float32. Call it again after replacing any of them; whatever else `decode` makes of weights once is
        made again when they are replaced.
        """
        for module in self.modules():
            parts = [module[name] for name in getattr(module, "together", ()) if name in module]
            if parts and not projection.are_one(module, parts):
                module.fused = None
        for _, module, names in list(self.groups()):
            module.fused = projection.fuse([module[name] for name in names])
        for layer in self.layers:
            if isinstance(layer.mlp, MoE):
                layer.mlp.gate.widen()
        self.decodes = True

    def set_dtype(self, dtype: mx.Dtype, predicate: Callable[[mx.Dtype], bool] | None = _is_floating) -> None:
        """As of every MLX module, but what `cast_predicate` names stays float32: a correction bias in bf16 sends tokens to other
        experts."""
        kept = [(path, value) for path, value in tree_flatten(self.parameters()) if not self.cast_predicate(path)]
        super().set_dtype(dtype, predicate)
        self.update(tree_unflatten(kept))
        if self.decodes:
            self.fuse_projections()

    def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        """Checkpoint tensors under this model's names, for mlx-lm's loaders; see `models.sanitize`.

        Where the checkpoint holds `embed_q` and `unembed_out`, the model's attention is changed to hold them too.
        """
        named = sanitize(weights, prefix=self.args.key_prefix, owns=self._owns)
        for index, layer in enumerate(self.layers, start=self.start_layer):
            if f"model.layers.{index}.self_attn.embed_q.weight" in named:
                layer.self_attn.use_absorbed_modules()
        return named

    def _owns(self, name: str) -> bool:
        layer = layer_of(name)
        if layer is not None:
            return self.start_layer <= layer < self.end_layer and not name.endswith("rotary_emb.inv_freq")
        if name.startswith("model.embed_tokens."):
            return self.is_first
        return self.is_last and name.startswith(("model.norm.", "lm_head."))

    @property
    def cast_predicate(self) -> Any:
        """mlx-lm's question which parameters follow a change of dtype."""
        return lambda path: path.rpartition(".")[2] not in FLOAT32_PARAMETERS


def _span(length: int) -> Span:
    return Span(1, length, None if length == 1 else "causal")


def _end(
    layer: DecoderLayer,
    h: mx.array,
    positions: mx.array,
    lengths: Sequence[int],
    asked: Sequence[int],
    caches: Sequence[Any],
) -> mx.array:
    """The last layer: of each segment the tokens before those that are asked for are remembered, and no more."""
    ends = np.cumsum(lengths)
    late = np.concatenate([np.arange(end - count, end) for end, count in zip(ends, asked, strict=True)])
    early = np.setdiff1d(np.arange(ends[-1]), late)
    before = [
        (length - count, cache) for length, count, cache in zip(lengths, asked, caches, strict=True) if length > count
    ]
    rows = mx.array(early.astype(np.int32))
    spans = [_span(count) for count, _ in before]
    layer.self_attn.remember(layer.input_layernorm(h[rows]), positions[rows], spans, [cache for _, cache in before])
    if len(late):
        rows = mx.array(late.astype(np.int32))
        after = [(count, cache) for count, cache in zip(asked, caches, strict=True) if count]
        h[rows] = layer(h[rows], positions[rows], [_span(count) for count, _ in after], [cache for _, cache in after])
    return h
