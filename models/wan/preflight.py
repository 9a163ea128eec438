"""Everything about a configuration that only the checkpoint's headers can tell, in one list of problems."""

from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path

from models.wan.arch import WanArch, load_arch
from models.wan.checkpoint import (
    check_checkpoint,
    locate,
    open_text_encoder,
    open_transformer,
    text_encoder_sizes,
)
from models.wan.closed_form.fit_subject import check_solvable, find_base
from models.wan.expert_files import check_initial_adapter, check_transformer_files
from models.wan.sample_defaults import check_samples
from models.wan.tokenizer_place import read_spiece
from utils.config.closed_form_rules import closed_form_of, is_solved_for
from utils.config.experts import BOTH, EXPERTS, name_origin, side_config, sides_of
from utils.config.schema import Problem, TrainConfig
from utils.errors import UserError
from utils.lora_targets import linear_modules, resolve_targets
from utils.tensor_source import TensorSource


def preflight(config: TrainConfig) -> list[Problem]:
    """Check the checkpoint, and against it the adapter's targets, the trained blocks, the noise range and `[samples]`.

    Of a pair each expert is checked; what both have in common is told once. Reads headers; the only tensors read are
    those of an adapter to start from.
    """
    problems = _check_what_is_trained(config)
    if any(problem.key.startswith("model.") for problem in problems):
        return problems
    return problems + check_samples(config)


def _check_what_is_trained(config: TrainConfig) -> list[Problem]:
    sides = sides_of(config)
    if not sides:
        return _check_one(config)
    if config.model.expert == BOTH:
        about_pair = [problem for problem in locate(config.model)[1] if problem.key == "model.expert"]
        if about_pair:
            return about_pair
    problems: list[Problem] = []
    for expert in sides:
        found = [
            name_origin(problem, config.adapter, expert)
            for problem in _check_one(side_config(config, expert))
        ]
        problems += [problem for problem in found if problem not in problems]
    return problems + (check_pair(config) if config.model.expert == BOTH and not problems else [])


def check_pair(config: TrainConfig) -> list[Problem]:
    """Both experts need two transformers of one model, each in its place. Their files are there.

    Raises:
        UserError: as `open_transformer`, `load_arch`.
    """
    paths = [locate(side_config(config, expert).model)[0] for expert in EXPERTS]
    places = [path.transformer_dir for path in paths]
    if places[0] == places[1]:
        reason = f'is "both", but {places[0]} holds one transformer'
        fix = "give the checkpoint that holds both experts, or train each expert by itself"
        return [Problem("model.expert", reason, fix)]
    high, low = (load_arch(path.config_json, open_transformer(path.transformer_dir).shapes) for path in paths)
    differing = [
        f"{field.name} {getattr(high, field.name)} and {getattr(low, field.name)}"
        for field in fields(high)
        if getattr(high, field.name) != getattr(low, field.name)
    ]
    if not differing:
        return []
    names = [f"{place} ({arch.variant.name})" for place, arch in zip(places, (high, low), strict=True)]
    reason = f'is "both", but {" and ".join(names)} are no two experts of one model: {", ".join(differing)}'
    return [Problem("model.expert", reason, "give both experts of one checkpoint")]


def _check_one(config: TrainConfig) -> list[Problem]:
    problems = check_checkpoint(config.model)
    paths, missing = locate(config.model)
    if missing or any(problem.key in ("model.ckpt_path", "model.transformer_path") for problem in problems):
        return problems
    source = open_transformer(paths.transformer_dir)
    arch = load_arch(paths.config_json, source.shapes)
    problems += check_dit(config, source, arch)
    if is_solved_for(config) and not problems:
        problems += _check_solve(config, paths.text_encoder)
    if config.model.train_text_encoder and not any(problem.key == "model.llm_path" for problem in problems):
        problems += _check_trained_blocks(config, open_text_encoder(paths.text_encoder))
        problems += _check_spiece(config, paths.tokenizer_dir)
    return problems


def check_dit(config: TrainConfig, source: TensorSource, arch: WanArch) -> list[Problem]:
    """What of a configuration does not fit this DiT: expert, noise range, first frames, swapped blocks, adapter."""
    problems = check_transformer_files(config.model, source)
    problems += _check_noise_range(config, arch) + _check_first_frame(config, arch)
    problems += _check_swapped_blocks(config, arch)
    return problems if config.adapter is None else problems + _check_adapter(config, source, arch)


