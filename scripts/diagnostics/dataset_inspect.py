"""Probe: what does training make of a dataset?

Reports what becomes of every file, how samples fall into buckets, how long captions are, how many steps an epoch has,
how noise levels are drawn, and shows clips as the model sees them. No weights are opened, and nothing but the report
is written. See docs/diagnostics/dataset_inspect.md.
"""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from models.wan.checkpoint import TOKENIZER_FILES, locate
from utils.argument_types import config_file, path_of
from utils.config.load import load_config, load_dataset
from utils.config.schema import TrainConfig
from utils.errors import UserError
from utils.probe_cli import probe_parser, run_probe
from utils.report import Report, Verdict

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from models.wan.inspect import Inspection
    from utils.data.inspect import BucketRow

TOOL = "dataset_inspect"
QUESTION = "What does training make of the dataset: which files, in which buckets, with which captions?"
MAX_SKIPPED_SHARE = 0.1
MAX_PICTURES = 24
_MAX_BARS = 30
_MAX_NAMED = 10
HOW_TO_READ = """\
- **files.csv** has every file of the directories: kept, with what the model sees of it, or skipped, with the reason.
- **buckets**: samples of one bucket go through the model together. A *short* micro-batch is one that the bucket does not
  fill; it is trained on as it is, and counts by its samples.
- **captions**: lengths are in tokens with the end token. What lies behind the limit is not seen by the model.
- **steps** are those of one copy of the model; N data-parallel copies make N times as many micro-batches per step.
- **noise levels**: the share of draws in each tenth, of the law as it is configured and without `min_t`, `max_t` and the
  expert's range. The boundary parts the high-noise expert (above) from the low-noise one.
- **contact sheet**: an image, or a video's first, middle and last frame, after scaling, cropping and resampling in time.
  What a loss mask leaves out is grey with a tint of magenta, in squares of the latent grid."""
PROMPTS_QUESTION = "How long are these prompts in tokens, and are any of them cut off?"
HOW_TO_READ_PROMPTS = """\
- **prompts.csv** has each prompt by its place in the file, never its text, with its tokens.
- **caption_tokens**: lengths are in tokens with the end token. What lies behind the limit is not seen by the model."""
NEXT_STEPS_PROMPTS = "- Shorten prompts that are cut off, or put what matters first."
NEXT_STEPS: dict[Verdict, str] = {
    "pass": "- Look at the contact sheet: is what matters inside the crop and inside the clip?\n- Start with `--dry_run`.",
    "fail": (
        "- Nothing left: see the reasons in `skips.csv`.\n"
        "- A file at which training stops, or that cannot be decoded: mend it or take it away.\n"
        "- A bucket that is never visited: raise `num_repeats` or `epochs`."
    ),
    "inconclusive": (
        "- Read the skipped files at the top of `files.csv`: is each of them meant to be left out?\n"
        "- Shorten captions that are cut off, or put what matters first."
    ),
}


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = probe_parser(
        TOOL, "What training makes of a dataset; opens no weights and writes only a report."
    )
    parser.add_argument(
        "--config",
        metavar="TOML",
        type=config_file,
        required=True,
        help="training config, or a run's directory",
    )
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--dataset",
        metavar="TOML",
        type=path_of,
        help="dataset TOML, instead of the one that the config names",
    )
    source.add_argument(
        "--prompts",
        metavar="FILE",
        type=path_of,
        help="count the tokens of these prompts alone (.txt, .json or .jsonl), without any dataset",
    )
    parser.add_argument(
        "--decode_all",
        action="store_true",
        help="decode every clip, not only those of the contact sheet: finds damage behind a whole beginning",
    )
    return parser


