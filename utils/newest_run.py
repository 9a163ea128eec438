"""The newest training run below a directory, whatever it trained or saved. No weight file is opened."""

from pathlib import Path

from utils.adapter_runs import RUN_CONFIG_NAME
from utils.errors import UserError

# output/<name>/<time stamp>/config.toml, and one level of folders more or less.
_PATTERNS = tuple("*/" * depth + RUN_CONFIG_NAME for depth in (1, 2, 3))


def newest_run_config(root: Path) -> Path:
    """`config.toml` of the run below `root` that was begun last (by that file's time).

    Raises:
        UserError: there is no run.
    """
    configs = [path for pattern in _PATTERNS for path in Path(root).glob(pattern)]
    if not configs:
        raise UserError(f"{root}: no training run with a {RUN_CONFIG_NAME} below it; name what to look at")
    return max(configs, key=lambda path: (path.stat().st_mtime_ns, str(path)))
