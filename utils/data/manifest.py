"""The manifest: what the dataset's folders hold, each file either kept as samples or skipped with a reason."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import xxhash

from utils.config.schema import DatasetConfig, DirectoryConfig
from utils.data.buckets import Bucket, MediaRules, assign_bucket, build_buckets
from utils.data.captions import (
    SIDECAR_SUFFIX,
    TABLE_NAMES,
    CaptionError,
    CaptionTables,
    NoCaptionError,
    orphan_captions,
    read_caption_tables,
    read_captions,
)
from utils.data.clips import clip_starts
from utils.data.masks import LossMask, MaskFolder, list_masks
from utils.data.media import MediaInfo, MediaKind, frames_available, media_kind
from utils.data.memo import HashMemo
from utils.errors import UserError

_SAMPLE_ID_MASK = (1 << 63) - 1

SkipCode = Literal[
    "not_media",
    "folder",
    "link",
    "absent",
    "no_caption",
    "caption_conflict",
    "unreadable",
    "too_small",
    "too_short",
    "no_bucket",
    "bad_mask",
    "mask_without_medium",
]
# What `on_bad_file` decides about: left out by accident. The other codes are rules.
BAD_FILE_CODES: frozenset[SkipCode] = frozenset(
    {"unreadable", "caption_conflict", "absent", "bad_mask", "mask_without_medium"}
)


@dataclass(frozen=True)
class SampleRecord:
    """One sample: an image or a clip of a video, and its captions.

    Attributes:
        sample_id: 63 bits; stays the same whatever other files come and go (see `make_sample_id`).
        path: the media file.
        kind: image or video.
        captions: at least one, with the directory's prefix, stripped; a visit of the sample sees one of them.
        bucket: the size and length the model sees.
        num_repeats: appearances per epoch.
        content_hash: xxh3-128 of the media file.
        clip_start_seconds: where in the video the clip begins; a whole number of the model's frames.
        info: what is in the file.
        mask: which part of it counts in the loss; None: all.
        mtime_ns: time stamp of the file when it was scanned; None where that says nothing about its content.
    """

    sample_id: int
    path: Path
    kind: MediaKind
    captions: tuple[str, ...]
    bucket: Bucket
    num_repeats: float
    content_hash: str
    clip_start_seconds: float
    info: MediaInfo
    mask: LossMask | None = None
    mtime_ns: int | None = None

    @property
    def caption(self) -> str:
        """The first of the captions, where one has to stand for all."""
        return self.captions[0]


@dataclass(frozen=True)
class SkippedFile:
    """A file (or folder) that gives no sample, why, and the kind of reason for counting."""

    path: Path
    reason: str
    code: SkipCode


@dataclass(frozen=True)
class Manifest:
    """All samples, in the order of the directories and of the file names in them, and all that was left out.

    `warnings` are about files that are kept and may still not be what was meant.
    """

    samples: tuple[SampleRecord, ...]
    skipped: tuple[SkippedFile, ...]
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Source:
    """A directory with what all its files share: name in their ids, buckets, clip mode, tables of captions, masks."""

    directory: DirectoryConfig
    id_name: str
    buckets: tuple[Bucket, ...]
    clip_mode: str
    tables: CaptionTables
    masks: MaskFolder | None


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

    Hidden files and captions (`.txt`, `captions.json`, `captions.jsonl`) are passed over; everything else gives
    samples or is listed as skipped. So is what is wrong with a table of captions, files that only a table knows, and
    masks of no file.

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
    samples: list[SampleRecord] = []
    skipped: list[SkippedFile] = []
    warnings: list[str] = []
    mask_folders = _list_mask_folders(dataset)
    for directory, id_name in _with_id_names(dataset.directory):
        folder = Path(directory.path)
        buckets = build_buckets(dataset, directory, rules)
        # Masks may lie in a folder in the directory; that one is no sample that got lost.
        entries = [
            entry
            for entry in _visible_entries(folder)
            if not (entry.is_dir() and entry.resolve() in mask_folders)
        ]
        warnings += orphan_captions(folder, entries)
        tables = read_caption_tables(folder)
        skipped.extend(_table_problems(folder, tables, entries, dataset))
        clip_mode = directory.video_clip_mode or dataset.video_clip_mode
        masks = None if directory.mask_path is None else mask_folders[Path(directory.mask_path).resolve()]
        source = _Source(directory, id_name, buckets, clip_mode, tables, masks)
        found.extend((path, source) for path in entries)
    _check_masks_apart(dataset, mask_folders)
    skipped.extend(_mask_problems(mask_folders, found, dataset))
    try:
        for done, (path, source) in enumerate(found, start=1):
            try:
                samples.extend(_examine(path, source, dataset, rules, hashes))
            except _SkipError as skip:
                skipped.append(SkippedFile(path, skip.reason, skip.code))
            if on_progress is not None:
                on_progress(done, len(found))
    finally:
        hashes.save()
    if not samples and not allow_empty:
        raise UserError(_nothing_left(dataset, skipped))
    return Manifest(tuple(samples), tuple(skipped), (*warnings, *_shared_captions(samples)))


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
        entries = sorted(directory.iterdir(), key=lambda entry: entry.name)
    except FileNotFoundError as error:
        raise UserError(
            f"dataset, [[directory]] {directory}: there is no such directory "
            f"(looked for {directory.absolute()}); mend its path"
        ) from error
    except OSError as error:
        raise UserError(f"dataset, [[directory]] {directory}: cannot be listed ({error.strerror})") from error
    return [entry for entry in entries if not entry.name.startswith(".") and not _holds_captions(entry)]


def _holds_captions(path: Path) -> bool:
    return path.suffix.lower() == SIDECAR_SUFFIX or path.name in TABLE_NAMES


def _list_mask_folders(dataset: DatasetConfig) -> dict[Path, MaskFolder]:
    """Every `mask_path`, resolved, once, however many directories share it."""
    paths = [directory.mask_path for directory in dataset.directory if directory.mask_path is not None]
    # Listed before it is resolved, which a loop of links would not survive.
    listed = [list_masks(Path(path)) for path in dict.fromkeys(paths)]
    return {masks.folder.resolve(): masks for masks in listed}


def _check_masks_apart(dataset: DatasetConfig, mask_folders: Mapping[Path, MaskFolder]) -> None:
    """Also behind links, masks do not lie among the files that they are for: there each would be a sample too."""
    for directory in dataset.directory:
        if Path(directory.path).resolve() in mask_folders:
            raise UserError(
                f"dataset, [[directory]] {directory.path}: a mask_path leads to this folder, so its masks would be samples; "
                "put the masks into a folder of their own"
            )


def _mask_problems(
    mask_folders: Mapping[Path, MaskFolder], found: list[tuple[Path, _Source]], dataset: DatasetConfig
) -> Iterator[SkippedFile]:
    """Masks for which no directory that they serve has a file, and what is no mask among them."""
    for masks in mask_folders.values():
        served = [path for path, source in found if source.masks is masks and media_kind(path) is not None]
        for path in masks.others:
            yield SkippedFile(path, "not a picture, by its ending, so not a mask", "not_media")
        for path in masks.orphans({path.stem for path in served}):
            reason = "a mask without a medium: no image or video has its name"
            if dataset.on_bad_file == "error":
                raise _bad_file(path, reason, dataset)
            yield SkippedFile(path, reason, "mask_without_medium")


def _table_problems(
    folder: Path, tables: CaptionTables, entries: list[Path], dataset: DatasetConfig
) -> Iterator[SkippedFile]:
    """What is wrong with a directory's tables of captions, apart from entries of files that are there."""
    present = {entry.name for entry in entries}
    problems: list[tuple[Path, str, SkipCode]] = [
        (damage.path, damage.reason, "unreadable") for damage in tables.damages
    ]
    for name, entry in tables.entries.items():
        if name not in present:
            problems.append(
                (folder / name, f"{entry.table} names it, but it is not in this folder", "absent")
            )
    for path, reason, code in problems:
        if dataset.on_bad_file == "error":
            raise _bad_file(path, reason, dataset)
        yield SkippedFile(path, reason, code)


