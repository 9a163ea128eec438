"""The command as a person runs it: real media and weights in, losses and files out, under every launcher."""

import json
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import pandas as pd
import psutil
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from models.wan.checkpoint import open_sharded, open_text_encoder
from tests.helpers.workspace import (
    MEDIA,
    TIME_LIMIT_SECONDS,
    Workspace,
    check_refused,
    environment,
    linked_copy,
    make_workspace,
)
from utils.checkpoint import LATEST
from utils.config.dump import config_hash
from utils.config.load import load_config
from utils.config.schema import LoadedConfig
from utils.data.cache import CacheStore
from utils.files import combined_fingerprint, content_hash
from utils.metrics import read_metrics

# 6 samples, 2 micro-batches a step, 4 epochs: 12 steps. Dropout and empty captions draw random numbers too.
NUM_STEPS = 12
LORA = (
    "epochs=4",
    "checkpoint_every_n_steps=2",
    "uncond_fraction=0.3",
    "adapter.rank=4",
    "adapter.alpha=8.0",
    "adapter.dropout=0.2",
    "budget.every_n_steps=5",
)
ROW_KEYS = {
    "step",
    "epoch",
    "loss",
    "loss_by_timestep",
    "timesteps",
    "lr",
    "grad_norm",
    "samples_seen",
    "step_seconds",
    "data_seconds",
    "tokens_per_second",
}
BUDGET_KEYS = {"max_delta_ratio", "mean_delta_ratio"}
SAVE_KEYS = {"checkpoint_seconds", "checkpoint_copy_seconds"}


@pytest.fixture
def workspace(tmp_path, tiny_ti2v, tiny_dataset) -> Workspace:
    return make_workspace(tmp_path, tiny_ti2v, tiny_dataset)


@pytest.fixture(scope="module")
def lora(tmp_path_factory, tiny_ti2v, tiny_dataset) -> Workspace:
    """An uninterrupted translator run in one process."""
    workspace = make_workspace(tmp_path_factory.mktemp("lora"), tiny_ti2v, tiny_dataset)
    done = workspace.launch(["python"], "dit_lora", *LORA)
    assert done.returncode == 0, done.stderr
    (workspace.root / "said").write_text(done.stderr)
    return workspace


@pytest.fixture(scope="module")
def encoder(tmp_path_factory, tiny_ti2v, tiny_dataset) -> Workspace:
    """An encoder fine-tune on two pipeline stages under the deepspeed launcher."""
    workspace = make_workspace(tmp_path_factory.mktemp("encoder"), tiny_ti2v, tiny_dataset)
    launcher = ["deepspeed", "--num_gpus", "2", "--master_port", str(free_port())]
    overrides = ("pipeline_stages=2", "max_steps=4", "checkpoint_every_n_steps=4")
    done = workspace.launch(launcher, "encoder_ft", *overrides, flags=["--deepspeed"])
    assert done.returncode == 0, done.stdout + done.stderr
    return workspace


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def losses(run: Path) -> list[float]:
    return [row["loss"] for row in read_metrics(run)]


def loaded(workspace: Workspace, mode: str, *overrides: str) -> LoadedConfig:
    words = workspace.arguments(mode, *overrides)
    values = [value for flag, value in pairwise(words) if flag == "--set"]
    return load_config(words[1], values)


