"""The code of a pairing: two digits that anybody may see, by which the machine is found, and eight that are secret."""

from __future__ import annotations

import re
import secrets
from dataclasses import dataclass, field

from exo_kimi.errors import UsageError

_CODE = re.compile(r"(\d{2})[- ]?(\d{4})[- ]?(\d{4})")
_SECRETS = 10**8


@dataclass(frozen=True, slots=True)
class PairingCode:
    """`42-1937-0581`: plate 42, secret 19370581. The secret is not printed by repr.

    With three tries, somebody who guesses gets in with a chance of 3 in 100 million.
    """

    plate: str
    secret: str = field(repr=False)

    def __str__(self) -> str:
        return f"{self.plate}-{self.secret[:4]}-{self.secret[4:]}"

    @classmethod
    def generate(cls) -> PairingCode:
        """A new random one."""
        return cls(f"{secrets.randbelow(100):02d}", f"{secrets.randbelow(_SECRETS):08d}")

    @classmethod
    def parse(cls, text: str) -> PairingCode:
        """Read what a person typed, with or without the dashes.

        Raises:
            UsageError: it is no code.
        """
        match = _CODE.fullmatch(text.strip())
        if match is None:
            raise UsageError(
                "cannot read the pairing code",
                expected="ten digits such as 42-1937-0581, as `exo-kimi stage --pair` shows them",
                found=f"{len(text.strip())} characters",
                where="--pair",
            )
        return cls(match[1], match[2] + match[3])
