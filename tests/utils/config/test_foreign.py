"""The keys of diffusion-pipe's public Wan examples, one by one and whole: taken as they are meant, or told about."""

import copy
import csv
import inspect
import re
import tomllib
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import tomli_w

from utils.config.foreign_keys import DATASET_KEYS, TRAINING_KEYS
from utils.config.introspect import keys_of, sections_of
from utils.config.load import ConfigError, load_config
from utils.config.schema import DatasetConfig, LoadedConfig, Problem, TrainConfig

ROOT = Path(__file__).resolve().parents[3]
TRAINING: dict[str, Any] = {
    "output_dir": "output/run",
    "dataset": "dataset.toml",
    "eval_datasets": ["eval.toml"],
    "model": {
        "type": "wan",
        "ckpt_path": "ckpt",
        "cache_text_embeddings": True,
        "train_text_encoder": False,
        "freeze_transformer": True,
    },
    "adapter": {"include": ["cross_attn.{k,v}"]},
    "optimizer": {"lr": 1e-5, "betas": [0.9, 0.99], "eps": 1e-8},
}
DATASET: dict[str, Any] = {
    "enable_ar_bucket": True,
    "frame_buckets": [1, 33],
    "directory": [{"path": "media"}],
}
SWITCHES = ("cache_text_embeddings", "train_text_encoder", "freeze_transformer")


class Row(NamedTuple):
    """A key as an example has it: `same` is taken without a word, `note` with one, `refused` is a problem."""

    example: str
    document: str
    key: str
    value: str
    outcome: str
    ours: str

    def __str__(self) -> str:
        return f"{self.document}-{self.key}={self.value}"


def value_of(text: str) -> Any:
    return tomllib.loads(f"value = {text}")["value"]


with (ROOT / "tests" / "assets" / "diffusion_pipe_keys.csv").open(encoding="utf-8", newline="") as _file:
    ROWS = [Row(**row) for row in csv.DictReader(_file)]


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "eval.toml").write_text(tomli_w.dumps(DATASET))
    return tmp_path


def put(document: dict[str, Any], key: str, value: Any) -> None:
    node: Any = document
    *parents, last = re.findall(r"\w+", key)
    for name in parents:
        node = node[int(name)] if name.isdecimal() else node.setdefault(name, {})
    node[last] = value


def get(record: Any, key: str) -> Any:
    for name in re.findall(r"\w+", key):
        record = record[int(name)] if name.isdecimal() else getattr(record, name)
    return record


def load(
    training: dict[str, Any], dataset: dict[str, Any]
) -> tuple[LoadedConfig | None, tuple[Problem, ...]]:
    Path("train.toml").write_text(tomli_w.dumps(training))
    Path("dataset.toml").write_text(tomli_w.dumps(dataset))
    try:
        return load_config("train.toml"), ()
    except ConfigError as error:
        return None, error.problems


def plain(value: Any) -> Any:
    """A loaded value as the TOML has it."""
    if isinstance(value, tuple):
        return [plain(item) for item in value]
    return (
        {name: getattr(value, name) for name in value.__dataclass_fields__}
        if hasattr(value, "label")
        else value
    )


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_each_key_of_the_examples_is_taken_as_it_is_meant_or_told_about(row, home) -> None:
    training, dataset = copy.deepcopy(TRAINING), copy.deepcopy(DATASET)
    put(training if row.document == "training" else dataset, row.key, value_of(row.value))
    loaded, problems = load(training, dataset)
    file = "train.toml" if row.document == "training" else "dataset.toml"
    if row.outcome == "refused":
        (problem,) = problems
        assert (problem.file, problem.key) == (file, row.key)
        assert problem.fix and "did you mean" not in problem.fix
        return
    assert loaded is not None, problems
    record = loaded.train if row.document == "training" else loaded.dataset
    if row.outcome == "same":
        assert loaded.notes == ()
        assert plain(get(record, row.key)) == value_of(row.value)
    else:
        assert row.outcome == "note"
        assert {(note.file, note.key) for note in loaded.notes} == {(file, row.key)}
    if row.ours:
        key, _, value = row.ours.partition("=")
        assert get(record, key) == value_of(value)


def example(name: str) -> dict[str, Any]:
    """An example as a whole: the first value that it has for each key, on top of what every one needs."""
    document = {"optimizer": {}, "adapter": {}, "model": {}}
    for row in reversed(
        [row for row in ROWS if row.document == "training" and row.example in ("main", name)]
    ):
        put(document, row.key, value_of(row.value))
    # What the example has as alternatives, commented out.
    for key in ("force_constant_lr", "pseudo_huber_c", "image_micro_batch_size_per_gpu"):
        del document[key]
    for key in ("save_every_n_examples", "eval_every_n_examples"):
        del document[key]
    for key in ("decompose_factor", "fuse_adapters"):
        del document["adapter"][key]
    if name == "wan":
        del document["model"]["flux_shift"]
    return document


