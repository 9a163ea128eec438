"""Probe: is this translator run acceptable?

Three measurements in one report with one verdict: how far the adapter moves the weights (as lora_delta_budget), whether
attention logits keep their scale (as attn_logit_probe), and the paired evaluation loss, adapter on against off, that the
run itself has measured. See docs/diagnostics/dit_lora_translator.md.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from models.wan.checkpoint import open_transformer
from models.wan.probes.comparison import Comparison, compare_adapter
from models.wan.probes.delta import choose_caps, judge_delta, measure_delta
from models.wan.probes.delta_report import add_delta_inputs, add_delta_results
from models.wan.probes.logit_probe import add_logit_flags, band_of, measure_logits, plan_logits
from models.wan.probes.logit_report import HOW_TO_READ as READING_LOGITS
from models.wan.probes.logit_report import add_logit_results
from models.wan.probes.logit_result import judge_logits
from models.wan.probes.subject import OUTPUT_ROOT, Subject, choose_subject
from utils.adapter_runs import run_of_adapter
from utils.config.schema import BudgetConfig
from utils.eval_records import EVAL_FILE
from utils.eval_verdict import EvalEffect, judge_effects, read_effects
from utils.probe_cli import add_flags, positive_float, probe_parser, run_probe
from utils.report import Report, Verdict
from utils.tensor_source import open_safetensors

TOOL = "dit_lora_translator"
QUESTION = "Is this translator run acceptable: weights near the base, attention at its scale, the loss lower?"
HOW_TO_READ = f"""\
- **delta**: ||scale * B A|| / ||W||, how far each adapted weight moves relative to its own size; per type and block.
- **evaluation**: loss with the adapter minus without, paired over the same samples and noise; the interval is at 95 %.
  Below 0 as a whole passes, above 0 as a whole fails, 0 inside is open.
{READING_LOGITS}
- None of this looks at a picture: only samples with a frozen seed do."""
NEXT_STEPS: dict[Verdict, str] = {
    "pass": "- Look at samples with a frozen seed, adapter off and on, before the adapter is used.",
    "fail": (
        "- Look at the part that fails first; its own probe (`lora_delta_budget`, `attn_logit_probe`) shows more.\n"
        "- Use an earlier save, a lower learning rate, or fewer targets; then look at samples with a frozen seed."
    ),
    "inconclusive": (
        "- See which part is open. Without evaluations: set `eval_datasets` in the config and train again.\n"
        "- An interval around 0 becomes narrower with more samples in the evaluated dataset.\n"
        "- Look at samples with a frozen seed, adapter off and on."
    ),
}


@dataclass(frozen=True)
class Part:
    """One of the three measurements and what it says."""

    part: str
    verdict: Verdict
    explanation: str


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = probe_parser(
        TOOL,
        "Is this translator run acceptable? Delta budget, attention logits and paired evaluation loss in one report with\n"
        "one verdict: fail if one of them fails, else inconclusive if one of them is, else pass.\n"
        f"Without arguments: the newest run below {OUTPUT_ROOT}/.",
    )
    add_flags(parser, "config", "base", "expert", "adapter", "device", "seed")
    parser.add_argument(
        "--max_delta_ratio",
        metavar="X",
        type=positive_float,
        help=f"cap on every module (default: the run's [budget], else {BudgetConfig().max_delta_ratio})",
    )
    parser.add_argument(
        "--max_mean_delta_ratio",
        metavar="X",
        type=positive_float,
        help="cap on the mean over all modules (default: the run's [budget], else none)",
    )
    add_logit_flags(parser)
    return parser


def probe(args: argparse.Namespace) -> Verdict:
    """Measure, write the report, and return the verdict."""
    band = band_of(args)
    subject = choose_subject(args)
    caps = choose_caps(subject, args.max_delta_ratio, args.max_mean_delta_ratio)
    comparison = compare_adapter(subject)
    plan = plan_logits(args, comparison)
    report = Report(TOOL, QUESTION, args.reports_dir, args.run_tag, seed=args.seed)
    effects, eval_remarks = evaluations(subject)
    source = open_transformer(subject.transformer)
    delta = measure_delta(subject, source)
    logits, logit_remarks = measure_logits(args, comparison, plan)
    remarks = (*comparison.remarks, *delta.remarks, *plan.remarks, *logit_remarks, *eval_remarks)
    for remark in dict.fromkeys(remarks):
        print(remark)
        report.note(remark)
    parts = [
        Part("delta", *judge_delta(delta.deltas, caps)),
        Part("logits", *judge_logits(logits, band)),
        Part("evaluation", *judge_effects(effects)),
    ]
    verdict, explanation = judge(parts)
    add_inputs(report, subject, comparison)
    report.metric("parts", {part.part: part.verdict for part in parts})
    report.table("parts", [asdict(part) for part in parts], "The three measurements")
    add_delta_results(report, delta, caps, subject.expert)
    add_logit_results(report, logits, plan, band, args.seed)
    add_evaluation(report, effects)
    directory = report.write(verdict, explanation, HOW_TO_READ, NEXT_STEPS[verdict])
    for part in parts:
        print(f"  {part.part}: {part.verdict}: {part.explanation}")
    print(f"{verdict}: {explanation}\nreport: {directory}")
    return verdict


def judge(parts: Sequence[Part]) -> tuple[Verdict, str]:
    """One verdict: fail if a part fails, else inconclusive if a part is, else pass."""
    named: dict[Verdict, list[str]] = {"fail": [], "inconclusive": [], "pass": []}
    for part in parts:
        named[part.verdict].append(f"{part.part} ({part.explanation.rstrip('.')})")
    if named["fail"]:
        also = f" Open: {'; '.join(named['inconclusive'])}." if named["inconclusive"] else ""
        return "fail", f"Fails: {'; '.join(named['fail'])}.{also}"
    if named["inconclusive"]:
        return "inconclusive", f"Nothing fails, but open: {'; '.join(named['inconclusive'])}."
    return "pass", f"All three pass: {'; '.join(named['pass'])}."


def evaluations(subject: Subject) -> tuple[list[EvalEffect], list[str]]:
    """What the adapter's run has measured at the step of the save, and remarks."""
    run = run_of_adapter(subject.adapter)
    if run is None:
        return [], [f"{subject.adapter}: lies in no run, so there are no evaluations of it"]
    saved = open_safetensors([subject.adapter]).metadata().get("step", "")
    step = int(saved) if saved.isascii() and saved.isdecimal() else None
    effects = read_effects(run.directory, step)
    remarks = []
    if step is None and effects:
        remarks.append(f"{subject.adapter}: does not name its step, so the run's last evaluation counts")
    late = next((effect for effect in effects if step is not None and effect.step != step), None)
    if late is not None:
        remarks.append(
            f"warning: the adapter is that of step {step}, but the last evaluation of {late.dataset} until then was at step "
            f"{late.step}"
        )
    return effects, remarks


def add_inputs(report: Report, subject: Subject, comparison: Comparison) -> None:
    """Name every file that the numbers come from."""
    add_delta_inputs(report, subject, comparison.base)
    run = run_of_adapter(subject.adapter)
    if run is not None and (run.directory / EVAL_FILE).is_file():
        report.add_input("evaluations", run.directory / EVAL_FILE)


def add_evaluation(report: Report, effects: Sequence[EvalEffect]) -> None:
    """The loss with the adapter on and off, per dataset."""
    rows = [asdict(effect) | {"verdict": effect.verdict} for effect in effects]
    report.metric("evaluation", rows)
    report.metric("num_evaluated_datasets", len(effects), "with the adapter on and off")
    report.table("evaluation", rows, "Loss, adapter on against off")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the probe and return its exit status."""
    return run_probe(build_parser(), probe, argv)


if __name__ == "__main__":
    sys.exit(main())
