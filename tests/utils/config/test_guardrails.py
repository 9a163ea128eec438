"""Every guardrail once refusing and once permitting, through the same tables that the loader checks."""

import copy
import re

import pytest

from utils.config.dataset_rules import DATASET_RULES
from utils.config.guardrails import RULES, check_targets, mode_of
from utils.config.introspect import sections_of
from utils.config.parse import parse_table
from utils.config.rules import Rule, run_rules
from utils.config.schema import (
    AdapterConfig,
    BudgetConfig,
    DatasetConfig,
    Problem,
    SelfAttnApproval,
    TrainConfig,
)

SWITCHES = ("cache_text_embeddings", "train_text_encoder", "freeze_transformer")
ENCODER_FT = dict(zip(SWITCHES, (False, True, True), strict=True))
DIT_LORA = dict(zip(SWITCHES, (True, False, True), strict=True))
APPROVAL = {"reason": "the shapes lose their outline", "blocks": [3, 4]}
BUDGET = {"max_delta_ratio": 0.05}
AUG = {"enable": True, "keywords": ["circle"], "single_token": 0.2, "trim_prob": 0.5}
BY_MIX = {
    "enable": True,
    "keywords_file": "words.txt",
    "mix": {"single": 0.2, "short": 0.3, "verbose": 0.5},
}


def dit_lora(adapter=None, model=None, **top):
    table = {
        "output_dir": "output/x",
        "dataset": "configs/dataset.toml",
        "model": {"type": "wan", "ckpt_path": "ckpt"} | DIT_LORA | (model or {}),
        "adapter": adapter or {},
        "optimizer": {"lr": 1e-4},
    }
    return table | top


def encoder_ft(model=None, **top):
    table = dit_lora(model=ENCODER_FT | (model or {}), **top)
    if "adapter" not in top:
        del table["adapter"]
    return table


def found_in(table) -> list[Problem]:
    parsed = parse_table(TrainConfig, table)
    return [*parsed.problems, *run_rules(RULES, parsed.draft, parsed.invalid)]


def dataset(**changes):
    return {"directory": [{"path": "a"}]} | changes


def found_in_dataset(table) -> list[Problem]:
    parsed = parse_table(DatasetConfig, table)
    return [*parsed.problems, *run_rules(DATASET_RULES, parsed.draft, parsed.invalid)]


