"""Which texts te_eval runs through the encoders: prompts in groups, and sentences with and without each keyword.

Texts may be private: outside this module they are known by their index, and shown by `Entry.label`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from models.wan.prompts import ALWAYS_NEUTRAL, EMPTY_PROMPT, NEGATIVE_PROMPT, neutral_prompts
from utils.config.keywords import keyword_pattern, read_keywords
from utils.config.schema import TrainConfig
from utils.errors import UserError
from utils.prompt_files import read_prompt_file
from utils.redact import Redactor

Group = Literal["neutral", "domain", "keyword"]
GROUPS: tuple[Group, ...] = ("neutral", "domain", "keyword")
# Sentences into which a keyword is put, and what stands there instead of it.
TEMPLATES = (
    "a video of {}",
    "{} in a bright room",
    "a slow shot of {} beside a window",
    "the camera moves past {} on a quiet street",
)
PLACEHOLDER = "something"
_ALWAYS_SHOWN = {EMPTY_PROMPT: "(empty prompt)", NEGATIVE_PROMPT: "(Wan's negative prompt)"}


@dataclass(frozen=True)
class Entry:
    """A text of a group, its place in it from 1, and how reports show it."""

    group: Group
    number: int
    text: str
    label: str


@dataclass(frozen=True)
class PromptPlan:
    """All entries, and remarks about what was taken from where and what was left out.

    `neutral_file` is where neutral prompts come from, None where they are the shipped ones.
    """

    entries: tuple[Entry, ...]
    remarks: tuple[str, ...]
    neutral_file: Path | None = None

    def of(self, group: Group) -> tuple[Entry, ...]:
        """The entries of one group."""
        return tuple(entry for entry in self.entries if entry.group == group)

    def texts(self) -> tuple[str, ...]:
        """Every text that has to be encoded, once: entries, and the sentences around keywords."""
        texts = [entry.text for entry in self.entries]
        for keyword in self.of("keyword"):
            texts += [text for pair in sentence_pairs(keyword.text) for text in pair]
        return tuple(dict.fromkeys(texts))


def sentence_pairs(keyword: str) -> list[tuple[str, str]]:
    """Each template with the keyword in it, and with the placeholder."""
    return [(template.format(keyword), template.format(PLACEHOLDER)) for template in TEMPLATES]


def plan_prompts(
    prompts: Path | None,
    domain_prompts: Path | None,
    keywords_file: Path | None,
    config: TrainConfig | None,
    redact: bool | None,
    max_entries: int,
) -> PromptPlan:
    """Read the files.

    Args:
        prompts: neutral ones; None: those of the run's [budget], else those that ship with the project. The empty and the
            negative one always come first.
        domain_prompts: those that the encoder was tuned for, if any.
        keywords_file: keywords; None: those of the run's [model.caption_aug], if it has any.
        config: of the run.
        redact: None hides domain prompts and keywords, True also the neutral prompts of a file, False nothing.
        max_entries: of each file, at most.

    Raises:
        UserError: a file cannot be used. Says where, never what.
    """
    remarks: list[str] = []
    named = Redactor()

    def entries(group: Group, texts: Sequence[str], hidden: bool) -> list[Entry]:
        limit = max_entries + (len(ALWAYS_NEUTRAL) if group == "neutral" else 0)
        if len(texts) > limit:
            remarks.append(f"{group}: the first {limit} of {len(texts)} are measured (--max_entries)")
        return [
            Entry(
                group,
                number,
                text,
                _ALWAYS_SHOWN.get(text) or (named.name(group, number, text) if hidden else text),
            )
            for number, text in enumerate(texts[:limit], start=1)
        ]

    if prompts is None and config is not None and config.budget is not None and config.budget.neutral_prompts:
        prompts = Path(config.budget.neutral_prompts)
        remarks.append("neutral prompts: the file of the run's [budget]")
    neutral = entries("neutral", neutral_prompts(prompts), bool(redact) and prompts is not None)
    is_hidden = redact is not False
    domain = read_prompt_file(domain_prompts) if domain_prompts is not None else ()
    keywords = _keywords(keywords_file, config, remarks)
    known = {entry.text for entry in neutral}
    both = [text for text in domain if text in known]
    if both:
        raise UserError(
            f"{domain_prompts}: {len(both)} of its prompts are among the neutral ones too; a prompt is one or the other"
        )
    plan = [*neutral, *entries("domain", domain, is_hidden), *entries("keyword", keywords, is_hidden)]
    pattern = keyword_pattern(keywords, case_insensitive=True) if keywords else None
    holding = sum(pattern is not None and pattern.search(entry.text) is not None for entry in neutral)
    if holding:
        remarks.append(
            f"warning: {holding} of {len(neutral)} neutral prompts hold a keyword, so they are meant to move and count as "
            "neutral drift all the same; take them out of the file given with --prompts"
        )
    return PromptPlan(tuple(plan), tuple(remarks), prompts)


def _keywords(path: Path | None, config: TrainConfig | None, remarks: list[str]) -> tuple[str, ...]:
    if path is not None:
        return read_keywords(path)
    aug = config.model.caption_aug if config is not None else None
    if aug is None:
        return ()
    if aug.keywords_file is not None and not Path(aug.keywords_file).is_file():
        remarks.append("keywords: the file that the run's config names is not there; give --keywords_file")
        return ()
    found = read_keywords(aug.keywords_file) if aug.keywords_file is not None else aug.keywords
    if found:
        remarks.append(f"keywords: {len(found)} of the run's [model.caption_aug]")
    return tuple(dict.fromkeys(" ".join(word.split()) for word in found))
