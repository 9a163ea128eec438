"""Training that solves for the adapter it starts from, as a person runs it: the same start as the command's, once, and refusals."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from models.wan.checkpoint import TEXT_ENCODER_FILE
from models.wan.closed_form import fit_job, fit_start
from models.wan.closed_form.fit_start import START
from scripts import solve_translator
from tests.helpers.closed_form import write_prompts, write_tuned
from tests.helpers.workspace import Workspace, check_refused, make_workspace
from utils.metrics import read_metrics
from utils.report import read_summary

TWO = ("torchrun", "--standalone", "--nproc_per_node", "2")
WEIGHTS = "adapter_model.safetensors"


def make_place(root: Path, checkpoint: Path, dataset: Path) -> Workspace:
    workspace = make_workspace(root, checkpoint, dataset)
    write_prompts(root)
    write_tuned(root / "tuned.safetensors", checkpoint)
    return workspace


def settings(place: Workspace, **changed: object) -> list[str]:
    """Overrides of a run that solves; None takes one out."""
    root = place.root
    values: dict[str, object] = {
        "model.llm_path": root / "tuned.safetensors",
        "adapter.init": "closed_form",
        "adapter.closed_form.prompts": root / "neutral.txt",
        "adapter.closed_form.domain_prompts": root / "domain.txt",
        "adapter.closed_form.reports_dir": root / "reports",
        "budget.max_delta_ratio": 0.9,
        "max_steps": 2,
        "checkpoint_every_n_steps": 1,
    }
    values |= {name.replace("__", "."): value for name, value in changed.items()}
    return [f"{key}={value}" for key, value in values.items() if value is not None]


def by_command(place: Workspace, *overrides: str, out: str = "solved") -> Path:
    """The adapter, or those of two experts, that the command writes for the same configuration."""
    words = place.arguments("dit_lora", *(overrides or settings(place)))
    words += ["--out", str(place.root / out), "--reports_dir", str(place.root / "reports"), "--run_tag", out]
    assert solve_translator.main(words) == 0
    return place.root / out


def assert_same_bits(one: Path, other: Path) -> None:
    first, second = load_file(one), load_file(other)
    assert first.keys() == second.keys() and first
    assert all(torch.equal(first[name], second[name]) for name in first)


def only_save(run: Path) -> Path:
    (saved,) = run.glob(f"epoch*/{WEIGHTS}")
    return saved


def losses(run: Path) -> list[float]:
    return [row["loss"] for row in read_metrics(run)]


@pytest.fixture
def place(tmp_path, tiny_ti2v, tiny_dataset) -> Workspace:
    return make_place(tmp_path, tiny_ti2v, tiny_dataset)


def never(*_: object) -> None:
    raise AssertionError("solved")


@pytest.fixture
def never_solves(monkeypatch) -> None:
    monkeypatch.setattr(fit_start, "solve_adapters", never)


def test_a_run_starts_from_the_adapter_that_the_command_writes(place, capsys) -> None:
    solved = by_command(place)
    capsys.readouterr()
    assert place.train("dit_lora", *settings(place, max_steps=1, optimizer__lr=0.0)) == 0
    run, said = place.run(), capsys.readouterr().err
    assert_same_bits(run / START / WEIGHTS, solved / WEIGHTS)
    # Nothing was learned at a rate of 0, so what is saved is the start.
    assert_same_bits(only_save(run), solved / WEIGHTS)
    report = place.root / "reports" / "closed_form_translator" / run.name
    assert f"report of the closed form: {report}" in said and "closed form: pass: " in said
    assert "encoders " in said and "targets 8/8" in said
    summary, own = read_summary(report), read_summary(report.parent / "solved")
    assert summary.metrics == own.metrics and summary.verdict == "pass"
    assert "--" not in " ".join(summary.notes) and "adapter.closed_form" in (report / "report.md").read_text()
    with safe_open(run / START / WEIGHTS, "pt") as mine, safe_open(only_save(run), "pt") as saved:
        facts, others = mine.metadata(), saved.metadata()
    assert facts["made_by"].startswith("closed form")
    for name in ("encoder_hash", "base_hash", "config_hash", "targets"):
        assert facts[name] == others[name]
    texts = [path.read_bytes() for path in (*run.rglob("*"), *report.iterdir()) if path.is_file()]
    assert len(texts) > 20 and not any(b"zorp" in text for text in (*texts, said.encode()))
    assert not place.leftovers()


@pytest.mark.long
def test_two_stages_start_and_train_as_one_process_and_as_from_the_commands_file(place) -> None:
    evaluated = settings(place, eval_datasets=f'["{place.root / "dataset.toml"}"]')
    ended = place.launch(TWO, "dit_lora", *evaluated, "pipeline_stages=2")
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr.count("solving for the adapter") == 1
    (staged,) = place.runs()
    assert place.train("dit_lora", *evaluated) == 0
    _, single = place.runs()
    solved = by_command(place)
    plain = [value for value in evaluated if not value.startswith(("adapter.init", "adapter.closed_form"))]
    assert place.train("dit_lora", *plain, f"adapter.init_from_existing={solved}") == 0
    *_, existing = place.runs()
    for run in (staged, single):
        assert_same_bits(run / START / WEIGHTS, solved / WEIGHTS)
    for run in (staged, single):
        assert losses(run) == losses(existing) and len(losses(run)) == 2
        assert_same_bits(only_save(run), only_save(existing))
        first, *_ = (run / "eval.jsonl").read_text().splitlines()
        assert '"step": 0' in first
    assert len({(run / "eval.jsonl").read_text().count("\n") for run in (staged, single, existing)}) == 1


@pytest.mark.long
def test_a_resume_solves_nothing_and_ends_with_the_same_bits(place, monkeypatch, capsys) -> None:
    assert place.train("dit_lora", *settings(place)) == 0
    whole = place.run()
    assert place.train("dit_lora", *settings(place, max_steps=1)) == 0
    _, cut = place.runs()
    monkeypatch.setattr(fit_start, "solve_adapters", never)
    free = {"adapter__closed_form__device": "cpu", "adapter__closed_form__reports_dir": place.root / "other"}
    resume = ["--resume_from_checkpoint", str(cut)]
    # With a checkpoint the start is not read either.
    (cut / START / WEIGHTS).rename(place.root / "kept")
    assert place.train("dit_lora", *settings(place, **free), flags=resume) == 0
    newest = max(cut.glob(f"epoch*/{WEIGHTS}"), key=lambda path: path.stat().st_mtime_ns)
    assert_same_bits(newest, only_save(whole))
    assert losses(cut) == losses(whole)
    code = place.train("dit_lora", *settings(place, adapter__closed_form__ridge=0.5), flags=resume)
    check_refused(code, capsys.readouterr().err, "adapter.closed_form.ridge: 'auto' -> 0.5")


@pytest.mark.long
def test_a_run_that_was_cut_before_its_first_checkpoint_goes_on_from_its_start(
    place, monkeypatch, capsys
) -> None:
    with monkeypatch.context() as patch:

        def fail(*_: object, **__: object) -> None:
            raise RuntimeError("the machine went down")

        patch.setattr("utils.run.build_pipeline", fail)
        assert place.train("dit_lora", *settings(place)) == 1
    run = place.run()
    start = (run / START / WEIGHTS).read_bytes()
    monkeypatch.setattr(fit_start, "solve_adapters", never)
    resume = ["--resume_from_checkpoint"]
    (run / START / WEIGHTS).rename(place.root / "kept")
    capsys.readouterr()
    code = place.train("dit_lora", *settings(place), flags=resume)
    check_refused(code, capsys.readouterr().err, "is not there, and the run has no checkpoint either")
    (run / START / WEIGHTS).write_bytes(start[:-100])
    code = place.train("dit_lora", *settings(place), flags=resume)
    check_refused(code, capsys.readouterr().err, WEIGHTS)
    (place.root / "kept").rename(run / START / WEIGHTS)
    assert place.train("dit_lora", *settings(place), flags=resume) == 0
    monkeypatch.undo()
    assert place.train("dit_lora", *settings(place)) == 0
    _, whole = place.runs()
    assert_same_bits(only_save(run), only_save(whole))


@pytest.mark.long
def test_both_experts_of_a_pair_start_from_one_pass(tmp_path, tiny_t2v, tiny_dataset, capsys) -> None:
    place = make_place(tmp_path, tiny_t2v, tiny_dataset)
    both = settings(place, model__expert="both", adapter__low_noise__rank=2, max_steps=1, optimizer__lr=0.0)
    solved = by_command(place, *both)
    capsys.readouterr()
    assert place.train("dit_lora", *both) == 0
    pair, said = place.run(), capsys.readouterr().err
    assert said.count("solving for the adapter") == said.count("report of the closed form") == 1
    for expert in ("high_noise", "low_noise"):
        assert_same_bits(pair / expert / START / WEIGHTS, solved / expert / WEIGHTS)
        assert_same_bits(pair / f"adapter_{expert}.safetensors", solved / expert / WEIGHTS)
    adapters = [
        entry.path
        for entry in read_summary(tmp_path / "reports" / "closed_form_translator" / pair.name).inputs
        if entry.role == "adapter"
    ]
    assert len(adapters) == 2
    # One expert alone gets what it gets in a pair.
    high = settings(place, model__expert="high_noise", max_steps=1)
    assert place.train("dit_lora", *high) == 0
    assert_same_bits(place.runs()[1] / START / WEIGHTS, solved / "high_noise" / WEIGHTS)


def test_nothing_is_solved_by_a_dry_run_a_plan_or_for_the_cache(place, never_solves, capsys) -> None:
    assert place.train("dit_lora", *settings(place), flags=["--dry_run"]) == 0
    assert "the adapter is solved for when training begins" in capsys.readouterr().err
    assert place.train("dit_lora", *settings(place), flags=["--cache_only"]) == 0
    assert place.train("dit_lora", *settings(place), flags=["--plan"]) == 0
    assert not place.runs() and not (place.root / "reports").exists()


@pytest.mark.long
def test_what_cannot_be_solved_ends_every_process_with_one_message_and_leaves_no_run(place) -> None:
    overrides = settings(place, adapter__closed_form__ridge=1e-3, budget__max_delta_ratio=0.02)
    ended = place.launch(TWO, "dit_lora", *overrides, "pipeline_stages=2")
    # Behind it torchrun has a trace of its own.
    (line,) = [line for line in ended.stderr.splitlines() if "error: " in line]
    assert ended.returncode and line.startswith("error: ")
    assert "smoke_dit_lora.toml: adapter.init" in line
    assert "adapter.closed_form.ridge 0.001 reaches a largest delta ratio of" in line
    assert not place.runs() and not place.leftovers()


@pytest.mark.long
def test_a_budget_holds_for_the_start(place, capsys) -> None:
    above = {"adapter__closed_form__max_delta_ratio": 0.9, "budget__max_delta_ratio": 0.01}
    assert place.train("dit_lora", *settings(place, max_steps=1, **above)) == 0
    assert "warning: what is solved for is above the budget: " in capsys.readouterr().err
    code = place.train("dit_lora", *settings(place, **above), "budget.action=stop")
    check_refused(code, capsys.readouterr().err, "above the budget", "budget.action = 'stop'")
    # Without a cap of its own the budget's is met.
    assert place.train("dit_lora", *settings(place, budget__max_delta_ratio=0.01, max_steps=1)) == 0
    assert "above the budget" not in capsys.readouterr().err
    assert len(place.runs()) == 2


@pytest.mark.long
def test_a_start_that_makes_things_worse_is_refused_and_reported(place, monkeypatch, capsys) -> None:
    monkeypatch.setattr(fit_job, "judge", lambda fitted: ("fail", "Nothing is restored."))
    code = place.train("dit_lora", *settings(place))
    check_refused(
        code, capsys.readouterr().err, "Nothing is restored. Report: ", "adapter.closed_form.prompts"
    )
    (report,) = (place.root / "reports" / "closed_form_translator").iterdir()
    assert read_summary(report).verdict == "fail" and not place.runs()


# Bad input: one clear line, status 2, before anything is cached.

CASES = {
    "an adapter to start from": ({"adapter__init_from_existing": "."}, "adapter.init_from_existing: is given together"),
    "other targets": ({"adapter__include": '["cross_attn.{k,v,o}"]'}, "cross_attn.o is not solved for"),
    "no tuned encoder": ({"model__llm_path": None}, "model.llm_path: is not set"),
    "a section without init": ({"adapter__init": None}, 'adapter.closed_form: would be ignored: adapter.init is "zero"'),
    "an unknown init": ({"adapter__init": "closed-form"}, 'did you mean "closed_form"?'),
    "two ways to say what stays": ({"adapter__closed_form__keywords_file": "{root}/keywords.txt"}, "is given together"),
    "no such file": ({"adapter__closed_form__prompts": "absent.txt"}, "adapter.closed_form.prompts: "),
    "no device": ({"adapter__closed_form__device": "gpu"}, "which is no device"),
    "no ridge": ({"adapter__closed_form__ridge": "much"}, 'must be a number, or "auto"'),
    "reports among runs": ({"adapter__closed_form__reports_dir": "{root}/out/reports"}, "never mix"),
    "a rank wider than the DiT": ({"adapter__rank": 500}, "adapter.rank: is 500, and the DiT is 128 wide"),
    "prompts that are both": (
        {"adapter__closed_form__domain_prompts": "{root}/neutral.txt"},
        "are among the neutral ones too",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("changed", "expected"), CASES.values(), ids=CASES)
def test_what_does_not_fit_together_is_refused(place, never_solves, capsys, changed, expected) -> None:
    given = {
        name: value.replace("{root}", str(place.root)) if isinstance(value, str) else value
        for name, value in changed.items()
    }
    code = place.train("dit_lora", *settings(place, **given))
    check_refused(code, capsys.readouterr().err, expected)
    assert not place.runs() and not place.cache.exists()


def test_a_tuned_encoder_that_is_the_base_is_refused(place, never_solves, capsys) -> None:
    base = place.checkpoint / TEXT_ENCODER_FILE
    code = place.train("dit_lora", *settings(place, model__llm_path=base))
    check_refused(code, capsys.readouterr().err, "names the base encoder itself")


def test_the_mode_that_trains_the_encoder_has_no_adapter(place, capsys) -> None:
    code = place.train("encoder_ft", "adapter.init=closed_form", "budget.max_neutral_drift=0.5")
    check_refused(code, capsys.readouterr().err, "adapter: is not for encoder_ft")
