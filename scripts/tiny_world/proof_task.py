"""One arm with one seed: trained by `train.py`, drawn and measured, and looked at by the probes; the result as JSON."""

import contextlib
import io
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from models.wan.probes.encoder_subject import SAVED_ENCODER
from scripts.diagnostics import attn_logit_probe, lora_delta_budget, te_eval
from scripts.tiny_world.asset import load_official
from scripts.tiny_world.drawing import EXPERTS, Drawing
from scripts.tiny_world.proof_arms import Arm, Plan, write_configs
from scripts.tiny_world.proof_closed import solve
from scripts.tiny_world.proof_data import LENGTHS, NEUTRAL, NEW_WORDS, Amounts, new_prompts
from scripts.tiny_world.proof_measure import Painter, Weights, measure, measure_known
from utils.config.schema import Expert
from utils.errors import EXIT_UNEXPECTED, EXIT_USER_ERROR, TrainingStoppedError
from utils.files import atomic_write_text
from utils.report import read_summary
from utils.saved_runs import last_saved

ROOT = Path(__file__).resolve().parents[2]
NEUTRAL_FILE, DOMAIN_FILE = "neutral.txt", "domain.txt"
# Seeds of prompts and noise are not those of training, nor of the sweep that chose how to sample.
MEASURE_SEED = 1000
_PROBES = {
    "te_eval": te_eval.main,
    "lora_delta_budget": lora_delta_budget.main,
    "attn_logit_probe": attn_logit_probe.main,
}
# What is taken over from a probe's summary.
_METRICS = {
    "te_eval": ("neutral_drift", "domain_drift", "neutral_mean_norm_ratio"),
    "lora_delta_budget": ("max_ratio", "mean_ratio", "num_modules"),
    "attn_logit_probe": ("mean_std_ratio", "min_std_ratio", "max_std_ratio"),
}


@dataclass(frozen=True)
class Place:
    """Where the proof keeps what is under way, and what it starts from."""

    work: Path
    checkpoint: Path
    drawing: Drawing

    def result(self, arm: str, seed: int) -> Path:
        """The finished result of an arm."""
        return self.work / "results" / f"{arm}_s{seed}.json"

    def pictures(self, arm: str, seed: int) -> Path:
        """What an arm drew."""
        return self.work / "pictures" / f"{arm}_s{seed}.npz"

    def base_latents(self, seed: int) -> Path:
        """What the base drew, for distances."""
        return self.work / "base" / f"latents_s{seed}.safetensors"

    def solved(self, arm: str, seed: int) -> Path:
        """The adapters that were solved for."""
        return self.work / "closed_form" / f"{arm}_s{seed}"

    def run(self, arm: str, seed: int) -> Path:
        """The `output_dir` of a training."""
        return self.work / "runs" / f"{arm}_s{seed}"


def run_task(place: Place, plan: Plan, arm: Arm, seed: int) -> dict[str, Any]:
    """Train, measure, probe; what is done already is read. Everything it needs of other arms is there.

    The base is drawn again where its latents are gone, which all other arms are held against.

    Raises:
        TrainingStoppedError: `train.py` or a probe failed; names the log.
    """
    target = place.result(arm.name, seed)
    is_whole = arm.kind != "base" or place.base_latents(seed).is_file()
    if target.is_file() and is_whole:
        return read_result(target)
    torch.set_num_threads(1)
    for path in (target, place.pictures(arm.name, seed), place.base_latents(seed)):
        path.parent.mkdir(parents=True, exist_ok=True)
    seconds: dict[str, float] = {}
    with _timed(seconds, "training"):
        weights = train_arm(place, plan, arm, seed)
    painter = Painter(load_official(place.checkpoint), place.checkpoint, place.drawing)
    common = (MEASURE_SEED + seed, plan.amounts, place.base_latents(seed))
    with _timed(seconds, "drawing"):
        outcomes = measure(painter, weights, *common, keep=place.pictures(arm.name, seed))
        if weights.adapters is not None:
            outcomes["known_base_encoder"] = measure_known(painter, Weights(None, weights.adapters), *common)
    with _timed(seconds, "probes"):
        probes = run_probes(place, arm, seed)
    result = {"arm": arm.name, "seed": seed, "outcomes": outcomes, "probes": probes, "cpu_seconds": seconds}
    atomic_write_text(target, json.dumps(result))
    return result


def read_result(path: Path) -> dict[str, Any]:
    """A finished result."""
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def train_arm(place: Place, plan: Plan, arm: Arm, seed: int) -> Weights:
    """Train an arm, or find that it is trained; what it puts into the base."""
    encoder = None if arm.start in (None, "base") else saved_encoder(place, str(arm.start), seed)
    if arm.kind == "base":
        return Weights()
    if arm.kind == "solved":
        return Weights(encoder, solve_arm(place, plan, arm, seed, encoder))
    run = place.run(arm.name, seed)
    if not _is_trained(place, arm, seed):
        shutil.rmtree(run, ignore_errors=True)
        init = None if arm.init is None else place.solved(arm.init, seed)
        config = write_configs(arm, seed, place.work, place.checkpoint, encoder, plan.recipe.batch, init)
        status, log = call_train(config, place.work / "logs" / f"{arm.title(seed)}.log")
        if status:
            raise TrainingStoppedError(f"{config}: train.py ended with status {status}; {log} says why")
    if arm.kind == "encoder":
        return Weights(saved_encoder(place, arm.name, seed))
    return Weights(encoder, saved_adapters(place, arm.name, seed))


