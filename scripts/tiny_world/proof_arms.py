"""The arms of the proof: what each trains, on what, how long, and the configuration that says so to `train.py`."""

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from scripts.tiny_world.proof_data import Amounts

Kind = Literal["base", "encoder", "adapter", "solved"]
BASE = "base"


@dataclass(frozen=True)
class Recipe:
    """Lengths and rates, fixed before anything is measured, with a seed that the proof does not use.

    Attributes:
        encoder_steps: of an encoder fine-tune.
        adapter_steps: of the adapter of each expert; its control spends both on the encoder.
        gentle_lr, damaging_lr: of the encoder.
        adapter_lr: of adapters.
        batch: pictures in a step.
    """

    encoder_steps: int = 400
    adapter_steps: int = 150
    gentle_lr: float = 1e-3
    damaging_lr: float = 3e-3
    adapter_lr: float = 2e-3
    batch: int = 16


@dataclass(frozen=True)
class Arm:
    """One way to train.

    Attributes:
        name: of files and tables.
        what: for people.
        kind: what is trained; `solved` is an adapter that is not trained but solved for.
        start: the arm whose encoder it starts from or is made for.
        data: folders of `proof_data.write_data`, each seen as often in all.
        lr: learning rate.
        steps: optimizer steps; of an adapter, for each expert.
        adapter: the lines of `[adapter]`.
        extra: whole tables beside it.
        flags: of scripts/solve_translator.py.
        init: the solved arm whose adapter training starts from.
    """

    name: str
    what: str
    kind: Kind
    start: str | None = None
    data: tuple[str, ...] = ()
    lr: float = 0.0
    steps: int = 0
    adapter: tuple[str, ...] = ()
    extra: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()
    init: str | None = None

    @property
    def has_adapter(self) -> bool:
        """Whether an adapter comes of it."""
        return self.kind in ("adapter", "solved")

    @property
    def needs(self) -> frozenset[str]:
        """Arms that have to be done before."""
        needed = (BASE, self.start, self.init)
        return frozenset(name for name in needed if name not in (None, self.name))

    def title(self, seed: int) -> str:
        """The name of one training."""
        return f"{self.name}_s{seed}"


# Numbers of parameters are alike: 12 modules at rank 4, 6 at rank 8, 16 at rank 3, of 256 each and per rank.
_CROSS = ("rank = 4",)
_BAND = ("rank = 8", "train_blocks_range = [3, 5]")
_SELF = ("rank = 3", 'include = ["self_attn.{q,k,v,o}"]')
_SELF_EXTRA = (
    "[adapter.self_attn_approval]",
    'reason = "control of the proof: what does it change in how known things are drawn?"',
    "blocks = [1, 2, 3, 4]",
    "[budget]",
    "max_delta_ratio = 1.0",
)


def arms_of(recipe: Recipe) -> tuple[Arm, ...]:
    """All arms, each behind those that it needs."""

    def encoder(name: str, what: str, start: str, data: tuple[str, ...], lr: float, steps: int) -> Arm:
        return Arm(name, what, "encoder", start, data, lr, steps)

    def adapter(
        name: str,
        what: str,
        start: str,
        data: tuple[str, ...],
        lines: tuple[str, ...] = _CROSS,
        extra: tuple[str, ...] = (),
    ) -> Arm:
        return Arm(name, what, "adapter", start, data, recipe.adapter_lr, recipe.adapter_steps, lines, extra)

    tuned, both, steps, more = (
        ("new", "neutral"),
        ("new", "rehearsal"),
        recipe.encoder_steps,
        2 * recipe.adapter_steps,
    )
    gentle, damaging = recipe.gentle_lr, recipe.damaging_lr
    return (
        Arm(BASE, "the trained miniature as it is", "base"),
        encoder("gentle", "encoder, gentle rate", BASE, tuned, gentle, steps),
        encoder("damaging", "encoder, damaging rate", BASE, tuned, damaging, steps),
        adapter("gentle_lora", "gentle + translator, rehearsal", "gentle", both),
        adapter("gentle_lora_new", "gentle + translator, new words only", "gentle", ("new",)),
        adapter("damaging_lora", "damaging + translator, rehearsal", "damaging", both),
        adapter("damaging_lora_new", "damaging + translator, new words only", "damaging", ("new",)),
        encoder("gentle_more", "control: as many steps on the gentle encoder", "gentle", both, gentle, more),
        encoder(
            "damaging_more",
            "control: as many steps on the damaged encoder, gentle rate",
            "damaging",
            both,
            gentle,
            more,
        ),
        adapter("shuffled", "control: damaging + translator, captions shuffled", "damaging", ("shuffled",)),
        adapter("band", "control: damaging + translator in blocks 3-5", "damaging", both, _BAND),
        adapter(
            "self_attn",
            "control: damaging + LoRA on self_attn, approved",
            "damaging",
            both,
            _SELF,
            _SELF_EXTRA,
        ),
        *_solved_arms(
            adapter("damaging_closed_lora", "closed form, rank 4, then translator", "damaging", both)
        ),
    )


