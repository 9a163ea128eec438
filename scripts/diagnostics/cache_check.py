"""Probe: were the cached embeddings made with the encoder that this run names?

Looks every caption of the run's datasets up in the cache by its key, and encodes a few anew to compare the values,
because a key can lie. Writes into neither the cache nor the run. See docs/diagnostics/cache_check.md.
"""

import argparse
import random
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models.wan.layouts import weight_files
from models.wan.probes.encoder_subject import find_encoder
from utils.argument_types import path_of
from utils.config.load import load_config
from utils.config.schema import LoadedConfig
from utils.devices import choose_device
from utils.newest_run import newest_run_config
from utils.probe_cli import add_flags, probe_parser, run_probe
from utils.report import Report, Verdict

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from models.wan.probes.cache_check import CaptionItem, Checked, Comparison, DatasetCheck
    from utils.data.cache import CacheStore

TOOL = "cache_check"
QUESTION = "Were the cached embeddings made with the encoder that this run names?"
OUTPUT_ROOT = Path("output")
DEFAULT_VERIFY = 8
ALL = -1
_HASH_CHARACTERS = 12
HOW_TO_READ = """\
- **this encoder**: the key of what is in the cache names the contents of the encoder's file, the tokenizer's files, the
  precision and the caption, and the item is whole. Training reads these, and no others.
- **another encoder**: the cache has states of the caption, but only those of another file. Training would not read them:
  it would encode the caption anew.
- **other settings**: of this encoder, in another precision, with another attention or tokenizer. Encoded anew as well.
- **relative difference**: how far the cached states are from the same caption encoded now, relative to their size. Another
  encoder of the same kind lies far above the tolerance; one that was tuned only a little may lie below it, above all in
  bfloat16. Then the key alone tells them apart.
- Captions are named by a hash, the same as in the cache's `made_of.json`; the text itself is in no report."""
NEXT_STEPS: dict[Verdict, str] = {
    "pass": "- Nothing to do: training reads these embeddings as they are.",
    "fail": (
        "- Decide which encoder is meant: `llm_path` (or `ckpt_path`) of the config names it.\n"
        "- Keys of another encoder: `train.py --config ... --cache_only` encodes what is missing; the old items stay for "
        "whoever names the old encoder.\n"
        "- Values that do not match although the keys do: the file has changed under the same size and time stamp. Run "
        "again with `--full_hash`, delete `content_hashes.jsonl` in the cache, and fill it with `--cache_only`; add "
        "`--regenerate_cache` where the items themselves are wrong."
    ),
    "inconclusive": (
        "- Missing or damaged items: `train.py --config ... --cache_only` makes them, then run this again.\n"
        "- In encoder_ft nothing of captions is cached, so there is nothing to check."
    ),
}


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = probe_parser(
        TOOL,
        "Were the cached embeddings made with the encoder that this run names? Looks every caption of the run's datasets\n"
        "up in the cache by its key, and encodes a few anew to compare the values. Writes into neither.\n"
        f"Without arguments: the newest run below {OUTPUT_ROOT}/.",
    )
    add_flags(parser, "config", "device", "seed")
    parser.add_argument(
        "--text_encoder",
        metavar="FILE_OR_DIR",
        type=path_of,
        help="another UMT5 than the config names: a weight file, the directory it is in, or a run",
    )
    parser.add_argument(
        "--verify",
        metavar="N|all",
        type=_count,
        default=DEFAULT_VERIFY,
        help="captions to encode anew and compare; 0 looks at keys alone (default: %(default)s)",
    )
    parser.add_argument(
        "--full_hash",
        action="store_true",
        help="read the encoder's file instead of believing that it is unchanged where size and time stamp are",
    )
    return parser


def _count(text: str) -> int:
    if text == "all":
        return ALL
    if not (text.isascii() and text.isdigit()):
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number from 0 up nor 'all'")
    return int(text)


def probe(args: argparse.Namespace) -> Verdict:
    """Look up, encode, write the report, and return the verdict."""
    report = Report(TOOL, QUESTION, args.reports_dir, args.run_tag, args.seed)
    path = args.config or newest_run_config(OUTPUT_ROOT)
    _remark(report, f"config: {path}" + ("" if args.config else f" (of the newest run below {OUTPUT_ROOT})"))
    config = _with_encoder(load_config(path, check_files=True), args.text_encoder)
    choose_device(args.device)

    from models.wan.probes.cache_check import check_keys

    checked = check_keys(config, full_hash=args.full_hash)
    say_what_the_run_used(report, path, checked)
    comparisons = verify(args, config, checked)
    verdict, explanation = judge(config, checked, comparisons)
    add_inputs(report, path, checked)
    add_results(report, checked, comparisons)
    directory = report.write(verdict, explanation, HOW_TO_READ, NEXT_STEPS[verdict])
    print(f"{verdict}: {explanation}\nreport: {directory}")
    return verdict