@pytest.mark.parametrize(
    ("table", "key", "words"),
    [
        (
            dit_lora(model={"train_text_encoder": True}),
            "model.cache_text_embeddings",
            "contradicts train_text_encoder = true",
        ),
        (
            dit_lora(model={"train_text_encoder": True}),
            "model.cache_text_embeddings",
            "behind a cache trains nothing",
        ),
        (
            dit_lora(model={"cache_text_embeddings": False}),
            "model.cache_text_embeddings",
            "contradicts train_text_encoder = false",
        ),
        (
            dit_lora(model={"freeze_transformer": False}),
            "model.freeze_transformer",
            "own weights are never trained",
        ),
        (
            encoder_ft(model={"freeze_transformer": False}),
            "model.freeze_transformer",
            "contradicts both modes",
        ),
        ({k: v for k, v in dit_lora().items() if k != "adapter"}, "adapter", "nothing to train"),
        (encoder_ft(adapter={}), "adapter", "not for encoder_ft"),
        (dit_lora(model={"text_train_blocks": 2}), "model.text_train_blocks", "would be ignored"),
        (dit_lora(model={"train_token_embedding": True}), "model.train_token_embedding", "would be ignored"),
        (dit_lora(model={"text_encoder_dropout": 0.1}), "model.text_encoder_dropout", "would be ignored"),
        (
            dit_lora(model={"save_text_encoder_full": False}),
            "model.save_text_encoder_full",
            "would be ignored",
        ),
        (dit_lora({"include": []}), "adapter.include", "is empty"),
        (dit_lora({"include": ["cross_attn.{k"]}), "adapter.include", "{ without }"),
        (dit_lora({"exclude": ["ffn}"]}), "adapter.exclude", "} without {"),
        (dit_lora({"include": ["self_attn.q"]}, budget=BUDGET), "adapter.include", "artifacts and collapse"),
        (
            dit_lora({"include": ["self_attn.{q,k}"]}, budget=BUDGET),
            "adapter.include",
            "artifacts and collapse",
        ),
        (dit_lora({"include": ["*"]}, budget=BUDGET), "adapter.include", "artifacts and collapse"),
        (dit_lora({"include": ["*.q"]}, budget=BUDGET), "adapter.include", "artifacts and collapse"),
        (
            dit_lora({"include": ["*"], "exclude": ["*.{q,o}"]}, budget=BUDGET),
            "adapter.include",
            "artifacts and collapse",
        ),
        (
            dit_lora({"include": ["self_attn.norm_q"]}, budget=BUDGET),
            "adapter.include",
            "artifacts and collapse",
        ),
        (
            dit_lora({"include": ["self_attn.*_proj"]}, budget=BUDGET),
            "adapter.include",
            "artifacts and collapse",
        ),
        (
            dit_lora({"include": ["blocks.3.self_attn.q"]}, budget=BUDGET),
            "adapter.include",
            "artifacts and collapse",
        ),
        (
            dit_lora({"rank": 8, "self_attn_approval": APPROVAL}),
            "adapter.self_attn_approval",
            "no include pattern reaches any",
        ),
        (
            dit_lora(
                {"include": ["self_attn.q"], "rank": 8, "self_attn_approval": APPROVAL | {"reason": " "}},
                budget=BUDGET,
            ),
            "adapter.self_attn_approval.reason",
            "must not be blank",
        ),
        (
            dit_lora(
                {"include": ["self_attn.q"], "rank": 8, "self_attn_approval": APPROVAL | {"blocks": []}},
                budget=BUDGET,
            ),
            "adapter.self_attn_approval.blocks",
            "names 0 blocks",
        ),
        (
            dit_lora(
                {
                    "include": ["self_attn.q"],
                    "rank": 8,
                    "self_attn_approval": APPROVAL | {"blocks": [1, 2, 3, 4, 5]},
                },
                budget=BUDGET,
            ),
            "adapter.self_attn_approval.blocks",
            "names 5 blocks",
        ),
        (
            dit_lora(
                {"include": ["self_attn.q"], "rank": 8, "self_attn_approval": APPROVAL | {"blocks": [3, 3]}},
                budget=BUDGET,
            ),
            "adapter.self_attn_approval.blocks",
            "names a block twice",
        ),
        (
            dit_lora({"include": ["self_attn.q"], "rank": 9, "self_attn_approval": APPROVAL}, budget=BUDGET),
            "adapter.rank",
            "at most 8",
        ),
        (
            dit_lora(
                {
                    "include": ["self_attn.q"],
                    "rank": 8,
                    "self_attn_approval": APPROVAL,
                    "train_blocks_range": [4, 9],
                },
                budget=BUDGET,
            ),
            "adapter.self_attn_approval.blocks",
            "names block 3, which train_blocks_range = [4, 9] leaves out",
        ),
        (
            dit_lora({"include": ["self_attn.q"], "rank": 8, "self_attn_approval": APPROVAL}),
            "adapter.include",
            "under a delta budget",
        ),
        (dit_lora({"include": ["cross_attn.q"]}), "adapter.include", "under a delta budget"),
        (dit_lora({"include": ["cross_attn.*"]}), "adapter.include", "under a delta budget"),
        (dit_lora({"include": ["ffn.*"]}), "adapter.include", "under a delta budget"),
        (dit_lora({"include": ["*.norm_k"]}), "adapter.include", "under a delta budget"),
        (
            dit_lora({"include": ["*"], "exclude": ["self_attn.*", "cross_attn.{q,o}"]}),
            "adapter.include",
            "under a delta budget",
        ),
        (
            dit_lora({"include_file": "keys.txt", "include": ["cross_attn.k"]}),
            "adapter.include",
            "include_file lists the exact",
        ),
        (
            dit_lora({"include_file": "keys.txt", "exclude": ["cross_attn.k"]}),
            "adapter.exclude",
            "include_file lists the exact",
        ),
        (
            dit_lora({"include_file": "keys.txt", "train_blocks_range": [0, 1]}),
            "adapter.train_blocks_range",
            "include_file lists",
        ),
        (dit_lora({"train_blocks_range": [5, 4]}), "adapter.train_blocks_range", "not [5, 4]"),
        (dit_lora({"train_blocks_range": [5]}), "adapter.train_blocks_range", "not [5]"),
        (dit_lora({"train_blocks_range": [1, 2, 3]}), "adapter.train_blocks_range", "not [1, 2, 3]"),
        (dit_lora({"train_blocks_range": [-1, 2]}), "adapter.train_blocks_range", "must be at least 0"),
        (dit_lora(model={"min_t": 0.5, "max_t": 0.5}), "model.min_t", "not below max_t = 0.5"),
        (
            dit_lora(model={"timestep_sample_method": "uniform", "sigmoid_scale": 2.0}),
            "model.sigmoid_scale",
            "would be ignored",
        ),
        (dit_lora(partition_split=[3]), "partition_split", 'partition_method is "cost"'),
        (
            dit_lora(partition_method="manual", pipeline_stages=3, partition_split=[4]),
            "partition_split",
            "needs 2",
        ),
        (dit_lora(partition_method="manual", pipeline_stages=2), "partition_split", "has 0 entries"),
        (
            dit_lora(partition_method="manual", pipeline_stages=3, partition_split=[4, 4]),
            "partition_split",
            "must rise",
        ),
        (
            dit_lora(partition_method="manual", pipeline_stages=2, partition_split=[0]),
            "partition_split",
            "at least 1",
        ),
        (dit_lora(activation_checkpointing="all"), "activation_checkpointing", "one of true, false"),
        (dit_lora(activation_checkpointing="True"), "activation_checkpointing", "one of true, false"),
        (dit_lora(activation_checkpointing=1), "activation_checkpointing", "one of true, false"),
        (dit_lora(model={"transformer_dtype": "bfloat16"}), "model.transformer_dtype", 'one of "float8"'),
        (dit_lora(optimizer={"lr": 1e-4, "betas": [0.9]}), "optimizer.betas", "two values, not 1"),
        (dit_lora(optimizer={"lr": 1e-4, "betas": [0.9, 1.0]}), "optimizer.betas", "less than 1"),
        (dit_lora(warmup_steps=10, max_steps=10), "warmup_steps", "would end before"),
        (
            dit_lora(model={"dtype": "float32"}, optimizer={"lr": 1e-4, "type": "adamw_kahan"}),
            "optimizer.type",
            "keeps trained weights in bfloat16",
        ),
        (
            dit_lora(model={"transformer_compute": "float8"}),
            "model.transformer_compute",
            "weights that are stored in 8 bits",
        ),
        (
            encoder_ft({"dtype": "float32", "transformer_dtype": "float8", "transformer_compute": "float8"}),
            "model.transformer_compute",
            'dtype is "float32"',
        ),
        (
            dit_lora(model={"dtype": "float32", "attention": "flash_attn_2"}),
            "model.attention",
            "knows no float32",
        ),
        (dit_lora(model={"attention": "xformers"}), "model.attention", "flash_attn_3"),
        (dit_lora(output_dir="reports"), "output_dir", "never mix"),
        (dit_lora(output_dir="./output/../reports/runs"), "output_dir", "never mix"),
        (dit_lora(model={"caption_aug": AUG}), "model.caption_aug", "read from the cache at every visit"),
        (
            encoder_ft({"caption_aug": AUG | {"keywords_file": "words.txt"}}),
            "model.caption_aug.keywords_file",
            "together with keywords",
        ),
        (encoder_ft({"caption_aug": AUG | {"keywords": []}}), "model.caption_aug", "without keywords"),
        (
            encoder_ft({"caption_aug": {"enable": True, "keywords": ["circle"]}}),
            "model.caption_aug",
            "without a law",
        ),
        (
            encoder_ft({"caption_aug": BY_MIX | {"single_token": 0.0}}),
            "model.caption_aug.mix",
            "together with single_token:",
        ),
        (
            encoder_ft({"caption_aug": BY_MIX | AUG | {"keywords": []}}),
            "model.caption_aug.mix",
            "single_token and trim_prob",
        ),
        (
            encoder_ft({"caption_aug": BY_MIX | {"mix": {"single": 0.2, "short": 0.3, "verbose": 0.6}}}),
            "model.caption_aug.mix",
            "adds up to 1.1",
        ),
        (
            dit_lora(budget=BUDGET | {"max_neutral_drift": 0.1}),
            "budget.max_neutral_drift",
            "would be ignored",
        ),
        (
            dit_lora(budget=BUDGET | {"neutral_prompts": "a.txt"}),
            "budget.neutral_prompts",
            "would be ignored",
        ),
        (
            dit_lora(budget={"action": "project"}, optimizer={"lr": 1e-4, "type": "adamw_kahan"}),
            "budget.action",
            "keeps the adapter in bfloat16",
        ),
        (encoder_ft(budget=BUDGET), "budget.max_neutral_drift", "is missing"),
        (
            encoder_ft(budget={"max_neutral_drift": 0.1, "action": "project"}),
            "budget.action",
            "no length that weights could be scaled back to",
        ),
        (
            encoder_ft(budget={"max_neutral_drift": 0.1, "max_mean_delta_ratio": 0.1}),
            "budget.max_mean_delta_ratio",
            "there is no adapter",
        ),
        (
            encoder_ft(budget={"max_neutral_drift": 0.1, "max_delta_ratio": 0.2}),
            "budget.max_delta_ratio",
            "there is no adapter",
        ),
        (dit_lora(eval_every_n_steps=10), "eval_every_n_steps", "there are no eval_datasets"),
        (dit_lora(eval_before_first_step=False), "eval_before_first_step", "there are no eval_datasets"),
        (
            dit_lora(eval_datasets=["a.toml"], eval_before_first_step=False, eval_every_n_epochs=0),
            "eval_datasets",
            "no key says when",
        ),
        (dit_lora(eval_datasets=["a.toml", "b/a.toml"]), "eval_datasets[1].name", "for the second time"),
        (dit_lora(eval_datasets=[{"name": "../a", "config": "a.toml"}]), "eval_datasets[0].name", "letters"),
        (
            dit_lora(eval_datasets=["a.first_frame.toml", "A.toml"], model={"first_frame_prob": 0.1}),
            "eval_datasets[0].name",
            "another one's image-conditioned evaluation",
        ),
        (dit_lora(eval_datasets=["a.toml"], eval_quantiles=[]), "eval_quantiles", "at least one"),
        (dit_lora(eval_datasets=["a.toml"], eval_quantiles=[0.2, 0.2]), "eval_quantiles", "each once"),
        (dit_lora(probes={"run": []}), "probes.run", "is empty"),
        (dit_lora(probes={"run": ["te_eval"]}), "probes.run[0]", "looks at a text encoder"),
        (encoder_ft(probes={"run": ["lora_delta_budget"]}), "probes.run[0]", "looks at an adapter"),
        (encoder_ft(probes={"run": ["attn_logit_probe"]}), "probes.run[0]", "looks at an adapter"),
        (encoder_ft(probes={"run": ["dit_lora_translator"]}), "probes.run[0]", "looks at an adapter"),
        (
            dit_lora(probes={"run": ["lora_delta_bugdet"]}),
            "probes.run[0]",
            'there is no probe "lora_delta_bugdet"',
        ),
        (dit_lora(probes={"run": ["cache_check"]}), "probes.run[0]", "which no save changes"),
        (
            dit_lora(probes={"run": ["attn_logit_probe", "attn_logit_probe"]}),
            "probes.run[1]",
            "for the second time",
        ),
        (
            dit_lora(probes={"run": ["lora_delta_budget"], "reports_dir": "output/x/reports"}),
            "probes.reports_dir",
            "never mix",
        ),
        (
            dit_lora(probes={"run": ["lora_delta_budget"], "reports_dir": "output"}),
            "probes.reports_dir",
            "never mix",
        ),
        (dit_lora(probes={"run": ["prompt_grid"]}), "probes.run[0]", "has a section of its own"),
        (
            dit_lora(samples={"every_n_epochs": 3}, save_every_n_epochs=2),
            "samples.every_n_epochs",
            "does not save epoch 3",
        ),
        (dit_lora(samples={}, save_every_n_epochs=2), "samples.every_n_epochs", "does not save epoch 1"),
        (dit_lora(samples={}, save_every_n_epochs=0), "samples.every_n_epochs", "saves no epoch"),
        (dit_lora(samples={"size": "wide"}), "samples.size", "no size"),
        (dit_lora(samples={"device": "gpu"}), "samples.device", "no device"),
        (dit_lora(samples={"solver": "unipcc"}), "samples.solver", "must be one of"),
        (dit_lora(samples={"guidance": 0.5}), "samples.guidance", "must be at least 1"),
        (dit_lora(samples={"prompts": " "}), "samples.prompts", "must not be blank"),
        (encoder_ft({"save_text_encoder_full": False}, samples={}), "samples", "a whole text encoder"),
        (
            dit_lora(model={"expert": "both"}, samples={"expert": "low_noise"}),
            "samples.expert",
            "adapter of the other expert",
        ),
        (
            dit_lora(model={"expert": "high_noise"}, samples={"expert": "low_noise"}),
            "samples.expert",
            "would change nothing",
        ),
        (dit_lora(samples={"reports_dir": "output/x/grids"}), "samples.reports_dir", "never mix"),
        (
            dit_lora(probes={"run": ["lora_delta_budget"]}, samples={"reports_dir": "elsewhere"}),
            "samples.reports_dir",
            "look for the grid",
        ),
    ],
)
def test_refused(table, key, words) -> None:
    found = found_in(table)
    assert any(problem.key == key and words in problem.reason for problem in found), found
    assert {problem.key for problem in found} == {key}, found
    assert all(problem.fix for problem in found if "must be" not in problem.reason)


