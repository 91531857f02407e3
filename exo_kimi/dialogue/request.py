"""What a front door asks for: a conversation or texts to go on with, and the options of the reply.

Each door (chat completions, text completions, exo's tasks) translates its own fields to these, and checks them in its own words.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

ToolMode = Literal["none", "auto", "required"]
_SAME_NAMES = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "seed",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingOverrides:
    """What a client chose of sampling; None leaves it to what the checkpoint recommends, or off.

    The names and meanings are those of `SamplingParams`, but for `top_logprobs`: None asks for no log-probabilities, 0 for
    those of the generated tokens alone.
    """

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    logit_bias: tuple[tuple[int, float], ...] = ()
    top_logprobs: int | None = None

    @classmethod
    def of(
        cls, source: object, *, logit_bias: tuple[tuple[int, float], ...] = (), top_logprobs: int | None = None
    ) -> SamplingOverrides:
        """Those that a door's own request holds under the same names, from `temperature` to `seed`."""
        chosen = {name: getattr(source, name) for name in _SAME_NAMES}
        return cls(**chosen, logit_bias=logit_bias, top_logprobs=top_logprobs)


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolChoice:
    """Whether the reply must, may or must not call a tool.

    Args:
        mode: "required" also stands for one named function.
        name: the only function that may be called, with "required".
        parallel: whether one reply may hold several calls.
    """

    mode: ToolMode = "auto"
    name: str | None = None
    parallel: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class JsonFormat:
    """A reply that is JSON.

    Args:
        schema: JSON Schema to obey; None takes any object.
    """

    schema: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplyOptions:
    """What every kind of request says of its reply.

    Args:
        sampling: the client's choices.
        max_tokens: most tokens of each reply, cut to what the context has left; None takes as many as it holds.
        stop: strings that end a reply; they are not shown.
        n: replies to each prompt.
        request_id: of the first reply, unique among those in flight; None draws one. Further replies get a number behind it.
        use_prefix_cache: begin from what is cached of other prompts; False computes every token, for measurements.
        ignore_end: go on at the end of a turn, up to `max_tokens`, for measurements.
        warnings: what the door does not carry out of what the client asked for, a sentence each; they come with the answer.
    """

    sampling: SamplingOverrides = field(default_factory=SamplingOverrides)
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    n: int = 1
    request_id: str | None = None
    use_prefix_cache: bool = True
    ignore_end: bool = False
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ConversationRequest(ReplyOptions):
    """A conversation that the model is to answer.

    Args:
        messages: OpenAI-shaped, as `ChatTemplate.render` takes them; a system message may hold `tools` that the conversation
            gains there.
        tools: OpenAI-shaped function tools; `strict` ones have their arguments held to their schema.
        tool_choice: counts only when there are tools.
        thinking: whether the model should reason first; None leaves it to the template.
        keep_reasoning: show the model the reasoning of all its earlier turns; None leaves it to the template.
        reasoning_effort: how much to reason (`reasoning.EFFORT_BUDGETS`), for templates that read it; a cap elsewhere.
        reasoning_budget: most tokens of reasoning, after which the answer begins; None sets no limit.
        response_format: the form of the reply's text; None leaves it free. Beside tools that may be called, the reply is
            either calls or such a text.
        must_show_pictures: refuse pictures that cannot be shown, rather than leave them out and say so.
        begun_reply: the begin of the reply, which the model goes on with; it is not repeated in the events.
        begun_name: the name that the reply goes by (role play), with `begun_reply`.
        exact: refuse what cannot be carried out as it is asked (a `thinking` that the template does not have, a schema with
            keywords that cannot be enforced), rather than do what can be done and say so in the warnings.
    """

    messages: tuple[Mapping[str, Any], ...]
    tools: tuple[Mapping[str, Any], ...] = ()
    tool_choice: ToolChoice = field(default_factory=ToolChoice)
    thinking: bool | None = None
    keep_reasoning: bool | None = None
    reasoning_budget: int | None = None
    reasoning_effort: str | None = None
    response_format: JsonFormat | None = None
    begun_reply: str | None = None
    must_show_pictures: bool = True
    begun_name: str | None = None
    exact: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class TextRequest(ReplyOptions):
    """Texts to go on with, without a conversation.

    Args:
        prompts: each a text or token ids.
        echo: begin each reply with its prompt.
    """

    prompts: tuple[str | tuple[int, ...], ...]
    echo: bool = False