def _with_encoder(config: LoadedConfig, encoder: Path | None) -> LoadedConfig:
    """The configuration with this encoder instead of its own.

    Raises:
        UserError: there is no such file, or more than one.
    """
    if encoder is None:
        return config
    file = find_encoder(encoder)
    return replace(config, train=replace(config.train, model=replace(config.train.model, llm_path=str(file))))


def _remark(report: Report, text: str) -> None:
    print(text)
    report.note(text)


def say_what_the_run_used(report: Report, config: Path, checked: "Checked") -> None:
    """Remark where memory and file disagree, or the run's checkpoint was made with another file than is there now."""
    from utils.checkpoint import latest_checkpoint, read_state

    now = checked.hashes.text_encoder
    for check in checked.datasets:
        if check.memo_hash not in ("", now):
            _remark(
                report,
                f"warning: {checked.paths.text_encoder} is not what {check.root} remembers under its size and time stamp "
                f"({short(now)}, not {short(check.memo_hash)}): training would take it for the other one",
            )
    checkpoint = latest_checkpoint(config.parent)
    used = read_state(checkpoint).fingerprints.get("the text encoder") if checkpoint is not None else None
    if used is not None and now and used != now:
        _remark(
            report,
            f"warning: {checkpoint} was trained with another encoder ({short(used)}) than is in "
            f"{checked.paths.text_encoder} now ({short(now)})",
        )


def verify(args: argparse.Namespace, config: LoadedConfig, checked: "Checked") -> "list[Comparison]":
    """Encode a sample of the captions whose keys match; which ones follows from the seed."""
    import torch

    from models.wan.probes.cache_check import compare

    there: dict[str, tuple[CaptionItem, CacheStore]] = {}
    for check in checked.datasets:
        for item in check.items:
            if item.status == "this encoder" and check.store is not None:
                there.setdefault(f"{check.root} {item.key}", (item, check.store))
    count = len(there) if args.verify == ALL else min(args.verify, len(there))
    names = random.Random(args.seed).sample(sorted(there), count)
    if not names:
        return []
    print(f"encoding {count} of {len(there)} captions with {checked.paths.text_encoder} on {args.device}")
    return compare(
        [there[name] for name in names], config.train.model, checked.paths, torch.device(args.device)
    )


def judge(
    config: LoadedConfig, checked: "Checked", comparisons: "Sequence[Comparison]"
) -> tuple[Verdict, str]:
    """The verdict and the sentence that explains it."""
    counts = count_all(checked)
    total = sum(counts.values())
    wrong = [comparison for comparison in comparisons if not comparison.is_match]
    reasons = []
    if counts["another encoder"]:
        reasons.append(
            f"{counts['another encoder']} of {total} captions have embeddings of another encoder only"
        )
    if wrong:
        worst = max(wrong, key=lambda comparison: comparison.relative)
        reasons.append(
            f"{len(wrong)} of {len(comparisons)} compared embeddings are not what this encoder makes of their captions "
            f"(the farthest is off by {worst.relative:.3g}, tolerance {worst.tolerance:.3g})"
        )
    if reasons:
        return "fail", f"{'; '.join(reasons)}."
    if not config.train.model.cache_text_embeddings:
        return (
            "inconclusive",
            "This configuration caches no embeddings (encoder_ft), so there are none to check.",
        )
    absent = [str(check.root) for check in checked.datasets if check.store is None]
    if absent:
        return "inconclusive", f"There is no cache at {', '.join(absent)} yet."
    lacking = [
        f"{counts[status]} {status}" for status in ("missing", "damaged", "other settings") if counts[status]
    ]
    if lacking:
        return "inconclusive", f"Not all embeddings are there: of {total} captions {', '.join(lacking)}."
    if not comparisons:
        return "inconclusive", f"All {total} keys name this encoder, and no value was compared (--verify 0)."
    largest = max(comparison.relative for comparison in comparisons)
    return "pass", (
        f"All {total} embeddings name this encoder, and the {len(comparisons)} that were encoded anew match (largest "
        f"relative difference {largest:.2g}, tolerance {comparisons[0].tolerance:.2g})."
    )


def count_all(checked: "Checked") -> dict[str, int]:
    """Captions of each status over all datasets; one that two datasets of one cache have counts once."""
    from models.wan.probes.cache_check import STATUSES

    items = {(str(check.root), item.key): item.status for check in checked.datasets for item in check.items}
    return {status: sum(found == status for found in items.values()) for status in STATUSES}


def add_inputs(report: Report, config: Path, checked: "Checked") -> None:
    """Name the files that the answer is about."""
    from models.wan.media import MEMO_FILE

    report.add_input("config", config)
    for file in weight_files(checked.paths.text_encoder):
        report.add_input("text_encoder", file)
    for check in checked.datasets:
        if check.store is not None and (check.root / MEMO_FILE).is_file():
            report.add_input("hashes", check.root / MEMO_FILE)


