"""--deep: downloads that broke off, holes, copies, implausible magnitudes and other files are found in every layout, and nothing
else is."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from exo_kimi.checkpoint.doctor import pages
from exo_kimi.checkpoint.doctor.doctor import doctor
from exo_kimi.checkpoint.index import open_index
from exo_kimi.checkpoint.tiny.make import make_tiny
from exo_kimi.cli import commands
from exo_kimi.errors import DamagedWeightsError, UsageError

Make = Callable[..., Path]
SMALLEST = {
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 64,
    "n_routed_experts": 3,
    "num_experts_per_tok": 2,
    "num_attention_heads": 2,
    "q_lora_rank": 64,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 32,
    "v_head_dim": 64,
    "vocab_size": 544,
}
LAYOUTS: dict[str, dict[str, Any]] = {
    "mlx": {"group_size": 32},
    "mlx absorbed k25": {"group_size": 32, "absorbed": True, "prefix": True, "vision": True, "template": "k25"},
    "mlx plain": {"recipe": "plain"},
    "int4": {"layout": "int4"},
    "int4 in three": {"layout": "int4", "prefix": True, "template": "k25", "shards": 3},
    "fp8": {"layout": "fp8", "template": "thinking"},
    "bf16": {"layout": "bf16"},
    "f32": {"layout": "bf16", "dtype": "F32"},
    "f16": {"layout": "int4", "dtype": "F16"},
    "uniform 4": {"recipe": "uniform4", "group_size": 32},
}


@pytest.fixture(scope="module")
def layouts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A smallest checkpoint in every layout."""
    root = tmp_path_factory.mktemp("deep")
    return {
        name: make_tiny(root / name.replace(" ", "-"), **{"config": SMALLEST, **options})
        for name, options in LAYOUTS.items()
    }


def data_start(path: Path) -> int:
    return 8 + int.from_bytes(path.read_bytes()[:8], "little")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_tail_of_zeros_is_found_wherever_it_begins(layouts: dict[str, Path], layout: str) -> None:
    """A hundred in all: as a downloader leaves them that makes the file in full length first."""
    root = layouts[layout]
    assert doctor(root, deep=True).findings == ()
    for number in range(10):
        chance = random.Random(f"{layout} {number}")
        path = chance.choice(sorted(root.glob("*.safetensors")))
        whole = path.read_bytes()
        offset = chance.randrange(data_start(path), len(whole) - 32)
        path.write_bytes(whole[:offset] + bytes(len(whole) - offset))
        try:
            assert doctor(root).findings == (), "headers do not show it"
            findings = doctor(root, deep=True).findings
        finally:
            path.write_bytes(whole)
        (finding,) = findings
        error = finding.error
        assert isinstance(error, DamagedWeightsError)
        assert error.where == path.name
        assert "its download broke off" in error.what
        told = int(error.what.partition("from byte ")[2].partition(" ")[0].replace(",", ""))
        assert offset - 64 <= told <= offset, "a byte or two before it may be zeros of their own"


def test_nothing_is_found_in_forty_made_checkpoints_or_the_shipped_one(tmp_path: Path) -> None:
    import exo_kimi

    shipped = Path(exo_kimi.__file__).parent / "data" / "tiny-kimi-k2"
    assert doctor(shipped, deep=True).findings == ()
    for number in range(40):
        name = list(LAYOUTS)[number % len(LAYOUTS)]
        options = {"config": SMALLEST, **LAYOUTS[name], "seed": number, "shards": 1 + number % 3}
        diagnosis = doctor(make_tiny(tmp_path / str(number), **options), deep=True)
        assert diagnosis.findings == (), f"{name}, seed {number}\n{diagnosis.to_text()}"


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["projection", "scales", "norm"])
def test_a_tensor_of_zeros_is_found_with_its_file_and_place(layouts: dict[str, Path], layout: str, kind: str) -> None:
    root = layouts[layout]
    index = open_index(root)
    wanted = {
        "projection": lambda n: "_proj.weight" in n and not n.endswith(("scale", "shape", "inv")),
        "scales": lambda n: n.endswith(("scales", "weight_scale", "weight_scale_inv")),
        "norm": lambda n: "layernorm" in n,
    }[kind]
    names = [name for name in index.tensors if wanted(name) and "vision" not in name and "projector" not in name]
    if kind == "scales" and not names:
        pytest.skip("a layout without scales")
    entry = index.tensors[random.Random(layout).choice(sorted(names))]
    path = root / entry.file
    whole = path.read_bytes()
    path.write_bytes(whole[: entry.start] + bytes(entry.nbytes) + whole[entry.end :])
    try:
        findings = doctor(root, deep=True).findings
    finally:
        path.write_bytes(whole)
    (finding,) = findings
    assert isinstance(finding.error, DamagedWeightsError)
    if entry.end != len(whole):
        assert finding.error.what == f"{entry.name} is all zeros"
        assert f"from byte {entry.start:,}" in str(finding.error.found)
    assert finding.error.where == entry.file