def _solved_arms(then: Arm) -> tuple[Arm, ...]:
    """Arms of the closed form, and one that goes on training from it."""

    def solved(name: str, start: str, rank: int, *flags: str) -> Arm:
        what = f"{start} + closed form, rank {rank}" + (f", {' '.join(flags)}" if flags else "")
        given = ("--rank", str(rank), *flags)
        return Arm(name, what, "solved", start, ("new",), 1e-3, 1, _CROSS, flags=given)

    capped = ("--max_delta_ratio", "0.2")
    return (
        solved("gentle_closed", "gentle", 4),
        solved("gentle_closed_capped", "gentle", 16, *capped),
        solved("damaging_closed", "damaging", 4),
        solved("damaging_closed_16", "damaging", 16),
        solved("damaging_closed_capped", "damaging", 16, *capped),
        replace(then, init="damaging_closed"),
    )


@dataclass(frozen=True)
class Plan:
    """Everything that the results follow from, beside the code and the checkpoint."""

    seeds: tuple[int, ...] = (0, 1, 2)
    recipe: Recipe = field(default_factory=Recipe)
    amounts: Amounts = field(default_factory=Amounts)
    arms: tuple[str, ...] = ()
    """Names of arms to leave it at; empty is all."""

    def chosen(self) -> tuple[Arm, ...]:
        """The arms of this plan."""
        return tuple(arm for arm in arms_of(self.recipe) if not self.arms or arm.name in self.arms)

    def document(self) -> dict[str, Any]:
        """The same for JSON."""
        found: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return found


def write_configs(
    arm: Arm,
    seed: int,
    work: Path,
    checkpoint: Path,
    encoder: Path | None,
    batch: int,
    init: Path | None = None,
) -> Path:
    """Write the dataset and training TOML of one training below `work`/configs; returns the latter.

    `init` holds the adapters that training starts from, in a directory for each expert.
    """
    directory = work / "configs"
    directory.mkdir(parents=True, exist_ok=True)
    name = arm.title(seed)
    data = [
        "size_buckets = [[48, 48, 1]]",
        f"cache_dir = {quoted(work / 'caches' / f'{name}')}",
        *(f"\n[[directory]]\npath = {quoted(work / 'data' / f's{seed}' / folder)}" for folder in arm.data),
    ]
    dataset, config = directory / f"{name}.data.toml", directory / f"{name}.toml"
    dataset.write_text("\n".join(data) + "\n", encoding="utf-8")
    is_encoder = arm.kind == "encoder"
    starts = [
        f"[adapter.{expert}]\ninit_from_existing = {quoted(init / expert)}"
        for expert in ("high_noise", "low_noise")
        if init is not None
    ]
    lines = [
        f"output_dir = {quoted(work / 'runs' / name)}",
        f"dataset = {quoted(dataset)}",
        f"max_steps = {arm.steps}",
        f"micro_batch_size_per_gpu = {batch}",
        "activation_checkpointing = false     # everything fits",
        "save_every_n_epochs = 0              # only the end counts",
        "checkpoint_every_n_epochs = 0",
        'lr_scheduler = "cosine"',
        f"warmup_steps = {min(20, arm.steps // 4)}",
        f"seed = {seed}",
        "\n[model]",
        'type = "wan"',
        f"ckpt_path = {quoted(checkpoint)}",
        *([] if encoder is None else [f"llm_path = {quoted(encoder)}"]),
        'expert = "both"                      # one adapter each; the encoder through both in turn',
        'dtype = "float32"',
        f"cache_text_embeddings = {str(not is_encoder).lower()}",
        f"train_text_encoder = {str(is_encoder).lower()}",
        "freeze_transformer = true",
        'timestep_sample_method = "uniform"   # as the miniature was trained',
        "shift = 2.0",
        *(
            ["train_token_embedding = true"]
            if is_encoder
            else ["\n[adapter]", *arm.adapter, *starts, *arm.extra]
        ),
        "\n[optimizer]",
        f"lr = {arm.lr:g}",
        "weight_decay = 0.0",
    ]
    config.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return config


def quoted(path: Path) -> str:
    """A path as TOML's basic string, which JSON's is too."""
    return json.dumps(path.as_posix())
