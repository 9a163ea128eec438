"""Weights in 8 bits with a scale beside each, read as plain numbers; other kinds of quantisation are refused by name."""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from utils.errors import UserError
from utils.tensor_source import TensorSource, more_names

if TYPE_CHECKING:
    import torch

SCALED_FP8_MARK = "scaled_fp8"
_WEIGHT_SCALE = ".scale_weight"
_SCALE_SUFFIXES = (_WEIGHT_SCALE, ".scale_input")


def plain_weights(source: TensorSource) -> TensorSource:
    """The source with every weight as a plain number: itself, or a `ScaledSource` where it has 8-bit weights with scales.

    Raises:
        UserError: weights are quantised in a way that is not known here, or have no scale.
    """
    quantised = [name for name, dtype in source.dtypes.items() if is_quantised(name, dtype)]
    if has_mark(source.shapes) or any(
        name.removesuffix(".weight") + _WEIGHT_SCALE in source.shapes for name in quantised
    ):
        return ScaledSource(source)
    if not quantised:
        return source
    name = quantised[0]
    other = [scale for scale in _unknown_scales(name) if scale in source.shapes]
    why = f"with a scale of a kind that is not known here ({other[0]})" if other else "without a scale"
    raise UserError(
        f"{source.files[0]}: {name} is stored as {source.dtypes[name]} {why}{more_names(quantised)}; give the bf16 or fp16 file, "
        f"or one in ComfyUI's fp8_scaled format (X{_WEIGHT_SCALE} beside each X.weight)"
    )


def has_mark(names: Iterable[str]) -> bool:
    """Whether one of the names is the mark of scaled files, with or without the prefix of its part."""
    return any(_is_mark(name) for name in names)


def _is_mark(name: str) -> bool:
    return name == SCALED_FP8_MARK or name.endswith(f".{SCALED_FP8_MARK}")


def is_quantised(name: str, dtype: str) -> bool:
    """Whether a tensor is a weight in 8 bits or fewer, which is not what its numbers say."""
    if not name.endswith(".weight"):
        return False
    return dtype.startswith(("F8", "F4", "F6")) or dtype in ("I8", "U8")


def _unknown_scales(weight: str) -> tuple[str, ...]:
    module = weight.removesuffix(".weight")
    return tuple(module + suffix for suffix in (".weight_scale", ".weight_scale_inv", ".weight_scale_2"))


class ScaledSource(TensorSource):
    """A file whose linear weights are float8 with a scale beside each (ComfyUI's `fp8_scaled`), shown as plain weights.

    The mark `scaled_fp8` and the scales (`X.scale_weight`, and `X.scale_input`, which is for computing in 8 bits) are
    hidden; `get` multiplies.
    """

    def __init__(self, base: TensorSource) -> None:
        """Wrap a source that has the mark, or scales.

        Raises:
            UserError: a scale has no weight or is not one number, or a float8 weight has no scale.
        """
        self._base = base
        self.files = base.files
        hidden = {name for name in base.shapes if _is_mark(name) or name.endswith(_SCALE_SUFFIXES)}
        self._scale_of = {
            name.removesuffix(_WEIGHT_SCALE) + ".weight": name
            for name in hidden
            if name.endswith(_WEIGHT_SCALE)
        }
        self.shapes = {name: shape for name, shape in base.shapes.items() if name not in hidden}
        self.dtypes = {name: "F32" if name in self._scale_of else base.dtypes[name] for name in self.shapes}
        for weight, scale in self._scale_of.items():
            if weight not in self.shapes:
                raise UserError(f"{self.files[0]}: has {scale} but no {weight}; download it again")
            if math.prod(base.shapes[scale]) != 1:
                raise UserError(
                    f"{self.files[0]}: {scale} has the shape {list(base.shapes[scale])}, and only one scale per weight is "
                    "known here; give a bf16 or fp16 file"
                )
        bare = [
            name
            for name, dtype in self.dtypes.items()
            if dtype.startswith("F8") and name not in self._scale_of
        ]
        if bare:
            raise UserError(
                f"{self.files[0]}: has scales or the mark {SCALED_FP8_MARK}, but {bare[0]} is in 8 bits without a "
                f"scale (X{_WEIGHT_SCALE}){more_names(bare)}; give the bf16 or fp16 file"
            )

    def get(self, name: str) -> "torch.Tensor":
        """Read one tensor; a scaled one in float32, multiplied by its scale."""
        self._check_name(name)
        if name not in self._scale_of:
            return self._base.get(name)
        return self._base.get(name).float() * self._base.get(self._scale_of[name]).float()

    def metadata(self) -> dict[str, str]:
        """The metadata of the file behind."""
        return self._base.metadata()

    def stored_in_8_bits(self, name: str) -> "tuple[torch.Tensor, torch.Tensor] | None":
        """See `TensorSource`. Only of e4m3, which is the format that is computed with."""
        self._check_name(name)
        if name not in self._scale_of or self._base.dtypes[name] != "F8_E4M3":
            return None
        return self._base.get(name).clone(), self._base.get(self._scale_of[name]).float().reshape(1, 1)

    def location(self, name: str) -> tuple[Path, int, int] | None:
        """See `TensorSource`; None of a scaled weight, whose bytes are not its numbers."""
        self._check_name(name)
        return None if name in self._scale_of else self._base.location(name)

    def release(self) -> None:
        """See `TensorSource`."""
        self._base.release()
