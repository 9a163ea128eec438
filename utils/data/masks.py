"""Loss masks: pictures that say which part of a sample counts in the loss, brought to the grid of its latents.

A mask is a picture with the stem of its medium in the directory's `mask_path`. White counts, black does not, grey counts
in part. It is cropped and scaled as its medium is, and holds for all frames of a video.
"""

import base64
import zlib
from collections.abc import Iterator, Set
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from utils.data.buckets import Bucket
from utils.data.images import load_mask
from utils.data.media import MediaInfo, fit_to_bucket, media_kind
from utils.errors import UserError

# A mask that was scaled with its medium is off by less than a pixel in each side. Where a pixel is more than this part
# of a side, anything would pass.
_LARGEST_ASPECT_ERROR = 0.1
_WHITE = 255
_PIXEL_SUM = np.dtype("<u2")


@dataclass(frozen=True)
class MaskGrid:
    """How much each latent position counts, exactly: sums of the 8-bit mask's pixels over each position.

    Attributes:
        height, width: in latent positions.
        stride: a position has `stride` x `stride` px.
        packed: the sums as little-endian uint16 [H, W], deflated, in base64.
    """

    height: int
    width: int
    stride: int
    packed: str

    def weights_HW(self) -> np.ndarray:
        """Weights from 0 to 1, float32 [H, W]."""
        sums = np.frombuffer(zlib.decompress(base64.b64decode(self.packed)), _PIXEL_SUM)
        return sums.reshape(self.height, self.width).astype(np.float32) / (_WHITE * self.stride**2)

    @property
    def masked_share(self) -> float:
        """Share of the area that does not count, from 0 to below 1."""
        return 1.0 - float(self.weights_HW().mean(dtype=np.float64))


@dataclass(frozen=True)
class LossMask:
    """A sample's mask: the file, xxh3-128 of its content, and what the loss sees of it."""

    path: Path
    content_hash: str
    grid: MaskGrid


@dataclass(frozen=True)
class MaskFolder:
    """What lies in a `mask_path`: media files by stem, and whatever else there is."""

    folder: Path
    by_stem: dict[str, tuple[Path, ...]]
    others: tuple[Path, ...]

    def mask_of(self, medium: Path) -> Path | None:
        """The mask of a medium, None where it has none.

        Raises:
            UserError: it is not clear which picture is meant. The message names the files.
        """
        found = self.by_stem.get(medium.stem, ())
        if len(found) > 1:
            names = ", ".join(path.name for path in found)
            raise UserError(f"{self.folder}: several masks of one name ({names}); keep one of them")
        if found and media_kind(found[0]) == "video":
            raise UserError(f"{found[0]}: a mask is one picture for all frames, and this is a video")
        return found[0] if found else None

    def orphans(self, stems: Set[str]) -> Iterator[Path]:
        """Masks whose stem is that of no medium."""
        for stem, paths in self.by_stem.items():
            if stem not in stems:
                yield from paths


def list_masks(folder: Path) -> MaskFolder:
    """Look through a `mask_path`, not into folders in it; hidden files are passed over.

    Raises:
        UserError: it is not there or cannot be listed.
    """
    try:
        entries = sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    except OSError as error:
        raise UserError(
            f"dataset, mask_path {folder}: cannot be listed ({error.strerror}); mend the path "
            f"(looked for {folder.absolute()})"
        ) from error
    by_stem: dict[str, tuple[Path, ...]] = {}
    others: list[Path] = []
    for entry in entries:
        if media_kind(entry) is None or entry.is_dir():
            others.append(entry)
        else:
            by_stem[entry.stem] = (*by_stem.get(entry.stem, ()), entry)
    return MaskFolder(folder, by_stem, tuple(others))


def make_mask_grid(path: Path, medium: MediaInfo, bucket: Bucket, stride: int) -> MaskGrid:
    """Read a mask, crop it as its medium is cropped, scale it to the bucket, and average it over latent positions.

    Args:
        path: the mask.
        medium: what it is for.
        bucket: of the sample.
        stride: pixels to a latent position in each direction; at most 16.

    Raises:
        OSError: there is no such file.
        UserError: it cannot be read, has another shape than its medium, or is black wherever the crop shows it. The
            message names it.
    """
    mask = load_mask(path)
    # As if its pixels had the shape that makes it as wide as the medium: then the crop is the same, to the pixel.
    pixel_aspect = medium.width * mask.height / (medium.height * mask.width)
    if abs(pixel_aspect - 1) > min(1 / mask.width + 1 / mask.height, _LARGEST_ASPECT_ERROR):
        raise UserError(
            f"{path}: {mask.width}x{mask.height} px have another shape than the {medium.width}x{medium.height} px "
            "that it is for; a mask shows all of its file, in any size"
        )
    pixels_HW = fit_to_bucket(mask, pixel_aspect, bucket, Image.Resampling.BOX)
    height, width = bucket.height // stride, bucket.width // stride
    # At most 255 x 16 x 16, which two bytes hold.
    sums_HW = pixels_HW.reshape(height, stride, width, stride).sum((1, 3), dtype=np.uint32)
    if not sums_HW.any():
        raise UserError(f"{path}: is black wherever the sample is, so nothing of it would count")
    packed = base64.b64encode(zlib.compress(sums_HW.astype(_PIXEL_SUM).tobytes())).decode()
    return MaskGrid(height, width, stride, packed)
