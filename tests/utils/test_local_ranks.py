"""Several ranks of one command: what each is told, what their statuses mean, and that none is left behind."""

import sys
import time

import pytest

from utils import local_ranks
from utils.local_ranks import run_ranks

PROGRAM = """
import os, sys, time
rank = int(os.environ["RANK"])
assert os.environ["LOCAL_RANK"] == os.environ["RANK"] and os.environ["MASTER_ADDR"] == "127.0.0.1"
open(os.path.join(sys.argv[1], f"{rank} of {os.environ['WORLD_SIZE']} at {os.environ['MASTER_PORT']}"), "w").close()
what = sys.argv[2 + rank]
time.sleep(600) if what == "hang" else sys.exit(int(what))
"""


@pytest.mark.parametrize(
    ("ends", "status"),
    [(("0", "0", "0"), 0), (("0", "1", "0"), 1), (("1", "2", "1"), 2), (("130", "130", "130"), 130)],
)
def test_the_status_of_the_whole(tmp_path, ends, status) -> None:
    assert run_ranks([sys.executable, "-c", PROGRAM, str(tmp_path), *ends], 3) == status
    names = sorted(path.name for path in tmp_path.iterdir())
    port = names[0].rpartition(" ")[2]
    assert names == [f"{rank} of 3 at {port}" for rank in range(3)] and int(port) > 0


def test_one_that_does_not_notice_a_failure_is_ended(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(local_ranks, "_GRACE_SECONDS", 0.5)
    began = time.monotonic()
    assert run_ranks([sys.executable, "-c", PROGRAM, str(tmp_path), "2", "hang"], 2) == 2
    assert time.monotonic() - began < 60


def test_nothing_is_left_where_a_rank_cannot_be_started(tmp_path) -> None:
    with pytest.raises(FileNotFoundError):
        run_ranks([str(tmp_path / "no program")], 2)
