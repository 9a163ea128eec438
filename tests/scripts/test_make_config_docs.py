import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
SCRIPT = ROOT / "scripts" / "make_config_docs.py"


def run(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(SCRIPT), *args], capture_output=True, text=True, cwd=ROOT)


def test_the_page_is_current() -> None:
    done = run("--check")
    assert done.returncode == 0, done.stderr


def test_a_written_page_passes_and_a_changed_or_missing_one_does_not(tmp_path) -> None:
    page = tmp_path / "page.md"
    assert run("--check", "--out", str(page)).returncode == 1
    assert run("--out", str(page)).returncode == 0
    assert run("--check", "--out", str(page)).returncode == 0
    page.write_text(page.read_text().replace("rank", "rnk"))
    done = run("--check", "--out", str(page))
    assert done.returncode == 1 and "is stale" in done.stderr


def test_the_page_names_every_key_and_keeps_its_tables_whole() -> None:
    from utils.config.introspect import keys_of, sections_of
    from utils.config.schema import DatasetConfig, TrainConfig

    lines = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8").splitlines()
    rows = [line for line in lines if line.startswith("| `")]
    for record in (TrainConfig, DatasetConfig):
        for section in sections_of(record):
            assert not section.path or f"### `{section.title}`" in lines
            for key in keys_of(section.record).values():
                assert key.table is not None or any(row.startswith(f"| `{key.name}` |") for row in rows)
    assert all(line.replace("\\|", "").count("|") == 5 for line in rows if not line.startswith("| encoder"))
