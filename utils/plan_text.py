"""A plan's document as one screen of text; see docs/plan.md for the document."""

from collections.abc import Iterable, Sequence
from typing import Any

from utils.stage_plan import size_text

_MOST_BUCKETS = 6


def plan_text(document: dict[str, Any]) -> str:
    """All of it, for people."""
    if "experts" in document:
        return "\n".join(_pair(document))
    sections = (_head, _data, _stages, _fit, _compute, _disk, _rest)
    return "\n".join(line for section in sections for line in section(document))


def _pair(document: dict[str, Any]) -> Iterable[str]:
    """Both runs of a pair, the second without what it has in common with the first, and what they come to."""
    told: set[str] = set()
    for number, (expert, plan) in enumerate(document["experts"].items(), start=1):
        yield f"--- expert {number} of {len(document['experts'])}: {expert} ---"
        own = (_stages, _fit, _compute)
        sections = (_head, *own) if told else (_head, _data, *own, _disk)
        for section in sections:
            yield from section(plan)
        rest = list(_rest(plan))
        yield from (line for line in rest if line not in told)
        told |= set(rest)
    together = document["together"]
    yield "--- both, one after the other on the same GPUs ---"
    yield f"{together['trainable_parameters']:,} trained parameters in all, in two adapters"
    yield "fits: " + "; ".join(
        f"{fit['gpu_gb']} GB {fit['verdict']} ({size_text(fit['needs'])})" for fit in together["fit"]
    )
    if together["run_seconds"] is not None:
        yield f"compute: {together['steps']:,} steps in all: {_duration(together['run_seconds'])}"
    exports = "" if together["exports"] is None else f", exports {size_text(together['exports'])}"
    yield f"disk: one cache for both; checkpoints {size_text(together['checkpoints'])}{exports}"


def _head(document: dict[str, Any]) -> Iterable[str]:
    model, training, parallel = document["model"], document["training"], document["parallel"]
    chosen = model["expert"]
    expert = "" if chosen is None else ", both experts" if chosen == "both" else f", {chosen} expert"
    low, high = model["noise_levels"]
    yield (
        f"{model['variant']}{expert}: {model['parameters_text']} parameters, {model['num_blocks']} blocks of width "
        f"{model['width']}; {model['layout']}; noise levels {low:g}-{high:g}{_share(model)}"
    )
    yield f"mode {document['mode']}: {_trained(training)}"
    ways = [f"activation_checkpointing {_toml(training['activation_checkpointing'])}"]
    ways += [f"blocks_to_swap {training['blocks_to_swap']}"] if training["blocks_to_swap"] else []
    ways += ["float8 DiT"] if training["transformer_dtype"] == "float8" else []
    ways += ["zero_stage 1"] if parallel["zero_stage"] else []
    yield f"  {training['dtype']}, {training['optimizer']}, {', '.join(ways)}"
    yield (
        f"GPUs: {parallel['gpus']} = {parallel['stages']} stage(s) x {parallel['copies']} copy(s); "
        f"{parallel['samples_per_step']} samples per step ({parallel['micro_batches_per_step_and_copy']} micro-batch(es) "
        f"of {parallel['micro_batch_size']} per copy)"
    )


def _share(model: dict[str, Any]) -> str:
    share = model["noise"]["share_of_range"]
    return "" if share > 0.9995 else f", {share:.1%} of the law"


def _trained(training: dict[str, Any]) -> str:
    number = f"{training['trainable_parameters_text']} trained parameters"
    if training["targets"]:
        targets = "; ".join(training["targets_text"])
        return f"{number}, rank {training['rank']} on {len(training['targets'])} modules: {targets}"
    if training["text_blocks"]:
        first, last = training["text_blocks"]
        return f"{number}: blocks {first}-{last} of UMT5"
    return number


def _data(document: dict[str, Any]) -> Iterable[str]:
    data = document["dataset"]
    if data["source"] == "dataset":
        skipped = sum(data["skipped"].values())
        left_out = f", {skipped} left out ({_counts(data['skipped'])})" if skipped else ""
        unseen = f", {data['files_not_examined']} not examined" if data["files_not_examined"] else ""
        yield f"dataset {data['path']}: {data['samples']} samples of {data['files']} files{left_out}{unseen}"
        yield (
            f"  mean sample {data['mean_video_tokens']:,.0f} tokens; longest caption about {data['longest_text_tokens']} "
            f"tokens; about {data['micro_batches_per_epoch']:,.0f} micro-batches per epoch"
        )
    else:
        yield f"dataset {data['path']}: no sample seen"
    shown = _shown_buckets(data["buckets"])
    many = f" ({len(data['buckets'])} in all)" if len(shown) < len(data["buckets"]) else ""
    texts = [
        f"{use['bucket']}: {use['tokens']:,} tokens" + (f" x {use['samples']}" if use["samples"] else "")
        for use in shown
    ]
    yield f"  buckets{many}: {'; '.join(texts)}"


