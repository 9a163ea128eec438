"""How much two pictures or clips differ. The only module that imports scikit-image."""

import numpy as np


def structural_similarity(first_FHWC: np.ndarray, second_FHWC: np.ndarray) -> float:
    """SSIM of two clips of uint8 RGB frames, the mean over frames: 1 where they are equal.

    scikit-image's, over 7 x 7 px windows (the largest odd size that fits, in smaller pictures).

    Raises:
        ValueError: other shapes, or sides below 3 px.
    """
    from skimage.metrics import structural_similarity as ssim

    if first_FHWC.shape != second_FHWC.shape:
        raise ValueError(f"{first_FHWC.shape} against {second_FHWC.shape}")
    shortest = min(first_FHWC.shape[1:3])
    window = min(7, shortest if shortest % 2 else shortest - 1)
    pairs = zip(first_FHWC, second_FHWC, strict=True)
    return float(np.mean([ssim(a, b, channel_axis=-1, data_range=255, win_size=window) for a, b in pairs]))
