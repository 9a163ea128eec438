"""Processes that do not have the same inputs, or do not see the same files, are told so at the start."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

WORKER = Path(__file__).parents[1] / "workers" / "node_checks.py"


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        pytest.param("fine", (), marks=pytest.mark.long),  # every run on several processes does it too
        ("inputs", ("the DiT of process 1 on ", "differ(s) from that of process 0")),
        pytest.param(
            "shared",
            ("process 1 on ", "has written into the cache ", "multi_node.md"),
            marks=pytest.mark.long,
        ),
        pytest.param("seen", ("process 1 on ", "into the run directory"), marks=pytest.mark.long),
    ],
)
def test_what_is_not_the_same_is_named_once(case: str, expected: tuple[str, ...], tmp_path: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*torchrun, str(WORKER), case, str(tmp_path)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    said = [line for line in done.stderr.splitlines() if line.startswith(("error: ", "[rank"))]
    assert (done.returncode == 0) == (not expected), done.stderr
    assert len(said) == (1 if expected else 0), done.stderr
    assert all(text in said[0] for text in expected)
    assert not list(tmp_path.rglob("*.tmp"))
