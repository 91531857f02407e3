"""The vision tower of Kimi K2.5 and later (MoonViT) and its projector: from the pixels of a picture to one vector a media token.

Attribute names are the checkpoint keys. A picture attends to itself alone; so do the frames of a film together. Attention goes by
groups of heads and blocks of queries, so that a large picture stays inside the scratch budget.

Source: equations of MoonViT as published with Kimi-VL (Moonshot AI, 2025) and Kimi-K2.5.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import numpy.typing as npt

from exo_kimi.arch.vision import CHANNELS, NORM_EPS, ROPE_THETA, Grid, VisionConfig
from exo_kimi.models import ops

Turns = tuple[mx.array, mx.array]
"""Cosines and sines of the rotary angles, each (patches, head_dim / 2) float32."""
CUBIC = -0.75
"""Of the bicubic kernel, as torch has it."""


class VisionMLP(nn.Module):
    """fc1(gelu(fc0(x))), with the tanh form of gelu."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.fc0 = nn.Linear(config.vt_hidden_size, config.vt_intermediate_size)
        self.fc1 = nn.Linear(config.vt_intermediate_size, config.vt_hidden_size)

    def __call__(self, x: mx.array) -> mx.array:
        return self.fc1(_gelu_tanh(self.fc0(x)))


class VisionBlock(nn.Module):
    """x + wo(attention(norm0(x))), then + mlp(norm1(x)). The rows of `wqkv` are q, k and v, each by head."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        hidden = config.vt_hidden_size
        self.config = config
        self.norm0 = nn.LayerNorm(hidden, eps=NORM_EPS)
        self.norm1 = nn.LayerNorm(hidden, eps=NORM_EPS)
        self.wqkv = nn.Linear(hidden, 3 * hidden)
        self.wo = nn.Linear(hidden, hidden)
        self.mlp = VisionMLP(config)

    def __call__(self, x: mx.array, turns: Turns, scratch_bytes: int) -> mx.array:
        """(patches, D) to (patches, D)."""
        x = x + self.wo(self._attention(self.norm0(x), turns, scratch_bytes))
        mx.eval(x)
        h = self.norm1(x)
        patches, width = x.shape[0], self.config.vt_intermediate_size
        free = scratch_bytes - self.config.fixed_bytes(patches, element_bytes=x.dtype.size)
        rows = max(1, min(patches, free // (3 * width * x.dtype.size)))
        parts = []
        for start in range(0, patches, rows):
            parts.append(self.mlp(h[start : start + rows]))
            mx.eval(parts[-1])
        return x + (parts[0] if len(parts) == 1 else mx.concatenate(parts))

    def _attention(self, h: mx.array, turns: Turns, scratch_bytes: int) -> mx.array:
        config, element = self.config, h.dtype.size
        patches, heads, width = h.shape[0], config.vt_num_attention_heads, config.head_dim
        free = scratch_bytes - config.fixed_bytes(patches, element_bytes=element)
        # Half for queries, keys and values, half for scores.
        group = max(1, min(heads, free // 2 // config.heads_bytes(1, patches, element_bytes=element)))
        rows = max(1, min(patches, free // 2 // config.row_bytes(group, patches, element_bytes=element)))
        outputs = []
        for first in range(0, heads, group):
            last = min(first + group, heads)
            q, k, v = (self._heads(h, part, first, last) for part in range(3))
            q, k = _turn(q, turns), _turn(k, turns)
            blocks = []
            for start in range(0, patches, rows):
                query = q[None, :, start : start + rows]
                blocks.append(mx.fast.scaled_dot_product_attention(query, k[None], v[None], scale=width**-0.5)[0])
                mx.eval(blocks[-1])
            out = blocks[0] if len(blocks) == 1 else mx.concatenate(blocks, axis=1)
            outputs.append(out.transpose(1, 0, 2).reshape(patches, -1))
        return outputs[0] if len(outputs) == 1 else mx.concatenate(outputs, axis=1)

    def _heads(self, h: mx.array, part: int, first: int, last: int) -> mx.array:
        """Queries (part 0), keys or values of some heads, (heads, patches, head_dim)."""
        hidden, width = self.config.vt_hidden_size, self.config.head_dim
        rows = slice(part * hidden + first * width, part * hidden + last * width)
        x = mx.addmm(self.wqkv.bias[rows], h, self.wqkv.weight[rows].T)
        return x.reshape(h.shape[0], last - first, width).transpose(1, 0, 2)


class PositionTable(nn.Module):
    """A learned vector for each place of a grid, `weight` (rows, columns, D), resampled to the grid of a picture."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.frames = config.init_pos_emb_time
        shape = (config.init_pos_emb_height, config.init_pos_emb_width, config.vt_hidden_size)
        self.weight = mx.zeros(shape)

    def __call__(self, grid: Grid) -> mx.array:
        """(patches, D) float32: bicubic in rows and columns, and for films plus sin and cos of the frame's number."""
        height, width, hidden = self.weight.shape
        down = mx.array(cubic_weights(height, grid.rows))
        across = mx.array(cubic_weights(width, grid.columns))
        table = mx.einsum("hi,iwd->hwd", down, self.weight.astype(mx.float32))
        places = mx.einsum("wj,hjd->hwd", across, table).reshape(-1, hidden)
        if grid.frames == 1:
            return places
        frames = mx.array(frame_vectors(grid.frames, hidden))
        return (frames[:, None] + places[None]).reshape(-1, hidden)


