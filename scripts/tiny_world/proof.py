"""The proof: does an encoder learn a new word while everything else stays, and does a translator make the painter act on it?

    python -m scripts.tiny_world.proof

Trains every arm with every seed on the trained miniature, draws, reads what was drawn, and writes one report. What is done
is kept in --work: the same command goes on from there after an interruption. See docs/proof.md.
"""

import argparse
import json
import multiprocessing
import sys
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any

from scripts.tiny_world.asset import ASSET, read_quality, write_official
from scripts.tiny_world.build import digest
from scripts.tiny_world.drawing import Drawing
from scripts.tiny_world.proof_arms import Arm, Plan
from scripts.tiny_world.proof_control import refused_cache
from scripts.tiny_world.proof_data import texts_digest, write_data
from scripts.tiny_world.proof_report import write_report
from scripts.tiny_world.proof_task import Place, run_task, write_prompt_files
from utils.cli import run_command
from utils.errors import EXIT_OK, UserError
from utils.files import atomic_write_text
from utils.progress import announce
from utils.report import Report

TOOL = "tiny_world_proof"
QUESTION = (
    "Does the encoder learn a new word while the rest stays, and does a translator make the DiT act on it?"
)
Job = tuple[str, int]


def prove(
    work: Path,
    plan: Plan,
    jobs: int,
    asset: Path = ASSET,
    reports_dir: Path | str = "reports",
    run_tag: str | None = None,
) -> dict[str, Any]:
    """Run what is missing and write the report; returns the results by arm and seed, and the report's directory.

    Raises:
        UserError: the report exists, or `work` was begun with another plan, checkpoint or other prompts.
        TrainingStoppedError: a training or a probe failed.
    """
    report = Report(TOOL, QUESTION, reports_dir, run_tag, plan.seeds[0])
    place = prepare(work, plan, asset)
    for seed in plan.seeds:
        write_data(work / "data" / f"s{seed}", seed, plan.amounts)
    refusal = refused_cache(place, plan)
    results = run_all(place, plan, jobs)
    directory = write_report(report, place, plan, results, refusal, asset)
    return {"results": results, "directory": directory}


def prepare(work: Path, plan: Plan, asset: Path) -> Place:
    """The checkpoint in the official layout, the prompt files, and a note of what the results follow from."""
    quality = read_quality(asset)
    drawing = Drawing(**quality["drawing"])
    checkpoint = work / "checkpoint"
    files = {path.name: digest(path) for path in sorted(asset.glob("*.safetensors"))}
    # More seeds are a continuation; everything else has to be what the results that are there were made with.
    fixed = {name: value for name, value in plan.document().items() if name not in ("seeds", "arms")}
    note = {"plan": fixed, "drawing": quality["drawing"], "sha256": files, "texts": texts_digest()}
    noted = work / "plan.json"
    if noted.is_file() and json.loads(noted.read_text(encoding="utf-8")) != note:
        raise UserError(
            f"{work}: was begun with another plan, checkpoint or other prompts than are asked for now; choose another --work, or remove it"
        )
    work.mkdir(parents=True, exist_ok=True)
    atomic_write_text(noted, json.dumps(note, indent=1))
    if not checkpoint.is_dir():
        write_official(asset, checkpoint)
    place = Place(work, checkpoint, drawing)
    write_prompt_files(place, plan.amounts)
    return place


def run_all(place: Place, plan: Plan, jobs: int) -> dict[Job, dict[str, Any]]:
    """Every arm with every seed, `jobs` at a time, each behind the one that it starts from."""
    waiting = {(arm.name, seed): arm for seed in plan.seeds for arm in plan.chosen()}
    total = len(waiting)
    results: dict[Job, dict[str, Any]] = {}
    running: dict[Future[dict[str, Any]], Job] = {}
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context) as pool:
        try:
            while waiting or running:
                for job in [job for job, arm in waiting.items() if _is_ready(arm, job[1], results)]:
                    if len(running) == jobs:
                        break
                    running[pool.submit(run_task, place, plan, waiting.pop(job), job[1])] = job
                done, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    job = running.pop(future)
                    results[job] = future.result()
                    announce(f"{len(results)}/{total} {job[0]}, seed {job[1]}: {_line(results[job])}")
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return results


def _is_ready(arm: Arm, seed: int, results: dict[Job, dict[str, Any]]) -> bool:
    return all((name, seed) in results for name in arm.needs)


def _line(result: dict[str, Any]) -> str:
    """What came out, in short."""
    shares = {
        name: sum(cell["both"]) / len(cell["both"])
        for name, cell in result["outcomes"].items()
        if "both" in cell
    }
    used = sum(value for name, value in result["cpu_seconds"].items() if not name.endswith("_clock"))
    return (
        ", ".join(f"{name} {share:.0%}" for name, share in shares.items()) + f" ({used:.0f} s of processor)"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--work",
        type=Path,
        default=Path("output/tiny_world_proof"),
        help="where an interrupted proof goes on from; remove it to begin anew (default: %(default)s)",
    )
    parser.add_argument(
        "--asset", type=Path, default=ASSET, help="the trained miniature (default: %(default)s)"
    )
    parser.add_argument(
        "--jobs",
        type=int,
        default=2,
        metavar="N",
        help="arms at a time, one core each (default: %(default)s)",
    )
    parser.add_argument(
        "--seeds",
        type=int,
        default=3,
        metavar="N",
        help="seeds of training for each arm (default: %(default)s)",
    )
    parser.add_argument("--run_tag", help="name of the report (default: the UTC time)")
    parser.add_argument("--reports_dir", type=Path, default=Path("reports"), help="default: %(default)s")
    parser.add_argument("--debug", action="store_true", help="show stack traces")
    arguments = parser.parse_args(argv)

    def run() -> int:
        if arguments.jobs < 1 or arguments.seeds < 1:
            raise UserError("--jobs and --seeds: give at least 1")
        plan = Plan(seeds=tuple(range(arguments.seeds)))
        done = prove(
            arguments.work, plan, arguments.jobs, arguments.asset, arguments.reports_dir, arguments.run_tag
        )
        print(f"report: {done['directory']}")
        return EXIT_OK

    return run_command(run, debug=arguments.debug)


if __name__ == "__main__":
    sys.exit(main())
