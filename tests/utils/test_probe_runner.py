"""The queue of probes after saves: order, bounds, outcomes, and that nothing a probe does gets out of it."""

import io
import json
import time
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.helpers.probes import (
    DRAWING,
    EXITING,
    HANGING,
    KILLED,
    REPORTING,
    is_alive,
    own_children,
    read_pids,
    write_probe,
)
from utils import probe_runner
from utils.config.probe_rules import TRAINING_PROBES
from utils.config.schema import ProbesConfig, SamplesConfig
from utils.errors import UserError
from utils.metrics import append_line
from utils.probe_outcomes import PROBES_FILE, ProbeOutcome, append_outcome, describe_outcomes, read_outcomes
from utils.probe_plan import grid_probe, measuring_probes
from utils.probe_runner import ProbeRunner, check_scripts, probe_environment
from utils.report_summary import read_summary

TOOL = "lora_delta_budget"


class Place:
    """A run directory, reports and scripts; `said` and `numbers` hold what the runner tells."""

    def __init__(self, root: Path) -> None:
        self.run = root / "output" / "20310101_120000"
        self.run.mkdir(parents=True)
        (self.run / "config.toml").write_text("# of the run\n")
        self.reports, self.scripts = root / "reports", root / "scripts"
        self.said: list[str] = []
        self.numbers: list[tuple[dict, int]] = []

    def save(self, epoch: int) -> Path:
        directory = self.run / f"epoch{epoch}"
        directory.mkdir()
        (directory / "adapter_model.safetensors").write_bytes(b"weights")
        return directory

    def runner(self, step: int = 0, **settings: object) -> ProbeRunner:
        config = ProbesConfig(**({"run": (TOOL,), "reports_dir": str(self.reports)} | settings))
        return ProbeRunner(
            measuring_probes(config),
            self.run,
            step,
            self.said.append,
            self.scalars,
            self.scripts,
        )

    def scalars(self, numbers: Mapping[str, float], step: int) -> None:
        self.numbers.append((dict(numbers), step))

    def outcomes(self) -> list[tuple[str, int, str]]:
        return [(row["tool"], row["epoch"], row["result"]) for row in read_outcomes(self.run)]


@pytest.fixture
def place(tmp_path) -> Place:
    return Place(tmp_path)


def test_a_verdict_is_that_of_the_report(place) -> None:
    write_probe(place.scripts, REPORTING, verdict="inconclusive")
    with place.runner() as runner:
        runner.saved(place.save(3), 3, 30, at_end=False)
        assert runner.status() == f"{TOOL} runs (epoch 3)" and runner.poll() == []
        assert not runner.wait(30)
        (outcome,) = runner.poll()
        assert runner.poll() == [] and not runner.is_busy and runner.failed is None
        assert runner.status() == f"{TOOL} inconclusive (epoch 3)"
    assert (outcome.result, outcome.explanation, outcome.step) == ("inconclusive", "because of the test.", 30)
    report = place.reports / TOOL / "20310101_120000_epoch3"
    assert outcome.report == str(report)
    assert [Path(entry.path).parts[-2:] for entry in read_summary(report).inputs] == [
        ("20310101_120000", "config.toml"),
        ("epoch3", "adapter_model.safetensors"),
    ]
    (row,) = read_outcomes(place.run)
    assert row["result"] == "inconclusive" and row["seconds"] > 0
    assert place.numbers == [({f"probes/{TOOL}/size": 2.5, f"probes/{TOOL}/verdict": 0.5}, 30)]
    assert place.said == [f"warning: probe {outcome}"]
    assert describe_outcomes([row]) == [f"probe {outcome}"]


