"""A command started as several ranks on this machine, for scripts that need as many processes as there are stages."""

import os
import socket
import subprocess
import time
from collections.abc import Sequence

from utils.errors import EXIT_USER_ERROR

# How long the others may take to notice that one has gone, and to say what they have to say.
_GRACE_SECONDS = 60.0
_LOOK_SECONDS = 0.1


def run_ranks(command: Sequence[str], count: int) -> int:
    """Run `command` `count` times, each as one rank of a group on this machine; returns the status of the whole.

    That is 0 where all end well, 2 where one of them met what the user can mend (the others only lost a peer), else the
    first other status. No process is left behind, whatever happens; a signal to the terminal reaches them by itself.

    Args:
        command: the program and its arguments; the rank is in the environment, as launchers put it there.
        count: of processes.
    """
    group = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
    }
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for rank in range(count):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            processes.append(subprocess.Popen([*command], env=os.environ | group | own))
        _wait(processes)
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
            process.wait()
    statuses = [process.returncode for process in processes]
    if EXIT_USER_ERROR in statuses:
        return EXIT_USER_ERROR
    return next((abs(status) for status in statuses if status), 0)


def _wait(processes: Sequence["subprocess.Popen[bytes]"]) -> None:
    """Until all have ended, or one has failed and the others had time to notice."""
    deadline = float("inf")
    try:
        while any(process.poll() is None for process in processes) and time.monotonic() < deadline:
            if deadline == float("inf") and any(process.returncode for process in processes):
                deadline = time.monotonic() + _GRACE_SECONDS
            time.sleep(_LOOK_SECONDS)
    except KeyboardInterrupt:
        # They have heard it too, and end by themselves.
        deadline = time.monotonic() + _GRACE_SECONDS
        while any(process.poll() is None for process in processes) and time.monotonic() < deadline:
            time.sleep(_LOOK_SECONDS)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