@pytest.mark.parametrize(
    "table",
    [
        dit_lora(),
        encoder_ft(),
        dit_lora(model={"text_train_blocks": 0, "text_encoder_dropout": 0.0, "save_text_encoder_full": True}),
        encoder_ft(
            model={"text_train_blocks": 4, "train_token_embedding": True, "text_encoder_dropout": 0.1}
        ),
        encoder_ft(model={"save_text_encoder_full": False}),
        dit_lora({"include": ["cross_attn.k", "cross_attn.[v]"]}),
        dit_lora({"include": ["cross_attn.*"], "exclude": ["*.{q,o}"]}),
        dit_lora({"include": ["cross_attn.{k,v,q,o}"], "exclude": ["cross_attn.{q,o}"]}),
        dit_lora({"include": ["cross_attn.*", "ffn.2"]}, budget=BUDGET),
        dit_lora({"include": ["*"], "exclude": ["self_attn.*"]}, budget=BUDGET),
        dit_lora({"include": ["*"], "exclude": ["self_attn.{q,k,v,o}"]}, budget=BUDGET),
        dit_lora({"include": ["*"], "exclude": ["self_attn.*", "ffn.*", "cross_attn.{q,o}"]}),
        dit_lora({"include": ["*.q"], "exclude": ["self_attn.q"]}, budget=BUDGET),
        dit_lora({"include": ["self_attn.{q,k}"], "rank": 8, "self_attn_approval": APPROVAL}, budget=BUDGET),
        dit_lora(
            {"include": ["*"], "rank": 4, "self_attn_approval": APPROVAL, "train_blocks_range": [3, 9]},
            budget=BUDGET,
        ),
        dit_lora({"include_file": "keys.txt"}),
        dit_lora({"include_file": "keys.txt", "rank": 8, "self_attn_approval": APPROVAL}, budget=BUDGET),
        dit_lora({"train_blocks_range": [5, 5]}),
        dit_lora({"train_blocks_range": [0, 29]}),
        dit_lora(budget=BUDGET),
        dit_lora(model={"min_t": 0.0, "max_t": 0.875}),
        dit_lora(model={"timestep_sample_method": "logit_normal", "sigmoid_scale": 2.0}),
        dit_lora(model={"timestep_sample_method": "uniform"}),
        dit_lora(partition_method="manual", pipeline_stages=3, partition_split=[1, 4]),
        dit_lora(partition_method="manual"),
        dit_lora(optimizer={"lr": 0, "betas": [0, 0.999]}),
        dit_lora(activation_checkpointing=False),
        dit_lora(
            activation_checkpointing="selective", blocks_to_swap=2, model={"transformer_dtype": "float8"}
        ),
        encoder_ft(
            activation_checkpointing="offload", blocks_to_swap=2, model={"transformer_dtype": "float8"}
        ),
        dit_lora(warmup_steps=9, max_steps=10),
        dit_lora(model={"dtype": "bfloat16"}, optimizer={"lr": 1e-4, "type": "adamw_kahan"}),
        dit_lora(model={"dtype": "float32"}, optimizer={"lr": 1e-4, "type": "adamw8bit"}),
        dit_lora(warmup_steps=500),
        dit_lora(compile=True, model={"attention": "flash_attn_3"}),
        dit_lora(model={"dtype": "float32", "attention": "torch"}),
        encoder_ft({"transformer_dtype": "float8", "transformer_compute": "float8"}),
        dit_lora(output_dir="output/reports"),
        dit_lora(output_dir="reports_of_mine"),
        encoder_ft({"caption_aug": AUG}),
        encoder_ft({"caption_aug": BY_MIX}),
        encoder_ft({"caption_aug": BY_MIX | {"mix": {"single": 0.7, "short": 0.1, "verbose": 0.2}}}),
        encoder_ft({"caption_aug": {"enable": True, "keywords": ["circle"], "trim_prob": 0.0}}),
        encoder_ft({"caption_aug": {"enable": False}}),
        dit_lora(model={"caption_aug": AUG | {"enable": False}}),
        dit_lora(budget=BUDGET | {"max_mean_delta_ratio": 0.02, "action": "project"}),
        encoder_ft(budget={"max_neutral_drift": 0.1, "neutral_prompts": "a.txt", "action": "stop"}),
        dit_lora(save_every_n_epochs=0, checkpoint_every_n_epochs=0),
        dit_lora(eval_datasets=["a.toml", {"name": "b", "config": "a.toml"}], eval_quantiles=[0.9, 0.5]),
        dit_lora(eval_datasets=["a.toml"], eval_every_n_epochs=0),
        dit_lora(probes={"run": ["lora_delta_budget", "attn_logit_probe", "dit_lora_translator"]}),
        encoder_ft(probes={"run": ["te_eval"], "on_fail": "stop"}),
        encoder_ft({"save_text_encoder_full": False}, probes={"run": ["te_eval"]}),
        dit_lora(samples={}),
        encoder_ft(samples={"negative_prompt": "", "device": "cuda:1", "size": "832x480"}),
        dit_lora(samples={"every_n_epochs": 4}, save_every_n_epochs=2),
        dit_lora(model={"expert": "high_noise"}, samples={"expert": "high_noise"}),
        encoder_ft({"expert": "both"}, samples={"expert": "low_noise"}),
        dit_lora(probes={"run": ["lora_delta_budget"], "reports_dir": "r"}, samples={"reports_dir": "./r"}),
        encoder_ft({"save_text_encoder_full": False}),
        dit_lora(eval_datasets=["a.toml"], eval_before_first_step=False, eval_every_n_steps=5),
    ],
)
def test_permitted(table) -> None:
    assert found_in(table) == []


