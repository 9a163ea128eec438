"""Prompts that belong to Wan itself."""

from collections.abc import Iterable

EMPTY_PROMPT = ""
# `sample_neg_prompt` of wan/configs/shared_config.py of the official repository: what guidance moves away from.
NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，"
    "丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，"
    "杂乱的背景，三条腿，背景人很多，倒着走"
)


def with_wan_prompts(prompts: Iterable[str]) -> tuple[str, ...]:
    """Neutral prompts with the two that every generation depends on: the empty one and the negative one, each once."""
    return tuple(dict.fromkeys((EMPTY_PROMPT, NEGATIVE_PROMPT, *prompts)))