def test_it_fails_once_and_for_all(place) -> None:
    write_probe(place.scripts, REPORTING, verdict="fail")
    with place.runner(on_fail="stop") as runner:
        runner.saved(place.save(1), 1, 10, at_end=False)
        runner.wait(30)
        write_probe(place.scripts, REPORTING)
        runner.saved(place.save(2), 2, 20, at_end=False)
        runner.wait(30)
        assert runner.failed is not None and runner.failed.epoch == 1
    assert place.outcomes() == [(TOOL, 1, "fail"), (TOOL, 2, "pass")]
    assert [numbers[f"probes/{TOOL}/verdict"] for numbers, _ in place.numbers] == [0.0, 1.0]


@pytest.mark.parametrize(
    ("source", "values", "words"),
    [
        (
            EXITING,
            {"status": 70},
            'ended with status 70 and gave no verdict, saying "no room for the tensors"',
        ),
        (EXITING, {"status": 2}, "ended with status 2 and gave no verdict"),
        (EXITING, {"status": 0}, "ended with status 0 and left no report that says so"),
        (EXITING, {"status": 1}, "ended with status 1 and left no report that says so"),
        (KILLED, {}, "was killed by signal 9"),
        ("this is no Python", {}, "SyntaxError"),
    ],
)
def test_without_a_report_there_is_no_verdict(place, source, values, words) -> None:
    write_probe(place.scripts, source, **values)
    with place.runner(on_fail="stop") as runner:
        runner.saved(place.save(1), 1, 10, at_end=False)
        runner.wait(30)
        (outcome,) = runner.poll()
        assert outcome.result == "error" and words in outcome.explanation and runner.failed is None
        by_hand = f"--config {place.run}/config.toml --adapter {place.run}/epoch1"
        assert by_hand in outcome.explanation
    assert not list(own_children())


def test_an_exit_status_that_its_report_denies_is_no_verdict(place) -> None:
    path = write_probe(place.scripts, REPORTING, verdict="fail")
    path.write_text(path.read_text().replace('"fail": 1', '"fail": 0'))
    with place.runner() as runner:
        runner.saved(place.save(1), 1, 10, at_end=False)
        runner.wait(30)
    assert place.outcomes() == [(TOOL, 1, "error")] and runner.failed is None


def test_a_probe_that_hangs_is_cut_off_and_the_next_one_has_its_turn(place, tmp_path) -> None:
    write_probe(place.scripts, HANGING, pids=str(tmp_path / "pids"))
    write_probe(place.scripts, REPORTING, "attn_logit_probe")
    with place.runner(run=(TOOL, "attn_logit_probe"), timeout_minutes=2 / 60) as runner:
        runner.saved(place.save(1), 1, 10, at_end=False)
        processes = read_pids(tmp_path / "pids")
        assert not runner.wait(40)
    assert place.outcomes() == [(TOOL, 1, "timeout"), ("attn_logit_probe", 1, "pass")]
    assert "cut off after 0.0333333 minutes" in place.said[0] and "still at it" in place.said[0]
    assert not any(map(is_alive, processes))


def test_leaving_ends_what_runs_and_says_how_to_make_up_for_it(place, tmp_path) -> None:
    write_probe(place.scripts, HANGING, pids=str(tmp_path / "pids"))
    with place.runner(run=(TOOL, "attn_logit_probe")) as runner:
        runner.saved(place.save(1), 1, 10, at_end=False)
        processes = read_pids(tmp_path / "pids")
    assert not any(map(is_alive, processes)) and not list(own_children())
    assert place.outcomes() == [(TOOL, 1, "stopped"), ("attn_logit_probe", 1, "stopped")]
    assert all("by hand: python" in line for line in place.said)


def test_leaving_at_the_moment_of_starting_leaves_nothing(place, tmp_path) -> None:
    """The supervisor may not be ready to hear yet."""
    write_probe(place.scripts, HANGING, pids=str(tmp_path / "pids"))
    for epoch in range(1, 4):
        with place.runner(step=10) as runner:
            runner.saved(place.save(epoch), epoch, 10, at_end=False)
            time.sleep(0.02 * (epoch - 1))
    assert place.outcomes() == [(TOOL, epoch, "stopped") for epoch in range(1, 4)]
    assert not list(own_children())


