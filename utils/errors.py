"""Errors that a person can mend, and the exit statuses of every command of the project."""

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