@pytest.mark.parametrize(
    ("table", "key", "words"),
    [
        (dataset(directory=[]), "directory", "is empty"),
        (dataset(min_ar=2.0, max_ar=1.0), "min_ar", "above max_ar"),
        (dataset(resolutions=[]), "resolutions", "is empty"),
        (dataset(ar_buckets=[]), "ar_buckets", "is empty"),
        (dataset(directory=[{"path": "a", "ar_buckets": []}]), "directory[0].ar_buckets", "is empty"),
        (dataset(directory=[{"path": "a", "min_ar": 3.0}]), "directory[0].min_ar", "above max_ar = 2"),
        (
            dataset(directory=[{"path": "a", "max_ar": 0.2}]),
            "directory[0].max_ar",
            "is 0.2, below min_ar = 0.5",
        ),
        (
            dataset(directory=[{"path": "a"}, {"path": "b", "frame_buckets": []}]),
            "directory[1].frame_buckets",
            "is empty",
        ),
        (dataset(size_buckets=[[832, 480]]), "size_buckets", "[width, height, frames]"),
        (dataset(frame_buckets=[1, 32]), "frame_buckets", "32 frames"),
        (dataset(size_buckets=[[832, 480, 48]]), "size_buckets", "48 frames"),
        (dataset(directory=[{"path": "a", "frame_buckets": [3]}]), "directory[0].frame_buckets", "3 frames"),
        (dataset(video_clip_mode="uniform"), "video_clip_mode", "no clip mode"),
        (
            dataset(directory=[{"path": "a"}, {"path": "b", "mask_path": "b/../a/"}]),
            "directory[1].mask_path",
            "its masks would be samples",
        ),
        (
            dataset(directory=[{"path": "a", "video_clip_mode": "uniform:0"}]),
            "directory[0].video_clip_mode",
            "'uniform:0'",
        ),
    ],
)
def test_refused_in_a_dataset(table, key, words) -> None:
    (problem,) = found_in_dataset(table)
    assert problem.key == key and words in problem.reason and problem.fix


