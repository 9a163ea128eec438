"""diffusion-pipe's TOMLs read as ours: what means the same is taken, and every other key gets a line that says so.

Works on parsed tables, before the schema is checked. A key that means nothing here and changes nothing that is trained
becomes a note; one whose silent loss would change the training is a problem like any other. Either way it is gone from the
table afterwards, so nothing complains about it twice.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from utils.config.convert import show
from utils.config.foreign_keys import DATASET_KEYS, TRAINING_KEYS
from utils.config.foreign_reader import CLIP_MODE, ForeignReader, Translated
from utils.config.foreign_remarks import remarks_on_dataset, remarks_on_training
from utils.config.introspect import keys_of
from utils.config.schema import DatasetConfig, Problem, TrainConfig

_SWITCHES = ("cache_text_embeddings", "train_text_encoder", "freeze_transformer")
_OTHER_FLOAT8 = ("float8_e5m2", "nf4")
# diffusion-pipe takes the names of optimizers in any case; others it looks up in a library of optimizers.
_OPTIMIZERS = {"adamw": "adamw", "adamw8bit": "adamw8bit", "adamw_kahan": "adamw_kahan"}
_OTHER_OPTIMIZERS = (
    "adamw8bitkahan",
    "stableadamw",
    "sgd",
    "offload",
    "automagic",
    "genericoptim",
    "prodigy",
)


def translate_training(table: Mapping[str, Any], file: str = "") -> Translated:
    """A training TOML's table in our words. `file` is where it comes from, for the messages."""
    reader = ForeignReader(table, file)
    reader.drop_foreign(TRAINING_KEYS)
    for step in (
        _read_optimizer,
        _read_adapter_type,
        _read_transformer_dtype,
        _read_partition,
        _read_checkpointing,
        _read_batch_sizes,
        _read_switches,
    ):
        step(reader)
    if reader.has_said_something:
        _read_idle_evaluation(reader)
        for remark in remarks_on_training(table):
            reader.note(*remark)
    return reader.result(clip_mode=reader.table.pop(CLIP_MODE, None))


def translate_dataset(table: Mapping[str, Any], file: str = "", came_along: bool = False) -> Translated:
    """A dataset TOML's table in our words. `file` is where it comes from, for the messages.

    With `came_along` the training TOML that names it came from diffusion-pipe, so that keys which both have, and which do
    not mean quite the same, get a note too.
    """
    reader = ForeignReader(table, file)
    reader.drop_foreign(DATASET_KEYS)
    for _, prefix, level in reader.tables_at(("directory[]",), with_top=True):
        _read_pairs(
            reader, level, prefix, "resolutions", lambda w, h: round(math.sqrt(w * h)), "side lengths"
        )
        _read_pairs(reader, level, prefix, "ar_buckets", lambda w, h: round(w / h, 3), "width / height")
    _read_empty_captions(reader)
    if came_along:
        for remark in remarks_on_dataset(table):
            reader.note(*remark)
    return reader.result()


def check_clip_mode(
    mode: Any, datasets: Iterable[tuple[str, DatasetConfig]], file: str
) -> tuple[list[Problem], bool]:
    """What to say about `video_clip_mode` in the training TOML (None: it is not there), and whether that is a problem.

    `datasets` are the dataset TOMLs by path.

    diffusion-pipe has the key there, this project in the dataset TOML. It is taken where that says the same.
    """
    if mode is None:
        return [], False
    where = f"clips are chosen by {CLIP_MODE} of the dataset TOML"
    said = f"has no effect here: {where}"
    for path, dataset in datasets:
        modes = [one.video_clip_mode or dataset.video_clip_mode for one in dataset.directory or ()]
        different = next((one for one in modes if one != mode), None)
        if different is not None:
            reason = f"does not exist here: {where}, and {path} says {show(different)}"
            return [Problem(CLIP_MODE, reason, f"move {CLIP_MODE} = {show(mode)} there", file)], True
        said = f"has no effect here: {where}, which says the same"
    return [Problem(CLIP_MODE, said, "", file)], False


