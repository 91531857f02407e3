"""What a user says of experts on disk, as one value: of `serve`, `stage` and exo's environment alike."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from exo_kimi.arch.config import KimiConfig
from exo_kimi.errors import UsageError
from exo_kimi.experts.budget import DEFAULT_PREFETCH, ExpertCache, LayerProfile, check_prefetch
from exo_kimi.experts.direct import DEFAULT_READS, check_reads
from exo_kimi.experts.policies import DEFAULT_POLICY, make_policy
from exo_kimi.experts.traces.trace import read_trace


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertOptions:
    """Options as they were given.

    Args:
        budget_bytes: `--expert-cache`; None holds all experts, unless a plan says otherwise.
        policy, prefetch, reads: see `ExpertCache`.
        profile: a trace whose most used experts `pinned` keeps.
    """

    budget_bytes: int | None = None
    policy: str = DEFAULT_POLICY
    prefetch: str = DEFAULT_PREFETCH
    reads: str = DEFAULT_READS
    profile: Path | None = None

    def cache(self, config: KimiConfig | None = None) -> ExpertCache:
        """What they come to, with a budget of 0 where none is set.

        Args:
            config: of the model, which a profile must fit; None where it is not known yet.

        Raises:
            UsageError: an option names nothing that there is, `pinned` has no profile, or one that is no trace of this model.
        """
        check_prefetch(self.prefetch)
        check_reads(self.reads)
        profile: tuple[LayerProfile, ...] = ()
        if self.profile is not None:
            profile = self._profile(self.profile, config)
        make_policy(self.policy, slots=1, profile=(0,) if profile else ())
        return ExpertCache(
            budget_bytes=self.budget_bytes or 0,
            policy=self.policy,
            prefetch=self.prefetch,
            reads=self.reads,
            profile=profile,
        )

    def _profile(self, path: Path, config: KimiConfig | None) -> tuple[LayerProfile, ...]:
        if self.policy != "pinned":
            raise UsageError(
                "a profile is for the policy that pins experts by it",
                expected="pinned",
                found=self.policy,
                where="--expert-policy",
            )
        trace = read_trace(path)
        if config is not None:
            layers = [layer for layer in range(config.num_hidden_layers) if config.is_moe(layer)]
            if trace.experts != config.n_routed_experts or set(layers) - set(trace.layers):
                raise UsageError(
                    "the profile is of another model",
                    expected=f"{len(layers)} layers of {config.n_routed_experts} experts",
                    found=f"{len(trace.layers)} layers of {trace.experts}",
                    where=path,
                )
        return trace.profile()