@pytest.mark.parametrize(
    ("name", "fix"),
    [
        (
            "lora_delta_bugdet",
            'did you mean "lora_delta_budget"? for dit_lora there are lora_delta_budget, attn',
        ),
        ("zzz", "for dit_lora there are lora_delta_budget, attn_logit_probe, dit_lora_translator"),
        ("te_eval", "for dit_lora there are lora_delta_budget"),
        ("cache_check", "start it by hand; for dit_lora there are"),
    ],
)
def test_a_probe_that_cannot_run_is_told_which_can(name, fix) -> None:
    (problem,) = found_in(dit_lora(probes={"run": [name]}))
    assert problem.fix.startswith(fix)


@pytest.mark.parametrize(
    ("every", "saved", "fix"),
    [
        (3, 2, "write 2 or 4, or save_every_n_epochs = 3"),
        (1, 2, "write 2, or save_every_n_epochs = 1"),
        (5, 0, "write save_every_n_epochs = 5"),
    ],
)
def test_grids_of_epochs_that_are_not_saved_are_refused_with_those_that_are(every, saved, fix) -> None:
    (problem,) = found_in(dit_lora(samples={"every_n_epochs": every}, save_every_n_epochs=saved))
    assert problem.fix == fix


@pytest.mark.parametrize(
    "table",
    [
        dataset(),
        dataset(min_ar=1.0, max_ar=1.0),
        dataset(ar_buckets=[0.5, 1.0]),
        dataset(directory=[{"path": "a", "mask_path": "a/masks"}, {"path": "b", "mask_path": "a/masks"}]),
        dataset(frame_buckets=[1, 5, 81]),
        dataset(video_clip_mode="multiple_overlapping"),
        dataset(directory=[{"path": "a", "video_clip_mode": "uniform:3"}]),
        dataset(size_buckets=[[832, 480, 49], [480, 832, 1]]),
        dataset(
            directory=[{"path": "a", "frame_buckets": [1]}, {"path": "b", "size_buckets": [[64, 64, 5]]}]
        ),
    ],
)
def test_permitted_in_a_dataset(table) -> None:
    assert found_in_dataset(table) == []


