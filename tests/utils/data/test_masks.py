import os

import numpy as np
import pytest
from PIL import Image

from utils.config.schema import DirectoryConfig
from utils.data.buckets import Bucket
from utils.data.cache_keys import latent_parts
from utils.data.manifest import build_manifest
from utils.data.masks import list_masks, make_mask_grid
from utils.data.media import MediaInfo, load_clip
from utils.data.memo import HashMemo
from utils.errors import UserError


def save_mask(path, pixels_HW):
    Image.fromarray(np.asarray(pixels_HW, np.uint8)).save(path)
    return path


@pytest.fixture
def places(tmp_path):
    """A folder for media and one for masks."""
    for name in ("media", "masks"):
        (tmp_path / name).mkdir()
    return tmp_path / "media", tmp_path / "masks"


@pytest.fixture
def build(places, rules, make_dataset):
    """The manifest of the media folder with its masks."""

    def run(*more, hashes=None, **keys):
        directory = DirectoryConfig(path=str(places[0]), mask_path=str(places[1]))
        dataset = make_dataset(places[0], **keys)
        dataset = type(dataset)(**(vars(dataset) | {"directory": (directory, *more)}))
        return build_manifest(dataset, rules, hashes or HashMemo())

    return run


def test_a_mask_is_averaged_over_each_latent_position(tmp_path):
    # 32 x 16 px are 4 x 2 positions of 8 px.
    pixels_HW = np.zeros((16, 32), np.uint8)
    pixels_HW[:8, :8] = 255  # whole
    pixels_HW[:8, 8:12] = 255  # left half of the second
    pixels_HW[8:, 16:24] = 51  # a fifth
    pixels_HW[15, 31] = 255  # one pixel of 64
    grid = make_mask_grid(
        save_mask(tmp_path / "a.png", pixels_HW), MediaInfo("image", 32, 16), Bucket(32, 16, 1), 8
    )
    assert (grid.height, grid.width) == (2, 4)
    expected = np.array([[1, 0.5, 0, 0], [0, 0, 0.2, 1 / 64]], np.float32)
    assert np.array_equal(grid.weights_HW(), expected)
    assert grid.masked_share == pytest.approx(1 - (1 + 0.5 + 0.2 + 1 / 64) / 8)


def test_white_is_exactly_one(tmp_path):
    for stride in (8, 16):
        path = save_mask(tmp_path / "a.png", np.full((96, 50), 255))
        grid = make_mask_grid(path, MediaInfo("video", 100, 192, 48, 24.0, 2.0), Bucket(32, 64, 5), stride)
        assert (grid.weights_HW() == 1).all()
        assert grid.masked_share == 0


@pytest.mark.parametrize("scale", [0.5, 1, 2])
def test_a_mask_is_cropped_as_its_medium_is(tmp_path, make_record, rules, scale):
    """A picture that is its own mask: what is bright in the clip is what counts."""
    generator = np.random.default_rng(0)
    coarse = generator.integers(0, 2, (5, 13), dtype=np.uint8) * 255
    pixels_HW = np.kron(
        coarse, np.ones((20, 20), np.uint8)
    )  # 260 x 100 px, of which the bucket shows 160 x 100
    Image.fromarray(np.stack([pixels_HW] * 3, -1)).save(tmp_path / "medium.png")
    mask = Image.fromarray(pixels_HW).resize((round(260 * scale), round(100 * scale)), Image.Resampling.BOX)
    mask.save(tmp_path / "mask.png")
    bucket, info = Bucket(128, 80, 1), MediaInfo("image", 260, 100)
    grid = make_mask_grid(tmp_path / "mask.png", info, bucket, 8)
    seen_HW = load_clip(
        make_record(path=tmp_path / "medium.png", kind="image", bucket=bucket, info=info), rules
    )
    seen_HW = seen_HW[0, 0].numpy() / 2 + 0.5
    expected = seen_HW.reshape(10, 8, 16, 8).mean((1, 3))
    # Lanczos rings at edges and the mask does not; a crop that is a pixel off would be off by 0.1 at every edge.
    assert np.abs(grid.weights_HW() - expected).mean() < 0.02
    assert 0.3 < grid.masked_share < 0.7


@pytest.mark.parametrize("size", [(1920, 1080), (640, 360), (853, 480), (854, 480), (11, 6)])
def test_a_mask_of_any_size_and_the_same_shape_is_taken(tmp_path, size):
    path = save_mask(tmp_path / "a.png", np.full(size[::-1], 255))
    make_mask_grid(path, MediaInfo("image", 1280, 720), Bucket(64, 32, 1), 8)


