from pathlib import Path

import pytest

from models.wan.setup import data_fingerprint, without_images
from utils.data.buckets import Bucket
from utils.data.manifest import Manifest, SampleRecord
from utils.data.media import MediaInfo
from utils.errors import UserError


def sample(name: str, frames: int, caption: str = "a red circle") -> SampleRecord:
    kind = "video" if frames > 1 else "image"
    info = MediaInfo(kind, 64, 64, frames, 16.0, frames / 16, 0.0)
    bucket = Bucket(64, 64, frames)
    return SampleRecord(
        hash(name) & 0xFFFF, Path(name), kind, caption, bucket, 1.0, f"hash of {name}", 0.0, info
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
    assert whole != data_fingerprint(Manifest((one, sample("b.mp4", 5, "a blue circle")), ()))
