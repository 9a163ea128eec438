"""The pipeline equals a plain `nn.Sequential` bit for bit: losses, gradient norm, clipping and trained parameters."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

WORKER = Path(__file__).parents[1] / "workers" / "pipeline_cases.py"
QUICK = [
    "encoder_top1_bf16",
    "encoder_tokens_dropout_fp32",
    "lora_all_bf16",
    "lora_first_fp32",
    "lora_last_fp32",
    "lora_float8_bf16",
]
REST = [
    "encoder_all_fp32",
    "encoder_all_bf16",
    "encoder_top1_fp32",
    "lora_all_fp32",
    "lora_first_bf16",
    "lora_middle_fp32",
    "lora_middle_bf16",
    "lora_last_bf16",
    "lora_ends_fp32",
    "lora_ends_bf16",
    "lora_broad_fp32",
    "lora_unclipped_fp32",
    "lora_kept_bf16",
]
CLIPPING = 0.01
LAUNCH_LIMIT_SECONDS = 280


def launch(
    tiny: Path, out: Path, cases: list[str], *, processes: int, stages: int, micro_batches: int = 4
) -> Path:
    """Run the worker under the real launcher; stages = 0 is the plain reference."""
    out.mkdir(parents=True)
    arguments = [str(WORKER), "--tiny", str(tiny), "--out", str(out), "--stages", str(stages)]
    arguments += ["--micro_batches", str(micro_batches), "--cases", *cases]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command = [sys.executable, *(torchrun if stages else []), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=LAUNCH_LIMIT_SECONDS, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return out


def assert_equal(
    plain: Path, piped: Path, case: str, *, stages: int, copies: int = 1, like: str = ""
) -> list[int]:
    """`case` has the same bits as plain training of `like`, by default of the same case.

    Returns the number of trained parameters of each stage.
    """
    trained = []
    expected = json.loads((plain / f"{like or case}.json").read_text())["rows"]
    parameters = load_file(plain / f"{like or case}.safetensors")
    found: dict[str, torch.Tensor] = {}
    for stage in range(stages):
        for copy in range(copies):
            stem = piped / f"{case}-stage{stage}-dp{copy}"
            document = json.loads(stem.with_suffix(".json").read_text())
            assert [row["norm"] for row in document["rows"]] == [row["norm"] for row in expected], (
                case,
                stage,
            )
            assert document["held"]["frozen_gradients"] == 0
            # A stage below everything that trains holds what it is working on and nothing else.
            if stage == 0 and stages > 1 and "lora_last" in case:
                assert document["held"]["most_buffers"] == 1
            if copy == 0:
                trained.append(document["held"]["trained"])
            if stage == stages - 1:
                evaluated = [row["evaluated"] for row in document["rows"] if "evaluated" in row]
                assert evaluated == [
                    row["evaluated"][copy::copies] for row in expected if "evaluated" in row
                ], case
                assert evaluated[0] and all(evaluated[0]), case
            share = load_file(stem.with_suffix(".safetensors"))
            assert all(name not in found or torch.equal(found[name], share[name]) for name in share)
            found |= share
    assert sorted(found) == sorted(parameters)
    different = [name for name in parameters if not torch.equal(found[name], parameters[name])]
    assert not different, (case, different[:3])
    if copies == 1:
        last = json.loads((piped / f"{case}-stage{stages - 1}-dp0.json").read_text())["rows"]
        assert [row["totals"] for row in last] == [row["totals"] for row in expected], case
    return trained


@pytest.fixture(scope="module")
def plain(tiny_ti2v: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return launch(tiny_ti2v, tmp_path_factory.mktemp("plain") / "out", QUICK, processes=1, stages=0)


@pytest.mark.parametrize(
    "stages", [pytest.param(1, marks=pytest.mark.long), 2, pytest.param(3, marks=pytest.mark.long)]
)
def test_pipeline_equals_sequential(tiny_ti2v: Path, plain: Path, tmp_path: Path, stages: int) -> None:
    piped = launch(tiny_ti2v, tmp_path / "out", QUICK, processes=stages, stages=stages)
    for case in QUICK:
        assert_equal(plain, piped, case, stages=stages)


@pytest.mark.long
def test_two_copies_equal_accumulation(tiny_ti2v: Path, tmp_path: Path) -> None:
    """Two data-parallel ranks with one micro-batch each do what one rank does with two, also on top of two stages."""
    cases = ["encoder_top1_bf16", "lora_last_fp32"]
    plain = launch(tiny_ti2v, tmp_path / "plain", cases, processes=1, stages=0, micro_batches=2)
    copies = launch(tiny_ti2v, tmp_path / "copies", cases, processes=2, stages=1, micro_batches=2)
    for case in cases:
        assert_equal(plain, copies, case, stages=1, copies=2)


# Dropout shows whether what runs again draws the same masks.
VARIED = {
    1: [
        "lora_all_bf16_swap_none",
        "lora_last_fp32_swap_true",
        "lora_all_bf16_selective",
        "lora_last_fp32_offload",
    ],
    2: [
        "encoder_tokens_dropout_fp32_selective",
        "encoder_tokens_dropout_fp32_swap_offload",
        "encoder_top1_bf16_offload",
        "encoder_top1_bf16_none",
        "lora_all_bf16_none",
        "lora_all_bf16_swap_selective",
    ],
}
WAYS = ("none", "selective", "offload", "swap_none", "swap_true", "swap_selective", "swap_offload")


def assert_equal_to_plain(plain: Path, piped: Path, cases: list[str], stages: int) -> None:
    for case in cases:
        like = next(name for name in QUICK if case.startswith(name))
        assert_equal(plain, piped, case, stages=stages, like=like)


@pytest.mark.parametrize("stages", [1, pytest.param(2, marks=pytest.mark.long)])
def test_ways_of_saving_memory_change_no_number(
    tiny_ti2v: Path, plain: Path, tmp_path: Path, stages: int
) -> None:
    """Recomputation of every kind and swapped blocks: bit-equal to plain training without any."""
    piped = launch(tiny_ti2v, tmp_path / "out", VARIED[stages], processes=stages, stages=stages)
    assert_equal_to_plain(plain, piped, VARIED[stages], stages)


@pytest.mark.long
@pytest.mark.parametrize("stages", [1, 2, 3])
def test_every_way_of_saving_memory(tiny_ti2v: Path, plain: Path, tmp_path: Path, stages: int) -> None:
    varied = ("encoder_top1_bf16", "encoder_tokens_dropout_fp32", "lora_all_bf16", "lora_last_fp32")
    cases = [f"{case}_{way}" for case in varied for way in WAYS]
    piped = launch(tiny_ti2v, tmp_path / "out", cases, processes=stages, stages=stages)
    assert_equal_to_plain(plain, piped, cases, stages)


def test_the_comparison_can_fail(plain: Path) -> None:
    """Training moves every trained parameter that gets a gradient, so equal parameters are not equal for want of steps."""
    norms = [row["norm"] for row in json.loads((plain / "lora_all_bf16.json").read_text())["rows"]]
    assert all(norm > 0 for norm in norms) and len(set(norms)) == len(norms)
    ups = [
        tensor for name, tensor in load_file(plain / "lora_all_bf16.safetensors").items() if "lora_B" in name
    ]
    assert ups and all(tensor.abs().sum() > 0 for tensor in ups)
    # The norms lie on the far side of the threshold, so clipping is a part of what is compared.
    for case in QUICK:
        assert all(
            row["norm"] > CLIPPING for row in json.loads((plain / f"{case}.json").read_text())["rows"]
        ), case


@pytest.fixture(scope="module")
def plain_of_every_case(tiny_ti2v: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """The reference by number of micro-batches in a step, made when it is first asked for."""

    @cache
    def make(micro_batches: int) -> Path:
        out = tmp_path_factory.mktemp("plain") / "out"
        return launch(tiny_ti2v, out, QUICK + REST, processes=1, stages=0, micro_batches=micro_batches)

    return make


@pytest.mark.long
@pytest.mark.parametrize(("processes", "stages"), [(1, 1), (2, 2), (3, 3), (4, 4), (4, 2)])
def test_every_case(
    tiny_ti2v: Path, tmp_path: Path, plain_of_every_case: Callable[[int], Path], processes: int, stages: int
) -> None:
    copies = processes // stages
    micro_batches = 2 * copies if copies > 1 else 4
    cases = QUICK + REST
    if copies > 1:
        micro_batches = copies  # sums of two are exact in any order; of four they are not
    plain = plain_of_every_case(micro_batches)
    piped = launch(
        tiny_ti2v, tmp_path / "piped", cases, processes=processes, stages=stages, micro_batches=micro_batches
    )
    trained = {case: assert_equal(plain, piped, case, stages=stages, copies=copies) for case in cases}
    if stages >= 3:  # stages that train nothing at every place: at the start, in the middle, at the end
        assert trained["lora_last_fp32"][0] == 0 and trained["lora_first_fp32"][-1] == 0
        assert trained["encoder_top1_fp32"][-1] == 0 and trained["lora_middle_fp32"][1] > 0
        assert trained["lora_ends_fp32"][0] > 0 and trained["lora_ends_fp32"][-1] > 0
        assert 0 in trained["lora_ends_fp32"][1:-1]


def test_the_long_set_has_every_case() -> None:
    """Every trained part in both precisions, so that nothing is left out by an oversight."""
    source = WORKER.read_text()
    assert all(f'"{case}"' in source for case in QUICK + REST)
    parts = ("encoder_all", "encoder_top1", "lora_all", "lora_first", "lora_middle", "lora_last", "lora_ends")
    assert {f"{part}_{dtype}" for part in parts for dtype in ("fp32", "bf16")} <= set(QUICK + REST)
