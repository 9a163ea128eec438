"""Probe: what is in this checkpoint?

Reads headers only (and, to tell two files of one model apart, a few values): variant, layout, naming, experts, formats
and sizes, what is missing or wrong, and how two checkpoints differ. Writes the list of LoRA targets that exist in it.
See docs/diagnostics/weights_inspect.md.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import get_args

from models.wan.probes.find_parts import Checkpoint, checkpoint_of_config, open_checkpoint
from models.wan.probes.part_diff import PartDiff, compare_experts, compare_parts, pair_parts
from models.wan.probes.parts import Part, sizes_text
from models.wan.probes.target_list import choose_targets, parse_blocks, target_file_text, target_remarks
from models.wan.probes.weight_tables import (
    block_rows,
    block_sentences,
    dtype_rows,
    key_rows,
    part_row,
    shape_rows,
)
from utils.argument_types import path_of
from utils.config.load import load_config
from utils.config.schema import Expert
from utils.errors import UserError
from utils.files import atomic_write_text
from utils.newest_run import newest_run_config
from utils.probe_cli import add_flags, probe_parser, run_probe
from utils.report import Report, Verdict, check_writable, refuse_training_run

TOOL = "weights_inspect"
QUESTION = "What is in this checkpoint, is all of it there, and where do two checkpoints differ?"
OUTPUT_ROOT = Path("output")
TARGETS_FILE = "targets.txt"
_NUM_NAMED = 10
HOW_TO_READ = """\
- **parts.csv** has a line per part: what it is, how it is laid out, how large it is, and what its expert was told by.
- **keys.csv** has every tensor: its name in the file, its official name (empty where it has none), shape, format, bytes.
- **shapes.csv** is the same with the block number taken out: one line per kind of tensor. **blocks.csv** counts per block;
  a block with fewer tensors than its neighbours, or of another format, stands out there.
- Headers tell the variant, never the expert: both experts of an A14B model have the same names and shapes. *told_by* says
  what named the expert; a few values of both are compared to see that they are not one file given twice.
