"""Train Wan 2.2's text encoder through the frozen DiT, or a DiT LoRA translator, as a TOML file says.

deepspeed train.py --config configs/wan22_dit_lora_translator.toml
torchrun --nproc_per_node 2 train.py --config configs/wan22_te_ft.toml
python train.py --config configs/smoke_dit_lora.toml
"""

import argparse
from functools import partial

from models.wan.verify import verify
from utils.cli import end_process, run_command
from utils.plan_cli import add_plan_flags, check_plan_flags, print_plan

NEWEST = ""


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="train.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config", required=True, metavar="TOML", help="what to train; see docs/configuration.md"
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override a value of the config, e.g. --set adapter.rank=8 (repeatable)",
    )
    parser.add_argument("--cache_only", action="store_true", help="fill the cache and exit")
    anew_or_trusted = parser.add_mutually_exclusive_group()
    anew_or_trusted.add_argument(
        "--regenerate_cache", action="store_true", help="encode this dataset's items anew"
    )
    anew_or_trusted.add_argument(
        "--trust_cache",
        action="store_true",
        help="take media files of known path and size for unchanged, whatever their time stamps say (copied or network "
        "disks); one whose content changed at the same size keeps its old latents",
    )
    parser.add_argument(
        "--dry_run", action="store_true", help="do everything up to the first step, summarise, exit"
    )
    parser.add_argument(
        "--resume_from_checkpoint",
        nargs="?",
        const=NEWEST,
        default=None,
        metavar="RUN",
        help="continue a run (directory, or its name in output_dir; no value: the newest) from its newest checkpoint",
    )
    parser.add_argument(
        "--allow_changed",
        default=None,
        metavar="KEY[,KEY]",
        help="with --resume_from_checkpoint: go on although these have changed, e.g. optimizer.lr,dataset",
    )
    add_plan_flags(parser)
    parser.add_argument("--debug", action="store_true", help="show stack traces")
    launcher = parser.add_argument_group("passed by launchers")
    launcher.add_argument("--local_rank", type=int, default=None, help="ignored: LOCAL_RANK says it")
    launcher.add_argument("--deepspeed", action="store_true", help="ignored: DeepSpeed is always the engine")
    arguments = parser.parse_args(argv)
    if arguments.allow_changed is not None and arguments.resume_from_checkpoint is None:
        parser.error("--allow_changed would be ignored: it belongs to --resume_from_checkpoint")
    if arguments.cache_only and arguments.resume_from_checkpoint is not None:
        parser.error("--resume_from_checkpoint would be ignored: --cache_only ends before training")
    check_plan_flags(parser, arguments)
    return arguments


def train(arguments: argparse.Namespace) -> int:
    """Load, check, cache, build and loop."""
    from models.wan.preflight import preflight
    from utils.config.load import load_config

    config = load_config(arguments.config, arguments.set, check_files=True, preflight=preflight)

    from models.wan.closed_form.fit_start import begin_solved
    from models.wan.datasets import CacheUse
    from models.wan.pair import PairOptions, train_pair
    from models.wan.setup import prepare, run_metadata, write_inputs
    from utils import distributed
    from utils import run as runs
    from utils.config.closed_form_rules import is_solved_for
    from utils.config.experts import is_pair
    from utils.resume import Inputs, find_run

    use = CacheUse(regenerate=arguments.regenerate_cache, trust_sizes=arguments.trust_cache)
    resume, allowed = arguments.resume_from_checkpoint, arguments.allow_changed
    with distributed.process_group(config.train.timeout_minutes) as processes:
        runs.check_world_size(config.train, processes.world_size)
        say = runs.speaker(processes)
        for note in config.notes:
            say(f"note: {note}")
        if is_pair(config.train):
            options = PairOptions(arguments.cache_only, arguments.dry_run, resume, allowed)
            train_pair(config, options, use, processes, say)
            return 0
        prepared = prepare(config, processes, use, say)
        model, data = prepared.model, prepared.data
        if arguments.cache_only:
            say(f"cache complete: {data.store_root}")
            return 0
        inputs = Inputs(data.fingerprints, data.descriptions)
        copies = processes.world_size // config.train.pipeline_stages
        found = find_run(config, resume, allowed, data.plan, inputs, copies, say)
        if found is not None:
            config = found.config
            if found.is_finished:
                return 0
        run_dir = found.run_dir if found else None
        if is_solved_for(config.train):
            run_dir = begin_solved(config, prepared, run_dir, processes, say, dry_run=arguments.dry_run)
        drift = distributed.on_every_rank(model.neutral_drift)
        ready = runs.build(config.train, data.plan, model, processes, say)
        if arguments.dry_run:
            say("dry run: everything is in place; no step was taken and nothing was written to output_dir")
            return 0
        run_dir = run_dir or runs.begin_run(config, partial(write_inputs, model, data), say)
        runs.run(ready, run_dir, inputs, run_metadata(config, model, data), say, prepared.evals, drift)
        return 0


def plan(arguments: argparse.Namespace) -> int:
    """Say what the configuration would train, from headers alone."""
    from models.wan.plan_pair import plan_document
    from utils.config.load import load_config

    loaded = load_config(arguments.config, arguments.set)
    print_plan(plan_document(loaded, arguments.gpus, arguments.tflops), as_json=arguments.json)
    return 0


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    arguments = parse_arguments(argv)
    body = verify if arguments.verify else plan if arguments.plan else train
    return run_command(lambda: body(arguments), debug=arguments.debug)


if __name__ == "__main__":
    end_process(main())
