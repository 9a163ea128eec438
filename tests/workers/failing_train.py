"""`train.py`, in which the process of rank FAIL_RANK raises in the middle of step 3: run by tests/test_failures.py."""

import os

os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # as the command does before it imports torch

from models.wan.stages import DitBlockLayer
from train import main
from utils.cli import end_process

FORWARD_PASSES_BEFORE = 10
healthy = DitBlockLayer.run
count = 0


def run(self, *wire):
    global count
    count += 1
    if os.environ["RANK"] == os.environ["FAIL_RANK"] and count > FORWARD_PASSES_BEFORE:
        raise ValueError("a stage cannot go on")
    return healthy(self, *wire)


if __name__ == "__main__":
    DitBlockLayer.run = run
    end_process(main())
