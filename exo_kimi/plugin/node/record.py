"""What a keeper must still know after a restart: the models that a person has ended, in a file of this machine."""

from __future__ import annotations

import json
import os
from collections.abc import Collection
from pathlib import Path

from exo_kimi.errors import UsageError
from exo_kimi.plugin.control.model_names import directory_name

VERSION = 1


def default_record(model_id: str) -> Path:
    """The file of a keeper, by the model that it wants most."""
    return Path.home() / ".config" / "exo-kimi" / "exo-kept" / f"{directory_name(model_id)}.json"


class KeepRecord:
    """Models that a person has ended, and which are left so until somebody places them.

    Args:
        path: the file; written anew whenever it changes.

    Raises:
        UsageError: it is there and cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._resting = _read(path)

    def rests(self, model_id: str) -> bool:
        """Whether a person ended it, and nobody has placed it since."""
        return model_id in self._resting

    def set_resting(self, model_id: str, rests: bool) -> None:
        """Remember it, on disk before anything is done about it."""
        wanted = self._resting | {model_id} if rests else self._resting - {model_id}
        if wanted != self._resting:
            self._resting = wanted
            _write(self.path, wanted)


def _read(path: Path) -> frozenset[str]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return frozenset()
    except OSError as error:
        raise UsageError("cannot read what was kept", found=error, where=path) from None
    try:
        body = json.loads(text)
        models = body["resting"]
        sound = (
            body["version"] == VERSION and isinstance(models, list) and all(isinstance(each, str) for each in models)
        )
    except (ValueError, KeyError, TypeError):
        sound, models = False, []
    if not sound:
        raise UsageError(
            "not a file of what a person has ended",
            expected=f'{{"resting": [MODEL_ID, ...], "version": {VERSION}}}',
            found=text[:80],
            where=path,
            fix="delete it: every kept plan is then placed again",
        )
    return frozenset(models)


def _write(path: Path, resting: Collection[str]) -> None:
    beside = path.with_suffix(".new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with beside.open("w", encoding="utf-8") as file:
            json.dump({"resting": sorted(resting), "version": VERSION}, file)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except OSError as error:
        raise UsageError("cannot write what a person has ended", found=error, where=path) from None
