"""The planner's TOML data files: found by name, parsed, hashed."""

from __future__ import annotations

import hashlib
import json
import tomllib
from collections.abc import Mapping
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from exo_kimi.checkpoint.text_files import read_text
from exo_kimi.errors import UsageError


@cache
def names(folder: str) -> tuple[str, ...]:
    """File stems of a data folder of this package (`models`, `recipes`, `profiles`), sorted."""
    entries = resources.files("exo_kimi.planner").joinpath(folder).iterdir()
    return tuple(sorted(entry.name.removesuffix(".toml") for entry in entries if entry.name.endswith(".toml")))


@cache
def load(folder: str, name: str) -> Mapping[str, Any]:
    """One packaged data file, read once; the name must be one of `names`."""
    text = resources.files("exo_kimi.planner").joinpath(folder, f"{name}.toml").read_text(encoding="utf-8")
    return tomllib.loads(text)


def read(path: str | Path, what: str) -> dict[str, Any]:
    """A TOML file of the user's.

    Raises:
        UsageError: it cannot be read or is not TOML.
    """
    try:
        return tomllib.loads(read_text(path))
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"cannot read the {what}", found=error, where=path) from None


def read_profile(path: str | Path) -> dict[str, Any]:
    """A machine's profile: TOML as `exo-kimi machine --measure -o` writes it, or within the JSON of `exo-kimi verify`.

    Raises:
        UsageError: it cannot be read, or is neither.
    """
    if Path(path).suffix != ".json":
        return read(path, "profile")
    try:
        found: Any = json.loads(read_text(path))
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError("cannot read the profile", found=error, where=path) from None
    profile = found.get("profile") if isinstance(found, dict) and "exo_kimi_verify" in found else None
    if not isinstance(profile, dict):
        raise UsageError("not a file of `exo-kimi verify`", expected="exo_kimi_verify and profile in it", where=path)
    return profile


def refuse_unknown(table: Mapping[str, Any], known: tuple[str, ...], where: object) -> None:
    """Refuse keys that this program would ignore.

    Raises:
        UsageError: with the keys that are known.
    """
    unknown = sorted(set(table) - set(known))
    if unknown:
        raise UsageError(
            f"unknown key {unknown[0]!r}", expected=", ".join(known), found=", ".join(unknown), where=where
        )


def tables(table: Mapping[str, Any], key: str, where: object) -> list[dict[str, Any]]:
    """The `[[key]]` tables of a file, none when there are none.

    Raises:
        UsageError: something else has that key.
    """
    found = table.get(key, [])
    if not isinstance(found, list) or not all(isinstance(entry, dict) for entry in found):
        raise UsageError(f"{key} is not a list of tables", expected=f"[[{key}]]", found=repr(found)[:60], where=where)
    return found


def texts(table: Mapping[str, Any], key: str, where: object) -> tuple[str, ...]:
    """A list of texts, empty when the key is not there.

    Raises:
        UsageError: it is not a list of texts.
    """
    found = table.get(key, [])
    if not isinstance(found, list) or not all(isinstance(entry, str) for entry in found):
        raise UsageError(
            f"{key} is not a list of texts", expected=f'{key} = ["..."]', found=repr(found)[:60], where=where
        )
    return tuple(found)


def digest(value: object) -> str:
    """`sha256:` and the hash of a JSON-like value, equal whatever the order of its keys."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()
