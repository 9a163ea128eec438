import json
import os
import shutil
import struct
import tempfile
import zlib
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from PIL import Image

from utils.config.schema import DirectoryConfig
from utils.data.buckets import Bucket
from utils.data.cache_keys import LATENTS, latent_parts, make_key
from utils.data.manifest import build_manifest, default_cache_dir, make_sample_id
from utils.data.media import load_clip
from utils.data.memo import HashMemo
from utils.errors import UserError
from utils.files import content_hash


@pytest.fixture
def build(make_dataset, rules):
    def run(*args, **keys):
        return build_manifest(make_dataset(*args, **keys), rules, HashMemo())

    return run


def reasons(manifest) -> dict[str, tuple[str, str]]:
    return {file.path.name: (file.code, file.reason) for file in manifest.skipped}


def test_files_become_samples_with_all_that_training_needs(tmp_path, write_sample, build, rules):
    write_sample(tmp_path / "b.mp4", "  a red square\n", num_frames=36)
    write_sample(tmp_path / "a.png", "\ufeffa circle")
    manifest = build(tmp_path, num_repeats=2.5, caption_prefix="drawing: ")
    image, video = manifest.samples
    assert manifest.skipped == ()
    assert [image.path.name, video.path.name] == ["a.png", "b.mp4"]
    assert [image.caption, video.caption] == ["drawing: a circle", "drawing: a red square"]
    assert [image.kind, video.kind] == ["image", "video"]
    # Of 1:2, 1:1 and 2:1 around 64 x 64 px, rounded to 16; 36 frames are 24 at 16 per second.
    assert [image.bucket, video.bucket] == [Bucket(96, 48, 1), Bucket(96, 48, 9)]
    assert (video.info.num_frames, video.info.seconds) == (36, pytest.approx(1.5))
    assert {sample.num_repeats for sample in manifest.samples} == {2.5}
    assert video.content_hash == content_hash(video.path)
    assert video.sample_id == make_sample_id(tmp_path.name, "b.mp4")
    assert all(0 <= sample.sample_id < 2**63 for sample in manifest.samples)
    for sample in manifest.samples:
        assert load_clip(sample, rules).shape == (
            3,
            sample.bucket.num_frames,
            sample.bucket.height,
            sample.bucket.width,
        )


def test_progress_is_told(tmp_path, write_sample, make_dataset, rules):
    for name in ("a.png", "b.png", "c.csv"):
        (write_sample(tmp_path / name) if name != "c.csv" else (tmp_path / name).touch())
    calls = []
    build_manifest(make_dataset(tmp_path), rules, HashMemo(), lambda done, total: calls.append((done, total)))
    assert calls == [(1, 3), (2, 3), (3, 3)]


def test_ids_do_not_depend_on_other_files_or_on_where_the_folder_lies(tmp_path, write_sample, build):
    (tmp_path / "one" / "shapes").mkdir(parents=True)
    for name in ("b.png", "c.png"):
        write_sample(tmp_path / "one" / "shapes" / name)
    before = {s.path.name: s.sample_id for s in build(tmp_path / "one" / "shapes").samples}
    write_sample(tmp_path / "one" / "shapes" / "a.png")
    shutil.move(tmp_path / "one", tmp_path / "two")
    after = {s.path.name: s.sample_id for s in build(tmp_path / "two" / "shapes").samples}
    assert before.items() < after.items()
    assert len(set(after.values())) == 3


def test_directories_of_one_name_have_ids_of_their_own(tmp_path, write_sample, build):
    for parent in ("x", "y"):
        (tmp_path / parent / "shapes").mkdir(parents=True)
        write_sample(tmp_path / parent / "shapes" / "a.png")
    same_again = DirectoryConfig(path=str(tmp_path / "x" / "shapes"), resolutions=(128,))
    manifest = build(
        tmp_path / "x" / "shapes", DirectoryConfig(path=str(tmp_path / "y" / "shapes")), same_again
    )
    assert len({sample.sample_id for sample in manifest.samples}) == 3
    assert manifest.samples[0].sample_id == make_sample_id("shapes", "a.png")
    assert manifest.samples[0].bucket.area < manifest.samples[2].bucket.area


