"""The manifest: what the dataset's folders hold, each file either kept as a sample or skipped with a reason."""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import xxhash

from utils.config.schema import DatasetConfig, DirectoryConfig
from utils.data.buckets import Bucket, MediaRules, assign_bucket, build_buckets
from utils.data.media import MediaInfo, MediaKind, frames_available, media_kind
from utils.data.memo import HashMemo
from utils.errors import UserError

CAPTION_SUFFIX = ".txt"
_SAMPLE_ID_MASK = (1 << 63) - 1

SkipCode = Literal[
    "not_media", "folder", "link", "no_caption", "unreadable", "too_small", "too_short", "no_bucket"
]


@dataclass(frozen=True)
class SampleRecord:
    """One sample: a clip of a media file and its caption.

    Attributes:
        sample_id: 63 bits; stays the same whatever other files come and go (see `make_sample_id`).
        path: the media file.
        kind: image or video.
        caption: with the directory's prefix, stripped.
        bucket: the size and length the model sees.
        num_repeats: appearances per epoch.
        content_hash: xxh3-128 of the media file.
        clip_start_seconds: where in the video the clip begins; a whole number of the model's frames.
        info: what is in the file.
    """

    sample_id: int
    path: Path
    kind: MediaKind
    caption: str
    bucket: Bucket
    num_repeats: float
    content_hash: str
    clip_start_seconds: float
    info: MediaInfo


@dataclass(frozen=True)
class SkippedFile:
    """A file (or folder) that gives no sample, why, and the kind of reason for counting."""

    path: Path
    reason: str
    code: SkipCode


@dataclass(frozen=True)
class Manifest:
    """All samples, in the order of the directories and of the file names in them, and all that was left out."""

    samples: tuple[SampleRecord, ...]
    skipped: tuple[SkippedFile, ...]


@dataclass(frozen=True)
class _Source:
    """A directory with what all its files share: the name in their ids, and the buckets."""

    directory: DirectoryConfig
    id_name: str
    buckets: tuple[Bucket, ...]


class _SkipError(Exception):
    """Raised while a file is examined: it gives no sample."""

    def __init__(self, reason: str, code: SkipCode) -> None:
        super().__init__(reason)
        self.reason = reason
        self.code: SkipCode = code


def build_manifest(
    dataset: DatasetConfig,
    rules: MediaRules,
    hashes: HashMemo,
    on_progress: Callable[[int, int], None] | None = None,
    *,
    allow_empty: bool = False,
) -> Manifest:
    """Examine every file of the dataset's directories (not of folders in them) and give each its bucket.

    Hidden files and captions (`.txt`) are passed over; everything else is a sample or is listed as skipped.

    Args:
        dataset: its relative directory paths count from the working directory.
        rules: of the model's variant.
        hashes: what is known of the files already; saved at the end, also after an error.
        on_progress: called with (done, total) after each file.
        allow_empty: return a manifest without samples, for who wants to see all reasons, instead of raising.

    Raises:
        UserError: a directory is missing, the bucket keys are illegal, a file breaks the rule that
            `missing_caption` or `on_bad_file` = "error" makes of it, or nothing is left.
    """
    found: list[tuple[Path, _Source]] = []
    for directory, id_name in _with_id_names(dataset.directory):
        source = _Source(directory, id_name, build_buckets(dataset, directory, rules))
        found.extend((path, source) for path in _visible_entries(Path(directory.path)))
    samples: list[SampleRecord] = []
    skipped: list[SkippedFile] = []
    try:
        for done, (path, source) in enumerate(found, start=1):
            try:
                samples.append(_examine(path, source, dataset, rules, hashes))
            except _SkipError as skip:
                skipped.append(SkippedFile(path, skip.reason, skip.code))
            if on_progress is not None:
                on_progress(done, len(found))
    finally:
        hashes.save()
    if not samples and not allow_empty:
        raise UserError(_nothing_left(dataset, skipped))
    return Manifest(tuple(samples), tuple(skipped))


def make_sample_id(id_name: str, relative_path: str, clip_index: int = 0) -> int:
    """63 bits of xxh3 over the directory's name, the file's path in it, and the clip's number in the file."""
    text = "\0".join((id_name, relative_path, str(clip_index)))
    return xxhash.xxh3_64_intdigest(text.encode("utf-8", "surrogateescape")) & _SAMPLE_ID_MASK


def default_cache_dir(dataset: DatasetConfig) -> Path:
    """`cache_dir`, else a hidden folder (so that the manifest passes it over) in the first directory."""
    if dataset.cache_dir is not None:
        return Path(dataset.cache_dir)
    return Path(dataset.directory[0].path) / ".wan_cache"


def _with_id_names(directories: tuple[DirectoryConfig, ...]) -> Iterator[tuple[DirectoryConfig, str]]:
    """Each directory with the name that its samples' ids are made of: its own, numbered if it is not the first such."""
    seen: Counter[str] = Counter()
    for directory in directories:
        name = Path(directory.path).absolute().name
        yield directory, f"{name}\0{seen[name]}" if seen[name] else name
        seen[name] += 1


def _visible_entries(directory: Path) -> list[Path]:
    try:
        entries = sorted(directory.iterdir())
    except FileNotFoundError as error:
        raise UserError(
            f"dataset, [[directory]] {directory}: there is no such directory "
            f"(looked for {directory.absolute()}); mend its path"
        ) from error
    except OSError as error:
        raise UserError(f"dataset, [[directory]] {directory}: cannot be listed ({error.strerror})") from error
    return [e for e in entries if not e.name.startswith(".") and e.suffix.lower() != CAPTION_SUFFIX]


