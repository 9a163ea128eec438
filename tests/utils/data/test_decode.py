"""Clips decoded ahead: the same frames in the same order, errors in their place, and no worker that stays behind."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.helpers.clip import Clip, DeadlyClip, OddClip
from utils.data import decode
from utils.data.buckets import Bucket, MediaRules
from utils.data.decode import ClipJob, automatic_workers, decoded_clips
from utils.data.media import MediaInfo, load_clip, load_frames, scale_frames
from utils.errors import UserError
from utils.files import content_hash

RULES = MediaRules(fps=16.0, pixel_multiple=16)
NUM_CLIPS = 9


@pytest.fixture(autouse=True)
def few_clips(monkeypatch):
    """So few clips as a test has are worth a worker."""
    monkeypatch.setattr(decode, "MIN_CLIPS_PER_WORKER", 4)


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Nine small images, each of a colour of its own."""
    folder = tmp_path_factory.mktemp("clips")
    for number in range(NUM_CLIPS):
        Image.new("RGB", (40, 30), (number * 20, 255 - number * 20, 7)).save(folder / f"{number}.png")
    return folder


def jobs_of(clips: Path, *names: str) -> list[ClipJob]:
    """All of them, or those of these names."""
    paths = [clips / name for name in names] if names else sorted(clips.glob("?.png"))
    return [ClipJob(Clip(path), RULES) for path in paths]


def children() -> set[int]:
    """Processes whose parent is this one, zombies included."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            pid, rest = path.read_text().split(" (", 1)
        except OSError:
            continue
        if int(rest.rsplit(") ", 1)[1].split()[1]) == os.getpid():
            found.add(int(pid))
    return found


@pytest.fixture
def started(monkeypatch):
    """The worker processes that a test starts; none of them may be there after it."""
    workers = []

    class Watched(decode._Worker):
        def __init__(self):
            super().__init__()
            workers.append(self._process.pid)

    monkeypatch.setattr(decode, "_Worker", Watched)
    yield workers
    assert not set(workers) & children()


def test_frames_come_in_order_and_are_those_of_this_process(clips, started):
    """With workers, without, with a hash to compare, and with fewer clips than a worker costs."""
    jobs = jobs_of(clips)
    expected = [load_frames(job.record, job.rules) for job in jobs]
    hashed = [replace(job, content_hash=content_hash(job.record.path)) for job in jobs]
    for given, num_workers, num_started in ((hashed, 2, 2), (jobs, 0, 0), (jobs[:3], 8, 0)):
        started.clear()
        with decoded_clips(given, num_workers) as frames:
            found = list(frames)
        assert len(started) == num_started
        assert len(found) == len(given)
        for one, other in zip(found, expected, strict=False):
            assert one.dtype == np.uint8 and np.array_equal(one, other)


def test_scaled_frames_are_the_clip(write_sample, make_record, tmp_path):
    path = write_sample(tmp_path / "a.mp4")
    record = make_record(path=path, bucket=Bucket(64, 48, 5), info=MediaInfo("video", 96, 64, 24, 24.0, 1.0))
    frames_FHWC = load_frames(record, RULES)
    assert frames_FHWC.shape == (5, 48, 64, 3)
    video_CFHW = load_clip(record, RULES)
    assert torch.equal(scale_frames(frames_FHWC), video_CFHW)
    # The rule, in whole numbers: value / 127.5 - 1, in float32 at each step.
    wanted = (frames_FHWC.astype(np.float32) / np.float32(127.5) - np.float32(1)).transpose(3, 0, 1, 2)
    assert np.array_equal(video_CFHW.numpy(), wanted)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_clip_that_cannot_be_decoded_is_an_error_in_its_place(clips, started, num_workers):
    broken = clips / "broken.gif"
    broken.write_bytes(b"GIF89a")
    jobs = jobs_of(clips)
    (bad,) = jobs_of(clips, "broken.gif")
    with decoded_clips([*jobs[:5], bad, *jobs[5:]], num_workers) as frames:
        seen = [one if isinstance(one, UserError) else int(one[0, 0, 0, 0]) for one in frames]
    error = seen.pop(5)
    assert seen == [20 * number for number in range(len(jobs))]
    assert (
        isinstance(error, UserError)
        and "broken.gif" in str(error)
        and "not readable as an image" in str(error)
    )
    assert len(started) == num_workers
    changed = replace(jobs[0], content_hash="0" * 32)
    with (
        pytest.raises(UserError, match=r"0\.png: its content is not what.*--trust_cache"),
        decoded_clips([changed], 0) as frames,
    ):
        next(frames)


def test_a_worker_that_dies_or_fails_is_told_with_its_file(clips, started):
    path = clips / "0.png"
    with (
        pytest.raises(UserError, match=r"0\.png: .*signal 9.*decode_workers"),
        decoded_clips([ClipJob(DeadlyClip(path), RULES)] * 4, 1) as frames,
    ):
        next(frames)
    # Not a person's mistake: the worker's trace is told, and it is no UserError.
    with (
        pytest.raises(RuntimeError, match=r"0\.png(.|\n)*KeyError: 'unforeseen'"),
        decoded_clips([ClipJob(OddClip(path), RULES)] * 4, 1) as frames,
    ):
        next(frames)
    assert len(started) == 2
    with pytest.raises(KeyError), decoded_clips([ClipJob(OddClip(path), RULES)] * 4, 0) as frames:
        next(frames)


def test_workers_do_not_load_torch(tmp_path):
    code = "import sys, utils.data.decode, utils.data.manifest; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


PARENT = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever started the tests may ignore it
import sys, time
from pathlib import Path
from utils.data.buckets import MediaRules
from utils.data.decode import ClipJob, decoded_clips
from tests.helpers.clip import Clip

def main():
    jobs = [ClipJob(Clip(Path(sys.argv[1])), MediaRules(16.0, 16))] * 16
    with decoded_clips(jobs, 2) as frames:
        next(frames)
        print("ready", flush=True)
        time.sleep(60)

if __name__ == "__main__":
    main()
"""