def test_a_whole_example_lacks_only_the_three_switches(home) -> None:
    document = example("main")
    document["monitoring"]["wandb_api_key"] = ""
    loaded, problems = load(document, DATASET)
    (problem,) = problems
    assert loaded is None and problem.key == "model"
    words = "add cache_text_embeddings = true, train_text_encoder = false, freeze_transformer = true"
    assert problem.fix.startswith(words) and "cross_attn.{k,v}" in problem.fix
    document["model"] |= dict(zip(SWITCHES, (True, False, True), strict=True))
    loaded, problems = load(document, DATASET)
    assert loaded is not None, problems
    assert loaded.train.optimizer.type == "adamw_kahan"
    assert loaded.train.adapter is not None and loaded.train.adapter.rank == 32
    # Keys with one reason share a line.
    (about_wandb,) = (note for note in loaded.notes if "wandb" in note.key)
    assert len(about_wandb.key.split(", ")) == 4
    remarks = {"adapter.include", "max_steps", "model.transformer_dtype"}
    assert {note.key for note in loaded.notes} >= remarks
    assert len(loaded.notes) == 13 + len(remarks)


def test_the_example_for_little_memory_says_what_it_needs_at_once(home) -> None:
    document = example("wan")
    document["optimizer"] |= {"type": "AdamW8bitKahan", "stabilize": False}
    document["activation_checkpointing"] = "unsloth"
    del document["eval_datasets"]
    _, problems = load(document, {**DATASET, "cache_shuffle_num": 3})
    assert {problem.key for problem in problems} == {
        "model",
        "optimizer.type",
        "adapter.dtype",
        "cache_shuffle_num",
    }


def test_an_example_may_say_how_to_evaluate_nothing(home) -> None:
    document = copy.deepcopy(TRAINING) | {"eval_micro_batch_size_per_gpu": 1, "eval_before_first_step": False}
    del document["eval_datasets"]
    _, problems = load(document, DATASET)
    assert {problem.key for problem in problems} == {
        "eval_micro_batch_size_per_gpu",
        "eval_before_first_step",
    }
    loaded, _ = load({**document, "steps_per_print": 1}, DATASET)
    assert loaded is not None
    assert "eval_before_first_step, eval_micro_batch_size_per_gpu" in [note.key for note in loaded.notes]


def test_the_loaded_configuration_is_all_in_our_words(home) -> None:
    from utils.config.load import dump_config

    document = copy.deepcopy(TRAINING)
    document["optimizer"]["type"] = "adamw_optimi"
    document |= {
        "partition_method": "parameters",
        "activation_checkpointing": "unsloth",
        "steps_per_print": 1,
    }
    loaded, _ = load(document, DATASET)
    assert loaded is not None and len(loaded.notes) == 4
    Path("again.toml").write_text(dump_config(loaded.train))
    again = load_config("again.toml")
    assert again.train == loaded.train and again.notes == ()


def test_a_secret_is_never_shown(home) -> None:
    document = copy.deepcopy(TRAINING)
    document["monitoring"] = {"wandb_api_key": "s3cret-value"}
    _, problems = load(document, DATASET)
    assert len(problems) == 1 and "s3cret" not in str(problems[0])


def test_a_pair_of_sides_is_the_side_of_a_square_of_that_area(home) -> None:
    dataset = {**DATASET, "resolutions": [[1280, 720], [448, 576]], "ar_buckets": [[512, 512], [448, 576]]}
    _, problems = load(TRAINING, dataset)
    assert {problem.key: problem.fix for problem in problems} == {
        "resolutions": "write resolutions = [960, 508]",
        "ar_buckets": "write ar_buckets = [1.0, 0.778]",
    }


def test_a_clip_mode_is_held_against_every_directory(home) -> None:
    document = {**TRAINING, "video_clip_mode": "single_middle"}
    del document["eval_datasets"]
    same = {"video_clip_mode": "single_middle", **DATASET}
    loaded, _ = load(document, same)
    assert loaded is not None and loaded.notes[0].key == "video_clip_mode"
    other = {**same, "directory": [{"path": "a"}, {"path": "b", "video_clip_mode": "uniform:2"}]}
    _, (problem,) = load(document, other)
    assert problem.key == "video_clip_mode" and '"uniform:2"' in problem.reason
    assert problem.fix == 'move video_clip_mode = "single_middle" there'
    _, (problem,) = load({**TRAINING, "video_clip_mode": "single_middle"}, same)
    assert "eval.toml says" in problem.reason


