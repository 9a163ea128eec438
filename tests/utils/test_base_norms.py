"""Norms of base weights: right, measured once, and never taken from a table that is not about these files."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from utils.base_norms import BaseNorms, default_directory, spectral_norm
from utils.errors import UserError
from utils.tensor_source import open_safetensors

ROOT = Path(__file__).resolve().parents[2]


def random_matrix(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def weights(tmp_path):
    path = tmp_path / "base.safetensors"
    save_file(
        {"a.weight": random_matrix(40, 24), "b.weight": random_matrix(8, 8, 2, seed=1).bfloat16()}, path
    )
    return path


@settings(max_examples=40)
@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 40),
    seed=st.integers(0, 1000),
    decay=st.sampled_from([0.0, 0.3]),
)
def test_the_largest_singular_value(rows, columns, seed, decay):
    left, right = (torch.linalg.qr(random_matrix(size, size, seed=seed))[0] for size in (rows, columns))
    count = min(rows, columns)
    values = torch.exp(-decay * torch.arange(count))
    found = spectral_norm(left[:, :count] * values @ right[:, :count].T)
    # float32: the largest error measured is 1e-6.
    assert found.value == pytest.approx(1.0, abs=1e-5)
    assert found.value - 1e-5 <= 1.0 <= found.value + found.error + 1e-5 and found.error < 1e-2


def test_a_random_matrix_of_some_size_whose_largest_values_lie_close():
    matrix = random_matrix(700, 500)
    largest = torch.linalg.matrix_norm(matrix.double(), 2).item()
    found = spectral_norm(matrix)
    assert found.value == pytest.approx(largest, rel=1e-4)
    assert found.value <= largest * (1 + 1e-6) <= (found.value + found.error) * (1 + 1e-5)
    assert spectral_norm(torch.zeros(5, 4)).value == 0.0
    for factor in (1e-30, 1e30):
        assert spectral_norm(matrix * factor).value == pytest.approx(largest * factor, rel=1e-4)


def test_each_tensor_is_read_once_in_all(tmp_path, weights):
    source = open_safetensors([weights])
    expected = random_matrix(40, 24).double().norm().item()
    first = BaseNorms(source, tmp_path / "norms")
    assert first.frobenius("a.weight") == pytest.approx(expected, rel=1e-12)
    assert first.frobenius("a.weight") == first.frobenius("a.weight") and first.measured == 1
    first.save()
    second = BaseNorms(source, tmp_path / "norms")
    assert second.frobenius("a.weight") == first.frobenius("a.weight") and second.measured == 0
    spectral = second.spectral("a.weight")
    assert second.measured == 1  # only the other norm was known
    second.save()
    third = BaseNorms(source, tmp_path / "norms")
    assert third.spectral("a.weight") == spectral and third.frobenius("a.weight") == first.frobenius(
        "a.weight"
    )
    assert third.measured == 0


def test_what_two_processes_measured_is_all_kept(tmp_path, weights):
    source = open_safetensors([weights])
    one, other = (BaseNorms(source, tmp_path / "norms") for _ in range(2))
    one.frobenius("a.weight")
    other.frobenius("b.weight")
    one.save()
    other.save()
    both = BaseNorms(source, tmp_path / "norms")
    both.frobenius("a.weight"), both.frobenius("b.weight")
    assert both.measured == 0


@pytest.mark.parametrize("how", ["values", "time"])
def test_another_file_has_another_table(tmp_path, weights, how):
    before = BaseNorms(open_safetensors([weights]), tmp_path / "norms")
    old = before.frobenius("a.weight")
    before.save()
    if how == "values":
        stat = weights.stat()
        save_file(
            {"a.weight": 2 * random_matrix(40, 24), "b.weight": random_matrix(8, 8, 2).bfloat16()}, weights
        )
        os.utime(weights, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    else:
        os.utime(weights, ns=(1, 1))
    after = BaseNorms(open_safetensors([weights]), tmp_path / "norms")
    assert (
        after.frobenius("a.weight") == pytest.approx(old * (2 if how == "values" else 1))
        and after.measured == 1
    )


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        '{"format": 99, "norms": {"a.weight": {"frobenius": 1.0}}}',
        '{"format": 2, "norms": {"a.weight": {"frobenius": "x"}}}',
        '{"format": 2, "norms": {"a.weight": {"frobenius": NaN}}}',
        '{"format": 2, "norms": {"a.weight": {"frobenius": -1}}}',
        '{"format": 2, "norms": {"a.weight": 3}}',
        '{"format": 2, "norms": {"a.weight": {"frobenius": 1.0, "spectral": [1.0]}}}',
    ],
)
def test_a_damaged_table_is_made_anew(tmp_path, weights, content):
    source = open_safetensors([weights])
    first = BaseNorms(source, tmp_path / "norms")
    right = first.frobenius("a.weight")
    first.save()
    (table,) = (tmp_path / "norms").iterdir()
    assert json.loads(table.read_text())["norms"]["a.weight"]["frobenius"] == right
    table.write_text(content)
    again = BaseNorms(source, tmp_path / "norms")
    assert again.frobenius("a.weight") == right and again.measured == 1
    if '"format": 99' not in content:  # that of another version is not damaged
        assert len(again.problems) == 1 and str(table) in again.problems[0]
    again.save()
    assert json.loads(table.read_text())["norms"]["a.weight"]["frobenius"] == right


def test_where_nothing_can_be_kept_the_numbers_are_still_there(tmp_path, weights):
    (tmp_path / "file").write_text("in the way")
    norms = BaseNorms(open_safetensors([weights]), tmp_path / "file" / "norms")
    assert norms.frobenius("a.weight") > 0
    norms.save()
    assert "could not be kept" in norms.problems[-1]


def test_one_changed_digit_is_noticed(tmp_path, weights):
    """It would be a plausible number, and every ratio wrong by it."""
    source = open_safetensors([weights])
    first = BaseNorms(source, tmp_path / "norms")
    right = first.frobenius("a.weight")
    first.save()
    (table,) = (tmp_path / "norms").iterdir()
    table.write_text(table.read_text().replace(str(right), str(right + 1)))
    again = BaseNorms(source, tmp_path / "norms")
    assert again.frobenius("a.weight") == right and "damaged" in again.problems[0]


def test_a_user_without_a_home_still_gets_numbers(monkeypatch, weights):
    monkeypatch.delenv("XDG_CACHE_HOME")

    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", no_home)
    norms = BaseNorms(open_safetensors([weights]))
    assert norms.frobenius("a.weight") > 0
    norms.save()
    assert "no home directory" in norms.problems[-1]


_WRITER = """
import sys
from pathlib import Path
from utils.base_norms import BaseNorms
from utils.tensor_source import open_safetensors
for _ in range(30):
    norms = BaseNorms(open_safetensors([Path(sys.argv[1])]), Path(sys.argv[2]))
    norms._table = {}
    norms.frobenius(sys.argv[3])
    norms.save()
    assert not norms.problems, norms.problems
