"""How far a LoRA moves the weights: ||scale * B A||_F / ||W||_F per module, without ever forming B A.

With the r x r Gram matrices G_A = A A^T and G_B = B^T B (r is the rank),

    ||B A||_F^2 = tr(A^T B^T B A) = tr(G_B G_A) = sum(G_B * G_A)

and the singular values of B A are the roots of the eigenvalues of G_A^(1/2) G_B G_A^(1/2). All sums are float64. Rounding
is relative to ||A||_F ||B||_F: a product that cancels to less than 1e-8 of that is reported as about 0.

Works on a file's tensors and, during training, on live ones: each module costs one small copy to the CPU.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from utils.module_paths import block_of, type_of

# A ratio that a projection has just put on its cap may lie above it by rounding; that is not over the cap.
CAP_TOLERANCE = 1e-6
# Elements that are converted at once: on a processor what its cache holds, which is ten times as fast as large pieces;
# elsewhere enough to keep the device busy.
_CPU_PIECE, _DEVICE_PIECE = 1 << 16, 1 << 22


@dataclass(frozen=True)
class ModuleDelta:
    """What an adapter does to one module.

    Attributes:
        module: official path, such as `blocks.3.cross_attn.k`.
        rank: rows of A.
        scale: factor on B A, usually alpha / rank.
        delta_norm: ||scale * B A||_F.
        weight_norm: ||W||_F of the base.
        ratio: delta_norm / weight_norm.
        effective_rank: see `effective_rank`.
    """

    module: str
    rank: int
    scale: float
    delta_norm: float
    weight_norm: float
    ratio: float
    effective_rank: float

    @property
    def block(self) -> int | None:
        """Index of the block, None for a module outside the blocks."""
        return block_of(self.module)

    @property
    def type(self) -> str:
        """`cross_attn`, `self_attn`, `ffn`, or the first part of the path of a module outside the blocks."""
        return type_of(self.module)

    def is_over(self, cap: float) -> bool:
        """True if the ratio is over the cap, or is not a number."""
        return not self.ratio <= cap * (1 + CAP_TOLERANCE)


@dataclass(frozen=True)
class GroupDelta:
    """The ratios of a group of modules, such as one block."""

    group: str
    num_modules: int
    mean_ratio: float
    max_ratio: float
    worst_module: str


@dataclass(frozen=True)
class DeltaSummary:
    """Ratios over all modules, per block (ascending, modules outside the blocks last) and per type (by name)."""

    overall: GroupDelta
    blocks: tuple[GroupDelta, ...]
    types: tuple[GroupDelta, ...]


def delta_norm(a: Tensor, b: Tensor, scale: float = 1.0) -> float:
    """||scale * B A||_F.

    Args:
        a: A, [rank, in]; that of a convolution has more axes, which count as one.
        b: B, [out, rank], likewise.
        scale: factor on the product.

    Raises:
        ValueError: the ranks of A and B differ.
    """
    gram_a, gram_b = _grams(a, b)
    return abs(scale) * _norm_from_grams(gram_a, gram_b)


def effective_rank(a: Tensor, b: Tensor) -> float:
    """Number of directions that B A really uses: exp of the entropy of its singular values, normalised to sum 1.

    Between 1 and the rank; 0 for a product that is 0. (Roy and Vetterli, "The effective rank", EUSIPCO 2007.)
    """
    return _rank_from_grams(*_grams(a, b))


def spectral_delta_norm(a: Tensor, b: Tensor, scale: float = 1.0) -> float:
    """The largest singular value of scale * B A.

    Raises:
        ValueError: the ranks of A and B differ.
    """
    return abs(scale) * _singular_values(*_grams(a, b)).max().item()


def weight_norm(weight: Tensor) -> float:
    """||W||_F, summed in float64 over pieces, so that no float64 copy of the whole is made."""
    flat = weight.detach().reshape(-1)
    total = torch.zeros((), dtype=torch.float64, device=weight.device)
    for piece in flat.split(_CPU_PIECE if weight.device.type == "cpu" else _DEVICE_PIECE):
        exact = piece.double()
        total += torch.dot(exact, exact)
    return math.sqrt(total.item())


def module_delta(module: str, a: Tensor, b: Tensor, scale: float, base_norm: float) -> ModuleDelta:
    """Measure one module; `base_norm` is `weight_norm` of its base weight, which never changes and is taken once.

    Where the base weight is all zeros the ratio is infinite (0 if the adapter does nothing either).

    Raises:
        ValueError: the ranks of A and B differ.
    """
    gram_a, gram_b = _grams(a, b)
    norm = abs(scale) * _norm_from_grams(gram_a, gram_b)
    ratio = norm / base_norm if base_norm else math.inf if norm else 0.0
    return ModuleDelta(module, a.shape[0], scale, norm, base_norm, ratio, _rank_from_grams(gram_a, gram_b))


def over_cap(deltas: Iterable[ModuleDelta], cap: float) -> list[ModuleDelta]:
    """The modules over the cap, or not a number, the farthest first."""
    return sorted((delta for delta in deltas if delta.is_over(cap)), key=_sort_key, reverse=True)


def summarise(deltas: Sequence[ModuleDelta]) -> DeltaSummary:
    """Means and maxima of the ratios, overall, per block and per type.

    Raises:
        ValueError: there are no modules.
    """
    if not deltas:
        raise ValueError("no modules to summarise")
    blocks: dict[int | None, list[ModuleDelta]] = {}
    types: dict[str, list[ModuleDelta]] = {}
    for delta in deltas:
        blocks.setdefault(delta.block, []).append(delta)
        types.setdefault(delta.type, []).append(delta)
    numbered = sorted(block for block in blocks if block is not None)
    return DeltaSummary(
        overall=_group("all", deltas),
        blocks=tuple(_group(str(block), blocks[block]) for block in numbered)
        + ((_group("other", blocks[None]),) if None in blocks else ()),
        types=tuple(_group(name, types[name]) for name in sorted(types)),
    )


def _grams(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """A A^T and B^T B, [rank, rank], float64, on the CPU."""
    a64, b64 = a.detach().flatten(1).double(), b.detach().flatten(1).double()
    if a64.shape[0] != b64.shape[1]:
        raise ValueError(f"A is {list(a.shape)} and B is {list(b.shape)}: their ranks differ")
    gram_a, gram_b = torch.stack((a64 @ a64.T, b64.T @ b64)).cpu()
    return gram_a, gram_b


def _norm_from_grams(gram_a: Tensor, gram_b: Tensor) -> float:
    squared = (gram_a * gram_b).sum().item()
    return math.sqrt(squared) if squared > 0 else squared if math.isnan(squared) else 0.0


def _rank_from_grams(gram_a: Tensor, gram_b: Tensor) -> float:
    if not (gram_a.isfinite().all() and gram_b.isfinite().all()):
        return math.nan
    singular = _singular_values(gram_a, gram_b)
    total = singular.sum()
    if total == 0:
        return 0.0
    shares = singular / total
    return math.exp(torch.special.entr(shares).sum().item())


def _singular_values(gram_a: Tensor, gram_b: Tensor) -> Tensor:
    values_a, vectors_a = torch.linalg.eigh(gram_a)
    root_a = vectors_a * values_a.clamp(min=0).sqrt()
    return torch.linalg.eigvalsh(root_a.T @ gram_b @ root_a).clamp(min=0).sqrt()


def _sort_key(delta: ModuleDelta) -> float:
    return math.inf if math.isnan(delta.ratio) else delta.ratio


def _group(name: str, deltas: Sequence[ModuleDelta]) -> GroupDelta:
    worst = max(deltas, key=_sort_key)
    mean = sum(delta.ratio for delta in deltas) / len(deltas)
    return GroupDelta(name, len(deltas), mean, worst.ratio, worst.module)
