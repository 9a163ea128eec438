"""The diffusion transformer of Wan 2.2 (T2V, I2V, TI2V), written for one device; parameter names are the official ones.

Shapes: B batch, C channels, F latent frames, H W token rows and columns, S = F*H*W video tokens, L text tokens,
D width, T = 1 (one timestep per sample) or F (one per latent frame, image-conditioned TI2V).

Precision is part of the modules: projections inside blocks and the text embedding are stored and run in
`compute_dtype`; patch embedding, time embedding, modulation, norms and head in float32; the residual stream in
`residual_dtype`. With float32 residuals a bfloat16 model errs as little as the official autocast code.

The hidden state keeps its grid, [B, F, H, W, D], so that its shape says the positions and a modulation per frame,
[B, T, 1, 1, D], broadcasts over it: no per-token modulation is ever built.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.wan.arch import PATCH_SIZE, WanArch
from models.wan.attention import KeysAndValues, WanAttention
from models.wan.lean import gated_add, norm_scale_shift
from models.wan.rope import rope_table

_MAX_PERIOD = 10000.0


def timestep_sinusoid(timesteps: Tensor, width: int) -> Tensor:
    """Sinusoidal embedding of timesteps in [0, 1000], any shape [...] -> [..., width] float32.

    Computed in float64, as the official code does: in float32 the error at t = 999 is 3e-5, which is the largest
    single difference between published implementations.
    """
    half = width // 2
    frequency = _MAX_PERIOD ** -(torch.arange(half, dtype=torch.float64, device=timesteps.device) / half)
    angle = timesteps.double().unsqueeze(-1) * frequency
    return torch.cat((angle.cos(), angle.sin()), dim=-1).float()


class WanEmbedding(nn.Module):
    """Everything before the first block: patches, timestep and text."""

    def __init__(self, arch: WanArch, compute_dtype: torch.dtype, residual_dtype: torch.dtype) -> None:
        super().__init__()
        dim = arch.dim
        self.arch = arch
        self.compute_dtype = compute_dtype
        self.residual_dtype = residual_dtype
        self.patch_embedding = nn.Conv3d(arch.in_dim, dim, kernel_size=PATCH_SIZE, stride=PATCH_SIZE)
        self.text_embedding = nn.Sequential(
            nn.Linear(arch.text_dim, dim, dtype=compute_dtype),
            nn.GELU(approximate="tanh"),
            nn.Linear(dim, dim, dtype=compute_dtype),
        )
        self.time_embedding = nn.Sequential(nn.Linear(arch.freq_dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(dim, dim * 6))

    def embed(
        self,
        latents_BCFHW: Tensor,
        timesteps_BT: Tensor,
        text_BLD: Tensor,
        ready_BLD: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Embed one batch.

        Args:
            latents_BCFHW: noisy latents, for I2V with the conditioning channels behind them.
            timesteps_BT: 0..1000; one column, or one per latent frame.
            text_BLD: text states, zero behind each caption's end. Padded here with zeros to `text_len` rows: the
                official model attends to all of them, and without them its output differs by 30 %.
            ready_BLD: `embed_text(text_BLD)`, where it has been made before.

        Returns:
            hidden_BFHWD (residual dtype), time_BTD (float32), modulation_BT6D (float32), text_BLD (compute dtype).
        """
        hidden_BDFHW = self.patch_embedding(latents_BCFHW.float())
        hidden = hidden_BDFHW.permute(0, 2, 3, 4, 1).to(self.residual_dtype).contiguous()
        time_BTD = self.time_embedding(timestep_sinusoid(timesteps_BT, self.arch.freq_dim))
        modulation = self.time_projection(time_BTD).unflatten(-1, (6, self.arch.dim))
        text = self.embed_text(text_BLD) if ready_BLD is None else ready_BLD
        return hidden, time_BTD, modulation, text

    def embed_text(self, text_BLD: Tensor) -> Tensor:
        """The text's part of `embed`."""
        padding = self.arch.text_len - text_BLD.shape[1]
        return self.text_embedding(F.pad(text_BLD.to(self.compute_dtype), (0, 0, 0, padding)))