"""


def test_two_processes_at_once_never_leave_half_a_table(tmp_path, weights):
    arguments = [str(weights), str(tmp_path / "norms")]
    writers = [
        subprocess.Popen([sys.executable, "-c", _WRITER, *arguments, name], cwd=ROOT)
        for name in ("a.weight", "b.weight")
    ]
    assert [writer.wait(timeout=120) for writer in writers] == [0, 0]
    assert len(list((tmp_path / "norms").iterdir())) == 1
    norms = BaseNorms(open_safetensors([weights]), tmp_path / "norms")
    norms.frobenius("a.weight"), norms.frobenius("b.weight")
    assert norms.measured <= 1 and not norms.problems


def test_values_that_are_not_finite_are_refused(tmp_path):
    save_file({"a.weight": torch.full((4, 4), float("nan"))}, tmp_path / "x.safetensors")
    norms = BaseNorms(open_safetensors([tmp_path / "x.safetensors"]), tmp_path / "norms")
    with pytest.raises(UserError, match="NaN or infinite"):
        norms.spectral("a.weight")


def test_the_user_says_where_caches_lie(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_directory() == tmp_path / "ai-model-sandbox" / "base_norms"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert default_directory() == tmp_path / "home" / ".cache" / "ai-model-sandbox" / "base_norms"
