import dataclasses
import os
import tomllib

import pytest

from utils.config.load import ConfigError, config_hash, dump_config, dump_dataset, load_config, load_dataset
from utils.config.schema import Problem, TrainConfig
from utils.errors import UserError

TRAINING = """\
output_dir = "output/run"
dataset = "dataset.toml"
[model]
type = "wan"
ckpt_path = "ckpt"
cache_text_embeddings = true
train_text_encoder = false
freeze_transformer = true
[adapter]
rank = 8
include = ["cross_attn.k"]
train_blocks_range = [1, 2]
[optimizer]
lr = 2e-5
"""
DATASET = """\
frame_buckets = [1, 5]
size_buckets = [[64, 96, 5]]
[[directory]]
path = "media"
caption_prefix = "a \\"drawn\\" shape: "
[[directory]]
path = "more"
num_repeats = 0.5
"""


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A working directory with a complete, legal pair of documents and everything they name."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.toml").write_text(TRAINING)
    (tmp_path / "dataset.toml").write_text(DATASET)
    for name in ("media", "more", "ckpt"):
        (tmp_path / name).mkdir()
    return tmp_path


def problems_of(*args, **kwargs) -> tuple[Problem, ...]:
    with pytest.raises(ConfigError) as error:
        load_config(*args, **kwargs)
    lines = str(error.value).splitlines()
    count = len(error.value.problems)
    assert lines[0] == f"{args[0]}: {count} problem{'s' if count > 1 else ''}"
    assert lines[1:] == [f"  - {problem}" for problem in error.value.problems]
    return error.value.problems


def test_a_good_pair_loads_with_and_without_its_files(home) -> None:
    loaded = load_config("train.toml", check_files=True)
    assert loaded == load_config("train.toml")
    assert loaded.train.adapter.rank == 8 and loaded.train.optimizer.lr == 2e-5
    assert [directory.path for directory in loaded.dataset.directory] == ["media", "more"]
    assert (loaded.path, loaded.dataset_path, loaded.overrides) == ("train.toml", "dataset.toml", ())
    assert not (home / "output").exists()


def test_the_schema_check_needs_no_file_but_the_toml(home) -> None:
    (home / "dataset.toml").unlink()
    assert load_config("train.toml").dataset is None
    (problem,) = problems_of("train.toml", check_files=True)
    assert (problem.key, problem.file) == ("dataset", "train.toml") and "does not exist" in problem.reason


def test_overrides_are_applied_recorded_and_blamed(home) -> None:
    loaded = load_config("train.toml", ["adapter.rank=0x10", "model.llm_path=te.safetensors"])
    assert loaded.train.adapter.rank == 16 and loaded.train.model.llm_path == "te.safetensors"
    assert loaded.overrides == ("adapter.rank=0x10", "model.llm_path=te.safetensors")
    (problem,) = problems_of("train.toml", ["adapter.rank=eight"])
    assert str(problem) == '--set: adapter.rank: must be an integer, not "eight"'


def test_all_stages_report_together(home) -> None:
    (home / "train.toml").write_text(TRAINING.replace("rank = 8", "rnk = 8").replace('"ckpt"', '"nowhere"'))
    (home / "dataset.toml").write_text(DATASET.replace("[1, 5]", "[1, 6]").replace('"media"', "5"))
    found = problems_of("train.toml", ["nonsense", "warmup_steps=9", "max_steps=9"], check_files=True)
    assert {(problem.file, problem.key) for problem in found} == {
        ("--set", '"nonsense"'),
        ("--set", "warmup_steps"),
        ("train.toml", "adapter.rnk"),
        ("train.toml", "model.ckpt_path"),
        ("dataset.toml", "directory[0].path"),
        ("dataset.toml", "frame_buckets"),
    }


def test_a_key_of_the_other_document_is_recognised(home) -> None:
    (home / "dataset.toml").write_text("epochs = 3\n" + DATASET)
    (problem,) = problems_of("train.toml", ["frame_buckets=[1]"])[:1]
    assert "of the dataset TOML" in problem.fix
    assert "epochs belongs at the top level of the training TOML" in problems_of("train.toml")[0].fix


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"epochs = \n", "is not valid TOML: Invalid value (at line 1, column 10)"),
        (b"epochs = 1\nepochs = 2\n", "(at line 2, column 11)"),
        (b"a = " + b"[" * 5000, "is not valid TOML"),
        (b"epochs = " + b"9" * 5000, "is not valid TOML"),
        (b"# \xff\n", "is not UTF-8 text (byte 2)"),
        (None, "does not exist"),
    ],
)
@pytest.mark.parametrize("document", ["train.toml", "dataset.toml"])
def test_an_unreadable_document_is_named_with_the_place(home, document, content, words) -> None:
    if content is None:
        (home / document).unlink()
    else:
        (home / document).write_bytes(content)
    (problem,) = problems_of("train.toml", check_files=True)
    assert document in str(problem) and words in str(problem)


def test_a_directory_is_no_toml(home) -> None:
    (problem,) = problems_of("media")
    assert problem.key == "media" and "cannot be read" in problem.reason