def test_the_nearest_legal_lengths_are_named() -> None:
    assert found_in_dataset(dataset(frame_buckets=[48]))[0].fix == "use 45 or 49"


def test_exactly_two_of_the_eight_switch_mixes_are_modes() -> None:
    modes = {}
    for bits in range(8):
        mix = {name: bool(bits >> place & 1) for place, name in enumerate(SWITCHES)}
        table = encoder_ft(model=mix) if mix["train_text_encoder"] else dit_lora(model=mix)
        if not found_in(table):
            modes[mode_of(parse_table(TrainConfig, table).value)] = mix
    assert modes == {"encoder_ft": ENCODER_FT, "dit_lora": DIT_LORA}


def test_several_broken_rules_are_reported_together() -> None:
    table = dit_lora(
        {"include": ["self_attn.q"]},
        model={"min_t": 0.9, "max_t": 0.1, "freeze_transformer": False},
        warmup_steps=5,
        max_steps=2,
    )
    assert [problem.key for problem in found_in(table)] == [
        "model.freeze_transformer",
        "adapter.include",
        "adapter.include",
        "model.min_t",
        "warmup_steps",
    ]


def test_a_rule_stays_silent_where_a_key_it_reads_is_unusable() -> None:
    table = dit_lora(model={"min_t": "high", "max_t": 0.1}, warmup_steps=5, max_steps=0)
    assert [problem.key for problem in found_in(table)] == ["max_steps", "model.min_t"]