def _check_noise_range(config: TrainConfig, arch: WanArch) -> list[Problem]:
    model = config.model
    key = "model.max_t" if model.expert == "low_noise" and model.max_t < 1 else "model.min_t"
    return _problem(key, lambda: arch.variant.sigma_range(model.expert, model.min_t, model.max_t))


def _check_first_frame(config: TrainConfig, arch: WanArch) -> list[Problem]:
    """Only TI2V-5B takes the first frame as a clean latent; I2V-A14B has channels for it, T2V-A14B takes none."""
    share, variant = config.model.first_frame_prob, arch.variant
    if share == 0 or variant.model_type == "ti2v":
        return []
    why = (
        "sees the first frame of every clip in channels of its own"
        if variant.model_type == "i2v"
        else "is a text-to-video model, which takes no first frame"
    )
    reason = f"is {share:g}, which is for ti2v-5b only; {variant.name} {why}"
    return [Problem("model.first_frame_prob", reason, "take it out")]


def _check_swapped_blocks(config: TrainConfig, arch: WanArch) -> list[Problem]:
    """One block has to stay: with all of them away, there is nothing behind which a copy could hide."""
    limit = arch.num_layers - 1
    if config.blocks_to_swap <= limit:
        return []
    reason = f"is {config.blocks_to_swap}, but of the DiT's {arch.num_layers} blocks at most {limit} can be swapped"
    return [Problem("blocks_to_swap", reason, f"write at most {limit}, or 0 for none")]


def _check_solve(config: TrainConfig, tuned: Path) -> list[Problem]:
    """Both encoders that an adapter is solved for with, and the prompts."""
    problems = _problem("model.llm_path", lambda: find_base(config.model, tuned))
    # Their modules need torch, which a config without this key should not wait for.
    from models.wan.closed_form.fit_job import plan_of
    from models.wan.closed_form.fit_settings import in_config_words

    prompts = _problem("adapter.closed_form", lambda: plan_of(closed_form_of(config)))
    return problems + [replace(problem, reason=in_config_words(problem.reason)) for problem in prompts]


def _check_adapter(config: TrainConfig, source: TensorSource, arch: WanArch) -> list[Problem]:
    adapter = config.adapter
    assert adapter is not None
    targets: list[str] = []
    linears = linear_modules(source.shapes)
    problems = _problem("adapter", lambda: targets.extend(resolve_targets(linears, adapter, config.budget)))
    if is_solved_for(config):
        problems += check_solvable(targets, adapter.rank, arch.dim)
    existing = adapter.init_from_existing
    if targets and existing is not None:
        # Its module needs torch, which a config without this key should not wait for.
        from utils.lora import load_initial_adapter

        of_other: list[Problem] = []
        problems += _problem(
            "adapter.init_from_existing",
            lambda: of_other.extend(check_initial_adapter(Path(existing), config.model.expert)),
        )
        if problems or of_other:
            return problems + of_other
        problems += _problem(
            "adapter.init_from_existing", lambda: load_initial_adapter(Path(existing), targets, adapter)
        )
    return problems


def _check_trained_blocks(config: TrainConfig, source: TensorSource) -> list[Problem]:
    wanted, existing = config.model.text_train_blocks, text_encoder_sizes(source.shapes).num_layers
    if wanted <= existing:
        return []
    reason = f"is {wanted}, but the encoder has {existing} blocks"
    return [Problem("model.text_train_blocks", reason, f"write at most {existing}, or 0 for all of them")]


def _check_spiece(config: TrainConfig, tokenizer: Path) -> list[Problem]:
    """A file for ComfyUI takes the SentencePiece model from the tokenizer: it must not be missed after training."""
    key = "model.save_text_encoder_format"
    if config.model.save_text_encoder_format != "comfyui":
        return []
    return [
        Problem(key, f'is "comfyui", and {problem.reason}', problem.fix)
        for problem in _problem(key, lambda: read_spiece(tokenizer))
    ]


def _problem(key: str, check: Callable[[], object]) -> list[Problem]:
    try:
        check()
    except UserError as error:
        return [Problem(key, str(error))]
    return []