- **differences.csv** has what differs between two checkpoints, what matters first. Values are samples: equal samples make
  equal weights all but certain, and say so of each tensor."""
NEXT_STEPS: dict[Verdict, str] = {
    "pass": (
        '- Make the list of LoRA targets from this file: `--targets "cross_attn.{k,v}" --blocks 20-29`.\n'
        "- Moving to another variant: make the list again from that checkpoint."
    ),
    "fail": (
        "- Missing tensors or a shard: download the files again, and compare their sizes with the publisher's.\n"
        "- Wrong shapes or strange names: it is a changed or damaged file; hold it against the original with `--against`."
    ),
    "inconclusive": "- Give a file or directory of Wan 2.2: a DiT, the UMT5 encoder, a VAE, or a LoRA for one of them.",
}


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = probe_parser(
        TOOL,
        "What is in this checkpoint? Variant, layout, naming, experts, formats and sizes, what is missing or wrong; with two\n"
        f"checkpoints, what differs. Reads headers, no weights. Without arguments: that of the newest run below {OUTPUT_ROOT}/.",
    )
    parser.add_argument(
        "checkpoints",
        metavar="CKPT",
        nargs="*",
        type=path_of,
        help="file or directory; with a second one, they are compared",
    )
    add_flags(parser, "config", "base")
    parser.add_argument("--against", metavar="CKPT", type=path_of, help="the same as a second CKPT")
    parser.add_argument(
        "--expert",
        choices=get_args(Expert),
        help="A14B: look at this expert alone; of one file whose name does not tell, which one it is",
    )
    parser.add_argument(
        "--targets",
        metavar="GLOB",
        action="append",
        help='write the list of LoRA targets that this matches, such as "cross_attn.{k,v}" (may be repeated)',
    )
    parser.add_argument(
        "--blocks", metavar="N-M", help="with --targets: only these blocks, such as 20-29 or 0,5,20-29"
    )
    parser.add_argument(
        "--out",
        metavar="FILE",
        type=path_of,
        help=f"with --targets: write the list there too, not only {TARGETS_FILE} of the report",
    )
    return parser


def probe(args: argparse.Namespace) -> Verdict:
    """Look, write the report, and return the verdict."""
    _check_usage(args)
    report = Report(TOOL, QUESTION, args.reports_dir, args.run_tag)
    remarks: list[str] = []
    sides = choose_checkpoints(args, remarks)
    problems = [problem for side in sides for problem in (*side.problems, *part_problems(side))]
    for side in sides:
        found_problems, found_remarks = look_at_experts(side)
        problems += found_problems
        remarks += [*side.remarks, *found_remarks]
    remarks += part_remarks(sides)
    diffs = compare(*sides) if len(sides) == 2 else []
    targets = write_targets(args, sides[0], report) if args.targets else []
    verdict, explanation = judge(sides, problems, diffs, targets)
    add_results(report, sides, problems, remarks, diffs, targets)
    directory = report.write(verdict, explanation, HOW_TO_READ, NEXT_STEPS[verdict])
    if args.out is not None:
        atomic_write_text(args.out, (directory / TARGETS_FILE).read_text(encoding="utf-8"))
    tell(sides, problems, remarks, diffs, targets, args.out or directory / TARGETS_FILE)
    print(f"{verdict}: {explanation}\nreport: {directory}")
    return verdict


def choose_checkpoints(args: argparse.Namespace, remarks: list[str]) -> list[Checkpoint]:
    """What the command line names, else the checkpoint of --config, else that of the newest run; one or two."""
    paths = [*args.checkpoints, *([args.base] if args.base else [])]
    against = [args.against] if args.against else []
    if paths:
        return [open_checkpoint(path, args.expert) for path in (*paths, *against)]
    config_path = args.config
    if config_path is None:
        config_path = newest_run_config(OUTPUT_ROOT)
        remarks.append(f"checkpoint: that of {config_path} (the newest run below {OUTPUT_ROOT})")
    config = load_config(config_path).train
    first = checkpoint_of_config(config, args.expert)
    return [first, *(open_checkpoint(path, args.expert) for path in against)]


def part_problems(side: Checkpoint) -> list[str]:
    """What is wrong with each part, with the file it is in."""
    return [f"{part.path}: {problem}" for part in side.parts for problem in part.problems]


def part_remarks(sides: Sequence[Checkpoint]) -> list[str]:
    """What each part's header says beside the numbers, each under the part's name in the tables."""
    remarks = []
    for name, part in named_parts(sides):
        remarks += [f"{name}: {remark}" for remark in part.remarks]
        if part.kind == "transformer" and part.expert_basis.startswith("nothing"):
            remarks.append(f"{name}: which expert it is: told by {part.expert_basis}")
        if part.adapter is not None and part.adapter.targets:
            remarks.append(f"{name}: targets: {'; '.join(part.adapter.targets)}")
        if part.metadata:
            known = ", ".join(f"{key} {value}" for key, value in part.metadata.items())
            remarks.append(f"{name}: metadata: {known}")
    return remarks


def look_at_experts(side: Checkpoint) -> tuple[list[str], list[str]]:
    """Problems and remarks about the two experts of one checkpoint, from samples of their values."""
    experts = [part for part in side.parts if part.kind == "transformer" and part.expert]
    if len(experts) != 2 or experts[0].expert == experts[1].expert:
        return [], []
    told = "; ".join(f"{part.expert} is {part.path.name}, told by {part.expert_basis}" for part in experts)
    found, distance = compare_experts(*experts)
    if found is None:
        return [], [
            f"experts: {told}; all sampled values are 0, so whether they hold different weights is open"
        ]
    if found in ("identical", "rounded"):
        return [f"{side.path}: both experts hold the same weights ({told}); one file is there twice"], []
    far = "" if distance is None else f" (median relative distance of samples {distance:.3g})"
    return [], [f"experts: {told}; their weights differ{far}"]


def compare(left: Checkpoint, right: Checkpoint) -> list[PartDiff]:
    """All parts of one checkpoint against those of the other.

    Raises:
        UserError: they have no part in common.
    """
    pairs = pair_parts(left.parts, right.parts)
    if not pairs:
        one, other = (", ".join(part.label for part in side.parts) for side in (left, right))
        raise UserError(
            f"{left.path} and {right.path} have no part in common ({one}; {other}); give two checkpoints of one kind"
        )
    return [compare_parts(one, other) for one, other in pairs]


def write_targets(args: argparse.Namespace, side: Checkpoint, report: Report) -> list[str]:
    """Choose the targets of the first DiT and add their list to the report.

    Raises:
        UserError: there is no DiT, or nothing matches.
    """
    part = next((part for part in side.parts if part.kind == "transformer"), None)
    if part is None or part.expectation is None:
        raise UserError(
            f"{side.path}: holds no Wan 2.2 DiT, so there are no LoRA targets in it; drop --targets or give a DiT"
        )
    shapes = {name: shape for name, shape in part.shapes.items() if name in part.expectation.shapes}
    blocks = parse_blocks(args.blocks) if args.blocks is not None else None
    targets = choose_targets(shapes, args.targets, blocks)
    report.text_file(TARGETS_FILE, target_file_text(targets, part.path.name))
    for remark in target_remarks(targets):
        report.note(remark)
    return targets


def judge(
    sides: Sequence[Checkpoint], problems: Sequence[str], diffs: Sequence[PartDiff], targets: Sequence[str]
) -> tuple[Verdict, str]:
    """The verdict and the sentence that explains it."""
    parts = [part for side in sides for part in side.parts]
    what = " against ".join(describe(side) for side in sides)
    verdicts = {part.verdict for part in parts}
    unfit = [diff for diff in diffs if diff.fits is False]
    if problems or "fail" in verdicts or unfit:
        first = problems[0] if problems else unfit[0].sentences[0]
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        return "fail", f"{what}; {first}{more}."
    if "inconclusive" in verdicts:
        odd = next(part for part in parts if part.verdict == "inconclusive")
        reason = odd.remarks[-1] if odd.remarks else "it is not known"
        return "inconclusive", f"{what}; {odd.path} is not recognised as a part of Wan 2.2: {reason}."
    chosen = f"; {len(targets)} LoRA targets" if targets else ""
    if not diffs:
        return "pass", f"{what}; everything is there{chosen}."
    differing = [diff for diff in diffs if diff.differs]
    if not differing:
        return "pass", f"{what}; no tensor that both hold differs but in name or format{chosen}."
    return "pass", f"{what}; both are whole and differ: {differing[0].sentences[0]}{chosen}."


def describe(side: Checkpoint) -> str:
    """`official A14B directory: DiT of t2v-a14b, high_noise + ...`."""
    labels = Counter(part.label for part in side.parts)
    listed = " + ".join(label if count == 1 else f"{count} x {label}" for label, count in labels.items())
    return f"{side.layout} {side.path}: {listed}"


def named_parts(sides: Sequence[Checkpoint]) -> list[tuple[str, Part]]:
    """Every part with a name of its own: `transformer.high_noise`, with `A:` or `B:` before it where there are two sides."""
    named: list[tuple[str, Part]] = []
    for letter, side in zip("AB", sides, strict=False):
        for part in side.parts:
            stem = f"{part.kind}.{part.expert}" if part.expert else str(part.kind)
            stem = f"{letter}:{stem}" if len(sides) == 2 else stem
            taken = sum(name.partition("#")[0] == stem for name, _ in named)
            named.append((f"{stem}#{taken + 1}" if taken else stem, part))
    return named


def add_results(
    report: Report,
    sides: Sequence[Checkpoint],
    problems: Sequence[str],
    remarks: Sequence[str],
    diffs: Sequence[PartDiff],
    targets: Sequence[str],
) -> None:
    """Inputs, numbers, tables and remarks."""
    parts = named_parts(sides)
    for role, part in parts:
        for file in part.source.files:
            report.add_input(role, file)
    for remark in remarks:
        report.note(remark)
    variants = sorted({part.variant.name for _, part in parts if part.variant})
    report.metric("layout", [side.layout for side in sides])
    report.metric("variants", variants, "of the DiTs")
    report.metric("num_parts", len(parts), "DiTs, encoders, VAEs, adapters, and what is not known")
    report.metric("num_tensors", sum(len(part.names) for _, part in parts), "in all files")
    report.metric("num_bytes", sum(part.num_bytes for _, part in parts), "of all tensors")
    report.metric("num_problems", len(problems), "missing or strange tensors, wrong shapes")
    report.metric("problems", list(problems[:_NUM_NAMED]))
    if targets:
        report.metric("num_targets", len(targets), f"lines of {TARGETS_FILE}")
    report.metric("parts", [{"name": name} | part_numbers(part) for name, part in parts])
    if problems:
        report.section("What is wrong", "\n".join(f"- {problem}" for problem in shown(problems)))
    report.section("Blocks", "\n".join(f"- {line}" for line in block_sentences(parts)) or "No blocks.")
    if diffs:
        report.metric("differences", [diff_numbers(diff) for diff in diffs])
        report.section("What differs", "\n\n".join(diff_text(diff) for diff in diffs))
        rows = [asdict(difference) for diff in diffs for difference in diff.differences]
        report.table("differences", rows, "Differences, tensor by tensor")
    report.table("parts", [part_row(name, part) for name, part in parts], "Parts")
    report.table("dtypes", dtype_rows(parts), "Formats")
    report.table("blocks", block_rows(parts), "Per block", inline_rows=0)
    report.table("shapes", shape_rows(parts), "Shapes, without block numbers", inline_rows=45)
    report.table("keys", key_rows(parts), "Tensors", inline_rows=5)


def part_numbers(part: Part) -> dict[str, object]:
    """What summary.json keeps of a part."""
    numbers: dict[str, object] = {
        "what": part.label,
        "kind": part.kind,
        "variant": part.variant.name if part.variant else None,
        "expert": part.expert,
        "told_by": part.expert_basis or None,
        "naming": part.adapter.naming if part.adapter else part.naming.style or None,
        "prefix": part.naming.prefix,
        "storage": part.storage,
        "num_tensors": len(part.names),
        "num_parameters": part.num_parameters,
        "num_bytes": part.num_bytes,
        "dtypes": part.dtypes,
        "num_problems": len(part.problems),
        "verdict": part.verdict,
        "path": part.path.as_posix(),
    }
    if part.expectation is not None:
        numbers |= {"sizes": part.expectation.sizes, "has_published_sizes": part.expectation.is_published}
    if part.adapter is not None:
        numbers |= {
            "ranks": list(part.adapter.ranks),
            "targets": list(part.adapter.targets),
            "fits": list(part.adapter.variants),
        }
    return numbers


def diff_numbers(diff: PartDiff) -> dict[str, object]:
    """What summary.json keeps of a comparison."""
    return {
        "what": diff.label,
        "counts": diff.counts,
        "values": diff.values,
        "median_distance": diff.distance,
        "fits": diff.fits,
        "sentences": list(diff.sentences),
    }


def diff_text(diff: PartDiff) -> str:
    """A comparison for `report.md`."""
    return f"**{diff.label}**\n\n" + "\n".join(f"- {sentence}" for sentence in diff.sentences)


def shown(problems: Sequence[str]) -> list[str]:
    """The first ten, and how many more there are."""
    more = [f"and {len(problems) - _NUM_NAMED} more"] if len(problems) > _NUM_NAMED else []
    return [*problems[:_NUM_NAMED], *more]


def tell(
    sides: Sequence[Checkpoint],
    problems: Sequence[str],
    remarks: Sequence[str],
    diffs: Sequence[PartDiff],
    targets: Sequence[str],
    targets_path: Path,
) -> None:
    """What a person sees."""
    for name, part in named_parts(sides):
        sizes = f"; {sizes_text(part.expectation.sizes)}" if part.expectation else ""
        print(
            f"{name}: {part.label} ({part.layout}; {len(part.names)} tensors, {part.num_bytes / 1e9:.2f} GB{sizes})"
        )
    for remark in remarks:
        print(remark)
    for diff in diffs:
        print(f"{diff.label}:")
        for sentence in diff.sentences:
            print(f"  - {sentence}")
    for problem in shown(problems):
        print(f"problem: {problem}")
    if targets:
        print(f"targets: {len(targets)} in {targets_path}")


def _check_usage(args: argparse.Namespace) -> None:
    """Raises UserError where flags do not go together."""
    sides = len(args.checkpoints) + sum(one is not None for one in (args.base, args.against))
    if sides > 2 or (args.base is not None and args.checkpoints):
        raise UserError(
            "give one checkpoint, or two to compare: CKPT, or CKPT CKPT, or CKPT --against CKPT; --base stands for CKPT"
        )
    if args.config is not None and (args.checkpoints or args.base is not None):
        raise UserError(
            "--config names the checkpoint of a run, and a checkpoint is given too; leave one of them out, or compare them with "
            "--config TOML --against CKPT"
        )
    if not args.targets and (args.blocks is not None or args.out is not None):
        raise UserError(
            '--blocks and --out go with --targets, which is missing; say which targets, e.g. --targets "cross_attn.{k,v}"'
        )
    if args.out is not None:
        refuse_training_run(args.out, "--out")
        if args.out.is_dir():
            raise UserError(f"--out: {args.out} is a directory; give the file to write")
        check_writable(args.out, "--out")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the probe and return its exit status."""
    return run_probe(build_parser(), probe, argv)


if __name__ == "__main__":
    sys.exit(main())
