"""Probe: what does an adapter, or a tuned encoder, change in what is drawn?

Draws prompts x seeds with the base and with each run, from the same noise, on one sheet; measures how far each picture moved
from the base's, and holds the change on neutral prompts against that on domain prompts. See docs/diagnostics/prompt_grid.md.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from models.wan.probes.encoder_prompts import Entry, plan_prompts
from models.wan.probes.grid import (
    ADAPTER_ROLE,
    BASE,
    ENCODER_ROLE,
    Cell,
    Change,
    Column,
    draw_cells,
    parse_column,
    summarise,
)
from models.wan.prompts import NEGATIVE_PROMPT
from models.wan.sample_defaults import fill_flags, makes_picture
from models.wan.sample_flags import add_sampling_flags, describe, device_name, settings_from
from utils.argument_types import config_file, path_of, positive_float, positive_int, seed
from utils.config.load import load_config
from utils.config.schema import SamplesConfig, TrainConfig
from utils.devices import choose_device
from utils.errors import UserError
from utils.paired import group_difference
from utils.probe_cli import probe_parser, run_probe
from utils.report import Report, Verdict

if TYPE_CHECKING:
    import numpy as np

    from models.wan.sample_job import SampleJob

TOOL = "prompt_grid"
QUESTION = "What do runs change in what is drawn from the same noise, on neutral and on domain prompts?"
DEFAULTS = SamplesConfig()
# A latent that moved less than this everywhere was moved by rounding.
MOVED_DISTANCE = 1e-4
HOW_TO_READ = """\
- Each row is one prompt with one seed; all columns begin with the same noise. Look for what changed beside what was meant:
  layout, colours, artifacts.
- **change** is 1 - SSIM against the base's picture: 0 where nothing moved, about 1 where nothing is alike. **latent distance** is
  the length of the difference over that of the base's latents.