def probe(args: argparse.Namespace) -> Verdict:
    """Inspect, write the report, and return the verdict."""
    if args.prompts is not None:
        return probe_prompts(args)
    overrides = [] if args.dataset is None else [f"dataset={json.dumps(str(args.dataset))}"]
    config = load_config(args.config, overrides).train
    dataset = load_dataset(config.dataset, check_files=True)
    report = Report(TOOL, QUESTION, args.reports_dir, args.run_tag, seed=config.seed)
    # torch comes with these; a config that is not right is answered without it.
    from models.wan.inspect import inspect_dataset
    from utils.data.contact_sheet import draw_contact_sheet
    from utils.data.inspect import bucket_rows, choose_samples, undecodable

    found = inspect_dataset(config, dataset)
    samples = found.manifest.samples
    rows: list[BucketRow] = []
    failures: dict[int, str] = {}
    if found.plan is not None and found.length is not None:
        rows = bucket_rows(samples, found.plan, found.length.epochs)
        sheet = draw_contact_sheet(choose_samples(samples, MAX_PICTURES), found.rules)
        failures = undecodable(samples, found.rules) if args.decode_all else sheet.failures
        report.picture("contact_sheet", sheet.image, "Clips as the model sees them")
    add_inputs(report, args.config, config)
    add_files(report, found, failures)
    add_buckets(report, found, rows)
    add_captions(report, found)
    add_noise(report, config, found)
    stops_at_failures = dataset.on_bad_file == "error"
    notes = [f"training would stop at {problem}" for problem in found.stops_at]
    what = "stop at" if stops_at_failures else "leave out the clip of"
    notes += [f"training would {what} {problem}" for problem in failures.values()]
    for note in notes[:_MAX_NAMED]:
        report.note(note)
    verdict, explanation = judge(found, rows, list(failures.values()), stops_at_failures)
    directory = report.write(verdict, explanation, HOW_TO_READ, NEXT_STEPS[verdict])
    print(f"{verdict}: {explanation}\nreport: {directory}")
    return verdict


def probe_prompts(args: argparse.Namespace) -> Verdict:
    """The same for a list of prompts without media: how long they are."""
    from utils.data.prompts import read_prompts

    config = load_config(args.config).train
    prompts = read_prompts(args.prompts)
    report = Report(TOOL, PROMPTS_QUESTION, args.reports_dir, args.run_tag)
    from models.wan.inspect import count_tokens
    from models.wan.text_encoder import MAX_TEXT_TOKENS

    counts = count_tokens(config, {prompt.text for prompt in prompts})
    if counts is None:
        raise UserError(
            f"{locate(config.model)[0].tokenizer_dir}: no tokenizer is there, and prompts are counted in tokens; "
            "set model.tokenizer_path"
        )
    report.add_input("config", args.config)
    report.add_input("prompts", args.prompts)
    add_tokenizer(report, config)
    lengths = [counts[prompt.text] for prompt in prompts]
    too_long = sum(length > MAX_TEXT_TOKENS for length in lengths)
    report.metric("num_prompts", len(prompts))
    report.metric("num_prompts_over_limit", too_long, "prompts that are cut off")
    add_lengths(report, lengths, len(counts))
    rows = [
        {"place": prompt.place, "tokens": length, "is_truncated": length > MAX_TEXT_TOKENS}
        for prompt, length in zip(prompts, lengths, strict=True)
    ]
    report.table("prompts", rows, "Per prompt, in the order of the file")
    verdict: Verdict = "inconclusive" if too_long else "pass"
    explanation = (
        f"Prompts: {len(prompts)}, of which {too_long or 'none'} cut off at {MAX_TEXT_TOKENS} tokens."
    )
    directory = report.write(verdict, explanation, HOW_TO_READ_PROMPTS, NEXT_STEPS_PROMPTS)
    print(f"{verdict}: {explanation}\nreport: {directory}")
    return verdict


