import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from utils.data.images import image_suffixes, load_image
from utils.errors import UserError

RED, BLUE = (255, 0, 0), (0, 0, 255)


def corner_image(width: int = 40, height: int = 20) -> Image.Image:
    """Blue with a red top left quarter."""
    image = Image.new("RGB", (width, height), BLUE)
    image.paste(RED, (0, 0, width // 2, height // 2))
    return image


@pytest.mark.parametrize(
    ("orientation", "size", "red_at"),
    [(1, (40, 20), (4, 4)), (3, (40, 20), (36, 16)), (6, (20, 40), (16, 4)), (8, (20, 40), (4, 36))],
)
def test_exif_orientation_is_applied(tmp_path, orientation, size, red_at):
    exif = Image.Exif()
    exif[0x0112] = orientation
    corner_image().save(tmp_path / "a.jpg", exif=exif, quality=95)
    image = load_image(tmp_path / "a.jpg")
    assert image.size == size
    red, _, blue = image.getpixel(red_at)
    assert red > 200 > 50 > blue
    red, _, blue = image.getpixel((size[0] - 1 - red_at[0], size[1] - 1 - red_at[1]))
    assert blue > 200 > 50 > red


@pytest.mark.parametrize("suffix", [".png", ".tif", ".pgm"])
def test_16_bit_grey_is_scaled_not_clipped(tmp_path, suffix):
    values = np.linspace(0, 65535, 64).round().astype(np.uint16).reshape(8, 8)
    Image.fromarray(values).save(tmp_path / f"a{suffix}")
    pixels = np.asarray(load_image(tmp_path / f"a{suffix}"))
    assert pixels.shape == (8, 8, 3)
    assert np.array_equal(pixels, np.repeat(np.round(values / 257).astype(np.uint8)[..., None], 3, axis=-1))


def test_16_bit_rgb(tmp_path):
    rows = b"".join(b"\0" + struct.pack(">6H", 65535, 32896, 0, 257, 514, 65535) for _ in range(2))
    header = struct.pack(">IIBBBBB", 2, 2, 16, 2, 0, 0, 0)
    (tmp_path / "a.png").write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )
    assert np.asarray(load_image(tmp_path / "a.png")).tolist() == [[[255, 128, 0], [1, 2, 255]]] * 2


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def test_alpha_goes_over_white(tmp_path):
    for mode, color, expected in (
        ("RGBA", (255, 0, 0, 0), (255, 255, 255)),
        ("RGBA", (200, 0, 100, 51), (244, 204, 224)),
        ("LA", (0, 51), (204, 204, 204)),
    ):
        Image.new(mode, (4, 4), color).save(tmp_path / "a.png")
        assert load_image(tmp_path / "a.png").getpixel((1, 1)) == pytest.approx(expected, abs=1)


def test_palette_with_transparent_entry(tmp_path):
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 250, 0, 0])
    image.putdata([0, 1])
    image.save(tmp_path / "a.png", transparency=1)
    loaded = load_image(tmp_path / "a.png")
    assert loaded.mode == "RGB"
    assert [loaded.getpixel((x, 0)) for x in range(2)] == [(10, 20, 30), (255, 255, 255)]


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "CMYK"])
def test_other_modes_become_rgb(tmp_path, mode):
    path = tmp_path / "a.tif"
    corner_image().convert(mode).save(path)
    assert load_image(path).mode == "RGB"


def test_damaged_files_are_named_with_a_reason(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "whole.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:2000])
    (tmp_path / "empty.png").touch()
    (tmp_path / "words.png").write_text("no picture")
    Image.fromarray(noise[..., 0].astype(np.float32)).save(tmp_path / "float.tif")
    Image.fromarray(noise[..., 0].astype(np.int32) - 5).save(tmp_path / "int.tif")
    frames = [Image.new("L", (8, 8), value) for value in (0, 100, 200)]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    for name, reason in {
        "cut.jpg": "truncated",
        "empty.png": "the file is empty",
        "words.png": "not readable as an image",
        "float.tif": "8 or 16 bits",
        "int.tif": "8 or 16 bits",
        "moving.gif": "animated",
    }.items():
        with pytest.raises(UserError) as caught:
            load_image(tmp_path / name)
        assert str(caught.value).startswith(f"{tmp_path / name}: ")
        assert reason in str(caught.value)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_decompression_bomb_is_refused_undecoded(tmp_path, monkeypatch):
    decoded = []
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda image: decoded.append(image.size))
    for side in (10_000, 30_000):  # between Pillow's warning and its error, and above both
        header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
        (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b""))
        with pytest.raises(UserError, match=r"more than \d+ pixels"):
            load_image(tmp_path / "a.png")
    assert decoded == []


def test_suffixes_are_pictures_only():
    assert {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".avif"} <= image_suffixes()
    assert not {".mp4", ".mpg", ".pdf", ".eps", ".txt"} & image_suffixes()
