"""What a closed-form adapter is solved by: `[adapter.closed_form]`, and the command's flags of the same names. No torch."""

import argparse
import re
from dataclasses import fields, replace

from utils.config.schema import AdapterConfig, ClosedFormConfig

TOOL = "closed_form_translator"
QUESTION = "How much of what the frozen DiT heard through the base encoder does the solved adapter give back, and at what cost?"
# Flags of the command that are keys elsewhere than in the section.
_OTHER_KEYS = {"rank": "adapter.rank", "blocks": "adapter.train_blocks_range"}
# Where the report of a training goes is no matter of the command, which has a flag for its own.
_NOT_A_FLAG = ("reports_dir",)
_FLAGS = [field.name for field in fields(ClosedFormConfig) if field.name not in _NOT_A_FLAG]
_FLAG = re.compile(rf"(?<![\w-])--({'|'.join((*_FLAGS, *_OTHER_KEYS))})(?!\w)")


def settings_of(adapter: AdapterConfig | None, flags: argparse.Namespace) -> ClosedFormConfig:
    """The flags that are given, else what `[adapter.closed_form]` says, else the defaults.

    A flag that says what is to stay puts the section's other way of saying it out of force.
    """
    section = adapter.closed_form if adapter is not None and adapter.closed_form is not None else None
    given = {name: value for name in _FLAGS if (value := getattr(flags, name)) is not None}
    if "domain_prompts" in given or "keywords_file" in given:
        given = {"domain_prompts": None, "keywords_file": None} | given
    for name in ("prompts", "domain_prompts", "keywords_file"):
        if given.get(name) is not None:
            given[name] = str(given[name])
    return replace(section or ClosedFormConfig(), **given)


def in_config_words(text: str) -> str:
    """A text that names the command's flags, such as --prompts, with the keys of a config in their place."""
    return _FLAG.sub(lambda match: _OTHER_KEYS.get(match[1], f"adapter.closed_form.{match[1]}"), text)
