"""Damaged headers and indices: never a crash, never silence."""

import importlib.util
import json
import random
import sys
from pathlib import Path

import pytest

from models.wan.arch import WanArch, expected_shapes
from models.wan.probes.find_parts import open_checkpoint
from tests.helpers.weight_files import as_diffusers, renamed, write_fp8_scaled, write_sharded
from utils.errors import UserError
from utils.report import read_summary
from utils.sparse_weights import write_sparse_safetensors
from utils.tensor_source import open_sharded

ROOT = Path(__file__).resolve().parents[3]
NUM_DAMAGES = 200
SHAPES = expected_shapes(WanArch("t2v", 32, 64, 16, 16, 16, 2, 2, 512, 1e-6, 24))
ADAPTER = {
    f"diffusion_model.blocks.{block}.cross_attn.k.lora_{part}.weight": (4, 32) if part == "A" else (32, 4)
    for block in range(4)
    for part in "AB"
}


def load_script():
    spec = importlib.util.spec_from_file_location(
        "weights_inspect", ROOT / "scripts/diagnostics/weights_inspect.py"
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules["weights_inspect"] = module
    spec.loader.exec_module(module)
    return module


probe = load_script()


def write_file(path, shapes):
    write_sparse_safetensors(path, shapes, "F16", {"note": "values"})
    return path


# Each makes a file or directory and returns it with the file that is damaged.
SUBJECTS = {
    "one file": lambda path: (write_file(path / "m.safetensors", SHAPES),) * 2,
    "prefixed": lambda path: (
        write_file(path / "m.safetensors", renamed(SHAPES, lambda name: f"model.diffusion_model.{name}")),
    )
    * 2,
    "diffusers": lambda path: (write_file(path / "m.safetensors", as_diffusers(SHAPES)),) * 2,
    "fp8_scaled": lambda path: (write_fp8_scaled(path / "m.safetensors", SHAPES),) * 2,
    "adapter": lambda path: (write_file(path / "m.safetensors", ADAPTER),) * 2,
    "shard": lambda path: (
        write_sharded(path / "d", SHAPES, 2),
        path / "d" / "diffusion_pytorch_model-00001-of-00002.safetensors",
    ),
    "index": lambda path: (
        write_sharded(path / "d", SHAPES, 2),
        path / "d" / "diffusion_pytorch_model.safetensors.index.json",
    ),
}


def header_bytes(path):
    """How much of a file can be damaged: the length and the header; of an index, all of it."""
    raw = path.read_bytes()
    return len(raw) if path.suffix == ".json" else 8 + int.from_bytes(raw[:8], "little")


def damage(raw, limit, rng):
    """One byte changed, one bit flipped, or the end cut off, in the first `limit` bytes."""
    place = rng.randrange(limit)
    kind = rng.choice(["byte", "bit", "cut"])
    if kind == "cut":
        return raw[:place]
    changed = bytearray(raw)
    changed[place] = (
        rng.choice([b for b in range(256) if b != raw[place]])
        if kind == "byte"
        else raw[place] ^ 1 << rng.randrange(8)
    )
    return bytes(changed)


def meaning(path):
    """What the file says apart from white space and metadata, None where it is damaged."""
    raw = path.read_bytes()
    try:
        values = json.loads(raw if path.suffix == ".json" else raw[8 : header_bytes(path)])
    except (ValueError, RecursionError):
        return None
    values = {key: value for key, value in values.items() if key not in ("__metadata__", "metadata")}
    return values


@pytest.mark.parametrize("name", SUBJECTS)
def test_random_damage_is_one_line_or_a_report_that_says_so(tmp_path, capsys, name):
    subject, victim = SUBJECTS[name](tmp_path)
    sound, raw, limit = meaning(victim), victim.read_bytes(), header_bytes(victim)
    rng = random.Random(f"weights_inspect {name}")
    statuses = []
    # The whole command with its report each seventh time: what it adds does not depend on the kind of damage.
    for number in range(NUM_DAMAGES):
        victim.write_bytes(damage(raw, limit, rng))
        if number % 7:
            try:
                checkpoint = open_checkpoint(subject)
            except UserError as error:
                assert str(error).isprintable() and str(tmp_path) in str(error)
                statuses.append(2)
            else:
                verdicts = {part.verdict for part in checkpoint.parts}
                statuses.append(1 if "fail" in verdicts else 3 if "inconclusive" in verdicts else 0)
        else:
            tag = f"run{number}"
            status = probe.main([str(subject), "--reports_dir", str(tmp_path / "r"), "--run_tag", tag])
            said = capsys.readouterr()
            report = tmp_path / "r" / "weights_inspect" / tag
            statuses.append(status)
            if status == 2:
                assert said.err.startswith("error: ") and said.err.count("\n") == 1 and not said.out
                assert not report.exists()
            else:
                assert not said.err
                assert {"pass": 0, "fail": 1, "inconclusive": 3}[read_summary(report).verdict] == status
        if statuses[-1] == 0:
            # Passing is right only where the damage hit white space or metadata, or spells the same another way.
            assert meaning(victim) == sound, f"damage {number} passed"
    assert set(statuses) <= {0, 1, 2, 3}
    assert statuses.count(2) > NUM_DAMAGES // 2
    if name not in ("index", "shard"):  # an index and shards that disagree are always refused
        assert 1 in statuses


@pytest.mark.parametrize("name", SUBJECTS)
def test_whatever_opens_weights_notices_or_reads_what_is_there(tmp_path, name):
    subject, victim = SUBJECTS[name](tmp_path)
    raw, limit = victim.read_bytes(), header_bytes(victim)
    rng = random.Random(f"tensor_source {name}")
    refused = 0
    for _ in range(NUM_DAMAGES):
        victim.write_bytes(damage(raw, limit, rng))
        try:
            source = open_sharded(subject)
        except UserError as error:
            assert str(error).isprintable() and str(victim.parent) in str(error)
            refused += 1
            continue
        for tensor in source.shapes:
            path, first, end = source.location(tensor)
            assert 8 < first <= end <= path.stat().st_size
        if victim.suffix == ".safetensors":
            assert source.shapes.keys() >= meaning(victim).keys()
    assert refused > NUM_DAMAGES // 2


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (
            '{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, "a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}',
            "'a' stands in it twice",
        ),
        ('{"a\\nb": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}', r"names a tensor 'a\\nb'"),
        ('{"a\\ud800": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}', "names a tensor"),
        ('{"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}', "overlap or leave gaps"),
        (
            '{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, "b": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}',
            "overlap or leave gaps",
        ),
        (
            '{"blocks.'
            + "9" * 5000
            + '.ffn.0.weight": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}',
            None,
        ),
    ],
)
def test_headers_made_to_mislead(tmp_path, header, message):
    text = header.encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
    if message is None:
        assert probe.main([str(path), "--reports_dir", str(tmp_path / "r")]) in (1, 3)
    else:
        with pytest.raises(UserError, match=message):
            open_checkpoint(path)
