"""How fast the data path is: reading a warm cache, opening a large index, scanning unchanged files, waiting for data.

    python scripts/bench/data.py
    python scripts/bench/data.py --items 200 --index_items 10000 --files 2000   # quicker

1. Items of the size of real latents are read from a warm cache by one process, in the order of training (random), and
   compared with a plain sequential read of the same mapped files: with the checksum (first read) and without (later ones).
2. A store with many tiny items is opened in a process of its own: seconds and memory.
3. A folder of many unchanged files with captions is scanned again: seconds.
4. With --run DIR, a training run: the share of its step time that it waited for data.

Everything is made in a temporary folder (--scratch) and deleted. Writes reports/bench_data/<run_tag>/.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from utils.errors import UserError
from utils.probe_cli import probe_parser, run_probe
from utils.report import Report, Verdict
from utils.timing import Timing, ratios, take_turns

# Latents of TI2V-5B at 832 x 480 px, 49 frames: 48 channels, 13 frames, 15 x 26.
LATENT_SHAPE = (48, 13, 15, 26)
MAX_READ_RATIO, MAX_OPEN_SECONDS, MAX_OPEN_MB, MAX_SCAN_SECONDS = 2.0, 1.0, 200.0, 10.0
HOW_TO_READ = """
Ratios count, not seconds: variants are measured in turn in one run. `read_ratio` is how much longer a byte takes through
the cache than in a plain read of the same mapped files, all in memory already: it has decoding, and with the first read of
an item its checksum, on top. The other two are seconds on this machine; run it with nothing else running.
"""
NEXT_STEPS = "A figure over its cap while nothing else runs is a slower data path: compare with an older commit on this machine."
_OPENER = """
import json, resource, sys, time
from pathlib import Path
from utils.data.cache import CacheStore
def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
before = resident()
started = time.perf_counter()
store = CacheStore(Path(sys.argv[1]))
seconds = time.perf_counter() - started
print(json.dumps({"items": len(store), "seconds": seconds, "mb": (resident() - before) / 1e6}))
"""


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = probe_parser("bench_data", __doc__ or "")
    parser.add_argument(
        "--items", type=int, default=400, help="latents to read, 1 MB each (default: %(default)s)"
    )
    parser.add_argument(
        "--index_items", type=int, default=100_000, help="items to open (default: %(default)s)"
    )
    parser.add_argument("--files", type=int, default=100_000, help="files to scan (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="counted rounds (default: %(default)s)")
    parser.add_argument(
        "--scratch", metavar="DIR", help="where the temporary folder is made (default: the system's)"
    )
    parser.add_argument("--run", type=Path, metavar="DIR", help="a run directory, for the share of waiting")
    return parser


def probe(args: argparse.Namespace) -> Verdict:
    """Measure, write the report, print its lines."""
    report = Report(
        "bench_data", "Is reading data ever what training waits for?", args.reports_dir, args.run_tag
    )
    report.note(machine())
    missed: list[str] = []
    with tempfile.TemporaryDirectory(dir=args.scratch, prefix="bench_data_") as scratch:
        if not bench_reading(report, Path(scratch) / "cache", args.items, args.repeats):
            missed.append("reading a warm cache")
        if not bench_opening(report, Path(scratch) / "index", args.index_items, args.repeats):
            missed.append("opening a large store")
        if not bench_scanning(report, Path(scratch) / "media", args.files):
            missed.append("scanning unchanged files")
    if args.run is not None:
        measure_waiting(report, args.run)
    verdict: Verdict = "fail" if missed else "pass"
    explanation = (
        f"Over its cap: {', '.join(missed)}." if missed else "Everything measured is within its cap."
    )
    directory = report.write(verdict, explanation, HOW_TO_READ, NEXT_STEPS)
    print(f"{verdict}: {explanation}\nreport: {directory}")
    return verdict


def bench_reading(report: Report, root: Path, num_items: int, repeats: int) -> bool:
    """Items from the store in random order against the same files read from end to end."""
    import torch

    from utils.data.cache import CacheStore

    torch.set_num_threads(1)
    store = CacheStore(root)
    keys = [f"latents/{number:032x}" for number in range(num_items)]
    for key in keys:
        store.put(key, {"latents": torch.randn(LATENT_SHAPE)})
    store.flush()
    order = [keys[index] for index in np.random.default_rng(0).permutation(num_items)]
    target = torch.empty(LATENT_SHAPE)
    warm = CacheStore(root)

    def read_from(opened: CacheStore) -> None:
        for key in order:
            target.copy_(opened.get(key)["latents"])

    files = sorted((root / "shards").glob("*.shard"))
    buffer = np.empty(target.numel() * 4, dtype=np.uint8)
    taken = take_turns(
        {
            "plain": lambda: read_plainly(files, buffer),
            "first": lambda: read_from(CacheStore(root)),
            "later": lambda: read_from(warm),
        },
        repeats,
    )
    num_bytes = sum(path.stat().st_size for path in files)
    ratio = {name: ratios(timing, taken["plain"]) for name, timing in taken.items()}
    rows = [
        {
            "read": words,
            "items_per_second": num_items / taken[name].median,
            "mb_per_second": num_bytes / 1e6 / taken[name].median,
            **spread("ratio_to_plain", ratio[name]),
        }
        for name, words in (
            ("plain", "the same files, mapped, from end to end"),
            ("first", "items in random order, with their checksum"),
            ("later", "items in random order, checksum compared before"),
        )
    ]
    report.table(
        "reading", rows, f"{num_items} items of {target.numel() * 4 / 1e6:.2f} MB, warm, one process"
    )
    for row in rows:
        print(
            f"{row['read']}: {row['items_per_second']:,.0f} items/s, {row['mb_per_second']:,.0f} MB/s, "
            f"{row['ratio_to_plain']:.2f} x ({row['ratio_to_plain_low']:.2f}-{row['ratio_to_plain_high']:.2f})"
        )
    worst = max(ratio["first"].median, ratio["later"].median)
    report.metric(
        "read_ratio", worst, "seconds per byte against a plain read, the slower of first and later reads"
    )
    report.cap("max_read_ratio", MAX_READ_RATIO)
    return worst <= MAX_READ_RATIO


def read_plainly(files: Sequence[Path], buffer: np.ndarray) -> None:
    """Every byte of the files in order, copied once, from a mapping into a buffer."""
    for path in files:
        whole = np.memmap(path, dtype=np.uint8, mode="r")
        for start in range(0, len(whole), len(buffer)):
            part = whole[start : start + len(buffer)]
            buffer[: len(part)] = part


def bench_opening(report: Report, root: Path, num_items: int, repeats: int) -> bool:
    """A store of many tiny items, opened in a process of its own."""
    from utils.data.cache import CacheStore
    from utils.data.shards import ShardWriter

    CacheStore(root)
    folder = root / "shards"
    folder.mkdir()
    per_shard = -(-num_items // 20)  # as twenty processes, or twenty fills of one GiB, would leave it
    for first in range(0, num_items, per_shard):
        writer = ShardWriter.create(folder, "latents")
        for number in range(first, min(first + per_shard, num_items)):
            writer.append(number.to_bytes(16, "big"), b"x" * 100)
        writer.close()
    found = [json.loads(run_python(_OPENER, str(root))) for _ in range(repeats)]
    assert all(row["items"] == num_items for row in found), "the store lost items"
    seconds = Timing(tuple(row["seconds"] for row in found))
    megabytes = Timing(tuple(row["mb"] for row in found))
    report.metric("open_seconds", seconds.median, f"to open a store of {num_items:,} items in 20 shards")
    report.metric("open_mb", megabytes.high, "memory that this takes, the most of all repeats")
    report.cap("max_open_seconds", MAX_OPEN_SECONDS)
    report.cap("max_open_mb", MAX_OPEN_MB)
    print(
        f"open {num_items:,} items: {seconds.median:.2f} s ({seconds.low:.2f}-{seconds.high:.2f}), {megabytes.high:.0f} MB"
    )
    return seconds.median <= MAX_OPEN_SECONDS and megabytes.high <= MAX_OPEN_MB


def bench_scanning(report: Report, media: Path, num_files: int) -> bool:
    """The manifest of a folder of unchanged images, each with its caption."""
    from PIL import Image

    from utils.config.schema import DatasetConfig, DirectoryConfig
    from utils.data.buckets import MediaRules
    from utils.data.manifest import build_manifest
    from utils.data.memo import HashMemo

    media.mkdir()
    Image.new("RGB", (64, 64), "teal").save(media / "seed.png")
    picture = (media / "seed.png").read_bytes()
    (media / "seed.png").unlink()
    an_hour_ago = (
        time.time() - 3600
    )  # the memo does not trust the time stamps of files that have just been written
    for number in range(num_files):
        path = media / f"{number:06d}.png"
        path.write_bytes(picture)
        path.with_suffix(".txt").write_text(f"teal square number {number}")
        os.utime(path, (an_hour_ago, an_hour_ago))
    dataset = DatasetConfig(
        directory=(DirectoryConfig(path=str(media)),), resolutions=(64,), frame_buckets=(1,)
    )
    rules, memo = MediaRules(24.0, 32), media.parent / "content_hashes.jsonl"
    started = time.perf_counter()
    build_manifest(dataset, rules, HashMemo(memo))
    first = time.perf_counter() - started
    started = time.perf_counter()
    manifest = build_manifest(dataset, rules, HashMemo(memo))
    again = time.perf_counter() - started
    assert len(manifest.samples) == num_files, "files were lost"
    report.metric(
        "first_scan_seconds",
        first,
        f"to scan {num_files:,} small images and their captions for the first time",
    )
    report.metric("rescan_seconds", again, "to scan them again, unchanged")
    report.cap("max_rescan_seconds", MAX_SCAN_SECONDS)
    print(f"scan {num_files:,} files: {first:.1f} s, again unchanged: {again:.1f} s")
    return again <= MAX_SCAN_SECONDS


def measure_waiting(report: Report, run: Path) -> None:
    """What part of a run's step time went into waiting for data; its first step is not counted."""
    from utils.metrics import read_metrics

    rows = read_metrics(run)[1:]
    if not rows or "data_seconds" not in rows[0]:
        raise UserError(f"{run}: has no steps with data_seconds behind the first; give a run with more steps")
    waited, total = (sum(row[key] for row in rows) for key in ("data_seconds", "step_seconds"))
    report.metric("waiting_share", waited / total, f"of {len(rows)} steps of {run}")
    print(f"waiting for data: {waited / total:.1%} of {total:.1f} s in {len(rows)} steps")


def spread(name: str, timing: Timing) -> dict[str, float]:
    """Median and range as columns of a table."""
    return {name: timing.median, f"{name}_low": timing.low, f"{name}_high": timing.high}


def run_python(code: str, *arguments: str) -> str:
    """Run code in a process of its own and return what it prints."""
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True
    )
    return done.stdout


def machine() -> str:
    """The processor, for the report."""
    lines = (
        Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        if Path("/proc/cpuinfo").exists()
        else []
    )
    names = {line.partition(": ")[2] for line in lines if line.startswith("model name")}
    return f"{os.cpu_count()} cores, {', '.join(sorted(names)) or 'unknown processor'}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark and return its exit status."""
    return run_probe(build_parser(), probe, argv)


if __name__ == "__main__":
    sys.exit(main())
