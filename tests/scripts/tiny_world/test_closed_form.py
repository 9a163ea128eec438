"""What the closed form is solved from on the tiny world, and what is drawn to judge it, have no prompt in common."""

import pytest

from scripts.tiny_world.closed_form import AMOUNTS, main
from scripts.tiny_world.proof_closed import domain_texts, neutral_texts
from scripts.tiny_world.proof_data import NEW_WORDS
from scripts.tiny_world.proof_measure import cells_of


@pytest.mark.parametrize("seed", [1000, 1001])
def test_no_prompt_that_is_drawn_was_solved_from(seed):
    solved = {*neutral_texts(), *domain_texts()}
    drawn = {prompt.text for prompts in cells_of(AMOUNTS, seed).values() for prompt in prompts}
    assert len(drawn) > 100 and not solved & drawn


def test_new_words_are_in_domain_prompts_and_nowhere_else():
    def words(text):
        return set(text.replace(",", " ").split())

    assert all(words(text) & set(NEW_WORDS) for text in domain_texts())
    assert not any(words(text) & set(NEW_WORDS) for text in neutral_texts())
    assert set(NEW_WORDS) <= set().union(*map(words, domain_texts()))
    assert not any("{" in text for text in (*domain_texts(), *neutral_texts()))


def test_an_arm_that_tunes_no_encoder_is_refused(tmp_path, capsys):
    assert main(["--arm", "gentle_lora", "--work", str(tmp_path / "w")]) == 2
    assert "tunes an encoder" in capsys.readouterr().err and not (tmp_path / "w").exists()