def test_missing_files_are_reported_by_key(home) -> None:
    (home / "more").rmdir()
    (home / "file").write_text("")
    text = DATASET.replace('"media"', '"file"\nmask_path = "masks"')
    (home / "dataset.toml").write_text('cache_dir = "file/cache"\n' + text)
    overrides = [
        "output_dir=file/run",
        "model.llm_path=te.pth",
        "model.vae_path=" + "v" * 5000,
        "adapter.init_from_existing=adapter",
    ]
    found = {
        problem.key: problem.reason for problem in problems_of("train.toml", overrides, check_files=True)
    }
    assert set(found) == {
        "output_dir",
        "model.llm_path",
        "model.vae_path",
        "adapter.init_from_existing",
        "cache_dir",
        "directory[0].path",
        "directory[0].mask_path",
        "directory[1].path",
    }
    assert f"{home / 'file'} is not a directory" in found["output_dir"]
    assert found["directory[0].path"] == '"file" is not a directory'
    assert found["directory[0].mask_path"] == '"masks" does not exist'
    assert found["directory[1].path"] == '"more" does not exist'


def test_include_file_must_be_a_file(home) -> None:
    changes = TRAINING.replace(
        'include = ["cross_attn.k"]\ntrain_blocks_range = [1, 2]', 'include_file = "media"'
    )
    (home / "train.toml").write_text(changes)
    (problem,) = problems_of("train.toml", check_files=True)
    assert (problem.key, problem.reason) == ("adapter.include_file", '"media" is not a file')
    (home / "keys.txt").write_text("blocks.0.cross_attn.k\n")
    assert load_config(
        "train.toml", ["adapter.include_file=keys.txt"], check_files=True
    ).train.adapter.include_file


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may write anywhere")
def test_an_output_dir_without_the_right_to_write_is_reported(home) -> None:
    (home / "locked").mkdir(mode=0o500)
    (problem,) = problems_of("train.toml", ["output_dir=locked/run"], check_files=True)
    assert problem.key == "output_dir" and "not writable" in problem.reason


def test_the_preflight_gets_the_model_and_joins_the_report(home) -> None:
    seen: list[TrainConfig] = []

    def preflight(config: TrainConfig) -> list[Problem]:
        seen.append(config)
        return [
            Problem("model.ckpt_path", "holds no config.json"),
            Problem("model.llm_path", "does not exist"),
        ]

    found = problems_of("train.toml", ["model.llm_path=te.pth"], check_files=True, preflight=preflight)
    assert [(problem.file, problem.key) for problem in found] == [
        ("--set", "model.llm_path"),
        ("train.toml", "model.ckpt_path"),
    ]
    assert [config.model.llm_path for config in seen] == ["te.pth"]
    load_config("train.toml", preflight=preflight)
    problems_of("train.toml", ["model.dtype=int8"], check_files=True, preflight=preflight)
    assert len(seen) == 1, "the preflight needs a usable [model], and is part of checking files"


@pytest.mark.parametrize("broken", ["model", "output_dir", "adapter", "optimizer", "dataset"])
def test_files_are_checked_whatever_else_is_unusable(home, broken) -> None:
    (home / "more").rmdir()
    found = problems_of("train.toml", [f"{broken}=0"], check_files=True)
    keys = {problem.key for problem in found}
    assert broken in keys and ("directory[1].path" in keys) == (broken != "dataset")


def test_a_config_error_is_for_the_user_to_mend() -> None:
    assert issubclass(ConfigError, UserError)


def test_a_dataset_loads_alone(home) -> None:
    assert load_dataset("dataset.toml", check_files=True) == load_config("train.toml").dataset
    (home / "more").rmdir()
    assert load_dataset("dataset.toml").size_buckets == ((64, 96, 5),)
    with pytest.raises(ConfigError, match=r'directory\[1\]\.path: "more" does not exist'):
        load_dataset("dataset.toml", check_files=True)


def test_a_dump_reloads_equal_in_every_key(home) -> None:
    approval = 'self_attn_approval={reason="outlines \\"blur\\"\\n", blocks=[1]}'
    overrides = [
        f"adapter.{approval}",
        'adapter.include=["*"]',
        "adapter.rank=8",
        "adapter.alpha=4",
        "budget.action=stop",
        "save_every_n_epochs=0",
        "max_steps=7",
        "optimizer.lr=0",
        "optimizer.eps=1e-12",
        'model.llm_path="C:\\\\ünïcode"',
    ]
    for chosen in ([], overrides):
        loaded = load_config("train.toml", chosen)
        (home / "again.toml").write_text(dump_config(loaded.train), encoding="utf-8")
        (home / "dataset_again.toml").write_text(dump_dataset(loaded.dataset), encoding="utf-8")
        assert load_config("again.toml").train == loaded.train
        assert load_dataset("dataset_again.toml") == loaded.dataset
    written = tomllib.loads(dump_config(loaded.train))
    assert written["save_every_n_epochs"] == 0 and "vae_path" not in written["model"]


def test_every_key_that_may_be_none_has_none_as_its_default() -> None:
    """TOML has no null: another default would make None impossible to write and a dump not reload equal."""
    from utils.config.introspect import keys_of, sections_of
    from utils.config.schema import DatasetConfig

    for record in (TrainConfig, DatasetConfig):
        for section in sections_of(record):
            hints = {field.name: field.type for field in dataclasses.fields(section.record)}
            for key in keys_of(section.record).values():
                if "None" in str(hints[key.name]):
                    assert key.default is None, f"{section.path}.{key.name}"


def test_the_hash_follows_the_values_and_nothing_else(home) -> None:
    config = load_config("train.toml").train
    (home / "train.toml").write_text("# a comment\n" + TRAINING.replace("rank = 8", "dropout = 0\nrank = 8"))
    assert config_hash(load_config("train.toml").train) == config_hash(config)
    assert len(config_hash(config)) == 32
    assert config_hash(load_config("train.toml", ["seed=1"]).train) != config_hash(config)
    assert config_hash(load_config("train.toml").dataset) != config_hash(config)
