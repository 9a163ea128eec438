"""The sheet: every picture in its place, in its colour, and text that fits."""

import numpy as np

from utils.data.grid_sheet import GridRow, draw_grid

RED, GREEN, BLUE = (220, 20, 20), (20, 220, 20), (20, 20, 220)


def clip(*colours, height=24, width=48):
    return np.stack([np.full((height, width, 3), colour, np.uint8) for colour in colours])


def places(sheet, colour):
    """Left edge and top of the region of one colour."""
    rows, columns = np.nonzero((np.asarray(sheet) == colour).all(-1))
    return (columns.min(), rows.min(), len(rows)) if len(rows) else None


def test_columns_go_right_rows_go_down_and_frames_stand_side_by_side():
    rows = [
        GridRow("a prompt", "neutral, seed 0", ((clip(RED), ""), (clip(GREEN), "change 0.5"))),
        GridRow("b " * 200, "domain, seed 1", ((clip(BLUE), ""), (clip(GREEN), "change 0.5"))),
    ]
    sheet = draw_grid(["base", "tuned"], rows)
    red, green, blue = (places(sheet, colour) for colour in (RED, GREEN, BLUE))
    assert red[0] < green[0]
    assert red[1] == green[1] < blue[1]
    assert red[0] == blue[0]
    assert green[2] == 2 * red[2] == 2 * 160 * 80
    assert sheet.width <= 1000


def test_a_clip_shows_its_first_middle_and_last_frame():
    second, fourth = (20, 90, 200), (200, 90, 20)
    frames = clip(RED, second, GREEN, fourth, BLUE)
    sheet = draw_grid(["base"] * 5, [GridRow("x", "y", ((frames, ""),) * 5)])
    red, green, blue = (places(sheet, colour) for colour in (RED, GREEN, BLUE))
    assert red[0] < green[0] < blue[0]
    assert places(sheet, second) is None
    assert places(sheet, fourth) is None
    # Five columns share the 820 px beside the labels, and three frames each of them.
    assert red[2] == 5 * 52 * 26
