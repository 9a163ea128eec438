"""The documents against the project: links, commands, file names, modes, and words that do not belong there."""

import argparse
import re
import shlex
import subprocess
import sys
import tomllib
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

from train import parse_arguments
from utils.config.guardrails import mode_of
from utils.config.load import load_config

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = sorted(
    [ROOT / "README.md", ROOT / "AGENTS.md", ROOT / "reports" / "README.md", *(ROOT / "docs").rglob("*.md")]
)
# Configs are documents too: people read their comments.
TEXTS = [*DOCUMENTS, *sorted((ROOT / "configs").glob("*.toml"))]
LAUNCHERS = ("python", "deepspeed", "torchrun")
NOT_HERE = {"output", "checkpoints", "data"}

FENCED = re.compile(r"^```(?P<language>\w*)\n(?P<body>.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\((?P<target>[^)\s]+)\)")
HEADING = re.compile(r"^#+ (?P<title>.+)$", re.MULTILINE)
PATH_IN_CODE = re.compile(r"(?<![\w./<-])(?:utils|models|scripts|configs|tests|docs)/[\w./-]*\w")
PYTEST = re.compile(r"python -m pytest (tests/\S*[\w/])(?: -k (\w+))?")
FLAG = re.compile(r"--\w[\w-]*")
FORBIDDEN = [
    re.compile(r"(?<![\w.<>*-])/(?:work|root|home|tmp|mnt)/"),
    re.compile(r"\b(?:TODO|FIXME|XXX)\b"),
    re.compile(r"https?://"),
    re.compile(r"(?<!\w)#\d+\b"),
]


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


def without_code(text: str) -> str:
    return re.sub(r"`[^`\n]*`", "", FENCED.sub("", text))


def slug(title: str) -> str:
    """The anchor that a heading gets."""
    return re.sub(r"[^\w\- ]", "", title.replace("`", "").lower()).replace(" ", "-")


@pytest.mark.parametrize("document", DOCUMENTS, ids=named)
def test_links_lead_somewhere(document: Path) -> None:
    for match in LINK.finditer(without_code(document.read_text(encoding="utf-8"))):
        path, _, anchor = match["target"].partition("#")
        target = (document.parent / path).resolve() if path else document
        assert target.exists(), match["target"]
        assert target.is_relative_to(ROOT), match["target"]
        if anchor:
            text = FENCED.sub("", target.read_text(encoding="utf-8"))
            assert anchor in {slug(heading["title"]) for heading in HEADING.finditer(text)}, match["target"]


@pytest.mark.parametrize("text", TEXTS, ids=named)
def test_files_that_are_named_exist(text: Path) -> None:
    for match in PATH_IN_CODE.finditer(text.read_text(encoding="utf-8")):
        assert (ROOT / match[0]).exists(), match[0]


@pytest.mark.parametrize("text", TEXTS, ids=named)
def test_no_words_that_do_not_belong_here(text: Path) -> None:
    content = text.read_text(encoding="utf-8")
    found = [match[0] for pattern in FORBIDDEN for match in pattern.finditer(content)]
    assert not found


def test_forbidden_words_would_be_found() -> None:
    samples = ("see /home/somebody/x", "~ /root/x", "TODO: later", "from https://example.org", "fixes #12")
    assert all(any(pattern.search(sample) for pattern in FORBIDDEN) for sample in samples)
    assert not any(pattern.search("output/work/x, <run>/tmp/y, top-5, `#` 3") for pattern in FORBIDDEN)


class Command(NamedTuple):
    """One command of a fenced shell block."""

    document: Path
    words: tuple[str, ...]

    def __str__(self) -> str:
        return f"{named(self.document)}: {' '.join(self.words)}"


def shell_commands() -> list[Command]:
    """Every command of every `sh` block; other blocks count where a line begins with a launcher."""
    commands = []
    for document in DOCUMENTS:
        for block in FENCED.finditer(document.read_text(encoding="utf-8")):
            for line in block["body"].replace("\\\n", " ").splitlines():
                if block["language"] != "sh" and line.partition(" ")[0] not in LAUNCHERS:
                    continue
                words = tuple(shlex.split(line, comments=True))
                if words:
                    commands.append(Command(document, words))
    return commands


COMMANDS = shell_commands()
SCRIPT_COMMANDS = [
    command
    for command in COMMANDS
    if command.words[0] in LAUNCHERS
    and "-m" not in command.words
    and any(w.endswith(".py") for w in command.words)
]


def test_there_are_commands_to_check() -> None:
    assert {named(command.document) for command in SCRIPT_COMMANDS} >= {"README.md", "AGENTS.md"}
    assert {command.words[0] for command in COMMANDS} >= {"make", "deepspeed", "python"}