class PatchEmbed(nn.Module):
    """A picture's patches as vectors, with their places. `proj` is a convolution whose step is its width: a product."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        patch = config.patch_size
        self.proj = Convolution(config.vt_hidden_size, patch)
        self.pos_emb = PositionTable(config)

    def __call__(self, patches: mx.array, grid: Grid) -> mx.array:
        """(patches, 3, patch_size, patch_size) to (patches, D)."""
        weight = self.proj.weight
        flat = patches.reshape(patches.shape[0], -1).astype(weight.dtype)
        x = mx.addmm(self.proj.bias, flat, weight.reshape(weight.shape[0], -1).T)
        return x + self.pos_emb(grid).astype(x.dtype)


class Convolution(nn.Module):
    """Weights of a convolution over whole patches: `weight` (D, 3, patch_size, patch_size), `bias` (D,)."""

    def __init__(self, hidden: int, patch: int) -> None:
        super().__init__()
        self.weight = mx.zeros((hidden, CHANNELS, patch, patch))
        self.bias = mx.zeros((hidden,))


class VisionEncoder(nn.Module):
    """The blocks and the last norm."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.blocks = [VisionBlock(config) for _ in range(config.vt_num_hidden_layers)]
        self.final_layernorm = nn.LayerNorm(config.vt_hidden_size, eps=NORM_EPS)


class VisionTower(nn.Module):
    """MoonViT: (patches, 3, patch_size, patch_size) to (patches, D)."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.patch_embed = PatchEmbed(config)
        self.encoder = VisionEncoder(config)


class Projector(nn.Module):
    """proj.2(gelu(proj.0(x))) of the patches of one token side by side, after `pre_norm` of each, with the exact gelu."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        merged = config.merged_size
        self.pre_norm = nn.LayerNorm(config.vt_hidden_size, eps=config.projector_ln_eps)
        self.proj = [nn.Linear(merged, merged), nn.GELU(), nn.Linear(merged, config.hidden_size)]

    def __call__(self, x: mx.array) -> mx.array:
        """(tokens, patches of a token, D) to (tokens, hidden_size)."""
        x = self.pre_norm(x).reshape(x.shape[0], -1)
        for step in self.proj:
            x = step(x)
        return x


