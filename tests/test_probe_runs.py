"""Probes after each epoch's save as a person runs them: reports, verdicts, stops, and no trace in training."""

import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.helpers.probes import (
    EXITING,
    HANGING,
    KILLED,
    REPORTING,
    is_alive,
    own_children,
    read_pids,
    until,
    write_probe,
)
from tests.helpers.workspace import ROOT, Workspace, environment, make_workspace
from utils import probe_runner
from utils.metrics import read_metrics
from utils.probe_outcomes import ProbeOutcome, read_outcomes
from utils.probe_runner import ProbeRunner
from utils.report_summary import read_summary

TOOL = "lora_delta_budget"
WORKER = ROOT / "tests" / "workers" / "probed_train.py"
LORA = ("epochs=3", "adapter.dropout=0.2", "uncond_fraction=0.3")
TIME_LIMIT_SECONDS = 240


@pytest.fixture
def workspace(tmp_path, tiny_ti2v, tiny_dataset, monkeypatch) -> Workspace:
    monkeypatch.chdir(tmp_path)
    return make_workspace(tmp_path, tiny_ti2v, tiny_dataset)


@pytest.fixture
def scripts(tmp_path, monkeypatch) -> Path:
    """A directory for probes that stands in the place of the real one, in this process."""
    monkeypatch.setattr(probe_runner, "SCRIPTS_DIR", tmp_path / "scripts")
    return tmp_path / "scripts"


@pytest.fixture
def waiting(monkeypatch) -> None:
    """The loop waits for outcomes after every step: tiny steps are shorter than a probe."""
    poll: Callable[[ProbeRunner], list[ProbeOutcome]] = ProbeRunner.poll

    def wait_and_poll(runner: ProbeRunner) -> list[ProbeOutcome]:
        runner.wait(60)
        return poll(runner)

    monkeypatch.setattr(ProbeRunner, "poll", wait_and_poll)


def probes(workspace: Workspace, *more: str) -> tuple[str, ...]:
    return (f'probes.run=["{TOOL}"]', f"probes.reports_dir={workspace.root / 'reports'}", *more)


def steps_of(run: Path) -> list[tuple[int, float, float]]:
    return [(row["step"], row["loss"], row["grad_norm"]) for row in read_metrics(run)]


def check_same_training(run: Path, other: Path) -> None:
    """Bit for bit."""
    assert steps_of(run) == steps_of(other)
    files = sorted(path.relative_to(run) for path in run.glob("epoch*/*.safetensors"))
    assert len(files) == 3
    for name in files:
        tensors, others = load_file(run / name), load_file(other / name)
        assert tensors.keys() == others.keys()
        assert all(torch.equal(tensors[key], others[key]) for key in tensors)


def test_every_epoch_has_its_report_and_its_verdict(workspace, waiting, capsys) -> None:
    """The real probe, on what the run has really saved."""
    assert workspace.train("dit_lora", *LORA, *probes(workspace)) == 0
    said, run = capsys.readouterr().err, workspace.run()
    rows = read_outcomes(run)
    assert [(row["epoch"], row["result"]) for row in rows] == [(1, "pass"), (2, "pass"), (3, "pass")]
    for row in rows:
        report = workspace.root / "reports" / TOOL / f"{run.name}_epoch{row['epoch']}"
        assert row["report"] == str(report)
        summary = read_summary(report)
        assert (summary.verdict, summary.run_tag) == ("pass", report.name)
        adapter = summary.inputs[0]
        assert adapter.path == f"out/{run.name}/epoch{row['epoch']}/adapter_model.safetensors"
        assert (
            said.count(f"{TOOL} on epoch{row['epoch']}: pass: All 8 modules") == 2
        )  # when it is known, at the end
    steps = {row["epoch"]: row["step"] for row in rows}
    in_metrics = {row["step"]: row["probes"] for row in read_metrics(run) if "probes" in row}
    # The last one is known after the last step, which has been written down by then.
    assert in_metrics == {
        steps[epoch]
        + 1: [{"tool": TOOL, "epoch": epoch, "result": "pass", "report": rows[epoch - 1]["report"]}]
        for epoch in (1, 2)
    }
    assert f"probes {TOOL} pass (epoch 2)" in said and "waiting for probes" in said
    events = EventAccumulator(str(run)).Reload()
    largest = {event.step: event.value for event in events.Scalars(f"probes/{TOOL}/max_ratio")}
    assert largest == pytest.approx(
        {row["step"]: read_summary(Path(row["report"])).metrics["max_ratio"] for row in rows}
    )
    assert [event.value for event in events.Scalars(f"probes/{TOOL}/verdict")] == [1.0, 1.0, 1.0]
    assert not workspace.leftovers() and not list(own_children())


