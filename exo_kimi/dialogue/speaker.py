"""A checkpoint's way with text: tokenizer, chat template and recommended sampling, read once and handed on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from exo_kimi.chat.defaults import GenerationDefaults
from exo_kimi.chat.template import ChatTemplate
from exo_kimi.chat.tokenizer import KimiTokenizer
from exo_kimi.chat.tokenizer_files import read_model_config
from exo_kimi.checkpoint.vision import NoVision
from exo_kimi.dialogue.pictures import PicturePrompts
from exo_kimi.dialogue.request import SamplingOverrides
from exo_kimi.errors import UnsupportedError
from exo_kimi.pictures.picture import Picture
from exo_kimi.pictures.reader import PictureUrl
from exo_kimi.runtime.requests import PromptPicture, SamplingParams

NO_PICTURES = NoVision("it was started without a vision tower")


@dataclass(frozen=True, slots=True, kw_only=True)
class Speaker:
    """How a checkpoint reads and writes text, how it likes to be sampled, and how it reads pictures, or why not."""

    tokenizer: KimiTokenizer
    template: ChatTemplate
    defaults: GenerationDefaults
    pictures: PicturePrompts | NoVision = NO_PICTURES

    @classmethod
    def from_directory(cls, directory: Path, *, raw_config: Mapping[str, Any] | None = None) -> Speaker:
        """Read the files of a checkpoint's chat; `raw_config` is its config.json, where that was read already.

        Raises:
            TokenizerError, TemplateError: its files are missing or malformed.
        """
        tokenizer = KimiTokenizer.from_directory(directory)
        config = read_model_config(directory) if raw_config is None else raw_config
        return cls(
            tokenizer=tokenizer,
            template=ChatTemplate.from_directory(directory, tokenizer, raw_config=config),
            defaults=GenerationDefaults.from_directory(directory, tokenizer, raw_config=config),
        )

    def read_pictures(self, urls: Sequence[PictureUrl]) -> list[Picture]:
        """The pictures of a request. Slow: call it in a thread.

        Raises:
            UnsupportedError: this server takes none, or not of this kind.
            RequestError: they cannot be read.
        """
        if not urls:
            return []
        if isinstance(self.pictures, NoVision):
            raise UnsupportedError(
                "images are not supported: this server reads text only",
                expected="text",
                found=f"an image_url; {self.pictures.reason}",
                param=urls[0].param,
                code="unsupported_content",
            )
        return self.pictures.reader.read(urls)

    def place_pictures(
        self, ids: Sequence[int], pictures: Sequence[Picture], urls: Sequence[PictureUrl]
    ) -> tuple[tuple[int, ...], tuple[PromptPicture, ...]]:
        """See `PicturePrompts.place`.

        Raises:
            UnsupportedError: the template shows no pictures.
        """
        if not pictures or isinstance(self.pictures, NoVision):
            return tuple(ids), ()
        return self.pictures.place(ids, pictures, urls[0].param)

    def sampling(self, chosen: SamplingOverrides, *, thinking: bool | None = None) -> SamplingParams:
        """What the client chose over what the checkpoint recommends.

        Args:
            chosen: by the client.
            thinking: as the request says it; None when it does not.
        """
        recommended = self.defaults.sampling(thinking)
        base = {"temperature": recommended.temperature, "top_p": recommended.top_p}
        given = {name: value for name, value in asdict(chosen).items() if value is not None}
        return SamplingParams(**{**base, **given}, logprobs=chosen.top_logprobs is not None)
