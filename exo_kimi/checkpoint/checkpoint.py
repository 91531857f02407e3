"""A checkpoint directory, opened: config.json and every header are read when first asked for, and once.

checkpoint = Checkpoint(DIR)
checkpoint.config.num_hidden_layers
checkpoint.manifest(0, 44).resident_bytes
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from exo_kimi.arch.config import KimiConfig
from exo_kimi.checkpoint.index import CheckpointIndex, open_index
from exo_kimi.checkpoint.manifest import StageManifest, resolve
from exo_kimi.checkpoint.text_files import CONFIG_NAME, read_config


class Checkpoint:
    """A checkpoint directory that a command opens once and hands on.

    Nothing is read before it is asked for. What a file says is kept, so a file that changes meanwhile is not seen again.

    Args:
        directory: holds config.json, the weights and the files of the chat.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self._manifests: dict[tuple[int, int | None], StageManifest] = {}

    def __repr__(self) -> str:
        return f"Checkpoint({str(self.directory)!r})"

    @cached_property
    def raw_config(self) -> Mapping[str, Any]:
        """config.json as it is.

        Raises:
            NotACheckpointError: no directory, or no config.json in it.
            ConfigError: the file is not a JSON object.
        """
        return read_config(self.directory)

    @cached_property
    def config(self) -> KimiConfig:
        """The architecture that config.json describes.

        Raises:
            NotACheckpointError, ConfigError, UnsupportedModelError, CheckpointProblems: it is not one of a Kimi.
        """
        return KimiConfig.from_dict(self.raw_config, where=self.directory / CONFIG_NAME)

    @cached_property
    def index(self) -> CheckpointIndex:
        """Every tensor by name and module, from the headers.

        Raises:
            NotACheckpointError: no directory, no config.json or no weights.
            ConfigError, UnsupportedModelError, CheckpointProblems: config.json is not one of a Kimi.
            UnsafeFormatError: the weights are pickled.
            TensorFileError: `model.safetensors.index.json` cannot be read.
        """
        return open_index(self.directory, raw_config=self.raw_config)

    @property
    def fingerprint(self) -> str:
        """A hash of the architecture and of every header: equal for the same files on two machines."""
        return self.index.fingerprint

    def manifest(self, start_layer: int = 0, end_layer: int | None = None) -> StageManifest:
        """Where the modules of layers [start, end) lie; all layers when not given.

        Raises:
            CheckpointProblems: everything that is wrong with the range, and every tensor that nothing consumes.
            SplitError: the range is empty or outside the model.
            CheckpointError: as `index`.
        """
        key = (start_layer, end_layer)
        if key not in self._manifests:
            self._manifests[key] = resolve(self.index, start_layer, end_layer)
        return self._manifests[key]