def add_results(report: Report, checked: "Checked", comparisons: "Sequence[Comparison]") -> None:
    """Numbers, tables and the plot."""
    counts = count_all(checked)
    report.metric("num_captions", sum(counts.values()), "distinct captions, the empty one among them")
    for status, count in counts.items():
        report.metric(f"num_{status.replace(' ', '_')}", count)
    report.metric("encoder", checked.hashes.text_encoder, "hash of the encoder's file")
    report.metric("encoder_path", str(checked.paths.text_encoder))
    report.metric("num_latents", sum(check.num_latents for check in checked.datasets), "needed, by key")
    missing = sum(check.num_latents_missing for check in checked.datasets)
    report.metric(
        "num_latents_missing", missing, "of these not made by this VAE from these files, or not at all"
    )
    report.metric("num_verified", len(comparisons), "captions that were encoded anew")
    report.metric("num_mismatches", sum(not comparison.is_match for comparison in comparisons))
    if comparisons:
        report.metric("max_abs_difference", max(one.max_abs for one in comparisons))
        report.metric("max_relative_difference", max(one.relative for one in comparisons))
        report.metric("min_cosine", min(one.cosine for one in comparisons), "of a token's states")
        report.metric(
            "max_spread", max(one.spread for one in comparisons), "between two batchings on this machine"
        )
        report.cap("relative_tolerance", max(one.tolerance for one in comparisons), "above it an item fails")
    report.table("datasets", [dataset_row(check) for check in checked.datasets], "Per dataset")
    shares = [row for check in checked.datasets for row in encoder_rows(check, checked.hashes.text_encoder)]
    report.table("encoders", shares, "Who made the embeddings in these caches")
    report.table(
        "verified", [comparison_row(one) for one in _worst_first(comparisons)], "Encoded anew, worst first"
    )
    items = sorted(
        (item_row(check.label, item) for check in checked.datasets for item in check.items),
        key=lambda row: row["status"] == "this encoder",
    )
    report.table("captions", items, "Per caption, trouble first", inline_rows=10)
    if comparisons:
        report.plot("differences", draw(comparisons), "Cached against encoded now")


def dataset_row(check: "DatasetCheck") -> dict[str, Any]:
    """One line of datasets.csv."""
    from models.wan.probes.cache_check import STATUSES

    place = {"dataset": check.label, "cache": str(check.root), "captions": len(check.items)}
    counts = {status: check.count(status) for status in STATUSES}
    return place | counts | {"latents": check.num_latents, "latents missing": check.num_latents_missing}


def encoder_rows(check: "DatasetCheck", own: str) -> list[dict[str, Any]]:
    """Lines of encoders.csv."""
    return [
        {
            "cache": str(check.root),
            "encoder": share.fingerprint or "unknown",
            "dtype": share.dtype or "unknown",
            "items": share.num_items,
            "is_this_encoder": share.fingerprint == own,
            "seen_at": ", ".join(share.paths) or "unknown",
        }
        for share in check.encoders
    ]


def item_row(label: str, item: "CaptionItem") -> dict[str, Any]:
    """One line of captions.csv, without the caption."""
    from utils.data.inspect import printable

    return {
        "caption": item.identity,
        "dataset": label,
        "file": printable(item.file) or "(the empty caption)",
        "status": item.status,
        "made_by": item.made_by,
        "damage": item.damage,
    }


def comparison_row(comparison: "Comparison") -> dict[str, Any]:
    """One line of verified.csv."""
    return {
        "caption": comparison.identity,
        "tokens": comparison.num_tokens,
        "relative_difference": comparison.relative,
        "max_abs_difference": comparison.max_abs,
        "min_cosine": comparison.cosine,
        "spread": comparison.spread,
        "tolerance": comparison.tolerance,
        "is_match": comparison.is_match,
    }


def _worst_first(comparisons: "Sequence[Comparison]") -> "list[Comparison]":
    return sorted(comparisons, key=lambda one: (one.is_match, -one.relative))


def short(fingerprint: str) -> str:
    """The beginning of a hash, for people."""
    return fingerprint[:_HASH_CHARACTERS]


def draw(comparisons: "Sequence[Comparison]") -> "Figure":
    """Relative difference over the number of tokens, with the spread of batchings and the tolerance."""
    import math

    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    smallest = 1e-9  # zero has no place on a logarithmic axis
    shown = [one for one in comparisons if math.isfinite(one.relative)]
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    tokens = [one.num_tokens for one in shown]
    axes.scatter(tokens, [max(one.relative, smallest) for one in shown], label="cached and encoded now")
    axes.scatter(tokens, [max(one.spread, smallest) for one in shown], marker="x", label="two batchings now")
    tolerance = max(one.tolerance for one in comparisons)
    axes.axhline(tolerance, color="black", linestyle="--", linewidth=1, label=f"tolerance {tolerance:.2g}")
    axes.set_yscale("log")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("tokens of the caption")
    axes.set_ylabel(f"relative difference (0 stands at {smallest:g})")
    axes.grid(True, linewidth=0.3)
    axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def main(argv: Sequence[str] | None = None) -> int:
    """Run the probe and return its exit status."""
    return run_probe(build_parser(), probe, argv)


if __name__ == "__main__":
    sys.exit(main())
