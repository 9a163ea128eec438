"""What one sees of work that several ranks share, and where they stop when one of them cannot read."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from utils.metrics import read_metrics

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def shared(tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """The run directory and what two processes said."""
    root = tmp_path_factory.mktemp("shared")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*torchrun, str(ROOT / "tests" / "workers" / "shared_work.py"), str(root)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return root, done


def test_the_line_counts_the_work_of_all_ranks_until_the_last_is_done(shared) -> None:
    _, done = shared
    lines = re.findall(r"^caching clips (\d+)/(\d+)", done.stderr, re.MULTILINE)
    assert lines[-1] == ("12", "12")
    assert {total for _, total in lines} == {"12"}  # never the share of one rank alone
    assert int(lines[0][0]) < 12
    assert [line for line in lines if line[0] == "12"] == [("12", "12")]
    assert "caching nothing" not in done.stderr


def test_an_error_of_one_rank_is_that_of_all_and_the_line_says_how_far_they_came(shared) -> None:
    _, done = shared
    for rank in (0, 1):
        assert done.stdout.count(f"rank {rank}: clip.mp4 is damaged\n") == 1
    assert "caching more 2/4" in done.stderr


def test_what_one_rank_cannot_read_ahead_stops_all_at_its_step(shared) -> None:
    root, done = shared
    assert [row["step"] for row in read_metrics(root)] == [1, 2]
    assert (root / "latest").read_text().strip() == "global_step2"
    for rank in (0, 1):
        # Three steps of one micro-batch per rank: nothing behind the step that failed was asked for.
        assert f"rank {rank}: item 5 is damaged; 3 micro-batches were asked for" in done.stdout