def test_nothing_is_left_out_in_silence(tmp_path, write_sample, build):
    write_sample(tmp_path / "good.png")
    write_sample(tmp_path / "bare.png", caption=None)
    write_sample(tmp_path / "blank.png", caption=" \n")
    write_sample(tmp_path / "latin.png")
    (tmp_path / "latin.txt").write_bytes("caf\xe9".encode("latin-1"))
    write_sample(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:60])
    write_sample(tmp_path / "dot.png", size=(1, 1))
    write_sample(tmp_path / "short.mp4", num_frames=6)
    for name in ("empty.mp4", "words.mp4", "data.csv", ".hidden.png", "orphan.txt"):
        (tmp_path / name).write_text("" if name == "empty.mp4" else "words")
        (tmp_path / name).with_suffix(".txt").write_text("a caption")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder_loop").symlink_to(tmp_path)
    (tmp_path / "loop.png").symlink_to(tmp_path / "loop.png")
    bomb = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in ((b"IHDR", bomb), (b"IDAT", b""))
    )
    (tmp_path / "bomb.png").write_bytes(bomb)
    (tmp_path / "bomb.txt").write_text("a caption")
    (tmp_path / "dangling.png").symlink_to(tmp_path / "nowhere.png")
    manifest = build(tmp_path)
    assert [sample.path.name for sample in manifest.samples] == ["good.png"]
    found = reasons(manifest)
    expected = {
        "bare.png": ("no_caption", "it has no caption file bare.txt"),
        "blank.png": ("no_caption", "blank.txt is blank"),
        "bomb.png": ("unreadable", "has more than 89478485 pixels"),
        "cut.png": ("unreadable", "not readable as an image"),
        "dangling.png": ("link", "broken or circular link"),
        "data.csv": ("not_media", "not an image or video"),
        "dot.png": ("too_small", "1x1 px is smaller than 16 px"),
        "empty.mp4": ("unreadable", "the file is empty"),
        "folder": ("folder", "[[directory]] of its own"),
        "folder_loop": ("folder", "[[directory]] of its own"),
        "latin.png": ("unreadable", "latin.txt: not UTF-8 (byte 3)"),
        "loop.png": ("link", "broken or circular link"),
        "short.mp4": (
            "too_short",
            "0.25 s are 4 frames at 16 per second, and the shortest video bucket has 5",
        ),
        "words.mp4": ("unreadable", "not readable as a video"),
    }
    assert found.keys() == expected.keys()
    for name, (code, text) in expected.items():
        assert found[name][0] == code
        assert text in found[name][1]


def test_captions_of_tables_get_the_prefix_and_are_all_kept(tmp_path, write_sample, build):
    for name in ("a.png", "b.png", "c.png"):
        write_sample(tmp_path / name, "a square" if name == "c.png" else None)
    (tmp_path / "captions.json").write_text('{"a.png": [" a circle ", "a disc"]}')
    (tmp_path / "captions.jsonl").write_text('{"file": "b.png", "caption": "a ball"}\n')
    manifest = build(tmp_path, caption_prefix="drawing: ")
    assert manifest.skipped == ()
    assert {sample.path.name: sample.captions for sample in manifest.samples} == {
        "a.png": ("drawing: a circle", "drawing: a disc"),
        "b.png": ("drawing: a ball",),
        "c.png": ("drawing: a square",),
    }
    assert manifest.samples[0].caption == "drawing: a circle"


