"""The weight files of a directory, and what `model.safetensors.index.json` says of them."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

from exo_kimi.checkpoint.formats import format_of_files
from exo_kimi.checkpoint.text_files import read_json
from exo_kimi.errors import CheckpointError, NotACheckpointError, TensorFileError, UnsafeFormatError

INDEX_NAME = "model.safetensors.index.json"
_INDEX_FIX = "copy the file again, or delete it: the headers of the weight files say the same"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_NUMBERED = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<total>\d{5})\.safetensors")


@dataclass(frozen=True, slots=True)
class FileProblem:
    """A problem of one file, and the tensor names it touches; None where they cannot be known."""

    error: CheckpointError
    names: frozenset[str] | None


@dataclass(slots=True)
class Shards:
    """The weight files of a directory.

    `promised` are the tensor names of the index by file, or None without an index. `files` exist; a missing one is a problem.
    """

    files: list[Path]
    promised: dict[str, frozenset[str]] | None
    problems: list[FileProblem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def find_shards(directory: Path, *, use_index: bool = True) -> Shards:
    """List the weight files: those that the index names, or every `.safetensors` file where there is no index.

    Args:
        directory: the checkpoint.
        use_index: False to look as if there were no index.

    Raises:
        UnsafeFormatError: only pickled weights.
        NotACheckpointError: no weights at all.
        TensorFileError: an index that cannot be read.
    """
    present = {path.name: path for path in sorted(directory.iterdir()) if path.suffix == ".safetensors"}
    index_path = directory / INDEX_NAME
    use_index = use_index and index_path.exists()
    if not present and not use_index:
        raise _no_weights(directory)
    if not use_index:
        models = {name: path for name, path in present.items() if name.startswith("model")} or present
        shards = Shards(list(models.values()), None)
        shards.problems = _missing_numbers(models)
        return _with_unused(shards, present)
    weight_map = _read_weight_map(index_path)
    names_by_file: dict[str, list[str]] = {file: [] for file in set(weight_map.values())}
    for name, file in weight_map.items():
        names_by_file[file].append(name)
    promised = {file: frozenset(names) for file, names in sorted(names_by_file.items())}
    shards = Shards([], promised)
    for file, names in promised.items():
        if file in present:
            shards.files.append(present[file])
        else:
            shards.problems.append(FileProblem(_missing_file(file, names), names))
    if not shards.files and present:
        raise TensorFileError(
            f"{INDEX_NAME} names none of the files that are there",
            expected=_some(sorted(present)),
            found=_some(sorted(promised)) or "no file",
            where=index_path.name,
            fix=_INDEX_FIX,
        )
    if not shards.files:
        raise _no_weights(directory)
    return _with_unused(shards, present)


def disagreements(file: Path, promised: frozenset[str], names: frozenset[str]) -> list[FileProblem]:
    """Problems where the index and the header of one file name different tensors."""
    problems = []
    for what, odd in (
        (f"{INDEX_NAME} names tensors that the file does not hold", promised - names),
        (f"the file holds tensors that {INDEX_NAME} does not give to it", names - promised),
    ):
        if odd:
            error = TensorFileError(
                what,
                expected=f"{len(promised):,} tensors of {INDEX_NAME}",
                found=f"{len(names):,} tensors, {len(odd):,} of them in disagreement: {_some(sorted(odd))}",
                where=file.name,
                fix=f"copy the file and {INDEX_NAME} again from one source",
            )
            problems.append(FileProblem(error, odd))
    return problems


def _read_weight_map(path: Path) -> dict[str, str]:
    try:
        raw = read_json(path)
        weight_map = raw["weight_map"]
        items = list(weight_map.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise TensorFileError(
            f"{INDEX_NAME} cannot be read",
            expected='a JSON object with a "weight_map"',
            found=f"{type(error).__name__}: {error}",
            where=path.name,
            fix=_INDEX_FIX,
        ) from None
    odd = None if "".join(weight_map).isprintable() else next(name for name in weight_map if not name.isprintable())
    if odd is not None:
        raise TensorFileError(
            f"{INDEX_NAME} cannot be read",
            expected="printable names",
            found=ascii(odd),
            where=path.name,
            fix=_INDEX_FIX,
        )
    for file, name in {file if isinstance(file, str) else None: name for name, file in items}.items():  # one of each
        # A path that leaves the directory would read a file outside the checkpoint.
        if file is None or not file.isprintable() or Path(file).name != file or not file.endswith(".safetensors"):
            unsafe = file is not None and file.endswith(_PICKLES)
            kind: type[CheckpointError] = UnsafeFormatError if unsafe else TensorFileError
            raise kind(
                f"{INDEX_NAME} names a file that cannot hold its weights",
                expected="a .safetensors file in the same directory",
                found=f"{file!a} for {name}",
                where=path.name,
                fix="get the safetensors version of this checkpoint",
            )
    return dict(items)


def _missing_numbers(models: dict[str, Path]) -> list[FileProblem]:
    """Problems of missing files in a numbered series: `-00002-of-00005` says how many there should be."""
    matches = [match for match in map(_NUMBERED.fullmatch, models) if match]
    wanted = {
        f"{match['stem']}-{number:05d}-of-{match['total']}.safetensors"
        for match in matches
        for number in range(1, min(int(match["total"]), 10_000) + 1)
    }
    return [FileProblem(_missing_file(name, None), None) for name in sorted(wanted - set(models))]


def _with_unused(shards: Shards, present: dict[str, Path]) -> Shards:
    unused = sorted(set(present) - {path.name for path in shards.files})
    if unused:
        shards.notes.append(f"{len(unused)} safetensors files are not part of the model: {_some(unused)}")
    return shards


def _missing_file(file: str, names: frozenset[str] | None) -> TensorFileError:
    holds = "" if names is None else f" with {len(names):,} tensors ({_some(sorted(names), 1)})"
    return TensorFileError(
        f"{file} is missing",
        expected=f"a file{holds}",
        found="no such file",
        where=file,
        fix="download or copy this file",
    )


def _no_weights(directory: Path) -> CheckpointError:
    names = sorted(path.name for path in directory.iterdir() if path.is_file())
    pickles = [name for name in names if name.endswith(_PICKLES)]
    if pickles:
        return UnsafeFormatError(
            "the weights are pickled: reading them would run code from the checkpoint",
            expected="*.safetensors",
            found=_some(pickles),
            where=directory,
            fix="get the safetensors version of this checkpoint",
        )
    foreign = format_of_files(directory, [path.name for path in directory.iterdir()])
    if foreign is not None:
        return foreign
    return NotACheckpointError(
        "no weights in the directory",
        expected="*.safetensors",
        found=_some(names) if names else "an empty directory",
        where=directory,
        fix="finish the download, or give the folder that holds the *.safetensors files",
    )


def _some(names: list[str], count: int = 3) -> str:
    more = f" and {len(names) - count:,} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more
