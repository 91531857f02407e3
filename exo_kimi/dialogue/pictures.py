"""Pictures of a conversation: taken out of its messages, read, and put back as media tokens with what stands for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from exo_kimi.arch.vision import VisionConfig
from exo_kimi.chat.messages import PICTURE
from exo_kimi.errors import RequestError, UnsupportedError
from exo_kimi.pictures.picture import Picture
from exo_kimi.pictures.reader import PictureReader, PictureUrl
from exo_kimi.runtime.requests import PromptPicture

PICTURE_KINDS = ("image_url", "input_image", "image")
"""Content parts that are pictures: of OpenAI's chat, of its Responses, of Anthropic's Messages."""

LEFT_OUT = "[image: left out, this server reads text only]"


@dataclass(frozen=True, slots=True)
class PicturePrompts:
    """How a checkpoint with a vision tower reads pictures.

    Args:
        config: of the tower.
        reader: of files.
    """

    config: VisionConfig
    reader: PictureReader

    def place(
        self, ids: Sequence[int], pictures: Sequence[Picture], param: str
    ) -> tuple[tuple[int, ...], tuple[PromptPicture, ...]]:
        """Repeat the one media token that a template wrote for each picture as often as the picture has vectors.

        Raises:
            UnsupportedError: the template wrote another number of media tokens: it shows no pictures.
        """
        pad = self.config.media_placeholder_token_id
        found = sum(token == pad for token in ids)
        if found != len(pictures):
            raise UnsupportedError(
                "this checkpoint's chat template does not show pictures here",
                expected=f"{len(pictures)} media tokens ({pad})",
                found=found,
                fix="send the picture in a user's message, or take the chat_template.jinja of a Kimi K2.5 or later",
                param=param,
                code="unsupported_content",
            )
        spread: list[int] = []
        placed: list[PromptPicture] = []
        waiting = iter(pictures)
        for token in ids:
            if token == pad:
                picture = next(waiting)
                tokens = self.config.tokens(picture.grid)
                placed.append(PromptPicture(len(spread), tokens, picture))
                spread += [pad] * tokens
            else:
                spread.append(token)
        return tuple(spread), tuple(placed)


def take_pictures(messages: Sequence[Mapping[str, Any]]) -> tuple[list[Mapping[str, Any]], list[PictureUrl]]:
    """The messages with a mark in the place of each picture, and where the pictures are, in their order.

    Raises:
        RequestError: a part that should be a picture has none.
    """
    urls: list[PictureUrl] = []
    kept: list[Mapping[str, Any]] = []
    for index, message in enumerate(messages):
        content = message.get("content") if isinstance(message, Mapping) else None
        if not isinstance(content, list):
            kept.append(message)
            continue
        parts: list[Any] = []
        for place, part in enumerate(content):
            if isinstance(part, Mapping) and part.get("type") in PICTURE_KINDS:
                urls.append(PictureUrl(_url(part, param := f"messages[{index}].content[{place}]"), param))
                parts.append(PICTURE)
            else:
                parts.append(part)
        kept.append({**message, "content": parts})
    return kept, urls


def leave_out_pictures(messages: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Messages of `take_pictures` with words in the place of the pictures, so that a history with them stays of use."""
    kept: list[Mapping[str, Any]] = []
    for message in messages:
        content = message.get("content")
        if isinstance(content, list) and PICTURE in content:
            texts = [LEFT_OUT if part == PICTURE else part.get("text") for part in content]
            message = {**message, "content": "\n".join(text for text in texts if isinstance(text, str))}
        kept.append(message)
    return kept


def _url(part: Mapping[str, Any], param: str) -> str:
    source = part.get("source")
    if part["type"] == "image" and isinstance(source, Mapping):
        if source.get("type") == "base64" and isinstance(source.get("data"), str):
            return f"data:{source.get('media_type', '')};base64,{source['data']}"
        found = source.get("url")
    else:
        stated = part.get("image_url")
        found = stated.get("url") if isinstance(stated, Mapping) else stated
    if not isinstance(found, str):
        raise RequestError(
            f"'{param}' has no picture",
            expected='{"type": "image_url", "image_url": {"url": "data:image/png;base64,..."}}',
            found=f"the keys {', '.join(sorted(map(str, part)))}"[:120],
            param=param,
            code="invalid_image",
        )
    return found
