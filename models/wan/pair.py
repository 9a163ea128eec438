"""`expert = "both"`: A14B's two experts trained from one configuration, one after the other in the same processes.

Each expert has a run directory of its own, which is in all respects that of an ordinary run; both lie in the directory of
the pair (`utils.pair_dir`). Order of data and seeds are the same, so a sample's noise and its place among the noise
levels are too. Nothing but `pair.json`, `report.md` and the copies of the adapters belongs to the pair alone.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from models.wan.closed_form.fit_start import SolvedStart, start_from_solved
from models.wan.datasets import CacheUse
from models.wan.pair_report import HalfFacts, half_facts, pair_document, pair_text
from models.wan.setup import Prepared, prepare, run_metadata, write_inputs
from utils import run as runs
from utils.config.closed_form_rules import is_solved_for
from utils.config.experts import EXPERTS, loaded_side
from utils.config.schema import Expert, LoadedConfig
from utils.distributed import Processes, lift_waits, on_main
from utils.errors import TrainingStoppedError
from utils.pair_dir import (
    REPORT_FILE,
    HalfStart,
    PairDir,
    create_pair_dir,
    find_pair_dir,
    place_adapter,
    write_pair_report,
)
from utils.resume import Inputs, find_run
from utils.run_dir import RunDir, remove_leftovers

Say = Callable[[str], None]


@dataclass(frozen=True)
class PairOptions:
    """What the command line says: see the flags of `train.py`."""

    cache_only: bool
    dry_run: bool
    resume: str | None
    allowed: str | None


@dataclass(frozen=True)
class Half:
    """One expert's run: prepared, and where it begins or goes on (None before that is known)."""

    expert: Expert
    prepared: Prepared
    run_dir: RunDir | None = None
    is_finished: bool = False

    @property
    def inputs(self) -> Inputs:
        """What the run rests on."""
        data = self.prepared.data
        return Inputs(data.fingerprints, data.descriptions)


def train_pair(
    config: LoadedConfig, options: PairOptions, use: CacheUse, processes: Processes, say: Say
) -> None:
    """Train both experts, or go on with a pair. Every rank must call it.

    Raises:
        UserError: as for a run.
        TrainingStoppedError: as for a run; the message says what has become of the other expert.
    """
    halves = _prepare(config, options, use, processes, say)
    if options.cache_only:
        say(f"cache complete: {halves[0].prepared.data.store_root}")
        return
    found = on_main(lambda: None if options.resume is None else find_pair_dir(config.train, options.resume))
    if options.resume is not None and found is None:
        say(f"no pair to continue in {config.train.output_dir}: starting at step 0")
    if found is not None:
        halves = [_continued(half, found, options, processes, say) for half in halves]
    if options.dry_run:
        for half in halves:
            if not half.is_finished:
                _say_head(half, say)
                _build(half, processes, say).pipeline.close()
        if is_solved_for(config.train):
            say("dry run: the adapters are solved for when training begins")
        say("dry run: everything is in place; no step was taken and nothing was written to output_dir")
        return
    pair = found or _begin(config, halves, processes, say)
    if found is not None:
        on_main(partial(remove_leftovers, found.path))
    else:
        halves = [_in_pair(half, RunDir(pair.run(half.expert)), pair) for half in halves]
    for half in halves:
        if not half.is_finished and not _train_half(half, halves, pair, processes, say):
            return
        on_main(partial(_report, pair, halves))
    adapters = ", ".join(str(pair.adapter(half.expert)) for half in halves)
    say(f"adapters of the pair: {adapters}")
    say(f"report of the pair: {pair.path / REPORT_FILE}")


def _prepare(
    config: LoadedConfig, options: PairOptions, use: CacheUse, processes: Processes, say: Say
) -> list[Half]:
    """Both experts' models, with one scan of the data; for the cache alone the first is enough."""
    halves: list[Half] = []
    for expert in EXPERTS[:1] if options.cache_only else EXPERTS:
        like = halves[0].prepared if halves else None
        halves.append(Half(expert, prepare(loaded_side(config, expert), processes, use, say, like)))
    return halves


def _continued(half: Half, pair: PairDir, options: PairOptions, processes: Processes, say: Say) -> Half:
    """The half as it goes on: from its newest checkpoint, or from the start where it has none."""
    prepared = half.prepared
    found = find_run(
        prepared.config,
        str(pair.run(half.expert)),
        options.allowed,
        prepared.data.plan,
        half.inputs,
        processes.world_size // prepared.config.train.pipeline_stages,
        say,
    )
    assert found is not None, "a pair has both run directories"
    prepared = replace(prepared, config=found.config)
    return _in_pair(replace(half, prepared=prepared, is_finished=found.is_finished), found.run_dir, pair)


