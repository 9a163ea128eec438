"""Prompts that Wan itself uses at every sampling, and the neutral prompts that an encoder is held against. No torch."""

from pathlib import Path

from utils.prompt_files import NEUTRAL_PROMPTS, read_prompt_file

EMPTY_PROMPT = ""
# `sample_neg_prompt` of wan/configs/shared_config.py in the official repository (Wan-Video/Wan2.2), verbatim. It goes
# into every sample's unconditional half, so an encoder that moves it moves every picture.
NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，"
    "丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，"
    "杂乱的背景，三条腿，背景人很多，倒着走"
)
ALWAYS_NEUTRAL = (EMPTY_PROMPT, NEGATIVE_PROMPT)


def neutral_prompts(path: str | Path | None = None) -> tuple[str, ...]:
    """The empty prompt, Wan's negative prompt, and those of a file: by default `configs/prompts/neutral.txt`.

    Raises:
        UserError: as `read_prompt_file`.
    """
    return tuple(dict.fromkeys((*ALWAYS_NEUTRAL, *read_prompt_file(path or NEUTRAL_PROMPTS))))
