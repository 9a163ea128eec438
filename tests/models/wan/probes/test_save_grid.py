"""The grid of a save: found where it is drawn from the very file, and otherwise how to get one."""

from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from models.wan.probes.grid import ADAPTER_ROLE, ENCODER_ROLE
from models.wan.probes.save_grid import add_grid, find_grid
from utils.report import Report, read_summary

RUN = "20310101_120000"
TAG = f"{RUN}_epoch2"


@pytest.fixture
def adapter(tmp_path, monkeypatch) -> Path:
    """A save in a run."""
    monkeypatch.chdir(tmp_path)
    directory = tmp_path / "output" / RUN / "epoch2"
    directory.mkdir(parents=True)
    (directory.parent / "config.toml").write_text("# of the run\n")
    return write(directory / "adapter_model.safetensors")


def write(path: Path, value: float = 1.0) -> Path:
    save_file({"a": torch.full((4,), value)}, path, metadata={"format": "pt", "epoch": "2"})
    return path


def draw(
    tag: str, files: dict[str, Path], weight: str = "1", verdict: str = "pass", colour: int = 0, **metrics
) -> None:
    """A report as prompt_grid writes it; of each column one adapter."""
    report = Report("prompt_grid", "What changes?", "reports", tag)
    for name, file in files.items():
        report.add_input(ADAPTER_ROLE.format(name=name, weight=weight), file)
    report.metric("settings", "ti2v-5b, 64x64 px")
    report.metric("neutral_change", dict.fromkeys(files, 0.03))
    report.metric("neutral_change_interval", {name: [0.01, 0.05] for name in files})
    report.metric("neutral_latent_distance", dict.fromkeys(files, 0.2))
    for name, value in metrics.items():
        report.metric(name, value)
    report.picture("grid", Image.new("RGB", (40, 30), (colour, 0, 0)))
    report.write(verdict, "Neutral prompts change by at most 0.03.", "-", "-")


def shown(adapter: Path, *parts: str) -> tuple[Path, str, dict]:
    """The report that shows what is found: its directory, text and metrics."""
    report = Report("dit_lora_translator", "Is it so?", "reports", "t")
    add_grid(report, find_grid(adapter, Path("reports")))
    directory = report.write("pass", "because of the test.", "-", "-")
    return directory, (directory / "report.md").read_text(), read_summary(directory).metrics


def test_the_grid_of_the_save_is_shown_with_its_change(adapter) -> None:
    draw(TAG, {"adapter": adapter}, domain_change={"adapter": 0.5}, domain_latent_distance={"adapter": 0.9})
    directory, text, metrics = shown(adapter)
    assert metrics == {
        "grid": f"reports/prompt_grid/{TAG}",
        "grid_neutral_change": 0.03,
        "grid_domain_change": 0.5,
    }
    assert f"[{TAG}](../../prompt_grid/{TAG}/report.md), column `adapter`: **pass**" in text
    assert "| neutral | 0.03000 | 0.01000 to 0.05000 | 0.2000 |" in text
    assert "| domain | 0.5000 | one prompt has none | 0.9000 |" in text and "](grid.png)" in text
    with Image.open(directory / "grid.png") as picture:
        assert picture.size == (40, 30)
    assert [entry.role for entry in read_summary(directory).inputs] == ["grid"]


def test_of_several_the_newest_that_is_of_these_weights(adapter) -> None:
    other = write(adapter.with_name("other.safetensors"), 2.0)
    for tag, file, colour in ((TAG, adapter, 1), (f"{TAG}-2", adapter, 2), (f"{TAG}-3", other, 3)):
        draw(tag, {"adapter": file}, colour=colour)
    found = find_grid(adapter, Path("reports"))
    assert found.grid is not None and found.grid.directory.name == f"{TAG}-2"
    (remark,) = found.remarks
    assert f"{TAG}-3 does not show" in remark


def test_a_grid_of_other_weights_is_not_shown(adapter) -> None:
    draw(TAG, {"adapter": adapter})
    write(adapter, 3.0)  # saved again since
    found = find_grid(adapter, Path("reports"))
    assert found.grid is None and "does not show" in found.remarks[0]
    assert f"--run_tag {TAG}-2" in found.missing


def test_only_a_column_of_the_adapter_alone_counts(adapter) -> None:
    draw(TAG, {"adapter": adapter}, weight="0.5")
    assert find_grid(adapter, Path("reports")).grid is None
    report = Report("prompt_grid", "What changes?", "reports", f"{TAG}-2")
    report.add_input(ADAPTER_ROLE.format(name="both", weight="1"), adapter)
    report.add_input(ENCODER_ROLE.format(name="both"), adapter)
    report.picture("grid", Image.new("RGB", (40, 30)))
    report.write("pass", "fine.", "-", "-")
    assert find_grid(adapter, Path("reports")).grid is None
    other = write(adapter.with_name("other.safetensors"), 2.0)
    draw(f"{TAG}-3", {"first": other, "mine": adapter})
    found = find_grid(adapter, Path("reports")).grid
    assert found is not None and found.column == "mine"


def test_without_one_the_report_says_how_to_get_it(adapter) -> None:
    directory, text, metrics = shown(adapter)
    assert metrics == {"grid": "none"} and not (directory / "grid.png").exists()
    run = adapter.parents[1]
    command = (
        f"prompt_grid.py --config {run} --run adapter={run}/epoch2 --run_tag {TAG} --reports_dir reports"
    )
    assert command in text and "`[samples]` in the config" in text


def test_an_adapter_of_no_run_has_no_grid(tmp_path) -> None:
    found = find_grid(write(tmp_path / "lone.safetensors"), tmp_path)
    assert found.grid is None and "is no save in a run" in found.missing


def test_a_copy_in_the_directory_of_a_pair_has_that_of_its_save(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    pair = tmp_path / "output" / RUN
    (pair / "low_noise").mkdir(parents=True)
    (pair / "pair.json").write_text("{}")
    (pair / "low_noise" / "config.toml").write_text("# of the half\n")
    copy = write(pair / "adapter_low_noise.safetensors")
    draw(f"{RUN}_low_noise_epoch2", {"adapter": copy})
    found = find_grid(copy, Path("reports")).grid
    assert found is not None and found.directory.name == f"{RUN}_low_noise_epoch2"


def test_a_damaged_report_is_told(adapter) -> None:
    draw(TAG, {"adapter": adapter})
    (Path("reports") / "prompt_grid" / TAG / "summary.json").write_text("{")
    found = find_grid(adapter, Path("reports"))
    assert found.grid is None and "not readable as a report's summary" in found.remarks[0]
