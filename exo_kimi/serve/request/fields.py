"""The request fields that chat and text completions share, each with its documented range."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, FailFast, Field

from exo_kimi.errors import RequestError, UnsupportedError

MAX_CHOICES = 16
MAX_STOPS = 16
MAX_STOP_BYTES = 4096  # of each: text is searched for it as it comes, and its begin is held back
_INT64 = 2**63

Temperature = Annotated[float, Field(ge=0, le=2)]
Probability = Annotated[float, Field(ge=0, le=1)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
TokenCount = Annotated[int, Field(ge=1, lt=_INT64)]

# Documented by OpenAI as bookkeeping that does not change the output: taken and not used.
BOOKKEEPING = {"user", "metadata", "safety_identifier", "prompt_cache_key"}
# Documented by OpenAI, and taken only with the values that this server honours (null always is).
HONOURED_VALUES: Mapping[str, Collection[object]] = {
    "store": (False,),
    "service_tier": ("auto", "default"),
    "prompt_cache_retention": ("in_memory",),
    "modalities": (["text"],),
}


class FirstOnly(FailFast):
    """The first wrong item ends the check of a list: a million wrong items must not make a million findings."""

    def __hash__(self) -> int:  # a union needs its members hashable, and pydantic's class is not
        return hash(type(self))


class Fields(BaseModel):
    """A part of a request: no unknown keys, no coercion of types; null means absent."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class StreamOptions(Fields):
    """`stream_options`."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class GenerationFields(Fields):
    """What both endpoints let a client choose. `top_k`, `min_p` and `repetition_penalty` are extensions."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: TokenCount | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    stop: str | Annotated[list[str], FirstOnly()] | None = None
    temperature: Temperature | None = None
    top_p: Probability | None = None
    top_k: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    min_p: Probability | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = None
    logit_bias: dict[str, Any] | None = None
    seed: Annotated[int, Field(ge=-_INT64, lt=_INT64)] | None = None

    @property
    def include_usage(self) -> bool:
        """Whether the stream ends with a chunk that holds the usage."""
        return bool(self.stream_options and self.stream_options.include_usage)

    def stops(self) -> tuple[str, ...]:
        """The stop strings.

        Raises:
            RequestError: an empty one, one over 4096 bytes, or more than 16.
        """
        return check_stops((self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ()), "stop")

    def check_stream_options(self) -> None:
        """Raises:
        RequestError: stream options without a stream.
        UnsupportedError: obfuscation was asked for.
        """
        if self.stream_options is None:
            return
        if not self.stream:
            raise RequestError("'stream_options' is only allowed with 'stream': true", param="stream_options")
        if self.stream_options.include_obfuscation:
            raise UnsupportedError(
                "stream obfuscation is not supported", param="stream_options.include_obfuscation", code="unsupported"
            )

    def biases(self, vocab_size: int) -> tuple[tuple[int, float], ...]:
        """`logit_bias` as (token id, bias).

        Raises:
            RequestError: a key that is not a token id of this vocabulary, or a bias out of range.
        """
        biases = self.logit_bias or {}
        for key, bias in biases.items():
            if not (key.isascii() and key.isdigit() and len(key) <= 9 and int(key) < vocab_size):
                expected, found = f"token ids from 0 to {vocab_size - 1} as keys", repr(key[:40])
            elif isinstance(bias, bool) or not isinstance(bias, int | float) or not -100 <= bias <= 100:
                expected, found = "numbers from -100 to 100", repr(bias)[:40]
            else:
                continue
            raise RequestError("invalid 'logit_bias'", expected=expected, found=found, param="logit_bias")
        return tuple({int(key): float(bias) for key, bias in biases.items()}.items())


def check_stops(stops: tuple[str, ...], param: str) -> tuple[str, ...]:
    """The stop strings of a request.

    Args:
        stops: as the client wrote them.
        param: the field they are in.

    Raises:
        RequestError: an empty one, one over 4096 bytes, or more than 16.
    """
    longest = max((len(stop.encode()) for stop in stops[: MAX_STOPS + 1]), default=0)
    if longest > MAX_STOP_BYTES:
        raise RequestError(
            f"invalid '{param}'",
            expected=f"texts of at most {MAX_STOP_BYTES} bytes",
            found=f"one of {longest} bytes",
            param=param,
        )
    if len(stops) > MAX_STOPS or not all(stops):
        raise RequestError(
            f"invalid '{param}'",
            expected=f"at most {MAX_STOPS} texts, none of them empty",
            found=f"{len(stops)} texts, {stops.count('')} of them empty",
            param=param,
        )
    return stops


def take_known(body: Mapping[str, Any], known: Collection[str], unsupported: Collection[str]) -> dict[str, Any]:
    """The fields of a body that a schema reads, after a refusal of all that this server would otherwise ignore.

    Args:
        body: the parsed request.
        known: the schema's own fields.
        unsupported: fields that OpenAI documents and this server does not have.

    Raises:
        UnsupportedError: a documented field with a value that is not honoured here.
        RequestError: a field that nobody documents.
    """
    for name, value in body.items():
        if name in known or name in BOOKKEEPING or (value is None and (name in unsupported or name in HONOURED_VALUES)):
            continue
        if name in HONOURED_VALUES:
            if not any(type(value) is type(good) and value == good for good in HONOURED_VALUES[name]):
                accepted = " or ".join(repr(good) for good in HONOURED_VALUES[name])
                raise UnsupportedError(
                    f"'{name}' is not supported with this value",
                    expected=accepted,
                    found=repr(value)[:80],
                    param=name,
                    code="unsupported_value",
                )
        elif name in unsupported:
            raise UnsupportedError(
                f"'{name}' is not supported by this server",
                fix="leave it out",
                param=name,
                code="unsupported_parameter",
            )
        else:
            shown = name[:80]
            raise RequestError(f"unknown parameter: '{shown}'", param=shown, code="unknown_parameter")
    return {name: value for name, value in body.items() if name in known}
