"""Every recipe in configs/: it plans on the published headers and fits what its page says, and it dry-runs at tiny size.

Headers are real, data are holes (a few kilobytes on disk). The tiny checkpoints have as many blocks as the published ones,
so that bands, swapped blocks and trained blocks are those of the recipe; only paths are overridden, and for a single process
the number of stages. What the true number of stages does is planned, and for one recipe of each mode started.
"""

import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from models.wan.plan_pair import plan_document
from tests.conftest import make_once
from tests.helpers.real_headers import PARAMETERS, write_real_dit
from tests.helpers.workspace import ROOT, TIME_LIMIT_SECONDS, environment, make_workspace
from train import main
from utils.config.experts import is_pair
from utils.config.load import load_config

TFLOPS = 400.0


class Recipe(NamedTuple):
    """A recipe, the page that explains it, and what its plan says of the GPUs that it is for.

    `needs` are the 10^9 bytes of the fullest GPU as the page gives them; of a pair those of each expert.
    """

    name: str
    page: str
    variant: str
    gpus: int
    gpu_gb: int
    needs: tuple[str, ...]

    def __str__(self) -> str:
        return self.name

    @property
    def config(self) -> Path:
        return ROOT / "configs" / f"{self.name}.toml"


RECIPES = (
    Recipe("wan22_te_ft", "ti2v_5b", "ti2v-5b", 2, 48, ("38.3",)),
    Recipe("wan22_dit_lora_translator", "ti2v_5b", "ti2v-5b", 1, 24, ("11.2",)),
    Recipe("wan22_a14b_translator_high", "a14b_translators", "t2v-a14b", 2, 48, ("32.2",)),
    Recipe("wan22_a14b_translator_low", "a14b_translators", "t2v-a14b", 2, 48, ("31.3",)),
    Recipe("wan22_a14b_translator_both", "a14b_translators", "t2v-a14b", 2, 48, ("32.2", "30.6")),
    Recipe("wan22_i2v_translator_both", "a14b_translators", "i2v-a14b", 2, 48, ("32.2", "30.6")),
    Recipe("wan22_dit_lora_24gb", "small_gpus", "ti2v-5b", 1, 24, ("15.7",)),
    Recipe("wan22_a14b_translator_24gb", "small_gpus", "t2v-a14b", 1, 24, ("16.2",)),
    Recipe("wan22_te_ft_2x24gb", "small_gpus", "ti2v-5b", 2, 24, ("18.2",)),
    Recipe("wan22_te_ft_8gpu", "eight_gpus", "ti2v-5b", 8, 80, ("56.0",)),
    Recipe("wan22_a14b_translator_8gpu", "eight_gpus", "t2v-a14b", 8, 80, ("51.3", "51.3")),
)
BLOCKS = {"ti2v-5b": 30, "t2v-a14b": 40, "i2v-a14b": 40}


@pytest.fixture(autouse=True)
def _in_the_root(monkeypatch):
    # The recipes name their dataset TOML relative to it.
    monkeypatch.chdir(ROOT)


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """The published headers of each variant."""
    return {variant: write_real_dit(tmp_path_factory.mktemp(variant), variant) for variant in BLOCKS}


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    """A tiny checkpoint of each variant, narrow, but as deep as the published one."""
    return {
        variant: make_once(
            tmp_path_factory,
            f"deep-{variant}",
            "make_tiny_wan.py",
            *("--variant", variant, "--layers", layers, "--text_layers", 24),
        )
        for variant, layers in BLOCKS.items()
    }


@pytest.fixture(scope="module")
def shapes(tmp_path_factory, tiny_dataset):
    """A dataset with its cache, which recipes of one variant share."""
    return make_workspace(tmp_path_factory.mktemp("shapes"), Path("unused"), tiny_dataset)


def test_every_recipe_is_here_and_explained() -> None:
    assert {recipe.name for recipe in RECIPES} == {
        path.stem for path in (ROOT / "configs").glob("wan22_*.toml")
    }
    pages = {path.stem for path in (ROOT / "docs" / "recipes").glob("*.md")}
    # A page without a config of its own: it uses the translators'.
    assert {recipe.page for recipe in RECIPES} | {"closed_form_translator"} == pages
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for page in pages:
        assert f"(docs/recipes/{page}.md)" in readme
    for recipe in RECIPES:
        text = (ROOT / "docs" / "recipes" / f"{recipe.page}.md").read_text(encoding="utf-8")
        assert f"`configs/{recipe.name}.toml`" in text
        assert f"docs/recipes/{recipe.page}.md" in recipe.config.read_text(encoding="utf-8")


