"""The cache of encoded items, addressed by content: an item's key is a hash of everything that made it."""

import json
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import safetensors.torch
import torch
import xxhash
from safetensors import SafetensorError, safe_open

from utils.data.buckets import MediaRules
from utils.data.manifest import SampleRecord
from utils.data.media import PREPROCESSING_VERSION
from utils.errors import UserError
from utils.files import atomic_write_bytes, atomic_write_text, disk_errors_as_user_errors

STORE_FORMAT = 1

Setting = str | int | float | bool | None

_KEY = re.compile(r"([a-z_]+)/([0-9a-f]{32})")
_KIND = re.compile(r"[a-z_]+")
_SUFFIX = ".safetensors"
_CHECKSUM, _KEY_FIELD = "checksum", "key"


def latent_key(
    record: SampleRecord,
    rules: MediaRules,
    vae_hash: str,
    vae_dtype: str,
    settings: Mapping[str, Setting] | None = None,
) -> str:
    """Key of a sample's latents: file content, bucket, clip, preprocessing, weights and precision.

    The caption, the file's name and `num_repeats` do not enter; frame rate and clip start only for videos.

    Args:
        record: the sample.
        rules: of the model's variant.
        vae_hash: fingerprint of the VAE's weights.
        vae_dtype: precision it encodes in.
        settings: anything else that changes the result.
    """
    is_video = record.kind == "video"
    return _make_key(
        "latents",
        content=record.content_hash,
        bucket=[record.bucket.width, record.bucket.height, record.bucket.num_frames],
        fps=float(rules.fps) if is_video else None,
        clip_start_seconds=record.clip_start_seconds if is_video else None,
        preprocessing=PREPROCESSING_VERSION,
        weights=vae_hash,
        dtype=vae_dtype,
        settings=dict(settings or {}),
    )


def text_key(
    caption: str,
    encoder_hash: str,
    tokenizer_hash: str,
    dtype: str,
    settings: Mapping[str, Setting] | None = None,
) -> str:
    """Key of a caption's embedding: the text, encoder and tokenizer weights, precision.

    Args:
        caption: as the sample has it.
        encoder_hash: fingerprint of the encoder's weights.
        tokenizer_hash: fingerprint of the tokenizer's files.
        dtype: precision the encoder runs in.
        settings: anything else that changes the result (attention implementation, longest length, ...).
    """
    return _make_key(
        "text",
        caption=caption,
        weights=encoder_hash,
        tokenizer=tokenizer_hash,
        dtype=dtype,
        settings=dict(settings or {}),
    )


