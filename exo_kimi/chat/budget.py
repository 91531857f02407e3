"""A cap on the reasoning of a reply: at the cap, the think tag is closed, and the answer follows."""

from __future__ import annotations

import copy
from typing import Self

from exo_kimi.chat.constraint import GrammarConstraint, StrictToolsConstraint, pack_mask
from exo_kimi.chat.family import THINK_CLOSE, THINK_OPEN
from exo_kimi.chat.template import ReasoningMode
from exo_kimi.chat.tokenizer import KimiTokenizer


class ReasoningBudget:
    """Constraint of a reply that may reason for so many tokens.

    Args:
        tokenizer: of the model that replies; one with think tags.
        budget_tokens: most tokens between the think tags.
        reasoning: how the reply begins, as `Prompt.reasoning` says.
        then: the constraint of the whole reply, if it has one.
    """

    def __init__(
        self,
        tokenizer: KimiTokenizer,
        budget_tokens: int,
        *,
        reasoning: ReasoningMode,
        then: GrammarConstraint | StrictToolsConstraint | None = None,
    ) -> None:
        self._open_id = tokenizer.special[THINK_OPEN]
        self._close_id = tokenizer.special[THINK_CLOSE]
        self._only_close = pack_mask((self._close_id,), tokenizer.vocab_size)
        self._left = budget_tokens
        self._reasons = reasoning == "open"
        self._may_open = reasoning == "may_open"
        self._then = then

    def mask(self) -> bytes | None:
        """Allowed next tokens (see `GrammarConstraint.mask`); None is all of them.

        Raises:
            ChatError: the grammar became too complex to follow.
        """
        if self._reasons and self._left <= 0:
            return self._only_close
        return self._then.mask() if self._then is not None else None

    def accept(self, token_id: int) -> None:
        """Advance by a sampled token.

        Raises:
            ChatError: the mask did not allow it.
        """
        if self._reasons:
            self._left -= 1
            self._reasons = token_id != self._close_id
        elif self._may_open:
            self._reasons, self._may_open = token_id == self._open_id, False
        if self._then is not None:
            self._then.accept(token_id)

    def fork(self) -> Self:
        """One that stands where this one does; neither moves the other."""
        made = copy.copy(self)
        made._then = None if self._then is None else self._then.fork()
        return made
