"""Keys of diffusion-pipe that this project has not: how things are here, what to do, and when nothing is lost.

Facts from that project's public example configs and the keys its train.py and dataset.py read. What means the same is
no entry here: it is simply a key of `schema`. Values that are written differently are in `foreign`.
"""

from dataclasses import dataclass
from typing import Any

# A key whose value never changes what is trained, or where it is found.
ANY_VALUE: Any = object()


@dataclass(frozen=True)
class ForeignKey:
    """One key: its dotted name (`[]` stands for every table of a list), how things are here, and what to do.

    Where the value is among `idle` (or `idle` is `ANY_VALUE`), leaving the key out changes nothing that is trained: it is
    taken with a note. With any other value it is refused.
    """

    key: str
    here: str
    fix: str = ""
    idle: Any = ()

    def is_idle(self, value: Any) -> bool:
        """Whether the key says nothing with this value (by type too: 0 is not false)."""
        if self.idle is ANY_VALUE:
            return True
        return any(type(one) is type(value) and one == value for one in self.idle)


_SHOWN = "every step is shown on the progress line and written to metrics.jsonl"
_NOT_SENT = "metrics go to metrics.jsonl and TensorBoard files of the run; nothing is sent anywhere"
_ALL_COUNT = "an evaluation counts every sample once, however they are batched"
_SEEDED = "the order of samples follows from seed"
_NO_TAGS = "captions are never shuffled"
_TAKE_OUT = "take it out"
_WRITE_VARIANTS = "list several orders of the tags as captions of a file in captions.json, or take it out"
_OPTIMIZERS = "the optimizers are adamw, adamw8bit and adamw_kahan"

TRAINING_KEYS = (
    ForeignKey("steps_per_print", _SHOWN, idle=ANY_VALUE),
    ForeignKey("logging_steps", _SHOWN, idle=ANY_VALUE),
    ForeignKey("x_axis_examples", "curves are over steps", idle=ANY_VALUE),
    ForeignKey(
        "map_num_proc",
        "clips are decoded ahead by as many processes as suit the machine",
        "write decode_workers to set their number",
        ANY_VALUE,
    ),
    ForeignKey(
        "reentrant_activation_checkpointing",
        "one way of recomputing serves any number of stages",
        idle=ANY_VALUE,
    ),
    ForeignKey("disable_block_swap_for_eval", "evaluations swap blocks as training does", "", ANY_VALUE),
    ForeignKey("eval_gradient_accumulation_steps", _ALL_COUNT, idle=ANY_VALUE),
    ForeignKey("image_eval_micro_batch_size_per_gpu", _ALL_COUNT, idle=ANY_VALUE),
    ForeignKey("eval_image_micro_batch_size_per_gpu", _ALL_COUNT, idle=ANY_VALUE),
    ForeignKey("monitoring.enable_wandb", _NOT_SENT, idle=ANY_VALUE),
    ForeignKey("monitoring.wandb_tracker_name", _NOT_SENT, idle=ANY_VALUE),
    ForeignKey("monitoring.wandb_run_name", _NOT_SENT, idle=ANY_VALUE),
    ForeignKey(
        "monitoring.wandb_api_key",
        _NOT_SENT,
        "take it out: it is a secret, and each run keeps a copy of this file",
        ("",),
    ),
    ForeignKey("model.guidance", "Wan 2.2 takes no guidance value while it is trained", idle=ANY_VALUE),
    ForeignKey("pseudo_huber_c", "the loss is the mean squared error", _TAKE_OUT),
    ForeignKey(
        "force_constant_lr",
        "the learning rate is optimizer.lr, also after a resume",
        'write optimizer.lr and lr_scheduler = "constant"; a resume takes it with --allow_changed optimizer.lr',
    ),
    ForeignKey(
        "save_every_n_examples",
        "saves are counted in steps or epochs",
        "write save_every_n_steps = examples / (micro_batch_size_per_gpu * gradient_accumulation_steps * copies)",
    ),
    ForeignKey(
        "eval_every_n_examples",
        "evaluations are counted in steps or epochs",
        "write eval_every_n_steps = examples / (micro_batch_size_per_gpu * gradient_accumulation_steps * copies)",
    ),
    ForeignKey(
        "resume_from_checkpoint",
        "a run is continued by a flag",
        "take it out, and give train.py --resume_from_checkpoint [RUN]",
        (False,),
    ),
    ForeignKey(
        "regenerate_cache",
        "a cache is made anew by a flag, and by itself where its inputs have changed",
        "take it out, and give train.py --regenerate_cache",
        (False,),
    ),
    ForeignKey(
        "model.flux_shift",
        "no shift depends on the size of a sample",
        "write model.shift, one number for all sizes, e.g. shift = 5.0",
        (False,),
    ),
    ForeignKey(
        "model.text_encoder_fp8",
        "the text encoder runs in model.dtype, because translators are trained on exactly its embeddings",
        _TAKE_OUT,
        (False,),
    ),
    ForeignKey(
        "adapter.exclude_modules",
        "targets are chosen by globs over module paths within a block",
        'write adapter.include, and adapter.exclude for what to leave out, e.g. include = ["cross_attn.{k,v}"]',
    ),
    ForeignKey(
        "adapter.fuse_adapters",
        "base weights are trained on as they are",
        "merge with scripts/merge_lora.py, name the result as model.transformer_path, and take this out",
        ([],),
    ),
    ForeignKey("adapter.decompose_factor", "the only adapter is LoRA", _TAKE_OUT),
    ForeignKey(
        "optimizer.gradient_release", "gradients are kept until the optimizer steps", _TAKE_OUT, (False,)
    ),
    ForeignKey("optimizer.stabilize", _OPTIMIZERS, _TAKE_OUT, (False,)),
    ForeignKey(
        "optimizer.beta2_half_life",
        "both decay rates are given as such",
        "write optimizer.betas; the second is 0.5 ** (samples per step / beta2_half_life)",
    ),
    *(
        ForeignKey(f"optimizer.{name}", _OPTIMIZERS, _TAKE_OUT)
        for name in ("momentum", "second_moment_type", "rank", "proj_type", "update_proj_gap")
    ),
)

_ANYWHERE = (
    ForeignKey("shuffle_tags", _NO_TAGS, _WRITE_VARIANTS, (False,)),
    ForeignKey("cache_shuffle_num", _NO_TAGS, _WRITE_VARIANTS, (0,)),
    ForeignKey("cache_shuffle_delimiter", _NO_TAGS, idle=ANY_VALUE),
    ForeignKey("online_captions", "captions are read from their files at each start", idle=ANY_VALUE),
    ForeignKey("shuffle_metadata", _SEEDED, idle=ANY_VALUE),
)

DATASET_KEYS = (
    *_ANYWHERE,
    ForeignKey(
        "subsample_ratio",
        "a dataset is trained whole",
        "write num_repeats below 1 in a [[directory]]: each epoch then sees that share of it",
        (1, 1.0),
    ),
    *(ForeignKey(f"directory[].{key.key}", key.here, key.fix, key.idle) for key in _ANYWHERE),
    ForeignKey(
        "directory[].control_path",
        "Wan 2.2 is trained without control pictures",
        "take it out; an image-to-video model takes the first frame of each clip by itself",
    ),
    ForeignKey(
        "directory[].default_mask_file",
        "a file without a mask counts whole",
        "put copies of it into mask_path under the names of the files that it is for, or take it out",
    ),
)
