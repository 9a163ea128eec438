"""A contact sheet: small pictures of clips as the model sees them, with their names."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from utils.data.buckets import MediaRules
from utils.data.inspect import printable
from utils.data.manifest import SampleRecord
from utils.data.masks import LossMask
from utils.data.media import load_clip
from utils.errors import UserError

if TYPE_CHECKING:
    import torch

_COLUMNS = 3
_FRAME_WIDTH, _FRAME_HEIGHT = 102, 102
_FRAME_GAP, _CELL_GAP = 3, 10
_CELL_WIDTH = 3 * (_FRAME_WIDTH + 2) + 2 * _FRAME_GAP
_LINE_HEIGHT, _FONT_SIZE = 14, 11
_LABEL_HEIGHT = 2 * _LINE_HEIGHT + 2
_GROUND, _INK, _EDGE, _WARNING = "white", "black", "silver", "firebrick"
# What a mask leaves out: grey with this much of a colour that no picture has all over.
_MASKED, _MASKED_TINT = "magenta", 0.4


@dataclass(frozen=True)
class ContactSheet:
    """The picture, and why clips could not be decoded, by the id of their sample."""

    image: Image.Image
    failures: dict[int, str]


@dataclass(frozen=True)
class _Cell:
    """The pictures of one sample side by side (None: it cannot be decoded), and two lines above them."""

    strip: Image.Image | None
    lines: tuple[str, str]

    @property
    def height(self) -> int:
        return _LABEL_HEIGHT + (self.strip.height if self.strip is not None else _LINE_HEIGHT)


def draw_contact_sheet(samples: Sequence[SampleRecord], rules: MediaRules) -> ContactSheet:
    """Load each clip by `load_clip` and show an image, or a video's first, middle and last frame.

    What a loss mask leaves out is shown grey and tinted, in the squares of the latent grid in which it counts.
    One clip is held at a time. A clip that cannot be decoded keeps its place, and its reason is among `failures`.
    """
    cells: list[_Cell] = []
    failures: dict[int, str] = {}
    for sample in samples:
        try:
            strip = _strip(load_clip(sample, rules), sample.mask)
        except UserError as error:
            strip = None
            failures[sample.sample_id] = printable(error)
        cells.append(_Cell(strip, (printable(sample.path.name), _describe(sample, rules))))
    return ContactSheet(_paste(cells), failures)


def shown_frames(num_frames: int) -> tuple[int, ...]:
    """Indices of the first, middle and last frame; of an image the only one."""
    return tuple(sorted({0, (num_frames - 1) // 2, num_frames - 1}))


def _describe(sample: SampleRecord, rules: MediaRules) -> str:
    masked = "" if sample.mask is None else f", {sample.mask.grid.masked_share:.0%} masked"
    if sample.kind == "image":
        return f"{sample.bucket}, image{masked}"
    start = sample.clip_start_seconds
    # The last frame begins within the video; how long it would be shown is up to the model's frame rate.
    end = min(start + sample.bucket.num_frames / rules.fps, sample.info.seconds)
    return f"{sample.bucket}, {start:.2f}-{end:.2f} of {sample.info.seconds:.2f} s{masked}"


def _strip(video_CFHW: "torch.Tensor", mask: LossMask | None) -> Image.Image:
    frames = [_to_image(video_CFHW[:, index]) for index in shown_frames(video_CFHW.shape[1])]
    if mask is not None:
        frames = [_tint_masked(frame, mask) for frame in frames]
    # One picture may be as wide as three; nothing is ever enlarged.
    room = (_CELL_WIDTH - 2 if len(frames) == 1 else _FRAME_WIDTH, _FRAME_HEIGHT)
    for frame in frames:
        frame.thumbnail(room, Image.Resampling.LANCZOS)
    # An edge, or nobody sees where a picture as light as the ground is cropped.
    frames = [ImageOps.expand(frame, 1, _EDGE) for frame in frames]
    width, height = frames[0].size
    strip = Image.new("RGB", (len(frames) * (width + _FRAME_GAP) - _FRAME_GAP, height), _GROUND)
    for index, frame in enumerate(frames):
        strip.paste(frame, (index * (width + _FRAME_GAP), 0))
    return strip


def _tint_masked(frame: Image.Image, mask: LossMask) -> Image.Image:
    weights_HW = np.kron(mask.grid.weights_HW(), np.ones((mask.grid.stride, mask.grid.stride), np.float32))
    counts = Image.fromarray((weights_HW * 255).round().astype(np.uint8))
    left_out = Image.blend(
        frame.convert("L").convert("RGB"), Image.new("RGB", frame.size, _MASKED), _MASKED_TINT
    )
    return Image.composite(frame, left_out, counts)


def _to_image(frame_CHW: "torch.Tensor") -> Image.Image:
    import torch

    pixels_HWC = ((frame_CHW + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0)
    return Image.fromarray(pixels_HWC.contiguous().numpy())


def _paste(cells: Sequence[_Cell]) -> Image.Image:
    rows = [cells[start : start + _COLUMNS] for start in range(0, len(cells), _COLUMNS)]
    heights = [max(cell.height for cell in row) for row in rows]
    width = _COLUMNS * (_CELL_WIDTH + _CELL_GAP) + _CELL_GAP
    sheet = Image.new("RGB", (width, sum(heights) + _CELL_GAP * (len(rows) + 1)), _GROUND)
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(_FONT_SIZE)
    top = _CELL_GAP
    for row, height in zip(rows, heights, strict=True):
        for column, cell in enumerate(row):
            left = _CELL_GAP + column * (_CELL_WIDTH + _CELL_GAP)
            for number, line in enumerate(cell.lines):
                pen.text(
                    (left, top + number * _LINE_HEIGHT),
                    _shortened(line, font),
                    fill=_INK if number == 0 else "dimgray",
                    font=font,
                )
            if cell.strip is None:
                pen.text((left, top + _LABEL_HEIGHT), "cannot be decoded", fill=_WARNING, font=font)
            else:
                sheet.paste(cell.strip, (left, top + _LABEL_HEIGHT))
        top += height + _CELL_GAP
    return sheet


def _shortened(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """The text cut in its middle until it fits a cell: names often differ at their ends."""
    shown, kept = text, len(text)
    while font.getlength(shown) > _CELL_WIDTH and kept > 2:
        kept -= 1
        shown = f"{text[: kept // 2]}...{text[-(kept - kept // 2) :]}"
    return shown
