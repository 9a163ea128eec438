"""What a run leaves on the disk."""

from dataclasses import replace

import pytest

from tests.utils.test_plan_fit import CONFIG
from utils.plan_disk import free_bytes, run_disk


def config(**values):
    return replace(CONFIG, **values)


def test_a_checkpoint_is_weights_and_state_and_one_more_than_kept_is_there_at_once():
    disk = run_disk(config(keep_checkpoints=3), 1000, 4000.0, 10, 5.0)
    assert disk.checkpoint == 1000 * (4 + 8) and disk.checkpoints == 4 * disk.checkpoint


@pytest.mark.parametrize(
    ("values", "exports"),
    [
        ({}, 2),  # two epochs, the last of which is the end
        ({"save_every_n_epochs": 0}, 1),
        ({"save_every_n_epochs": 2}, 1),
        ({"save_every_n_steps": 4}, 2 + 2),
    ],
)
def test_exports_are_counted(values, exports):
    disk = run_disk(config(**values), 1000, 4000.0, 10, 5.0)
    assert disk.exports == exports * 4000.0


@pytest.mark.parametrize(
    ("steps", "per_epoch", "every", "exports"),
    [
        (105, 10.0, 1, 11),  # epoch1 to epoch10, and epoch11 at the end
        (15, 10.0, 1, 2),
        (5, 10.0, 1, 1),
        (20, 10.0, 1, 2),
        (20, 10.0, 2, 1),
        (30, 10.0, 2, 2),  # epoch2, and epoch3 at the end
        (11, 5.5, 1, 2),  # epoch 1 ends in step 6, epoch 2 in step 11
        (6, 5.5, 1, 1),
        (7, 5.5, 1, 2),
    ],
)
def test_a_run_that_ends_within_an_epoch_saves_once_more(steps, per_epoch, every, exports):
    disk = run_disk(config(save_every_n_epochs=every), 1000, 1.0, steps, per_epoch)
    assert disk.exports == exports


def test_without_a_number_of_steps_their_sum_is_not_known():
    disk = run_disk(CONFIG, 1000, 4000.0, None, None)
    assert disk.exports is None and disk.export == 4000.0


def test_free_space_of_a_place_that_is_still_to_be_made(tmp_path):
    assert free_bytes(tmp_path / "a" / "b") == pytest.approx(free_bytes(tmp_path), rel=0.05)