def test_a_hole_inside_a_tensor_is_found(make: Make) -> None:
    directory = make(layout="bf16", config={"moe_intermediate_size": 128, "hidden_size": 256})
    entry = open_index(directory).tensors["model.layers.1.mlp.experts.2.up_proj.weight"]
    path = directory / entry.file
    data = bytearray(path.read_bytes())
    data[entry.start + 8192 : entry.start + 8192 + 12_288] = bytes(12_288)
    path.write_bytes(bytes(data))
    (finding,) = doctor(directory, deep=True).findings
    assert finding.error.what.startswith(f"{entry.name} has a hole")
    assert f"{entry.start + 8192:,}" in str(finding.error.found)


def test_zero_rows_of_tokens_that_nobody_uses_are_no_damage(make: Make) -> None:
    """Reserved tokens at the end of a vocabulary have such rows, in the middle of a file and at its end."""
    directory = make(layout="bf16", shards=1)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        entry = open_index(directory).tensors[name]
        path = directory / entry.file
        data = bytearray(path.read_bytes())
        row = entry.nbytes // entry.shape[0]
        data[entry.end - 30 * row : entry.end] = bytes(30 * row)
        path.write_bytes(bytes(data))
    assert doctor(directory, deep=True).findings == ()


def test_a_correction_bias_of_zeros_is_no_damage(make: Make) -> None:
    directory = make()
    entry = open_index(directory).tensors["model.layers.1.mlp.gate.e_score_correction_bias"]
    path = directory / entry.file
    data = bytearray(path.read_bytes())
    data[entry.start : entry.end] = bytes(entry.nbytes)
    path.write_bytes(bytes(data))
    assert doctor(directory, deep=True).findings == ()