@pytest.mark.parametrize("command", COMMANDS, ids=str)
def test_commands_are_of_known_kinds(command: Command) -> None:
    """Whatever a reader is told to type begins with something that is checked here, or that the set-up provides."""
    known = {"make", "source", "export", "tensorboard", *LAUNCHERS}
    assert command.words[0] in known


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.words[0] == "make"], ids=str)
def test_make_targets_and_variables_exist(command: Command) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([\w-]+):", makefile, re.MULTILINE))
    variables = set(re.findall(r"^(\w+) \?=", makefile, re.MULTILINE))
    for word in command.words[1:]:
        variable, is_setting, _ = word.partition("=")
        assert (variable in variables) if is_setting else (word in targets), word


@pytest.mark.parametrize("document", DOCUMENTS, ids=named)
def test_tests_that_make_a_number_exist(document: Path) -> None:
    """`python -m pytest FILE -k WORD` beside a number selects at least one test."""
    for path, word in PYTEST.findall(document.read_text(encoding="utf-8")):
        assert (ROOT / path).exists(), path
        if word:
            tests = (ROOT / path).read_text(encoding="utf-8")
            assert re.search(rf"^def test_\w*{word}", tests, re.MULTILINE), f"{path} -k {word}"


@cache
def flags_of(script: str) -> frozenset[str]:
    """The flags that a program lists in its help."""
    done = subprocess.run(
        [sys.executable, script, "--help"], capture_output=True, text=True, cwd=ROOT, timeout=120, check=True
    )
    return frozenset(FLAG.findall(done.stdout))


@pytest.mark.parametrize("command", SCRIPT_COMMANDS, ids=str)
def test_programs_take_the_flags_they_are_given(command: Command) -> None:
    position = next(index for index, word in enumerate(command.words) if word.endswith(".py"))
    script, arguments = command.words[position], command.words[position + 1 :]
    assert (ROOT / script).is_file()
    given = {word.partition("=")[0] for word in arguments if word.startswith("--")}
    assert given <= flags_of(script)


@pytest.mark.parametrize("command", [c for c in SCRIPT_COMMANDS if "train.py" in c.words], ids=str)
def test_training_commands_are_accepted(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """The config exists, and every override is a key of it with a value that passes all rules."""
    monkeypatch.chdir(ROOT)
    arguments = parse_arguments(list(command.words[command.words.index("train.py") + 1 :]))
    load_config(arguments.config, arguments.set)


def test_a_wrong_training_command_would_be_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises((SystemExit, argparse.ArgumentError)):
        parse_arguments(["--config", "configs/smoke_dit_lora.toml", "--no_such_flag"])
    with pytest.raises(Exception, match="unknown key"):
        load_config("configs/smoke_dit_lora.toml", ["adapter.rnk=8"])


def table_rows(text: str) -> list[list[str]]:
    return [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in text.splitlines()
        if line.startswith("|")
    ]


def test_the_readme_shows_the_switches_of_both_modes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = {row[0].strip("`"): row[1:] for row in table_rows(readme) if len(row) == 3}
    configs = [load_config(path).train for cell in rows["config"] for path in LINK.findall(cell)]
    assert [mode_of(config) for config in configs] == ["encoder_ft", "dit_lora"]
    for switch in ("cache_text_embeddings", "train_text_encoder", "freeze_transformer"):
        shown = [cell.strip("`") == "true" for cell in rows[switch]]
        assert shown == [getattr(config.model, switch) for config in configs]


def test_the_readme_names_everything_at_the_top() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    table = {row[0].strip("`").rstrip("/") for row in table_rows(readme) if len(row) == 2}
    visible = {
        path.name
        for path in ROOT.iterdir()
        if not path.name.startswith((".", "__")) and not path.name.endswith(".egg-info")
    }
    assert visible - NOT_HERE - {"README.md"} <= table


def test_the_architecture_names_every_module() -> None:
    layout = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    modules = [
        path
        for folder in ("models", "utils", "scripts")
        for path in (ROOT / folder).rglob("*.py")
        if path.name != "__init__.py"
    ]
    assert not [named(path) for path in modules if path.name not in layout]


def test_versions_in_the_readme_are_those_that_are_pinned() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    constraints = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    pinned = dict(re.findall(r"^([\w.-]+)==(\S+)$", constraints, re.MULTILINE))
    assert set(re.findall(r"torch==([\d.]+\d)", readme)) == {pinned["torch"]}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["requires-python"] == ">=3.11,<3.13" and "3.11 or 3.12" in readme
    assert f"DeepSpeed {pinned['deepspeed']}" in (ROOT / "docs" / "engine.md").read_text(encoding="utf-8")
