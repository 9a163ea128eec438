"""The rules about `[adapter.closed_form]` that need no checkpoint; `models/wan/preflight.py` has those that do."""

import os
from pathlib import Path

from utils.config.experts import on_each_side
from utils.config.rules import Rule
from utils.config.sample_rules import DEVICE
from utils.config.schema import ClosedFormConfig, Problem, TrainConfig

_SECTION = "adapter.closed_form"
_CLOSED_FORM = 'adapter.init = "closed_form"'


def is_solved_for(config: TrainConfig) -> bool:
    """Whether training solves for the adapter that it starts from."""
    return config.adapter is not None and config.adapter.init == "closed_form"


def closed_form_of(config: TrainConfig) -> ClosedFormConfig:
    """`[adapter.closed_form]`, its defaults where there is none."""
    given = None if config.adapter is None else config.adapter.closed_form
    return ClosedFormConfig() if given is None else given


def closed_form_reports_dir(config: TrainConfig) -> str:
    """Where the report of the solve goes: the directory of all reports of the run."""
    own = closed_form_of(config).reports_dir
    if own is not None:
        return own
    return "reports" if config.probes is None else config.probes.reports_dir


def check_closed_form_section(config: TrainConfig) -> list[Problem]:
    """[adapter.closed_form] stands only with adapter.init = "closed_form"."""
    adapter = config.adapter
    if adapter is None or adapter.closed_form is None or is_solved_for(config):
        return []
    reason = f'would be ignored: adapter.init is "{adapter.init}", so nothing is solved for'
    return [Problem(_SECTION, reason, f"write {_CLOSED_FORM}, or take the section out")]


@on_each_side
def check_closed_form_start(config: TrainConfig) -> list[Problem]:
    """adapter.init = "closed_form" starts from no existing adapter."""
    if config.adapter is None or config.adapter.init_from_existing is None or not is_solved_for(config):
        return []
    reason = f"is given together with {_CLOSED_FORM}: an adapter starts from the one or from the other"
    return [Problem("adapter.init_from_existing", reason, "take one of the two out")]


def check_closed_form_encoder(config: TrainConfig) -> list[Problem]:
    """adapter.init = "closed_form" needs model.llm_path, the tuned encoder; the base is that of ckpt_path."""
    model = config.model
    if not is_solved_for(config) or model.train_text_encoder or model.llm_path is not None:
        return []
    reason = f"is not set, and {_CLOSED_FORM} solves for what makes the DiT answer to a tuned encoder as to the base"
    return [Problem("model.llm_path", reason, "name the tuned encoder, or take adapter.init out")]


def check_closed_form_prompts(config: TrainConfig) -> list[Problem]:
    """Of adapter.closed_form.domain_prompts and keywords_file one is given at most."""
    closed_form = closed_form_of(config)
    if closed_form.domain_prompts is None or closed_form.keywords_file is None:
        return []
    reason = "is given together with domain_prompts: which of the two says what is to stay is not clear"
    return [Problem(f"{_SECTION}.keywords_file", reason, "take one of the two out")]


def check_closed_form_device(config: TrainConfig) -> list[Problem]:
    """adapter.closed_form.device is cpu, cuda or cuda:N."""
    device = closed_form_of(config).device
    if device is None or DEVICE.fullmatch(device):
        return []
    reason = f'is "{device}", which is no device'
    return [Problem(f"{_SECTION}.device", reason, 'write "cpu", "cuda" or "cuda:N"')]


def check_closed_form_reports_place(config: TrainConfig) -> list[Problem]:
    """adapter.closed_form.reports_dir and output_dir are not inside each other."""
    # That of [probes] has a rule of its own.
    if not is_solved_for(config) or (
        closed_form_of(config).reports_dir is None and config.probes is not None
    ):
        return []
    named, output_dir = closed_form_reports_dir(config), config.output_dir
    reports, output = Path(os.path.realpath(named)), Path(os.path.realpath(output_dir))
    if not (reports.is_relative_to(output) or output.is_relative_to(reports)):
        return []
    reason = f'is "{named}" and output_dir is "{output_dir}": training output and reports never mix'
    return [
        Problem(f"{_SECTION}.reports_dir", reason, 'choose places apart, e.g. "reports" and "output/<name>"')
    ]


CLOSED_FORM_RULES = (
    Rule(check_closed_form_section, ("adapter.closed_form", "adapter.init")),
    Rule(check_closed_form_start, ("adapter.init_from_existing", "adapter.init")),
    Rule(check_closed_form_encoder, ("adapter.init", "model.llm_path", "model.train_text_encoder")),
    Rule(
        check_closed_form_prompts, ("adapter.closed_form.domain_prompts", "adapter.closed_form.keywords_file")
    ),
    Rule(check_closed_form_device, ("adapter.closed_form.device",)),
    Rule(
        check_closed_form_reports_place,
        ("adapter.closed_form.reports_dir", "adapter.init", "probes.reports_dir", "output_dir"),
    ),
)