class VisionModel(nn.Module):
    """Tower and projector.

    Args:
        config: of both.

    Attributes:
        scratch_bytes: what a picture may take at most beside the weights; what cannot be made smaller is
            `VisionConfig.scratch_bytes`.
    """

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        self.vision_tower = VisionTower(config)
        self.mm_projector = Projector(config)
        self.scratch_bytes = ops.SCRATCH_BYTES

    @property
    def dtype(self) -> mx.Dtype:
        """Of its activations."""
        dtype: mx.Dtype = self.vision_tower.patch_embed.proj.weight.dtype
        return dtype

    def __call__(self, pixels: mx.array, grid: Grid) -> mx.array:
        """The vectors of one picture.

        Args:
            pixels: (frames, rows * patch_size, columns * patch_size, 3) uint8.
            grid: how many patches that is.

        Returns:
            (tokens, hidden_size), row by row, in the tower's dtype; evaluated.
        """
        config, patch = self.config, self.config.patch_size
        cut = pixels.reshape(grid.frames, grid.rows, patch, grid.columns, patch, CHANNELS)
        patches = cut.transpose(0, 1, 3, 5, 2, 4).reshape(-1, CHANNELS, patch, patch)
        x = self.vision_tower.patch_embed(patches.astype(mx.float32) / 127.5 - 1.0, grid)
        turns = rotary_turns(grid, config.head_dim)
        for block in self.vision_tower.encoder.blocks:
            x = block(x, turns, self.scratch_bytes)
            # Or the graph of the next block would hold this one's arrays.
            mx.eval(x)
        x = self.vision_tower.encoder.final_layernorm(x)
        x = x.reshape(grid.frames, -1, config.vt_hidden_size)
        x = x[0] if grid.frames == 1 else x.astype(mx.float32).mean(axis=0).astype(x.dtype)
        down, across = config.merge_kernel_size
        x = x.reshape(grid.rows // down, down, grid.columns // across, across, -1).transpose(0, 2, 1, 3, 4)
        vectors = self.mm_projector(x.reshape(config.tokens(grid), down * across, -1))
        mx.eval(vectors)
        return vectors


def rotary_turns(grid: Grid, head_dim: int) -> Turns:
    """Angles of the pairs of a head: pair 2i turns by column * theta^(-4i / head_dim), pair 2i + 1 by row * the same."""
    speeds = ROPE_THETA ** (-4.0 * np.arange(head_dim // 4) / head_dim)
    rows, columns = np.divmod(np.arange(grid.rows * grid.columns), grid.columns)
    angles = np.stack([np.outer(columns, speeds), np.outer(rows, speeds)], axis=-1)
    angles = np.tile(angles.reshape(len(rows), -1), (grid.frames, 1))
    return mx.array(np.cos(angles).astype(np.float32)), mx.array(np.sin(angles).astype(np.float32))


def _turn(x: mx.array, turns: Turns) -> mx.array:
    """Rotate the pairs (x[2j], x[2j + 1]) of (heads, patches, head_dim) in float32."""
    cos, sin = turns
    pairs = x.astype(mx.float32).reshape(*x.shape[:-1], -1, 2)
    even, odd = pairs[..., 0], pairs[..., 1]
    return mx.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1).reshape(x.shape).astype(x.dtype)


def cubic_weights(size: int, wanted: int) -> npt.NDArray[np.float32]:
    """(wanted, size): how much each of `size` samples counts in each of `wanted` ones, bicubic, with the border repeated.

    Source: torch.nn.functional.interpolate(mode="bicubic", align_corners=False, antialias=False).
    """
    centres = (np.arange(wanted) + 0.5) * size / wanted - 0.5
    whole = np.floor(centres).astype(int)
    weights = np.zeros((wanted, size))
    for tap in range(-1, 3):
        far = np.abs(centres - whole - tap)
        near = ((CUBIC + 2) * far - (CUBIC + 3)) * far * far + 1
        tail = ((CUBIC * far - 5 * CUBIC) * far + 8 * CUBIC) * far - 4 * CUBIC
        np.add.at(weights, (np.arange(wanted), np.clip(whole + tap, 0, size - 1)), np.where(far <= 1, near, tail))
    return weights.astype(np.float32)


def frame_vectors(frames: int, hidden: int) -> npt.NDArray[np.float32]:
    """(frames, hidden): sines, then cosines of f / 10000^(2i / hidden)."""
    angles = np.outer(np.arange(frames), ROPE_THETA ** (-2.0 * np.arange(hidden // 2) / hidden))
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1).astype(np.float32)


@ops.compiled_on_gpu
def _gelu_tanh(x: mx.array) -> mx.array:
    """0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))."""
    return 0.5 * x * (1.0 + mx.tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)))