def plans(recipe: Recipe, root: Path, *overrides: str) -> list[dict]:
    """The plan of a recipe, or those of its experts."""
    loaded = load_config(recipe.config, [f"model.ckpt_path={root}", *overrides])
    document = plan_document(loaded, recipe.gpus, TFLOPS)
    return list(document["experts"].values()) if is_pair(loaded.train) else [document]


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_a_recipe_fits_the_gpus_that_its_page_names(recipe, real, tmp_path) -> None:
    documents = plans(recipe, real[recipe.variant], f"output_dir={tmp_path}/out")
    page = (ROOT / "docs" / "recipes" / f"{recipe.page}.md").read_text(encoding="utf-8")
    (row,) = re.findall(rf"^\| `configs/{recipe.name}\.toml` \|.*$", page, re.MULTILINE)
    assert len(documents) == len(recipe.needs)
    for document, needs in zip(documents, recipe.needs, strict=True):
        assert document["model"]["variant"] == recipe.variant
        assert document["model"]["parameters_text"] == PARAMETERS[recipe.variant]
        # Nothing but what has to be downloaded or recorded is missing.
        missing = {problem["key"] for problem in document["missing"]}
        assert "directory[0].path" in missing
        assert all(key.startswith("model.") for key in missing - {"directory[0].path"})
        fit = {one["gpu_gb"]: one for one in document["fit"]}[recipe.gpu_gb]
        assert fit["verdict"] == "fits"
        assert f"{fit['needs'] / 1e9:.1f}" == needs
        assert f"{needs} GB" in row
        smaller = [one for one in document["fit"] if one["gpu_gb"] < recipe.gpu_gb]
        assert all(one["verdict"] != "fits" for one in smaller)  # not for a larger GPU than it has to be
        seconds = re.findall(r"([\d.]+) s\b", row)
        assert any(
            float(one) == pytest.approx(document["compute"]["step_seconds"], rel=0.02) for one in seconds
        )


def test_the_bands_are_those_of_each_expert(real, tmp_path) -> None:
    for recipe in RECIPES:
        if len(recipe.needs) == 2:
            high, low = plans(recipe, real[recipe.variant], f"output_dir={tmp_path}/out")
            assert (high["model"]["expert"], low["model"]["expert"]) == ("high_noise", "low_noise")
            for document, band in ((high, "20-39"), (low, "30-39")):
                assert document["training"]["targets_text"] == [
                    f"cross_attn.{name} in blocks {band}" for name in "kv"
                ]
            boundary = 0.9 if recipe.variant == "i2v-a14b" else 0.875
            assert high["model"]["noise_levels"] == [boundary, 1.0]
            assert low["model"]["noise_levels"] == [0.0, boundary]


def overrides(recipe: Recipe, deep, shapes, out: Path) -> list[str]:
    values = (
        f"model.ckpt_path={deep[recipe.variant]}",
        f"dataset={shapes.root}/dataset.toml",
        f"output_dir={out}",
    )
    return [word for value in values for word in ("--set", value)]


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_a_recipe_dry_runs_on_its_variants_tiny_checkpoint(recipe, deep, shapes, tmp_path, capsys) -> None:
    flags = overrides(recipe, deep, shapes, tmp_path / "out")
    status = main(["--config", str(recipe.config), *flags, "--set", "pipeline_stages=1", "--dry_run"])
    said = capsys.readouterr().err
    assert status == 0, said
    assert "dry run: everything is in place" in said
    assert "warning" not in said.lower() and "note:" not in said
    assert said.count("blocks of width 128") >= len(recipe.needs)
    assert not (tmp_path / "out").exists()


@pytest.mark.long
@pytest.mark.parametrize(
    "recipe",
    [recipe for recipe in RECIPES if recipe.name in ("wan22_te_ft_2x24gb", "wan22_a14b_translator_both")],
    ids=str,
)
def test_a_recipe_of_two_stages_dry_runs_under_the_launcher(recipe, deep, shapes, tmp_path) -> None:
    launcher = [str(Path(sys.executable).with_name("torchrun")), "--standalone", "--nproc_per_node", "2"]
    command = [*launcher, str(ROOT / "train.py"), "--config", str(recipe.config)]
    done = subprocess.run(
        [*command, *overrides(recipe, deep, shapes, tmp_path / "out"), "--dry_run"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment(),
        timeout=TIME_LIMIT_SECONDS,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "2 stage(s) x 1 data-parallel" in done.stderr
    assert "dry run: everything is in place" in done.stderr
