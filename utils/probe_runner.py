"""Probes that look at what a run has just saved, while it goes on: one at a time, in processes of their own.

Nothing that becomes of a probe disturbs training: it has a time limit and low priority, sees no GPU (but for a grid whose
`samples.device` asks for one), and ends with the training however that ends (`utils.probe_supervisor`). The loop asks
between steps what has come of them, which never waits. Outcomes go to `probes.jsonl` in the run directory; the reports are the probes' own.
"""

import json
import os
import re
import shlex
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils.errors import EXIT_FAILED, EXIT_INCONCLUSIVE, EXIT_OK, UserError
from utils.probe_outcomes import ProbeOutcome, Result, append_outcome, keep_outcomes
from utils.probe_plan import PlannedProbe, repeated, report_tag
from utils.report_summary import Summary, read_summary
from utils.run_dir import CONFIG_FILE

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS_DIR = ROOT / "scripts" / "diagnostics"
Say = Callable[[str], None]
Scalars = Callable[[Mapping[str, float], int], None]
Picture = Callable[[str, Path, int], None]

_RESULTS: dict[int, Result] = {EXIT_OK: "pass", EXIT_FAILED: "fail", EXIT_INCONCLUSIVE: "inconclusive"}
_NUMBERS: dict[str, float] = {"pass": 1.0, "inconclusive": 0.5, "fail": 0.0}
# Saves that wait while the probes of an earlier one run.
_MAX_SAVES_WAITING = 2
# To take leave: the grace that the supervisor gives a probe, and a little more.
_LEAVE_SECONDS = 10.0
_SAID_LINES = 5
_SAID_CHARACTERS = 1000
_LOOK_SECONDS = 0.1
# What launchers tell their processes: a probe belongs to no group and must not look for one.
_LAUNCHER_VARIABLES = re.compile(
    r"(RANK|WORLD_SIZE|LOCAL_\w+|GROUP_\w+|ROLE_\w+|CROSS_\w+|NODE_RANK|MASTER_\w+|TORCHELASTIC_\w+|PET_\w+|"
    r"OMPI_\w+|PMIX?_\w+|MV2_\w+)"
)


@dataclass(frozen=True)
class ProbeJob:
    """One probe of one save: `directory` was saved at the end of `epoch`, at `step`."""

    probe: PlannedProbe
    epoch: int
    step: int
    directory: Path

    @property
    def tool(self) -> str:
        """The name of the probe."""
        return self.probe.tool

    def __str__(self) -> str:
        return f"{self.tool} on {self.directory.name}"


@dataclass(frozen=True)
class _Running:
    job: ProbeJob
    report: Path
    process: "subprocess.Popen[bytes]"


def check_scripts(planned: Sequence[PlannedProbe], scripts_dir: Path | None = None) -> None:
    """Every probe that is planned has its script here.

    Raises:
        UserError: one has not, which could only be found out after the first epoch.
    """
    for probe in planned:
        script = (scripts_dir or SCRIPTS_DIR) / f"{probe.tool}.py"
        if not script.is_file():
            raise UserError(
                f"{probe.section} asks for {probe.tool}, and there is no {script}; take it out of the config"
            )


