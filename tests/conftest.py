"""Inputs that many tests share: small checkpoints and a dataset, made once per session by the project's own scripts."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import hypothesis
import pytest

ROOT = Path(__file__).resolve().parents[1]

# No test asserts a time: on a busy machine hypothesis's deadline would.
hypothesis.settings.register_profile("without_deadline", deadline=None)
hypothesis.settings.load_profile("without_deadline")


def _run_script(name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run a script of the project as a person would; one thread, so that parallel tests do not fight for cores."""
    command = [sys.executable, str(ROOT / "scripts" / name), *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=120)


@pytest.fixture(scope="session", autouse=True)
def _own_user_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Tests, and the processes that they start, keep nothing in the cache directory of the person who runs them."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("user_cache"))


@pytest.fixture(scope="session")
def run_script() -> Callable[..., subprocess.CompletedProcess[str]]:
    """`run_script("name.py", *arguments)`: run a script of the project and capture what it says."""
    return _run_script


def make_once(factory: pytest.TempPathFactory, name: str, script: str, *arguments: object) -> Path:
    out = factory.mktemp(name) / name
    done = _run_script(script, *arguments, "--out", out)
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="session")
def tiny_ti2v(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small TI2V-5B checkpoint in the official layout. Shared: read it, never write to it."""
    return make_once(tmp_path_factory, "ti2v", "make_tiny_wan.py", "--variant", "ti2v-5b")


@pytest.fixture(scope="session")
def tiny_t2v(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small T2V-A14B checkpoint in the official layout. Shared: read it, never write to it."""
    return make_once(tmp_path_factory, "t2v", "make_tiny_wan.py", "--variant", "t2v-a14b")


@pytest.fixture(scope="session")
def tiny_i2v(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small I2V-A14B checkpoint in the official layout. Shared: read it, never write to it."""
    return make_once(tmp_path_factory, "i2v", "make_tiny_wan.py", "--variant", "i2v-a14b")


@pytest.fixture(scope="session")
def tiny_dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images and videos of coloured shapes with captions. Shared: read it, never write to it."""
    return make_once(tmp_path_factory, "shapes", "make_tiny_dataset.py")


@pytest.fixture
def without_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    """`torch.compile` without its last part, which writes and compiles C++ for tens of seconds: graphs run as they are.

    Tracing, guards, the backward graph and what it keeps are those of a real run.
    """
    import torch
    from torch._dynamo.backends.debugging import aot_eager_decomp_partition

    torch._dynamo.reset()
    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", aot_eager_decomp_partition)
