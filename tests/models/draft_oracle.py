"""A draft head in plain NumPy, float64, read from its file by itself: the oracle of `models.draft_head`.

Written from the equations of "EAGLE-3" and the published layouts, and shares no code with what it judges.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file

Floats = NDArray[np.float64]


class DraftOracle:
    """One head and the positions that it has seen of one sequence."""

    def __init__(self, directory: Path, target: dict[str, Floats] | None = None) -> None:
        self.config: dict[str, Any] = json.loads((directory / "config.json").read_text())
        raw = load_file(directory / "model.safetensors")
        self.w = {
            name.removeprefix("model.").replace("midlayer.", "L.").replace("layers.0.", "L."): value.astype(np.float64)
            for name, value in raw.items()
        }
        for name, value in (target or {}).items():
            self.w.setdefault(name, value)
        self.keys: list[Floats] = []
        self.values: list[Floats] = []

    def norm(self, x: Floats, name: str, eps: float | None = None) -> Floats:
        eps = self.config["rms_norm_eps"] if eps is None else eps
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * self.w[f"{name}.weight"]

    def fuse(self, features: Floats) -> Floats:
        """(F,) to (D,)."""
        parts = np.split(features, 3)
        if self.config.get("fc_norm") or self.config.get("use_aux_norm"):
            parts = [self.norm(part, f"fc_norm.{i}") for i, part in enumerate(parts)]
        return self.w["fc.weight"] @ np.concatenate(parts)

    def step(self, token: int, hidden: Floats) -> tuple[Floats, Floats]:
        """Logits over the target's vocabulary (-inf where the head has no token), and the next hidden input."""
        e = self.norm(self.w["embed_tokens.weight"][token], "L.input_layernorm")
        normed = self.norm(hidden, "L.hidden_norm")
        x = np.concatenate([e, normed])
        residual = normed if self.config.get("norm_before_residual") else hidden
        r = residual + (self.latent(x) if "kv_lora_rank" in self.config else self.heads(x))
        h = self.norm(r, "L.post_attention_layernorm")
        gate = self.w["L.mlp.gate_proj.weight"] @ h
        out = r + self.w["L.mlp.down_proj.weight"] @ (gate / (1 + np.exp(-gate)) * (self.w["L.mlp.up_proj.weight"] @ h))
        logits = self.w["lm_head.weight"] @ self.norm(out, "norm")
        wide = np.full(self.config["vocab_size"], -np.inf)
        ids = np.arange(len(logits)) + self.w.get("d2t", np.zeros(len(logits))).astype(int)
        wide[ids] = logits
        return wide, self.norm(out, "norm") if self.config.get("norm_output") else out

    def heads(self, x: Floats) -> Floats:
        heads, shared, width = (self.config[key] for key in ("num_attention_heads", "num_key_value_heads", "head_dim"))
        position = len(self.keys)
        q, k, v = ((self.w[f"L.self_attn.{n}_proj.weight"] @ x).reshape(-1, width) for n in "qkv")
        angles = position / self.config["rope_theta"] ** (np.arange(0, width, 2) / width)
        q, k = (self.halves(part, angles) for part in (q, k))
        self.keys.append(k)
        self.values.append(v)
        out = []
        for head in range(heads):
            group = head // (heads // shared)
            scores = np.array([key[group] @ q[head] for key in self.keys]) / math.sqrt(width)
            out.append(softmax(scores) @ np.array([value[group] for value in self.values]))
        return self.w["L.self_attn.o_proj.weight"] @ np.concatenate(out)

    def latent(self, x: Floats) -> Floats:
        c, a = self.config, "L.self_attn"
        nope, rope, rank, wide = c["qk_nope_head_dim"], c["qk_rope_head_dim"], c["kv_lora_rank"], c["v_head_dim"]
        position = len(self.keys)
        down = self.norm(self.w[f"{a}.q_a_proj.weight"] @ x, f"{a}.q_a_layernorm", 1e-6)
        q = (self.w[f"{a}.q_b_proj.weight"] @ down).reshape(-1, nope + rope)
        both = self.w[f"{a}.kv_a_proj_with_mqa.weight"] @ x
        latent = self.norm(both[:rank], f"{a}.kv_a_layernorm", 1e-6)
        angles = position / c["rope_theta"] ** (np.arange(0, rope, 2) / rope)
        kv = (self.w[f"{a}.kv_b_proj.weight"] @ latent).reshape(-1, nope + wide)
        k_pe = np.broadcast_to(self.pairs(both[rank:], angles), (len(kv), rope))
        self.keys.append(np.concatenate([kv[:, :nope], k_pe], axis=-1))
        self.values.append(kv[:, nope:])
        q = np.concatenate([q[:, :nope], self.pairs(q[:, nope:], angles)], axis=-1)
        out = []
        for head in range(len(q)):
            scores = np.array([key[head] @ q[head] for key in self.keys]) / math.sqrt(nope + rope)
            out.append(softmax(scores) @ np.array([value[head] for value in self.values]))
        return self.w[f"{a}.o_proj.weight"] @ np.concatenate(out)

    @staticmethod
    def pairs(x: Floats, angles: Floats) -> Floats:
        even, odd = x[..., 0::2], x[..., 1::2]
        turned = [even * np.cos(angles) - odd * np.sin(angles), even * np.sin(angles) + odd * np.cos(angles)]
        return np.stack(turned, axis=-1).reshape(x.shape)

    @staticmethod
    def halves(x: Floats, angles: Floats) -> Floats:
        low, high = np.split(x, 2, axis=-1)
        cosines, sines = np.cos(angles), np.sin(angles)
        return np.concatenate([low * cosines - high * sines, high * cosines + low * sines], axis=-1)


def softmax(x: Floats) -> Floats:
    e = np.exp(x - x.max())
    return e / e.sum()