def _read_optimizer(reader: ForeignReader) -> None:
    """optimizer.type in their spelling, and the precision of what is trained, which here follows from it."""
    optimizer, adapter, model = (reader.section(name) for name in ("optimizer", "adapter", "model"))
    written = optimizer.get("type")
    trained = adapter.get("dtype", model.get("dtype", "bfloat16"))
    if isinstance(written, str):
        lower = written.lower()
        if lower == "adamw_optimi":
            # optimi compensates rounding where weights are stored in bfloat16, and is plain AdamW where they are not.
            optimizer["type"] = "adamw" if trained == "float32" else "adamw_kahan"
            reader.note("optimizer.type", f'"{written}" is "{optimizer["type"]}" here, and means the same')
        elif lower in _OTHER_OPTIMIZERS:
            del optimizer["type"]
            fix = (
                'write type = "adamw", "adamw8bit" (moments in 8 bits) or "adamw_kahan" (weights in bfloat16)'
            )
            if lower == "offload":
                fix += "; zero_stage = 1 shares the optimizer's state among copies"
            reader.refuse("optimizer.type", f'"{written}" does not exist here', fix, "optimizer.type")
        elif lower in _OPTIMIZERS and lower != written:
            optimizer["type"] = lower
            reader.note("optimizer.type", f'"{written}" is "{lower}" here, and means the same')
    kept = "bfloat16" if optimizer.get("type", "adamw") == "adamw_kahan" else "float32"
    _read_adapter_dtype(reader, adapter, kept)
    saved = reader.table.pop("save_dtype", None)
    if saved is not None and saved != kept:
        what = "the adapter is saved" if adapter else "what is trained is saved"
        reader.note("save_dtype", f"has no effect here: {what} as it is trained, in {kept} (optimizer.type)")
    elif saved is not None:
        reader.note("save_dtype", f"has no effect here: {kept} is the precision that is saved anyway")


def _read_adapter_dtype(reader: ForeignReader, adapter: dict[str, Any], kept: str) -> None:
    """adapter.dtype: the same where the optimizer keeps that precision, refused where it keeps another."""
    written = adapter.pop("dtype", None)
    if written is None:
        return
    if written == kept:
        reader.note("adapter.dtype", f"has no effect here: optimizer.type decides, and keeps {kept}")
        return
    reason = (
        f"does not exist here: an adapter is kept in the precision that optimizer.type asks for, here {kept}"
    )
    fix = 'take it out, or write optimizer.type = "adamw_kahan" for bfloat16'
    if written == "float32":
        fix = 'take it out, or write optimizer.type = "adamw" for float32'
    reader.refuse("adapter.dtype", reason, fix)


def _read_adapter_type(reader: ForeignReader) -> None:
    """adapter.type: LoKr is no adapter here."""
    adapter = reader.section("adapter")
    if adapter.get("type") != "lokr":
        return
    del adapter["type"]
    reader.refuse(
        "adapter.type",
        '"lokr" does not exist here',
        'write type = "lora" and a rank, e.g. rank = 16',
        "adapter.type",
    )
    rank = adapter.get("rank")
    if isinstance(rank, float):  # LoKr's way to say "no decomposition"
        del adapter["rank"]


def _read_transformer_dtype(reader: ForeignReader) -> None:
    """model.transformer_dtype: e4m3 by either of its names; the precision of the model itself says nothing."""
    model = reader.section("model")
    written = model.get("transformer_dtype")
    if written == "float8_e4m3fn":
        model["transformer_dtype"] = "float8"
        reader.note("model.transformer_dtype", '"float8_e4m3fn" is "float8" here')
    elif written is not None and written == model.get("dtype", "bfloat16"):
        del model["transformer_dtype"]
        reader.note("model.transformer_dtype", "has no effect here: it is model.dtype where it is not set")
    elif written in _OTHER_FLOAT8:
        del model["transformer_dtype"]
        reason = f'"{written}" does not exist here'
        fix = 'write "float8" (e4m3, one scale per output channel), or take it out'
        reader.refuse("model.transformer_dtype", reason, fix, "model.transformer_dtype")


def _read_partition(reader: ForeignReader) -> None:
    """partition_method: their default balances by numbers of weights, ours by work and memory."""
    if reader.table.get("partition_method") == "parameters":
        reader.table["partition_method"] = "cost"
        reader.note(
            "partition_method",
            '"parameters" is taken as "cost": stages are balanced by work and memory; the numbers are the same',
        )


def _read_checkpointing(reader: ForeignReader) -> None:
    """activation_checkpointing: the variant that keeps the blocks' inputs in host memory has another name here."""
    if reader.table.get("activation_checkpointing") == "unsloth":
        reader.table["activation_checkpointing"] = "offload"
        reader.note("activation_checkpointing", '"unsloth" is "offload" here, and means the same')


