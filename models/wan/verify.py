"""`train.py --verify`: every tensor of every part that a configuration uses is read, and held against index and header."""

import argparse
import time
from collections.abc import Callable
from pathlib import Path

from models.wan.checkpoint import check_checkpoint, locate
from models.wan.layouts import CheckpointPaths
from models.wan.preflight import check_pair
from utils.config.experts import BOTH, EXPERTS, side_model
from utils.config.load import load_config
from utils.config.schema import LoadedConfig, ModelConfig
from utils.errors import UserError
from utils.progress import Progress
from utils.read_through import ReadFile, find_shards, read_file

_MIB = 1 << 20


def verify(arguments: argparse.Namespace) -> int:
    """`train.py --verify`; returns the exit status.

    Args:
        arguments: with `config` and `set`.

    Raises:
        UserError: as `read_everything`, or the configuration is not right.
    """
    read_everything(load_config(arguments.config, arguments.set), print)
    return 0


def read_everything(config: LoadedConfig, say: Callable[[str], None]) -> None:
    """Read everything, and say part by part what was found. Nothing is written.

    Raises:
        UserError: something is missing, damaged, surplus or not finite; every problem is in the message.
    """
    for note in config.notes:
        say(str(note))
    began = time.monotonic()
    models = _models(config.train.model)
    paths = locate(next(iter(models.values())))[0]
    parts = {label: locate(model)[0].transformer_dir for label, model in models.items()}
    parts |= {"text encoder": paths.text_encoder, "VAE": paths.vae}
    found: dict[str, list[Path]] = {}
    of_index: dict[str, list[str]] = {}
    for label, place in parts.items():
        if place.exists():
            found[label], of_index[label] = find_shards(place) if place.is_dir() else ([place], [])
    problems = [problem for wrong in of_index.values() for problem in wrong]
    total = sum(file.stat().st_size for files in found.values() for file in files)
    progress = _MebibyteProgress(total)
    read: list[ReadFile] = []
    for label, files in found.items():
        results = [read_file(file, progress.add) for file in files]
        read += results
        own = [problem for result in results for problem in result.problems]
        problems += own
        say(_describe(label, parts[label], results, is_sound=not own and not of_index[label]))
    progress.close()
    known = list(problems)
    for model in models.values():
        in_headers = _header_problems(model, locate(model)[0], known)
        problems += [problem for problem in in_headers if problem not in problems]
    if config.train.model.expert == BOTH and not problems:
        problems += map(str, check_pair(config.train))
    problems += _tokenizer_problems(paths.tokenizer_dir, say)
    num_bytes, seconds = sum(one.num_bytes for one in read), time.monotonic() - began
    say(f"read {num_bytes / 1e9:.2f} GB in {seconds:.1f} s")
    if problems:
        count = f"{len(problems)} problem{'s' if len(problems) != 1 else ''}"
        raise UserError(
            "\n".join((f"{config.path}: {count} with its weights", *(f"  - {one}" for one in problems)))
        )
    say("everything is there, whole and finite")


def _models(model: ModelConfig) -> dict[str, ModelConfig]:
    """What is verified, by the label of its DiT: each expert where both are trained."""
    if model.expert != BOTH:
        return {"DiT": model}
    return {expert: side_model(model, expert) for expert in EXPERTS}


def _describe(label: str, place: Path, results: list[ReadFile], *, is_sound: bool) -> str:
    tensors, num_bytes = sum(one.num_tensors for one in results), sum(one.num_bytes for one in results)
    files = f"{len(results)} file{'s' if len(results) != 1 else ''}"
    state = "sound" if is_sound else "NOT SOUND"
    return f"{label:<13} {files:>8} {tensors:>6} tensors {num_bytes / 1e9:>8.3f} GB  {state}  {place}"


def _header_problems(model: ModelConfig, paths: CheckpointPaths, known: list[str]) -> list[str]:
    """What the check by headers finds besides: missing parts, sizes, variant, widths, kinds.

    It stops at the first thing wrong with a part's files; where those were found to be damaged already, that is not said twice.
    """
    files = {Path(one.partition(": ")[0]) for one in known}
    damaged = files | {file.parent for file in files}
    places = [place for place in (paths.transformer_dir, paths.text_encoder, paths.vae) if place in damaged]

    def is_known(reason: str) -> bool:
        subject = Path(reason.partition(": ")[0])
        return subject in files or (
            subject.parent in places and subject.name.endswith((".safetensors", ".index.json"))
        )

    return [str(problem) for problem in check_checkpoint(model) if not is_known(problem.reason)]


def _tokenizer_problems(place: Path, say: Callable[[str], None]) -> list[str]:
    if not place.exists():
        return []  # said by the check of what is there
    from models.wan.text_encoder import WanTokenizer  # torch, which a help text should not wait for

    try:
        WanTokenizer(place)("a red circle moves to the right")
    except UserError as error:
        return [str(error)]
    say(f"{'tokenizer':<13} {'loads':>33}  sound  {place}")
    return []


class _MebibyteProgress:
    """A progress line over bytes, in MiB, so that its numbers can be read."""

    def __init__(self, num_bytes: int) -> None:
        self._bar = Progress("MiB read", max(1, num_bytes // _MIB))
        self._bytes, self._total = 0, num_bytes

    def add(self, num_bytes: int) -> None:
        """So many more were read."""
        self._bytes += num_bytes
        self._bar.reach(min(self._bytes // _MIB, max(1, self._total // _MIB)))

    def close(self) -> None:
        """End the line."""
        self._bar.close()