@pytest.mark.parametrize(
    "source",
    [pytest.param(EXITING, id="status 70"), pytest.param(KILLED, id="SIGKILL", marks=pytest.mark.long)],
)
def test_a_probe_that_crashes_leaves_no_trace_in_training(
    source, workspace, scripts, waiting, capsys
) -> None:
    write_probe(scripts, source, status=70)
    assert workspace.train("dit_lora", *LORA) == 0
    capsys.readouterr()
    assert workspace.train("dit_lora", *LORA, *probes(workspace, "probes.on_fail=stop")) == 0
    without, with_them = workspace.runs()
    check_same_training(with_them, without)
    assert [row["result"] for row in read_outcomes(with_them)] == ["error"] * 3
    said = capsys.readouterr().err
    assert said.count(f"warning: probe {TOOL} on epoch1: error") == 1 and "Traceback" not in said
    # Its own files apart, the directory is that of a run without probes.
    names = [
        {path.relative_to(run).as_posix() for path in run.rglob("*") if "tfevents" not in path.name}
        for run in (without, with_them)
    ]
    assert names[1] - names[0] == {"probes.jsonl"} and not names[0] - names[1]


def test_a_probe_that_hangs_is_cut_off(workspace, scripts, tmp_path, capsys) -> None:
    write_probe(scripts, HANGING, pids=str(tmp_path / "pids"))
    settings = ("epochs=1", *probes(workspace, f"probes.timeout_minutes={2 / 60}"))
    assert workspace.train("dit_lora", *settings) == 0
    assert [row["result"] for row in read_outcomes(workspace.run())] == ["timeout"]
    assert "cut off after 0.0333333 minutes" in capsys.readouterr().err
    assert not any(map(is_alive, read_pids(tmp_path / "pids"))) and not list(own_children())


def test_a_verdict_of_fail_warns(workspace, scripts, waiting, capsys) -> None:
    write_probe(scripts, REPORTING, verdict="fail")
    assert workspace.train("dit_lora", *LORA, *probes(workspace)) == 0
    said = capsys.readouterr().err
    assert f"warning: probe {TOOL} on epoch1: fail: because of the test" in said and "\ndone: " in said


def test_a_verdict_of_fail_stops_and_the_run_can_go_on(workspace, scripts, waiting, capsys) -> None:
    write_probe(scripts, REPORTING, verdict="fail")
    settings = (*LORA, *probes(workspace))
    # No checkpoint but the one that is written because of the stop.
    stop = ("probes.on_fail=stop", "checkpoint_every_n_epochs=0")
    assert workspace.train("dit_lora", *settings, *stop) == 1
    said, run = capsys.readouterr().err, workspace.run()
    (row,) = read_outcomes(run)
    step = row["step"] + 2  # known after the next step, and all ranks hear of it in the one behind that
    assert [path.name for path in run.glob("global_step*")] == [f"global_step{step}"]
    assert steps_of(run)[-1][0] == step
    assert f"stopped by the probe {TOOL} (epoch1) after step {step} of " in said
    (last,) = [line for line in said.splitlines() if line.startswith("stopped: ")]
    for part in (f"{TOOL} on epoch1: fail", row["report"], "--set probes.on_fail=warn", str(run)):
        assert part in last
    flags = ["--resume_from_checkpoint"]
    assert workspace.train("dit_lora", *settings, "probes.on_fail=warn", flags=flags) == 0
    assert [(row["epoch"], row["result"]) for row in read_outcomes(run)] == [
        (1, "fail"),
        (2, "fail"),
        (3, "fail"),
    ]
    capsys.readouterr()
    assert workspace.train("dit_lora", *LORA) == 0
    check_same_training(run, workspace.runs()[1])


def test_a_failure_after_the_last_step_makes_the_exit_status(workspace, scripts, capsys) -> None:
    write_probe(scripts, REPORTING, verdict="fail")
    settings = ("epochs=1", *probes(workspace, "probes.on_fail=stop"))
    assert workspace.train("dit_lora", *settings) == 1
    said = capsys.readouterr().err
    assert "\ndone: " in said and "Training itself is complete" in said


