"""Probe: what did encoder training change?

Holds a tuned UMT5 against the one that it was tuned from: how far prompts moved, those of the domain and neutral ones,
per layer and behind the DiT's text embedding; what keywords do to a sentence; whose neighbours changed. Both encoders
are read block by block. See docs/diagnostics/te_eval.md.
"""

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from models.wan.checkpoint import open_transformer
from models.wan.layouts import weight_files
from models.wan.probes.encoder_prompts import GROUPS, PromptPlan, plan_prompts
from models.wan.probes.encoder_report import EncoderResults, add_encoder_results
from models.wan.probes.encoder_subject import (
    DEFAULT_MAX_NEUTRAL_DRIFT,
    EncoderSubject,
    choose_drift_cap,
    choose_encoders,
)
from models.wan.probes.subject import OUTPUT_ROOT
from utils.argument_types import path_of, positive_float, positive_int
from utils.devices import choose_device
from utils.errors import UserError
from utils.metrics import METRICS_FILE, read_metrics
from utils.probe_cli import add_flags, probe_parser, run_probe
from utils.report import Report, Verdict

if TYPE_CHECKING:
    from models.wan.probes.cached_samples import CachedBatches
    from models.wan.probes.encoder_stream import EncoderPair
    from utils.trend import Trend

TOOL = "te_eval"
QUESTION = "What did encoder training change, and did neutral prompts stay where they were?"
# Relative distance of a prompt's states. Rounding an encoder's weights to bfloat16 gives less (about 0.003); an encoder
# below it everywhere was not trained.
MOVED_DISTANCE = 0.005
# Cosines do not see lengths. Beyond this the DiT gets text states of another size, and a small drift says nothing.
MAX_NORM_CHANGE = 0.1
HOW_TO_READ = """\
- **drift** is 1 - mean cosine of a prompt's token states, tuned against base: 0 where nothing moved. Neutral prompts should
  stay near 0, domain prompts and keywords should have moved more.
- **norm ratio** far from 1: the states became longer or shorter, which cosines do not see and the DiT does.
- **context gain** above 1: a keyword now says more to the other words of its sentence than it did.
- **neighbours kept** is 1 where a prompt has the same nearest neutral prompts as before.
- Numbers behind the DiT's text embedding count most: that is what its cross-attention reads."""
NEXT_STEPS: dict[Verdict, str] = {
    "pass": (
        "- Look at samples with a frozen seed, base and tuned encoder, with and without keywords.\n"
        "- Train a DiT LoRA translator on this encoder if the DiT does not follow it yet."
    ),
    "fail": (
        "- Use an earlier save, a lower learning rate, or fewer blocks (`text_train_blocks`).\n"
        "- layers.csv says where the drift begins.\n"
        "- Raise the cap only after looking at samples of neutral prompts with a frozen seed."
    ),
    "inconclusive": (
        "- An encoder that did not move: check that the run had `cache_text_embeddings = false` and "
        "`train_text_encoder = true`; with cached embeddings encoder training does nothing.\n"
        "- Check learning rate and number of steps, and that the file is the tuned one.\n"
        "- Domain prompts that moved no more than neutral ones: check that they hold what the captions held."
    ),
}


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = probe_parser(
        TOOL,
        "What did encoder training change? Holds a tuned UMT5 against its base, block by block: drift of neutral and of\n"
        "domain prompts, per layer and behind the DiT's text embedding; what keywords do to a sentence; neighbours; the\n"
        f"trend of the training loss. Without arguments: the newest run below {OUTPUT_ROOT}/ that saved an encoder.",
    )
    add_flags(parser, "config", "text_encoder", "base_text_encoder", "base", "expert")
    parser.add_argument(
        "--tokenizer",
        metavar="DIR",
        type=path_of,
        help="directory of google/umt5-xxl's tokenizer (default: the run's)",
    )
    parser.add_argument(
        *("--prompts", "--neutral_prompts"),
        dest="prompts",
        metavar="FILE",
        type=path_of,
        help="neutral prompts, UTF-8, one per line (default: the run's [budget], else configs/prompts/neutral.txt); the empty prompt and Wan's "
        "negative prompt are always among them",
    )
    parser.add_argument(
        "--domain_prompts",
        metavar="FILE",
        type=path_of,
        help="prompts that the encoder was tuned for (private)",
    )
    parser.add_argument(
        "--keywords_file",
        metavar="FILE",
        type=path_of,
        help="domain keywords, one per line (private; default: those of the run's [model.caption_aug])",
    )
    parser.add_argument(
        "--redact",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="show prompts of your files as index and hash. Default: domain prompts and keywords are hidden, neutral ones "
        "are not; --redact hides both, --no-redact neither",
    )
    parser.add_argument(
        "--max_neutral_drift",
        metavar="X",
        type=positive_float,
        help="cap on 1 - mean cosine of the neutral prompts (default: the run's [budget], else "
        f"{DEFAULT_MAX_NEUTRAL_DRIFT})",
    )
    parser.add_argument(
        "--neighbours",
        metavar="K",
        type=positive_int,
        default=5,
        help="nearest neighbours to compare (default: %(default)s)",
    )
    parser.add_argument(
        "--max_entries",
        metavar="N",
        type=positive_int,
        default=256,
        help="prompts or keywords of each file that are measured, at most (default: %(default)s)",
    )
    parser.add_argument(
        "--denoise_samples",
        metavar="N",
        type=_count_or_zero,
        default=0,
        help="also measure the DiT's loss with each keyword alone as caption, on up to N cached samples of the run that "
        "hold it; runs the DiT, which is slow on a CPU (default: %(default)s, off)",
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="what the encoders compute in (default: %(default)s)",
    )
    add_flags(parser, "device", "seed")
    return parser


