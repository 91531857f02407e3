"""Files that others wrote: regular ones only, text within a bound; JSON, and config.json as a Kimi's configuration."""

from __future__ import annotations

import codecs
import errno
import json
import os
import stat
from pathlib import Path
from typing import Any

from exo_kimi.arch.config import KimiConfig
from exo_kimi.errors import ConfigError, NotACheckpointError

CONFIG_NAME = "config.json"
MOST_TEXT_BYTES = 128 * 2**20  # the index of a Kimi K2 with a tensor an expert has 25 MB; nothing else comes near
_PIECE_BYTES = 2**16


def open_regular(path: str | Path) -> int:
    """A descriptor of a file, to read from.

    Raises:
        OSError: it cannot be opened, or is no regular file: a pipe would wait for ever, and a device may never end.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISREG(mode):
        return descriptor
    os.close(descriptor)
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    kind = "a pipe" if stat.S_ISFIFO(mode) else "a device"
    raise OSError(errno.EINVAL, f"it is {kind}, not a regular file", str(path))


def read_bytes(path: str | Path, *, most_bytes: int = MOST_TEXT_BYTES) -> bytes:
    """All bytes of a file.

    Raises:
        OSError: it cannot be read, is no regular file, or has more bytes than that.
    """
    with os.fdopen(open_regular(path), "rb") as stream:
        data = stream.read(min(os.fstat(stream.fileno()).st_size, most_bytes) + 1)
        while len(data) <= most_bytes and (more := stream.read(_PIECE_BYTES)):  # files of the system claim to be empty
            data += more
    if len(data) > most_bytes:
        raise OSError(errno.EFBIG, f"it has over {most_bytes} bytes", str(path))
    return data


def read_text(path: str | Path, *, encoding: str = "utf-8") -> str:
    """All text of a file, its line ends as newlines.

    Raises:
        OSError: as `read_bytes`.
        UnicodeDecodeError: it is not in this encoding.
    """
    return read_bytes(path).decode(encoding).replace("\r\n", "\n").replace("\r", "\n")


def read_json(path: Path) -> Any:
    """Parse one JSON file in UTF-8; a byte order mark in front, as some editors write it, is skipped.

    Raises:
        OSError: the file cannot be read, is no regular file, or is longer than any that belongs to a checkpoint.
        ValueError: it is not UTF-8 (UTF-16 is named), not JSON, nested too deep to parse, or there is text after its end.
    """
    data = read_bytes(path)
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in data[:4]:
        raise ValueError("it is in UTF-16 or UTF-32, as Windows programs save text; JSON is UTF-8: save it as that")
    try:
        return json.loads(data.decode("utf-8-sig"))
    except RecursionError:
        raise ValueError("its lists and objects are nested too deep") from None
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":
            rest = error.doc[error.pos : error.pos + 30]
            raise ValueError(f"there is text after the end of its JSON, in line {error.lineno}: {rest!a}") from None
        raise


def read_config(directory: str | Path) -> dict[str, Any]:
    """Parse the `config.json` of a checkpoint directory, and check nothing in it.

    Raises:
        NotACheckpointError: no such directory, or no config.json in it.
        ConfigError: the file is not a JSON object.
    """
    root = Path(directory)
    if not root.is_dir():
        raise NotACheckpointError(
            "no such checkpoint directory",
            found=root,
            fix="give the folder that holds config.json and *.safetensors, or a model of the hub as ORG/NAME",
        )
    path = root / CONFIG_NAME
    try:
        raw = read_json(path)
    except FileNotFoundError:
        raise NotACheckpointError(
            "no config.json in the directory",
            where=root,
            fix="give the folder that holds config.json and *.safetensors",
        ) from None
    except (OSError, ValueError) as error:
        raise ConfigError("config.json cannot be read", found=error, where=path, fix="copy the file again") from None
    if not isinstance(raw, dict):
        raise ConfigError("config.json is not an object", expected="{...}", found=type(raw).__name__, where=path)
    return raw


def read_kimi_config(directory: str | Path) -> KimiConfig:
    """Read `config.json` of a checkpoint directory as the configuration of a Kimi.

    Raises:
        NotACheckpointError: no such directory or no config.json in it.
        ConfigError, UnsupportedModelError, CheckpointProblems: see `KimiConfig.from_dict`.
    """
    return KimiConfig.from_dict(read_config(directory), where=Path(directory) / CONFIG_NAME)