def test_a_shared_key_with_another_meaning_is_told_where_the_file_came_from_there(home) -> None:
    own = copy.deepcopy(TRAINING)
    del own["adapter"]["include"], own["optimizer"]["betas"]
    own |= {"epochs": 2, "max_steps": 5}
    directory = {"path": "media", "mask_path": "masks", "frame_buckets": [33]}
    dataset = {"resolutions": [256, 512], "directory": [directory]}
    loaded, _ = load(own, dataset)
    assert loaded is not None and loaded.notes == ()
    for sign in ({"steps_per_print": 1}, {"video_clip_mode": "single_beginning"}):
        loaded, _ = load({**own, **sign}, dataset)
        assert loaded is not None
        assert {note.key for note in loaded.notes} - set(sign) == {
            "adapter.include",
            "max_steps",
            "optimizer.betas",
            "resolutions",
            "enable_ar_bucket",
            "frame_buckets",
            "directory[0].mask_path",
            "directory[0].frame_buckets",
        }


@pytest.mark.parametrize(
    ("written", "remark"),
    [
        ({"type": "adamw"}, "optimizer.betas"),
        ({"type": "adamw_optimi"}, "optimizer.eps"),  # optimi's own betas are ours
        ({"type": "adamw_optimi", "eps": 1e-8}, None),
        ({"type": "adamw", "betas": [0.9, 0.99]}, None),
    ],
)
def test_defaults_of_an_optimizer_are_those_of_its_library(home, written, remark) -> None:
    own = copy.deepcopy(TRAINING) | {"steps_per_print": 1}
    own["optimizer"] = {"lr": 1e-5, **written}
    loaded, problems = load(own, DATASET)
    assert loaded is not None, problems
    told = {note.key for note in loaded.notes} & {"optimizer.betas", "optimizer.eps"}
    assert told == ({remark} if remark else set())


def test_what_our_notes_say_of_optimi_is_so() -> None:
    optimi = pytest.importorskip("optimi")
    found = inspect.signature(optimi.AdamW.__init__).parameters
    assert (found["betas"].default, found["eps"].default) == ((0.9, 0.99), 1e-6)


def test_batch_sizes_that_are_no_pairs_are_an_error_of_the_config(home) -> None:
    loaded, problems = load({**TRAINING, "micro_batch_size_per_gpu": [[512, 4], [1024, "x"]]}, DATASET)
    assert loaded is None and any(one.key == "micro_batch_size_per_gpu" for one in problems)


def test_the_precision_of_an_adapter_follows_from_the_optimizer(home) -> None:
    for trained, kept in (("float32", "adamw"), ("bfloat16", "adamw_kahan")):
        document = copy.deepcopy(TRAINING)
        document["adapter"]["dtype"] = trained
        document["optimizer"]["type"] = "adamw_optimi"
        loaded, problems = load(document, DATASET)
        assert loaded is not None, problems
        assert loaded.train.optimizer.type == kept


def test_an_override_is_blamed_on_its_flag(home) -> None:
    load(TRAINING, DATASET)
    with pytest.raises(ConfigError) as error:
        load_config("train.toml", ["model.flux_shift=true"])
    assert str(error.value.problems[0]).startswith("--set: model.flux_shift: does not exist here")
    assert load_config("train.toml", ["steps_per_print=5"]).notes[0].file == "--set"


@pytest.mark.parametrize(
    "value", ["text", 5, [], [{}], {"a": 1}, True, [[1]], [[1, 2]], [[0, 1]], [["a", "b"]]]
)
@pytest.mark.parametrize("document", ["training", "dataset"])
def test_no_value_of_any_kind_trips_the_reader(home, document, value) -> None:
    keys = {row.key for row in ROWS if row.document == document} | {
        "monitoring",
        "model",
        "adapter",
        "optimizer",
    }
    for key in keys:
        training, dataset = copy.deepcopy(TRAINING), copy.deepcopy(DATASET)
        put(training if document == "training" else dataset, key, value)
        loaded, problems = load(training, dataset)
        assert (loaded is None) == bool(problems)


def test_no_foreign_key_is_one_of_ours() -> None:
    """A key that comes to exist here has to leave the list."""
    for foreign, record in ((TRAINING_KEYS, TrainConfig), (DATASET_KEYS, DatasetConfig)):
        ours = {
            f"{section.path}{'[]' if section.is_array else ''}.{name}".removeprefix(".")
            for section in sections_of(record)
            for name in keys_of(section.record)
        }
        assert not ours & {key.key for key in foreign}
        assert len({key.key for key in foreign}) == len(foreign)
        for key in foreign:
            assert key.here and (key.fix or key.is_idle(object()))