def _read_batch_sizes(reader: ForeignReader) -> None:
    """Micro-batches have one size, whatever the resolution, for images as for videos."""
    table = reader.table
    for name in ("micro_batch_size_per_gpu", "eval_micro_batch_size_per_gpu"):
        pairs = table.get(name)
        if isinstance(pairs, list) and pairs and all(map(_is_pair, pairs)):
            del table[name]
            reason = f"gives a size for each resolution, {show(pairs)}; here one holds for all"
            fix = f"write one number; the smallest of yours is {show(min(pair[1] for pair in pairs))}"
            reader.refuse(name, reason, fix, name)
    images = table.pop("image_micro_batch_size_per_gpu", None)
    if images is None:
        return
    here = "micro_batch_size_per_gpu holds for images too"
    if images == table.get("micro_batch_size_per_gpu", 1):
        reader.note("image_micro_batch_size_per_gpu", f"has no effect here: {here}")
    else:
        reader.refuse("image_micro_batch_size_per_gpu", f"does not exist here: {here}", "take it out")


def _read_switches(reader: ForeignReader) -> None:
    """The three switches of the mode: diffusion-pipe has none of them together, so one line says all that is to be added."""
    model = reader.table.get("model")
    if not isinstance(model, dict) or any(name in model for name in _SWITCHES):
        return
    reason = "has none of the three switches that say what is trained"
    fix = (
        "add cache_text_embeddings = true, train_text_encoder = false, freeze_transformer = true to train an adapter, which "
        "goes on cross_attn.{k,v} alone unless adapter.include says otherwise; or false, true, true to train UMT5"
    )
    reader.refuse("model", reason, fix)
    # In their place, so that nothing else is said about them.
    model |= {"cache_text_embeddings": True, "train_text_encoder": False, "freeze_transformer": True}
    reader.disregard(*(f"model.{name}" for name in _SWITCHES))


def _read_idle_evaluation(reader: ForeignReader) -> None:
    """Keys about evaluations without a dataset to evaluate: their examples have them, and here a rule refuses them."""
    if reader.table.get("eval_datasets"):
        return
    for name, key in keys_of(TrainConfig).items():
        if name.startswith("eval_") and name in reader.table and reader.table[name] != key.default:
            del reader.table[name]
            reader.note(name, "has no effect here: there are no eval_datasets")


def _read_pairs(
    reader: ForeignReader,
    table: dict[str, Any],
    prefix: str,
    name: str,
    to_number: Callable[[float, float], float],
    what: str,
) -> None:
    """A list of [width, height] pairs, which stand for one number each."""
    pairs = table.get(name)
    if not isinstance(pairs, list) or not any(isinstance(pair, list) for pair in pairs):
        return
    numbers = [to_number(*pair) for pair in pairs if _is_pair(pair)]
    if len(numbers) != len(pairs):
        return  # no list of pairs either: the schema says what it should be
    del table[name]
    reason = f"holds pairs of width and height; here they are {what}"
    reader.refuse(f"{prefix}{name}", reason, f"write {name} = {show(numbers)}", f"{prefix}{name}")


def _is_pair(pair: Any) -> bool:
    return (
        isinstance(pair, list)
        and len(pair) == 2
        and all(type(side) in (int, float) and 0 < side < math.inf for side in pair)
    )


def _read_empty_captions(reader: ForeignReader) -> None:
    """skip_empty_caption: missing_caption here, for the whole dataset."""
    table = reader.table
    written = table.pop("skip_empty_caption", None)
    words = {True: "skip", False: "empty"}
    if isinstance(written, bool) and "missing_caption" not in table:
        table["missing_caption"] = words[written]
        reader.note("skip_empty_caption", f'is missing_caption = "{words[written]}" here, and means the same')
    elif written is not None:
        reason = "does not exist here: missing_caption says what becomes of a file without a caption"
        reader.refuse("skip_empty_caption", reason, 'write missing_caption = "skip" or "empty" alone')
    default = keys_of(DatasetConfig)["missing_caption"].default
    for _, prefix, directory in reader.tables_at(("directory[]",)):
        own = directory.pop("skip_empty_caption", None)
        if own is None:
            continue
        if isinstance(own, bool) and words[own] == table.get("missing_caption", default):
            reader.note(
                f"{prefix}skip_empty_caption",
                f'is missing_caption = "{words[own]}" of the whole dataset here',
            )
        else:
            reason = "does not exist here: missing_caption holds for the whole dataset"
            fix = "take it out, and write missing_caption at the top level"
            reader.refuse(f"{prefix}skip_empty_caption", reason, fix)
