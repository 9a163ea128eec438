"""Solve for a DiT LoRA translator in closed form, from prompts alone: no media, no training.

    python scripts/solve_translator.py --config configs/wan22_dit_lora_translator.toml \\
        --set model.llm_path=FILE --domain_prompts FILE --out DIR

See docs/recipes/closed_form_translator.md.
"""

import argparse
import math
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from utils.argument_types import config_file, path_of, positive_float, positive_int
from utils.devices import choose_device
from utils.errors import UserError
from utils.probe_cli import add_flags, probe_parser, run_probe
from utils.report import Report, Verdict, check_writable, refuse_training_run

if TYPE_CHECKING:
    from models.wan.closed_form.fit_moments import FitMoments
    from models.wan.closed_form.fit_prompts import FitPlan
    from models.wan.closed_form.fit_search import Caps, Fitted
    from models.wan.closed_form.fit_subject import FitSide, FitSubject

TOOL = "closed_form_translator"
QUESTION = "How much of what the frozen DiT heard through the base encoder does the solved adapter give back, and at what cost?"


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
        help="a dit_lora config: its model.llm_path is the tuned encoder, that of ckpt_path the base",
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
        help="neutral prompts, UTF-8, one per line (default: several thousand of the project's grammar, judged by "
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
        default=None,
        help="penalty on the change, in units of the tokens' mean second moment; auto chooses it by the error on held-out "
        "prompts (default: auto)",
    )
    parser.add_argument(
        "--keep_weight",
        metavar="W",
        type=positive_float,
        default=1.0,
        help="what all tokens of domain prompts weigh together; all neutral ones weigh 1 (default: %(default)s)",
    )
    parser.add_argument(
        "--blocks", metavar="A-B", type=_blocks, help="first and last block to adapt (default: the config's)"
    )
    parser.add_argument(
        "--max_delta_ratio",
        metavar="Q",
        type=positive_float,
        help="cap on ||dW|| / ||W|| of every module, met by a larger ridge (default: the config's [budget], else none)",
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="what the encoders compute in (default: %(default)s)",
    )
    add_flags(parser, "device", "seed")
    return parser


def _ridge(text: str) -> float | None:
    if text == "auto":
        return None
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
    from models.wan.closed_form.fit_prompts import plan_fit
    from models.wan.closed_form.fit_subject import open_subject

    subject = open_subject(args.config, args.set, args.rank, args.blocks)
    plan = plan_fit(args.prompts, args.domain_prompts, args.keywords_file, args.seed)
    check_out(args.out, args.reports_dir)
    report = Report(TOOL, QUESTION, args.reports_dir, args.run_tag, args.seed)
    for remark in plan.remarks:
        say(report, remark)

    from models.wan.closed_form.fit_report import HOW_TO_READ, NEXT_STEPS, add_results, judge
    from models.wan.closed_form.fit_save import write_adapters

    moments = gather(args, subject, plan, report)
    fitted = [solve(args, side, own, report) for side, own in zip(subject.sides, moments, strict=True)]
    verdict, explanation = judge(fitted)
    add_inputs(report, args, subject)
    add_results(report, subject.sides, fitted, moments[0])
    for path in write_adapters(args.out, subject, fitted, args.keep_weight):
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


def gather(
    args: argparse.Namespace, subject: "FitSubject", plan: "FitPlan", report: Report
) -> "list[FitMoments]":
    """Moments for each DiT, from one pass of both encoders.

    Raises:
        UserError: encoders or tokenizers do not belong together, or a state is not finite.
    """
    import torch

    from models.wan.closed_form.fit_moments import collect
    from models.wan.probes.encoder_drift import load_text_embedding
    from models.wan.probes.encoder_stream import open_encoder_pair
    from utils.progress import Progress

    device = choose_device(args.device)
    pair = open_encoder_pair(subject.base, subject.tuned)
    if pair.is_partial:
        say(report, f"{subject.tuned}: holds only the trained tensors; all others are the base's")
    tokenise = common_tokenizer(subject, plan)
    embeds = [
        load_text_embedding(side.paths.transformer_dir, pair.sizes.d_model, device) for side in subject.sides
    ]
    progress = Progress("encoders", (pair.sizes.num_layers + 2) * len(plan.prompts))
    try:
        return collect(
            pair,
            plan,
            tokenise,
            embeds,
            getattr(torch, args.dtype),
            device,
            lambda count: progress.advance(count),
        )
    finally:
        progress.close()