def _examine(
    path: Path, source: _Source, dataset: DatasetConfig, rules: MediaRules, hashes: HashMemo
) -> SampleRecord:
    """One file of a directory as a sample; raises _SkipError or, where the dataset says so, UserError."""
    kind = _check_is_media(path)
    caption = _read_caption(path, dataset, source.directory.caption_prefix)
    try:
        info = hashes.media_info(path)
        bucket = _choose_bucket(info, source.buckets, rules)
        content_hash = hashes.content_hash(path)
    except (OSError, UserError) as error:
        raise _bad_file(path, error, dataset) from error
    return SampleRecord(
        sample_id=make_sample_id(source.id_name, path.name),
        path=path,
        kind=kind,
        caption=caption,
        bucket=bucket,
        num_repeats=source.directory.num_repeats,
        content_hash=content_hash,
        clip_start_seconds=_clip_start(info, bucket, dataset, rules),
        info=info,
    )


def _check_is_media(path: Path) -> MediaKind:
    if path.is_dir():
        raise _SkipError("a folder: give it a [[directory]] of its own to use it", "folder")
    if not path.is_file():
        raise _SkipError("not a file (a broken or circular link, or a device)", "link")
    kind = media_kind(path)
    if kind is None:
        raise _SkipError("not an image or video, by its ending", "not_media")
    return kind


def _read_caption(path: Path, dataset: DatasetConfig, prefix: str) -> str:
    """Prefix and sidecar text, stripped. A blank sidecar counts as none."""
    sidecar = path.with_suffix(CAPTION_SUFFIX)
    try:
        text = sidecar.read_text(encoding="utf-8-sig").strip()
        lack = f"its caption file {sidecar.name} is blank"
    except FileNotFoundError:
        text, lack = "", f"it has no caption file {sidecar.name}"
    except UnicodeDecodeError as error:
        reason = UserError(f"{sidecar}: not UTF-8 (byte {error.start}); save it as UTF-8")
        raise _bad_file(path, reason, dataset) from error
    except OSError as error:
        raise _bad_file(path, UserError(f"{sidecar}: not readable ({error.strerror})"), dataset) from error
    if not text and dataset.missing_caption == "skip":
        raise _SkipError(lack, "no_caption")
    if not text and dataset.missing_caption == "error":
        raise UserError(
            f'{path}: {lack}; write one, or set missing_caption = "skip" or "empty" in the dataset'
        )
    return (prefix + text).strip()


def _bad_file(path: Path, error: Exception, dataset: DatasetConfig) -> Exception:
    """What becomes of a file that cannot be read, by `on_bad_file`."""
    reason = f"{path}: not readable ({error.strerror})" if isinstance(error, OSError) else str(error)
    if dataset.on_bad_file == "error":
        return UserError(f'{reason}. Mend it, take it away, or set on_bad_file = "skip" in the dataset')
    return _SkipError(reason.removeprefix(f"{path}: "), "unreadable")


def _choose_bucket(info: MediaInfo, buckets: tuple[Bucket, ...], rules: MediaRules) -> Bucket:
    """The bucket of a readable file; raises _SkipError if there is none, whatever `on_bad_file` says."""
    if min(info.width, info.height) < rules.pixel_multiple:
        size = f"{info.width}x{info.height} px"
        raise _SkipError(f"{size} is smaller than {rules.pixel_multiple} px", "too_small")
    lengths = sorted({b.num_frames for b in buckets if (b.num_frames == 1) == (info.kind == "image")})
    if not lengths:
        wanted = "an image, and 1 is" if info.kind == "image" else "a video, and none above 1 is"
        raise _SkipError(f"{wanted} not among the frame buckets", "no_bucket")
    available = frames_available(info, rules.fps)
    if available < lengths[0]:
        raise _SkipError(
            f"{info.seconds:.2f} s are {available} frames at {rules.fps:g} per second, "
            f"and the shortest video bucket has {lengths[0]}",
            "too_short",
        )
    bucket = assign_bucket(info.width, info.height, available, buckets)
    if bucket is None:
        raise AssertionError(f"no bucket for {info} among {buckets}")
    return bucket


def _clip_start(info: MediaInfo, bucket: Bucket, dataset: DatasetConfig, rules: MediaRules) -> float:
    """Seconds from the video's first frame, on the grid of the model's frames so that the clip ends in the video."""
    if info.kind == "image" or dataset.video_clip_mode == "single_beginning":
        return 0.0
    return (frames_available(info, rules.fps) - bucket.num_frames) // 2 / rules.fps


def _nothing_left(dataset: DatasetConfig, skipped: list[SkippedFile]) -> str:
    where = ", ".join(directory.path for directory in dataset.directory)
    if not skipped:
        return f"dataset: nothing to train on, {where}: no images or videos there"
    lines = [f"dataset: nothing to train on, all {len(skipped)} entries of {where} are left out:"]
    for code, count in Counter(file.code for file in skipped).most_common():
        first = next(file for file in skipped if file.code == code)
        lines.append(f"  {count} x {code.replace('_', ' ')}, e.g. {first.path}: {first.reason}")
    return "\n".join(lines)
