"""What every probe's command line has in common: shared flags, one-line errors and exit statuses.

Statuses: 0 pass, 1 fail, 3 inconclusive, 2 wrong use (whatever the user can mend), 70 unexpected error, and 130 where
the user stopped it.
"""

import argparse
import logging
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any, get_args

from utils.argument_types import config_file, path_of, seed
from utils.config.schema import Expert
from utils.errors import (
    EXIT_FAILED,
    EXIT_INCONCLUSIVE,
    EXIT_INTERRUPTED,
    EXIT_OK,
    EXIT_UNEXPECTED,
    EXIT_USER_ERROR,
    UserError,
    as_user_error,
)
from utils.report_summary import Verdict

EXIT_BY_VERDICT: dict[Verdict, int] = {
    "pass": EXIT_OK,
    "fail": EXIT_FAILED,
    "inconclusive": EXIT_INCONCLUSIVE,
}
# Flags that several probes share; each probe names those that it reads.
_FLAGS: dict[str, dict[str, Any]] = {
    "config": {
        "metavar": "TOML",
        "type": config_file,
        "help": "config, or a run's directory, that fills in the other flags (default: the run's)",
    },
    "base": {
        "metavar": "CKPT",
        "type": path_of,
        "help": "base checkpoint: directory or .safetensors file (default: the run's)",
    },
    "expert": {
        "choices": get_args(Expert),
        "help": "A14B: which of the two experts (default: the run's, else the adapter's)",
    },
    "adapter": {
        "metavar": "FILE_OR_DIR",
        "type": path_of,
        "help": "LoRA file, the directory it is in, or a run (default: the newest run's)",
    },
    "text_encoder": {
        "metavar": "FILE",
        "type": path_of,
        "help": "the tuned UMT5: a weight file, the directory it is in, or a run (default: the newest run's)",
    },
    "base_text_encoder": {
        "metavar": "FILE",
        "type": path_of,
        "help": "the UMT5 that it is held against: a weight file or a checkpoint directory (default: the run's)",
    },
    "prompts": {
        "metavar": "FILE",
        "type": path_of,
        "help": "UTF-8 text file, one prompt per line (default: the neutral ones of configs/prompts/)",
    },
    "device": {"metavar": "DEVICE", "default": "cpu", "help": "cpu, cuda or cuda:N (default: %(default)s)"},
    "seed": {
        "metavar": "N",
        "type": seed,
        "default": 0,
        "help": "everything random follows from it (default: %(default)s)",
    },
}
_EPILOG = "Exit status: 0 pass, 1 fail, 3 inconclusive, 2 wrong use, 70 unexpected error."


def probe_parser(tool: str, description: str) -> argparse.ArgumentParser:
    """A parser with the flags that all probes share: --run_tag, --reports_dir, --debug."""
    parser = argparse.ArgumentParser(
        prog=f"{tool}.py",
        description=description,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--run_tag", metavar="TAG", help="name of the report (default: UTC time stamp)")
    parser.add_argument(
        "--reports_dir", metavar="DIR", default="reports", help="where all reports lie (default: %(default)s)"
    )
    parser.add_argument("--debug", action="store_true", help="show the stack trace of an error")
    return parser


def add_flags(parser: argparse.ArgumentParser, *names: str) -> None:
    """Add flags that several probes share, by name: config, base, expert, adapter, text_encoder, base_text_encoder,
    prompts, device, seed."""
    for name in names:
        parser.add_argument(f"--{name}", **_FLAGS[name])


def run_probe(
    parser: argparse.ArgumentParser,
    probe: Callable[[argparse.Namespace], Verdict],
    argv: Sequence[str] | None = None,
) -> int:
    """Parse the command line, run the probe and return the exit status.

    Errors become one line on stderr; `--debug` adds the stack trace. argparse itself exits with 2 for a flag that it
    does not know and with 0 for `--help`.
    """
    args = parser.parse_args(argv)
    # Imported along by other libraries where it is installed, it reports a missing 4-bit kernel that nothing here uses.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        return EXIT_BY_VERDICT[probe(args)]
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        return EXIT_INTERRUPTED
    except UserError as error:
        _show(args.debug, f"error: {error}")
        return EXIT_USER_ERROR
    except Exception as error:
        mendable = as_user_error(error) if isinstance(error, OSError) else None
        if mendable is not None:
            _show(args.debug, f"error: {mendable}")
            return EXIT_USER_ERROR
        hint = "" if args.debug else " (--debug shows the trace)"
        _show(args.debug, f"unexpected error: {type(error).__name__}: {' '.join(str(error).split())}{hint}")
        return EXIT_UNEXPECTED


def _show(debug: bool, line: str) -> None:
    if debug:
        traceback.print_exc()
    sys.stderr.write(f"{line}\n")
