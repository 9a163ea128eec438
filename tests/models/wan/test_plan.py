"""`train.py --plan` on real headers without data, and on the tiny checkpoint with everything there."""

import json
import os
import resource
import subprocess
import sys

import pytest

from models.wan.layer_memory import Workload
from models.wan.layers import dit_layers, text_layers
from models.wan.plan import billions, make_plan_document
from models.wan.plan_data import plan_data
from models.wan.plan_model import plan_model
from models.wan.planner import Planner
from tests.helpers.real_headers import PARAMETERS, write_real_dit
from tests.helpers.workspace import CONFIGS, ROOT, make_workspace
from train import main
from utils.config.load import load_config
from utils.errors import UserError
from utils.stage_plan import make_plan

TRANSLATOR = str(ROOT / "configs" / "wan22_dit_lora_translator.toml")
ENCODER = str(ROOT / "configs" / "wan22_te_ft.toml")
LARGE = "size_buckets = [[832, 480, 81], [832, 480, 33], [832, 480, 1]]\n"


@pytest.fixture(scope="session")
def real(tmp_path_factory):
    roots = {}

    def get(variant):
        if variant not in roots:
            roots[variant] = write_real_dit(tmp_path_factory.mktemp(variant), variant)
        return roots[variant]

    return get


@pytest.fixture
def plan(real, tmp_path):
    """`plan(variant, *overrides, config=..., gpus=...)`: the document, for clips of 832x480 that are not there."""

    def make(variant, *overrides, config=TRANSLATOR, gpus=None, tflops=400.0):
        dataset = tmp_path / "dataset.toml"
        dataset.write_text(f'{LARGE}[[directory]]\npath = "{tmp_path}/clips"\n', encoding="utf-8")
        values = [f"model.ckpt_path={real(variant)}", f"model.variant={variant}", f"dataset={dataset}"]
        values += [f"output_dir={tmp_path}/out"]
        values += ["model.expert=high_noise"] if variant != "ti2v-5b" else []
        return make_plan_document(load_config(config, [*values, *overrides]), gpus, tflops)

    return make


@pytest.mark.parametrize("variant", PARAMETERS)
def test_a_published_dit_is_known_by_its_header_alone(variant, plan):
    document = plan(variant)
    model = document["model"]
    assert (model["variant"], model["parameters_text"]) == (variant, PARAMETERS[variant])
    assert model["num_blocks"] == (30 if variant == "ti2v-5b" else 40)
    keys = {problem["key"] for problem in document["missing"]}
    assert keys == {"model.ckpt_path", "directory[0].path"}
    reasons = " ".join(problem["reason"] for problem in document["missing"])
    assert all(part in reasons for part in ("umt5-xxl-enc-bf16.pth", "VAE.pth", "google/umt5-xxl"))


