"""One line per step, whole, each step once, whatever happened in between."""

import io
import json

import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from utils.errors import UserError
from utils.metrics import METRICS_FILE, MetricsWriter, read_metrics


def row(step: int, loss: float = 0.5) -> dict:
    return {"step": step, "loss": loss, "loss_by_timestep": {"0.1-0.2": loss}, "lr": 1e-3}


def write(run_dir, first_step: int, *rows: dict) -> None:
    writer = MetricsWriter(run_dir, first_step)
    for one in rows:
        writer.write(one)
    writer.close()


def test_rows_come_back_as_they_were(tmp_path) -> None:
    write(tmp_path, 1, row(1, 0.1), row(2, 1 / 3))
    assert read_metrics(tmp_path) == [row(1, 0.1), row(2, 1 / 3)]


def test_tensorboard_has_scalars_and_bins(tmp_path) -> None:
    write(tmp_path, 1, row(1, 0.25))
    events = EventAccumulator(str(tmp_path)).Reload()
    assert set(events.Tags()["scalars"]) == {"train/loss", "train/lr", "loss_by_timestep/0.1-0.2"}
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(1, 0.25)]


def test_a_picture_is_for_tensorboard(tmp_path) -> None:
    Image.new("RGBA", (30, 20), (200, 30, 30, 255)).save(tmp_path / "grid.png")
    writer = MetricsWriter(tmp_path, 1)
    writer.write_picture("samples/grid", tmp_path / "grid.png", 7)
    (tmp_path / "torn.png").write_bytes((tmp_path / "grid.png").read_bytes()[:40])
    for name in ("torn.png", "none.png"):
        with pytest.raises(UserError, match=f"{name}: cannot be read as a picture"):
            writer.write_picture("samples/grid", tmp_path / name, 8)
    writer.close()
    (event,) = EventAccumulator(str(tmp_path)).Reload().Images("samples/grid")
    assert (event.step, event.width, event.height) == (7, 30, 20)
    with Image.open(io.BytesIO(event.encoded_image_string)) as picture:
        assert picture.getpixel((15, 10)) == (200, 30, 30)


def test_a_run_without_metrics_has_none(tmp_path) -> None:
    assert read_metrics(tmp_path) == []


@pytest.mark.parametrize("content", [b"[1]", b'{"loss": 1}', b'{"step": "1"}', b"\xff"])
def test_what_is_no_row_of_a_run_is_named(tmp_path, content) -> None:
    (tmp_path / METRICS_FILE).write_bytes(json.dumps(row(1)).encode() + b"\n" + content + b"\n")
    with pytest.raises(UserError, match="metrics.jsonl: .*put back the file that the run wrote"):
        read_metrics(tmp_path)


def test_a_line_is_in_the_file_at_once(tmp_path) -> None:
    writer = MetricsWriter(tmp_path, 1)
    writer.write(row(1))
    assert read_metrics(tmp_path) == [row(1)]
    writer.close()


def test_after_a_resume_each_step_stands_once(tmp_path) -> None:
    write(tmp_path, 1, row(1), row(2), row(3, 0.9))
    with (tmp_path / METRICS_FILE).open("a") as file:
        file.write('{"step": 4, "lo')  # torn by a kill
    assert [one["step"] for one in read_metrics(tmp_path)] == [1, 2, 3]
    write(tmp_path, 3, row(3, 0.7), row(4))
    assert read_metrics(tmp_path) == [row(1), row(2), row(3, 0.7), row(4)]
    events = EventAccumulator(str(tmp_path)).Reload()
    found = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert found == [(1, 0.5), (2, 0.5), (3, pytest.approx(0.7)), (4, 0.5)]


def test_what_is_not_finite_never_reaches_the_file(tmp_path) -> None:
    writer = MetricsWriter(tmp_path, 1)
    with pytest.raises(ValueError, match="JSON"):
        writer.write(row(1, float("nan")))
    writer.close()
    assert (tmp_path / METRICS_FILE).read_bytes() == b""


def test_a_full_disk_leaves_whole_lines(tmp_path, monkeypatch) -> None:
    writer = MetricsWriter(tmp_path, 1)
    writer.write(row(1))
    file = writer._file

    class AlmostFull:
        """Takes ten bytes more, as a file on such a disk does."""

        def write(self, line: bytes) -> int:
            return file.write(line[:10])

        def __getattr__(self, name: str):
            return getattr(file, name)

    monkeypatch.setattr(writer, "_file", AlmostFull())
    with pytest.raises(UserError, match=r"metrics\.jsonl: the disk is full"):
        writer.write(row(2))
    monkeypatch.undo()
    writer.close()
    lines = (tmp_path / METRICS_FILE).read_text().splitlines()
    assert [json.loads(line) for line in lines] == [row(1)]
