import shutil

import pytest
import torch

from utils.compiled import check_compiler, compiled, graphs_compiled
from utils.errors import UserError

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def add_up(module, rows):
    return module(rows).sum(dim=0)


@pytest.fixture(autouse=True)
def quick(without_inductor):
    """Traced and cut as always, but nothing is written in C++."""


def test_modules_of_one_structure_share_a_graph_and_a_second_shape_is_the_last_that_compiles():
    run, before = compiled(add_up), graphs_compiled()
    first, second = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    for module in (first, second, first):
        rows = torch.randn(4, 3)
        assert torch.equal(run(module, rows), add_up(module, rows))
    assert graphs_compiled() == before + 1
    for count in (5, 6, 7, 8):
        rows = torch.randn(count, 3)
        assert torch.equal(run(second, rows), add_up(second, rows))
    assert graphs_compiled() == before + 2


def test_more_variants_are_compiled_than_torch_allows_by_itself():
    def times(rows, name):  # a text is a constant of the graph, so that each is a variant
        return rows * len(name)

    run, before = compiled(times), graphs_compiled()
    for length in range(12):
        assert run(torch.ones(2), "x" * length).tolist() == [length, length]
    assert graphs_compiled() - before == 12


def without_compilers(monkeypatch, tmp_path):
    for variable in ("CC", "CXX"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))


def make_program(place, name):
    (place / name).write_text("#!/bin/sh\n")
    (place / name).chmod(0o755)


def test_a_missing_compiler_is_told_with_what_to_do(monkeypatch, tmp_path):
    without_compilers(monkeypatch, tmp_path)
    with pytest.raises(
        UserError, match=r"compile: is true, which needs a C\+\+ compiler on this CPU.*g\+\+.*compile = false"
    ):
        check_compiler(CPU, "compile")
    with pytest.raises(UserError, match=r"needs a C compiler on this GPU.*gcc"):
        check_compiler(GPU, "compile")
    monkeypatch.setenv("CXX", "nowhere-g++")
    with pytest.raises(UserError, match=r"CXX = nowhere-g\+\+ is none"):
        check_compiler(CPU, "compile")


def test_a_compiler_on_the_path_or_by_name_will_do(monkeypatch, tmp_path):
    without_compilers(monkeypatch, tmp_path)
    make_program(tmp_path, "clang++")
    assert shutil.which("g++") is None
    check_compiler(CPU, "compile")
    make_program(tmp_path, "own-compiler")
    monkeypatch.setenv("CXX", "own-compiler")
    check_compiler(CPU, "compile")


def test_a_gpu_needs_triton_too(monkeypatch, tmp_path):
    without_compilers(monkeypatch, tmp_path)
    make_program(tmp_path, "cc")
    monkeypatch.setattr("torch.utils._triton.has_triton", lambda: False)
    with pytest.raises(UserError, match=r"compile: .*triton.*compile = false"):
        check_compiler(GPU, "compile")
    monkeypatch.setattr("torch.utils._triton.has_triton", lambda: True)
    check_compiler(GPU, "compile")
