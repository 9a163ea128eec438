"""Clips of one image, in a module that worker processes can import."""

import os
import signal
from dataclasses import dataclass
from multiprocessing import parent_process
from pathlib import Path

from utils.data.buckets import Bucket
from utils.data.media import MediaInfo

BUCKET = Bucket(16, 16, 1)
INFO = MediaInfo("image", 40, 30)


@dataclass(frozen=True)
class Clip:
    """What `load_frames` needs to know of an image."""

    path: Path
    bucket: Bucket = BUCKET
    clip_start_seconds: float = 0.0

    @property
    def info(self) -> MediaInfo:
        return INFO


class DeadlyClip(Clip):
    """Ends the worker that decodes it, as a crash in a decoder does, or the kernel when memory runs out."""

    @property
    def info(self) -> MediaInfo:
        if parent_process() is not None:
            os.kill(os.getpid(), signal.SIGKILL)
        return INFO


class OddClip(Clip):
    """Makes decoding fail in a way that nobody foresaw."""

    @property
    def info(self) -> MediaInfo:
        raise KeyError("unforeseen")
