"""Picture files to pixels: turned as EXIF says, on white, in eight bits of red, green and blue, scaled and padded.

Files are foreign: their size is looked at before a pixel is decoded, and one is decoded at a time.
"""

from __future__ import annotations

import io
import struct
import threading
import warnings
import zlib

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from exo_kimi.errors import RequestError, UnsupportedError
from exo_kimi.pictures.picture import Picture, PixelRules

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
MOST_PIXELS = 40_000_000
"""Of a file: decoded, it takes about 450 MB at worst (with transparency), for a moment."""
LONGEST_SIDE = 30_000
# What Pillow's decoders raise for damaged files, beside OSError.
_DAMAGE = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    IndexError,
    KeyError,
    OverflowError,
    EOFError,
    struct.error,
    zlib.error,
)
_decoding = threading.Lock()


def decode_picture(data: bytes, rules: PixelRules, *, param: str) -> Picture:
    """The pixels of a file as the tower takes them. Slow: call it in a thread.

    The first frame of an animation stands for it.

    Args:
        data: a file of one of `FORMATS`.
        rules: of the checkpoint.
        param: what the picture is called in errors.

    Raises:
        UnsupportedError: a format that is not read.
        RequestError: no picture, a damaged one, or one that is too large.
    """
    with _decoding, warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                return _scaled(_as_rgb(image, param), rules)
        except UnidentifiedImageError:
            raise UnsupportedError(
                f"'{param}' is no picture of a known format",
                expected=", ".join(FORMATS),
                found=f"{len(data):,} bytes, the first {data[:8]!r}",
                param=param,
                code="unsupported_image",
            ) from None
        except (Image.DecompressionBombError, Image.DecompressionBombWarning):
            raise _too_large("more pixels than its first frame says", param) from None
        except MemoryError:
            raise _too_large("more than this machine's memory holds", param) from None
        except _DAMAGE as error:
            raise RequestError(
                f"'{param}' cannot be decoded", found=str(error)[:120], param=param, code="invalid_image"
            ) from None


def _as_rgb(image: Image.Image, param: str) -> Image.Image:
    width, height = image.size
    if width * height > MOST_PIXELS or max(width, height) > LONGEST_SIDE:
        raise _too_large(f"{width} x {height} pixels", param)
    if width < 1 or height < 1:
        raise RequestError(f"'{param}' has no pixels", param=param, code="invalid_image")
    turned = ImageOps.exif_transpose(image)
    if turned.mode.startswith(("I;16", "I")):
        # Sixteen bits of grey: Pillow's own conversion would cut them off at 255.
        grey = np.asarray(turned).astype(np.float64)
        turned = Image.fromarray(np.clip(np.rint(grey / 257), 0, 255).astype(np.uint8))
    if turned.has_transparency_data:
        seen = turned.convert("RGBA")
        paper = Image.new("RGBA", seen.size, "white")
        paper.alpha_composite(seen)
        turned = paper
    return turned.convert("RGB")


def _scaled(image: Image.Image, rules: PixelRules) -> Picture:
    size = rules.size(*image.size)
    if size != image.size:
        image = image.resize(size, Image.Resampling.BICUBIC)
    grid = rules.grid(*size)
    padded = np.zeros((grid.rows * rules.patch_size, grid.columns * rules.patch_size, 3), np.uint8)
    padded[: size[1], : size[0]] = np.asarray(image)
    return Picture.of(grid, padded.tobytes(), tower=rules.tower)


def _too_large(found: str, param: str) -> RequestError:
    return RequestError(
        f"'{param}' is too large a picture",
        expected=f"at most {MOST_PIXELS:,} pixels, {LONGEST_SIDE:,} on a side",
        found=found,
        fix="send it smaller; the model sees at most about 16,384 patches of 14 x 14 pixels",
        param=param,
        code="image_too_large",
    )
