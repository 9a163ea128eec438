"""The noise levels that a configuration trains on: the law for a variant and its experts, and telling it. No torch."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from models.wan.arch import VariantInfo
from utils.config.schema import ModelConfig
from utils.sigma_law import SigmaLaw, sigma_histogram

# Below this share of its draws a law is hardly one for the range that is trained: inside it nearly all draws crowd at the
# end that is nearer to the law's bulk.
FEW = 0.05
_BAR_WIDTH = 40


def build_sigma_law(model: ModelConfig, variant: VariantInfo) -> SigmaLaw:
    """The configured law of the noise level, restricted to what the chosen expert is responsible for.

    Raises:
        UserError: nothing is left of the range, or a bound lies on the other expert's side.
    """
    low, high = variant.sigma_range(model.expert, model.min_t, model.max_t)
    # At the boundary the high-noise expert begins.
    is_open = model.expert == "low_noise" and high == variant.boundary
    return SigmaLaw(model.timestep_sample_method, model.sigmoid_scale, model.shift, low, high, is_open)


def side_shares(law: SigmaLaw, variant: VariantInfo) -> dict[str, float]:
    """Share of the law, before any restriction, on each expert's side of the boundary; empty where there is none."""
    if variant.boundary is None:
        return {}
    below = law.probability_below(variant.boundary)
    return {"high_noise": 1 - below, "low_noise": below}


def share_of_range(law: SigmaLaw) -> float:
    """Share of the law, before any restriction, between its bounds."""
    return replace(law, min_t=0.0, max_t=1.0, is_open_above=False).share_between(law.min_t, law.max_t)


def noise_document(model: ModelConfig, variant: VariantInfo) -> dict[str, Any]:
    """The same facts for programs."""
    law = build_sigma_law(model, variant)
    return {
        "law": law.method,
        "sigmoid_scale": law.sigmoid_scale,
        "shift": law.shift,
        "median": law.quantile(0.5),
        "range": [law.min_t, law.max_t],
        "share_of_range": share_of_range(law),
        "shares_of_sides": side_shares(law, variant),
        "shares_by_tenth": {str(one): one.share for one in sigma_histogram(law) if one.share > 0},
    }


def describe_noise(model: ModelConfig, variant: VariantInfo) -> list[str]:
    """The histogram of timesteps for people, each expert's share, and a warning where the range is hardly visited."""
    return noise_lines(noise_document(model, variant), model.expert)


def noise_lines(document: Mapping[str, Any], expert: str | None) -> list[str]:
    """`describe_noise` from the document."""
    low, high = document["range"]
    scale = f", scale {document['sigmoid_scale']:g}" if document["law"] == "logit_normal" else ""
    lines = [
        f"timesteps (noise level x 1000) that are drawn, {document['law']}{scale} with shift {document['shift']:g}:"
    ]
    shares = document["shares_by_tenth"]
    most = max(shares.values())
    for name, share in shares.items():
        first, last = (round(float(edge) * 1000) for edge in name.split("-"))
        bar = "#" * max(1, round(_BAR_WIDTH * share / most)) if share >= 0.0005 else ""
        lines.append(
            f"  {max(first, low * 1000):5.0f} - {min(last, high * 1000):4.0f} {share:6.1%} {bar}".rstrip()
        )
    sides = document["shares_of_sides"]
    if sides:
        told = ", ".join(f"{share:.1%} on the side of {side}" for side, share in sides.items())
        lines.append(f"  the law as such, before it is cut to a side: {told}")
    return lines + [f"warning: {one}" for one in noise_warnings(document, expert)]


def noise_warnings(document: Mapping[str, Any], expert: str | None) -> list[str]:
    """What is said where the law hardly visits the range that is trained."""
    share, median = document["share_of_range"], document["median"]
    low, high = document["range"]
    if share >= FEW or low <= median <= high:
        return []
    where = f"the range of the {expert} expert" if expert else f"min_t = {low:g} to max_t = {high:g}"
    direction = "raise" if median < low else "lower"
    return [
        f"only {share:.2%} of the chosen law lies in {where} ({low:g}-{high:g}), so that nearly all draws crowd at one end of "
        f'it; {direction} model.shift, or choose timestep_sample_method = "uniform"'
    ]
