"""Flags over `[adapter.closed_form]`, and the command's words turned into those of a config."""

import argparse
from pathlib import Path

from models.wan.closed_form.fit_settings import in_config_words, settings_of
from utils.config.schema import AdapterConfig, ClosedFormConfig

NAMES = (
    *("prompts", "domain_prompts", "keywords_file", "ridge", "keep_weight", "max_delta_ratio", "seed"),
    *("dtype", "device"),
)


def flags(**given):
    return argparse.Namespace(**(dict.fromkeys(NAMES) | given))


def test_flags_come_before_the_section_and_this_before_the_defaults():
    section = AdapterConfig(closed_form=ClosedFormConfig(ridge=0.1, seed=3, domain_prompts="a.txt"))
    assert settings_of(AdapterConfig(), flags()) == settings_of(None, flags()) == ClosedFormConfig()
    assert settings_of(section, flags()) == section.closed_form
    found = settings_of(section, flags(ridge="auto", seed=0, prompts=Path("p.txt")))
    assert found == ClosedFormConfig(ridge="auto", seed=0, prompts="p.txt", domain_prompts="a.txt")


def test_a_flag_that_says_what_stays_replaces_the_sections_way_of_saying_it():
    section = AdapterConfig(closed_form=ClosedFormConfig(domain_prompts="a.txt"))
    found = settings_of(section, flags(keywords_file=Path("k.txt")))
    assert (found.domain_prompts, found.keywords_file) == (None, "k.txt")


def test_flags_in_messages_become_keys_and_nothing_else_does():
    said = "give --prompts, a lower --rank or --max_delta_ratio; --ridge auto; --blocks; my--prompts.txt --other --rankle"
    assert in_config_words(said) == (
        "give adapter.closed_form.prompts, a lower adapter.rank or adapter.closed_form.max_delta_ratio; "
        "adapter.closed_form.ridge auto; adapter.train_blocks_range; my--prompts.txt --other --rankle"
    )
