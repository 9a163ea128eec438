"""The best approximation of rank r of a linear map that is known only by its products: subspace iteration.

Halko, Martinsson and Tropp 2011, "Finding structure with randomness", algorithm 4.4: a block of directions goes through
the map and its transpose again and again, orthonormalised in between. What the leading r directions hold of the map's
squared Frobenius norm grows with every pass, towards that of the best approximation (Eckart and Young).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

OVERSAMPLING = 8
TOLERANCE = 1e-5
MAX_PASSES = 30
_MIN_PASSES = 2

Product = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class TopSingular:
    """The leading part of a map L [O, I]: L is about left @ diag(values) @ right.T.

    Attributes:
        left: [O, r], orthonormal columns.
        values: [r], descending.
        right: [I, r], orthonormal columns.
        block: [I, k], the whole block of directions, for the start of a map that is alike.
        error: by what share the last pass raised the squared norm that `values` hold. Each pass raises it by less than the
            one before, so this is about how much is missing.
        num_passes: how many it took.
    """

    left: Tensor
    values: Tensor
    right: Tensor
    block: Tensor
    error: float
    num_passes: int


def top_singular(
    product: Product,
    transposed: Product,
    start: Tensor,
    rank: int,
    tolerance: float = TOLERANCE,
    max_passes: int = MAX_PASSES,
) -> TopSingular:
    """Find the leading `rank` singular values and directions.

    Args:
        product: [I, k] -> [O, k], the map.
        transposed: [O, k] -> [I, k], its transpose.
        start: [I, k], where to begin, k at least `rank`; random, or of a map that is alike.
        rank: how many, at most k and O.
        tolerance: passes end when one raises what is held by no more than this share.
        max_passes: at most so many.

    Raises:
        ValueError: `rank` is not between 1 and k.
    """
    if not 1 <= rank <= start.shape[1]:
        raise ValueError(f"rank {rank} of a block of {start.shape[1]}")
    block, held, passes, rise = start, 0.0, 0, 1.0
    while True:
        basis = torch.linalg.qr(product(block)).Q
        right, values, inner = torch.linalg.svd(transposed(basis), full_matrices=False)
        passes += 1
        before, held = held, float(values[:rank].square().sum())
        rise = max(held - before, 0.0) / held if held else 0.0
        block = right
        if passes >= max_passes or (passes >= _MIN_PASSES and rise <= tolerance) or not held:
            break
    left = basis @ inner.T[:, :rank]
    return TopSingular(left, values[:rank], right[:, :rank], block, rise, passes)


def balanced(up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    """The same product up @ down with the square roots of its singular values on either side.

    As an adapter's A and B then are of one size, training that starts from them moves both alike.

    Args:
        up: [O, r].
        down: [r, I].
    """
    up_basis, up_rest = torch.linalg.qr(up)
    down_basis, down_rest = torch.linalg.qr(down.T)
    left, values, right = torch.linalg.svd(up_rest @ down_rest.T)
    root = values.sqrt()
    return up_basis @ (left * root), (root[:, None] * right) @ down_basis.T
