"""Which prompts a closed-form adapter is fitted on, which are held out to judge it, and which hold what is to be kept.

Prompts may be private: no message repeats them, and reports have their numbers alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from models.wan.prompts import ALWAYS_NEUTRAL
from utils.config.keywords import keyword_pattern, read_keywords
from utils.errors import UserError
from utils.neutral_grammar import neutral_captions
from utils.prompt_files import NEUTRAL_PROMPTS, read_prompt_file
from utils.rng import derive_seed

Role = Literal["anchor", "neutral", "domain"]
# Of a user's prompts: enough to judge by, and the rest to fit on.
HELD_OUT_SHARE = 0.15
MAX_HELD_OUT = 60
MIN_FOR_HELD_OUT = 4


@dataclass(frozen=True)
class FitPrompt:
    """A prompt; `is_held` where it judges and is not fitted on."""

    text: str
    role: Role
    is_held: bool = False


@dataclass(frozen=True)
class FitPlan:
    """All prompts, those that are fitted on in an order drawn at random; remarks about where they come from.

    `anchor` prompts are those that Wan reads at every sampling: always fitted on.
    """

    prompts: tuple[FitPrompt, ...]
    remarks: tuple[str, ...] = ()

    def of(self, role: Role, *, is_held: bool) -> tuple[FitPrompt, ...]:
        """The prompts of one kind."""
        return tuple(prompt for prompt in self.prompts if prompt.role == role and prompt.is_held == is_held)


def plan_fit(
    prompts: Path | None, domain_prompts: Path | None, keywords_file: Path | None, seed: int
) -> FitPlan:
    """Read the files and decide what is held out.

    Args:
        prompts: neutral ones; None: the captions of `utils.neutral_grammar`, judged by those of configs/prompts/neutral.txt,
            which another hand wrote.
        domain_prompts: prompts whose tokens are to be kept.
        keywords_file: keywords; prompts of `prompts` that hold one are domain prompts.
        seed: says which prompts are held out, and their order.

    Raises:
        UserError: a file cannot be used, a keyword stands in no prompt, a prompt is neutral and of the domain, or no
            neutral prompt is left. Says where, never what.
    """
    remarks: list[str] = []
    given = read_prompt_file(prompts) if prompts is not None else neutral_captions()
    neutral = [text for text in given if text not in ALWAYS_NEUTRAL]
    domain = list(read_prompt_file(domain_prompts)) if domain_prompts is not None else []
    both = set(neutral) & set(domain)
    if both:
        raise UserError(
            f'"{domain_prompts}": {len(both)} of its prompts are among the neutral ones too; a prompt is one or the other'
        )
    if keywords_file is not None:
        neutral, domain = _split_by_keywords(neutral, keywords_file, prompts)
        remarks.append(f"{len(domain)} of {len(given)} prompts hold a keyword and are the domain's")
    if not neutral:
        raise UserError(f'"{prompts}": no neutral prompt is left to restore; add prompts without a keyword')
    if not domain:
        remarks.append(
            "warning: without --domain_prompts or --keywords_file nothing asks new words to stay what the encoder made them"
        )
    held = (
        [] if prompts is not None else [t for t in read_prompt_file(NEUTRAL_PROMPTS) if t not in set(neutral)]
    )
    plan = [FitPrompt(text, "anchor") for text in ALWAYS_NEUTRAL]
    if held:
        remarks.append(
            f"neutral prompts: {len(neutral)} of the project's grammar; held out: those of {NEUTRAL_PROMPTS.name}"
        )
        plan += [FitPrompt(text, "neutral", True) for text in held]
        plan += [FitPrompt(text, "neutral") for text in _drawn(neutral, seed)]
    else:
        plan += _with_held_out(neutral, "neutral", seed)
    plan += _with_held_out(domain, "domain", seed)
    return FitPlan(tuple(plan), tuple(remarks))


def _split_by_keywords(
    texts: Sequence[str], keywords_file: Path, prompts: Path | None
) -> tuple[list[str], list[str]]:
    keywords = read_keywords(keywords_file)
    pattern = keyword_pattern(keywords, case_insensitive=True)
    domain = [text for text in texts if pattern.search(text)]
    absent = []
    for number, keyword in enumerate(keywords, start=1):
        own = keyword_pattern([keyword], case_insensitive=True)
        if not any(own.search(text) for text in domain):
            absent.append(number)
    if absent:
        where = "the shipped prompts" if prompts is None else f'"{prompts}"'
        numbers = ", ".join(map(str, absent[:10])) + (", ..." if len(absent) > 10 else "")
        raise UserError(
            f'"{keywords_file}": {len(absent)} of {len(keywords)} keywords stand in no prompt of {where} (number {numbers}); '
            "give prompts that hold them with --prompts, or prompts of the domain alone with --domain_prompts"
        )
    kept = set(domain)
    return [text for text in texts if text not in kept], domain


def _with_held_out(texts: Sequence[str], role: Role, seed: int) -> list[FitPrompt]:
    drawn = _drawn(texts, seed)
    count = 0
    if len(drawn) >= MIN_FOR_HELD_OUT:
        count = min(max(round(HELD_OUT_SHARE * len(drawn)), 1), MAX_HELD_OUT)
    return [FitPrompt(text, role, place < count) for place, text in enumerate(drawn)]


def _drawn(texts: Sequence[str], seed: int) -> list[str]:
    """In an order that depends on each text and the seed, not on the order in the file."""
    return sorted(texts, key=lambda text: (derive_seed(seed, "held out", text), text))
