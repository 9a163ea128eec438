import os

import pytest

from utils.errors import UserError
from utils.newest_run import newest_run_config


def test_the_newest_run_is_found_at_every_depth(tmp_path):
    with pytest.raises(UserError, match="no training run"):
        newest_run_config(tmp_path / "nothing")
    for age, place in enumerate(("a", "b/c", "b/d/e", "f")):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "config.toml").touch()
        os.utime(tmp_path / place / "config.toml", (10**9 + (age if place != "f" else 0),) * 2)
        assert newest_run_config(tmp_path) == tmp_path / ("b/d/e" if place == "f" else place) / "config.toml"