def test_one_at_a_time_and_the_newest_saves_wait(place, tmp_path) -> None:
    write_probe(place.scripts, HANGING, pids=str(tmp_path / "pids"))
    with place.runner(run=(TOOL, "attn_logit_probe")) as runner:
        for epoch in range(1, 5):
            runner.saved(place.save(epoch), epoch, 10 * epoch, at_end=False)
            runner.poll()
        read_pids(tmp_path / "pids")
        assert len(runner._waiting) == 4
        scripts = [argument for argument in _command_lines() if "scripts" in argument]
        assert scripts == [str(place.scripts / f"{TOOL}.py")]
    skipped = [row for row in place.outcomes() if row[2] == "skipped"]
    assert skipped == [
        ("attn_logit_probe", 1, "skipped"),
        (TOOL, 2, "skipped"),
        ("attn_logit_probe", 2, "skipped"),
    ]
    assert "larger every_n_epochs" in place.said[0]


def _command_lines() -> list[str]:
    import psutil

    supervisors = [psutil.Process(pid) for pid in own_children()]
    probes = [process for process in supervisors if "-I" not in process.cmdline()]
    return [argument for process in probes for argument in process.cmdline()]


@pytest.mark.parametrize(
    ("epoch", "at_end", "is_due"), [(1, False, False), (2, False, True), (3, True, True), (4, False, True)]
)
def test_which_saves_are_due(place, epoch, at_end, is_due) -> None:
    write_probe(place.scripts, REPORTING)
    with place.runner(every_n_epochs=2) as runner:
        runner.saved(place.save(epoch), epoch, 10, at_end=at_end)
        assert runner.is_busy == is_due


def test_a_report_that_exists_is_left_alone(place) -> None:
    write_probe(place.scripts, REPORTING)
    directory = place.save(1)
    for _ in range(3):
        with place.runner() as runner:
            runner.saved(directory, 1, 10, at_end=False)
            runner.wait(30)
    names = {path.name for path in (place.reports / TOOL).iterdir()}
    assert names == {"20310101_120000_epoch1", "20310101_120000_epoch1-2", "20310101_120000_epoch1-3"}


@pytest.mark.parametrize("name", ["my run (2)", "-x", ".hidden", "a" * 200, "ü"])
def test_any_name_of_a_run_makes_a_tag(tmp_path, name) -> None:
    place = Place(tmp_path)
    place.run = place.run.rename(place.run.parent / name)
    write_probe(place.scripts, REPORTING)
    with place.runner() as runner:
        runner.saved(place.save(1), 1, 10, at_end=False)
        runner.wait(30)
    assert place.outcomes() == [(TOOL, 1, "pass")]


def test_a_run_that_goes_on_keeps_the_outcomes_up_to_its_checkpoint(place) -> None:
    write_probe(place.scripts, REPORTING)
    with place.runner() as runner:
        for epoch in (1, 2):
            runner.saved(place.save(epoch), epoch, 10 * epoch, at_end=False)
            runner.wait(30)
    with (place.run / PROBES_FILE).open("a") as file:
        file.write('{"step": 3}\n{"torn')
    place.runner(step=15)
    assert place.outcomes() == [(TOOL, 1, "pass")]


