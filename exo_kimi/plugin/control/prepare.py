"""`exo-kimi exo prepare`: a directory that exo accepts, with links to one node's share of a checkpoint and no code but ours.

exo looks for `org--name`, wants an index, loads every `model*.safetensors` with strict=False and holds embedding, norm and
head on every rank; its locked mlx-lm asks for the bits of `kv_b_proj` under two other names.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from exo_kimi.chat.tokenizer_files import read_json_object
from exo_kimi.checkpoint.checkpoint import Checkpoint
from exo_kimi.checkpoint.foreign_code import code_files, without_code
from exo_kimi.checkpoint.index import CheckpointIndex, TensorEntry
from exo_kimi.checkpoint.manifest import StageManifest
from exo_kimi.checkpoint.shards import INDEX_NAME
from exo_kimi.checkpoint.text_files import read_bytes, read_json
from exo_kimi.errors import MissingTensorError, TokenizerError, UsageError
from exo_kimi.plugin.control.model_card import CARD_FILE, card_toml, make_card
from exo_kimi.plugin.control.model_names import EXO_END_TOKEN, check_model_id, default_model_id, directory_name
from exo_kimi.plugin.ours_alone import runs_on_ours_alone

if TYPE_CHECKING:
    from exo_kimi.dialogue.speaker import Speaker

Linking = Literal["hard", "symbolic"]
MARK = "exo_kimi_share.json"
TOKENIZER_CODE = "tokenization_kimi.py"
_ENDS = ("model.embed_tokens", "model.norm", "lm_head")
DECLARATIONS_CODE = "tool_declaration_ts.py"  # exo runs it before the tokenizer, where there is one
# All that exo and its mlx-lm read of a Kimi beside config.json and the weights. Nothing else is handed on: exo runs
# `tokenization_kimi.py` and puts the directory on Python's path, mlx-lm runs the `model_file` of config.json.
_TOKENIZER_FILES = ("tiktoken.model", "tokenizer_config.json")
_OPTIONAL_FILES = ("generation_config.json", "special_tokens_map.json", "chat_template.jinja")


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedDirectory:
    """What was made.

    Args:
        source: the checkpoint, of which a plan can be made.
        directory: as exo will find it.
        model_id: as exo's API names it.
        start_layer: first layer of the share.
        end_layer: one past its last.
        weight_files: linked, by the name exo sees.
        linked_bytes: of these files; no byte was copied.
        total_bytes: of the whole model, as the index and the card say.
        notes: what the user should know.
    """

    source: Path
    directory: Path
    model_id: str
    start_layer: int
    end_layer: int
    weight_files: tuple[str, ...]
    linked_bytes: int
    total_bytes: int
    notes: tuple[str, ...]


def prepare(
    directory: str | Path,
    models_dir: str | Path,
    *,
    model_id: str | None = None,
    start_layer: int = 0,
    end_layer: int | None = None,
    linking: Linking = "hard",
) -> PreparedDirectory:
    """Make `MODELS_DIR/org--name` of a checkpoint, with the files that a layer range needs and the ends.

    Args:
        directory: the checkpoint.
        models_dir: one of EXO_MODELS_DIRS or EXO_MODELS_READ_ONLY_DIRS of the node.
        model_id: `org/name`; `default_model_id` of the directory when not given.
        start_layer: first layer of the node's share.
        end_layer: one past its last; None for all.
        linking: hard links, or symbolic ones where the file system has no others (chosen by itself across disks).

    Raises:
        UsageError: an id that exo would not take for a Kimi, or something else is in the way.
        CheckpointError: the share is not sound; exo would load it silently.
        TokenizerError: no tokenizer files.
        SplitError: no such layers.
    """
    source, root = Path(directory).resolve(), Path(models_dir)
    name = check_model_id(model_id or default_model_id(source))
    checkpoint = Checkpoint(source)
    index, manifest = checkpoint.index, checkpoint.manifest(start_layer, end_layer)
    entries = [entry for part in manifest.sources for held in part.parts.values() for entry in held] + _ends(index)
    notes = list(manifest.notes)
    if (alone := runs_on_ours_alone(index.config)) is not None:
        notes.append(f"{alone}: exo-kimi's engine alone runs it (`exo-kimi exo run`)")
    target = root / directory_name(name)
    _make_way(target, source)
    share = {"version": 1, "layers": [manifest.start_layer, manifest.end_layer], "fingerprint": manifest.fingerprint}
    _write_json(target / MARK, share)
    links = _link_weights(source, target, entries, linking)
    total_bytes = _total_bytes(source, index)
    _write_json(target / "config.json", _config_for_exo(index, manifest))
    notes += _small_files(source, target)
    speaker = _speaker(target, index)
    notes += _end_notes(speaker)
    card = make_card(name, index.config, total_bytes, speaker)
    (target / CARD_FILE).write_text(card_toml(card), encoding="utf-8")
    # Last: without an index exo does not take the directory, so it never finds half of one.
    weight_map = {entry.name: links[entry.file] for entry in index.tensors.values() if entry.file in links}
    _write_json(target / INDEX_NAME, {"metadata": {"total_size": total_bytes}, "weight_map": weight_map})
    return PreparedDirectory(
        source=source,
        directory=target,
        model_id=name,
        start_layer=manifest.start_layer,
        end_layer=manifest.end_layer,
        weight_files=tuple(sorted(links.values())),
        linked_bytes=sum((target / file).stat().st_size for file in links.values()),
        total_bytes=total_bytes,
        notes=tuple(notes),
    )


def _ends(index: CheckpointIndex) -> list[TensorEntry]:
    """Embedding, norm and head, which exo's engine holds on every rank; without the embedding rank 1 waits for ever."""
    missing = [path for path in _ENDS if path not in index.modules]
    if missing:
        raise MissingTensorError(
            f"{missing[0]} is missing, and exo holds it on every node",
            expected=", ".join(_ENDS),
            found=f"none of {', '.join(missing)}",
            where=index.directory,
            fix="prepare from a directory that has the first and the last file too",
        )
    return [entry for path in _ENDS for part in index.modules[path].values() for entry in part.values()]