class WanBlock(nn.Module):
    """Self-attention, cross-attention to the text, feed-forward; the first and last modulated by the timestep.

    `lean`: what lies between the matrix products in few passes over memory (`lean.py`), or else by the plain formulas.
    """

    def __init__(self, arch: WanArch, compute_dtype: torch.dtype, lean: bool = True) -> None:
        super().__init__()
        dim, eps = arch.dim, arch.eps
        self.lean = lean
        self.compute_dtype = compute_dtype
        self.head_dim = arch.head_dim
        self.norm1 = nn.LayerNorm(dim, eps, elementwise_affine=False)
        self.self_attn = WanAttention(dim, arch.num_heads, eps, compute_dtype, lean)
        self.norm3 = nn.LayerNorm(dim, eps)
        self.cross_attn = WanAttention(dim, arch.num_heads, eps, compute_dtype, lean)
        self.norm2 = nn.LayerNorm(dim, eps, elementwise_affine=False)
        self.ffn = nn.Sequential(
            nn.Linear(dim, arch.ffn_dim, dtype=compute_dtype),
            nn.GELU(approximate="tanh"),
            nn.Linear(arch.ffn_dim, dim, dtype=compute_dtype),
        )
        self.modulation = nn.Parameter(torch.zeros(1, 6, dim))

    def forward(
        self,
        hidden_BFHWD: Tensor,
        modulation_BT6D: Tensor,
        text_BLD: Tensor,
        ready: KeysAndValues | None = None,
    ) -> Tensor:
        """One block; returns the new hidden state in the shape and dtype of the old. `ready` as of `attend_text`."""
        return self.body(hidden_BFHWD, modulation_BT6D, text_BLD, self.rope(hidden_BFHWD), ready)

    def body(
        self,
        hidden_BFHWD: Tensor,
        modulation_BT6D: Tensor,
        text_BLD: Tensor,
        table: tuple[Tensor, Tensor],
        ready: KeysAndValues | None = None,
    ) -> Tensor:
        """The block for any arrangement of its tokens over F, H and W that the modulation fits: `table` has their places."""
        rows = self.modulation_rows(modulation_BT6D)
        hidden = self.attend_self(hidden_BFHWD, rows, table)
        return self.feed_forward(self.attend_text(hidden, text_BLD, ready), rows)

    def attend_self(self, hidden_BFHWD: Tensor, rows: list[Tensor], table: tuple[Tensor, Tensor]) -> Tensor:
        """The first third: video tokens look at each other. `rows` as of `modulation_rows`, `table` as of `rope`."""
        states = self.self_attn_input(hidden_BFHWD, rows)
        mixed = self.self_attn(states, states, table).view_as(hidden_BFHWD)
        return self._gated_add(hidden_BFHWD, mixed, rows[2])

    def attend_text(
        self, hidden_BFHWD: Tensor, text_BLD: Tensor, ready: KeysAndValues | None = None
    ) -> Tensor:
        """The second third: video tokens look at the text, of which keys and values may be `ready`."""
        mixed = self.cross_attn(self.cross_attn_input(hidden_BFHWD), text_BLD, None, ready)
        return (hidden_BFHWD + mixed.view_as(hidden_BFHWD)).to(hidden_BFHWD.dtype)

    def feed_forward(self, hidden_BFHWD: Tensor, rows: list[Tensor]) -> Tensor:
        """The last third: each token by itself."""
        states = self._modulated(self.norm2, hidden_BFHWD, rows[4], rows[3])
        return self._gated_add(hidden_BFHWD, self.ffn(states).view_as(hidden_BFHWD), rows[5])

    def self_attn_input(self, hidden_BFHWD: Tensor, rows: list[Tensor]) -> Tensor:
        """What self-attention sees of the hidden state, [B, S, D] in compute_dtype."""
        return self._modulated(self.norm1, hidden_BFHWD, rows[1], rows[0])

    def cross_attn_input(self, hidden_BFHWD: Tensor) -> Tensor:
        """What cross-attention's queries are made of, [B, S, D] in compute_dtype."""
        if self.lean:
            norm = self.norm3
            return norm_scale_shift(
                hidden_BFHWD, norm.weight, norm.bias, norm.eps, self.compute_dtype
            ).flatten(1, 3)
        return self._flat(self.norm3(hidden_BFHWD.float()))

    def rope(self, hidden_BFHWD: Tensor) -> tuple[Tensor, Tensor]:
        """The rotary table of the hidden state's grid."""
        _, frames, height, width, _ = hidden_BFHWD.shape
        return rope_table((frames, height, width), self.head_dim, hidden_BFHWD.device)

    def modulation_rows(self, modulation_BT6D: Tensor) -> list[Tensor]:
        """Shift, scale and gate of self-attention, then those of the feed-forward: float32 [B, T, 1, 1, D] each."""
        return [row.unsqueeze(2).unsqueeze(2) for row in (self.modulation + modulation_BT6D).unbind(2)]

    def _modulated(self, norm: nn.LayerNorm, hidden_BFHWD: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        if self.lean:
            states = norm_scale_shift(hidden_BFHWD, 1 + scale, shift, norm.eps, self.compute_dtype)
            return states.flatten(1, 3)
        return self._flat(norm(hidden_BFHWD.float()) * (1 + scale) + shift)

    def _gated_add(self, hidden_BFHWD: Tensor, mixed_BFHWD: Tensor, gate: Tensor) -> Tensor:
        if self.lean:
            return gated_add(hidden_BFHWD, mixed_BFHWD, gate)
        return (hidden_BFHWD + mixed_BFHWD * gate).to(hidden_BFHWD.dtype)

    def _flat(self, states_BFHWD: Tensor) -> Tensor:
        return states_BFHWD.to(self.compute_dtype).flatten(1, 3)


class WanHead(nn.Module):
    """Final norm, modulation and projection of each token to its patch of velocity, in float32."""

    def __init__(self, arch: WanArch) -> None:
        super().__init__()
        self.out_dim = arch.out_dim
        self.norm = nn.LayerNorm(arch.dim, arch.eps, elementwise_affine=False)
        self.head = nn.Linear(arch.dim, arch.out_dim * PATCH_SIZE[0] * PATCH_SIZE[1] * PATCH_SIZE[2])
        self.modulation = nn.Parameter(torch.zeros(1, 2, arch.dim))

    def forward(self, hidden_BFHWD: Tensor, time_BTD: Tensor) -> Tensor:
        """Return velocity_BCFHW, float32, at latent resolution."""
        shift, scale = (
            row.unsqueeze(2).unsqueeze(2) for row in (self.modulation + time_BTD.unsqueeze(2)).unbind(2)
        )
        patches = self.head(self.norm(hidden_BFHWD.float()) * (1 + scale) + shift)
        pf, ph, pw = PATCH_SIZE
        batch, frames, rows, columns, _ = patches.shape
        patches = patches.view(batch, frames, rows, columns, pf, ph, pw, self.out_dim)
        return patches.permute(0, 7, 1, 4, 2, 5, 3, 6).reshape(
            batch, self.out_dim, frames * pf, rows * ph, columns * pw
        )


class WanTransformer(WanEmbedding):
    """The whole DiT on one device: the reference that the pipeline is compared with."""

    def __init__(
        self,
        arch: WanArch,
        compute_dtype: torch.dtype = torch.float32,
        residual_dtype: torch.dtype = torch.float32,
        lean: bool = True,
    ) -> None:
        super().__init__(arch, compute_dtype, residual_dtype)
        self.blocks = nn.ModuleList(WanBlock(arch, compute_dtype, lean) for _ in range(arch.num_layers))
        self.head = WanHead(arch)

    def forward(self, latents_BCFHW: Tensor, timesteps_BT: Tensor, text_BLD: Tensor) -> Tensor:
        """Predict velocity_BCFHW (float32) = noise - clean latents."""
        hidden, time_BTD, modulation, text = self.embed(latents_BCFHW, timesteps_BT, text_BLD)
        for block in self.blocks:
            hidden = block(hidden, modulation, text)
        return self.head(hidden, time_BTD)
