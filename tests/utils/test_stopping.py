"""Requests to save or to stop: signals, files, the clock, and what all ranks together make of them."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from utils import stopping
from utils.stopping import RequestFlags, RunControl, SignalWatch

ROOT = Path(__file__).resolve().parents[2]


def hear(control: RunControl) -> RequestFlags:
    """What a group of one makes of its own flags."""
    flags = control.flags()
    control.hear(flags)
    return flags


def until(condition) -> None:
    deadline = time.monotonic() + 10
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.005)
    assert condition()


@pytest.fixture
def control(tmp_path):
    with RunControl(tmp_path, True, None) as control:
        yield control


def test_nothing_is_asked_for_at_first(control) -> None:
    assert hear(control) == RequestFlags(0, 0, 0, 0, 0)
    assert not control.wants_stop and not control.wants_checkpoint


@pytest.mark.parametrize(("name", "stops"), [("save", False), ("save_quit", True)])
def test_a_file_asks_once_and_goes_when_the_checkpoint_is_there(control, tmp_path, name, stops) -> None:
    (tmp_path / name).touch()
    hear(control)
    assert control.wants_checkpoint and control.wants_stop == stops
    if stops:
        assert control.reason == "the file save_quit"
    control.saving()
    hear(control)
    assert (
        tmp_path / name
    ).exists() and not control.wants_checkpoint  # not asked for a second time meanwhile
    control.saved()
    assert not (tmp_path / name).exists()


def test_a_failed_probe_stops_and_is_named_where_it_is_known(control, tmp_path) -> None:
    control.stop_for_probe("lora_delta_budget (epoch2)")
    assert not control.wants_stop  # before all have heard of it
    assert hear(control) == RequestFlags(probe=1)
    assert control.wants_stop and control.wants_checkpoint and control.wants_stop_for_probe
    assert control.reason == "the probe lora_delta_budget (epoch2)" and not control.is_told_to_stop
    with RunControl(tmp_path, False, None) as other:
        other.hear(RequestFlags(probe=1))
        assert other.wants_stop_for_probe and other.reason == "a probe"


def test_a_process_knows_what_it_was_told_itself(control, tmp_path) -> None:
    (tmp_path / "save").touch()
    assert not control.is_told_to_stop
    (tmp_path / "save_quit").touch()
    assert control.is_told_to_stop


def test_a_file_that_comes_while_another_is_obeyed_is_not_lost(control, tmp_path) -> None:
    (tmp_path / "save").touch()
    hear(control)
    control.saving()
    (tmp_path / "save_quit").touch()
    control.saved()
    assert not (tmp_path / "save").exists()
    hear(control)
    assert control.wants_stop


def test_a_file_left_for_an_earlier_process_stops_nothing(tmp_path) -> None:
    (tmp_path / "save_quit").touch()
    with RunControl(tmp_path, True, None) as control:
        hear(control)
        assert not control.wants_stop and not (tmp_path / "save_quit").exists()


def test_only_the_main_process_looks_at_files_and_the_clock(tmp_path) -> None:
    with RunControl(tmp_path, False, 1e-9) as control:
        (tmp_path / "save_quit").touch()
        assert hear(control) == RequestFlags()
        control.hear(RequestFlags(save_and_quit=1))  # but all do as it was asked
        assert control.wants_stop
        control.saving()


def test_the_clock_starts_anew_with_each_save(tmp_path) -> None:
    with RunControl(tmp_path, True, 0.05 / 60) as control:
        until(lambda: hear(control).minutes)
        assert control.wants_checkpoint and not control.wants_stop
        control.saving()
        assert not hear(control).minutes


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_heard_and_the_old_handlers_come_back(number) -> None:
    before = [signal.getsignal(one) for one in stopping.SIGNALS]
    watch = SignalWatch("")
    watch.start()
    os.kill(os.getpid(), number)
    until(lambda: number in watch.received)
    os.kill(os.getpid(), number)  # at once again: what a terminal and a launcher send together
    time.sleep(0.05)
    watch.stop()
    assert watch.received == {number}
    assert [signal.getsignal(one) for one in stopping.SIGNALS] == before


STUCK = """
import ctypes
from utils import stopping

stopping.REPEAT_SECONDS = 0.2
watch = stopping.SignalWatch("finishing")
watch.start()
print("ready", flush=True)
# A main thread that waits in C for ever, and goes on waiting after a signal: Python's handlers do not run.
libc, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)
for _ in range(2):
    libc.pthread_mutex_lock(mutex)
"""


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_second_signal_ends_a_process_that_waits_for_its_peers(number, status) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-c", STUCK],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    process.send_signal(number)
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(number)
    _, said = process.communicate(timeout=15)
    assert process.returncode == status, said
    assert said.count("finishing") == 1 and "a second signal: stopping at once" in said
