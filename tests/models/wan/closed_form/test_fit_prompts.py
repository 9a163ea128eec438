"""Which prompts are fitted on, held out and kept; and that no message repeats them."""

import pytest

from models.wan.closed_form.fit_prompts import MAX_HELD_OUT, plan_fit
from models.wan.prompts import ALWAYS_NEUTRAL
from utils.errors import UserError
from utils.neutral_grammar import NUM_CAPTIONS
from utils.prompt_files import NEUTRAL_PROMPTS, read_prompt_file

NEUTRAL = [f"a lake with {number} boats" for number in range(20)]


@pytest.fixture
def write(tmp_path):
    def save(name, lines):
        path = tmp_path / name
        path.write_text("\n".join(lines) + "\n")
        return path

    return save


def texts(plan, role, is_held):
    return {prompt.text for prompt in plan.of(role, is_held=is_held)}


def test_the_shipped_prompts_are_judged_by_another_list():
    plan = plan_fit(None, None, None, 0)
    fitted, held = texts(plan, "neutral", False), texts(plan, "neutral", True)
    assert (
        len(fitted) == NUM_CAPTIONS and held == set(read_prompt_file(NEUTRAL_PROMPTS)) and not fitted & held
    )
    assert texts(plan, "anchor", False) == set(ALWAYS_NEUTRAL) and not plan.of("domain", is_held=False)
    assert any("nothing asks new words to stay" in remark for remark in plan.remarks)


def test_a_share_of_each_file_is_held_out_whatever_its_order(write):
    domain = [f"zorp number {number}" for number in range(10)]
    plan = plan_fit(write("n", NEUTRAL), write("d", domain), None, 3)
    assert len(plan.of("neutral", is_held=True)) == 3 and len(plan.of("domain", is_held=True)) == 2
    assert texts(plan, "neutral", True) | texts(plan, "neutral", False) == set(NEUTRAL)
    again = plan_fit(write("n2", NEUTRAL[::-1]), write("d2", domain[::-1]), None, 3)
    assert again.prompts == plan.prompts
    assert texts(plan_fit(write("n", NEUTRAL), None, None, 4), "neutral", True) != texts(
        plan, "neutral", True
    )


@pytest.mark.parametrize(("count", "held"), [(1, 0), (3, 0), (4, 1), (1000, MAX_HELD_OUT)])
def test_how_many_are_held_out(write, count, held):
    plan = plan_fit(write("n", [f"house {number}" for number in range(count)]), None, None, 0)
    assert len(plan.of("neutral", is_held=True)) == held
    assert len(plan.of("neutral", is_held=False)) == count - held


def test_keywords_say_which_prompts_are_the_domains(write):
    domain = ["a Zorp stands here", "two things and a zorp", "blicket"]
    plan = plan_fit(write("n", NEUTRAL + domain), None, write("k", ["zorp", "blicket"]), 0)
    assert texts(plan, "domain", False) | texts(plan, "domain", True) == set(domain)
    assert texts(plan, "neutral", False) | texts(plan, "neutral", True) == set(NEUTRAL)


def test_keywords_in_no_prompt_are_counted_and_not_repeated(write):
    path = write("n", [*NEUTRAL, "a zorp"])
    with pytest.raises(UserError, match=r"2 of 3 keywords stand in no prompt .*\(number 1, 3\)") as caught:
        plan_fit(path, None, write("k", ["blicket", "zorp", "daxen"]), 0)
    assert "blicket" not in str(caught.value) and "daxen" not in str(caught.value)
    with pytest.raises(UserError, match="of the shipped prompts"):
        plan_fit(None, None, write("k", ["zorp"]), 0)


def test_a_prompt_is_neutral_or_of_the_domain(write):
    with pytest.raises(UserError, match="1 of its prompts are among the neutral ones") as caught:
        plan_fit(write("n", NEUTRAL), write("d", [NEUTRAL[3], "zorp"]), None, 0)
    assert "boats" not in str(caught.value)


def test_something_neutral_has_to_be_left(write):
    with pytest.raises(UserError, match="no neutral prompt is left"):
        plan_fit(write("n", ["a zorp", "one zorp"]), None, write("k", ["zorp"]), 0)