def test_a_page_that_is_there_twice_is_found_with_both_places(make: Make) -> None:
    directory = make(layout="bf16", shards=1, config={"moe_intermediate_size": 128, "hidden_size": 256})
    path = directory / "model.safetensors"
    data = bytearray(path.read_bytes())
    entries = sorted(open_index(directory).tensors.values(), key=lambda entry: entry.start)
    big = [entry for entry in entries if entry.nbytes > 40_000]
    first, second = (-(-entry.start // 4096) * 4096 for entry in (big[0], big[-1]))
    data[second + 4096 : second + 8192] = data[first : first + 4096]
    path.write_bytes(bytes(data))
    (finding,) = doctor(directory, deep=True).findings
    assert isinstance(finding.error, DamagedWeightsError)
    assert "1 page of 4,096 bytes are there twice" in finding.error.what
    for at in (first, second + 4096):
        assert f"{at:,}" in str(finding.error.found)


def test_a_head_that_is_the_embedding_is_no_copy(make: Make) -> None:
    directory = make(layout="bf16", shards=1)
    path = directory / "model.safetensors"
    data = bytearray(path.read_bytes())
    tensors = open_index(directory).tensors
    embedding, head = tensors["model.embed_tokens.weight"], tensors["lm_head.weight"]
    data[head.start : head.end] = data[embedding.start : embedding.end]
    path.write_bytes(bytes(data))
    assert doctor(directory, deep=True).findings == ()


def test_hashes_of_pages_are_those_of_the_file_however_it_is_cut() -> None:
    data = np.random.default_rng(0).integers(0, 256, 100_000, np.uint8)
    whole, cut = pages.PageHashes.of(1), pages.PageHashes.of(1)
    whole.add(data, 1_000)
    for start in range(0, len(data), 4096 * 4):
        begin = max(start - 1_000, 0)
        cut.add(data[begin : start + 4096 * 4 - 1_000], 1_000 + begin)
    for one, other in ((whole.hashes, cut.hashes), (whole.offsets, cut.offsets)):
        assert np.array_equal(np.concatenate(one), np.concatenate(other))


@pytest.mark.parametrize(("dtype", "values"), [("BF16", 1e30), ("BF16", 1e-30), ("F32", 1e20), ("F32", 1e-20)])
def test_magnitudes_that_no_weight_has_are_found(make: Make, dtype: str, values: float) -> None:
    directory = make(layout="bf16", dtype=dtype)
    entry = open_index(directory).tensors["model.layers.1.mlp.shared_experts.up_proj.weight"]
    path = directory / entry.file
    data = bytearray(path.read_bytes())
    odd = np.random.default_rng(0).normal(size=int(np.prod(entry.shape))).astype(np.float32) * np.float32(values)
    bits = odd.view("<u4")
    data[entry.start : entry.end] = (bits >> 16).astype("<u2").tobytes() if dtype == "BF16" else bits.tobytes()
    path.write_bytes(bytes(data))
    (finding,) = doctor(directory, deep=True).findings
    assert finding.error.what == f"{entry.name} has magnitudes that no weight or scale has"


def sums(directory: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in directory.iterdir() if path.is_file()}


def change_one_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(bytes(data))


def test_a_list_of_sha256_is_held_against_every_file(make: Make, tmp_path: Path) -> None:
    directory = make(layout="int4", shards=2)
    listed = tmp_path / "SHA256SUMS"
    lines = [f"{digest}  {name}" for name, digest in sums(directory).items()]
    listed.write_text(
        "# of the hub\n" + "\n".join([*lines[:-1], f"SHA256 ({lines[-1][66:]}) = {lines[-1][:64].upper()}"])
    )
    diagnosis = doctor(directory, sha256=listed)
    assert diagnosis.findings == ()
    assert diagnosis.deep
    assert "SHA-256 of 2 of 2 weight files" in "".join(diagnosis.notes)
    change_one_byte(directory / "model-00002-of-00002.safetensors")
    change_one_byte(directory / "tiktoken.model")
    wrong = [f.error for f in doctor(directory, sha256=listed).findings if isinstance(f.error, DamagedWeightsError)]
    assert sorted(str(error.where) for error in wrong) == ["model-00002-of-00002.safetensors", "tiktoken.model"]
    assert all("is not the file that was published" in error.what for error in wrong)
    listed.write_text("\n".join([*lines, f"{'0' * 64}  model-00009-of-00009.safetensors"]))
    assert any("00009" in f.error.what for f in doctor(directory, sha256=listed).findings)


@pytest.mark.parametrize("text", ["", "# nothing\n", "abc  model.safetensors", "0" * 64])
def test_a_list_that_is_none_is_refused(make: Make, tmp_path: Path, text: str) -> None:
    (tmp_path / "list").write_text(text)
    with pytest.raises(UsageError, match="SHA-256"):
        doctor(make(), sha256=tmp_path / "list")
    with pytest.raises(UsageError, match="SHA-256"):
        doctor(make(), sha256=tmp_path / "no such list")


@pytest.mark.parametrize("where", ["local-dir", "cache"])
def test_what_the_hub_s_downloader_leaves_is_used(make: Make, tmp_path: Path, where: str) -> None:
    directory = make(shards=2)
    files = {name: digest for name, digest in sums(directory).items() if name.endswith(".safetensors")}
    if where == "local-dir":
        metadata = directory / ".cache" / "huggingface" / "download"
        metadata.mkdir(parents=True)
        for name, digest in files.items():
            (metadata / f"{name}.metadata").write_text(f"{'a' * 40}\n{digest}\n1700000000.0\n")
        (metadata / "config.json.metadata").write_text(f"{'a' * 40}\n{'b' * 40}\n1700000000.0\n")
    else:
        blobs = tmp_path / "blobs"
        blobs.mkdir()
        for name, digest in files.items():
            (directory / name).rename(blobs / digest)
            (directory / name).symlink_to(blobs / digest)
    diagnosis = doctor(directory, deep=True)
    assert diagnosis.findings == ()
    assert "SHA-256 of 2 of 2 weight files" in "".join(diagnosis.notes)
    change_one_byte(directory / "model-00001-of-00002.safetensors")
    errors = [finding.error.what for finding in doctor(directory, deep=True).findings]
    assert "model-00001-of-00002.safetensors is not the file that was published" in errors


def test_tensors_that_a_text_model_does_not_use_are_read_for_zeros_too(make: Make) -> None:
    directory = make(vision=True, template="k25")
    index = open_index(directory)
    entry = max((e for e in index.tensors.values() if "vision" in e.name), key=lambda entry: entry.nbytes)
    path = directory / entry.file
    whole = path.read_bytes()
    path.write_bytes(whole[: entry.start] + bytes(len(whole) - entry.start))
    assert not doctor(directory, deep=True).healthy
    assert json.loads(doctor(directory).to_json())["healthy"]


def test_the_command_takes_a_list_and_says_which_file_is_another(make: Make, tmp_path: Path) -> None:
    directory = make(layout="int4", shards=2)
    listed = tmp_path / "SHA256SUMS"
    listed.write_text("\n".join(f"{digest}  {name}" for name, digest in sums(directory).items()))
    assert commands.doctor(directory, sha256=listed) == 0
    change_one_byte(directory / "model-00001-of-00002.safetensors")
    assert commands.doctor(directory, sha256=listed) == 1
    assert commands.doctor(directory) == 0, "without the list nothing shows it"