def _in_pair(half: Half, run_dir: RunDir, pair: PairDir) -> Half:
    return replace(half, run_dir=replace(run_dir, pair=pair.path))


def _begin(config: LoadedConfig, halves: Sequence[Half], processes: Processes, say: Say) -> PairDir:
    solved = _solve(config, halves, processes, say) if is_solved_for(config.train) else None

    def create() -> PairDir:
        starts = [
            HalfStart(half.expert, half.prepared.config, partial(_describe, half, solved)) for half in halves
        ]
        document = pair_document([_facts(half, None) for half in halves])
        return create_pair_dir(Path(config.train.output_dir), starts, document)

    pair = on_main(create)
    say(f"directory of the pair: {pair.path}")
    if solved is not None:
        on_main(lambda: solved.report(pair.path.name, [pair.run(half.expert) for half in halves]))
    return pair


def _solve(config: LoadedConfig, halves: Sequence[Half], processes: Processes, say: Say) -> SolvedStart:
    """What both experts start from, from one pass over the prompts."""
    for half in halves:
        runs.plan_stages(half.prepared.config.train, half.prepared.model, processes)
    solved = SolvedStart(config, halves[0].prepared.data.hashes.text_encoder, processes, say)
    on_main(solved.solve)
    return solved


def _describe(half: Half, solved: SolvedStart | None, directory: Path) -> None:
    write_inputs(half.prepared.model, half.prepared.data, directory)
    if solved is not None:
        solved.write(directory, half.expert)


def _build(half: Half, processes: Processes, say: Say) -> runs.Ready:
    prepared = half.prepared
    return runs.build(prepared.config.train, prepared.data.plan, prepared.model, processes, say)


def _train_half(half: Half, halves: Sequence[Half], pair: PairDir, processes: Processes, say: Say) -> bool:
    """Train one expert to its end; False where the pair ends here, because it was asked to."""
    prepared, run_dir = half.prepared, half.run_dir
    assert run_dir is not None, "it has begun"
    _say_head(half, say)
    lift_waits()
    if is_solved_for(prepared.config.train):
        start_from_solved(prepared.model, run_dir, processes)
    ready = _build(half, processes, say)
    metadata = run_metadata(prepared.config, prepared.model, prepared.data)
    left = [other.expert for other in halves[halves.index(half) + 1 :] if not other.is_finished]
    try:
        ended = runs.run(ready, run_dir, half.inputs, metadata, say, prepared.evals)
    except TrainingStoppedError as error:
        on_main(partial(_report, pair, halves))
        raise TrainingStoppedError(f"{half.expert} expert: {error}{_what_is_left(left, pair)}") from error
    # Two models do not fit where one does.
    ready.pipeline.close()
    if ended.stopped_by is None and not (ended.is_told_to_stop and left):
        return True
    on_main(partial(_report, pair, halves))
    if ended.stopped_by is None:
        say(
            f"the {half.expert} expert is finished, and the request to stop came before the {left[0]} expert was begun. To go "
            f"on, give the same command with --resume_from_checkpoint {pair.path}"
        )
    return False


def _what_is_left(left: Sequence[Expert], pair: PairDir) -> str:
    if not left:
        return ""
    return (
        f". The {left[0]} expert has not been begun; once this is settled, the same command with "
        f"--resume_from_checkpoint {pair.path} goes on (and --allow_changed with the keys that were changed for it)"
    )


def _say_head(half: Half, say: Say) -> None:
    say(f"--- expert {EXPERTS.index(half.expert) + 1} of {len(EXPERTS)}: {half.expert} ---")


def _report(pair: PairDir, halves: Sequence[Half]) -> None:
    """Place what is finished and write the report of what there is. On rank 0."""
    facts = [_facts(half, pair) for half in halves]
    document = pair_document(facts)
    write_pair_report(pair, document, pair_text(document))


def _facts(half: Half, pair: PairDir | None) -> HalfFacts:
    run = None if pair is None else pair.run(half.expert)
    facts = half_facts(
        half.expert, half.prepared.config.train, half.prepared.model, half.prepared.data.plan, run
    )
    if pair is not None and facts.is_complete:
        placed = place_adapter(pair, half.expert)
        facts = replace(facts, adapter=None if placed is None else placed.name)
    return facts
