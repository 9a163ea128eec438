"""Damaged media of every kind: no crash, no hang, no flood of memory, and each file ends kept or skipped by name."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.mutated_media import MUTATIONS, mutate, write_whole
from tests.helpers.workspace import ROOT, environment

WORKER = ROOT / "tests" / "workers" / "fuzz_media.py"
TIME_LIMIT_SECONDS = 240
# One picture at Pillow's limit takes 270 MB as RGB, and is reduced before the next one is opened.
MEMORY_LIMIT_MIB = 1024


def examine(folder: Path) -> dict:
    """What a process of its own makes of all files there."""
    done = subprocess.run(
        [sys.executable, str(WORKER), str(folder)],
        capture_output=True,
        text=True,
        env=environment(),
        timeout=TIME_LIMIT_SECONDS,
    )
    # A crash shows the file at which it happened.
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    ("count", "seed"), [(200, 0), *(pytest.param(2000, seed, marks=pytest.mark.long) for seed in (1, 2, 3))]
)
def test_mutated_media(tmp_path, count, seed):
    whole, damaged = tmp_path / "whole", tmp_path / "damaged"
    whole.mkdir()
    damaged.mkdir()
    sources = write_whole(whole)
    names = set()
    for name, content in mutate(sources, count, seed):
        (damaged / name).write_bytes(content)
        names.add(name)
    for path in sources:  # between the others, to see that these are not what fails
        path.rename(damaged / f"whole_{path.name}")
    answer = examine(damaged)
    kept, skipped = set(answer["kept"]), answer["skipped"]
    assert {name for name in kept if name.startswith("whole_")} == {f"whole_{path.name}" for path in sources}
    kept = {name for name in kept if not name.startswith("whole_")}
    assert kept | skipped.keys() == names and kept.isdisjoint(skipped)
    for code, reason in skipped.values():
        assert code in {"unreadable", "too_small", "too_short", "no_bucket"}
        assert len(reason) > 10 and str(damaged) not in reason  # the name stands before it already
    # Damage behind a whole beginning may show only while a clip is loaded; it is named then.
    assert not any(name.startswith("whole_") for name in answer["failures"])
    assert answer["failures"].keys() <= kept
    for name, reason in answer["failures"].items():
        assert reason.startswith(f"{damaged / name}: ")
    # The damage is not all in vain, and not all of one kind.
    assert count / 4 < len(skipped) < count
    assert {name.split("_")[1] for name in skipped} == set(MUTATIONS)
    assert answer["grown_mib"] < MEMORY_LIMIT_MIB