def solve_arm(place: Place, plan: Plan, arm: Arm, seed: int, encoder: Path | None) -> dict[Expert, Path]:
    """The adapters of a solved arm, solved for where they are not there."""
    out = place.solved(arm.name, seed)
    if not out.is_dir():
        config = write_configs(arm, seed, place.work, place.checkpoint, encoder, plan.recipe.batch)
        solve(place.work, config, arm.title(seed), out, arm.flags)
    return {expert: out / expert / "adapter_model.safetensors" for expert in EXPERTS}


def call_train(config: Path, log: Path) -> tuple[int, Path]:
    """`python train.py --config ...`, its output into a log; the exit status."""
    log.parent.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with log.open("w", encoding="utf-8") as file:
        done = subprocess.run(
            [sys.executable, str(ROOT / "train.py"), "--config", str(config)],
            stdout=file,
            stderr=subprocess.STDOUT,
            env=environment,
            check=False,
        )
    return done.returncode, log


def saved_encoder(place: Place, arm: str, seed: int) -> Path:
    """The encoder that an arm saved."""
    for run in sorted(place.run(arm, seed).glob("*/")):
        file = last_saved(run, SAVED_ENCODER)
        if file is not None:
            return file
    raise TrainingStoppedError(f"{place.run(arm, seed)}: no encoder was saved there")


def saved_adapters(place: Place, arm: str, seed: int) -> dict[Expert, Path]:
    """The adapters that an arm saved, one for each expert."""
    found: dict[Expert, Path] = {}
    for expert in EXPERTS:
        files = sorted(place.run(arm, seed).glob(f"*/adapter_{expert}.safetensors"))
        if not files:
            raise TrainingStoppedError(
                f"{place.run(arm, seed)}: no adapter of the {expert} expert was saved there"
            )
        found[expert] = files[-1]
    return found


def _is_trained(place: Place, arm: Arm, seed: int) -> bool:
    try:
        (saved_encoder if arm.kind == "encoder" else saved_adapters)(place, arm.name, seed)
    except TrainingStoppedError:
        return False
    return True


def write_prompt_files(place: Place, amounts: Amounts) -> None:
    """The prompts that `te_eval` reads."""
    place.work.mkdir(parents=True, exist_ok=True)
    domain = [prompt.text for length in LENGTHS for prompt in new_prompts(length, len(NEW_WORDS) * 4, 0)]
    atomic_write_text(place.work / NEUTRAL_FILE, "\n".join(NEUTRAL) + "\n")
    atomic_write_text(place.work / DOMAIN_FILE, "\n".join(dict.fromkeys(domain)) + "\n")


def run_probes(place: Place, arm: Arm, seed: int) -> dict[str, Any]:
    """The probes of this kind of arm, called as from a shell; their key numbers, by probe and expert."""
    if arm.kind == "encoder":
        prompts = (
            *("--prompts", str(place.work / NEUTRAL_FILE)),
            *("--domain_prompts", str(place.work / DOMAIN_FILE)),
            *("--base_text_encoder", str(place.checkpoint)),
        )
        encoder = saved_encoder(place, arm.name, seed)
        return call_probe(place, "te_eval", arm.title(seed), "--text_encoder", str(encoder), *prompts)
    found: dict[str, Any] = {}
    if arm.kind == "solved":
        for expert in EXPERTS:
            tag = f"{arm.title(seed)}_{expert}"
            adapter = ("--adapter", str(place.solved(arm.name, seed) / expert))
            base = ("--base", str(place.checkpoint), "--expert", expert)
            found |= call_probe(place, "lora_delta_budget", tag, *adapter, *base, suffix=expert)
    if arm.kind == "adapter":
        attention = "self" if arm.extra else "cross"
        for expert in EXPERTS:
            (run,) = place.run(arm.name, seed).glob(f"*/{expert}")
            tag = f"{arm.title(seed)}_{expert}"
            adapter = ("--adapter", str(_only_run(run)))
            found |= call_probe(place, "lora_delta_budget", tag, *adapter, suffix=expert)
            found |= call_probe(
                place, "attn_logit_probe", tag, *adapter, "--attention", attention, suffix=expert
            )
    return found


def _only_run(directory: Path) -> Path:
    """The run in a directory of one expert: itself, or the one below it."""
    if (directory / "config.toml").is_file():
        return directory
    (run,) = (path.parent for path in directory.glob("*/config.toml"))
    return run


def call_probe(place: Place, tool: str, tag: str, *arguments: str, suffix: str = "") -> dict[str, Any]:
    """One probe into `work`/reports, unless its report is there; {tool or tool.suffix: key numbers}."""
    reports = place.work / "reports"
    directory = reports / tool / tag
    if not directory.is_dir():
        said = io.StringIO()
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            status = _PROBES[tool]([*arguments, "--reports_dir", str(reports), "--run_tag", tag])
        if status in (EXIT_USER_ERROR, EXIT_UNEXPECTED):
            raise TrainingStoppedError(f"{tool} {' '.join(arguments)}: {said.getvalue().strip()}")
    summary = read_summary(directory)
    numbers = {name: summary.metrics.get(name) for name in _METRICS[tool]}
    return {
        f"{tool}.{suffix}" if suffix else tool: numbers | {"verdict": summary.verdict, "caps": summary.caps}
    }


@contextlib.contextmanager
def _timed(seconds: dict[str, float], name: str) -> Any:
    """Processor seconds of this process and of the children that end meanwhile."""

    def used() -> float:
        own, children = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
        return own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime

    began, clock = used(), time.monotonic()
    yield
    seconds[name] = round(used() - began, 1)
    seconds[f"{name}_clock"] = round(time.monotonic() - clock, 1)
