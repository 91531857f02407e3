"""Rotary positions of one model."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from exo_kimi.arch.draft_config import DraftHeads
from exo_kimi.arch.rope import yarn_mscale
from exo_kimi.arch.scratch import LatentAttentionConfig
from exo_kimi.errors import UsageError


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary positions of one model, plain or yarn, on interleaved pairs, or on halves as in Llama.

    Source: DeepseekV3YarnRotaryEmbedding of Kimi K2's modelling code; "YaRN", Peng et al. 2023, eq. 23.
    """

    dims: int
    wavelengths: mx.array
    amplitude: float
    interleaved: bool = True

    @classmethod
    def of(cls, config: LatentAttentionConfig) -> Rope:
        """The rotary embedding that a config asks for.

        Raises:
            UsageError: it has no rotary positions.
        """
        dims, theta, yarn = config.qk_rope_head_dim, config.rope_theta, config.rope_scaling
        if theta is None:
            raise UsageError("this model has no rotary positions", found="no rope_theta in its config")
        plain = [theta ** (pair / dims) for pair in range(0, dims, 2)]
        if yarn is None:
            return cls(dims, mx.array(plain, dtype=mx.float32), 1.0)

        def dimension_that_turns(rotations: float) -> float:
            length = yarn.original_max_position_embeddings
            return dims * math.log(length / (rotations * 2 * math.pi)) / (2 * math.log(theta))

        low = max(math.floor(dimension_that_turns(yarn.beta_fast)), 0)
        high = min(math.ceil(dimension_that_turns(yarn.beta_slow)), dims - 1)
        width = high - low or 0.001  # the published code's guard against a ramp of no width
        stretched = []
        for pair, wavelength in enumerate(plain):
            ramp = min(max((pair - low) / width, 0.0), 1.0)
            stretched.append(1.0 / (ramp / (yarn.factor * wavelength) + (1.0 - ramp) / wavelength))
        amplitude = yarn_mscale(yarn.factor, yarn.mscale) / yarn_mscale(yarn.factor, yarn.mscale_all_dim)
        return cls(dims, mx.array(stretched, dtype=mx.float32), amplitude)

    @classmethod
    def of_heads(cls, config: DraftHeads) -> Rope:
        """That of a Llama-like draft head."""
        wavelengths = mx.array(config.rope.wavelengths(config.head_dim), dtype=mx.float32)
        return cls(config.head_dim, wavelengths, config.rope.amplitude, interleaved=False)

    def __call__(self, x: mx.array, positions: mx.array) -> mx.array:
        """Rotate x (N, heads, dims) by positions (N,) int32: the tokens go on the batch axis, where offsets may differ."""
        return self.turn(x[:, :, None, :], positions)[:, :, 0, :]

    def turn(self, x: mx.array, positions: mx.array) -> mx.array:
        """The same of (N, heads, 1, dims)."""
        if self.amplitude != 1.0:
            x = x * self.amplitude
        return mx.fast.rope(
            x, self.dims, traditional=self.interleaved, base=None, scale=1.0, offset=positions, freqs=self.wavelengths
        )

    def matrices(self, positions: np.ndarray[Any, Any]) -> np.ndarray[Any, np.dtype[np.float32]]:
        """(N, dims, dims) float32 matrices that a row of interleaved pairs is multiplied with to turn it by its position, (N,).

        Angles are rounded to float32, as MLX does.
        """
        frequencies = 1.0 / np.array(self.wavelengths)
        angles = positions.astype(np.float32)[:, None] * frequencies.astype(np.float32)
        cosines, sines = self.amplitude * np.cos(angles), self.amplitude * np.sin(angles)
        pairs = len(frequencies)
        matrix = np.zeros((len(positions), pairs, 2, pairs, 2), np.float32)
        each = np.arange(pairs)
        matrix[:, each, 0, each, 0] = matrix[:, each, 1, each, 1] = cosines
        matrix[:, each, 0, each, 1] = sines
        matrix[:, each, 1, each, 0] = -sines
        return matrix.reshape(len(positions), 2 * pairs, 2 * pairs)
