"""Still images: any file Pillow reads, as upright 8-bit RGB."""

import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from utils.errors import UserError

# Formats in which several pictures in a file are an animation (in others they are pages or previews; the first counts).
_ANIMATION_FORMATS = frozenset({"GIF", "PNG", "WEBP", "AVIF", "FLI"})
# Not pictures with pixels of their own (an interpreter or a handler draws them), or really a video.
_UNWANTED_FORMATS = frozenset({"EPS", "WMF", "PDF", "MPEG", "GRIB", "BUFR", "HDF5"})
_WHITE_16_BIT = 65535
_OPAQUE = 255

# Once and for all threads, because `catch_warnings` is for one: a bomb inside another format (an icon) is an error, and
# damaged tags that Pillow passes over, in a message without a name, are not worth a line each.
warnings.filterwarnings("error", category=Image.DecompressionBombWarning)
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")


@cache
def image_suffixes() -> frozenset[str]:
    """Lower-case file name endings of the image formats that are read."""
    return frozenset(
        suffix
        for suffix, name in Image.registered_extensions().items()
        if name in Image.OPEN and name not in _UNWANTED_FORMATS
    )


def load_image(path: Path) -> Image.Image:
    """Read an image as upright RGB: EXIF orientation applied, alpha over white, 16 bits scaled to 8.

    Raises:
        OSError: there is no such file.
        UserError: the file cannot be read, is damaged or animated, or has more pixels than Pillow's
            `MAX_IMAGE_PIXELS`. The message names the file and the reason.
    """
    return _read(path, _to_rgb)


def load_mask(path: Path) -> Image.Image:
    """Read an image as `load_image` does, as 8-bit grey (mode L, Rec. 601 luma).

    Raises:
        OSError: there is no such file.
        UserError: as `load_image`, or a part of it is transparent: a mask says by its brightness what counts, and a
            painted mask that lives in the alpha channel would be taken for all white.
    """

    def to_grey(image: Image.Image) -> Image.Image:
        if image.has_transparency_data and image.convert("RGBA").getchannel("A").getextrema()[0] != _OPAQUE:
            raise UserError(f"{path}: has transparent parts; save it as plain black and white")
        return _to_rgb(image).convert("L")

    return _read(path, to_grey)


def _read(path: Path, convert: Callable[[Image.Image], Image.Image]) -> Image.Image:
    if path.stat().st_size == 0:
        raise UserError(f"{path}: the file is empty")
    try:
        with Image.open(path) as image:
            if Image.MAX_IMAGE_PIXELS is not None and image.width * image.height > Image.MAX_IMAGE_PIXELS:
                raise Image.DecompressionBombError
            if image.format in _ANIMATION_FORMATS and getattr(image, "is_animated", False):
                raise UserError(f"{path}: is an animated image; convert it to a video such as .mp4")
            image.load()
            return convert(ImageOps.exif_transpose(image))
    except UserError:
        raise
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise UserError(f"{path}: has more than {Image.MAX_IMAGE_PIXELS} pixels; make it smaller") from error
    except UnidentifiedImageError as error:  # its own words repeat the path
        raise UserError(
            f"{path}: not readable as an image (its content is of no kind that is read)"
        ) from error
    except OSError as error:
        # With a number it is the system's word about the file, without one Pillow's about the content.
        reason = f"as an image ({error})" if error.errno is None else f"({error.strerror})"
        raise UserError(f"{path}: not readable {reason}") from error
    except Exception as error:  # Pillow's readers answer damaged bytes with almost any exception
        raise UserError(f"{path}: not readable as an image ({type(error).__name__}: {error})") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        # Pillow's own conversion clips everything above 255 to white.
        return _from_16_bit(image)
    if image.mode == "F":
        raise ValueError("float pixels have no defined white; save it with 8 or 16 bits")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        backdrop = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(backdrop, image).convert("RGB")
    return image.convert("RGB")


def _from_16_bit(image: Image.Image) -> Image.Image:
    pixels_HW = np.asarray(image).astype(np.int64)
    if pixels_HW.min() < 0 or pixels_HW.max() > _WHITE_16_BIT:
        raise ValueError("32-bit pixels have no defined white; save it with 8 or 16 bits")
    pixels_HW = (pixels_HW * 255 + _WHITE_16_BIT // 2) // _WHITE_16_BIT
    return Image.fromarray(pixels_HW.astype(np.uint8)).convert("RGB")