def descendants(pid: int) -> set[int]:
    """All processes under `pid`."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            own, rest = path.read_text().split(" (", 1)
        except OSError:
            continue
        parents[int(own)] = int(rest.rsplit(") ", 1)[1].split()[1])
    found, last = {pid}, set()
    while found != last:
        last = set(found)
        found |= {own for own, parent in parents.items() if parent in found}
    return found - {pid}


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_workers_end_with_a_parent_that_is_killed_or_interrupted(how, clips, tmp_path):
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])}
    parent = subprocess.Popen(
        [sys.executable, str(script), str(clips / "0.png")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,
    )
    assert parent.stdout is not None and parent.stdout.readline() == "ready\n"
    below = descendants(parent.pid)
    assert len(below) >= 2
    if how == signal.SIGINT:
        os.killpg(parent.pid, how)  # as a terminal does: to all of them
    else:
        parent.send_signal(how)
    _, said = parent.communicate(timeout=120)
    assert said.count("KeyboardInterrupt") == (1 if how == signal.SIGINT else 0), said  # of the parent alone
    deadline = time.monotonic() + 30
    while any(Path(f"/proc/{pid}").exists() for pid in below) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not [pid for pid in below if Path(f"/proc/{pid}").exists()]


def test_the_automatic_number_of_workers_leaves_a_core_to_each_rank(monkeypatch):
    for cores, ranks, expected in ((1, 1, 0), (2, 1, 1), (16, 1, 4), (16, 8, 1), (16, 16, 0), (4, 3, 0)):
        monkeypatch.setattr(decode.os, "sched_getaffinity", lambda _pid, cores=cores: set(range(cores)))
        assert automatic_workers(ranks) == expected
