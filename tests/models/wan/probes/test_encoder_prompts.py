"""Which texts are measured, and how they are shown."""

import re

import pytest

from models.wan.probes.encoder_prompts import TEMPLATES, plan_prompts
from models.wan.prompts import NEGATIVE_PROMPT
from utils.config.schema import BudgetConfig, CaptionAugConfig
from utils.errors import UserError

HIDDEN = re.compile(r"(neutral|domain|keyword) \d+ \([0-9a-f]{8}\)")


@pytest.fixture
def files(tmp_path):
    (tmp_path / "neutral.txt").write_text("a lake at dawn\na wide valley\n")
    (tmp_path / "domain.txt").write_text("a red circle\na blue square\n")
    (tmp_path / "words.txt").write_text("circle\nblue square\n")
    return tmp_path


def plan(files, redact=None, config=None, max_entries=256, keywords="words.txt"):
    return plan_prompts(
        files / "neutral.txt",
        files / "domain.txt",
        files / keywords if keywords else None,
        config,
        redact,
        max_entries,
    )


def test_groups_and_the_sentences_around_keywords(files):
    found = plan(files)
    assert [entry.text for entry in found.of("neutral")] == [
        "",
        NEGATIVE_PROMPT,
        "a lake at dawn",
        "a wide valley",
    ]
    assert [entry.text for entry in found.of("domain")] == ["a red circle", "a blue square"]
    assert [(entry.number, entry.text) for entry in found.of("keyword")] == [
        (1, "circle"),
        (2, "blue square"),
    ]
    texts = found.texts()
    assert len(set(texts)) == len(texts)
    assert {template.format(word) for template in TEMPLATES for word in ("circle", "something")} <= set(texts)


@pytest.mark.parametrize(
    ("redact", "hidden"),
    [(None, {"domain", "keyword"}), (True, {"neutral", "domain", "keyword"}), (False, set())],
)
def test_what_is_hidden(files, redact, hidden):
    for entry in plan(files, redact).entries:
        if entry.text in ("", NEGATIVE_PROMPT):
            assert entry.label.startswith("(")
        elif entry.group in hidden:
            assert HIDDEN.fullmatch(entry.label) and entry.text not in entry.label
        else:
            assert entry.label == entry.text


def test_shipped_prompts_are_no_secret(files):
    found = plan_prompts(None, None, None, None, True, 256)
    assert all(entry.label == entry.text for entry in found.entries[2:])


def test_neutral_prompts_are_those_that_the_budget_of_the_run_is_measured_on(files, make_config):
    (files / "budget.txt").write_text("a stone bridge\n")
    budget = BudgetConfig(max_neutral_drift=0.1, neutral_prompts=str(files / "budget.txt"))
    config = make_config("encoder_ft", budget=budget)
    found = plan_prompts(None, None, None, config, None, 256)
    assert [entry.text for entry in found.entries] == ["", NEGATIVE_PROMPT, "a stone bridge"]
    assert any("[budget]" in remark for remark in found.remarks)
    assert "a stone bridge" not in [entry.text for entry in plan(files, config=config).entries]
    hidden = plan_prompts(None, None, None, config, True, 256).entries[2].label
    assert HIDDEN.fullmatch(hidden)


def test_keywords_of_the_run(files, make_config):
    for aug in ({"keywords_file": str(files / "words.txt")}, {"keywords": ("circle", "blue  square")}):
        config = make_config(
            "encoder_ft", model={"caption_aug": CaptionAugConfig(enable=True, single_token=0.5, **aug)}
        )
        found = plan(files, config=config, keywords=None)
        assert [entry.text for entry in found.of("keyword")] == ["circle", "blue square"]
        assert any("2 of the run's" in remark for remark in found.remarks)
    gone = CaptionAugConfig(enable=True, single_token=0.5, keywords_file=str(files / "gone.txt"))
    found = plan(files, config=make_config("encoder_ft", model={"caption_aug": gone}), keywords=None)
    assert not found.of("keyword") and any("--keywords_file" in remark for remark in found.remarks)


def test_a_limit_is_said_and_keeps_what_is_always_neutral(files):
    found = plan(files, max_entries=1)
    assert [entry.text for entry in found.of("neutral")] == ["", NEGATIVE_PROMPT, "a lake at dawn"]
    assert [len(found.of(group)) for group in ("domain", "keyword")] == [1, 1]
    assert sum("--max_entries" in remark for remark in found.remarks) == 3


def test_a_neutral_prompt_with_a_keyword_is_warned_of(files):
    (files / "neutral.txt").write_text("A Circle, drawn by hand\na wide valley\nencircled\n")
    warnings = [remark for remark in plan(files).remarks if remark.startswith("warning")]
    assert len(warnings) == 1 and "1 of 5 neutral" in warnings[0] and "circle" not in warnings[0].lower()


def test_a_prompt_cannot_be_neutral_and_of_the_domain(files):
    (files / "domain.txt").write_text("a lake at dawn\n")
    with pytest.raises(UserError, match="one or the other") as raised:
        plan(files)
    assert "dawn" not in str(raised.value)