def judge(
    found: "Inspection", rows: "Sequence[BucketRow]", failures: Sequence[str], stops_at_failures: bool
) -> tuple[Verdict, str]:
    """The verdict and the sentence that explains it; `failures` are of clips that cannot be decoded."""
    from utils.data.inspect import skipped_share

    num_skipped, share = len(found.manifest.skipped), skipped_share(found.manifest)
    if not found.manifest.samples:
        return "fail", f"Nothing is left to train on: {num_skipped} of {num_skipped} files are skipped."
    reasons = []
    if found.stops_at:
        reasons.append(
            f"bad files at which training would stop: {len(found.stops_at)}, the first {found.stops_at[0]}"
        )
    undecodable = (
        [f"clips that cannot be decoded, of those looked at: {len(failures)}, the first {failures[0]}"]
        if failures
        else []
    )
    if stops_at_failures:
        reasons += undecodable
    lost = [row.bucket for row in rows if not row.visits_in_run]
    if lost:
        reasons.append(
            f"buckets that are never visited in the whole run: {len(lost)}, {', '.join(lost[:_MAX_NAMED])}"
        )
    if reasons:
        return "fail", sentence(reasons)
    reasons += undecodable
    if share > MAX_SKIPPED_SHARE:
        reasons.append(f"files skipped: {num_skipped} ({share:.1%}), above {MAX_SKIPPED_SHARE:.0%}")
    truncated = num_truncated(found)
    if truncated:
        reasons.append(f"captions that are cut off: {truncated}")
    if reasons:
        return "inconclusive", sentence(reasons)
    captions = "no caption is cut off" if truncated == 0 else "captions were not counted"
    num = len(found.manifest.samples)
    return (
        "pass",
        f"Samples: {num} in {len(rows)} buckets; files skipped: {num_skipped} ({share:.1%}); {captions}.",
    )


def sentence(reasons: Sequence[str]) -> str:
    """Reasons as one sentence."""
    text = "; ".join(reasons)
    return f"{text[0].upper()}{text[1:]}."


def num_truncated(found: "Inspection") -> int | None:
    """Samples with a caption that is cut off; None where captions could not be counted."""
    from models.wan.text_encoder import MAX_TEXT_TOKENS

    if found.caption_tokens is None:
        return None
    too_long = {caption for caption, tokens in found.caption_tokens.items() if tokens > MAX_TEXT_TOKENS}
    return sum(not too_long.isdisjoint(sample.captions) for sample in found.manifest.samples)


def add_inputs(report: Report, config_path: Path, config: TrainConfig) -> None:
    """Name the files that the numbers come from; the media are summed up in `dataset_fingerprint`."""
    paths, _ = locate(config.model)
    report.add_input("config", config_path)
    report.add_input("dataset", config.dataset)
    if paths.config_json.is_file():
        report.add_input("variant", paths.config_json)
    add_tokenizer(report, config)


def add_tokenizer(report: Report, config: TrainConfig) -> None:
    """Name the files of the tokenizer that counts."""
    paths, _ = locate(config.model)
    if paths.tokenizer_dir.is_file():  # inside the encoder's file
        report.add_input("tokenizer", paths.tokenizer_dir)
    for name in TOKENIZER_FILES:
        if (paths.tokenizer_dir / name).is_file():
            report.add_input("tokenizer", paths.tokenizer_dir / name)


