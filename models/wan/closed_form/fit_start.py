"""Training that solves for the adapter it starts from: once, on rank 0, before the stages are built.

The adapter is put into the run's directory while that is made, so a run either has its start or is not there; every rank,
and every continuation that has no checkpoint yet, reads it from there. The report goes where all reports go.
"""

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from models.wan.closed_form.fit_job import Solved, fill_report, plan_of, solve_adapters
from models.wan.closed_form.fit_report import HOW_TO_READ, NEXT_STEPS
from models.wan.closed_form.fit_save import write_adapter
from models.wan.closed_form.fit_settings import QUESTION, TOOL, in_config_words
from models.wan.closed_form.fit_subject import open_subject
from models.wan.model import WanModel
from models.wan.setup import Prepared, write_inputs
from utils import run as runs
from utils.budget import cap_problem
from utils.config.closed_form_rules import closed_form_of, closed_form_reports_dir
from utils.config.experts import only_expert
from utils.config.schema import Expert, LoadedConfig
from utils.devices import choose_device
from utils.distributed import Processes, on_every_rank, on_main
from utils.errors import UserError
from utils.lora import ADAPTER_WEIGHTS
from utils.nodes import check_seen
from utils.report import Report
from utils.run_dir import RunDir

# Inside a run's directory.
START = Path("inputs") / "closed_form_adapter"
_WHAT_NEXT = (
    "- Training goes on from it; `[probes]` and `[samples]` look at what is saved.\n"
    "- Its own caps and pictures: `lora_delta_budget`, `attn_logit_probe`, `prompt_grid` with the run's `{start}`."
)


class SolvedStart:
    """What a run, or a pair of runs, starts from. All but the constructor is called on rank 0 alone, in this order."""

    def __init__(
        self, config: LoadedConfig, encoder_hash: str, processes: Processes, say: Callable[[str], None]
    ) -> None:
        """Nothing yet.

        Args:
            config: of the run, or of the pair.
            encoder_hash: of the tuned encoder, for the metadata.
            processes: this one among all.
            say: prints on rank 0.
        """
        self._config, self._encoder_hash, self._say = config, encoder_hash, say
        self._settings = closed_form_of(config.train)
        self._device = processes.device
        self._told: list[str] = []
        self._solved: Solved | None = None

    def solve(self) -> None:
        """Solve for the adapters and keep them.

        Raises:
            UserError: it cannot be solved, makes things worse on prompts that were held out, or is above a budget that stops.
        """
        settings = self._settings
        self._say('adapter.init = "closed_form": solving for the adapter that training starts from')
        with self._named_as_in_the_config():
            device = self._device if settings.device is None else choose_device(settings.device)
            subject = open_subject(self._config.train)
            self._solved = solve_adapters(subject, plan_of(settings), settings, device, self._tell)
            verdict, explanation = self._solved.judged()
            if verdict == "fail":
                raise UserError(
                    f"{explanation} Report: {self._write_report(None, ())}. Give more, and more varied, --prompts, or a larger "
                    "--ridge"
                )
            self._check_budget(self._solved)
        self._say(f"closed form: {verdict}: {explanation}")
        gc.collect()
        if device.type == "cuda":  # the stages are built there next
            torch.cuda.empty_cache()

    def write(self, directory: Path, expert: Expert | None) -> None:
        """Put an adapter into the directory of a run that is being made; of a pair that of `expert`.

        Raises:
            UserError: it cannot be written, or what was written is not sound.
        """
        solved = self._result()
        place = directory / START
        place.mkdir(parents=True)
        for side, found in zip(solved.subject.sides, solved.fitted, strict=True):
            if side.expert == expert:
                write_adapter(place, side, found, self._encoder_hash, self._settings.keep_weight)

    def report(self, name: str, run_dirs: Sequence[Path]) -> None:
        """Write the report under the name of the run or pair, and let go of everything.

        Raises:
            UserError: it cannot be written.
        """
        self._say(f"report of the closed form: {self._write_report(name, run_dirs)}")
        self._solved = None

    def _result(self) -> Solved:
        assert self._solved is not None, "solve comes first"
        return self._solved

    def _tell(self, text: str) -> None:
        text = in_config_words(text)
        self._say(text)
        self._told.append(text)

    @contextmanager
    def _named_as_in_the_config(self) -> Iterator[None]:
        try:
            yield
        except UserError as error:
            raise UserError(
                f'{self._config.path}: adapter.init = "closed_form": {in_config_words(str(error))}'
            ) from error

    def _check_budget(self, solved: Solved) -> None:
        """[budget] holds for what training starts from as for what it makes of it."""
        for side, found in zip(solved.subject.sides, solved.fitted, strict=True):
            budget = side.config.budget
            problem = None if budget is None else cap_problem([one.delta for one in found.solved], budget)
            if budget is None or problem is None:
                continue
            text = f"what is solved for is above the budget: {problem[1]}"
            if budget.action == "stop":
                raise UserError(f"{text}. budget.action = 'stop'; lower --max_delta_ratio, or raise the cap")
            self._say(
                f"warning: {text}; budget.action = '{budget.action}' comes at step {budget.every_n_steps}"
            )

    def _write_report(self, name: str | None, run_dirs: Sequence[Path]) -> Path:
        solved, reports = self._result(), Path(closed_form_reports_dir(self._config.train))
        report = Report(TOOL, QUESTION, reports, _free_tag(reports / TOOL, name), self._settings.seed)
        for text in self._told:
            report.note(text)
        fill_report(report, solved, self._config.path)
        for run_dir in run_dirs:
            report.add_input("adapter", run_dir / START / ADAPTER_WEIGHTS)
        verdict, explanation = solved.judged()
        next_steps = (
            _WHAT_NEXT.format(start=START) if verdict == "pass" else in_config_words(NEXT_STEPS[verdict])
        )
        return report.write(verdict, explanation, in_config_words(HOW_TO_READ), next_steps)