def test_a_rule_about_lists_is_blocked_by_the_keys_it_reads_in_any_entry() -> None:
    rule = Rule(lambda config: [Problem("x", config)], ("item[].size",))
    assert run_rules([rule], "broken", frozenset(["item[7].size"])) == []
    assert run_rules([rule], "broken", frozenset(["item"])) == []
    assert len(run_rules([rule], "broken", frozenset(["item[7].path"]))) == 1


@pytest.mark.parametrize("bad", ["a", "a.b", "a.b.c", "a.b[0].c"])
def test_a_rule_is_blocked_by_its_key_what_is_around_it_and_what_is_in_it(bad) -> None:
    rule = Rule(lambda config: [Problem("a.b", config)], ("a.b",))
    assert run_rules([rule], "broken", frozenset([bad])) == []
    assert run_rules([rule], "broken", frozenset(["a.bc", "b", "a.x"]), "f.toml") == [
        Problem("a.b", "broken", "", "f.toml")
    ]


@pytest.mark.parametrize(("rules", "record"), [(RULES, TrainConfig), (DATASET_RULES, DatasetConfig)])
def test_rules_read_keys_that_exist_and_say_in_words_what_they_are(rules, record) -> None:
    known = {
        ".".join(filter(None, (s.path, name)))
        for s in sections_of(record)
        for name in s.record.__dataclass_fields__
    }
    for rule in rules:
        assert {key.replace("[]", "") for key in rule.keys} <= known, rule.check
        assert re.fullmatch(r"\S.*[.]", rule.words), rule.check


