"""Probe: is this translator run acceptable?

Delta budget, attention logits and paired evaluation loss of one adapter in one report, with the caps used and one verdict.
See docs/diagnostics/dit_lora_translator.md.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import NamedTuple

from models.wan.checkpoint import open_transformer
from models.wan.probes.base import arch_of, open_official
from models.wan.probes.delta import DeltaCaps, DeltaResult, choose_caps, judge_delta, measure_delta
from models.wan.probes.delta_report import add_delta_inputs, add_delta_results
from models.wan.probes.logit_report import (
    KINDS,
    MAX_RATIO,
    MIN_RATIO,
    LogitResult,
    add_logit_results,
    judge_logits,
)
from models.wan.probes.logit_subject import LogitSubject, measure_logits
from models.wan.probes.subject import Subject, choose_subject
from utils.adapter_runs import run_of_adapter
from utils.errors import UserError
from utils.eval_verdict import EvalEffect, read_effects
from utils.probe_cli import add_flags, positive_float, probe_parser, run_probe
from utils.report import Report, Verdict
from utils.tensor_source import open_safetensors

TOOL = "dit_lora_translator"
QUESTION = "Is this translator acceptable: small, gentle on attention, and better than no adapter on held-out samples?"
HOW_TO_READ = """\
- Three parts, one verdict: the whole fails if one part fails, and is inconclusive if one is and none fails.
- **delta**: how far the adapter moves the weights ([lora_delta_budget](../../../docs/diagnostics/lora_delta_budget.md)).
- **logits**: whether attention keeps its scale ([attn_logit_probe](../../../docs/diagnostics/attn_logit_probe.md)).
- **evaluation**: the loss on held-out samples, with the adapter minus without it, each sample with itself. Below 0 is better; the
  interval says whether that is more than chance."""
NEXT_STEPS: dict[Verdict, str] = {
    "pass": "- Look at samples with a frozen seed, adapter off and on: numbers do not see how a picture is drawn.",
    "fail": "- Start with the part that failed: the probe of its name says more about it.",
    "inconclusive": (
        "- No evaluation, or one that cannot tell: give the run `eval_datasets` with more held-out samples.\n"
        "- An adapter that changes hardly anything: look at loss, learning rate and number of steps."
    ),
}


class Part(NamedTuple):
    """The verdict on one of the three parts."""

    name: str
    verdict: Verdict
    explanation: str


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = probe_parser(
        TOOL,
        "Is this translator run acceptable? Delta budget, attention logits and paired evaluation loss in one report, with the\n"
        "caps used and one verdict. Without arguments: the newest run below output/.",
    )
    add_flags(parser, "config", "base", "expert", "adapter", "device", "seed")
    for name, what in (
        (
            "max_delta_ratio",
            "cap on the ratio of every module (default: the run's [budget], else its default)",
        ),
        ("max_mean_delta_ratio", "cap on the mean over all modules (default: the run's [budget], else none)"),
    ):
        parser.add_argument(f"--{name}", metavar="X", type=positive_float, help=what)
    parser.add_argument(
        "--min_ratio",
        metavar="X",
        type=positive_float,
        default=MIN_RATIO,
        help="logits (default: %(default)s)",
    )
    parser.add_argument(
        "--max_ratio",
        metavar="X",
        type=positive_float,
        default=MAX_RATIO,
        help="logits (default: %(default)s)",
    )
    parser.add_argument(
        "--samples",
        metavar="N",
        type=int,
        default=2,
        help="samples of the cache for the logits (default: %(default)s)",
    )
    parser.add_argument(
        "--synthetic",
        action="store_true",
        help="logits on random inputs: needs no cache, and seconds on a CPU",
    )
    return parser


def probe(args: argparse.Namespace) -> Verdict:
    """Measure all three, write the report, and return the verdict."""
    if args.samples < 1 or args.min_ratio > args.max_ratio:
        raise UserError("--samples must be at least 1, and --min_ratio not above --max_ratio")
    subject = choose_subject(args)
    caps = choose_caps(subject, args.max_delta_ratio, args.max_mean_delta_ratio)
    report = Report(TOOL, QUESTION, args.reports_dir, args.run_tag, args.seed)
    source = open_transformer(subject.transformer)
    delta = measure_delta(subject, source)
    logits, remarks = measure_part_of_logits(subject, delta, args)
    effects = find_effects(subject)
    for remark in dict.fromkeys((*subject.remarks, *delta.remarks, *remarks)):
        print(remark)
        report.note(remark)
    parts = [
        Part("delta", *judge_delta(delta.deltas, caps)),
        Part("logits", *judge_logits(logits, args.min_ratio, args.max_ratio)),
        Part("evaluation", *judge_effects(effects)),
    ]
    verdict, explanation = judge(parts)
    add_delta_inputs(report, subject, source)
    fill(report, args, subject, caps, delta, logits, effects, parts)
    directory = report.write(verdict, explanation, HOW_TO_READ, NEXT_STEPS[verdict])
    for part in parts:
        print(f"  {part.name}: {part.verdict}: {part.explanation}")
    print(f"{verdict}: {explanation}\nreport: {directory}")
    return verdict


def measure_part_of_logits(
    subject: Subject, delta: DeltaResult, args: argparse.Namespace
) -> tuple[LogitResult, list[str]]:
    """Logits of cross-attention, and of self-attention where the adapter touches it, in its blocks; see `attn_logit_probe`."""
    touches_self = any(".self_attn." in module for module in delta.adapter.modules)
    base = open_official(subject.transformer)
    arch = arch_of(subject.transformer, base)
    chosen = LogitSubject(subject.transformer, subject.adapter, None, subject.config_path, subject, ())
    args.tokens = 256
    return measure_logits(
        chosen, base, arch, None, KINDS["both" if touches_self else "cross"], args, (0.1, 0.5, 0.9), say=print
    )


def find_effects(subject: Subject) -> list[EvalEffect]:
    """What the run that the adapter lies in has evaluated at its step; nothing where it lies in none."""
    run = run_of_adapter(subject.adapter)
    if run is None:
        return []
    step = open_safetensors([subject.adapter]).metadata().get("step", "")
    return read_effects(run.directory, int(step) if step.isdigit() else None)


def judge_effects(effects: Sequence[EvalEffect]) -> tuple[Verdict, str]:
    """Fail if one dataset got worse, pass if one got better and none worse."""
    if not effects:
        return "inconclusive", "The run has no evaluation to hold the adapter against; give it eval_datasets."
    verdicts = {effect.dataset: effect.verdict for effect in effects}
    chosen: Verdict = (
        "fail" if "fail" in verdicts.values() else "pass" if "pass" in verdicts.values() else "inconclusive"
    )
    word = {"fail": "got worse", "pass": "got better", "inconclusive": "cannot be told from chance"}[chosen]
    said = [describe(effect) for effect in effects if effect.verdict == chosen]
    return chosen, f"The loss {word}: {'; '.join(said)}."


def describe(effect: EvalEffect) -> str:
    """One evaluation in a few words."""
    if effect.effect is None:
        return f"{effect.dataset}: not finite"
    ends = "" if effect.low is None or effect.high is None else f" ({effect.low:+.3g} to {effect.high:+.3g})"
    return f"{effect.dataset} {effect.effect:+.3g}{ends} against {effect.against}, {effect.num_samples} sample(s)"


def judge(parts: Sequence[Part]) -> tuple[Verdict, str]:
    """The verdict on the whole, and the sentence that explains it."""
    for verdict in ("fail", "inconclusive"):
        found = [part for part in parts if part.verdict == verdict]
        if found:
            return verdict, " ".join(f"{part.name}: {part.explanation}" for part in found)
    return "pass", " ".join(f"{part.name}: {part.explanation}" for part in parts)


def fill(
    report: Report,
    args: argparse.Namespace,
    subject: Subject,
    caps: DeltaCaps,
    delta: DeltaResult,
    logits: LogitResult,
    effects: Sequence[EvalEffect],
    parts: Sequence[Part],
) -> None:
    """Numbers, tables and plots of all parts."""
    lines = [f"- **{part.name}: {part.verdict}.** {part.explanation}" for part in parts]
    report.section("The three parts", "\n".join(lines))
    report.metric("parts", {part.name: part.verdict for part in parts})
    report.metric("logit_inputs", "random" if args.synthetic else f"{args.samples} cached sample(s)")
    add_delta_results(report, delta, caps, subject.expert)
    add_logit_results(report, logits, args.min_ratio, args.max_ratio)
    report.metric("evaluation", {effect.dataset: asdict(effect) for effect in effects})
    if effects:
        rows = [asdict(effect) | {"verdict": effect.verdict} for effect in effects]
        report.table("evaluation", rows, "Paired evaluation loss")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the probe and return its exit status."""
    return run_probe(build_parser(), probe, argv)


if __name__ == "__main__":
    sys.exit(main())