def probe(args: argparse.Namespace) -> Verdict:
    """Measure, write the report, and return the verdict."""
    subject = choose_encoders(args)
    plan = plan_prompts(
        args.prompts, args.domain_prompts, args.keywords_file, subject.config, args.redact, args.max_entries
    )
    cap = choose_drift_cap(args.max_neutral_drift, subject.config, subject.config_path)
    report = Report(
        TOOL, QUESTION, args.reports_dir, args.run_tag, args.seed if args.denoise_samples else None
    )
    # Before the encoders run, which may take long.
    samples = open_denoise_samples(args, subject, plan) if args.denoise_samples else None
    for remark in (*subject.remarks, *plan.remarks):
        print(remark)
        report.note(remark)
    results = measure(args, subject, plan, samples, report)
    verdict, explanation = judge(results, cap.value)
    report.cap("max_neutral_drift", cap.value, f"neutral drift above it fails; from {cap.source}")
    report.cap(
        "moved_distance", MOVED_DISTANCE, "an encoder below this distance on every prompt is inconclusive"
    )
    report.cap(
        "max_norm_change", MAX_NORM_CHANGE, "neutral norm ratios farther from 1 on average are inconclusive"
    )
    add_inputs(report, args, subject, plan)
    add_encoder_results(report, results)
    directory = report.write(verdict, explanation, HOW_TO_READ, NEXT_STEPS[verdict])
    print(f"{verdict}: {explanation}\nreport: {directory}")
    return verdict


def open_denoise_samples(
    args: argparse.Namespace, subject: EncoderSubject, plan: PromptPlan
) -> "CachedBatches":
    """The run's cached samples, for the losses with a keyword alone.

    Raises:
        UserError: there is no run, no keyword or no cache, or --base names another DiT than the run's.
    """
    from models.wan.probes.keyword_loss import open_samples

    if subject.config_path is None or not plan.of("keyword"):
        raise UserError(
            "--denoise_samples needs the run's config (--config) and keywords (--keywords_file): it takes cached "
            "samples whose captions hold them"
        )
    data = open_samples(subject.config_path, args.seed, subject.overrides)
    dit = data.paths.transformer_dir
    if subject.transformer is not None and subject.transformer.resolve() != dit.resolve():
        raise UserError(
            f"--denoise_samples runs the DiT of {subject.config_path} ({dit}), and --base names {subject.transformer}; leave "
            "one of the two flags out"
        )
    return data


def measure(
    args: argparse.Namespace,
    subject: EncoderSubject,
    plan: PromptPlan,
    samples: "CachedBatches | None",
    report: Report,
) -> EncoderResults:
    """Everything that is measured; what could not be is noted in the report."""
    import torch

    from models.wan.probes.encoder_drift import (
        LayerRecorder,
        load_text_embedding,
        measure_prompts,
        summarise_group,
    )
    from models.wan.probes.encoder_keywords import keyword_signals, table_drift
    from models.wan.probes.encoder_stream import open_encoder_pair, stream_states
    from models.wan.text_encoder import WanTokenizer

    device = choose_device(args.device)
    pair = open_encoder_pair(subject.base, subject.tuned)
    note_pair(report, pair)
    embed = None
    if subject.transformer is not None:
        embed = load_text_embedding(subject.transformer, pair.sizes.d_model)
    tokenizer = WanTokenizer(subject.tokenizer)
    texts = plan.texts()
    place = {text: index for index, text in enumerate(texts)}
    ids = [tokenizer(text) for text in texts]
    recorder = LayerRecorder(plan, place)
    base, tuned = stream_states(pair, ids, getattr(torch, args.dtype), device, recorder)
    prompts = measure_prompts(plan, place, base, tuned, embed, args.neighbours)
    groups = {group: found for group in GROUPS if (found := summarise_group(prompts, group)) is not None}
    keywords = plan.of("keyword")
    signals = keyword_signals(keywords, ids, place, base, tuned)
    tokens = sorted({token for entry in keywords for token in ids[place[entry.text]][:-1]})
    table = table_drift(pair, tokens, args.neighbours)
    losses = None
    if samples is not None:
        from models.wan.probes.keyword_loss import keyword_losses

        losses = keyword_losses(samples, keywords, place, base, tuned, args.denoise_samples, device)
        if len(losses) < len(keywords):
            say(report, f"{len(keywords) - len(losses)} keywords stand in no caption of a cached sample")
    return EncoderResults(
        recorder.layers, prompts, groups, signals, table, losses, loss_trend(subject, report)
    )


