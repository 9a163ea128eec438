"""Probe: is this translator run acceptable?

Delta budget, attention logits and paired evaluation loss of one adapter in one report, with the caps used and one verdict,
and the grid of samples that was drawn of it, where there is one. See docs/diagnostics/dit_lora_translator.md.
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
from models.wan.probes.logit_flags import add_logit_flags, check_logit_flags
from models.wan.probes.logit_report import (
    KINDS,
    add_logit_results,
    judge_logits,
)
from models.wan.probes.logit_subject import LogitSubject, MeasuredLogits, measure_logits
from models.wan.probes.save_grid import add_grid, find_grid
from models.wan.probes.subject import Subject, choose_subject
from utils.adapter_runs import run_of_adapter
from utils.argument_types import positive_float
from utils.eval_records import EVAL_FILE
from utils.eval_verdict import EvalEffect, read_effects
from utils.module_paths import type_of
from utils.probe_cli import add_flags, probe_parser, run_probe
from utils.report import Report, Verdict
from utils.tensor_source import open_safetensors

TOOL = "dit_lora_translator"
QUESTION = "Is this translator acceptable: small, gentle on attention, and better than no adapter on held-out samples?"
HOW_TO_READ = """\
- Three parts, one verdict: the whole fails if one part fails, and is inconclusive if one is and none fails.
- **delta**: how far the adapter moves the weights (as `lora_delta_budget`).
- **logits**: whether attention keeps its scale (as `attn_logit_probe`).
- **evaluation**: the loss on held-out samples, with the adapter minus without it, each sample with itself. Below 0 is better; the
  interval says whether that is more than chance.
- **The grid** is drawn by `prompt_grid` from the same noise without and with the adapter, and decides nothing here: look at it."""
NEXT_STEPS: dict[Verdict, str] = {
    "pass": "- Look at the grid, or have one drawn: numbers do not see how a picture is drawn.",
    "fail": "- Start with the part that failed: the probe of its name says more about it.",
    "inconclusive": (
        "- Where the evaluation is inconclusive: give the run `eval_datasets` with more held-out samples.\n"
        "- Where delta or logits are: the adapter changes hardly anything; look at loss, learning rate and number of steps."
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
    add_logit_flags(parser)
    return parser


def probe(args: argparse.Namespace) -> Verdict:
    """Measure all three, write the report, and return the verdict."""
    check_logit_flags(args)
    subject = choose_subject(args)
    caps = choose_caps(subject, args.max_delta_ratio, args.max_mean_delta_ratio)
    report = Report(TOOL, QUESTION, args.reports_dir, args.run_tag, args.seed)
    source = open_transformer(subject.transformer)
    delta = measure_delta(subject, source)
    logits = measure_part_of_logits(subject, delta, args)
    effects, about_effects = find_effects(subject)
    grid = find_grid(subject.adapter, report.reports_dir)
    about_logits = logits.remarks if logits else ()
    for remark in dict.fromkeys(
        (*subject.remarks, *delta.remarks, *about_logits, *about_effects, *grid.remarks)
    ):
        print(remark)
        report.note(remark)
    parts = [
        Part("delta", *judge_delta(delta.deltas, caps)),
        judge_part_of_logits(logits, args),
        Part("evaluation", *judge_effects(effects)),
    ]
    verdict, explanation = judge(parts)
    add_delta_inputs(report, subject, source)
    run = run_of_adapter(subject.adapter)
    if effects and run is not None:
        report.add_input("evaluations", run.directory / EVAL_FILE)
    add_parts(report, parts)
    add_grid(report, grid)
    fill(report, args, subject, caps, delta, logits, effects)
    directory = report.write(verdict, explanation, HOW_TO_READ, NEXT_STEPS[verdict])
    for part in parts:
        print(f"  {part.name}: {part.verdict}: {part.explanation}")
    print(f"{verdict}: {explanation}\nreport: {directory}")
    return verdict


def measure_part_of_logits(
    subject: Subject, delta: DeltaResult, args: argparse.Namespace
) -> MeasuredLogits | None:
    """Logits of the attentions that the adapter touches, in its blocks (see `attn_logit_probe`); None where it touches none."""
    touched = {type_of(module) for module in delta.adapter.modules}
    kinds = tuple(kind for kind in KINDS["both"] if kind in touched)
    if not kinds:
        return None
    base = open_official(subject.transformer)
    arch = arch_of(subject.transformer, base)
    chosen = LogitSubject(
        subject.transformer, subject.adapter, None, subject.config_path, subject, (), subject.expert
    )
    return measure_logits(chosen, base, arch, kinds, args, say=print)


def judge_part_of_logits(logits: MeasuredLogits | None, args: argparse.Namespace) -> Part:
    """The verdict on the logits."""
    if logits is None:
        return Part(
            "logits", "inconclusive", "The adapter touches no attention, so there are no logits to judge."
        )
    return Part("logits", *judge_logits(logits.result, args.min_ratio, args.max_ratio))


def find_effects(subject: Subject) -> tuple[list[EvalEffect], list[str]]:
    """What the run that the adapter lies in has evaluated at its step (nothing where it lies in none), and remarks."""
    run = run_of_adapter(subject.adapter)
    if run is None:
        return [], []
    saved = open_safetensors([subject.adapter]).metadata().get("step", "")
    step = int(saved) if saved.isascii() and saved.isdecimal() else None
    effects = read_effects(run.directory, step)
    if step is None and effects:
        return effects, [f"{subject.adapter} does not name its step, so the run's last evaluation counts"]
    earlier = [effect for effect in effects if effect.step != step]
    return effects, [
        f"warning: the adapter was saved at step {step}, but the last evaluation of {effect.dataset} before was at step "
        f"{effect.step}"
        for effect in earlier
    ]


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


def add_parts(report: Report, parts: Sequence[Part]) -> None:
    """What each part says."""
    lines = [f"- **{part.name}: {part.verdict}.** {part.explanation}" for part in parts]
    report.section("The three parts", "\n".join(lines))
    report.metric("parts", {part.name: part.verdict for part in parts})


def fill(
    report: Report,
    args: argparse.Namespace,
    subject: Subject,
    caps: DeltaCaps,
    delta: DeltaResult,
    logits: MeasuredLogits | None,
    effects: Sequence[EvalEffect],
) -> None:
    """Numbers, tables and plots of all parts."""
    report.metric("logit_inputs", "none" if logits is None else logits.inputs)
    add_delta_results(report, delta, caps, subject.expert)
    if logits is not None:
        add_logit_results(report, logits.result, args.min_ratio, args.max_ratio)
    report.metric("evaluation", {effect.dataset: asdict(effect) for effect in effects})
    if effects:
        rows = [asdict(effect) | {"verdict": effect.verdict} for effect in effects]
        report.table("evaluation", rows, "Paired evaluation loss")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the probe and return its exit status."""
    return run_probe(build_parser(), probe, argv)


if __name__ == "__main__":
    sys.exit(main())