def _examine(
    path: Path, source: _Source, dataset: DatasetConfig, rules: MediaRules, hashes: HashMemo
) -> list[SampleRecord]:
    """The samples of one file of a directory; raises _SkipError or, where the dataset says so, UserError."""
    kind = _check_is_media(path)
    captions = _prefixed_captions(path, source, dataset)
    try:
        mtime_ns = hashes.time_stamp(path)
        info = hashes.media_info(path)
        bucket = _choose_bucket(info, source.buckets, rules)
        content_hash = hashes.content_hash(path)
    except (OSError, UserError) as error:
        reason = f"not readable ({error.strerror})" if isinstance(error, OSError) else str(error)
        raise _bad_file(path, reason, dataset) from error
    mask = _mask_of(path, info, bucket, source, dataset, rules, hashes)
    return [
        SampleRecord(
            sample_id=make_sample_id(source.id_name, path.name, clip_index),
            path=path,
            kind=kind,
            captions=captions,
            bucket=bucket,
            num_repeats=source.directory.num_repeats,
            content_hash=content_hash,
            clip_start_seconds=start / rules.fps,
            info=info,
            mask=mask,
            mtime_ns=mtime_ns,
        )
        for clip_index, start in enumerate(_clip_starts(info, bucket, source, rules))
    ]


