import json
from dataclasses import replace
from pathlib import Path

import pytest
import xxhash

from models.wan.datasets import _say_long_captions, data_fingerprint
from models.wan.media import without_images
from utils.data.buckets import Bucket
from utils.data.manifest import Manifest, SampleRecord
from utils.data.masks import LossMask, MaskGrid
from utils.data.media import MediaInfo
from utils.errors import UserError


def sample(name: str, frames: int, *captions: str, start: float = 0.0) -> SampleRecord:
    kind = "video" if frames > 1 else "image"
    info = MediaInfo(kind, 64, 64, frames, 16.0, frames / 16, 0.0)
    bucket = Bucket(64, 64, frames)
    return SampleRecord(
        sample_id=hash(name) & 0xFFFF,
        path=Path(name),
        kind=kind,
        captions=captions or ("a red circle",),
        bucket=bucket,
        num_repeats=1.0,
        content_hash=f"hash of {name}",
        clip_start_seconds=start,
        info=info,
    )


def test_an_image_to_video_model_gets_videos_only():
    manifest = without_images(Manifest((sample("a.png", 1), sample("b.mp4", 5)), ()))
    assert [kept.path.name for kept in manifest.samples] == ["b.mp4"]
    (skipped,) = manifest.skipped
    assert skipped.path.name == "a.png" and "videos only" in skipped.reason


def test_a_dataset_of_images_alone_is_refused_for_it():
    with pytest.raises(UserError, match="no video among its 1 usable files"):
        without_images(Manifest((sample("a.png", 1),), ()))


def test_the_fingerprint_is_of_content_and_not_of_order():
    one, two = sample("a.png", 1), sample("b.mp4", 5)
    whole = data_fingerprint(Manifest((one, two), ()))
    assert whole == data_fingerprint(Manifest((two, one), ()))
    assert whole != data_fingerprint(Manifest((one,), ()))
    for other in (
        sample("b.mp4", 5, "a blue circle"),
        sample("b.mp4", 5, "a red circle", "a disc"),
        sample("b.mp4", 5, start=0.5),
    ):
        assert whole != data_fingerprint(Manifest((one, other), ()))


def test_the_fingerprint_knows_the_content_of_masks():
    def masked(digest: str) -> str:
        mask = LossMask(Path("m.png"), digest, MaskGrid(1, 1, 8, ""))
        return data_fingerprint(Manifest((replace(sample("a.png", 1), mask=mask),), ()))

    plain = data_fingerprint(Manifest((sample("a.png", 1),), ()))
    assert len({plain, masked("one"), masked("other")}) == 3
    # What it was before there were masks: runs without any can still be resumed.
    row = (hash("a.png") & 0xFFFF, "hash of a.png", ["a red circle"], "64x64x1", 1.0, 0.0)
    assert plain == xxhash.xxh3_128_hexdigest(json.dumps([row]).encode())


def test_every_caption_that_is_too_long_is_named_once():
    class Tokenizer:
        def count(self, caption: str) -> int:
            return len(caption)

    long = "circle " * 100
    clips = (sample("b.mp4", 5, "a circle", long), sample("b.mp4", 5, "a circle", long, start=0.5))
    lines: list[str] = []
    _say_long_captions(Manifest((sample("a.png", 1, long), *clips), ()), Tokenizer(), lines.append)
    assert [line.split(",")[0] for line in lines] == [
        "warning: a.png: its caption has 700 tokens",
        "warning: b.mp4: its caption 2 of 2 has 700 tokens",
    ]