@pytest.mark.parametrize("size", [(720, 1280), (640, 480), (860, 480), (8, 6), (1, 1)])
def test_a_mask_of_another_shape_is_refused(tmp_path, size):
    path = save_mask(tmp_path / "a.png", np.full(size[::-1], 255))
    with pytest.raises(
        UserError, match=rf"a\.png: {size[0]}x{size[1]} px have another shape than the 1280x720"
    ):
        make_mask_grid(path, MediaInfo("image", 1280, 720), Bucket(64, 32, 1), 8)


def test_masks_are_upright_grey_and_without_transparency(tmp_path):
    info, bucket = MediaInfo("image", 32, 16), Bucket(32, 16, 1)
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    half_HW = np.zeros((16, 32), np.uint8)
    half_HW[:8] = 255
    Image.fromarray(half_HW).save(tmp_path / "turned.png", exif=exif)
    assert make_mask_grid(tmp_path / "turned.png", info, bucket, 8).weights_HW().tolist() == [
        [0] * 4,
        [1] * 4,
    ]
    Image.fromarray(half_HW.astype(np.uint16) * 257).save(tmp_path / "deep.png")
    Image.fromarray(half_HW).convert("1").save(tmp_path / "bits.png")
    Image.fromarray(half_HW).convert("RGBA").save(tmp_path / "opaque.png")
    for name in ("deep", "bits", "opaque"):
        grid = make_mask_grid(tmp_path / f"{name}.png", info, bucket, 8)
        assert grid.weights_HW().tolist() == [[1] * 4, [0] * 4], name
    painted = Image.new("RGBA", (32, 16), (255, 255, 255, 0))
    painted.paste((255, 255, 255, 255), (0, 0, 16, 16))
    painted.save(tmp_path / "painted.png")
    with pytest.raises(UserError, match=r"painted\.png: has transparent parts"):
        make_mask_grid(tmp_path / "painted.png", info, bucket, 8)


def test_samples_get_their_masks_and_others_have_none(places, write_sample, build, rules):
    media, masks = places
    for name in ("a.png", "b.mp4", "c.png"):
        write_sample(media / name)
    half_HW = np.zeros((64, 96), np.uint8)
    half_HW[:, :48] = 255
    for name in ("a.png", "b.webp"):
        (
            save_mask(masks / name, half_HW)
            if name == "a.png"
            else Image.fromarray(half_HW).save(masks / name, lossless=True)
        )
    manifest = build(video_clip_mode="uniform:3")
    assert manifest.skipped == ()
    found = {(sample.path.name, sample.mask and sample.mask.path.name) for sample in manifest.samples}
    assert found == {("a.png", "a.png"), ("b.mp4", "b.webp"), ("c.png", None)}
    clips = [sample for sample in manifest.samples if sample.path.name == "b.mp4"]
    assert len(clips) == 3 and len({clip.mask for clip in clips}) == 1
    grid = clips[0].mask.grid
    assert (grid.width, grid.height) == (clips[0].bucket.width // 8, clips[0].bucket.height // 8)
    assert grid.weights_HW()[:, 0].min() == 1 and grid.weights_HW()[:, -1].max() == 0
    # The mask changes neither what is encoded nor who the sample is.
    for path in masks.iterdir():
        path.unlink()
    plain = build(video_clip_mode="uniform:3").samples
    assert [latent_parts(sample, rules, "vae", "float32") for sample in plain] == [
        latent_parts(sample, rules, "vae", "float32") for sample in manifest.samples
    ]
    assert [sample.sample_id for sample in plain] == [sample.sample_id for sample in manifest.samples]


def make_bad_masks(media, masks, write_sample) -> dict[str, tuple[str, str]]:
    """One medium for each thing that may be wrong with a mask; what is to be said about it."""
    for name in ("black", "cut", "empty", "film", "loop", "shape", "twice"):
        write_sample(media / f"{name}.png")
    white_HW = np.full((64, 96), 255, np.uint8)
    save_mask(masks / "black.png", np.zeros((64, 96)))
    (masks / "cut.png").write_bytes(save_mask(masks / "cut.png", white_HW).read_bytes()[:60])
    (masks / "empty.png").touch()
    (masks / "film.mp4").write_bytes(b"a video")
    (masks / "loop.png").symlink_to(masks / "loop.png")
    save_mask(masks / "shape.png", white_HW.T)
    save_mask(masks / "twice.png", white_HW)
    save_mask(masks / "twice.bmp", white_HW)
    save_mask(masks / "ghost.png", white_HW)
    (masks / "notes.csv").touch()
    (masks / "folder").mkdir()
    (masks / ".hidden.png").touch()
    expected = {
        "black.png": "black.png: is black wherever the sample is",
        "cut.png": "cut.png: not readable as an image",
        "empty.png": "empty.png: the file is empty",
        "film.png": "film.mp4: a mask is one picture for all frames",
        "loop.png": "loop.png: not readable (Too many levels of symbolic links)",
        "shape.png": "64x96 px have another shape than the 96x64 px",
        "twice.png": "several masks of one name (twice.bmp, twice.png)",
    }
    return {name: ("bad_mask", text) for name, text in expected.items()} | {
        "ghost.png": ("mask_without_medium", "no image or video has its name"),
        "notes.csv": ("not_media", "not a picture"),
        "folder": ("not_media", "not a picture"),
    }


def test_bad_masks_are_bad_files_and_named(places, write_sample, build):
    media, masks = places
    write_sample(media / "good.png")
    expected = make_bad_masks(media, masks, write_sample)
    manifest = build()
    assert [sample.path.name for sample in manifest.samples] == ["good.png"]
    found = {file.path.name: (file.code, file.reason) for file in manifest.skipped}
    assert found.keys() == expected.keys()
    for name, (code, text) in expected.items():
        assert found[name][0] == code
        assert text in found[name][1]
        if code == "bad_mask":  # the medium is what is left out, and the message says where its mask lies
            assert (media / name) in {file.path for file in manifest.skipped}
            assert str(masks) in found[name][1]


@pytest.mark.parametrize("name", ["black", "shape", "ghost"])
def test_bad_masks_stop_where_bad_files_do(places, write_sample, build, name):
    media, masks = places
    write_sample(media / "good.png")
    make_bad_masks(media, masks, write_sample)
    for path in (*media.iterdir(), *masks.iterdir()):
        if path.stem not in ("good", name) and not path.is_dir():
            path.unlink()
    with pytest.raises(UserError, match=rf"{name}\.png.*on_bad_file"):
        build(on_bad_file="error")


def test_a_mask_of_a_file_that_is_skipped_is_not_without_medium(places, write_sample, build):
    media, masks = places
    write_sample(media / "good.png")
    write_sample(media / "bare.png", caption=None)
    save_mask(masks / "bare.png", np.full((64, 96), 255))
    assert [file.code for file in build().skipped] == ["no_caption"]


def test_directories_may_share_masks_and_hold_them(places, write_sample, make_dataset, rules):
    """Neither is a mask of the other directory without a medium, nor the folder of masks a lost folder."""
    media, _ = places
    inside, other = media / "masks", media.parent / "other"
    inside.mkdir()
    other.mkdir()
    write_sample(media / "a.png")
    write_sample(other / "b.png")
    for name in "ab":
        save_mask(inside / f"{name}.png", np.full((64, 96), 128))
    directories = [DirectoryConfig(path=str(path), mask_path=str(inside)) for path in (media, other)]
    dataset = make_dataset(media)
    dataset = type(dataset)(**(vars(dataset) | {"directory": tuple(directories)}))
    manifest = build_manifest(dataset, rules, HashMemo())
    assert manifest.skipped == ()
    assert [sample.mask.path.name for sample in manifest.samples] == ["a.png", "b.png"]


def test_a_folder_of_masks_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UserError, match=r"mask_path .*nowhere: cannot be listed"):
        list_masks(tmp_path / "nowhere")