def test_a_pair_has_a_plan_for_each_expert_and_their_sums(real, tmp_path, capsys):
    flags = ["--plan", "--config", TRANSLATOR, "--gpus", "8", "--set", f"model.ckpt_path={real('t2v-a14b')}"]
    for value in (
        "model.expert=both",
        "model.variant=t2v-a14b",
        f"output_dir={tmp_path}/out",
        "max_steps=100",
        "adapter.low_noise.rank=32",
    ):
        flags += ["--set", value]
    assert main([*flags, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    high, low = document["experts"]["high_noise"], document["experts"]["low_noise"]
    assert [one["model"]["expert"] for one in (high, low)] == ["high_noise", "low_noise"]
    assert [one["model"]["noise_levels"] for one in (high, low)] == [[0.875, 1.0], [0.0, 0.875]]
    assert low["training"]["rank"] == 32
    together = document["together"]
    assert together["trainable_parameters"] == sum(
        one["training"]["trainable_parameters"] for one in (high, low)
    )
    assert together["checkpoints"] == sum(one["disk"]["checkpoints"] for one in (high, low))
    assert together["run_seconds"] is None, "without data the length of an epoch is not known"
    assert together["steps"] == 200
    for index, fit in enumerate(together["fit"]):
        assert fit["needs"] == max(one["fit"][index]["needs"] for one in (high, low))
    assert main(flags) == 0
    said = capsys.readouterr().out
    assert (
        said.index("expert 1 of 2: high_noise")
        < said.index("expert 2 of 2: low_noise")
        < said.index("both, one after")
    )
    assert "trained parameters in all, in two adapters" in said


def test_a_law_that_hardly_visits_the_experts_range_is_noted(plan):
    notes = plan("t2v-a14b", "model.shift=1.0")["notes"]
    assert any("only 2.58% of the chosen law" in note for note in notes)
    assert not any("of the chosen law" in note for note in plan("t2v-a14b", "model.shift=5.0")["notes"])


@pytest.mark.parametrize("expert", ["low_noise", "both"])
def test_the_command_needs_neither_torch_nor_deepspeed_nor_three_seconds(real, tmp_path, expert):
    code = (
        "import sys, train\n"
        "status = train.main(sys.argv[1:])\n"
        "heavy = {'torch', 'deepspeed', 'transformers', 'diffusers', 'peft'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "sys.exit(status)"
    )
    flags = ["--plan", "--config", TRANSLATOR, "--gpus", "8", "--set", f"model.ckpt_path={real('t2v-a14b')}"]
    for value in ("model.variant=t2v-a14b", f"model.expert={expert}", f"output_dir={tmp_path}/out"):
        flags += ["--set", value]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-c", code, *flags], capture_output=True, text=True, cwd=tmp_path, env=environment
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    # Of one processor, so that other work on the machine does not count.
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert done.returncode == 0, done.stderr
    assert "14.29 B parameters" in done.stdout and "missing, needed before training" in done.stdout
    assert len(done.stdout.splitlines()) < (55 if expert == "both" else 40)  # one screen each
    assert seconds < 3.0


def test_numbers_follow_from_shapes(plan):
    document = plan("t2v-a14b", "adapter.train_blocks_range=[30, 39]", "adapter.rank=16")
    training = document["training"]
    assert training["trainable_parameters"] == 20 * 16 * (5120 + 5120)
    assert training["targets_text"] == ["cross_attn.k in blocks 30-39", "cross_attn.v in blocks 30-39"]
    (stage,) = document["stages"]
    assert stage["bytes"]["trainables"] == stage["bytes"]["gradients"] == 4 * training["trainable_parameters"]
    assert stage["bytes"]["optimizer"] == 8 * training["trainable_parameters"]
    # bfloat16, and what is kept in float32: embeddings, head, norms, modulation.
    weights = stage["bytes"]["weights"]
    assert 2 * document["model"]["parameters"] < weights < 2.1 * document["model"]["parameters"]
    tokens = {use["bucket"]: use["tokens"] for use in document["dataset"]["buckets"]}
    assert tokens == {"832x480x81": 32760, "832x480x33": 14040, "832x480x1": 1560}
    activations = stage["activations"]
    assert activations["832x480x81"] > 2 * activations["832x480x33"] > 8 * activations["832x480x1"]
    assert stage["device"]["832x480x81"] == sum(stage["bytes"].values()) + activations["832x480x81"]
    assert document["disk"]["checkpoint"] == 12 * training["trainable_parameters"]
    assert document["disk"]["latent_bytes_per_clip"]["832x480x81"] == 16 * 21 * 60 * 104 * 4


def test_time_follows_from_flops(plan):
    document = plan("t2v-a14b", tflops=100.0)
    compute = document["compute"]
    assert compute["flops_per_step"] == 4 * compute["flops_per_sample"]
    assert compute["step_seconds"] == pytest.approx(compute["flops_per_step"] / 1e14)
    # Forward alone: 2 x parameters x tokens, and attention on top; backward less than two of it more.
    forward = document["stages"][0]["forward_flops"]
    assert 1.0 < forward / (2 * 14.29e9 * 32760) < 2.0
    doubled = plan("t2v-a14b", tflops=200.0)["compute"]
    assert doubled["step_seconds"] == pytest.approx(compute["step_seconds"] / 2)
    split = plan("t2v-a14b", "pipeline_stages=2", tflops=100.0)["compute"]
    assert split["flops_per_step"] == compute["flops_per_step"] and split["waiting_share"] > 0.1
    assert compute["step_seconds"] / 2 < split["step_seconds"] < compute["step_seconds"]


def test_a_timestep_per_frame_is_planned_where_first_frames_may_be_clean(plan):
    """The largest bucket has 21 latent frames: 20 further rows of what is told of time, in the wire and in the work."""
    settings = ("pipeline_stages=2", "activation_checkpointing=false")
    without, some = plan("ti2v-5b", *settings), plan("ti2v-5b", *settings, "model.first_frame_prob=0.1")
    largest = without["dataset"]["buckets"][0]["bucket"]
    row = 3072 * 4

    def at(document, stage, key):
        return document["stages"][stage][key][largest]

    # Time embedding and six rows of modulation; what a block keeps of the latter, where it has a backward pass.
    assert at(some, 1, "transfers") - at(without, 1, "transfers") == 20 * 7 * row
    lowest = min(int(target.split(".")[1]) for target in without["training"]["targets"])
    blocks = without["model"]["num_blocks"] - lowest
    more = sum(
        (at(some, n, "activations") - at(without, n, "activations"))
        / without["stages"][n]["micro_batches_in_flight"]
        for n in range(2)
    )
    # Eight rows of each, but for the factor of the lowest one's first norm, through which no gradient goes.
    assert more == pytest.approx(20 * (8 * blocks - 1) * row)
    flops = some["stages"][0]["forward_flops"] - without["stages"][0]["forward_flops"]
    assert flops == pytest.approx(20 * 2 * (256 * 3072 + 7 * 3072 * 3072))
    small = str(without["dataset"]["buckets"][-1]["bucket"])  # of one frame
    assert all(
        some["stages"][n][key][small] == without["stages"][n][key][small]
        for n in range(2)
        for key in ("activations", "transfers", "device")
    )


def test_what_would_make_it_fit_really_does(plan):
    document = plan("t2v-a14b", "adapter.train_blocks_range=[30, 39]")
    small = document["fit"][0]
    assert small["gpu_gb"] == 24 and small["verdict"] == "too large"
    (remedy,) = small["would_fit_with"]
    assert set(remedy["settings"]) == {"blocks_to_swap"}
    number = remedy["settings"]["blocks_to_swap"]
    applied = plan("t2v-a14b", "adapter.train_blocks_range=[30, 39]", f"blocks_to_swap={number}")
    assert applied["fit"][0]["verdict"] == "fits" and applied["fit"][0]["needs"] == remedy["needs"]
    one_less = plan("t2v-a14b", "adapter.train_blocks_range=[30, 39]", f"blocks_to_swap={number - 1}")
    assert one_less["fit"][0]["verdict"] == "tight"
    assert applied["split_for_gpu_gb"] == 24 and applied["stages"][0]["bytes"]["host"] > 20e9


def test_two_stages_on_24_gb_and_eight_gpus(plan):
    wanted = ("adapter.train_blocks_range=[30, 39]", "pipeline_stages=2")
    (remedy,) = plan("t2v-a14b", *wanted)["fit"][0]["would_fit_with"]
    two = plan("t2v-a14b", *wanted, f"blocks_to_swap={remedy['settings']['blocks_to_swap']}")
    assert [stage["stage"] for stage in two["stages"]] == [0, 1]
    assert two["stages"][0]["last_layer"] + 1 == two["stages"][1]["first_layer"]
    assert all(stage["transfers"]["832x480x81"] > 0 for stage in two["stages"])
    assert two["fit"][0]["verdict"] == "fits"
    eight = plan("t2v-a14b", config=ENCODER, gpus=8)
    assert (eight["parallel"]["copies"], eight["parallel"]["samples_per_step"]) == (4, 16)
    whole = plan("t2v-a14b", "model.text_train_blocks=0", config=ENCODER, gpus=8)
    settings = [one["settings"] for one in whole["fit"][1]["would_fit_with"]]
    assert settings and settings[0]["zero_stage"] == 1  # four copies have it to share


def test_a_missing_encoder_is_planned_at_its_published_size(plan):
    document = plan("ti2v-5b", config=ENCODER)
    assert document["mode"] == "encoder_ft"
    assert document["model"]["text_encoder_parameters"] == 5_680_910_336
    assert document["training"]["text_blocks"] == [16, 23]
    assert any("UMT5-XXL" in note for note in document["notes"])
    with pytest.raises(UserError, match="text_train_blocks"):
        plan("ti2v-5b", "model.text_train_blocks=30", config=ENCODER)


def test_a_missing_dataset_is_listed(real, tmp_path):
    overrides = [
        f"model.ckpt_path={real('ti2v-5b')}",
        f"dataset={tmp_path}/none.toml",
        f"output_dir={tmp_path}/out",
    ]
    document = make_plan_document(load_config(TRANSLATOR, overrides), None, 400.0)
    assert document["dataset"]["source"] == "published"
    assert document["dataset"]["buckets"][0]["bucket"] == "1280x704x121"
    assert "dataset" in {problem["key"] for problem in document["missing"]}


def test_the_schema_is_stable(plan):
    document = json.loads(json.dumps(plan("i2v-a14b", "adapter.rank=8")))
    assert document["format"] == 1
    shape = {key: sorted(value) if isinstance(value, dict) else None for key, value in document.items()}
    documented = (ROOT / "docs" / "plan.md").read_text(encoding="utf-8")
    for key, inner in shape.items():
        assert f"`{key}`" in documented, key
        for name in inner or ():
            assert f"`{name}`" in documented, f"{key}.{name}"
    for key in ("stages", "fit", "missing"):
        for name in document[key][0]:
            assert f"`{name}`" in documented, f"{key}[].{name}"
    keys = "format config overrides mode model training parallel dataset split_for_gpu_gb stages fit compute disk"
    assert set(document) == {*keys.split(), "missing", "notes"}


@pytest.mark.parametrize("mode", CONFIGS)
def test_a_whole_checkpoint_lacks_nothing_and_the_stages_are_those_of_the_run(
    mode, tmp_path, tiny_ti2v, tiny_dataset
):
    workspace = make_workspace(tmp_path, tiny_ti2v, tiny_dataset)
    arguments = workspace.arguments(mode, "pipeline_stages=2", "gradient_accumulation_steps=4")
    overrides = [arguments[index + 1] for index, word in enumerate(arguments) if word == "--set"]
    loaded = load_config(str(ROOT / CONFIGS[mode]), overrides)
    document = make_plan_document(loaded, None, 400.0)
    assert document["missing"] == []
    data = document["dataset"]
    assert (data["source"], data["samples"], data["files_not_examined"]) == ("dataset", 6, 0)
    assert sum(use["samples"] for use in data["buckets"]) == 6
    # The same layers as a run builds.
    model = plan_model(loaded)
    workload = Workload(data["mean_video_tokens"], data["mean_text_tokens"])
    specs = dit_layers(loaded.train, model.source, model.arch, model.targets, {}, workload)
    if mode == "encoder_ft":
        from models.wan.checkpoint import locate, open_text_encoder

        text = open_text_encoder(locate(loaded.train.model)[0].text_encoder)
        specs = text_layers(loaded.train, text, workload) + specs
    run = make_plan(specs, loaded.train, 24e9)
    assert [stage["last_layer"] for stage in document["stages"]] == [stage.last for stage in run.stages]
    assert [stage["forward_flops"] for stage in document["stages"]] == [stage.forward for stage in run.stages]
    resident = [
        sum(stage["bytes"][key] for key in ("weights", "trainables", "gradients", "optimizer"))
        for stage in document["stages"]
    ]
    assert resident == pytest.approx([stage.memory.resident for stage in run.stages])
    assert not workspace.out.exists() and not workspace.cache.exists()


def test_files_that_there_was_no_time_for_are_counted(tmp_path, tiny_ti2v, tiny_dataset):
    workspace = make_workspace(tmp_path, tiny_ti2v, tiny_dataset)
    arguments = workspace.arguments("dit_lora")
    overrides = [arguments[index + 1] for index, word in enumerate(arguments) if word == "--set"]
    loaded = load_config(str(ROOT / CONFIGS["dit_lora"]), overrides)
    model = plan_model(loaded)
    variant = model.arch.variant
    nothing = plan_data(loaded.dataset, loaded.train, variant, 1, -1.0)
    assert nothing.source == "buckets" and nothing.samples == 0
    everything = plan_data(loaded.dataset, loaded.train, variant, 1, 60.0)
    assert everything.samples == 6 and everything.unseen_factor == 1.0
    assert everything.steps == loaded.train.max_steps or everything.steps is not None
    assert Planner(model, everything, None).copies(loaded.train) == 1


@pytest.mark.parametrize(
    ("overrides", "flags", "words"),
    [
        (["model.ckpt_path=/nowhere"], [], "not a directory"),
        (["model.expert=high_noise"], [], "has no experts"),
        (["model.variant=t2v-a14b"], [], "is that of 'ti2v-5b'"),
        (['adapter.include=["nothing.*"]'], [], "matches no module"),
        (["blocks_to_swap=30"], [], "at most 29"),
        (["pipeline_stages=2"], ["--gpus", "3"], "does not divide"),
        (["adapter.ranks=3"], [], "adapter.ranks"),
    ],
)
def test_what_is_wrong_is_one_message_and_status_2(overrides, flags, words, real, capsys):
    arguments = ["--config", TRANSLATOR, "--plan", *flags, "--set", f"model.ckpt_path={real('ti2v-5b')}"]
    for override in overrides:
        arguments += ["--set", override]
    assert main(arguments) == 2
    said = capsys.readouterr()
    assert said.out == "" and words in said.err and "Traceback" not in said.err


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--json"], "it belongs to --plan"),
        (["--gpus", "2"], "it belongs to --plan"),
        (["--tflops", "9"], "it belongs to --plan"),
        (["--plan", "--dry_run"], "--dry_run would be ignored"),
        (["--plan", "--resume_from_checkpoint"], "--resume_from_checkpoint would be ignored"),
        (["--plan", "--gpus", "0"], "is not a whole number above 0"),
        (["--plan", "--tflops", "inf"], "is not a number above 0"),
    ],
)
def test_flags_that_would_do_nothing_are_refused(flags, words, capsys):
    with pytest.raises(SystemExit) as end:
        main(["--config", TRANSLATOR, *flags])
    assert end.value.code == 2 and words in capsys.readouterr().err


def test_json_and_text_say_the_same(real, tmp_path, capsys):
    arguments = ["--config", TRANSLATOR, "--plan", "--set", f"model.ckpt_path={real('ti2v-5b')}"]
    assert main([*arguments, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert main(arguments) == 0
    text = capsys.readouterr().out
    assert f"{document['training']['trainable_parameters_text']} trained parameters" in text
    assert f"needs {document['fit'][0]['needs'] / 1e9:.1f} GB" in text
    for problem in document["missing"]:
        assert problem["reason"] in text


@pytest.mark.parametrize(
    ("number", "text"), [(14_288_901_184, "14.29 B"), (26_200_000, "26.2 M"), (8192, "8.2 k"), (12, "12")]
)
def test_numbers_of_parameters_are_readable(number, text):
    assert billions(number) == text
