"""Rotary position embedding over (frame, row, column), real-valued and precomputed per grid.

Same mathematics as the official complex-valued code (`wan/modules/model.py`, `rope_params` and `rope_apply`):
head width K splits into K - 4 * (K // 6) channels for time and 2 * (K // 6) each for row and column; neighbouring
channels (2i, 2i + 1) form the pair that is rotated; theta = 10000. Tables are built in float64.
"""

from functools import lru_cache

import torch
from torch import Tensor

_THETA = 10000.0
Grid = tuple[int, int, int]


@lru_cache(maxsize=16)
def rope_table(grid: Grid, head_dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosine and sine tables for a grid of (frames, rows, columns) tokens, each float32 of shape [S, 1, K / 2].

    Tokens are in row-major order of the grid. Kept for the last 16 grids, because a bucket comes back every step.
    """
    spatial = 2 * (head_dim // 6)
    widths = (head_dim - 2 * spatial, spatial, spatial)
    with torch.no_grad():
        angles = []
        for axis, (length, width) in enumerate(zip(grid, widths, strict=True)):
            inverse_frequency = _THETA ** -(torch.arange(0, width, 2, dtype=torch.float64) / width)
            angle = torch.outer(torch.arange(length, dtype=torch.float64), inverse_frequency)
            view = [1, 1, 1, width // 2]
            view[axis] = length
            angles.append(angle.view(view).expand(*grid, width // 2))
        angle_SK = torch.cat(angles, dim=-1).reshape(-1, 1, head_dim // 2)
        return angle_SK.cos().float().to(device), angle_SK.sin().float().to(device)


def apply_rope(states_BSNK: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate channel pairs of queries or keys [B, S, N, K] by the angles of `rope_table`; same shape and dtype."""
    cos, sin = table
    even, odd = states_BSNK.unflatten(-1, (-1, 2)).unbind(-1)
    rotated = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
    return rotated.flatten(-2).to(states_BSNK.dtype)
