"""How far training has moved the encoder's states of neutral prompts, measured on the stages that train it."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.wan.arch import WanArch
from models.wan.prompts import neutral_prompts
from models.wan.stages import TextNormLayer, TextWire
from models.wan.text_encoder import WanTokenizer, pad_token_ids
from utils.distributed import gather_objects
from utils.layers import PreparedBatch
from utils.pipeline import Pipeline
from utils.text_drift import StateDrift, compare_states, mean_drift

_PROMPTS_IN_A_PASS = 8


class NeutralDrift:
    """1 - the mean cosine between the states of the encoder as it is now and as it was before any training.

    The prompts go through all stages like an evaluation's micro-batches, each with the smallest latent there is: the DiT
    behind the encoder then costs little, and no layer has to know about it.
    """

    def __init__(self, arch: WanArch, tokenizer_dir: Path, prompts_file: str | None) -> None:
        """Read the prompts.

        Args:
            arch: of the DiT.
            tokenizer_dir: of UMT5's tokenizer.
            prompts_file: neutral prompts, one per line; None for those that are shipped. Wan's own two are added.

        Raises:
            UserError: the file cannot be used.
        """
        self._arch = arch
        tokenizer = WanTokenizer(tokenizer_dir)
        prompts = neutral_prompts(prompts_file)
        ids = sorted((tokenizer(prompt) for prompt in prompts), key=len)
        self._passes = [
            ids[start : start + _PROMPTS_IN_A_PASS] for start in range(0, len(ids), _PROMPTS_IN_A_PASS)
        ]
        self._base: list[Tensor] = []

    def begin(self, pipeline: Pipeline) -> None:
        """Remember the states of the encoder as it was read from the base's file. Every rank must call it."""
        self._base = self._states(pipeline)

    def measure(self, pipeline: Pipeline) -> float:
        """The drift of now; NaN where a state is not finite. Every rank must call it, and gets the same number."""
        now = self._states(pipeline)
        own = [compare_states(base, tuned) for base, tuned in zip(self._base, now, strict=True)]
        shares: list[list[StateDrift]] = gather_objects(own)
        return mean_drift(next(share for share in shares if share))

    def _states(self, pipeline: Pipeline) -> list[Tensor]:
        """Each prompt's states [L, D] at its true length, on the stage that ends the encoder; elsewhere nothing."""
        found: list[Tensor] = []
        with _captured(pipeline.module, found):
            pipeline.forward_only([self._batch(ids, pipeline) for ids in self._passes])
        return found

    def _batch(self, token_ids: Sequence[Sequence[int]], pipeline: Pipeline) -> PreparedBatch:
        text, lens_B = pad_token_ids(token_ids)
        count = len(token_ids)
        inputs = TextWire(
            text=text,
            lens_B=lens_B,
            latents_BCFHW=torch.zeros(count, self._arch.in_dim, 1, 2, 2),
            timesteps_BT=torch.zeros(count, 1),
            seed=torch.zeros(1, dtype=torch.int64),
        )
        target_BCFHW = torch.zeros(count, self._arch.out_dim, 1, 2, 2)
        zeros_B = torch.zeros(count)
        labels = (target_BCFHW, zeros_B, zeros_B, torch.zeros(count, dtype=torch.int64))
        return PreparedBatch(
            tuple(inputs) if pipeline.is_first else None, labels if pipeline.is_last else None
        )


@contextmanager
def _captured(stage: torch.nn.Module, found: list[Tensor]) -> Iterator[None]:
    """For the body, what the encoder's last layer returns on this stage is put into `found`, prompt by prompt."""

    def keep(_module: torch.nn.Module, _inputs: Any, output: Any) -> None:
        wire = TextWire(*output)
        states = wire.text.detach().float().cpu()
        found.extend(row[:length].clone() for row, length in zip(states, wire.lens_B.tolist(), strict=True))

    hooks = [
        module.register_forward_hook(keep) for module in stage.modules() if isinstance(module, TextNormLayer)
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
