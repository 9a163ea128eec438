"""Solve for a DiT LoRA translator in closed form, from prompts alone: no media, no training.

    python scripts/solve_translator.py --config configs/wan22_dit_lora_translator.toml \\
        --set model.llm_path=FILE --domain_prompts FILE --out DIR

See docs/recipes/closed_form_translator.md.
"""

import argparse
import math
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from models.wan.closed_form.fit_settings import QUESTION, TOOL, settings_of
from utils.argument_types import config_file, path_of, positive_float, positive_int, seed
from utils.devices import choose_device
from utils.errors import UserError
from utils.probe_cli import probe_parser, run_probe
from utils.report import Report, Verdict, check_writable, refuse_training_run


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = probe_parser(
        "solve_translator",
        "Solve for a DiT LoRA translator in closed form, from prompts alone: what makes cross_attn.k and cross_attn.v answer\n"
        "to a tuned text encoder as they did to the base. Writes an ordinary adapter and a report.",
    )
    parser.add_argument(
        "--config",
        required=True,
        metavar="TOML",
        type=config_file,
        help="a dit_lora config: its model.llm_path is the tuned encoder, that of ckpt_path the base; its "
        "[adapter.closed_form] fills in the flags that are not given",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override a value of the config (repeatable)",
    )
    parser.add_argument(
        "--out", required=True, metavar="DIR", type=path_of, help="where to write; must not exist"
    )
    parser.add_argument(
        "--prompts",
        metavar="FILE",
        type=path_of,
        help="neutral prompts, UTF-8, one per line (default: the config's, else several thousand of the project's grammar, judged by "
        "configs/prompts/neutral.txt)",
    )
    domain = parser.add_mutually_exclusive_group()
    domain.add_argument(
        "--domain_prompts", metavar="FILE", type=path_of, help="prompts with new words, to be kept (private)"
    )
    domain.add_argument(
        "--keywords_file",
        metavar="FILE",
        type=path_of,
        help="keywords, one per line (private): prompts of --prompts that hold one are kept",
    )
    parser.add_argument(
        "--rank", metavar="R", type=positive_int, help="of the adapter (default: the config's)"
    )
    parser.add_argument(
        "--ridge",
        metavar="X",
        type=_ridge,
        help="penalty on the change, in units of the tokens' mean second moment; auto chooses it by the error on held-out "
        "prompts (default: the config's, else auto)",
    )
    parser.add_argument(
        "--keep_weight",
        metavar="W",
        type=positive_float,
        help="what all tokens of domain prompts weigh together; all neutral ones weigh 1 (default: the config's, else 1)",
    )
    parser.add_argument(
        "--blocks", metavar="A-B", type=_blocks, help="first and last block to adapt (default: the config's)"
    )
    parser.add_argument(
        "--max_delta_ratio",
        metavar="Q",
        type=positive_float,
        help="cap on ||dW|| / ||W|| of every module, met by a larger ridge (default: the config's, else that of its [budget], "
        "else none)",
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        help="what the encoders compute in (default: the config's, else float32)",
    )
    parser.add_argument(
        "--device", metavar="DEVICE", help="cpu, cuda or cuda:N (default: the config's, else cpu)"
    )
    parser.add_argument(
        "--seed",
        metavar="N",
        type=seed,
        help="says which prompts are held out (default: the config's, else 0)",
    )
    return parser


def _ridge(text: str) -> float | Literal["auto"]:
    if text == "auto":
        return "auto"
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value >= 0):
        raise argparse.ArgumentTypeError(f"{text!r} is neither auto nor a number from 0")
    return value


def _blocks(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d{1,4})-(\d{1,4})", text)
    if match is None or int(match[1]) > int(match[2]):
        raise argparse.ArgumentTypeError(f"{text!r} is not first-last, such as 20-29")
    return int(match[1]), int(match[2])


def probe(args: argparse.Namespace) -> Verdict:
    """Solve, write adapter and report, and return the verdict."""
    from models.wan.closed_form.fit_subject import command_config, open_subject

    train = command_config(args.config, args.set, args.rank, args.blocks)
    settings = settings_of(train.adapter, args)
    subject = open_subject(train)

    from models.wan.closed_form.fit_job import fill_report, plan_of, solve_adapters
    from models.wan.closed_form.fit_report import HOW_TO_READ, NEXT_STEPS
    from models.wan.closed_form.fit_save import write_adapters

    plan = plan_of(settings)
    check_out(args.out, args.reports_dir)
    report = Report(TOOL, QUESTION, args.reports_dir, args.run_tag, settings.seed)

    def tell(text: str) -> None:
        print(text)
        report.note(text)

    solved = solve_adapters(subject, plan, settings, choose_device(settings.device or "cpu"), tell)
    verdict, explanation = solved.judged()
    fill_report(report, solved, args.config)
    for path in write_adapters(args.out, solved):
        report.add_input("adapter", path)
        print(f"adapter: {path}")
    directory = report.write(verdict, explanation, HOW_TO_READ, NEXT_STEPS[verdict])
    print(f"{verdict}: {explanation}\nreport: {directory}")
    return verdict


def check_out(out: Path, reports_dir: str) -> None:
    """The adapter's place, before anything is computed.

    Raises:
        UserError: it exists, cannot be written, or is where other things belong.
    """
    if out.exists():
        raise UserError(f"{out}: exists already and is never overwritten; choose another --out")
    if out.resolve().is_relative_to(Path(reports_dir).resolve()):
        raise UserError(f"{out}: lies among reports, where no weights belong; choose another --out")
    refuse_training_run(out, "--out")
    check_writable(out, "--out")


def main(argv: Sequence[str] | None = None) -> int:
    """Run, and return the exit status."""
    return run_probe(build_parser(), probe, argv)


if __name__ == "__main__":
    sys.exit(main())
