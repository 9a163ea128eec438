"""The direction of imports and the one door of each heavy library, read off the source."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted(path for folder in ("models", "utils", "scripts") for path in (ROOT / folder).rglob("*.py"))

# Who may import what. Everything else may not.
DOORS = {
    "transformers": {"models/wan/text_encoder.py"},
    "diffusers": {"models/wan/vae.py", "models/wan/schedulers.py", "scripts/bench/peers.py"},
    "peft": {"utils/lora.py"},
    "skimage": {"utils/picture_change.py"},
    "deepspeed": {"utils/pipeline.py"},
    "optimi": {"utils/optim.py"},
    "bitsandbytes": {"utils/optim.py"},
}
# The tokenizer of the tiny checkpoint is written in the published format with the library that reads it.
SCRIPT_EXCEPTIONS = {("scripts/make_tiny_wan.py", "transformers"), ("scripts/make_tiny_wan.py", "diffusers")}


def imported(path: Path) -> set[str]:
    """Dotted names that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_imports_go_one_way(path: Path) -> None:
    forbidden = {
        "utils": ("models", "scripts", "train"),
        "models": ("scripts", "train"),
        "scripts": ("train",),
    }
    layer = relative(path).split("/")[0]
    wrong = [name for name in imported(path) if name.split(".")[0] in forbidden[layer]]
    assert not wrong, f"{relative(path)} imports {wrong}"


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_each_heavy_library_has_one_door(path: Path) -> None:
    for name in imported(path):
        library = name.split(".")[0]
        if library in DOORS and (relative(path), library) not in SCRIPT_EXCEPTIONS:
            assert relative(path) in DOORS[library], f"{relative(path)} imports {library}"


def test_the_model_does_not_know_it_is_distributed() -> None:
    for name in ("transformer.py", "attention.py", "rope.py", "lean.py"):
        outside = {item.split(".")[0] for item in imported(ROOT / "models" / "wan" / name)}
        assert outside <= {"torch", "models", "functools", "collections", "typing"}, name
        assert not any("distributed" in item for item in imported(ROOT / "models" / "wan" / name))


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("utils.config.load", "torch"),
        ("models.wan.checkpoint", "torch"),
        ("utils.cli", "torch"),
        ("models.wan.model", "diffusers.models"),
        ("models.wan.sample_flags", "torch"),
        ("scripts.sample", "torch"),
        ("scripts.diagnostics.prompt_grid", "torch"),
    ],
)
def test_light_modules_stay_light(module: str, absent: str) -> None:
    """Help texts, config errors and header tools must not wait for libraries that they do not use."""
    code = f"import sys, {module}; sys.exit({absent!r} in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_train_is_short_and_has_no_model_branches() -> None:
    source = (ROOT / "train.py").read_text(encoding="utf-8")
    assert len(source.splitlines()) < 150
    branches = [ast.unparse(node.test) for node in ast.walk(ast.parse(source)) if isinstance(node, ast.If)]
    assert not any("model" in test or "mode" in test.split(".") for test in branches), branches