def _make_way(target: Path, source: Path) -> None:
    """An empty target: what an earlier `prepare` made goes, anything else stays and is an error."""
    if target.resolve() == source:
        raise UsageError("the checkpoint is already there", where=target, fix="give another --models-dir")
    target.mkdir(parents=True, exist_ok=True)
    names = [path.name for path in target.iterdir()]
    if names and MARK not in names:
        raise UsageError(
            "the directory is not empty",
            expected=f"nothing, or what an earlier `exo prepare` made ({MARK})",
            found=", ".join(sorted(names)[:5]),
            where=target,
            fix="move it away, or give another --model-id",
        )
    for name in names:
        (target / name).unlink()


def _link_weights(source: Path, target: Path, entries: Iterable[TensorEntry], linking: Linking) -> dict[str, str]:
    """File of the checkpoint -> its name in the target. mlx-lm reads `model*.safetensors` only."""
    links: dict[str, str] = {}
    for file in sorted({entry.file for entry in entries}):
        name = Path(file).name
        links[file] = name if name.startswith("model") else f"model-{name}"
        _link(source / name, target / links[file], linking)
    return links


def _link(file: Path, target: Path, linking: Linking) -> None:
    if linking == "hard":
        try:
            os.link(file.resolve(), target)
            return
        except OSError:  # another disk, or a file system without hard links: a symbolic link serves exo as well
            pass
    target.symlink_to(file.resolve())


def _total_bytes(source: Path, index: CheckpointIndex) -> int:
    """Bytes of the whole model: as the index says, which is kept in a share, else of all tensors."""
    try:
        said = read_json(source / INDEX_NAME)["metadata"]["total_size"]
    except (OSError, ValueError, KeyError, TypeError):
        return index.disk_bytes
    return max(int(said), index.disk_bytes) if isinstance(said, int | float) else index.disk_bytes