def note_pair(report: Report, pair: "EncoderPair") -> None:
    """Remarks about the files themselves."""
    if pair.is_partial:
        say(report, f"{pair.tuned.files[0]}: holds only the trained tensors; all others are the base's")
    base, tuned = (set(source.dtypes.values()) for source in (pair.base, pair.tuned))
    if tuned - base and tuned & {"BF16", "F16"}:
        stored = [" and ".join(sorted(dtypes)) for dtypes in (base, tuned)]
        say(
            report,
            f"the base is stored as {stored[0]}, the tuned encoder as {stored[1]}: part of the drift is rounding",
        )


def say(report: Report, text: str) -> None:
    """Tell the user now, and the report."""
    print(text)
    report.note(text)


def loss_trend(subject: EncoderSubject, report: Report) -> "Trend | None":
    """The trend of the run's training loss; None where there is no run or too few steps."""
    from utils.trend import MIN_POINTS, robust_trend

    if subject.run is None:
        return None
    rows = [row for row in read_metrics(subject.run.directory) if isinstance(row.get("loss"), (int, float))]
    trend = robust_trend([row["step"] for row in rows], [row["loss"] for row in rows])
    if trend is None:
        say(
            report,
            f"{subject.run.directory / METRICS_FILE}: fewer than {MIN_POINTS} steps, so there is no trend of the loss",
        )
    return trend


def judge(results: EncoderResults, cap: float) -> tuple[Verdict, str]:
    """The verdict and the sentence that explains it."""
    group = results.groups["neutral"]
    neutral, ratio = group.drift, group.mean_norm_ratio
    largest = max(record.states.distance for record in results.prompts)
    if neutral > cap:
        return "fail", f"Neutral prompts drifted by {neutral:.4g}, above the cap of {cap:g}."
    if largest < MOVED_DISTANCE:
        return (
            "inconclusive",
            f"The encoder moved no prompt: the largest relative distance is {largest:.3g}, below {MOVED_DISTANCE:g} "
            "(cache_text_embeddings = true is the usual reason that encoder training does nothing).",
        )
    if abs(ratio - 1) > MAX_NORM_CHANGE:
        return (
            "inconclusive",
            f"Neutral prompts kept their direction (drift {neutral:.4g}), but their states are {ratio:.3g} times as long as "
            "the base's.",
        )
    within = f"Neutral prompts drifted by {neutral:.4g}, within the cap of {cap:g}"
    meant = results.groups.get("domain") or results.groups.get("keyword")
    if meant is None:
        return (
            "pass",
            f"{within}; whether the domain moved is not known without --domain_prompts or --keywords_file.",
        )
    which = "domain prompts" if "domain" in results.groups else "keywords"
    if meant.drift <= neutral:
        return "inconclusive", f"{within}, but {which} moved no more than that ({meant.drift:.4g})."
    return "pass", f"{within}; {which} by {meant.drift:.4g}."


def add_inputs(report: Report, args: argparse.Namespace, subject: EncoderSubject, plan: PromptPlan) -> None:
    """Name every file that the numbers come from. Private ones are not named: a short list can be guessed by its hash."""
    for role, place in (("text_encoder", subject.tuned), ("base_text_encoder", subject.base)):
        for file in weight_files(place):
            report.add_input(role, file)
    if subject.config_path is not None:
        report.add_input("config", subject.config_path)
    if subject.transformer is not None:
        for path in open_transformer(subject.transformer).files:
            report.add_input("base", path)
    if subject.run is not None and (subject.run.directory / METRICS_FILE).is_file():
        report.add_input("metrics", subject.run.directory / METRICS_FILE)
    given = {
        "prompts": plan.neutral_file,
        "domain_prompts": args.domain_prompts,
        "keywords_file": args.keywords_file,
    }
    for role, path in given.items():
        is_hidden = bool(args.redact) if role == "prompts" else args.redact is not False
        report.add_prompt_file(role, path, is_private=is_hidden)


def _count_or_zero(text: str) -> int:
    return 0 if text == "0" else positive_int(text)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the probe and return its exit status."""
    return run_probe(build_parser(), probe, argv)


if __name__ == "__main__":
    sys.exit(main())
