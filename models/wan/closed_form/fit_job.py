"""Solving from beginning to end, for the command and for training alike: both encoders run, every target solved, all told."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from models.wan.closed_form.fit_moments import FitMoments, collect
from models.wan.closed_form.fit_prompts import FitPlan, plan_fit
from models.wan.closed_form.fit_report import add_results, judge
from models.wan.closed_form.fit_search import Caps, Fitted, fit
from models.wan.closed_form.fit_solve import Solver
from models.wan.closed_form.fit_subject import FitSide, FitSubject
from models.wan.layouts import weight_files
from models.wan.probes.encoder_drift import load_text_embedding
from models.wan.probes.encoder_stream import open_encoder_pair
from models.wan.text_encoder import WanTokenizer
from utils.config.schema import ClosedFormConfig
from utils.errors import UserError
from utils.progress import Progress
from utils.report import Report, Verdict

Tell = Callable[[str], None]


@dataclass(frozen=True)
class Solved:
    """What was solved: an adapter for each side, in the order of the subject's, and what it rests on."""

    subject: FitSubject
    settings: ClosedFormConfig
    fitted: tuple[Fitted, ...]
    moments: FitMoments

    def judged(self) -> tuple[Verdict, str]:
        """The verdict over all sides, and the sentence that explains it."""
        return judge(self.fitted)


def plan_of(settings: ClosedFormConfig) -> FitPlan:
    """The prompts that the settings name.

    Raises:
        UserError: as `plan_fit`.
    """
    names = (settings.prompts, settings.domain_prompts, settings.keywords_file)
    prompts, domain_prompts, keywords_file = (None if name is None else Path(name) for name in names)
    return plan_fit(prompts, domain_prompts, keywords_file, settings.seed)


def solve_adapters(
    subject: FitSubject, plan: FitPlan, settings: ClosedFormConfig, device: torch.device, tell: Tell
) -> Solved:
    """Solve for the adapter of each side, with progress shown.

    Args:
        subject: encoders, DiTs and targets.
        plan: the prompts.
        settings: how.
        device: where.
        tell: gets each remark, for people and for a report.

    Raises:
        UserError: encoders or tokenizers do not belong together, a state is not finite, there are too few prompts, caps
            cannot be met, or the GPU's memory does not suffice.
    """
    for remark in plan.remarks:
        tell(remark)
    try:
        moments = _gather(subject, plan, settings, device, tell)
        fitted = [
            _solve(side, own, settings, device, tell)
            for side, own in zip(subject.sides, moments, strict=True)
        ]
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"the memory of {device} does not suffice to solve; free some, or solve with --device cpu"
        ) from error
    return Solved(subject, settings, tuple(fitted), moments[0])


def _gather(
    subject: FitSubject, plan: FitPlan, settings: ClosedFormConfig, device: torch.device, tell: Tell
) -> list[FitMoments]:
    """Moments for each DiT, from one pass of both encoders."""
    pair = open_encoder_pair(subject.base, subject.tuned)
    if pair.is_partial:
        tell(f"{subject.tuned}: holds only the trained tensors; all others are the base's")
    tokenise = _common_tokenizer(subject, plan)
    embeds = [
        load_text_embedding(side.paths.transformer_dir, pair.sizes.d_model, device) for side in subject.sides
    ]
    progress = Progress("encoders", (pair.sizes.num_layers + 2) * len(plan.prompts))
    try:
        dtype: torch.dtype = getattr(torch, settings.dtype)
        return collect(pair, plan, tokenise, embeds, dtype, device, lambda count: progress.advance(count))
    finally:
        progress.close()


def _common_tokenizer(subject: FitSubject, plan: FitPlan) -> Callable[[str], list[int]]:
    """The base's tokenizer, after it was held against the tuned encoder's own, where that has one."""
    tokenizer = WanTokenizer(subject.tokenizer)
    if (
        subject.tuned_tokenizer is not None
        and subject.tuned_tokenizer.resolve() != subject.tokenizer.resolve()
    ):
        other = WanTokenizer(subject.tuned_tokenizer)
        differing = sum(tokenizer(prompt.text) != other(prompt.text) for prompt in plan.prompts)
        if differing:
            raise UserError(
                f"{subject.tuned_tokenizer}: cuts {differing} of {len(plan.prompts)} prompts into other tokens than "
                f"{subject.tokenizer}, so the encoders have no tokens in common; give the encoder that was tuned from this base"
            )
    return tokenizer


def _solve(
    side: FitSide, moments: FitMoments, settings: ClosedFormConfig, device: torch.device, tell: Tell
) -> Fitted:
    """The adapter of one DiT."""
    label = "targets" if side.expert is None else f"targets of {side.expert}"
    solver = Solver(moments, side.source, side.targets, side.adapter.rank, settings.keep_weight, device)
    ridge = None if settings.ridge == "auto" else settings.ridge
    progress = Progress(label, len(side.targets))
    try:
        found = fit(solver, ridge, _caps_of(side, settings), lambda: progress.advance(1))
    finally:
        progress.close()
    if found.ridge != found.best_ridge:
        before, after = found.unbounded.recovery, found.bounded.recovery
        tell(
            f"{label}: the cap needs a ridge of {found.ridge:.3g} in place of {found.best_ridge:.3g}; recovery (two blocks) "
            f"{after:.1%} in place of {before:.1%}"
        )
    return found


def _caps_of(side: FitSide, settings: ClosedFormConfig) -> Caps:
    """The settings' own cap, else that of [budget], else none."""
    budget, own = side.config.budget, settings.max_delta_ratio
    if budget is None:
        return Caps(own, None)
    return Caps(budget.max_delta_ratio if own is None else own, budget.max_mean_delta_ratio)


def fill_report(report: Report, solved: Solved, config: Path | str) -> None:
    """Caps, inputs, numbers, tables and plots. Private files are not named.

    Args:
        report: to be written by the caller, with the verdict.
        solved: what it is about.
        config: the TOML that it was solved by.
    """
    settings, subject = solved.settings, solved.subject
    caps = _caps_of(subject.sides[0], settings)
    own = "its own cap" if settings.max_delta_ratio is not None else f"[budget] of {config}"
    if caps.max_ratio is not None:
        report.cap("max_delta_ratio", caps.max_ratio, f"met by every module; from {own}")
    if caps.max_mean_ratio is not None:
        report.cap("max_mean_delta_ratio", caps.max_mean_ratio, f"met by the mean; from [budget] of {config}")
    report.add_input("config", config)
    for role, place in (("text_encoder", subject.tuned), ("base_text_encoder", subject.base)):
        for file in weight_files(place):
            report.add_input(role, file)
    for side in subject.sides:
        for file in side.source.files:
            report.add_input("base", file)
    # Where keywords decide, the file of neutral prompts holds the domain's too.
    private = {"domain_prompts": settings.domain_prompts, "keywords_file": settings.keywords_file}
    if settings.keywords_file is not None:
        private["prompts"] = settings.prompts
    elif settings.prompts is not None:
        report.add_input("prompts", settings.prompts)
    for name, path in private.items():
        if path is not None:
            report.note(f"{name}: a private file, neither named nor fingerprinted here")
    report.metric(
        "keep_weight", settings.keep_weight, "of all domain tokens together; all neutral ones weigh 1"
    )
    add_results(report, subject.sides, solved.fitted, solved.moments)