class ProbeRunner:
    """The probes of one process of a run, on rank 0. A context: on leaving it nothing goes on.

    No method raises because of a probe, or because an outcome cannot be written down: then there is a warning.
    """

    def __init__(
        self,
        planned: Sequence[PlannedProbe],
        run_dir: Path,
        step: int,
        say: Say,
        scalars: Scalars = lambda numbers, step: None,
        scripts_dir: Path | None = None,
        picture: Picture = lambda name, path, step: None,
    ) -> None:
        """Begin with the outcomes of an earlier process up to `step`; what it saved later is saved, and probed, again.

        Args:
            planned: the probes, in the order in which they look at a save.
            run_dir: of the run.
            step: optimizer steps done.
            say: prints a line.
            scalars: takes numbers for TensorBoard, and their step.
            scripts_dir: where the probes' scripts are, if not where they usually are.
            picture: takes the name of a picture for TensorBoard, its PNG file, and its step.
        """
        self._planned = planned
        self._run_dir = run_dir
        self._say = say
        self._scalars = scalars
        self._picture = picture
        self._scripts_dir = scripts_dir or SCRIPTS_DIR
        self._waiting: deque[ProbeJob] = deque()
        self._running: _Running | None = None
        self._news: list[ProbeOutcome] = []
        self._newest: dict[str, ProbeOutcome] = {}
        self.failed: ProbeOutcome | None = None
        self._try("kept", lambda: keep_outcomes(run_dir, step))

    def __enter__(self) -> "ProbeRunner":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def is_busy(self) -> bool:
        """Whether a probe runs or waits."""
        return self._running is not None or bool(self._waiting)

    def saved(self, directory: Path, epoch: int, step: int, *, at_end: bool) -> None:
        """Take note that `directory` is complete: the probes that are due run when those before them have ended."""
        due = [probe for probe in self._planned if probe.is_due(epoch, at_end=at_end)]
        if not due:
            return
        saves = list(dict.fromkeys(job.directory for job in self._waiting))
        if len(saves) >= _MAX_SAVES_WAITING:  # the newest weights are those that a verdict is wanted of
            for job in [job for job in self._waiting if job.directory == saves[0]]:
                self._waiting.remove(job)
                why = f"the probes of earlier saves took too long; give {job.probe.section} a larger every_n_epochs"
                self._finish(job, "skipped", why)
        self._waiting += [ProbeJob(probe, epoch, step, directory) for probe in due]
        self._start_next()

    def poll(self) -> list[ProbeOutcome]:
        """What has become known since the last call. Starts what waits; never waits itself."""
        self._look()
        news, self._news = self._news, []
        return news

    def wait(self, seconds: float) -> bool:
        """Wait so long, or until no probe is left; returns whether one is."""
        deadline = time.monotonic() + seconds
        while self.is_busy and time.monotonic() < deadline:
            time.sleep(_LOOK_SECONDS)
            self._look()
        return self.is_busy

    def stop(self) -> None:
        """End what runs and drop what waits, saying how to make up for it. Afterwards no process is left."""
        running, self._running = self._running, None
        if running is not None:
            if running.process.poll() is None:
                running.process.terminate()
                try:
                    running.process.wait(_LEAVE_SECONDS)
                except subprocess.TimeoutExpired:
                    running.process.kill()  # the kernel kills its probe with it
                    running.process.wait()
            self._judge(running, is_stopped=True)
        while self._waiting:
            job = self._waiting.popleft()
            self._finish(job, "stopped", f"the run ended before it; {self._by_hand(job)}")

    def status(self) -> str:
        """The newest outcome of each probe, and what runs, for the progress line; empty where there is neither."""
        parts = [
            f"{tool} {self._newest[tool].result} (epoch {self._newest[tool].epoch})" for tool in self._newest
        ]
        if self._running is not None:
            parts.append(f"{self._running.job.tool} runs (epoch {self._running.job.epoch})")
        return ", ".join(parts)

    def describe_wait(self) -> str:
        """What the end of the run waits for."""
        jobs = [*([] if self._running is None else [self._running.job]), *self._waiting]
        names = ", ".join(map(str, jobs))
        limits = sorted({job.probe.timeout_minutes for job in jobs})
        most = " or ".join(f"{limit:g}" for limit in limits)
        return f"training is complete; waiting for probes: {names} (each at most {most} minutes; Ctrl-C ends the waiting)"

    # ------------------------------------------------------------------ one probe

    def _look(self) -> None:
        running = self._running
        if running is not None and running.process.poll() is not None:
            self._running = None
            self._judge(running)
        self._start_next()

    def _start_next(self) -> None:
        if self._running is not None or not self._waiting:
            return
        job = self._waiting.popleft()
        supervisor = [sys.executable, "-I", "-S", str(ROOT / "utils" / "probe_supervisor.py")]
        limit = [repr(60 * job.probe.timeout_minutes), str(os.getpid())]
        try:
            # Raises too where the reports' directory cannot be looked into.
            report = self._free_report(job)
            process = subprocess.Popen(
                [*supervisor, *limit, *self._command(job, report.name)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env=probe_environment(os.environ, sees_gpus=job.probe.sees_gpus),
                start_new_session=True,  # a signal to the training's group is for the training, which then ends it
            )
        except OSError as error:
            self._finish(job, "error", f"could not be started ({error.strerror}); {self._by_hand(job)}")
            return
        self._running = _Running(job, report, process)

    def _command(self, job: ProbeJob, run_tag: str) -> list[str]:
        return [
            sys.executable,
            str(self._scripts_dir / f"{job.tool}.py"),
            *("--config", str(self._run_dir / CONFIG_FILE)),
            *job.probe.words(job.directory),
            *("--run_tag", run_tag),
            *("--reports_dir", job.probe.reports_dir),
        ]

    def _free_report(self, job: ProbeJob) -> Path:
        """`<run>_epochN`; a number behind it where an earlier process of the run has probed that epoch."""
        folder = Path(job.probe.reports_dir) / job.tool
        tag, number = report_tag(self._run_dir, f"epoch{job.epoch}"), 1
        while (folder / repeated(tag, number)).exists():
            number += 1
        return folder / repeated(tag, number)

    def _judge(self, running: _Running, *, is_stopped: bool = False) -> None:
        """Make an outcome of what the supervisor tells and what report there is; it says nothing where it was killed."""
        job = running.job
        assert running.process.stdout is not None
        with running.process.stdout as pipe:
            told = _parse(pipe.read(), is_stopped=is_stopped)
        seconds = told["seconds"]
        if told["ended_by"] == "request":
            self._finish(job, "stopped", f"the run ended before it; {self._by_hand(job)}", seconds=seconds)
            return
        if told["ended_by"] == "time limit":
            limit = f"cut off after {job.probe.timeout_minutes:g} minutes"
            self._finish(
                job, "timeout", f"{limit}{_quoted(told['said'])}; {self._by_hand(job)}", seconds=seconds
            )
            return
        result = _RESULTS.get(told["status"])
        summary = _summary(running.report) if result is not None else None
        if result is None or summary is None or summary.verdict != result:
            end = _describe_end(told["status"], has_verdict=result is not None)
            self._finish(job, "error", f"{end}{_quoted(told['said'])}; {self._by_hand(job)}", seconds=seconds)
            return
        self._finish(job, result, summary.explanation, str(running.report), seconds, summary.metrics)

    def _finish(
        self,
        job: ProbeJob,
        result: Result,
        explanation: str,
        report: str | None = None,
        seconds: float = 0.0,
        metrics: Mapping[str, Any] | None = None,
    ) -> None:
        outcome = ProbeOutcome(job.tool, job.epoch, job.step, result, explanation, report, seconds)
        self._news.append(outcome)
        self._newest[job.tool] = outcome
        if result == "fail" and job.probe.can_stop and self.failed is None:
            self.failed = outcome
        self._say(f"{'' if result == 'pass' else 'warning: '}probe {outcome}")
        self._try("written down", lambda: append_outcome(self._run_dir, outcome))
        numbers = _scalar_metrics(metrics or {}, job.probe.column)
        if result in _NUMBERS:
            numbers["verdict"] = _NUMBERS[result]
        named = {f"{job.probe.group}/{name}": value for name, value in numbers.items()}
        self._try("shown in TensorBoard", lambda: self._scalars(named, job.step))
        if report is not None and job.probe.picture is not None:
            file, name = job.probe.picture
            path = Path(report) / file
            self._try(
                "shown in TensorBoard",
                lambda: self._picture(f"{job.probe.group}/{name}", path, job.step),
            )

    def _by_hand(self, job: ProbeJob) -> str:
        script = os.path.relpath(self._scripts_dir / f"{job.tool}.py")
        words = [script, "--config", str(self._run_dir / CONFIG_FILE), *job.probe.words(job.directory)]
        if job.probe.picture is not None:  # other reports look for it there
            tag = report_tag(self._run_dir, f"epoch{job.epoch}")
            words += ["--run_tag", tag, "--reports_dir", job.probe.reports_dir]
        return f"by hand: python {shlex.join(words)}"

    def _try(self, what: str, write: Callable[[], None]) -> None:
        try:
            write()
        except (OSError, UserError) as error:
            self._say(f"warning: outcomes of probes cannot be {what}: {error}")


def probe_environment(environment: Mapping[str, str], *, sees_gpus: bool = False) -> dict[str, str]:
    """The environment of a probe: no launcher, few threads, the project's modules to be found, and as a rule no GPU."""
    kept = {key: value for key, value in environment.items() if not _LAUNCHER_VARIABLES.fullmatch(key)}
    paths = [str(ROOT), *filter(None, [environment.get("PYTHONPATH")])]
    threads = str(max(1, min(4, (os.cpu_count() or 1) // 4)))
    own = {
        "PYTHONPATH": os.pathsep.join(paths),
        "PYTHONUNBUFFERED": "1",  # so that what it said last is known where it is cut off
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        "OPENBLAS_NUM_THREADS": threads,
    }
    return kept | own | ({} if sees_gpus else {"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""})


def _parse(told: bytes, *, is_stopped: bool) -> dict[str, Any]:
    try:
        return dict(json.loads(told))
    except ValueError:
        ended_by = "request" if is_stopped else "itself"
        return {"status": None, "ended_by": ended_by, "seconds": 0.0, "said": "its supervisor was killed"}


def _summary(report: Path) -> Summary | None:
    try:
        return read_summary(report)
    except (OSError, UserError):
        return None


def _describe_end(status: int | None, *, has_verdict: bool) -> str:
    if status is None:
        return "could not be started"
    if status < 0:
        return f"was killed by signal {-status}"
    if has_verdict:
        return f"ended with status {status} and left no report that says so"
    return f"ended with status {status} and gave no verdict"


def _quoted(said: str) -> str:
    lines = [" ".join(line.split()) for line in said.splitlines() if line.strip()]
    text = " | ".join(lines[-_SAID_LINES:])[-_SAID_CHARACTERS:]
    return f', saying "{text}"' if text else ""


def _scalar_metrics(metrics: Mapping[str, Any], column: str | None) -> dict[str, float]:
    """The metrics that are one number, also those that are one for each column."""
    single = {
        name: value[column] if isinstance(value, Mapping) and column in value else value
        for name, value in metrics.items()
    }
    return {
        name: float(value)
        for name, value in single.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool)
    }
