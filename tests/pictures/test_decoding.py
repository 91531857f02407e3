"""Files to pixels: sizes and values against transformers' processor, every mode and depth, and what is refused."""

from __future__ import annotations

import io
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from exo_kimi.arch.vision import Grid
from exo_kimi.errors import RequestError, UnsupportedError
from exo_kimi.pictures import decoding
from exo_kimi.pictures.decoding import decode_picture
from exo_kimi.pictures.picture import Picture, PixelRules

RULES = PixelRules(patch_size=14, merge_kernel_size=(2, 2))
SIZES = [
    *[(1, 1), (10, 10), (14, 14), (27, 29), (28, 28), (100, 3), (3, 100), (336, 336), (640, 480), (800, 601)],
    *[(1024, 768), (1280, 720), (1440, 900), (1366, 768), (1920, 1080), (2048, 512), (513, 2049), (2560, 1440)],
    *[(3000, 200), (200, 3000), (3840, 2160), (2160, 3840), (1792, 1792), (1793, 1791), (2500, 1900), (500, 7300)],
    *[(7300, 90), (8000, 20), (57, 41), (999, 1001)],
]


def file_of(image: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def pixels_of(picture: Picture) -> np.ndarray[Any, np.dtype[np.uint8]]:
    shape = (picture.grid.rows * 14, picture.grid.columns * 14, 3)
    return np.frombuffer(picture.pixels, np.uint8).reshape(shape)


def decode(data: bytes) -> Picture:
    return decode_picture(data, RULES, param="messages[0].content[0]")


def smooth(width: int, height: int) -> Image.Image:
    """A picture with structure, of the size of a photograph's."""
    rng = np.random.default_rng(width * 10_000 + height)
    small = rng.integers(0, 256, (max(1, height // 16), max(1, width // 16), 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def processor() -> Any:
    pytest.importorskip("torch", reason="the oracle runs on torch")
    pytest.importorskip("torchvision", reason="transformers' processor scales with torchvision")
    found = pytest.importorskip("transformers.models.kimi_k25.image_processing_kimi_k25")
    return found.Kimi_K25ImageProcessor()


def test_thirty_sizes_are_tried() -> None:
    assert len(set(SIZES)) == 30


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_grid_and_pixels_are_those_of_transformers(processor: Any, size: tuple[int, int]) -> None:
    image = smooth(*size)
    theirs = processor(images=[image], return_tensors="np")
    found = decode(file_of(image, compress_level=1))
    frames, rows, columns = (int(n) for n in theirs["image_grid_thw"][0])
    assert found.grid == Grid(frames, rows, columns)
    patches = np.asarray(theirs["pixel_values"]).reshape(rows, columns, 3, 14, 14).transpose(0, 3, 1, 4, 2)
    expected = (patches.reshape(rows * 14, columns * 14, 3) * 0.5 + 0.5) * 255
    difference = np.abs(expected - pixels_of(found))
    assert difference.max() <= 2.01
    assert difference.mean() <= 0.05


@given(st.integers(1, 30_000), st.integers(1, 30_000))
def test_every_size_becomes_whole_tokens_within_the_limits(width: int, height: int) -> None:
    size = RULES.size(width, height)
    grid = RULES.grid(*size)
    assert 1 <= size[0] <= width and 1 <= size[1] <= height
    assert grid.rows % 2 == grid.columns % 2 == 0
    assert max(grid.rows, grid.columns) <= 512
    assert size[0] <= grid.columns * 14 < size[0] + 28
    assert grid.patches * 14 * 14 * 3 <= RULES.most_pixel_bytes


def test_sizes_of_the_reference() -> None:
    grids = {size: RULES.grid(*RULES.size(*size)) for size in [(1920, 1080), (3840, 2160), (1440, 900), (10, 10)]}
    assert {size: (grid.rows, grid.columns, grid.patches // 4) for size, grid in grids.items()} == {
        (1920, 1080): (78, 138, 2691),
        (3840, 2160): (98, 172, 4214),
        (1440, 900): (66, 104, 1716),
        (10, 10): (2, 2, 1),
    }


GREEN = (0, 204, 51)  # in the web palette too


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1", "CMYK", "YCbCr"])
def test_modes_show_the_same_picture(mode: str) -> None:
    plain = Image.new("RGB", (28, 28), GREEN if mode not in ("L", "LA", "1") else (255, 255, 255))
    form = "JPEG" if mode in ("CMYK", "YCbCr") else "PNG"
    found = pixels_of(decode(file_of(plain.convert(mode), form)))
    assert np.abs(found.astype(int) - np.asarray(plain)).max() <= (6 if form == "JPEG" else 0)


def test_sixteen_bits_of_grey_are_scaled_and_not_cut() -> None:
    grey = Image.fromarray(np.full((28, 28), 257 * 128, np.uint16))
    assert set(pixels_of(decode(file_of(grey))).flat) == {128}


def test_what_is_transparent_is_white() -> None:
    image = Image.new("RGBA", (28, 28), (0, 0, 0, 0))
    image.putpixel((0, 0), (10, 20, 30, 255))
    found = pixels_of(decode(file_of(image)))
    assert tuple(found[0, 0]) == (10, 20, 30)
    assert set(found[1:].flat) == {255}


def test_a_palette_with_a_transparent_entry_is_on_white() -> None:
    image = Image.new("P", (28, 28), 1)
    image.putpalette([0, 0, 0, 9, 9, 9])
    image.info["transparency"] = 1
    assert set(pixels_of(decode(file_of(image, transparency=1))).flat) == {255}


def test_a_photograph_is_turned_as_its_exif_says() -> None:
    image = Image.new("RGB", (56, 28), "white")
    image.paste((0, 0, 0), (0, 0, 28, 28))
    exif = image.getexif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    found = decode(file_of(image, "PNG", exif=exif))
    assert found.grid == Grid(1, 4, 2)
    assert pixels_of(found)[:28].max() == 0
    assert pixels_of(found)[28:].min() == 255


def test_the_first_frame_stands_for_an_animation() -> None:
    frames = [Image.new("RGB", (28, 28), color) for color in ("red", "blue")]
    found = pixels_of(decode(file_of(frames[0], "GIF", save_all=True, append_images=frames[1:])))
    assert tuple(found[0, 0]) == (255, 0, 0)


def test_padding_is_black_on_the_right_and_below() -> None:
    found = pixels_of(decode(file_of(Image.new("RGB", (30, 20), "white"))))
    assert found.shape == (28, 56, 3)
    assert found[:20, :30].min() == 255
    assert found[20:].max() == found[:, 30:].max() == 0


def test_equal_pixels_have_equal_digests_and_other_grids_others() -> None:
    one, same = decode(file_of(smooth(40, 30))), decode(file_of(smooth(40, 30), compress_level=9))
    assert one.digest == same.digest
    assert Picture.of(Grid(1, 2, 8), bytes(100)).digest != Picture.of(Grid(1, 4, 4), bytes(100)).digest


WHOLE = file_of(smooth(300, 200))


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
@pytest.mark.parametrize("keep", [0.1, 0.5, 0.9])
def test_a_cut_file_is_refused(form: str, keep: float) -> None:
    data = file_of(smooth(300, 200), form)
    with pytest.raises(RequestError):
        decode(data[: int(len(data) * keep)])


@pytest.mark.parametrize(
    "data",
    [b"", b"hello", b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"%PDF-1.7\n", b"II*\0" + bytes(60), b"\0" * 4096],
)
def test_what_is_no_picture_is_refused_by_name(data: bytes) -> None:
    with pytest.raises(UnsupportedError, match=r"no picture of a known format"):
        decode(data)


def test_a_bomb_is_refused_before_it_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    bomb = file_of(Image.new("1", (20_000, 20_000)))
    assert len(bomb) < 100_000
    monkeypatch.setattr(Image.Image, "load", lambda *_: pytest.fail("it was decoded"))
    with pytest.raises(RequestError, match=r"too large a picture"):
        decode(bomb)


@given(st.integers(0, len(WHOLE) - 1), st.integers(0, 255))
def test_a_changed_byte_is_a_picture_or_a_refusal(place: int, value: int) -> None:
    data = bytearray(WHOLE)
    data[place] = value
    try:
        assert decode(bytes(data)).pixels
    except RequestError as error:
        assert error.param == "messages[0].content[0]"


def test_nothing_is_left_locked_by_a_refusal() -> None:
    with pytest.raises(RequestError):
        decode(WHOLE[:50])
    assert decoding._decoding.acquire(blocking=False)
    decoding._decoding.release()


def test_the_same_picture_has_another_digest_for_another_tower() -> None:
    """Prefixes on disk outlive a server: the next one may have a tower of the same shape with other weights."""
    data = file_of(smooth(60, 40))
    found = {decode_picture(data, replace(RULES, tower=tower), param="image").digest for tower in ("", "a", "b", "a")}
    assert len(found) == 3
