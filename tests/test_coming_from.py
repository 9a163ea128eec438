"""docs/coming_from.md against the schema and the flags: no key on it that is not there, and none missing."""

import re
from pathlib import Path

import pytest

from tests.helpers.workspace import make_workspace
from train import main, parse_arguments
from utils.config.foreign_keys import DATASET_KEYS, TRAINING_KEYS
from utils.config.introspect import keys_of, sections_of
from utils.config.schema import DatasetConfig, TrainConfig

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "coming_from.md").read_text(encoding="utf-8")
CODE = re.compile(r"`([^`]+)`")


def keys_of_document(record: type) -> set[str]:
    return {
        f"{section.path}.{name}".removeprefix(".")
        for section in sections_of(record)
        for name in keys_of(section.record)
    }


TRAINING, DATASET = keys_of_document(TrainConfig), keys_of_document(DatasetConfig)


def rows() -> list[tuple[str, str, str]]:
    """Heading, theirs and ours of each row of the page's tables."""
    found, heading = [], ""
    for line in PAGE.splitlines():
        if line.startswith("#"):
            heading = line.lstrip("# ")
        elif line.startswith("|") and not line.startswith(("| theirs", "| ---")):
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            assert len(cells) == 3, line
            found.append((heading, cells[0], cells[1]))
    return found


ROWS = rows()


def test_every_table_was_read() -> None:
    counts = {heading: sum(one == heading for one, _, _ in ROWS) for heading, _, _ in ROWS}
    assert set(counts) == {
        "Training TOML",
        "Dataset TOML",
        "musubi-tuner",
        "Its dataset TOML",
        "ai-toolkit",
        "Its datasets",
    }
    assert min(counts.values()) > 5


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row[0]}: {row[1]}"[:60])
def test_our_column_names_keys_and_flags_that_exist(row, capsys) -> None:
    heading, _, ours = row
    names = CODE.findall(ours)
    assert names or ours == "-", "write `key` or -"
    flags = {name for name in names if name.startswith("--")}
    with pytest.raises(SystemExit):
        parse_arguments(["--help"])
    assert flags <= set(re.findall(r"--\w+", capsys.readouterr().out))
    in_dataset = "dataset" in heading.lower()
    elsewhere = {"video_clip_mode", "uncond_fraction"}  # a key that has changed its document
    allowed = (DATASET if in_dataset else TRAINING) | elsewhere
    assert set(names) - flags <= allowed


def test_words_in_code_that_look_like_keys_of_ours_are_keys() -> None:
    sections = {section.path for section in sections_of(TrainConfig) if section.path}
    ours_only = re.sub(r"^\|[^|]*\|", "|", PAGE, flags=re.MULTILINE)  # without their column
    found = {
        code
        for code in CODE.findall(ours_only)
        if re.fullmatch(r"[a-z_]+\.[a-z_0-9]+", code) and code.split(".")[0] in sections
    }
    assert len(found) > 15
    assert found <= TRAINING


def test_the_keys_that_are_taken_exist() -> None:
    for heading, record in (("### Training TOML", TRAINING), ("### Dataset TOML", DATASET)):
        text = PAGE.split(heading)[1].split("| theirs")[0]
        names = {name for name in CODE.findall(text) if re.fullmatch(r"[a-z_]+", name)}
        last = {key.rpartition(".")[2] for key in record} | {"adamw", "adamw8bit"}
        assert len(names) > 10
        assert names <= last


@pytest.mark.parametrize("foreign", [*TRAINING_KEYS, *DATASET_KEYS], ids=lambda foreign: foreign.key)
def test_every_key_that_gets_a_line_is_on_the_page(foreign) -> None:
    theirs = " ".join(theirs for _, theirs, _ in ROWS)
    assert f"`{foreign.key.removeprefix('directory[].')}`" in theirs


def test_a_run_and_a_plan_say_what_they_made_of_foreign_keys(
    tiny_ti2v, tiny_dataset, tmp_path, capsys
) -> None:
    workspace = make_workspace(tmp_path, tiny_ti2v, tiny_dataset, "skip_empty_caption = true")
    foreign = (
        "steps_per_print=1",
        "optimizer.type=adamw_optimi",
        "adapter.dtype=bfloat16",
        "model.dtype=bfloat16",
    )
    wanted = (
        "note: --set: steps_per_print: has no effect here",
        'note: --set: optimizer.type: "adamw_optimi" is "adamw_kahan" here',
        f'note: {workspace.root}/dataset.toml: skip_empty_caption: is missing_caption = "skip" here',
    )
    assert workspace.train("dit_lora", *foreign, flags=["--dry_run"]) == 0
    said = capsys.readouterr().err
    assert all(said.count(line) == 1 for line in wanted), said
    assert main([*workspace.arguments("dit_lora", *foreign), "--plan"]) == 0
    planned = capsys.readouterr().out
    assert all(planned.count(line) == 1 for line in wanted), planned


def test_a_run_of_a_foreign_toml_goes_on_after_a_resume(tiny_ti2v, tiny_dataset, tmp_path, capsys) -> None:
    workspace = make_workspace(tmp_path, tiny_ti2v, tiny_dataset)
    foreign = ("steps_per_print=1", "partition_method=parameters", "save_dtype=float32", "epochs=1")
    assert workspace.train("dit_lora", *foreign) == 0
    config = (workspace.run() / "config.toml").read_text(encoding="utf-8")
    assert 'partition_method = "cost"' in config and "steps_per_print" not in config
    again = ("steps_per_print=1", "partition_method=parameters", "save_dtype=float32", "epochs=2")
    assert workspace.train("dit_lora", *again, flags=["--resume_from_checkpoint"]) == 0
    assert workspace.run()  # the same directory
