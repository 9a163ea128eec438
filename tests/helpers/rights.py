"""A folder that may not be looked into or written to, also where the tests run as root, whom rights do not bind."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

NOBODY = 65534


@contextmanager
def locked_folder(mode: int) -> Iterator[Path]:
    """A folder with these rights; inside the context this process is bound by them."""
    # Not below tmp_path: as another user one could not get there.
    place = Path(tempfile.mkdtemp(prefix="locked_"))
    folder = place / "folder"
    folder.mkdir()
    place.chmod(0o755)
    is_root = os.geteuid() == 0
    if is_root:
        os.chown(folder, NOBODY, NOBODY)
    folder.chmod(mode)
    if is_root:
        os.seteuid(NOBODY)
    try:
        yield folder
    finally:
        if is_root:
            os.seteuid(0)
        folder.chmod(0o755)
        shutil.rmtree(place)
