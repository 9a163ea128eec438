"""What of a caption a visit sees: all of it, a window round a domain keyword, or the keyword alone.

A function of (seed, sample, visit), so it needs no state and resumes exactly. No message repeats a keyword.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import xxhash

from utils.config.keywords import keyword_pattern, read_keywords
from utils.config.schema import CaptionAugConfig
from utils.rng import generator

_WORD = re.compile(r"\S+")


@dataclass(frozen=True)
class CaptionAug:
    """The law of a checked `[model.caption_aug]`.

    Attributes:
        pattern: finds a keyword as a whole word; where several begin at one place, the longest.
        keywords_digest: names the list of keywords without showing it.
        single: share of visits that see the keyword alone.
        short: share of visits that see a window round it; all others see the whole caption.
        window_words: words in that window, separated by white space, the keyword's own included.
    """

    pattern: re.Pattern[str]
    keywords_digest: str
    single: float
    short: float
    window_words: int

    def augment(self, caption: str, seed: int, sample_id: int, visit: int) -> str:
        """What this visit sees. A caption without a keyword stays whole; of several keywords each is as likely."""
        found = list(self.pattern.finditer(caption))
        if not found:
            return caption
        draws = torch.rand(2, dtype=torch.float64, generator=generator(seed, "caption_aug", sample_id, visit))
        kind, place = draws.tolist()
        if kind >= self.single + self.short:
            return caption
        match = found[int(place * len(found))]
        # As the caption spells it: nothing is shown that nobody has written.
        return match[0] if kind < self.single else _window(caption, match, self.window_words)

    def num_with_keyword(self, captions: Iterable[str]) -> int:
        """How many of the captions hold a keyword."""
        return sum(self.pattern.search(caption) is not None for caption in captions)


def build_caption_aug(config: CaptionAugConfig | None) -> CaptionAug | None:
    """The law of a section that has passed the rules; None where there is none or it is switched off.

    Raises:
        UserError: the keyword file cannot be read.
    """
    if config is None or not config.enable:
        return None
    given = config.keywords if config.keywords_file is None else read_keywords(config.keywords_file)
    keywords = sorted({" ".join(keyword.split()) for keyword in given}, key=lambda word: (-len(word), word))
    single, short = _shares(config)
    return CaptionAug(
        pattern=keyword_pattern(keywords, case_insensitive=config.case_insensitive),
        keywords_digest=xxhash.xxh3_128_hexdigest("\0".join(keywords).encode()),
        single=single,
        short=short,
        window_words=config.trim_window_words,
    )


def _shares(config: CaptionAugConfig) -> tuple[float, float]:
    """Shares of the keyword alone and of the window, from either spelling."""
    if config.mix is not None:
        return config.mix.single, config.mix.short
    single = config.single_token or 0.0
    return single, (1.0 - single) * (config.trim_prob or 0.0)


def _window(caption: str, match: re.Match[str], num_words: int) -> str:
    """`num_words` words with the match in the middle, moved inwards at the caption's ends; all words of the match."""
    words = [word.span() for word in _WORD.finditer(caption)]
    first = next(index for index, (_, end) in enumerate(words) if end > match.start())
    last = max(index for index, (start, _) in enumerate(words) if start < match.end())
    size = min(max(num_words, last - first + 1), len(words))
    before = (size - (last - first + 1)) // 2
    begin = max(0, min(first - before, len(words) - size))
    return caption[words[begin][0] : words[begin + size - 1][1]]