def test_what_is_wrong_with_tables_is_reported_by_name(tmp_path, write_sample, build):
    for name in ("both.png", "good.png", "bare.png", "odd.png"):
        write_sample(tmp_path / name, "a square" if name == "both.png" else None)
    entries = {"both.png": "a circle", "good.png": "a disc", "odd.png": 3, "ghost.png": "a ball"}
    (tmp_path / "captions.json").write_text(json.dumps(entries))
    (tmp_path / "captions.jsonl").write_bytes(b'{"file": "bare.png", "caption": "caf\xe9"}\n')
    expected = {
        "bare.png": (
            "unreadable",
            "and no entry in captions.jsonl that can be read: captions.jsonl is damaged",
        ),
        "both.png": ("caption_conflict", "both a caption file both.txt and an entry in captions.json"),
        "captions.jsonl": ("unreadable", "line 1: not UTF-8 (byte 36); save it as UTF-8"),
        "ghost.png": ("absent", "captions.json names it, but it is not in this folder"),
        "odd.png": ("unreadable", "neither a text nor a list of texts"),
    }
    for policy in ("skip", "empty"):  # a file whose caption is lost is never trained without one
        manifest = build(tmp_path, missing_caption=policy)
        assert [sample.path.name for sample in manifest.samples] == ["good.png"]
        found = reasons(manifest)
        assert found.keys() == expected.keys()
        for name, (code, text) in expected.items():
            assert found[name][0] == code
            assert text in found[name][1]
    with pytest.raises(UserError, match=r"captions\.jsonl: line 1: not UTF-8.*on_bad_file"):
        build(tmp_path, on_bad_file="error")
    (tmp_path / "captions.jsonl").unlink()
    with pytest.raises(UserError, match=r"ghost\.png: captions\.json names it.*on_bad_file"):
        build(tmp_path, on_bad_file="error")
    # The table is sound now, so a file without an entry has none.
    assert reasons(build(tmp_path))["bare.png"] == (
        "no_caption",
        "it has no caption file bare.txt and no entry in captions.json",
    )


def test_media_of_one_stem_share_their_caption(tmp_path, write_sample, build):
    write_sample(tmp_path / "a.png", "a square")
    write_sample(tmp_path / "a.mp4", "a square")
    manifest = build(tmp_path)
    assert [(s.path.name, s.caption) for s in manifest.samples] == [
        ("a.mp4", "a square"),
        ("a.png", "a square"),
    ]
    assert manifest.samples[0].sample_id != manifest.samples[1].sample_id
    (warning,) = manifest.warnings
    assert warning == f"{tmp_path / 'a.txt'}: is the caption of 2 files of one stem, a.mp4, a.png"


def test_files_of_one_stem_with_captions_of_their_own_are_no_matter(tmp_path, write_sample, build):
    for name in ("a.mp4", "a.png", "b.mp4"):
        write_sample(tmp_path / name, None)
    (tmp_path / "captions.json").write_text('{"a.png": "a square", "a.mp4": "a circle", "b.mp4": "a disc"}')
    assert build(tmp_path, video_clip_mode="uniform:2").warnings == ()


def test_missing_captions_by_policy(tmp_path, write_sample, build):
    write_sample(tmp_path / "a.png", caption=None)
    sample = build(tmp_path, missing_caption="empty", caption_prefix="a drawing ").samples[0]
    assert sample.caption == "a drawing"
    with pytest.raises(UserError, match=r"a\.png: it has no caption file a\.txt; .*missing_caption"):
        build(tmp_path, missing_caption="error")


@pytest.mark.parametrize(
    ("name", "reason"), [("b.png", "not readable as an image"), ("c.png", r"c\.txt: not UTF-8")]
)
def test_bad_files_by_policy(tmp_path, write_sample, build, name, reason):
    write_sample(tmp_path / "a.png")
    write_sample(tmp_path / name)
    if name == "b.png":
        (tmp_path / name).write_text("no picture")
    else:
        (tmp_path / name).with_suffix(".txt").write_bytes(b"\xff")
    assert reasons(build(tmp_path)).keys() == {name}
    with pytest.raises(UserError, match=rf"{reason}.*on_bad_file"):
        build(tmp_path, on_bad_file="error")


def test_a_medium_without_a_bucket_of_its_kind_is_skipped(tmp_path, write_sample, build):
    write_sample(tmp_path / "a.png")
    write_sample(tmp_path / "b.mp4")
    assert reasons(build(tmp_path, frame_buckets=(5,)))["a.png"][0] == "no_bucket"
    # A video is not taken for an image because only that would fit.
    assert reasons(build(tmp_path, frame_buckets=(1,)))["b.mp4"][0] == "no_bucket"
    found = reasons(build(tmp_path, frame_buckets=(1, 33)))["b.mp4"]
    assert found == (
        "too_short",
        "1.00 s are 16 frames at 16 per second, and the shortest video bucket has 33",
    )