def test_a_disk_that_is_full_is_a_warning(place, monkeypatch) -> None:
    def full(run_dir: Path, outcome: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(probe_runner, "append_outcome", full)
    write_probe(place.scripts, REPORTING)
    with place.runner() as runner:
        runner.saved(place.save(1), 1, 10, at_end=False)
        runner.wait(30)
        assert [outcome.result for outcome in runner.poll()] == ["pass"]
    assert any("cannot be written down: [Errno 28]" in line for line in place.said)


def test_no_process_to_be_had_is_an_error_of_the_probe(place, monkeypatch) -> None:
    def none(*_: object, **__: object) -> None:
        raise OSError(11, "Resource temporarily unavailable")

    write_probe(place.scripts, REPORTING)
    monkeypatch.setattr(probe_runner.subprocess, "Popen", none)
    with place.runner() as runner:
        runner.saved(place.save(1), 1, 10, at_end=False)
        assert not runner.is_busy
    assert place.outcomes() == [(TOOL, 1, "error")] and "temporarily unavailable" in place.said[0]


def test_the_environment_has_no_launcher_and_no_gpu(place) -> None:
    launchers = (
        "RANK",
        "LOCAL_RANK",
        "WORLD_SIZE",
        "LOCAL_WORLD_SIZE",
        "MASTER_ADDR",
        "MASTER_PORT",
        "NODE_RANK",
    )
    launchers += (
        "GROUP_RANK",
        "ROLE_RANK",
        "CROSS_RANK",
        "TORCHELASTIC_RUN_ID",
        "OMPI_COMM_WORLD_RANK",
        "PMI_RANK",
    )
    own = {
        "HOME": "/h",
        "FRANK": "1",
        "CUDA_VISIBLE_DEVICES": "0,1",
        "OMP_NUM_THREADS": "64",
        "PYTHONPATH": "/p",
    }
    found = probe_environment(dict.fromkeys(launchers, "1") | own)
    assert not found.keys() & set(launchers)
    assert (found["HOME"], found["FRANK"], found["CUDA_VISIBLE_DEVICES"]) == ("/h", "1", "")
    assert 1 <= int(found["OMP_NUM_THREADS"]) <= 4 and found["PYTHONPATH"].endswith(":/p")

    show = "import json, os, pathlib\npathlib.Path({out!r}).write_text(json.dumps(dict(os.environ)))\n"
    write_probe(place.scripts, show, out=str(place.run / "environment"))
    with pytest.MonkeyPatch.context() as patch, place.runner() as runner:
        for name in launchers:
            patch.setenv(name, "1")
        runner.saved(place.save(1), 1, 10, at_end=False)
        runner.wait(30)
    assert not json.loads((place.run / "environment").read_text()).keys() & set(launchers)


def test_a_torn_line_hides_no_later_outcome(tmp_path, monkeypatch) -> None:
    outcome = ProbeOutcome(TOOL, 1, 1, "pass", "fine")
    append_outcome(tmp_path, outcome)

    class Full(io.FileIO):
        def write(self, data):
            return super().write(data[:10])  # what a disk that is almost full takes

    with Full(tmp_path / PROBES_FILE, "ab") as file, pytest.raises(OSError, match="No space"):
        append_line(file, b'{"tool": "x"}\n')
    append_outcome(tmp_path, ProbeOutcome(TOOL, 2, 2, "fail", "not fine"))
    assert [row["epoch"] for row in read_outcomes(tmp_path)] == [1, 2]


def test_a_reports_directory_that_cannot_be_looked_into_is_an_error_of_the_probe_alone(place) -> None:
    place.reports.mkdir()
    config = ProbesConfig(run=(TOOL,), reports_dir=str(place.reports / ("x" * 300)))
    said: list[str] = []
    with ProbeRunner(
        measuring_probes(config), place.run, 0, said.append, scripts_dir=place.scripts
    ) as runner:
        runner.saved(place.run / "epoch1", 1, 5, at_end=False)
        (outcome,) = runner.poll()
    assert outcome.result == "error" and "could not be started" in outcome.explanation


def test_a_probe_that_has_no_script_is_refused_before_training(place) -> None:
    write_probe(place.scripts, REPORTING)
    check_scripts(measuring_probes(ProbesConfig(run=(TOOL,))), place.scripts)
    with pytest.raises(UserError, match=r"\[probes\] asks for te_eval, and there is no .*te_eval\.py"):
        check_scripts(measuring_probes(ProbesConfig(run=(TOOL, "te_eval"))), place.scripts)


@pytest.mark.parametrize("verdict", ["pass", "fail", "inconclusive"])
def test_a_grid_is_a_probe_whose_picture_is_shown(place, verdict) -> None:
    write_probe(place.scripts, DRAWING, "prompt_grid", verdict=verdict)
    pictures: list[tuple[str, Path, int]] = []

    def show(name: str, path: Path, step: int) -> None:
        pictures.append((name, path, step))
        if not path.is_file():
            raise UserError(f"{path}: cannot be read")

    grid = grid_probe(SamplesConfig(), str(place.reports), "adapter")
    with ProbeRunner([grid], place.run, 0, place.said.append, place.scalars, place.scripts, show) as runner:
        runner.saved(place.save(2), 2, 20, at_end=False)
        runner.wait(30)
        assert runner.failed is None  # its verdict stops nothing
    assert place.outcomes() == [("prompt_grid", 2, verdict)]
    report = place.reports / "prompt_grid" / "20310101_120000_epoch2"
    assert read_summary(report).metrics["words"] == [f"adapter={place.run}/epoch2", "cpu"]
    number = {"pass": 1.0, "fail": 0.0, "inconclusive": 0.5}[verdict]
    assert place.numbers == [({"samples/neutral_change": 0.25, "samples/verdict": number}, 20)]
    assert pictures == [("samples/grid", report / "grid.png", 20)]
    # A picture that cannot be shown is a warning, and no more.
    assert any("cannot be shown in TensorBoard" in line for line in place.said) == (verdict == "inconclusive")


def test_each_has_its_own_limit_and_its_own_epochs(place, tmp_path) -> None:
    write_probe(place.scripts, HANGING, "prompt_grid", pids=str(tmp_path / "pids"))
    write_probe(place.scripts, REPORTING)
    grid = grid_probe(SamplesConfig(every_n_epochs=2, timeout_minutes=1 / 60), str(place.reports), "adapter")
    planned = [grid, *measuring_probes(ProbesConfig(run=(TOOL,), reports_dir=str(place.reports)))]
    with ProbeRunner(planned, place.run, 0, place.said.append, scripts_dir=place.scripts) as runner:
        for epoch in (1, 2):
            runner.saved(place.save(epoch), epoch, 10 * epoch, at_end=False)
        assert "(each at most 0.0166667 or 30 minutes" in runner.describe_wait()
        assert not runner.wait(40)
    assert place.outcomes() == [(TOOL, 1, "pass"), ("prompt_grid", 2, "timeout"), (TOOL, 2, "pass")]
    (said,) = [line for line in place.said if "prompt_grid" in line]
    by_hand = f"prompt_grid.py --config {place.run}/config.toml --run adapter={place.run}/epoch2 --device cpu"
    where = f"--run_tag 20310101_120000_epoch2 --reports_dir {place.reports}"
    assert f"{by_hand} {where}" in said and "cut off after 0.0166667 minutes" in said


def test_a_grid_that_is_to_use_a_gpu_sees_those_of_the_training() -> None:
    own = {"CUDA_VISIBLE_DEVICES": "2,3", "RANK": "0"}
    assert probe_environment(own, sees_gpus=True)["CUDA_VISIBLE_DEVICES"] == "2,3"
    found = probe_environment({}, sees_gpus=True)
    assert "CUDA_VISIBLE_DEVICES" not in found and "HIP_VISIBLE_DEVICES" not in found


def test_the_grid_takes_the_flags_that_it_is_given(run_script) -> None:
    said = run_script("diagnostics/prompt_grid.py", "--help").stdout
    assert all(flag in said for flag in ("--config", "--run ", "--device", "--run_tag", "--reports_dir"))


@pytest.mark.parametrize("tool", TRAINING_PROBES)
def test_each_probe_takes_the_flags_that_it_is_given(tool, run_script) -> None:
    said = run_script(f"diagnostics/{tool}.py", "--help").stdout
    for flag in ("--config", TRAINING_PROBES[tool].flag, "--run_tag", "--reports_dir"):
        assert flag in said
