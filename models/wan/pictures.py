"""Decoded videos as pixels of a file."""

import numpy as np
import torch
from torch import Tensor


def to_frames(video_CFHW: Tensor) -> np.ndarray:
    """uint8 [F, H, W, 3] of a video in [-1, 1]; the inverse of `utils.data.media.scale_frames`."""
    pixels = ((video_CFHW.float() + 1.0) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return np.ascontiguousarray(pixels.permute(1, 2, 3, 0).cpu().numpy())