def _shown_buckets(buckets: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """All where they are few, else the largest of each length."""
    if len(buckets) <= _MOST_BUCKETS:
        return list(buckets)
    by_frames: dict[int, dict[str, Any]] = {}
    for use in buckets:
        by_frames.setdefault(use["frames"], use)
    return list(by_frames.values())[:_MOST_BUCKETS]


def _stages(document: dict[str, Any]) -> Iterable[str]:
    buckets = _shown_buckets(document["dataset"]["buckets"])
    largest = buckets[0]["bucket"]
    names = [f"act. {use['bucket']}" for use in buckets]
    head = (
        "stage",
        "layers",
        "work",
        "weights",
        "trained",
        "grads",
        "optim",
        *names,
        "transfer",
        "device",
        "host",
    )
    rows = [head]
    for stage in document["stages"]:
        size = stage["bytes"]
        rows.append(
            (
                str(stage["stage"]),
                f"{stage['first_layer']}-{stage['last_layer']} ({stage['layers_text']})",
                f"{stage['work_share']:.0%}",
                *(size_text(size[key]) for key in ("weights", "trainables", "gradients", "optimizer")),
                *(size_text(stage["activations"][use["bucket"]]) for use in buckets),
                size_text(stage["transfers"][largest]),
                size_text(stage["device"][largest]),
                size_text(size["host"]),
            )
        )
    yield f"stages, as split for GPUs of {document['split_for_gpu_gb']:g} GB; transfer, device, host at {largest}:"
    yield from _table(rows)


def _fit(document: dict[str, Any]) -> Iterable[str]:
    yield "fits (80 % of a GPU at most, at the largest bucket):"
    rows = []
    for fit in document["fit"]:
        rows.append(
            (f"{fit['gpu_gb']} GB", f"needs {size_text(fit['needs'])}", fit["verdict"], _remedy_text(fit))
        )
    yield from _table(rows)


def _remedy_text(fit: dict[str, Any]) -> str:
    if fit["verdict"] == "fits":
        return ""
    if not fit["would_fit_with"]:
        return "no setting makes it fit"
    texts = [f"{one['text']} ({size_text(one['needs'])})" for one in fit["would_fit_with"]]
    return "would fit with " + "; or with ".join(texts)


def _compute(document: dict[str, Any]) -> Iterable[str]:
    compute = document["compute"]
    text = (
        f"compute: {_flops(compute['flops_per_step'])} per step; {_duration(compute['step_seconds'])} per step at "
        f"{compute['tflops_per_gpu']:g} TFLOP/s per GPU (--tflops)"
    )
    if compute["waiting_share"] > 0:
        text += f", of which stages wait {compute['waiting_share']:.0%}"
    yield text
    if compute["run_seconds"] is not None:
        yield f"  {compute['steps']:,} steps: {_duration(compute['run_seconds'])}"


def _disk(document: dict[str, Any]) -> Iterable[str]:
    disk = document["disk"]
    if disk["cache_latents"] is not None:
        yield (
            f"disk: cache {size_text(disk['cache_latents'])} of latents, {size_text(disk['cache_text'])} of text in "
            f"{disk['cache_dir']}{_free(disk['cache_free'])}"
        )
    exports = "" if disk["exports"] is None else f", {size_text(disk['exports'])} in all"
    yield (
        f"disk: checkpoints {size_text(disk['checkpoints'])} ({size_text(disk['checkpoint'])} each), exports "
        f"{size_text(disk['export'])} each{exports} in {disk['output_dir']}{_free(disk['output_free'])}"
    )


def _rest(document: dict[str, Any]) -> Iterable[str]:
    for note in document["notes"]:
        yield f"note: {note}"
    if document["missing"]:
        yield "missing, needed before training:"
        for one in document["missing"]:
            yield f"  {one['key']}: {one['reason']}" + (f" -> {one['fix']}" if one["fix"] else "")


def _table(rows: Sequence[Sequence[str]]) -> Iterable[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        yield ("  " + "  ".join(cells)).rstrip()


def _counts(skipped: dict[str, int]) -> str:
    return ", ".join(f"{count} {code.replace('_', ' ')}" for code, count in skipped.items())


def _free(num_bytes: int | None) -> str:
    return "" if num_bytes is None else f", {size_text(num_bytes)} free"


def _flops(number: float) -> str:
    for size, unit in ((1e15, "PFLOPs"), (1e12, "TFLOPs")):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number / 1e9:.3g} GFLOPs"


def _toml(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else f'"{value}"'


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.3g} s"
    minutes = seconds / 60
    if minutes < 100:
        return f"{minutes:.0f} min"
    hours = minutes / 60
    return f"{hours:.1f} h" if hours < 72 else f"{hours / 24:.1f} days"
