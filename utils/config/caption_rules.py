"""Rules about `[model.caption_aug]`: where it works, where its keywords come from, and how its law is written."""

import math

from utils.config.rules import Rule
from utils.config.schema import Problem, TrainConfig

_SECTION = "model.caption_aug"
_SUM_TOLERANCE = 1e-6


def check_caption_aug_mode(config: TrainConfig) -> list[Problem]:
    """caption_aug is for encoder_ft: in dit_lora captions are encoded once, before any visit."""
    model = config.model
    # Where the two switches contradict each other, the mode that is meant is unknown, and another rule says so.
    is_dit_lora = model.cache_text_embeddings and not model.train_text_encoder
    if model.caption_aug is None or not model.caption_aug.enable or not is_dit_lora:
        return []
    reason = (
        "would do nothing in dit_lora: each caption is encoded once and read from the cache at every visit, "
        "so it is always the whole one"
    )
    fix = (
        "take the section out or write enable = false, or switch to encoder_ft (cache_text_embeddings = false, "
        "train_text_encoder = true)"
    )
    return [Problem(_SECTION, reason, fix)]


def check_caption_aug_keywords(config: TrainConfig) -> list[Problem]:
    """caption_aug has its keywords from keywords or from keywords_file, and from one of them only."""
    aug = config.model.caption_aug
    if aug is None:
        return []
    if aug.keywords and aug.keywords_file is not None:
        reason = "is given together with keywords: which of the two counts is not clear"
        fix = "keep keywords_file, which keeps the words out of run directories, or keep keywords"
        return [Problem(f"{_SECTION}.keywords_file", reason, fix)]
    if aug.enable and not aug.keywords and aug.keywords_file is None:
        reason = "is enabled without keywords, so every caption would stay whole"
        return [Problem(_SECTION, reason, "give keywords_file (a private file, one per line) or keywords")]
    return []


def check_caption_aug_law(config: TrainConfig) -> list[Problem]:
    """caption_aug's law is either single_token and trim_prob, or a mix whose shares add up to 1; never both."""
    aug = config.model.caption_aug
    if aug is None:
        return []
    given = [name for name in ("single_token", "trim_prob") if getattr(aug, name) is not None]
    if aug.mix is None:
        if given or not aug.enable:
            return []
        reason = "is enabled without a law, so every caption would stay whole"
        return [Problem(_SECTION, reason, "give single_token, trim_prob or both, or mix")]
    if given:
        reason = (
            f"is given together with {' and '.join(given)}: the two are ways to write the same probabilities"
        )
        return [Problem(f"{_SECTION}.mix", reason, f"take out mix or {' and '.join(given)}")]
    total = math.fsum((aug.mix.single, aug.mix.short, aug.mix.verbose))
    if abs(total - 1.0) > _SUM_TOLERANCE:
        reason = f"adds up to {total:g}, and every visit sees exactly one of the three"
        return [Problem(f"{_SECTION}.mix", reason, "e.g. mix = { single = 0.2, short = 0.3, verbose = 0.5 }")]
    return []


CAPTION_RULES = (
    Rule(
        check_caption_aug_mode,
        ("model.cache_text_embeddings", "model.train_text_encoder", f"{_SECTION}.enable"),
    ),
    Rule(
        check_caption_aug_keywords,
        (f"{_SECTION}.enable", f"{_SECTION}.keywords", f"{_SECTION}.keywords_file"),
    ),
    Rule(
        check_caption_aug_law,
        (f"{_SECTION}.enable", f"{_SECTION}.single_token", f"{_SECTION}.trim_prob", f"{_SECTION}.mix"),
    ),
)