def test_an_empty_dataset_says_why(tmp_path, write_sample, build):
    with pytest.raises(UserError, match="no images or videos there"):
        build(tmp_path)
    write_sample(tmp_path / "a.png", caption=None)
    write_sample(tmp_path / "b.png", caption=None)
    write_sample(tmp_path / "c.mp4", num_frames=3)
    with pytest.raises(UserError) as caught:
        build(tmp_path)
    for text in (
        "all 3 entries",
        str(tmp_path),
        "2 x no caption",
        "a.png: it has no caption",
        "1 x too short",
    ):
        assert text in str(caught.value)


def test_a_missing_directory_is_named_with_where_it_was_looked_for(tmp_path, build, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        build(Path("data/shapes"))
    assert "[[directory]] data/shapes" in str(caught.value)
    assert str(tmp_path / "data" / "shapes") in str(caught.value)
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for name in ("file", "loop"):
        with pytest.raises(UserError, match=f"{name}: cannot be listed"):
            build(tmp_path / name)


@pytest.fixture
def without_privileges():
    """A folder outside of what pytest keeps to itself, and a place in which this process may read what its mode says."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)

    @contextmanager
    def unprivileged():
        if os.geteuid() != 0:
            yield
            return
        try:
            os.seteuid(65534)
        except PermissionError:
            pytest.skip("root cannot become another user here, and reads everything")
        try:
            yield
        finally:
            os.seteuid(0)

    yield folder, unprivileged
    shutil.rmtree(folder)


def test_what_may_not_be_read_is_named(without_privileges, write_sample, build):
    folder, unprivileged = without_privileges
    for name in ("good.png", "image.png", "video.mp4", "caption.png"):
        write_sample(folder / name)
    build(folder)  # so that nothing is left to import
    for name in ("image.png", "video.mp4", "caption.txt"):
        (folder / name).chmod(0)
    with unprivileged():
        manifest = build(folder)
        with pytest.raises(UserError, match=r"Permission denied.*on_bad_file"):
            build(folder, on_bad_file="error")
    assert [sample.path.name for sample in manifest.samples] == ["good.png"]
    assert reasons(manifest) == {
        "caption.png": ("unreadable", "caption.txt: not readable (Permission denied)"),
        "image.png": ("unreadable", "not readable (Permission denied)"),
        "video.mp4": ("unreadable", "not readable as a video (Permission denied)"),
    }
    folder.chmod(0o311)
    with unprivileged(), pytest.raises(UserError, match=r"cannot be listed \(Permission denied\)"):
        build(folder)
    folder.chmod(0o755)


def test_relative_directories_count_from_the_working_directory(tmp_path, write_sample, build, monkeypatch):
    (tmp_path / "shapes").mkdir()
    write_sample(tmp_path / "shapes" / "a.png")
    monkeypatch.chdir(tmp_path)
    assert build(Path("shapes")).samples[0].path == Path("shapes/a.png")


def test_single_middle_takes_the_middle_on_the_models_grid(tmp_path, write_sample, build, rules):
    write_sample(tmp_path / "a.mp4", num_frames=48)  # 2 s: 32 frames at 16 per second
    sample = build(tmp_path, video_clip_mode="single_middle").samples[0]
    assert sample.clip_start_seconds == (32 - 9) // 2 / 16
    assert load_clip(sample, rules).shape[1] == 9
    assert build(tmp_path, video_clip_mode="single_beginning").samples[0].clip_start_seconds == 0.0


@pytest.mark.parametrize(
    ("mode", "starts"),
    [("uniform:3", [0, 11, 23]), ("multiple_overlapping", [0, 7, 15, 23]), ("single_beginning", [0])],
)
def test_several_clips_of_a_video_are_samples_of_their_own(
    mode, starts, tmp_path, write_sample, build, rules
):
    write_sample(tmp_path / "a.mp4", num_frames=48)  # 2 s: 32 frames at 16 per second
    write_sample(tmp_path / "b.png")
    *clips, image = build(tmp_path, video_clip_mode=mode).samples
    assert image.kind == "image"
    assert [clip.clip_start_seconds for clip in clips] == [start / 16 for start in starts]
    assert [clip.sample_id for clip in clips] == [
        make_sample_id(tmp_path.name, "a.mp4", index) for index in range(len(starts))
    ]
    # The first is what a video of one clip is called.
    assert clips[0].sample_id == build(tmp_path).samples[0].sample_id
    keys = {make_key(LATENTS, latent_parts(clip, rules, "vae", "float32")) for clip in clips}
    assert len(keys) == len(starts)
    assert load_clip(clips[-1], rules).shape[1] == 9


def test_a_directory_has_its_own_clip_mode(tmp_path, write_sample, build):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        write_sample(tmp_path / name / "a.mp4", num_frames=48)
    second = DirectoryConfig(path=str(tmp_path / "two"), video_clip_mode="uniform:2")
    manifest = build(tmp_path / "one", second, video_clip_mode="single_middle")
    assert [(sample.path.parent.name, sample.clip_start_seconds) for sample in manifest.samples] == [
        ("one", 11 / 16),
        ("two", 0.0),
        ("two", 23 / 16),
    ]


def test_clips_show_the_time_they_are_named_for(tmp_path, write_video, square, build, rules):
    """In the file a square moves at 12 px/s; each clip begins where the square is at the clip's start."""
    write_video(tmp_path / "a.mp4", lambda time: square(20 + 12 * time), num_frames=96)
    (tmp_path / "a.txt").write_text("a square")
    for clip in build(tmp_path, video_clip_mode="multiple_overlapping").samples:
        video_CFHW = load_clip(clip, rules) / 2 + 0.5
        weight_FW = video_CFHW.mean(dim=(0, 2))
        centers_F = (weight_FW * (torch.arange(weight_FW.shape[1]) + 0.5)).sum(1) / weight_FW.sum(1)
        # 96 x 64 px are cropped and scaled to the bucket; a frame of the file lasts 1/24 s, which is 0.5 px.
        scale = max(clip.bucket.width / 96, clip.bucket.height / 64)
        times_F = clip.clip_start_seconds + torch.arange(len(centers_F)) / rules.fps
        expected_F = (20 + 12 * times_F - 48) * scale + clip.bucket.width / 2
        assert (centers_F - expected_F).abs().max() < 1.0


def test_what_was_found_out_is_kept_also_after_an_error(tmp_path, write_sample, make_dataset, rules):
    write_sample(tmp_path / "a.png")
    os.utime(tmp_path / "a.png", (1.6e9, 1.6e9))
    (tmp_path / "b.png").write_text("no picture")
    (tmp_path / "b.txt").write_text("a caption")
    memo_path = tmp_path / ".wan_cache" / "hashes.jsonl"
    with pytest.raises(UserError):
        build_manifest(make_dataset(tmp_path, on_bad_file="error"), rules, HashMemo(memo_path))
    assert "a.png" in memo_path.read_text()
    manifest = build_manifest(make_dataset(tmp_path), rules, HashMemo(memo_path))
    assert reasons(manifest).keys() == {"b.png"}  # the hidden cache is no entry


def test_rotated_photographs_go_to_the_bucket_of_their_upright_shape(tmp_path, build):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (128, 64), "teal").save(tmp_path / "a.jpg", exif=exif)
    (tmp_path / "a.txt").write_text("a shape")
    bucket = build(tmp_path).samples[0].bucket
    assert bucket.width < bucket.height


def test_default_cache_dir(tmp_path, make_dataset):
    assert default_cache_dir(make_dataset(tmp_path)) == tmp_path / ".wan_cache"
    assert default_cache_dir(make_dataset(tmp_path, cache_dir="elsewhere")) == Path("elsewhere")


def test_captions_without_a_medium_are_named(tmp_path, write_sample, build):
    write_sample(tmp_path / "a.png")
    assert build(tmp_path).warnings == ()
    (tmp_path / "b.txt").write_text("a teal square")
    (tmp_path / "a.TXT").write_text("a teal square")
    (warning,) = build(tmp_path).warnings
    assert (
        warning.startswith(f"{tmp_path / 'a.TXT'} and 1 more: a caption file without")
        and "not used" in warning
    )