def _mask_of(
    path: Path,
    info: MediaInfo,
    bucket: Bucket,
    source: _Source,
    dataset: DatasetConfig,
    rules: MediaRules,
    hashes: HashMemo,
) -> LossMask | None:
    """A file's loss mask, None where it has none; raises as `_examine`."""
    if source.masks is None:
        return None
    try:
        mask = source.masks.mask_of(path)
        if mask is None:
            return None
        grid = hashes.mask_grid(mask, info, bucket, rules.latent_stride)
        return LossMask(mask, hashes.content_hash(mask, compare_time=True), grid)
    except (OSError, UserError) as error:
        reason = f"{mask}: not readable ({error.strerror})" if isinstance(error, OSError) else str(error)
        raise _bad_file(path, f"its mask, {reason}", dataset, "bad_mask") from error


def _check_is_media(path: Path) -> MediaKind:
    if path.is_dir():
        raise _SkipError("a folder: give it a [[directory]] of its own to use it", "folder")
    if not path.is_file():
        raise _SkipError("not a file (a broken or circular link, or a device)", "link")
    kind = media_kind(path)
    if kind is None:
        raise _SkipError("not an image or video, by its ending", "not_media")
    return kind


def _prefixed_captions(path: Path, source: _Source, dataset: DatasetConfig) -> tuple[str, ...]:
    """Prefix and text of each caption of a file; the prefix alone if it has none and may."""
    prefix = source.directory.caption_prefix
    try:
        return tuple((prefix + caption).strip() for caption in read_captions(path, source.tables))
    except CaptionError as error:
        raise _bad_file(path, error.reason, dataset, error.code) from error
    except NoCaptionError as lack:
        if dataset.missing_caption == "skip":
            raise _SkipError(str(lack), "no_caption") from lack
        if dataset.missing_caption == "error":
            raise UserError(
                f'{path}: {lack}; write one, or set missing_caption = "skip" or "empty" in the dataset'
            ) from lack
        return (prefix.strip(),)


def _bad_file(
    path: Path, reason: str, dataset: DatasetConfig, code: SkipCode = "unreadable"
) -> UserError | _SkipError:
    """What becomes of a file that cannot be used as it is, by `on_bad_file`."""
    reason = reason.removeprefix(f"{path}: ")
    if dataset.on_bad_file == "error":
        return UserError(
            f'{path}: {reason}. Mend it, take it away, or set on_bad_file = "skip" in the dataset'
        )
    return _SkipError(reason, code)


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


def _clip_starts(info: MediaInfo, bucket: Bucket, source: _Source, rules: MediaRules) -> tuple[int, ...]:
    """Where the clips begin, in the model's frames from the video's first, so that each ends in the video."""
    if info.kind == "image":
        return (0,)
    return clip_starts(source.clip_mode, frames_available(info, rules.fps), bucket.num_frames)


def _shared_captions(samples: list[SampleRecord]) -> Iterator[str]:
    """Files of one stem (`a.png`, `a.mp4`) to which one caption file belongs."""
    by_stem: dict[Path, dict[str, None]] = {}
    for sample in samples:
        by_stem.setdefault(sample.path.with_suffix(SIDECAR_SUFFIX), {})[sample.path.name] = None
    for sidecar, names in by_stem.items():
        if len(names) > 1 and sidecar.exists():
            yield f"{sidecar}: is the caption of {len(names)} files of one stem, {', '.join(names)}"


def _nothing_left(dataset: DatasetConfig, skipped: list[SkippedFile]) -> str:
    where = ", ".join(directory.path for directory in dataset.directory)
    if not skipped:
        return f"dataset: nothing to train on, {where}: no images or videos there"
    lines = [f"dataset: nothing to train on, all {len(skipped)} entries of {where} are left out:"]
    for code, count in Counter(file.code for file in skipped).most_common():
        first = next(file for file in skipped if file.code == code)
        lines.append(f"  {count} x {code.replace('_', ' ')}, e.g. {first.path}: {first.reason}")
    return "\n".join(lines)
