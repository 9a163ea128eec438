"""Whether the processes of a run, on one machine or several, have the same inputs and see the same files."""

import socket
import time
import uuid
from collections.abc import Mapping
from pathlib import Path

from utils.distributed import Processes, broadcast_object, gather_objects, on_main
from utils.errors import UserError
from utils.files import disk_errors_as_user_errors

# A network file system may show a new file late.
_WAIT_SECONDS = 30.0
_LOOK_EVERY_SECONDS = 0.2
_ADVICE = "Processes on several machines need one shared file system for it, under the same path; see docs/multi_node.md"


def check_same_inputs(facts: Mapping[str, str], processes: Processes) -> None:
    """Compare short descriptions of inputs (what it is -> hash or the like) between all processes.

    Raises:
        UserError: on every rank: a process has others than process 0.
    """
    if processes.world_size == 1:
        return
    everything = gather_objects((socket.gethostname(), dict(facts)))
    first_host, first = everything[0]
    for rank, (host, other) in enumerate(everything):
        different = [name for name in first if other.get(name) != first[name]]
        if different:
            _refuse(
                f"{' and '.join(different)} of process {rank} on {host} differ(s) from that of process 0 on {first_host}; give "
                "every machine the same files and the same command line"
            )


def check_shared(places: Mapping[str, Path], processes: Processes) -> None:
    """Check that a file that process 0 puts into each directory is seen by every process. Every rank must call it.

    Raises:
        UserError: on every rank: a directory is not shared.
    """
    if processes.world_size == 1:
        return
    name = broadcast_object(f".shared-{uuid.uuid4().hex}.tmp")

    def put() -> None:
        for place in places.values():
            with disk_errors_as_user_errors(place):
                place.mkdir(parents=True, exist_ok=True)
                (place / name).touch()

    on_main(put)
    try:
        check_seen({what: place / name for what, place in places.items()}, processes)
    finally:
        if processes.is_main:
            for place in places.values():
                (place / name).unlink(missing_ok=True)


def check_seen(files: Mapping[str, Path], processes: Processes) -> None:
    """Check that every process sees these files, which process 0 has made. Every rank must call it.

    Raises:
        UserError: on every rank: one does not see one.
    """
    if processes.world_size == 1:
        return
    missing = [what for what, file in files.items() if not _appears(file)]
    for rank, (host, place, unseen) in enumerate(
        gather_objects((socket.gethostname(), str(Path.cwd()), missing))
    ):
        if unseen:
            what = unseen[0]
            _refuse(
                f"process {rank} on {host} does not see what process 0 has written into {what} "
                f"(working directory: {place}). {_ADVICE}"
            )


def _appears(file: Path) -> bool:
    deadline = time.monotonic() + _WAIT_SECONDS
    while not file.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(_LOOK_EVERY_SECONDS)
    return True


def _refuse(message: str) -> None:
    error = UserError(message)
    error.on_every_rank = True
    raise error
