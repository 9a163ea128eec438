"""Reports of probes: list them, and hold several of one tool side by side.

python scripts/reports.py list --tool lora_delta_budget
python scripts/reports.py compare lora_delta_budget/run_1 lora_delta_budget/run_2
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from utils.cli import run_command
from utils.errors import EXIT_OK, UserError
from utils.report_runs import (
    Line,
    choose_report,
    compare_caps,
    compare_inputs,
    compare_metrics,
    compare_versions,
    comparison_rows,
    find_reports,
    list_rows,
    text_table,
)


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="List the reports of probes, or hold several of one tool side by side.",
        epilog=(
            "list [--tool TOOL]; compare REPORT REPORT ... [--all]; both [--reports_dir DIR]. Exit status: 0 done, 2 wrong use."
        ),
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    listing = commands.add_parser("list", help="one line per report, oldest first", allow_abbrev=False)
    listing.add_argument("--tool", metavar="TOOL", help="only this probe's reports")
    comparing = commands.add_parser(
        "compare", help="metrics, caps, verdicts, inputs and versions side by side", allow_abbrev=False
    )
    comparing.add_argument(
        "reports",
        metavar="REPORT",
        nargs="+",
        help="tool/run_tag, a report's directory, or a run_tag that only one tool has",
    )
    comparing.add_argument(
        "--all", action="store_true", help="also the metrics that are equal in all of them"
    )
    for command in (listing, comparing):
        command.add_argument(
            "--reports_dir",
            metavar="DIR",
            type=Path,
            default=Path("reports"),
            help="where all reports lie (default: %(default)s)",
        )
        command.add_argument("--debug", action="store_true", help="show the stack trace of an error")
    return parser


def list_reports(args: argparse.Namespace) -> None:
    """Print a table of all reports, and a line for each that is damaged."""
    found = find_reports(args.reports_dir, args.tool)
    if found.summaries:
        print(text_table(["created", "tool", "run_tag", "verdict", "headline"], list_rows(found.summaries)))
    else:
        print(f"no reports in {args.reports_dir}")
    for line in found.damaged:
        print(f"skipped: {line}")


def compare_reports(args: argparse.Namespace) -> None:
    """Print what several reports of one tool have in common and what not.

    Raises:
        UserError: a report is not there, is damaged, or is of another tool.
    """
    if len(args.reports) < 2:
        raise UserError("give at least two reports to compare")
    summaries = [choose_report(args.reports_dir, name) for name in args.reports]
    tools = sorted({one.tool for one in summaries})
    if len(tools) > 1:
        raise UserError(f"these are reports of different tools ({', '.join(tools)}); give reports of one")
    letters = [_letter(index) for index in range(len(summaries))]
    print(f"{tools[0]}: {summaries[0].question}\n")
    rows = [
        [letter, one.run_tag, one.created, one.verdict, one.explanation]
        for letter, one in zip(letters, summaries, strict=True)
    ]
    print(text_table(["", "run_tag", "created", "verdict", "headline"], rows))
    metrics = compare_metrics(summaries)
    shown = metrics if args.all else [line for line in metrics if line.differs]
    _print_lines("metrics", letters, shown, f"all {len(metrics)} metrics are equal")
    if len(shown) < len(metrics) and shown:
        print(f"{len(metrics) - len(shown)} more metrics are equal (--all shows them)")
    _print_lines("caps", letters, compare_caps(summaries), "no caps")
    _print_lines("inputs that differ", letters, compare_inputs(summaries), "the inputs have the same content")
    _print_lines("versions that differ", letters, compare_versions(summaries), "the versions are the same")
    if len({one.seed for one in summaries}) > 1:
        _print_lines("seeds", letters, [Line("seed", tuple(one.seed for one in summaries))], "")


def _print_lines(title: str, letters: Sequence[str], lines: Sequence[Line], otherwise: str) -> None:
    print(f"\n{title}:")
    if not lines:
        print(otherwise)
        return
    rows = comparison_rows(lines)
    header = ["name", *letters, *(["change", "relative"] if len(letters) == 2 else [])]
    while header[-1] in ("change", "relative") and not any(row[len(header) - 1] for row in rows):
        header, rows = header[:-1], [row[:-1] for row in rows]
    print(text_table(header, rows))


def _letter(index: int) -> str:
    """A, B, ..., Z, then numbers."""
    return chr(ord("A") + index) if index < 26 else str(index + 1)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return the exit status."""
    args = build_parser().parse_args(argv)

    def body() -> int:
        try:
            {"list": list_reports, "compare": compare_reports}[args.command](args)
        except BrokenPipeError:  # such as `| head`
            sys.stderr.close()
        return EXIT_OK

    return run_command(body, debug=args.debug)


if __name__ == "__main__":
    sys.exit(main())