def begin_solved(
    config: LoadedConfig,
    prepared: Prepared,
    found: RunDir | None,
    processes: Processes,
    say: runs.Say,
    *,
    dry_run: bool,
) -> RunDir | None:
    """Let the model begin with a solved adapter: that of the run to go on with, else one that is solved for now.

    Every rank must call it, before the stages are built. Returns the run's directory, for a new run one that was made with
    the adapter in it, so that what was solved is not lost where building fails; a dry run only says what would happen.

    Raises:
        UserError: on every rank: as `SolvedStart.solve` and `start_from_solved`, or the directory cannot be written.
    """
    if dry_run:
        say("dry run: the adapter is solved for when training begins")
        return found
    run_dir = found or _new_run(config, prepared, processes, say)
    start_from_solved(prepared.model, run_dir, processes)
    return run_dir


def _new_run(config: LoadedConfig, prepared: Prepared, processes: Processes, say: runs.Say) -> RunDir:
    model, data = prepared.model, prepared.data
    runs.plan_stages(config.train, model, processes)  # what headers can refuse is not found out after minutes
    start = SolvedStart(config, data.hashes.text_encoder, processes, say)
    on_main(start.solve)

    def describe(directory: Path) -> None:
        write_inputs(model, data, directory)
        start.write(directory, only_expert(config.train))

    run_dir = runs.begin_run(config, describe, say)
    on_main(lambda: start.report(run_dir.path.name, [run_dir.path]))
    return run_dir


def start_from_solved(model: WanModel, run_dir: RunDir, processes: Processes) -> None:
    """Let the model begin with the adapter in the run's directory. Every rank must call it, before `layer_specs`.

    Where there is a checkpoint, that has the weights.

    Raises:
        UserError: on every rank: the adapter is not there, or does not fit.
    """
    if run_dir.checkpoint is not None:
        return
    place = run_dir.path / START
    on_main(lambda: _check_there(place / ADAPTER_WEIGHTS))
    check_seen({f"the run directory {run_dir.path}": place / ADAPTER_WEIGHTS}, processes)
    on_every_rank(lambda: model.start_from(place))


def _check_there(file: Path) -> None:
    if not file.is_file():
        raise UserError(
            f"{file}: is not there, and the run has no checkpoint either: it was begun without a solved adapter; start a new run"
        )


def _free_tag(directory: Path, name: str | None) -> str | None:
    """The run's name; runs of other places may have begun in the same second."""
    if name is None:
        return None
    tags = (name, *(f"{name}-{number}" for number in range(2, 1000)))
    return next(tag for tag in tags if not (directory / tag).exists())