@pytest.mark.long
def test_who_stops_the_run_does_not_wait_for_its_probes(workspace, scripts, tmp_path, request) -> None:
    """SIGTERM to a training whose probe hangs, as its own process."""
    write_probe(scripts, HANGING, pids=str(tmp_path / "pids"))
    job = start(workspace, scripts, "epochs=100000")
    request.addfinalizer(job.kill)  # whatever happens, it does not go on for ever
    processes = read_pids(tmp_path / "pids")
    job.send_signal(signal.SIGTERM)
    said, _ = job.communicate(timeout=60)
    assert job.returncode == 0, said
    assert "stopped by SIGTERM" in said and "stopped: the run ended before it; by hand: python" in said
    assert not any(map(is_alive, processes))


@pytest.mark.long
def test_a_killed_training_takes_its_probe_along(workspace, scripts, tmp_path, request) -> None:
    write_probe(scripts, HANGING, pids=str(tmp_path / "pids"))
    job = start(workspace, scripts, "epochs=100000")
    request.addfinalizer(job.kill)
    processes = read_pids(tmp_path / "pids")
    job.kill()
    job.wait()
    until(lambda: not any(map(is_alive, processes)), 20)


def start(workspace: Workspace, scripts: Path, *settings: str) -> "subprocess.Popen[str]":
    command = workspace.command(["python"], "dit_lora", *settings, *probes(workspace))
    command[command.index(str(ROOT / "train.py"))] = str(WORKER)
    variables = {"PROBE_SCRIPTS": str(scripts), "WAIT_FOR_PROBES": "0"}
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=workspace.root,
        env=environment() | variables,
        start_new_session=True,
    )


@pytest.mark.long
@pytest.mark.parametrize("stages", [2, 1])
@pytest.mark.parametrize("verdict", ["fail", "pass"])
def test_two_processes_stop_together_or_end_together(stages, verdict, workspace, scripts) -> None:
    write_probe(scripts, REPORTING, verdict=verdict)
    layout = (f"pipeline_stages={stages}", f"gradient_accumulation_steps={stages}", "timeout_minutes=1")
    settings = ("epochs=2", *layout, *probes(workspace, "probes.on_fail=stop"))
    command = workspace.command(["torchrun", "--standalone", "--nproc_per_node", "2"], "dit_lora", *settings)
    command[command.index(str(ROOT / "train.py"))] = str(WORKER)
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        cwd=workspace.root,
        env=environment() | {"PROBE_SCRIPTS": str(scripts)},
        timeout=TIME_LIMIT_SECONDS,
    )
    said, run = done.stderr, workspace.run()
    results = [row["result"] for row in read_outcomes(run)]
    assert 'Traceback (most recent call last):\n  File "' + str(ROOT / "train.py") not in said
    if verdict == "pass":
        assert done.returncode == 0 and results == ["pass", "pass"], said
        return
    assert done.returncode == 1 and results == ["fail"], said
    assert said.count("stopped by the probe") == 1 and said.count("stopped: probes.on_fail") == 1
    assert len(list(run.glob("global_step*"))) == 2  # of the epoch, and of the stop


def test_a_misspelt_probe_is_refused_before_anything_is_loaded(workspace, capsys) -> None:
    assert workspace.train("dit_lora", 'probes.run=["lora_delta_bugdet"]') == 2
    said = capsys.readouterr().err
    assert 'probes.run[0]: there is no probe "lora_delta_bugdet"' in said
    assert 'did you mean "lora_delta_budget"?' in said and not workspace.runs()


def test_the_encoder_mode_hands_its_save_to_te_eval(workspace, scripts, waiting) -> None:
    source = (
        "import json, pathlib, sys\npathlib.Path({out!r}).write_text(json.dumps(sys.argv[1:]))\nsys.exit(3)\n"
    )
    write_probe(scripts, source, "te_eval", out=str(workspace.root / "flags"))
    settings = ('probes.run=["te_eval"]', f"probes.reports_dir={workspace.root / 'reports'}")
    assert workspace.train("encoder_ft", "max_steps=1", *settings) == 0
    run = workspace.run()
    flags = (workspace.root / "flags").read_text()
    assert f'"--text_encoder", "{run}/epoch1"' in flags and f'"--config", "{run}/config.toml"' in flags
    assert (run / "epoch1" / "text_encoder.safetensors").is_file()