- Neutral prompts should stay, domain prompts should move. Intervals (95 %, Student's t) are over prompts, each the
  mean of its seeds: a few prompts say little.
- Sampling amplifies: a small change can turn one picture into another. More seeds say more than one bad cell."""
NEXT_STEPS: dict[Verdict, str] = {
    "pass": "- Look at the sheet all the same: SSIM sees no artifacts that are like the base's pictures.",
    "fail": (
        "- Use an earlier save, a lower learning rate, a narrower band, or `[budget]`.\n"
        "- Draw with a lower weight (`NAME=PATH:0.5`): if the domain still moves, less would have done.\n"
        "- If an adapter touches `self_attn.*`, leave it out first (`--adapter_exclude 'self_attn.*'`)."
    ),
    "inconclusive": (
        "- Pictures that did not move: check that the files are the ones that were meant, and that their runs did train.\n"
        "- Domain prompts that moved no more than neutral ones: check that they hold what the captions held.\n"
        "- An interval that holds 0: more prompts (`--max_prompts`) say more than more seeds."
    ),
}


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = probe_parser(
        TOOL,
        "What do runs change in what is drawn? Draws prompts x seeds with the base and with each --run from the same\n"
        "noise, on one sheet, and measures the change. One frame each, where --frames does not say otherwise. What no flag\n"
        "says is as [samples] of the config has it.",
    )
    parser.add_argument(
        "--config",
        required=True,
        type=config_file,
        metavar="TOML",
        help="a training config, or a run's directory: the base",
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override a value of the config"
    )
    parser.add_argument(
        "--run",
        action="append",
        required=True,
        metavar="NAME=PATH",
        help="a column: an adapter (PATH:WEIGHT), a tuned encoder, or a run that saved one; PATH+PATH for both (repeatable)",
    )
    add_what_is_drawn(parser)
    parser.add_argument(
        "--batch_size",
        type=positive_int,
        default=1,
        metavar="N",
        help="samples at once (default: %(default)s)",
    )
    parser.add_argument(
        "--adapter_exclude",
        action="append",
        default=[],
        metavar="PATTERN",
        help="modules of the adapters to leave out",
    )
    add_sampling_flags(parser)
    # Whether they are given has to be known: [samples] of the config stands in for those that are not.
    parser.set_defaults(solver=None, negative_prompt=None)
    return parser


def add_what_is_drawn(parser: argparse.ArgumentParser) -> None:
    """The flags of the prompts and seeds, and the cap on what they may change; None where they are not given."""
    parser.add_argument(
        "--prompts",
        type=path_of,
        metavar="FILE",
        help="neutral prompts, one per line (default: [budget] neutral_prompts, else configs/prompts/neutral.txt)",
    )
    parser.add_argument(
        "--domain_prompts", type=path_of, metavar="FILE", help="prompts that should change (private)"
    )
    parser.add_argument(
        "--redact",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="show prompts of your files as index and hash. Default: domain prompts are hidden, neutral ones are not; --redact "
        "hides both, --no-redact neither",
    )
    parser.add_argument(
        "--max_prompts",
        type=positive_int,
        metavar="N",
        help=f"prompts of each file, at most (default: {DEFAULTS.max_prompts})",
    )
    parser.add_argument(
        "--seeds",
        type=positive_int,
        metavar="N",
        help=f"seeds of each prompt (default: {DEFAULTS.seeds})",
    )
    parser.add_argument(
        "--seed", type=seed, metavar="N", help=f"the first of the seeds (default: {DEFAULTS.seed})"
    )
    parser.add_argument(
        "--max_neutral_change",
        type=positive_float,
        metavar="X",
        help=f"cap on the mean of 1 - SSIM over neutral cells (default: {DEFAULTS.max_neutral_change})",
    )


def probe(args: argparse.Namespace) -> Verdict:
    """Draw, measure, write the report, and return the verdict."""
    columns = [Column(BASE), *(parse_column(text) for text in args.run)]
    names = [column.name for column in columns]
    if len(set(names)) < len(names):
        raise UserError(f"--run: two columns have one name ({', '.join(names[1:])}); name each differently")
    config = load_config(args.config, args.set).train
    fill_flags(args, config.samples)
    entries, remarks = choose_prompts(args, config)
    report = Report(TOOL, QUESTION, args.reports_dir, args.run_tag, args.seed)
    job = build_job(args, config, columns, entries)
    if config.samples is not None:
        remarks = (f"what no flag says is as [samples] of {args.config} has it", *remarks)
    for remark in remarks:
        print(remark)
        report.note(remark)

    from models.wan.sample_job import Where
    from utils.progress import Progress, announce

    print(describe(job.settings))
    batches = -(-len(job.prompts) // job.batch_size)
    progress = Progress("sampling", len(columns) * batches * job.settings.steps)

    def say(text: str) -> None:
        announce(text)
        if text.startswith("warning"):
            report.note(text)

    where = Where(choose_device(device_name(args.device)), None, say, progress.reach)
    samples = [entry for entry in entries for _ in range(args.seeds)]
    cells, frames = draw_cells(job, where, samples, columns)
    progress.close()
    changes = summarise(cells)
    verdict, explanation = judge(cells, changes, args.max_neutral_change)
    add_results(report, cells, changes, frames, samples, job)
    report.cap(
        "max_neutral_change", args.max_neutral_change, "a mean 1 - SSIM of neutral cells above it fails"
    )
    report.cap(
        "moved_distance", MOVED_DISTANCE, "a column below this latent distance everywhere is inconclusive"
    )
    add_inputs(report, args, job)
    directory = report.write(verdict, explanation, HOW_TO_READ, NEXT_STEPS[verdict])
    print(f"{verdict}: {explanation}\nreport: {directory}")
    return verdict


def choose_prompts(args: argparse.Namespace, config: TrainConfig) -> tuple[list[Entry], tuple[str, ...]]:
    """The prompts that are drawn: neutral and domain ones, without Wan's negative prompt and the one that is drawn against."""
    model = replace(config.model, caption_aug=None)  # its keywords are no prompts
    config = replace(config, model=model)
    plan = plan_prompts(args.prompts, args.domain_prompts, None, config, args.redact, args.max_prompts)
    kept = [entry for entry in plan.entries if entry.text not in (NEGATIVE_PROMPT, args.negative_prompt)]
    return kept, tuple(remark.replace("--max_entries", "--max_prompts") for remark in plan.remarks)


def build_job(
    args: argparse.Namespace, config: TrainConfig, columns: Sequence[Column], entries: Sequence[Entry]
) -> "SampleJob":
    """What the sampler has to draw, checked as far as headers tell."""
    from models.wan.checkpoint import read_variant
    from models.wan.sample_job import SampleJob, check_job

    variant = read_variant(config.model)
    settings = settings_from(args, variant, one_frame=makes_picture(args, variant))
    seeds = range(args.seed, args.seed + args.seeds)
    job = SampleJob(
        config,
        settings,
        tuple(entry.text for entry in entries for _ in seeds),
        tuple(seed for _ in entries for seed in seeds),
        args.negative_prompt,
        tuple(column.variation(variant) for column in columns),
        args.image,
        args.expert,
        tuple(args.adapter_exclude),
        args.batch_size,
        args.tiling,
        show_prompts=False,
    )
    check_job(job)
    return job


def judge(cells: Sequence[Cell], changes: Sequence[Change], cap: float) -> tuple[Verdict, str]:
    """The verdict and the sentence that explains it: that of the column that does worst."""
    by_group = {(change.column, change.group): change for change in changes}
    neutral = {column: one.change.mean for (column, group), one in by_group.items() if group == "neutral"}
    worst = max(neutral, key=lambda name: neutral[name])
    if neutral[worst] > cap:
        return (
            "fail",
            f"{worst} changes neutral prompts by {neutral[worst]:.3g} (1 - SSIM), above the cap of {cap:g}.",
        )
    for name in neutral:
        if max(cell.latent_distance for cell in cells if cell.column == name) < MOVED_DISTANCE:
            return "inconclusive", f"{name} changes no picture."
    within = f"Neutral prompts change by at most {neutral[worst]:.3g} (1 - SSIM, {worst}), within the cap of {cap:g}"
    if not any(group == "domain" for _, group in by_group):
        return "pass", f"{within}; whether the domain changes is not known without --domain_prompts."
    more = {
        name: group_difference(by_group[name, "domain"].by_prompt, by_group[name, "neutral"].by_prompt)
        for name in neutral
    }
    weakest = min(more, key=lambda name: more[name].mean)
    found = more[weakest]
    told = f"{found.mean:+.3g}, {weakest}"
    if found.low is None:
        return "inconclusive", f"{within}; one domain prompt says nothing about the domain ({told})."
    told = f"{told}, 95 % interval {found.low:+.3g} to {found.high:+.3g}"
    if found.low <= 0:
        return "inconclusive", f"{within}, but domain prompts change no more than that for certain ({told})."
    return "pass", f"{within}; domain prompts change more ({told})."


def add_results(
    report: Report,
    cells: Sequence[Cell],
    changes: Sequence[Change],
    frames: "dict[str, list[np.ndarray]]",
    samples: Sequence[Entry],
    job: "SampleJob",
) -> None:
    """Numbers, tables and the sheet."""
    report.metric("settings", describe(job.settings))
    for group in ("neutral", "domain"):
        found = {one.column: one for one in changes if one.group == group}
        if not found:
            continue
        report.metric(
            f"{group}_change", {name: one.change.mean for name, one in found.items()}, "mean of 1 - SSIM"
        )
        report.metric(
            f"{group}_change_interval",
            {name: [one.change.low, one.change.high] for name, one in found.items()},
            "95 %, over prompts; null for one prompt",
        )
        report.metric(
            f"{group}_latent_distance", {name: one.latent_distance for name, one in found.items()}, "mean"
        )
    report.table(
        "changes",
        [
            {
                "column": one.column,
                "group": one.group,
                "prompts": len(one.by_prompt),
                "change": one.change.mean,
                "low": one.change.low,
                "high": one.change.high,
                "latent_distance": one.latent_distance,
            }
            for one in changes
        ],
        "Mean change of each column, with its 95 % interval over prompts",
    )
    report.table(
        "cells",
        [
            {
                "column": cell.column,
                "group": cell.entry.group,
                "prompt": cell.entry.label,
                "seed": cell.seed,
                "change": cell.change,
                "ssim": cell.ssim,
                "latent_distance": cell.latent_distance,
            }
            for cell in cells
        ],
        "Every cell against the base",
    )
    add_sheet(report, cells, frames, samples, job)


def add_sheet(
    report: Report,
    cells: Sequence[Cell],
    frames: "dict[str, list[np.ndarray]]",
    samples: Sequence[Entry],
    job: "SampleJob",
) -> None:
    """The sheet: a row for each sample, a column for each way to draw it."""
    from utils.data.grid_sheet import GridRow, draw_grid

    names = list(frames)
    found_cells = {
        (cell.column, index): cell for name in names[1:] for index, cell in enumerate(_of(cells, name))
    }
    rows = [
        GridRow(
            entry.label,
            f"{entry.group}, seed {job.seeds[index]}",
            tuple(
                (
                    frames[name][index],
                    "" if name == names[0] else f"change {found_cells[name, index].change:.3f}",
                )
                for name in names
            ),
        )
        for index, entry in enumerate(samples)
    ]
    report.picture("grid", draw_grid(names, rows), "Same prompt and noise in each row")


def _of(cells: Sequence[Cell], column: str) -> list[Cell]:
    return [cell for cell in cells if cell.column == column]


def add_inputs(report: Report, args: argparse.Namespace, job: "SampleJob") -> None:
    """Name every file that the pictures come from; private ones are not named: a short list can be guessed by its hash."""
    from models.wan.checkpoint import find_checkpoint, open_transformer

    report.add_input("config", args.config)
    for phase in job.phases:
        for path in open_transformer(find_checkpoint(job.model(phase)).transformer_dir).files:
            report.add_input("base", path)
    paths = find_checkpoint(job.model(job.phases[0]))
    report.add_input("text_encoder", paths.text_encoder)
    report.add_input("vae", paths.vae)
    for text, variation in zip(args.run, job.variations[1:], strict=True):
        name = text.partition("=")[0]
        for choice in variation.adapters:
            role = ADAPTER_ROLE.format(name=name, weight=f"{choice.weight:g}")
            report.add_input(role, choice.path)
        if variation.text_encoder is not None:
            report.add_input(ENCODER_ROLE.format(name=name), variation.text_encoder)
    if args.image is not None:
        report.add_input("image", args.image)
    report.add_prompt_file("prompts", args.prompts, is_private=bool(args.redact))
    report.add_prompt_file("domain_prompts", args.domain_prompts, is_private=args.redact is not False)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the probe and return its exit status."""
    return run_probe(build_parser(), probe, argv)


if __name__ == "__main__":
    sys.exit(main())
