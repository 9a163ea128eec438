"""What every command does with errors: one clear message and an exit status; a stack trace only with --debug."""

import logging
import os
import sys
import traceback
from collections.abc import Callable
from typing import NoReturn

from utils.errors import (
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    EXIT_USER_ERROR,
    PeerLostError,
    TrainingStoppedError,
    UserError,
    as_user_error,
)


def run_command(function: Callable[[], int], *, debug: bool) -> int:
    """Run a command's body and return its exit status: 2 for what the user can mend, 1 for other failures.

    With several processes, a message that all of them have is printed by rank 0 alone.
    """
    # Imported along by other libraries where it is installed, it reports a missing 4-bit kernel that nothing here uses.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    if not debug:
        # Read when torch is imported. A peer that goes would be met with traces of C++ beside our message.
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    try:
        return function()
    except UserError as error:
        if debug:
            traceback.print_exc()
        elif _should_speak(error):
            _say(f"error: {error}")
        if error.on_every_rank:
            _end_after_rank_0()
        return EXIT_USER_ERROR
    except TrainingStoppedError as error:
        if _rank() == 0:
            _say(f"stopped: {error}")
        _end_after_rank_0()
        return EXIT_FAILED
    except PeerLostError as error:
        if debug:
            traceback.print_exc()
        elif error.is_told:
            _say(f"stopped: {error}")
        return EXIT_FAILED
    except KeyboardInterrupt:
        _say("interrupted")
        return EXIT_INTERRUPTED
    except Exception as error:
        mendable = as_user_error(error) if isinstance(error, OSError) else None
        if debug:
            traceback.print_exc()
        elif mendable is not None:
            _say(f"error: {mendable}")
        else:
            first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
            _say(f"failed: {type(error).__name__}: {first_line} (--debug shows where)")
        return EXIT_FAILED if mendable is None else EXIT_USER_ERROR


def end_process(status: int) -> NoReturn:
    """End the process with this status; at once, and waiting for no peer, where it has been in a process group.

    The threads of a group that anything still refers to (DeepSpeed keeps references) would otherwise be torn down
    together with the interpreter, which now and then aborts the process after its work is done.
    """
    distributed = sys.modules.get("utils.distributed")  # not imported here: a config error needs no torch
    if distributed is not None and distributed.has_joined():
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def _rank() -> int:
    announced = os.environ.get("RANK", "0")
    return int(announced) if announced.isdigit() else 0


def _end_after_rank_0() -> None:
    """What all processes have, rank 0 says; the others let it."""
    distributed = sys.modules.get("utils.distributed")  # not imported here: a config error needs no torch
    if distributed is not None and _rank() == 0:
        distributed.tell_that_it_is_told()
    elif distributed is not None:
        distributed.wait_until_it_is_told()


def _should_speak(error: UserError) -> bool:
    """Rank 0 always; others only with what rank 0 does not know: trouble of their own, as a rule after the group has formed."""
    if _rank() == 0 or error.is_own:
        return True
    distributed = sys.modules.get("utils.distributed")  # not imported here: a config error needs no torch
    has_joined = distributed is not None and distributed.has_joined()
    return has_joined and not error.on_every_rank


def _say(text: str) -> None:
    prefix = f"[rank {_rank()}] " if _rank() else ""
    sys.stderr.write(prefix + text + "\n")
    sys.stderr.flush()
