"""The whole job at tiny size on whatever machine this is: the commands a user types, one after the other.

Makes a tiny checkpoint and dataset, fine-tunes the encoder (two pipeline stages), trains a translator on embeddings
cached with that encoder, kills a run and resumes it, measures the adapter, and has a trained miniature of T2V-A14B draw a
picture. Everything lands under output/smoke/
and reports/; output/smoke/ is made anew each time.
"""

import argparse
import json
import math
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import torch

from utils.cli import run_command
from utils.errors import TrainingStoppedError
from utils.metrics import METRICS_FILE, read_metrics

ROOT = Path("output/smoke")
TINY, MEDIA = ROOT / "tiny_ti2v", ROOT / "media"
QUALITY = Path("tests/assets/tiny_wan/quality.json")
TRAINED, PICTURE = ROOT / "tiny_trained", ROOT / "red_circle.png"
TE_RUNS, LORA_RUNS, RESUMED_RUNS = ROOT / "te_ft", ROOT / "dit_lora", ROOT / "dit_lora_resumed"
KILL_AFTER_STEPS = 5
STEP_LIMIT_SECONDS = 600.0


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--debug", action="store_true", help="show stack traces")
    arguments = parser.parse_args(argv)
    return run_command(smoke, debug=arguments.debug)


def smoke() -> int:
    """Run every part; stop at the first that fails."""
    started = time.monotonic()
    # One thread per process: the processes share few cores, and more threads would only wait for each other.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    shutil.rmtree(ROOT, ignore_errors=True)
    python = sys.executable

    step("a tiny Wan2.2-TI2V-5B in the official layout")
    call(python, "scripts/make_tiny_wan.py", "--variant", "ti2v-5b", "--out", TINY)
    step("a tiny dataset of images and videos")
    call(python, "scripts/make_tiny_dataset.py", "--out", MEDIA)

    stages = min(2, torch.cuda.device_count()) if torch.cuda.is_available() else 2
    step(f"encoder fine-tune through the frozen DiT, {stages} pipeline stage(s), deepspeed launcher")
    launcher = Path(python).with_name("deepspeed")
    call(
        *(launcher, "--num_gpus", stages, "--master_port", free_port(), "train.py"),
        *("--config", "configs/smoke_te_ft.toml", "--set", f"pipeline_stages={stages}"),
    )
    encoder = newest(TE_RUNS, "epoch*/text_encoder.safetensors")

    step("LoRA translator on embeddings cached with that encoder")
    lora = (
        python,
        "train.py",
        "--config",
        "configs/smoke_dit_lora.toml",
        "--set",
        f"model.llm_path={encoder}",
    )
    call(*lora)
    adapter = newest(LORA_RUNS, "epoch*/adapter_model.safetensors")

    step(f"the same run, killed after step {KILL_AFTER_STEPS} and resumed")
    longer = (
        *lora,
        "--set",
        f"output_dir={RESUMED_RUNS}",
        "--set",
        "epochs=3",
        "--set",
        "checkpoint_every_n_steps=2",
    )
    kill_after(KILL_AFTER_STEPS, *longer)
    call(*longer, "--resume_from_checkpoint")
    compared = compare_losses(LORA_RUNS, RESUMED_RUNS)

    step("how far the adapter moves the weights")
    call(python, "scripts/diagnostics/lora_delta_budget.py", "--adapter", adapter.parent, "--base", TINY)
    report = max(Path("reports/lora_delta_budget").glob("*/report.md"), key=lambda path: path.stat().st_mtime)

    step("a picture drawn by the miniature that was trained on coloured shapes")
    draw("a red circle")

    print_table(
        [
            ("tiny checkpoint", TINY),
            ("tiny dataset", MEDIA),
            ("tuned encoder", encoder),
            ("translator", adapter),
            ("metrics", adapter.parent.parent / METRICS_FILE),
            (
                f"resumed run ({compared} losses equal)",
                newest(RESUMED_RUNS, "epoch*/adapter_model.safetensors"),
            ),
            ("report", report),
            ("picture", PICTURE),
        ]
    )
    print(f"smoke passed in {time.monotonic() - started:.0f} s")
    return 0


def draw(prompt: str) -> None:
    """Write the trained miniature, and have it draw a prompt as it was measured to draw best."""
    call(sys.executable, "scripts/make_tiny_wan.py", "--trained", "--out", TRAINED)
    drawing = json.loads(QUALITY.read_text(encoding="utf-8"))["drawing"]
    call(
        *(sys.executable, "scripts/sample.py", "--config", "configs/smoke_dit_lora.toml"),
        *("--set", f"model.ckpt_path={TRAINED}", "--set", "model.expert=high_noise"),
        *("--prompt", prompt, "--negative_prompt", "", "--size", "48x48", "--out", PICTURE),
        *(word for name, value in drawing.items() for word in (f"--{name}", value)),
    )


def step(title: str) -> None:
    """Announce the next part."""
    print(f"\n== {title}", flush=True)


def call(*command: object) -> None:
    """Show and run a command.

    Raises:
        TrainingStoppedError: it failed; its own output has said why.
    """
    words = [str(word) for word in command]
    print("$ " + shlex.join(words).replace(sys.executable, "python"), flush=True)
    finished = subprocess.run(words, timeout=STEP_LIMIT_SECONDS, check=False)
    if finished.returncode:
        raise TrainingStoppedError(f"the command above ended with status {finished.returncode}")


def kill_after(steps: int, *command: object) -> None:
    """Start a training and kill it (SIGKILL) as soon as its metrics show `steps` steps."""
    words = [str(word) for word in command]
    print("$ " + shlex.join(words).replace(sys.executable, "python"), flush=True)
    process = subprocess.Popen(words, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + STEP_LIMIT_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        if any(len(read_metrics(path.parent)) >= steps for path in RESUMED_RUNS.glob(f"*/{METRICS_FILE}")):
            process.send_signal(signal.SIGKILL)
            break
        time.sleep(0.01)
    process.wait(timeout=STEP_LIMIT_SECONDS)
    if process.returncode != -signal.SIGKILL:
        raise TrainingStoppedError(
            f"the run was to be killed, but ended by itself with status {process.returncode}"
        )
    print(f"(killed after {steps} steps)", flush=True)


def compare_losses(whole: Path, resumed: Path) -> int:
    """Check that the killed and resumed run has the losses of the uninterrupted one; returns how many were compared."""
    expected, found = (
        [row["loss"] for row in read_metrics(newest(path, METRICS_FILE).parent)] for path in (whole, resumed)
    )
    # On a GPU some kernels add in no fixed order, so a run repeats itself only up to rounding.
    tolerance = 1e-3 if torch.cuda.is_available() else 0.0
    same = all(math.isclose(a, b, rel_tol=tolerance) for a, b in zip(expected, found, strict=False))
    if len(found) < len(expected) or not same:
        raise TrainingStoppedError(
            f"the resumed run's losses {found} are not those of the whole one {expected}"
        )
    return len(expected)


def newest(runs: Path, pattern: str) -> Path:
    """The newest file of the newest run directory."""
    return max(runs.glob(f"*/{pattern}"), key=lambda path: (path.parent.stat().st_mtime, str(path)))


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def print_table(rows: list[tuple[str, Path]]) -> None:
    """What was made, and where."""
    width = max(len(name) for name, _ in rows)
    print("\nmade:")
    for name, path in rows:
        print(f"  {name:<{width}}  {path}")


if __name__ == "__main__":
    sys.exit(main())