def add_files(report: Report, found: "Inspection", failures: Mapping[int, str]) -> None:
    """What becomes of every file."""
    from models.wan.text_encoder import MAX_TEXT_TOKENS
    from utils.data.inspect import file_rows, printable, skip_rows, skipped_share

    manifest = found.manifest
    kept = {sample.path: sample for sample in manifest.samples}
    report.cap("max_skipped_share", MAX_SKIPPED_SHARE, "above it the report is inconclusive")
    report.metric(
        "num_files", len(kept) + len(manifest.skipped), "everything in the directories but captions and masks"
    )
    report.metric("num_skipped", len(manifest.skipped), "of these, left out")
    report.metric("skipped_share", skipped_share(manifest))
    report.metric("num_samples", len(manifest.samples), "what is trained on")
    for kind in ("image", "video"):
        report.metric(f"num_{kind}s", sum(sample.kind == kind for sample in manifest.samples))
    videos = [sample for sample in manifest.samples if sample.kind == "video"]
    total = sum(sample.info.seconds for sample in kept.values())
    used = sum(sample.bucket.num_frames / found.rules.fps for sample in videos)
    report.metric("video_seconds", total, "length of all videos that are kept")
    report.metric("clip_seconds", used, "length of all clips that are made of them")
    masked = [sample.mask.grid.masked_share for sample in manifest.samples if sample.mask is not None]
    report.metric("num_masked_samples", len(masked), "samples with a loss mask; the others count whole")
    if masked:
        report.metric("mean_masked_share", sum(masked) / len(masked), "of their area, left out of the loss")
    report.metric("skipped_by_reason", dict(Counter(entry.code for entry in manifest.skipped)))
    report.metric("dataset_fingerprint", found.fingerprint, "the one that a run records of its dataset")
    for warning in manifest.warnings[:_MAX_NAMED]:
        report.note(printable(warning))
    if manifest.skipped:
        skips = [asdict(row) for row in skip_rows(manifest.skipped)]
        report.table("skips", skips, "Skipped files by reason")
    rows = [
        asdict(row)
        for row in file_rows(manifest, found.rules.fps, found.caption_tokens, MAX_TEXT_TOKENS, failures)
    ]
    report.table("files", rows, "Per file, skipped ones first")


def add_buckets(report: Report, found: "Inspection", rows: "Sequence[BucketRow]") -> None:
    """Buckets, and what they make of an epoch."""
    from matplotlib.ticker import MaxNLocator

    report.metric("variant", found.variant.name, "by its config.json")
    report.metric("fps", found.rules.fps, "frames per second that clips are brought to")
    report.metric("num_buckets", len(rows), "buckets that hold a sample")
    report.metric("unused_lengths", list(found.unused_lengths))
    if found.unused_lengths:
        lengths = ", ".join(map(str, found.unused_lengths))
        report.note(f"no sample has one of these configured lengths in frames: {lengths}")
    if found.length is None:
        return
    meanings = {
        "micro_batches_first_epoch": "expected micro-batches of the first epoch",
        "micro_batches_per_epoch": "mean over the epochs of the run",
        "steps_per_epoch": "expected optimizer steps of one copy of the model",
        "epochs": "epochs that the run touches",
        "steps": "optimizer steps of the run, with one copy of the model",
    }
    for name, value in asdict(found.length).items():
        report.metric(name, value, meanings[name])
    report.metric("buckets", [asdict(row) for row in rows])
    report.table("buckets", [asdict(row) for row in rows], "Per bucket", inline_rows=_MAX_BARS)
    largest = sorted(rows, key=lambda row: -row.samples)[:_MAX_BARS]
    axes = new_axes("samples", "", height=1 + 0.25 * len(largest))
    axes.barh([row.bucket for row in largest], [row.samples for row in largest])
    axes.invert_yaxis()
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    title = "Samples per bucket" + (f", the {_MAX_BARS} largest" if len(rows) > _MAX_BARS else "")
    report.plot("buckets", figure_of(axes), title)


def add_captions(report: Report, found: "Inspection") -> None:
    """Lengths of captions; of a sample with several, all."""
    report.metric("num_captions_over_limit", num_truncated(found), "samples whose caption is cut off")
    if found.caption_tokens is None:
        report.note("no tokenizer was found, so captions were not counted; see model.tokenizer_path")
        return
    if not found.manifest.samples:
        return
    lengths = [found.caption_tokens[one] for sample in found.manifest.samples for one in sample.captions]
    add_lengths(report, lengths, len(found.caption_tokens))


