"""The rules about `[samples]` that need no checkpoint; `models/wan/sample_defaults.py` has those that do."""

import os
import re
from pathlib import Path

from utils.config.experts import is_pair
from utils.config.rules import Rule
from utils.config.schema import Problem, TrainConfig

_SIZE = re.compile(r"(\d{1,6})[xX*](\d{1,6})")
DEVICE = re.compile(r"cpu|cuda(:\d{1,3})?")


def parse_size(text: str) -> tuple[int, int] | None:
    """Width and height in px of a text such as `832x480`; None where it is no size."""
    match = _SIZE.fullmatch(text.strip())
    return None if match is None else (int(match[1]), int(match[2]))


def samples_reports_dir(config: TrainConfig) -> str:
    """Where the grids of `[samples]` go: the directory of all reports of the run."""
    if config.samples is not None and config.samples.reports_dir is not None:
        return config.samples.reports_dir
    return "reports" if config.probes is None else config.probes.reports_dir


def check_sample_epochs(config: TrainConfig) -> list[Problem]:
    """samples.every_n_epochs is a multiple of save_every_n_epochs: a grid is drawn of what an epoch has saved."""
    if config.samples is None:
        return []
    wanted, saved = config.samples.every_n_epochs, config.save_every_n_epochs
    key = "samples.every_n_epochs"
    if saved == 0:
        reason = f"is {wanted}, and save_every_n_epochs = 0 saves no epoch before the last"
        return [Problem(key, reason, f"write save_every_n_epochs = {wanted}")]
    if wanted % saved == 0:
        return []
    reason = f"is {wanted}, and save_every_n_epochs = {saved} does not save epoch {wanted}"
    above = -(-wanted // saved) * saved
    fitting = f"write {above}" if above == saved else f"write {above - saved} or {above}"
    return [Problem(key, reason, f"{fitting}, or save_every_n_epochs = {wanted}")]


def check_sample_size(config: TrainConfig) -> list[Problem]:
    """samples.size is width x height in px, such as 832x480."""
    if config.samples is None or config.samples.size is None or parse_size(config.samples.size) is not None:
        return []
    return [Problem("samples.size", f'is "{config.samples.size}", which is no size', 'write it as "832x480"')]


def check_sample_device(config: TrainConfig) -> list[Problem]:
    """samples.device is cpu, cuda or cuda:N."""
    if config.samples is None or DEVICE.fullmatch(config.samples.device):
        return []
    reason = f'is "{config.samples.device}", which is no device'
    return [Problem("samples.device", reason, 'write "cpu", "cuda" or "cuda:N"')]


def check_sample_encoder(config: TrainConfig) -> list[Problem]:
    """samples in encoder_ft need save_text_encoder_full: a grid is drawn with a whole encoder."""
    model = config.model
    if config.samples is None or not model.train_text_encoder or model.save_text_encoder_full:
        return []
    reason = "is drawn with a whole text encoder, and save_text_encoder_full = false saves a part of one"
    return [Problem("samples", reason, "take [samples] out, or write model.save_text_encoder_full = true")]


def check_sample_expert(config: TrainConfig) -> list[Problem]:
    """samples.expert is not the expert that the trained adapter is of no use to."""
    if config.samples is None or config.samples.expert is None or config.model.train_text_encoder:
        return []
    expert = config.samples.expert
    if is_pair(config):
        reason = f'is "{expert}", and the adapter of the other expert would be drawn without it'
        return [Problem("samples.expert", reason, "take it out: both experts draw")]
    if config.model.expert in (None, expert):
        return []
    reason = f'is "{expert}", and the adapter is for {config.model.expert}, so it would change nothing'
    return [Problem("samples.expert", reason, f'write "{config.model.expert}", or take it out')]


def check_sample_reports_place(config: TrainConfig) -> list[Problem]:
    """samples.reports_dir is that of [probes], which look for the grid there, and not where training writes."""
    if config.samples is None:
        return []
    named, output_dir = samples_reports_dir(config), config.output_dir
    reports, output = Path(os.path.realpath(named)), Path(os.path.realpath(output_dir))
    if config.probes is not None and reports != Path(os.path.realpath(config.probes.reports_dir)):
        reason = f'is "{named}", and [probes] reports to "{config.probes.reports_dir}", where its reports look for the grid'
        return [Problem("samples.reports_dir", reason, "take it out: that of [probes] counts")]
    # That of [probes] has a rule of its own.
    if config.probes is not None or not (reports.is_relative_to(output) or output.is_relative_to(reports)):
        return []
    reason = (
        f'is "{named}" and output_dir is "{output_dir}": training output and the reports of probes never mix'
    )
    return [Problem("samples.reports_dir", reason, 'choose places apart, e.g. "reports" and "output/<name>"')]


SAMPLE_RULES = (
    Rule(check_sample_epochs, ("samples.every_n_epochs", "save_every_n_epochs")),
    Rule(check_sample_size, ("samples.size",)),
    Rule(check_sample_device, ("samples.device",)),
    Rule(check_sample_encoder, ("model.train_text_encoder", "model.save_text_encoder_full")),
    Rule(check_sample_expert, ("samples.expert", "model.expert", "model.train_text_encoder")),
    Rule(check_sample_reports_place, ("samples.reports_dir", "probes.reports_dir", "output_dir")),
)
