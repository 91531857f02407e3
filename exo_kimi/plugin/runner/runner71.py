"""Our builder inside the runner of exo v1.0.71, which fills its builder from two functions instead of asking it.

That runner makes `Builder(...)`, sets its `group` to what `initialize_mlx` gives and three more fields to what `load_mlx_items`
gives in the end, then calls `build()`. What `build` gives has the methods of a later exo's Engine. Importing binds nothing.
"""

from __future__ import annotations

import importlib
from collections.abc import Generator
from typing import Any, ClassVar

from exo_kimi.errors import ExoLoadError
from exo_kimi.plugin.bindings import V71_BUILDER, V71_CONNECT, V71_ENGINE, V71_LOAD
from exo_kimi.plugin.runner.builder import KimiBuilder
from exo_kimi.plugin.runner.engine import KimiEngine


class FilledBuilder(KimiBuilder):
    """A builder with the fields that exo's runner sets; ours holds all that it needs by itself."""

    latest: ClassVar[FilledBuilder | None] = None  # a runner's process makes one

    def __init__(self, model_id: Any, event_sender: Any, cancel_receiver: Any) -> None:
        super().__init__(model_id, event_sender, cancel_receiver)
        self.group: Any = None  # the runner loads a connected model only when this is something
        self.inference_model: Any = None
        self.tokenizer: Any = None
        self.vision_processor: Any = None
        FilledBuilder.latest = self

    @classmethod
    def of_this_runner(cls) -> FilledBuilder:
        """The one that exo made.

        Raises:
            ExoLoadError: it has made none.
        """
        if cls.latest is None:
            raise ExoLoadError("exo connects and loads with a builder", found="none was made")
        return cls.latest


def connect(bound_instance: Any) -> object:
    """In place of exo's `initialize_mlx`: what `KimiBuilder.connect` does.

    Raises:
        ExoKimiError: see there.
    """
    builder = FilledBuilder.of_this_runner()
    builder.connect(bound_instance)
    return builder


def load(bound_instance: Any, group: object) -> Generator[Any, None, tuple[None, None, None]]:
    """In place of exo's `load_mlx_items`: what `KimiBuilder.load` does; the model stays with the builder.

    Raises:
        ExoKimiError: see there.
    """
    yield from FilledBuilder.of_this_runner().load(bound_instance)
    return None, None, None


def put_in() -> None:
    """Bind the three names in this runner's process."""
    getattr(importlib.import_module(V71_ENGINE.module), V71_ENGINE.name).register(KimiEngine)
    for name, ours in ((V71_BUILDER, FilledBuilder), (V71_CONNECT, connect), (V71_LOAD, load)):
        setattr(importlib.import_module(name.module), name.name, ours)