def test_unchanged_masks_are_read_once_over_all_runs(places, write_sample, build, monkeypatch):
    media, masks = places
    write_sample(media / "a.png")
    mask = save_mask(masks / "a.png", np.full((64, 96), 100))
    for path in (media / "a.png", mask):
        os.utime(path, (1.6e9, 1.6e9))
    memo = media.parent / "memo.jsonl"
    first = build(hashes=HashMemo(memo)).samples
    with monkeypatch.context() as patch:
        patch.setattr("utils.data.memo.make_mask_grid", lambda *_: pytest.fail("it was read again"))
        assert build(hashes=HashMemo(memo)).samples == first
    # Another bucket is another grid, and a changed mask is another mask.
    larger = build(hashes=HashMemo(memo), resolutions=(128,)).samples[0]
    assert larger.mask.grid.width > first[0].mask.grid.width
    save_mask(mask, np.full((64, 96), 200))
    changed = build(hashes=HashMemo(memo)).samples[0].mask
    assert changed.content_hash != first[0].mask.content_hash
    assert changed.grid.masked_share == pytest.approx(1 - 200 / 255)


def test_a_changed_mask_of_the_same_size_is_seen_also_where_sizes_are_trusted(places, write_sample, build):
    media, masks = places
    write_sample(media / "a.png")
    mask = save_mask(masks / "a.bmp", np.full((64, 96), 100))
    for path in (media / "a.png", mask):
        os.utime(path, (1.6e9, 1.6e9))
    memo = media.parent / "memo.jsonl"
    before = build(hashes=HashMemo(memo)).samples[0]
    size = mask.stat().st_size
    save_mask(mask, np.full((64, 96), 200))
    assert mask.stat().st_size == size
    trusting = HashMemo(memo, trust_sizes=True)
    after = build(hashes=trusting).samples[0]
    assert after.mask.grid.masked_share == pytest.approx(1 - 200 / 255)
    assert after.mask.content_hash != before.mask.content_hash
    assert after.content_hash == before.content_hash
