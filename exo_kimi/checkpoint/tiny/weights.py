"""Seeded weights of a tiny Kimi, and the recipes that give them bits.

A module's weights depend on the seed and its path only, so every layout of one seed holds the same model.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Mapping
from typing import Protocol

import numpy as np

from exo_kimi.arch.config import KimiConfig
from exo_kimi.arch.modules import ModuleSpec, absorbed_modules
from exo_kimi.checkpoint.packing import Floats
from exo_kimi.checkpoint.quantization import AFFINE_BITS, AFFINE_GROUPS
from exo_kimi.checkpoint.tiny.tokenizer import IM_END, ordinary_tokens
from exo_kimi.errors import UsageError

Bits = int | tuple[int, int] | None  # bits; or bits and group size; or None for a plain weight
RECIPES = ("mixed346", "uniform2", "uniform3", "uniform4", "uniform5", "uniform6", "uniform8", "dq3", "int4", "plain")
# The planner's names of the same recipes, which are the ones that users know.
_PLANNERS = {"q34+q6": "mixed346", "dq3_k_m-q8": "dq3", "bf16": "plain"}
ROUTER_BITS = 8, 64
"""Of a router that may be packed. Source: quant_predicate of mlx-lm's kimi_linear."""
_HEAD_GAIN = 3.0
_EXPERT = re.compile(r"model\.layers\.(\d+)\.mlp\.switch_mlp\.(\w+)_proj")


class NamedBits(Protocol):
    """Bits of a module by a recipe with a name, such as the planner's."""

    @property
    def name(self) -> str:
        """As users know it."""
        ...

    def quant(self, spec: ModuleSpec) -> tuple[int, int] | None:
        """Bits and group size of a module; None where it stays plain."""
        ...


Recipe = str | Mapping[str, Bits] | Callable[[str], Bits] | NamedBits


class TinyWeights:
    """The master weights of one tiny model.

    Args:
        config: its architecture.
        seed: another seed is another model.
    """

    def __init__(self, config: KimiConfig, seed: int) -> None:
        self.config = config
        self.seed = seed

    def weight(self, spec: ModuleSpec) -> Floats:
        """The float32 weight of a module, in the shape of its spec.

        Scales keep activations near 1 and logits well apart: normal with deviation 1/sqrt(in), norms near 1, embedding
        rows of deviation 1, head rows `_HEAD_GAIN` times larger than a linear's.
        """
        if spec.kind == "heads":
            return self._absorbed(spec)
        noise = self._normal(spec.path, spec.shape)
        if spec.kind == "norm":
            return 1 + np.float32(0.1) * noise
        if spec.kind == "embedding":
            return noise
        if spec.kind == "conv":
            return noise * np.float32(spec.shape[1] ** -0.5)
        noise *= np.float32(spec.shape[-1] ** -0.5)
        if spec.path == "lm_head":
            noise *= self._head_gains()[:, None]
        return noise

    def correction_bias(self, spec: ModuleSpec) -> Floats:
        """The router's e_score_correction_bias: wide enough to change which experts are chosen."""
        return np.float32(0.1) * self._normal(f"{spec.path}.e_score_correction_bias", spec.shape[:1])

    def decay(self, spec: ModuleSpec) -> tuple[Floats, Floats]:
        """A_log (1, 1, H, 1) and dt_bias (H * Dk,), as flash-linear-attention draws them: decays from 0.99 down to 0.2."""
        generator = np.random.default_rng([self.seed, zlib.crc32(f"{spec.path}.A_log".encode())])
        heads, dims = spec.shape
        a_log = np.log(generator.uniform(1, 16, (1, 1, heads, 1)))
        dt = np.exp(generator.uniform(np.log(1e-3), np.log(1e-1), heads * dims))
        return a_log.astype(np.float32), (dt + np.log(-np.expm1(-dt))).astype(np.float32)

    def bias(self, spec: ModuleSpec) -> Floats:
        """The bias vector of a linear that has one."""
        return np.float32(0.1) * self._normal(f"{spec.path}.bias", spec.shape[:1])

    def _normal(self, name: str, shape: tuple[int, ...]) -> Floats:
        generator = np.random.default_rng([self.seed, zlib.crc32(name.encode())])
        return generator.standard_normal(shape, dtype=np.float32)

    def _absorbed(self, spec: ModuleSpec) -> Floats:
        """`embed_q` and `unembed_out` are the nope rows (transposed) and the v rows of each head of kv_b_proj."""
        config = self.config
        base, _, name = spec.path.rpartition(".")
        rows = config.num_attention_heads * (config.qk_nope_head_dim + config.v_head_dim)
        kv_b = ModuleSpec(path=f"{base}.kv_b_proj", kind="linear", shape=(rows, config.kv_lora_rank), layer=spec.layer)
        heads = self.weight(kv_b).reshape(config.num_attention_heads, -1, config.kv_lora_rank)
        if name == "embed_q":
            return np.ascontiguousarray(heads[:, : config.qk_nope_head_dim].swapaxes(-1, -2))
        return np.ascontiguousarray(heads[:, config.qk_nope_head_dim :])

    def _head_gains(self) -> Floats:
        """Control tokens and lone UTF-8 fragments are rarely the best next token, so that samples read as text."""
        tokens = ordinary_tokens(self.config.vocab_size)
        gains = np.full(self.config.vocab_size, _HEAD_GAIN, np.float32)
        for rank, token in enumerate(tokens):
            if token.decode(errors="ignore").encode() != token:
                gains[rank] *= 0.25
        gains[len(tokens) :] *= 0.1
        gains[len(tokens) + IM_END] = _HEAD_GAIN
        return gains


