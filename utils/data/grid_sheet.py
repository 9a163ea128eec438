"""A grid of small pictures with labels: one row for each prompt and seed, one column for each way to draw it."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from utils.data.contact_sheet import shown_frames

_LABEL_WIDTH, _SHEET_WIDTH = 180, 1000
_MOST_SIDE, _LEAST_SIDE = 160, 32
_GAP, _LINE_HEIGHT, _FONT_SIZE = 8, 14, 11
_LABEL_LINES = 5
_GROUND, _INK, _FAINT, _EDGE = "white", "black", "dimgray", "silver"


@dataclass(frozen=True)
class GridRow:
    """A row: two texts in front of it, and for each column the frames (uint8 [F, H, W, 3]) and a line below them."""

    label: str
    detail: str
    cells: tuple[tuple[np.ndarray, str], ...]


def draw_grid(columns: Sequence[str], rows: Sequence[GridRow]) -> Image.Image:
    """One picture of all rows; of a clip its first, middle and last frame, side by side.

    Pictures shrink so that the sheet stays about 1000 px wide, but not below 32 px.
    """
    frames, height, width, _ = rows[0].cells[0][0].shape
    shown = len(shown_frames(frames))
    room = (_SHEET_WIDTH - _LABEL_WIDTH) // len(columns) - _GAP
    # Small pictures are enlarged: those of a miniature model could not be told apart.
    side = max(_LEAST_SIDE, min(_MOST_SIDE, room // shown))
    scale = side / max(width, height)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    cell_width = shown * (size[0] + 2)
    cell_height = max(size[1] + 2 + _LINE_HEIGHT, _LABEL_LINES * _LINE_HEIGHT)
    sheet = Image.new(
        "RGB",
        (
            _LABEL_WIDTH + len(columns) * (cell_width + _GAP) + _GAP,
            _LINE_HEIGHT + 2 * _GAP + len(rows) * (cell_height + _GAP),
        ),
        _GROUND,
    )
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(_FONT_SIZE)
    for number, name in enumerate(columns):
        left = _LABEL_WIDTH + number * (cell_width + _GAP)
        pen.text((left, _GAP), _wrapped(name, font, cell_width, 1)[0], fill=_INK, font=font)
    top = _LINE_HEIGHT + 2 * _GAP
    for row in rows:
        lines = _wrapped(row.label, font, _LABEL_WIDTH - 2 * _GAP, _LABEL_LINES - 1)
        for number, line in enumerate(lines):
            pen.text((_GAP, top + number * _LINE_HEIGHT), line, fill=_INK, font=font)
        pen.text((_GAP, top + len(lines) * _LINE_HEIGHT), row.detail, fill=_FAINT, font=font)
        for number, (frames_FHWC, below) in enumerate(row.cells):
            left = _LABEL_WIDTH + number * (cell_width + _GAP)
            sheet.paste(_strip(frames_FHWC, size), (left, top))
            pen.text((left, top + size[1] + 2), below, fill=_FAINT, font=font)
        top += cell_height + _GAP
    return sheet


def _strip(frames_FHWC: np.ndarray, size: tuple[int, int]) -> Image.Image:
    indices = shown_frames(len(frames_FHWC))
    strip = Image.new("RGB", (len(indices) * (size[0] + 2), size[1] + 2), _GROUND)
    for place, index in enumerate(indices):
        picture = Image.fromarray(frames_FHWC[index])
        is_enlarged = size[0] > picture.width
        resampling = Image.Resampling.NEAREST if is_enlarged else Image.Resampling.LANCZOS
        # An edge, or nobody sees where a picture as light as the ground ends.
        strip.paste(ImageOps.expand(picture.resize(size, resampling), 1, _EDGE), (place * (size[0] + 2), 0))
    return strip


def _wrapped(
    text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int, most: int
) -> list[str]:
    """A text broken into lines that fit, the last one cut where there would be more."""
    lines, line = [], ""
    for word in text.split() or [""]:
        longer = f"{line} {word}".strip()
        if line and font.getlength(longer) > width:
            lines.append(line)
            longer = word
        line = longer
    lines.append(line)
    if len(lines) > most:
        lines = [*lines[: most - 1], f"{lines[most - 1]} ..."]
    return [_cut(one, font, width) for one in lines]


def _cut(line: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    shown = line
    while shown and font.getlength(shown) > width:
        shown = shown[:-1]
    return shown