def common_tokenizer(subject: "FitSubject", plan: "FitPlan") -> Callable[[str], list[int]]:
    """The base's tokenizer, after it was held against the tuned encoder's own, where that has one.

    Raises:
        UserError: the two cut a prompt differently.
    """
    from models.wan.text_encoder import WanTokenizer

    tokenizer = WanTokenizer(subject.tokenizer)
    if (
        subject.tuned_tokenizer is not None
        and subject.tuned_tokenizer.resolve() != subject.tokenizer.resolve()
    ):
        other = WanTokenizer(subject.tuned_tokenizer)
        differing = sum(tokenizer(prompt.text) != other(prompt.text) for prompt in plan.prompts)
        if differing:
            raise UserError(
                f"{subject.tuned_tokenizer}: cuts {differing} of {len(plan.prompts)} prompts into other tokens than "
                f"{subject.tokenizer}, so the encoders have no tokens in common; give the encoder that was tuned from this base"
            )
    return tokenizer


def solve(args: argparse.Namespace, side: "FitSide", moments: "FitMoments", report: Report) -> "Fitted":
    """The adapter of one DiT."""
    from models.wan.closed_form.fit_search import fit
    from models.wan.closed_form.fit_solve import Solver
    from utils.progress import Progress

    label = "targets" if side.expert is None else f"targets of {side.expert}"
    caps = caps_of(args, side, report)
    solver = Solver(
        moments, side.source, side.targets, side.adapter.rank, args.keep_weight, choose_device(args.device)
    )
    progress = Progress(label, len(side.targets))
    try:
        found = fit(solver, args.ridge, caps, lambda: progress.advance(1))
    finally:
        progress.close()
    if found.ridge != found.best_ridge:
        before, after = found.unbounded.recovery, found.bounded.recovery
        say(
            report,
            f"{label}: the cap needs a ridge of {found.ridge:.3g} in place of {found.best_ridge:.3g}; recovery (two blocks) "
            f"{after:.1%} in place of {before:.1%}",
        )
    return found


def caps_of(args: argparse.Namespace, side: "FitSide", report: Report) -> "Caps":
    """The flag, else the config's [budget], else none; told in the report."""
    from models.wan.closed_form.fit_search import Caps

    budget = side.config.budget
    given = args.max_delta_ratio
    largest = given if given is not None else budget.max_delta_ratio if budget else None
    mean = budget.max_mean_delta_ratio if budget else None
    source = "--max_delta_ratio" if given is not None else f"[budget] of {args.config}"
    if largest is not None:
        report.cap("max_delta_ratio", largest, f"met by every module; from {source}")
    if mean is not None:
        report.cap("max_mean_delta_ratio", mean, f"met by the mean; from [budget] of {args.config}")
    return Caps(largest, mean)


def say(report: Report, text: str) -> None:
    """Tell the user now, and the report."""
    print(text)
    report.note(text)


def add_inputs(report: Report, args: argparse.Namespace, subject: "FitSubject") -> None:
    """Name every file that the numbers come from; private ones are not named."""
    from models.wan.layouts import weight_files

    report.add_input("config", args.config)
    for role, place in (("text_encoder", subject.tuned), ("base_text_encoder", subject.base)):
        for file in weight_files(place):
            report.add_input(role, file)
    for side in subject.sides:
        for file in side.source.files:
            report.add_input("base", file)
    # Where keywords decide, the file of neutral prompts holds the domain's too.
    private = {"domain_prompts": args.domain_prompts, "keywords_file": args.keywords_file}
    if args.keywords_file is not None:
        private["prompts"] = args.prompts
    elif args.prompts is not None:
        report.add_input("prompts", args.prompts)
    for flag, path in private.items():
        if path is not None:
            report.note(f"--{flag}: a private file, neither named nor fingerprinted here")
    report.metric("keep_weight", args.keep_weight, "of all domain tokens together; all neutral ones weigh 1")


def main(argv: Sequence[str] | None = None) -> int:
    """Run, and return the exit status."""
    return run_probe(build_parser(), probe, argv)


if __name__ == "__main__":
    sys.exit(main())
