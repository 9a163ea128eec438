"""Builds a manifest of damaged files and loads every clip of it, then says what became of each file as JSON.

In a process of its own: a crash inside a decoder, or one that never ends, must not take the tests with it.

    python tests/workers/fuzz_media.py FOLDER
"""

import json
import resource
import sys
from pathlib import Path

from utils.config.schema import DatasetConfig, DirectoryConfig
from utils.data.buckets import MediaRules
from utils.data.manifest import build_manifest
from utils.data.media import load_clip
from utils.data.memo import HashMemo
from utils.errors import UserError


def main() -> None:
    import torch  # noqa: F401 - counted before what decoding needs

    folder = Path(sys.argv[1])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    rules = MediaRules(fps=16.0, pixel_multiple=16)
    dataset = DatasetConfig(
        directory=(DirectoryConfig(path=str(folder)),),
        resolutions=(32,),
        num_ar_buckets=1,
        frame_buckets=(1, 5, 9),
        missing_caption="empty",
    )

    def on_progress(done: int, total: int) -> None:
        print(f"examined {done} of {total}", file=sys.stderr, flush=True)

    manifest = build_manifest(dataset, rules, HashMemo(), on_progress, allow_empty=True)
    failures = {}
    for sample in manifest.samples:
        print(f"loading {sample.path.name}", file=sys.stderr, flush=True)
        try:
            clip = load_clip(sample, rules)
            assert clip.shape == (3, sample.bucket.num_frames, sample.bucket.height, sample.bucket.width)
        except UserError as error:
            failures[sample.path.name] = str(error)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    answer = {
        "kept": sorted({sample.path.name for sample in manifest.samples}),
        "skipped": {file.path.name: [file.code, file.reason] for file in manifest.skipped},
        "failures": failures,
        "grown_mib": (after - before) / 1024,
    }
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