def with_absorbed(config: KimiConfig, specs: tuple[ModuleSpec, ...]) -> tuple[ModuleSpec, ...]:
    """The same modules with every kv_b_proj replaced by `embed_q` and `unembed_out`."""
    replaced: list[ModuleSpec] = []
    for spec in specs:
        if spec.path.endswith(".kv_b_proj") and spec.layer is not None:
            replaced += absorbed_modules(config, spec.layer)
        else:
            replaced.append(spec)
    return tuple(replaced)


def own_recipe(recipe: Recipe) -> Recipe:
    """A recipe of the planner by the name that it has here, where it has one; any other as it is."""
    name = recipe if isinstance(recipe, str) else getattr(recipe, "name", None)
    if not isinstance(name, str):
        return recipe
    own = _PLANNERS.get(name, re.sub(r"uniform-(\d)", r"uniform\1", name))
    return own if own in RECIPES else recipe


def resolve_recipe(recipe: Recipe, group_size: int) -> Callable[[ModuleSpec], tuple[int, int] | None]:
    """A recipe as a function from module to (bits, group size), or None for a plain weight.

    Args:
        recipe: a name of `RECIPES` or the planner's of the same; a mapping from path to bits (`"*"` for every other path, else
            plain); a function of the path; or a recipe of the planner's kind. `mixed346`, the planner's `q34+q6`, is experts'
            gate and up 3, down 4, the rest 6.
        group_size: where the recipe gives none.

    Raises:
        UsageError: no recipe of that name, or a group size that MLX does not have. Bits that MLX does not have are
            raised when the function meets them.
    """
    if group_size not in AFFINE_GROUPS:
        raise UsageError("no such group size", expected=AFFINE_GROUPS, found=group_size)
    choose = _chooser(own_recipe(recipe))

    def bits_and_group(spec: ModuleSpec) -> tuple[int, int] | None:
        bits = choose(spec) if spec.quantizable else None
        if spec.kind == "router" and bits is not None:
            bits = ROUTER_BITS
        pair = (bits, group_size) if isinstance(bits, int) else bits
        if pair is not None and (pair[0] not in AFFINE_BITS or pair[1] not in AFFINE_GROUPS):
            raise UsageError("no such packing", expected=f"bits {AFFINE_BITS}, group {AFFINE_GROUPS}", found=pair)
        # As mlx-lm converts: a width that the group does not divide stays plain.
        return None if pair is None or spec.shape[-1] % pair[1] else pair

    return bits_and_group


def _chooser(recipe: Recipe) -> Callable[[ModuleSpec], Bits]:
    if isinstance(recipe, str):
        if recipe not in RECIPES:
            raise UsageError("no such recipe", expected=", ".join(RECIPES), found=repr(recipe))
        named = _named(recipe)
        return lambda spec: named(spec.path)
    if isinstance(recipe, Mapping):
        return lambda spec: recipe.get(spec.path, recipe.get("*"))
    if callable(recipe):
        return lambda spec: recipe(spec.path)
    return recipe.quant


def _named(recipe: str) -> Callable[[str], Bits]:
    def choose(path: str) -> Bits:
        expert = _EXPERT.fullmatch(path)
        layer, down = (int(expert[1]), expert[2] == "down") if expert else (0, False)
        if recipe.startswith("uniform"):
            return int(recipe.removeprefix("uniform"))
        if recipe == "mixed346":
            return (4 if down else 3) if expert else 6
        if recipe == "dq3":
            return (5 if layer < 5 else 4 if layer % 5 == 0 else 3) if down else 3 if expert else 8
        if recipe == "int4":
            return (4, 32) if expert else None
        return None

    return choose