def _config_for_exo(index: CheckpointIndex, manifest: StageManifest) -> dict[str, Any]:
    """config.json with the true bits of every module, and those of kv_b_proj under the names that exo's mlx-lm asks for."""
    raw: dict[str, Any] = without_code(index.raw_config)
    hints = raw.get("quantization")
    if not isinstance(hints, dict):
        return raw
    prefix = index.config.key_prefix
    entries: dict[str, Any] = dict(hints)
    for source in manifest.sources:
        if source.layout != "mlx" or source.quant is None:
            continue
        said: dict[str, Any] = {"group_size": source.quant.group_size, "bits": source.quant.bits}
        if source.quant.mode != "affine":
            said["mode"] = source.quant.mode
        path = prefix + source.spec.path
        if path in entries or said["bits"] != hints.get("bits") or said["group_size"] != hints.get("group_size"):
            entries[path] = said
        if path.endswith(".kv_b_proj"):
            for half in ("embed_q", "unembed_out"):
                entries[path.removesuffix("kv_b_proj") + half] = said
    return {**raw, "quantization": entries, "quantization_config": entries}


def _small_files(source: Path, target: Path) -> Sequence[str]:
    """Tokenizer, template and generation defaults, without keys that name code; the tokenizer's program is always ours."""
    for name in (*_TOKENIZER_FILES, *_OPTIONAL_FILES):
        try:
            data = read_bytes(source / name)
        except FileNotFoundError:
            if name in _OPTIONAL_FILES:
                continue
            raise TokenizerError(
                "no Kimi tokenizer in the checkpoint",
                expected=" and ".join(_TOKENIZER_FILES),
                where=source,
                fix="copy them from the model's original repository",
            ) from None
        except OSError as error:
            raise TokenizerError(f"{name} cannot be read", found=error.strerror, where=source / name) from None
        if name.endswith(".json"):
            _write_json(target / name, without_code(read_json_object(source / name, required=True)))
        else:
            (target / name).write_bytes(data)
    for name, text in ((TOKENIZER_CODE, _own_tokenizer()), (DECLARATIONS_CODE, _own_declarations())):
        (target / name).write_text(text, encoding="utf-8")
    left = code_files(source)
    if not left:
        return []
    shown = ", ".join(left[:5]) + (" and more" if len(left) > 5 else "")
    return [f"left out: {shown}; exo will run exo-kimi's own {TOKENIZER_CODE}"]


def _speaker(directory: Path, index: CheckpointIndex) -> Speaker:
    from exo_kimi.dialogue.speaker import Speaker  # tiktoken: only where it is needed

    return Speaker.from_directory(directory, raw_config=index.raw_config)


def _end_notes(speaker: Speaker) -> list[str]:
    """A warning where exo's own engine does not know this checkpoint's end of a turn, and would go on to the last token."""
    tokenizer = speaker.tokenizer
    if EXO_END_TOKEN in tokenizer.stop_ids:
        return []
    ends = ", ".join(map(str, sorted(tokenizer.stop_ids)))
    return [
        f"exo's own engine ends a reply at token {EXO_END_TOKEN} only, and this checkpoint at {ends}: its replies would run to "
        "max_tokens. Our engine knows the right ones: `exo-kimi exo run`, and `exo-kimi exo plan --our-engine`"
    ]


def _own_tokenizer() -> str:
    from exo_kimi.chat.tokenizer import SPLIT_PATTERN  # tiktoken: only where it is needed

    text = resources.files("exo_kimi.plugin").joinpath("data", "tokenization_kimi.txt").read_text(encoding="utf-8")
    return text.replace('"@SPLIT_PATTERN@"', repr(SPLIT_PATTERN))


def _own_declarations() -> str:
    """The tools as K2.5 reads them: our own module, which needs nothing but Python."""
    return resources.files("exo_kimi.chat").joinpath("tool_declarations.py").read_text(encoding="utf-8")


def _write_json(path: Path, document: object) -> None:
    path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
