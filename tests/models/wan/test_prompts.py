import hashlib

from models.wan.prompts import ALWAYS_NEUTRAL, NEGATIVE_PROMPT, neutral_prompts
from utils.prompt_files import NEUTRAL_PROMPTS, read_prompt_file

# Of `sample_neg_prompt` as published: a changed character would be another prompt.
DIGEST = "ce96e0324e4b54ce"


def test_the_empty_and_the_negative_prompt_always_come_first(tmp_path) -> None:
    path = tmp_path / "own.txt"
    path.write_text(f"{NEGATIVE_PROMPT}\na wide field\n", encoding="utf-8")
    assert neutral_prompts(path) == ("", NEGATIVE_PROMPT, "a wide field")
    assert neutral_prompts() == (*ALWAYS_NEUTRAL, *read_prompt_file(NEUTRAL_PROMPTS))


def test_the_negative_prompt_is_the_published_one() -> None:
    parts = NEGATIVE_PROMPT.split("，")
    assert len(parts) == 28 and parts[0] == "色调艳丽" and parts[-1] == "倒着走"
    assert hashlib.sha256(NEGATIVE_PROMPT.encode()).hexdigest().startswith(DIGEST)