def _make_key(kind: str, **parts: object) -> str:
    canonical = json.dumps(parts, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return f"{kind}/{xxhash.xxh3_128_hexdigest(canonical.encode())}"


class _DamagedError(Exception):
    """An item that is there is not whole; the message says in what way."""


class CacheStore:
    """Items of named tensors on disk, one safetensors file each: `items/<kind>/<2 hex>/<digest>.safetensors`.

    An item is written under another name and renamed, so that it is there whole or not at all, and several
    processes may fill one store. A checksum inside is compared when a process first reads the item.
    """

    def __init__(self, root: Path) -> None:
        """Open the store at `root`, making it if it is not there.

        With the default place, inside a directory of the dataset, build the manifest first: it says so if the
        directory is missing, where this would make it.

        Raises:
            UserError: it was made by a newer version, or cannot be written.
        """
        self.root = root
        self._verified: set[str] = set()
        self._open_format()

    def path(self, key: str) -> Path:
        """Where the item is, or would be.

        Raises:
            ValueError: `key` is not of the form `<kind>/<32 hex digits>`.
        """
        return self.root / "items" / "/".join(_place(key))

    def has(self, key: str) -> bool:
        """Whether the item is there (see `verify` for whether it is whole)."""
        return self.path(key).is_file()

    def missing(self, keys: Iterable[str]) -> list[str]:
        """Those of `keys` that are not there, in order, each once. Lists folders instead of asking for each file."""
        wanted_by_folder: dict[tuple[str, str], dict[str, str]] = defaultdict(dict)
        order = dict.fromkeys(keys)
        for key in order:
            kind, prefix, name = _place(key)
            wanted_by_folder[kind, prefix][name] = key
        for (kind, prefix), wanted in wanted_by_folder.items():
            for name in _file_names(self.root / "items" / kind / prefix):
                order.pop(wanted.get(name, ""), None)
        return list(order)

    def put(
        self, key: str, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None
    ) -> None:
        """Write an item, in place of an earlier one of the same key.

        Args:
            key: from `latent_key` or `text_key`.
            tensors: on any device, of any strides.
            metadata: text kept in the file's header for people and tools.

        Raises:
            UserError: the disk is full or the store cannot be written.
        """
        plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        own = {_CHECKSUM: _checksum(plain), _KEY_FIELD: key}
        # Serialised here and written by Python: safetensors' own writer hides "disk full" in a message of its own.
        atomic_write_bytes(self.path(key), safetensors.torch.save(plain, {**(metadata or {}), **own}))
        self._verified.add(key)

    def get(self, key: str) -> dict[str, torch.Tensor]:
        """The item's tensors, mapped from the file. Do not write to them.

        Raises:
            UserError: it is not there, or is damaged (then it is removed).
        """
        path = self.path(key)
        tensors = self._read(key)
        if tensors is None:
            raise UserError(
                f"{path}: this item of the cache is missing or was damaged and has been removed; "
                "run with --cache_only to make it anew"
            )
        return tensors

    def metadata(self, key: str) -> dict[str, str]:
        """The text that `put` was given with an item that is there."""
        with safe_open(self.path(key), framework="pt") as file:
            metadata = file.metadata() or {}
        return {name: value for name, value in metadata.items() if name not in (_CHECKSUM, _KEY_FIELD)}

    def verify(self, key: str) -> bool:
        """Read the item and compare its checksum. False: it is not there, or was damaged and has been removed."""
        self._verified.discard(key)
        return self._read(key) is not None

    def remove(self, key: str) -> None:
        """Delete the item, if it is there."""
        self.path(key).unlink(missing_ok=True)
        self._verified.discard(key)

    def damage(self, key: str) -> str | None:
        """Read the item, compare its checksum and say what is wrong with it; None where it is whole or not there.

        Unlike `verify` it leaves a damaged item where it is.
        """
        self._verified.discard(key)
        try:
            self._load(key)
        except _DamagedError as error:
            return str(error)
        return None

    def kinds(self) -> list[str]:
        """The kinds of items that the store has folders for."""
        return sorted(name for name in _file_names(self.root / "items") if _KIND.fullmatch(name))

    def keys(self, kind: str) -> Iterator[str]:
        """Keys of all items of a kind, in the order of their digests; other files are passed over."""
        folder = self.root / "items" / kind
        for prefix in sorted(_file_names(folder)):
            for name in sorted(_file_names(folder / prefix)):
                key = f"{kind}/{name.removesuffix(_SUFFIX)}"
                if _KEY.fullmatch(key) and _place(key) == (kind, prefix, name):
                    yield key

    def _read(self, key: str) -> dict[str, torch.Tensor] | None:
        try:
            return self._load(key)
        except _DamagedError:
            self.remove(key)
            return None

    def _load(self, key: str) -> dict[str, torch.Tensor] | None:
        """The tensors, None where the item is not there; raises _DamagedError."""
        path = self.path(key)
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        except FileNotFoundError:
            return None
        except OSError as error:
            raise UserError(f"{path}: not readable ({error.strerror or error}); mend its rights") from error
        except SafetensorError as error:
            raise _DamagedError("is not a whole safetensors file") from error
        if key not in self._verified:
            if metadata.get(_KEY_FIELD) != key:
                raise _DamagedError("holds another item than its name says")
            if metadata.get(_CHECKSUM) != _checksum(tensors):
                raise _DamagedError("does not match its checksum")
            self._verified.add(key)
        return tensors

    def _open_format(self) -> None:
        path = self.root / "FORMAT"
        with disk_errors_as_user_errors(self.root):
            try:
                self.root.mkdir(parents=True, exist_ok=True)
                text = path.read_text(encoding="utf-8", errors="replace").strip()
            except (FileExistsError, NotADirectoryError) as error:
                raise UserError(
                    f"{self.root}: a file is in the way; name another cache_dir in the dataset"
                ) from error
            except FileNotFoundError:
                atomic_write_text(path, f"{STORE_FORMAT}\n")
                return
        if text != str(STORE_FORMAT):
            raise UserError(
                f"{path}: this cache has format {text[:20]!r}, and this version reads format {STORE_FORMAT}; "
                "use the version that made it, or name another cache_dir in the dataset"
            )


def _place(key: str) -> tuple[str, str, str]:
    """Folder of the kind, folder of the first two digits, and file name of an item."""
    match = _KEY.fullmatch(key)
    if match is None:
        raise ValueError(f"{key!r} is not a cache key")
    kind, digest = match.groups()
    return kind, digest[:2], digest + _SUFFIX


def _file_names(folder: Path) -> list[str]:
    try:
        with os.scandir(folder) as entries:
            return [entry.name for entry in entries]
    except (FileNotFoundError, NotADirectoryError):
        return []


def _checksum(tensors: Mapping[str, torch.Tensor]) -> str:
    """xxh3-128 over names, types, shapes and bytes."""
    digest = xxhash.xxh3_128()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name}|{tensor.dtype}|{list(tensor.shape)}|".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