def add_lengths(report: Report, lengths: Sequence[int], num_different: int) -> None:
    """The histogram of caption (or prompt) lengths, which is not empty."""
    from matplotlib.ticker import MaxNLocator

    from models.wan.text_encoder import MAX_TEXT_TOKENS
    from utils.data.inspect import caption_histogram

    report.cap("max_text_tokens", MAX_TEXT_TOKENS, "a longer caption is cut off")
    report.metric("num_different_captions", num_different)
    report.metric("mean_caption_tokens", sum(lengths) / len(lengths))
    report.metric("max_caption_tokens", max(lengths))
    bins = caption_histogram(lengths, MAX_TEXT_TOKENS)
    report.table("caption_tokens", [asdict(row) for row in bins], "Captions by length in tokens")
    axes = new_axes("tokens", "captions")
    labels = [f"{row.low}-{row.high}" if row.high is not None else f"over {MAX_TEXT_TOKENS}" for row in bins]
    colours = ["tab:blue" if row.high is not None else "tab:red" for row in bins]
    axes.bar(labels, [row.count for row in bins], color=colours, width=0.9)
    axes.tick_params(axis="x", rotation=60, labelsize="small")
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    report.plot(
        "caption_tokens", figure_of(axes), f"Captions by length, in tokens; {MAX_TEXT_TOKENS} are read"
    )


def add_noise(report: Report, config: TrainConfig, found: "Inspection") -> None:
    """The law of the noise level, and how the experts share it."""
    from models.wan.inspect import sigma_histogram

    law, boundary = found.law, found.variant.boundary
    report.metric("law", f"{law.method}, scale {law.sigmoid_scale:g}, shift {law.shift:g}")
    report.metric("min_sigma", law.min_t, "lowest noise level that is trained")
    report.metric("max_sigma", law.max_t, "highest")
    report.metric("expert", config.model.expert)
    report.metric("boundary", boundary, "noise level from which the high-noise expert is responsible")
    if boundary is not None:
        below = law.probability_below(boundary)
        report.metric("share_low_noise", below, "share of the law below the boundary, before any restriction")
        report.metric("share_high_noise", 1 - below, "and from there up")
    bins = sigma_histogram(law)
    trained = law.probability_below(law.max_t) - law.probability_below(law.min_t)
    report.metric("share_trained", trained, "share of the law between min_sigma and max_sigma")
    report.metric("sigma_shares", [row.share for row in bins])
    report.table("noise_levels", [asdict(row) for row in bins], "Noise levels by tenth")
    axes = new_axes("noise level (sigma)", "share of draws")
    lows, width = [row.low for row in bins], bins[0].high - bins[0].low
    axes.bar(lows, [row.share for row in bins], width, align="edge", label="as configured")
    outline = [row.unrestricted_share for row in bins]
    axes.bar(lows, outline, width, align="edge", fill=False, edgecolor="black", label="without restriction")
    if boundary is not None:
        axes.axvline(boundary, color="tab:red", linestyle="--", label=f"boundary {boundary:g}")
    axes.legend(fontsize="small")
    report.plot("noise_levels", figure_of(axes), "Noise levels that are drawn")


def new_axes(x_label: str, y_label: str, height: float = 3.0) -> "Axes":
    """Axes of a small figure of its own."""
    from matplotlib.figure import Figure

    axes: Axes = Figure(figsize=(7, min(height, 8.0)), layout="constrained").subplots()
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.grid(True, linewidth=0.3)
    axes.set_axisbelow(True)
    return axes


def figure_of(axes: "Axes") -> "Figure":
    """The figure that `new_axes` made for these axes."""
    figure = axes.get_figure(root=True)
    assert figure is not None, "new_axes puts them into one"
    return figure


def main(argv: Sequence[str] | None = None) -> int:
    """Run the probe and return its exit status."""
    return run_probe(build_parser(), probe, argv)


if __name__ == "__main__":
    sys.exit(main())