def metadata_of(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        return file.metadata()


# ---------------------------------------------------------------------- what a run leaves


def test_a_run_leaves_its_config_and_inputs(lora) -> None:
    run = lora.run()
    asked = loaded(lora, "dit_lora", *LORA)
    assert load_config(run / "config.toml").train == asked.train
    copies = {path.name: path.read_bytes() for path in (run / "inputs").iterdir()}
    assert copies == {
        "train_smoke_dit_lora.toml": Path(asked.path).read_bytes(),
        "dataset_dataset.toml": (lora.root / "dataset.toml").read_bytes(),
    }
    assert not lora.leftovers()


def test_the_base_and_the_targets_are_written_down(lora, tiny_ti2v) -> None:
    run, base = lora.run(), open_sharded(tiny_ti2v)
    files = pd.read_csv(run / "dataset.csv")
    assert sorted(Path(name).stem for name in files["file"]) == sorted(MEDIA) and set(files["status"]) == {
        "kept"
    }
    keys = pd.read_csv(run / "base_keys.csv", dtype=str)
    assert dict(zip(keys["key"], keys["shape"], strict=True)) == {
        name: "x".join(map(str, shape)) for name, shape in base.shapes.items()
    }
    assert dict(zip(keys["key"], keys["dtype"], strict=True)) == base.dtypes
    num_blocks = 1 + max(int(name.split(".")[1]) for name in base.shapes if name.startswith("blocks."))
    targets = json.loads((run / "targets.json").read_text())
    assert sorted(targets) == sorted(
        f"blocks.{block}.cross_attn.{one}" for block in range(num_blocks) for one in "kv"
    )


def test_each_step_stands_once_in_the_metrics(lora) -> None:
    rows = read_metrics(lora.run())
    assert [row["step"] for row in rows] == list(range(1, NUM_STEPS + 1))
    assert [row["samples_seen"] for row in rows] == list(range(2, 2 * NUM_STEPS + 1, 2))
    assert [row["epoch"] for row in rows] == [1 + (step - 1) // 3 for step in range(1, NUM_STEPS + 1)]
    for row in rows:
        budgeted = row["step"] % 5 == 0 or row["step"] == NUM_STEPS
        # Saved every second step and at the end of each epoch, which is every third.
        before = row["step"] - 1
        after_a_save = before > 0 and (before % 2 == 0 or before % 3 == 0)
        assert set(row) == ROW_KEYS | (BUDGET_KEYS if budgeted else set()) | (
            SAVE_KEYS if after_a_save else set()
        )
        if after_a_save:
            assert row["checkpoint_seconds"] >= row["checkpoint_copy_seconds"] >= 0
        assert row["lr"] == 1e-3
        assert 0 < row["loss"] < 10 and 0 < row["grad_norm"] < 100
        assert row["step_seconds"] >= row["data_seconds"] >= 0 and row["tokens_per_second"] > 0
        bins = row["loss_by_timestep"]
        assert 1 <= len(bins) <= 2 and min(bins.values()) <= row["loss"] <= max(bins.values())


def test_tensorboard_has_the_same_numbers(lora) -> None:
    events = EventAccumulator(str(lora.run())).Reload()
    found = {event.step: event.value for event in events.Scalars("train/loss")}
    assert found == pytest.approx({row["step"]: row["loss"] for row in read_metrics(lora.run())})
    assert "train/data_seconds" in events.Tags()["scalars"]
    assert "train/max_delta_ratio" in events.Tags()["scalars"]


def test_checkpoints_are_kept_and_latest_names_the_newest(lora) -> None:
    run = lora.run()
    assert {path.name for path in run.glob("global_step*")} == {"global_step10", "global_step12"}
    assert (run / LATEST).read_text().strip() == "global_step12"
    names = {path.name for path in (run / "global_step12").iterdir()}
    assert names == {"loop.json", "stage_0.json", "stage_0.safetensors"}


def test_only_adapters_are_saved_and_say_what_they_are_for(lora, tiny_ti2v) -> None:
    run = lora.run()
    targets = json.loads((run / "targets.json").read_text())
    assert {path.name for path in run.glob("epoch*")} == {f"epoch{n}" for n in (1, 2, 3, 4)}
    for epoch in range(1, 5):
        path = run / f"epoch{epoch}" / "adapter_model.safetensors"
        tensors = load_file(path)
        assert set(tensors) == {
            f"diffusion_model.{target}.lora_{one}.weight" for target in targets for one in "AB"
        }
        assert all(torch.isfinite(tensor).all() for tensor in tensors.values())
        assert any(tensor.any() for name, tensor in tensors.items() if "lora_B" in name)
        facts = metadata_of(path)
        assert facts["variant"] == "ti2v-5b" and facts["expert"] == "none"
        assert facts["base_hash"] == combined_fingerprint(open_sharded(tiny_ti2v).files)
        assert facts["encoder_hash"] == content_hash(tiny_ti2v / "models_t5_umt5-xxl-enc-bf16.pth")
        assert facts["config_hash"] == config_hash(loaded(lora, "dit_lora", *LORA).train)
        assert (facts["epoch"], facts["step"]) == (str(epoch), str(3 * epoch))
        config = json.loads((path.parent / "adapter_config.json").read_text())
        assert config["r"] == 4 and config["peft_type"] == "LORA"


def test_a_run_says_what_it_does(lora) -> None:
    said = (lora.root / "said").read_text()
    for text in (
        "dataset: 6 samples",
        "cross_attn.k in blocks 0-3",
        f"run directory: {lora.run()}",
        f"training {NUM_STEPS}/{NUM_STEPS}",
        f"done: {NUM_STEPS} steps, {2 * NUM_STEPS} samples",
        str(lora.run() / "epoch4" / "adapter_model.safetensors"),
    ):
        assert text in said, text


def test_the_encoder_learns_and_the_dit_stays_out_of_the_output(encoder, tiny_ti2v) -> None:
    run = encoder.run()
    assert [row["step"] for row in read_metrics(run)] == [1, 2, 3, 4]
    assert {path.name for path in run.glob("global_step4/*")} == {
        "loop.json",
        *(f"stage_{stage}{suffix}" for stage in (0, 1) for suffix in (".json", ".safetensors")),
    }
    assert not (run / "targets.json").exists()
    path = run / "epoch2" / "text_encoder.safetensors"  # 4 steps end in the second epoch
    base = open_text_encoder(tiny_ti2v / "models_t5_umt5-xxl-enc-bf16.pth")
    tuned = open_text_encoder(path)
    assert tuned.shapes == base.shapes
    assert not any(name.startswith(("patch_embedding", "head", "text_embedding")) for name in tuned.shapes)
    for name in base.shapes:
        before, after = base.get(name).float(), tuned.get(name).float()
        assert torch.isfinite(after).all(), name
        # Everything but the token table is trained, from the first block on.
        assert torch.equal(before, after) == (name == "token_embedding.weight"), name
    facts = metadata_of(path)
    assert facts["variant"] == "ti2v-5b" and facts["config_hash"]
    stored = {
        name for stage in (0, 1) for name in load_file(run / "global_step4" / f"stage_{stage}.safetensors")
    }
    assert stored and all(name.split("/")[1].startswith("text_encoder.") for name in stored)


def test_the_input_weights_are_never_written(lora, encoder, tiny_ti2v, tmp_path, run_script) -> None:
    again = tmp_path / "again"
    assert run_script("make_tiny_wan.py", "--variant", "ti2v-5b", "--out", again).returncode == 0
    for path in again.rglob("*.safetensors"):
        assert content_hash(path) == content_hash(tiny_ti2v / path.name)


# ---------------------------------------------------------------------- several processes


def test_two_data_parallel_processes_have_the_losses_of_one(lora, workspace) -> None:
    launcher = ["torchrun", "--nproc_per_node", "2"]
    done = workspace.launch(launcher, "dit_lora", *LORA, "gradient_accumulation_steps=1", "max_steps=6")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("run directory: ") == 1
    assert losses(workspace.run()) == pytest.approx(losses(lora.run())[:6], rel=1e-5)


# ---------------------------------------------------------------------- stopping and continuing


def kill_after(steps: int, workspace: Workspace, *overrides: str) -> None:
    """Start a translator run and SIGKILL it as soon as so many steps stand in its metrics."""
    command = workspace.command(["python"], "dit_lora", *overrides, flags=["--resume_from_checkpoint"])
    with (workspace.root / "said").open("w") as said:
        process = subprocess.Popen(command, stdout=said, stderr=said, cwd=workspace.root, env=environment())
    deadline = time.monotonic() + TIME_LIMIT_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        if any(len(read_metrics(run)) >= steps for run in workspace.runs()):
            break
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait(timeout=60) == -signal.SIGKILL, (workspace.root / "said").read_text()


def test_a_killed_run_goes_on_as_if_nothing_had_happened(lora, workspace, capsys) -> None:
    kill_after(5, workspace, *LORA)
    said = (workspace.root / "said").read_text()
    assert f"no run to continue in {workspace.out}: starting at step 0" in said
    (run,) = [path for path in workspace.runs() if not path.name.startswith(".")]
    assert 5 <= len(read_metrics(run)) < NUM_STEPS
    # What a kill at a worse moment leaves: a torn line, half a checkpoint, half a run directory.
    with (run / "metrics.jsonl").open("a") as metrics:
        metrics.write('{"step": 6, "lo')
    (run / ".global_step6.tmp").mkdir(exist_ok=True)
    (run / ".global_step6.tmp" / "loop.json").write_text("{")
    unfinished = workspace.out / ".20990101_000000.abc.tmp"
    unfinished.mkdir()
    (unfinished / "config.toml").write_text("")

    assert workspace.train("dit_lora", *LORA, flags=["--resume_from_checkpoint"]) == 0
    assert f"continuing {run} from global_step" in capsys.readouterr().err
    assert [path for path in workspace.runs() if path != unfinished] == [run]
    rows, whole = read_metrics(run), read_metrics(lora.run())
    assert [row["step"] for row in rows] == list(range(1, NUM_STEPS + 1))
    changing = {"step_seconds", "data_seconds", "tokens_per_second"}
    for row, expected in zip(rows, whole, strict=True):
        assert {key: row[key] for key in ROW_KEYS - changing} == {
            key: expected[key] for key in ROW_KEYS - changing
        }
    for epoch in range(1, 5):
        name = f"epoch{epoch}/adapter_model.safetensors"
        ours, theirs = load_file(run / name), load_file(lora.run() / name)
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    events = EventAccumulator(str(run)).Reload().Scalars("train/loss")
    assert [event.step for event in events] == list(range(1, NUM_STEPS + 1))
    assert not list(run.rglob("*.tmp"))


@contextmanager
def running(
    workspace: Workspace, launcher: Sequence[str], *overrides: str
) -> Iterator[subprocess.Popen[bytes]]:
    """A translator run in processes of its own, from its third step on; what it says is in `said`."""
    command = workspace.command(launcher, "dit_lora", *overrides)
    with (workspace.root / "said").open("w") as said:
        process = subprocess.Popen(command, stdout=said, stderr=said, cwd=workspace.root, env=environment())
    try:
        wait_for(process, lambda: any(len(read_metrics(run)) >= 3 for run in workspace.runs()))
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.wait(timeout=60)


def wait_for(process: subprocess.Popen[bytes], condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + TIME_LIMIT_SECONDS
    while not condition() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    assert condition()


def workers_of(launcher: subprocess.Popen[bytes]) -> list[psutil.Process]:
    found = psutil.Process(launcher.pid).children(recursive=True)
    return sorted((one for one in found if "RANK" in one.environ()), key=lambda one: one.environ()["RANK"])


@pytest.mark.long
def test_one_rank_that_is_asked_to_stop_stops_all_after_the_step(lora, workspace, capsys) -> None:
    """And another number of copies goes on with the same global batch, to the losses of a run that never stopped."""
    copies = (*LORA, "gradient_accumulation_steps=1")
    launcher = ["torchrun", "--nproc_per_node", "2", "--master_port", str(free_port())]
    with running(workspace, launcher, *copies) as process:
        workers_of(process)[-1].terminate()
        assert process.wait(timeout=60) == 0
    said, run = (workspace.root / "said").read_text(), workspace.run()
    step = len(read_metrics(run))
    assert 3 <= step < NUM_STEPS
    assert f"stopped by SIGTERM after step {step} of {NUM_STEPS}" in said
    assert f"--resume_from_checkpoint {run}" in said and "Traceback" not in said
    assert (run / LATEST).read_text() == f"global_step{step}\n"

    assert workspace.train("dit_lora", *copies, flags=["--resume_from_checkpoint"]) == 0
    assert "gradient_accumulation_steps = 2 instead of 1" in capsys.readouterr().err
    assert losses(run) == losses(lora.run())
    assert not list(run.rglob("*.tmp"))


def test_a_file_asks_for_a_checkpoint_and_a_signal_for_the_end(workspace) -> None:
    seldom = ("epochs=200", "checkpoint_every_n_epochs=0", "save_every_n_epochs=0")
    with running(workspace, ["python"], *seldom) as process:
        run = workspace.run()
        assert not (run / LATEST).exists()
        (run / "save").touch()
        wait_for(process, lambda: not (run / "save").exists())
        saved = (run / LATEST).read_text().strip()
        assert (run / saved / "loop.json").exists()
        wait_for(process, lambda: len(read_metrics(run)) > int(saved.removeprefix("global_step")) + 1)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 0
    step = len(read_metrics(run))
    assert (run / LATEST).read_text() == f"global_step{step}\n" and step > 3
    said = (workspace.root / "said").read_text()
    assert "SIGINT: the step in progress is finished" in said
    assert f"stopped by SIGINT after step {step} of 600" in said


def test_a_finished_run_is_left_alone(workspace, capsys) -> None:
    assert workspace.train("dit_lora", "max_steps=1") == 0
    before = {path: path.stat().st_mtime_ns for path in workspace.out.rglob("*")}
    for flags in (
        ["--resume_from_checkpoint"],
        ["--resume_from_checkpoint", workspace.run().name],
        ["--resume_from_checkpoint", str(workspace.run())],
    ):
        assert workspace.train("dit_lora", "max_steps=1", flags=flags) == 0
        assert "is finished (1 of 1 steps); nothing to do" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in workspace.out.rglob("*")} == before


def test_a_finished_run_can_be_made_longer(lora, workspace) -> None:
    schedule = [override for override in LORA if not override.startswith("epochs")]
    assert workspace.train("dit_lora", *schedule, "epochs=1") == 0
    assert workspace.train("dit_lora", *schedule, "epochs=2", flags=["--resume_from_checkpoint"]) == 0
    assert losses(workspace.run()) == losses(lora.run())[:6]


def test_another_configuration_is_not_continued(workspace, capsys) -> None:
    assert workspace.train("dit_lora", "max_steps=1") == 0
    capsys.readouterr()
    changed = ("max_steps=2", "optimizer.lr=0.5", "adapter.exclude=['cross_attn.v']")
    code = workspace.train("dit_lora", *changed, flags=["--resume_from_checkpoint"])
    said = capsys.readouterr().err
    check_refused(code, said, "optimizer.lr: 0.001 -> 0.5", "adapter.exclude: [] -> ['cross_attn.v']")
    assert "max_steps" not in said
    assert len(read_metrics(workspace.run())) == 1


def test_a_run_that_cannot_go_on_is_left_as_it_was(workspace, capsys) -> None:
    """The rank is allowed to differ, but the checkpoint does not fit it: found out after everything else."""
    assert workspace.train("dit_lora", "max_steps=1") == 0

    def content() -> dict[str, bytes]:
        files = [path for path in workspace.run().rglob("*") if path.is_file()]
        return {str(path): path.read_bytes() for path in files}

    before = content()
    flags = ["--resume_from_checkpoint", "--allow_changed", "adapter.rank"]
    code = workspace.train("dit_lora", "max_steps=2", "adapter.rank=8", flags=flags)
    check_refused(code, capsys.readouterr().err, "must not change between runs")
    assert content() == before
    # A dry run says what a resume would do, and does nothing either.
    assert workspace.train("dit_lora", "max_steps=2", flags=["--resume_from_checkpoint", "--dry_run"]) == 0
    said = capsys.readouterr().err
    assert f"continuing {workspace.run()} from global_step1 (1 of 2 steps done)" in said and "dry run" in said
    code = workspace.train("dit_lora", "optimizer.lr=0.5", flags=["--resume_from_checkpoint", "--dry_run"])
    check_refused(code, capsys.readouterr().err, "optimizer.lr: 0.001 -> 0.5")
    assert content() == before
    with pytest.raises(SystemExit):
        workspace.train("dit_lora", flags=["--resume_from_checkpoint", "--cache_only"])
    assert workspace.train("dit_lora", "max_steps=2", flags=["--resume_from_checkpoint"]) == 0


def test_another_dataset_is_not_continued(workspace, capsys) -> None:
    assert workspace.train("dit_lora", "max_steps=1") == 0
    (workspace.media / "image_00.txt").write_text("a green circle")
    code = workspace.train("dit_lora", "max_steps=2", flags=["--resume_from_checkpoint"])
    said = capsys.readouterr().err
    check_refused(code, said, "dataset: 6 samples of 6 files -> 6 samples of 6 files, with other content")
    flags = ["--resume_from_checkpoint", "--allow_changed", "dataset"]
    assert workspace.train("dit_lora", "max_steps=2", flags=flags) == 0
    assert "changed, as allowed: dataset: " in capsys.readouterr().err
    assert len(read_metrics(workspace.run())) == 2


def test_changes_are_allowed_only_where_a_run_goes_on(workspace, capsys) -> None:
    with pytest.raises(SystemExit) as ended:
        workspace.train("dit_lora", flags=["--allow_changed", "optimizer.lr"])
    assert ended.value.code == 2 and "belongs to --resume_from_checkpoint" in capsys.readouterr().err
    assert workspace.train("dit_lora", "max_steps=1") == 0
    changed = ("max_steps=2", "optimizer.lr=0.5")
    flags = ["--resume_from_checkpoint", "--allow_changed"]
    capsys.readouterr()
    code = workspace.train("dit_lora", *changed, flags=[*flags, "optimiser.lr"])
    check_refused(code, capsys.readouterr().err, "--allow_changed optimiser.lr: is neither", "text_encoder")
    assert workspace.train("dit_lora", *changed, flags=[*flags, "optimizer.lr"]) == 0
    assert [row["lr"] for row in read_metrics(workspace.run())] == [1e-3, 0.5]


# ---------------------------------------------------------------------- the other ways to start


def test_a_dry_run_writes_nothing_but_the_cache(workspace, capsys) -> None:
    assert workspace.train("dit_lora", "epochs=2", flags=["--dry_run"]) == 0
    said = capsys.readouterr().err
    assert "dry run: " in said and "8 adapter targets" in said and "6 steps of 2 micro-batch(es)" in said
    assert "in flight  activations" in said and "0-5 (input .. head)" in said
    assert not workspace.out.exists()
    assert CacheStore(workspace.cache).kinds() == ["latents", "text"]


@pytest.mark.parametrize("mode", ["dit_lora", "encoder_ft"])
def test_several_clips_and_captions_of_a_file_are_cached_and_trained(mode, workspace, capsys) -> None:
    assert workspace.train(mode, flags=["--cache_only"]) == 0
    workspace.write_dataset('video_clip_mode = "uniform:3"')
    caption = (workspace.media / "image_00.txt").read_text()
    (workspace.media / "image_00.txt").unlink()
    table = {"image_00.png": [caption, "a shape"], "ghost.png": "a shape"}
    (workspace.media / "captions.json").write_text(json.dumps(table))
    capsys.readouterr()
    assert workspace.train(mode, "epochs=1") == 0
    said = capsys.readouterr().err
    assert "dataset: 12 samples (" in said
    assert f"skipped {workspace.media / 'ghost.png'}: captions.json names it" in said
    assert "cache of latents: 12 items, 6 encoded now (6 new), 6 there already" in said
    if mode == "dit_lora":
        assert "cache of captions: 8 items, 1 encoded now (1 caption changed), 7 there already" in said
    assert ", 12 samples, " in said


def test_one_change_makes_one_item_anew_and_says_why(workspace, tiny_ti2v, capsys) -> None:
    def fill(*overrides: str) -> tuple[str, str]:
        capsys.readouterr()
        assert workspace.train("dit_lora", *overrides, flags=["--cache_only"]) == 0
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("cache of ")]
        latents, captions = (line.split(" items, ")[1] for line in lines)
        return latents, captions

    assert fill() == (
        "6 encoded now (6 new), 0 there already",
        "7 encoded now (7 new), 0 there already",
    )
    nothing = ("0 encoded now, 6 there already", "0 encoded now, 7 there already")
    assert fill() == nothing
    caption, image = workspace.media / "image_00.txt", workspace.media / "image_01.png"
    before = caption.read_text(), image.read_bytes()
    caption.write_text("a teal hexagon")
    assert fill() == (nothing[0], "1 encoded now (1 caption changed), 6 there already")
    image.write_bytes((workspace.media / "image_02.png").read_bytes() + b"\0")
    assert fill() == ("1 encoded now (1 file changed), 5 there already", nothing[1])
    assert fill("model.vae_dtype=bfloat16")[0] == "6 encoded now (6 precision changed), 0 there already"
    other = linked_copy(tiny_ti2v, workspace.root / "other")
    weights = other / "models_t5_umt5-xxl-enc-bf16.pth"
    weights.unlink()
    state = torch.load(tiny_ti2v / weights.name, weights_only=True)
    torch.save({name: tensor * 2 for name, tensor in state.items()}, weights)
    assert fill(f"model.ckpt_path={other}") == (
        nothing[0],
        "7 encoded now (7 text encoder changed), 0 there already",
    )
    # Back to what was: everything is found again, but what has never been there.
    caption.write_text(before[0])
    image.write_bytes(before[1])
    assert fill() == nothing
    assert caption.read_text() not in (workspace.cache / "made_of.json").read_text()


def test_the_cache_alone_and_anew(workspace, capsys) -> None:
    def items() -> dict[str, float]:
        store = CacheStore(workspace.cache)
        return {item.key: item.written for kind in store.kinds() for item in store.items(kind)}

    assert workspace.train("dit_lora", flags=["--cache_only"]) == 0
    assert "cache of latents: 6 items, 6 encoded now (6 new), 0 there already" in capsys.readouterr().err
    first = items()
    assert len(first) == 6 + 7  # latents; captions and the empty one
    assert workspace.train("dit_lora", flags=["--cache_only"]) == 0
    assert "cache of captions: 7 items, 0 encoded now, 7 there already" in capsys.readouterr().err
    assert items() == first
    assert workspace.train("dit_lora", flags=["--cache_only", "--regenerate_cache"]) == 0
    assert (
        "cache of latents: 6 items, 6 encoded now (6 asked for), 0 there already" in capsys.readouterr().err
    )
    anew = items()
    assert anew.keys() == first.keys() and all(anew[path] > first[path] for path in first)
    assert not workspace.out.exists()
    store = CacheStore(workspace.cache)
    store.remove(next(iter(anew)))
    store.flush()
    assert workspace.train("dit_lora", flags=["--cache_only"]) == 0
    assert items().keys() == first.keys()


def test_max_steps_decides_over_epochs_also_upward(workspace) -> None:
    assert workspace.train("dit_lora", "epochs=1", "max_steps=5", "save_every_n_epochs=0") == 0
    rows = read_metrics(workspace.run())
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    assert [row["epoch"] for row in rows] == [1, 1, 1, 2, 2]
    assert rows[-1]["samples_seen"] == 10
    assert {path.name for path in workspace.run().glob("epoch*")} == {"epoch2"}


def test_only_the_top_blocks_are_trained(workspace, tiny_ti2v) -> None:
    overrides = ("model.text_train_blocks=1", "model.save_text_encoder_full=false", "max_steps=1")
    assert workspace.train("encoder_ft", *overrides) == 0
    saved = load_file(workspace.run() / "epoch1" / "text_encoder.safetensors")
    base = open_text_encoder(tiny_ti2v / "models_t5_umt5-xxl-enc-bf16.pth")
    top = max(int(name.split(".")[1]) for name in base.shapes if name.startswith("blocks."))
    assert {name.rsplit(".layer.")[0] for name in saved} == {
        f"encoder.block.{top}",
        "encoder.final_layer_norm.weight",
    }


# ---------------------------------------------------------------------- stopping on purpose


def make_latents_nan(workspace: Workspace, name: str) -> None:
    """Put NaN in the place of the cached latents of one file: what a broken encoder would have left."""
    whole, alone = workspace.media, workspace.root / "alone"
    alone.mkdir()
    for path in whole.glob(f"{name}.*"):
        (alone / path.name).write_bytes(path.read_bytes())
    dataset = workspace.root / "dataset.toml"
    text = dataset.read_text()
    dataset.write_text(text.replace(str(whole), str(alone)))
    assert workspace.train("dit_lora", flags=["--cache_only"]) == 0
    store = CacheStore(workspace.cache)
    (item,) = store.keys("latents")
    store.put(item, {name: torch.full_like(tensor, torch.nan) for name, tensor in store.get(item).items()})
    store.flush()
    dataset.write_text(text)


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_sample(workspace, capsys) -> None:
    make_latents_nan(workspace, "image_02")
    capsys.readouterr()
    assert workspace.train("dit_lora", "epochs=1", "checkpoint_every_n_steps=1") == 1
    said = capsys.readouterr().err
    rows, run = read_metrics(workspace.run()), workspace.run()
    assert 1 <= len(rows) <= 2, "the seed puts the sample into a later step than the first"
    good = run / f"global_step{len(rows)}"
    (line,) = [line for line in said.splitlines() if line.startswith("stopped: ")]
    assert f"step {len(rows) + 1}: the loss of {workspace.media / 'image_02.png'} is not finite" in line
    assert "image_00" not in line and "Traceback" not in said
    assert f"the last good checkpoint is {good}" in line
    assert (run / LATEST).read_text().strip() == good.name
    assert not list(run.glob("epoch*")) and not workspace.leftovers()
    weights = load_file(good / "stage_0.safetensors")
    assert all(torch.isfinite(tensor).all() for tensor in weights.values())


def test_a_loss_that_overflows_while_the_gradient_is_finite_stops_too(workspace, capsys, monkeypatch) -> None:
    def overflowing(velocity, target):
        losses_B = (velocity - target).square().flatten(1).mean(1)
        return losses_B + (torch.inf - losses_B.detach())

    monkeypatch.setattr("utils.loss_recorder.per_sample_loss", overflowing)
    assert workspace.train("dit_lora", "max_steps=2") == 1
    said = capsys.readouterr().err
    assert "stopped: step 1: the loss of " in said and "there is no checkpoint yet" in said
    assert read_metrics(workspace.run()) == []


def test_the_budget_stops_the_run_before_anything_over_it_is_saved(workspace, capsys) -> None:
    tight = ("budget.max_delta_ratio=1e-6", "budget.every_n_steps=2", "checkpoint_every_n_steps=1")
    assert workspace.train("dit_lora", *tight, "budget.action=stop") == 1
    said = capsys.readouterr().err
    assert "stopped: step 1: 8 adapted module(s)" in said and "budget.max_delta_ratio = 1e-06" in said
    assert "there is no checkpoint yet" in said
    rows = read_metrics(workspace.run())
    assert len(rows) == 1 and rows[-1]["max_delta_ratio"] > 1e-6
    cap = 1.5 * rows[-1]["max_delta_ratio"]
    later = (
        f"budget.max_delta_ratio={cap}",
        *tight[1:],
        "budget.action=stop",
        f"output_dir={workspace.root / 'b'}",
    )
    assert workspace.train("dit_lora", *later) == 1
    (run,) = (workspace.root / "b").iterdir()
    assert f"the last good checkpoint is {run / 'global_step1'}" in capsys.readouterr().err
    assert (run / LATEST).read_text().strip() == "global_step1"


def test_the_budget_warns_where_it_has_doubled_and_goes_on(workspace, capsys) -> None:
    tight = ("budget.max_delta_ratio=1e-6", "budget.every_n_steps=1", "max_steps=3")
    assert workspace.train("dit_lora", *tight, "budget.action=warn") == 0
    said = capsys.readouterr().err
    ratios = [row["max_delta_ratio"] for row in read_metrics(workspace.run())]
    assert len(ratios) == 3
    doubled = sum(ratio > 2 * ratios[0] for ratio in ratios)  # the third step's may be, the others' are not
    assert ratios[1] < 2 * ratios[0] and said.count("warning: step ") == 1 + doubled
    assert f"||dW|| / ||W|| at most {ratios[-1]:.4f}" in said
