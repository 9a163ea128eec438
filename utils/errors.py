"""Errors that a person can mend, and the exit statuses of every command of the project."""

import errno

EXIT_OK = 0
EXIT_FAILED = 1
EXIT_USER_ERROR = 2
EXIT_INCONCLUSIVE = 3
EXIT_UNEXPECTED = 70
EXIT_INTERRUPTED = 130


class UserError(Exception):
    """A problem the user can mend. The message says what, where (file or key), why and what to do.

    Commands print the message without a stack trace and exit with status 2. `on_every_rank` is set where all
    processes raise the same error, so that one of them speaks for all; `is_own` where a process has trouble of its own
    before it is in a group, where the others' silence would otherwise be this one's too.
    """

    on_every_rank = False
    is_own = False


# What the system says of rights, names and places, as opposed to what a broken program makes it say.
_MENDABLE = frozenset(
    {
        errno.EACCES,
        errno.EPERM,
        errno.EROFS,
        errno.ENOENT,
        errno.ENOTDIR,
        errno.EISDIR,
        errno.ENAMETOOLONG,
        errno.ELOOP,
        errno.ENOSPC,
        errno.EDQUOT,
        errno.EIO,
        errno.ESTALE,
    }
)


def as_user_error(error: OSError) -> UserError | None:
    """What the system said of a file that it names, as something to mend; None where it is not of that kind."""
    if error.filename is None or error.errno not in _MENDABLE:
        return None
    place = str(error.filename) if len(str(error.filename)) <= 200 else f"{str(error.filename)[:200]}..."
    return UserError(
        f"{place}: {error.strerror}; check the path and its rights, and run the same command again"
    )


class PeerLostError(Exception):
    """Another process of the run has failed or is gone, so this one ends too. Exit status 1.

    `is_told` is set on the one process that tells it; on the others the message is not shown.
    """

    def __init__(self, message: str, *, is_told: bool) -> None:
        super().__init__(message)
        self.is_told = is_told


class TrainingStoppedError(Exception):
    """Training cannot or must not go on; the message says why and what is left on disk. Exit status 1.

    Raised alike on every rank.
    """