def test_every_key_that_a_rule_reads_is_declared() -> None:
    """With a declared key gone (None), each rule must be skipped rather than trip over it."""
    base = dit_lora(
        {
            "include": ["*"],
            "exclude": ["ffn.*"],
            "rank": 8,
            "self_attn_approval": APPROVAL,
            "train_blocks_range": [0, 9],
        },
        budget=BUDGET,
        max_steps=10,
        partition_method="manual",
        pipeline_stages=2,
        partition_split=[1],
        eval_datasets=[{"config": "a.toml"}],
    )
    sections = {s.path: s.record for s in sections_of(TrainConfig)}
    for path, record in sections.items():
        for name in record.__dataclass_fields__:
            table = copy.deepcopy(base)
            inner = table
            for part in filter(None, path.split(".")):
                inner = inner.setdefault(part, {})
                inner = inner[0] if isinstance(inner, list) else inner
            inner[name] = object()
            assert any(problem.key.endswith(name) for problem in found_in(table))


FREE = ["blocks.0.cross_attn.k", "blocks.29.cross_attn.v"]


def adapter(rank=8, blocks=None, **changes) -> AdapterConfig:
    approval = (
        None
        if blocks is None
        else SelfAttnApproval(reason="the shapes lose their outline", blocks=tuple(blocks))
    )
    return AdapterConfig(rank=rank, self_attn_approval=approval, **changes)


@pytest.mark.parametrize(
    ("paths", "config", "budget", "key", "words"),
    [
        (["blocks.3.self_attn.q"], adapter(), BudgetConfig(), "adapter.include", "artifacts and collapse"),
        (
            ["blocks.3.self_attn.norm_q"],
            adapter(include_file="f"),
            BudgetConfig(),
            "adapter.include_file",
            "artifacts",
        ),
        (
            ["blocks.3.self_attn.q", "blocks.4.self_attn.q"],
            adapter(blocks=[3]),
            BudgetConfig(),
            "adapter.include",
            "only for blocks [3]",
        ),
        (
            ["blocks.3.self_attn.q"],
            adapter(blocks=[3, 40]),
            BudgetConfig(),
            "adapter.self_attn_approval.blocks",
            "names block 40",
        ),
        (FREE, adapter(blocks=[3]), BudgetConfig(), "adapter.self_attn_approval", "none among the resolved"),
        (["blocks.3.self_attn.q"], adapter(blocks=[3]), None, "adapter.include", "without a delta budget"),
        (["blocks.3.cross_attn.q"], adapter(), None, "adapter.include", "blocks.3.cross_attn.q"),
        (["blocks.3.ffn.0"], adapter(include_file="f"), None, "adapter.include_file", "blocks.3.ffn.0"),
        (["head.head"], adapter(), None, "adapter.include", "head.head"),
    ],
)
def test_resolved_targets_refused(paths, config, budget, key, words) -> None:
    (problem,) = check_targets(paths, config, budget)
    assert problem.key == key and words in problem.reason and problem.fix


@pytest.mark.parametrize(
    ("paths", "config", "budget"),
    [
        (FREE, adapter(rank=64), None),
        (["blocks.3.cross_attn.q", "blocks.3.ffn.0"], adapter(), BudgetConfig()),
        ([*FREE, "blocks.3.self_attn.q", "blocks.4.self_attn.k"], adapter(blocks=[3, 4]), BudgetConfig()),
    ],
)
def test_resolved_targets_permitted(paths, config, budget) -> None:
    assert check_targets(paths, config, budget) == []


def test_a_long_list_of_targets_is_shortened() -> None:
    (problem,) = check_targets([f"blocks.{index}.ffn.0" for index in range(30)], adapter(), None)
    assert "blocks.3.ffn.0 and 26 more" in problem.reason and "blocks.4" not in problem.reason
