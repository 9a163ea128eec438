"""What the loop calls about probes, on every rank: rank 0 has the runner, and all hear together what it decides."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from utils.distributed import Processes, gather_objects
from utils.errors import TrainingStoppedError
from utils.metrics import MetricsWriter
from utils.probe_outcomes import rows_of
from utils.probe_plan import PlannedProbe
from utils.probe_runner import ProbeRunner
from utils.progress import announce
from utils.stopping import RunControl

# The ranks meet that often while rank 0 waits for the last probes, so that none waits for another for long.
_MEET_SECONDS = 2.0


class TrainingProbes:
    """The probes of a run (`[probes]`, `[samples]`). Every rank makes the same calls."""

    def __init__(
        self, planned: Sequence[PlannedProbe], processes: Processes, scripts_dir: Path | None = None
    ) -> None:
        """Nothing is started before `begin`; `scripts_dir` is for tests."""
        self._planned = planned
        self._is_main = processes.is_main
        self._scripts_dir = scripts_dir
        self._runner: ProbeRunner | None = None
        self._control: RunControl | None = None

    def begin(self, run_dir: Path, step: int, writer: MetricsWriter | None, control: RunControl) -> None:
        """Before the first step of this process, which goes on from `step`; `writer` is rank 0's."""
        self._control = control
        if not self._is_main:
            return
        assert writer is not None, "the main rank writes the metrics"
        self._runner = ProbeRunner(
            self._planned,
            run_dir,
            step,
            announce,
            writer.write_scalars,
            self._scripts_dir,
            writer.write_picture,
        )

    def after_step(self, row: dict[str, Any]) -> None:
        """Put what has become known into the step's row of metrics; ask for the end of the run where that is wanted."""
        runner = self._runner
        if runner is None:
            return
        news = runner.poll()
        if news:
            row["probes"] = rows_of(news)
        if runner.failed is not None and self._control is not None:
            self._control.stop_for_probe(f"{runner.failed.tool} (epoch{runner.failed.epoch})")

    def figures(self) -> dict[str, str]:
        """For the progress line."""
        status = self._runner.status() if self._runner is not None else ""
        return {"probes": status} if status else {}

    def saved(self, directory: Path, epoch: int, step: int, *, at_end: bool) -> None:
        """A save is complete."""
        if self._runner is not None:
            self._runner.saved(directory, epoch, step, at_end=at_end)

    def at_end(self) -> None:
        """The last step is done and everything saved: wait for the probes that are left, unless told to stop."""
        runner, control = self._runner, self._control
        assert control is not None, "begin has been called"
        if runner is not None and runner.is_busy:
            announce(runner.describe_wait())
        while True:
            is_waiting = runner is not None and runner.wait(_MEET_SECONDS)
            answers = gather_objects((is_waiting, control.is_told_to_stop))
            if not any(waits for waits, _ in answers) or any(told for _, told in answers):
                return

    def close(self) -> None:
        """End what still runs."""
        if self._runner is not None:
            self._runner.stop()

    def raise_if_failed(self, run_dir: Path, *, is_complete: bool) -> None:
        """At the end of the run, on every rank: with on_fail = "stop" a failed probe makes the exit status 1.

        Raises:
            TrainingStoppedError: one has failed.
        """
        if not any(probe.can_stop for probe in self._planned):
            return
        # Also what became known beside another reason to stop, or when the last probes were ended.
        if not any(gather_objects(self._runner is not None and self._runner.failed is not None)):
            return
        failed = self._runner.failed if self._runner is not None else None
        ways = (
            "Training itself is complete and saved: read the report before the files are used"
            if is_complete
            else "Read the report; with other settings, start a new run; to go on all the same, give the same command with "
            f"--resume_from_checkpoint {run_dir} --set probes.on_fail=warn"
        )
        raise TrainingStoppedError(f"probes.on_fail = 'stop', and there is {failed}. {ways}")
