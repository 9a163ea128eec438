"""Writing files so that nothing half-written can ever be read, and fingerprints of what is read."""

import errno
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import xxhash

from utils.errors import UserError

TEMPORARY_SUFFIX = ".tmp"
_READ_CHUNK_BYTES = 8 << 20
# Libraries written in Rust raise an error type of their own whose text ends so.
_ERRNO_IN_TEXT = re.compile(r"\(os error (\d+)\)")
_QUICK_BLOCK_BYTES = 64 << 10
_QUICK_NUM_BLOCKS = 256


def fsync_directory(path: Path) -> None:
    """Make renames inside `path` durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_file(path: Path) -> None:
    """Make the content of `path` durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def disk_errors_as_user_errors(target: Path) -> Iterator[None]:
    """Turn "disk full" and "not writable" while writing `target` into a UserError that names it.

    Also where a library (safetensors) wraps the system's error into one of its own.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        number = _errno_of(error)
        if number in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(
                f"{target}: the disk is full; free some space and run the same command again"
            ) from error
        if number == errno.EFBIG:
            raise UserError(
                f"{target}: larger than a file may be there (ulimit -f, or the kind of file system); raise the limit or "
                "choose another place"
            ) from error
        if number in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise UserError(
                f"{target}: not writable ({os.strerror(number)}); choose another place or mend its rights"
            ) from error
        raise


def _errno_of(error: Exception) -> int | None:
    if isinstance(error, OSError):
        return error.errno
    match = _ERRNO_IN_TEXT.search(str(error))
    return int(match[1]) if match else None


@contextmanager
def atomic_path(target: Path) -> Iterator[Path]:
    """Yield a temporary path beside `target`; on success it is fsynced and renamed onto `target`.

    On any error the temporary file is removed and `target` is left as it was.

    Raises:
        UserError: the disk is full or the folder is not writable.
    """
    target = Path(target)
    with disk_errors_as_user_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(
            dir=target.parent, prefix=f".{target.name}.", suffix=TEMPORARY_SUFFIX
        )
        os.close(descriptor)
        temporary = Path(name)
        try:
            yield temporary
            give_usual_mode(temporary)
            fsync_file(temporary)
            temporary.replace(target)
            fsync_directory(target.parent)
        finally:
            temporary.unlink(missing_ok=True)


def atomic_write_text(target: Path, text: str) -> None:
    """Write `text` (UTF-8) to `target`, whole or not at all."""
    with atomic_path(target) as temporary:
        temporary.write_text(text, encoding="utf-8")


def atomic_write_bytes(target: Path, data: bytes) -> None:
    """Write `data` to `target`, whole or not at all."""
    with atomic_path(target) as temporary:
        temporary.write_bytes(data)


@contextmanager
def atomic_directory(target: Path) -> Iterator[Path]:
    """Yield a temporary directory beside `target`; on success it is renamed to `target`, which must not exist.

    Raises:
        UserError: `target` exists already, the disk is full, or the folder is not writable.
    """
    target = Path(target)
    if target.exists():
        raise UserError(
            f"{target}: exists already and is never overwritten; choose another name or move it away"
        )
    with disk_errors_as_user_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(
            tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.", suffix=TEMPORARY_SUFFIX)
        )
        try:
            give_usual_mode(temporary)
            yield temporary
            for path in temporary.rglob("*"):
                if path.is_file():
                    fsync_file(path)
            try:
                temporary.rename(target)
            except OSError as error:
                if target.exists():
                    raise UserError(
                        f"{target}: appeared while it was being written; choose another name"
                    ) from error
                raise
            fsync_directory(target.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def give_usual_mode(path: Path) -> None:
    """Give a file or directory the rights that a plain `open` or `mkdir` would have given it.

    Temporary files, and those that safetensors writes, can be read by their owner alone.
    """
    path.chmod((0o777 if path.is_dir() else 0o666) & ~_umask())


@cache
def _umask() -> int:
    """The process's umask; asked once, because asking sets it for a moment, for all threads."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def content_hash(path: Path) -> str:
    """xxh3-128 of the whole content of a file, as 32 hex digits."""
    digest = xxhash.xxh3_128()
    with Path(path).open("rb") as file:
        while chunk := file.read(_READ_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def quick_fingerprint(path: Path) -> str:
    """Fingerprint of a file from its size and 256 evenly spaced 64 KiB blocks (all of it, if smaller).

    For naming inputs in reports and metadata: it costs 16 MiB of reading whatever the size. Where staleness
    matters (cache keys), use `content_hash`.
    """
    size = Path(path).stat().st_size
    digest = xxhash.xxh3_128(str(size).encode())
    with Path(path).open("rb") as file:
        if size <= _QUICK_BLOCK_BYTES * _QUICK_NUM_BLOCKS:
            while chunk := file.read(_READ_CHUNK_BYTES):
                digest.update(chunk)
        else:
            for block in range(_QUICK_NUM_BLOCKS):
                file.seek((size - _QUICK_BLOCK_BYTES) * block // (_QUICK_NUM_BLOCKS - 1))
                digest.update(file.read(_QUICK_BLOCK_BYTES))
    return digest.hexdigest()


def combined_fingerprint(paths: Iterable[Path]) -> str:
    """One fingerprint of several files in order (the shards of a checkpoint), from `quick_fingerprint` of each."""
    return xxhash.xxh3_128_hexdigest("-".join(quick_fingerprint(path) for path in paths).encode())
