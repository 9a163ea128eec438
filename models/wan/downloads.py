"""Which public repository each part of Wan 2.2 is in, and the command that downloads it."""

import shlex
from pathlib import Path
from typing import Literal

from models.wan.arch import VariantInfo
from utils.config.schema import Expert

DownloadPart = Literal["everything", "transformer", "text_encoder", "vae", "tokenizer"]
REPOSITORIES = {
    "ti2v-5b": "Wan-AI/Wan2.2-TI2V-5B",
    "t2v-a14b": "Wan-AI/Wan2.2-T2V-A14B",
    "i2v-a14b": "Wan-AI/Wan2.2-I2V-A14B",
}
TEXT_ENCODER_FILE = "models_t5_umt5-xxl-enc-bf16.pth"
# What this project saves a tuned encoder as, but for the official `.pth`.
TEXT_ENCODER_WEIGHTS = "text_encoder.safetensors"
VAE_FILES = {"2.1": "Wan2.1_VAE.pth", "2.2": "Wan2.2_VAE.pth"}
TOKENIZER_DIR = "google/umt5-xxl"
EXPERT_DIRS: dict[Expert, str] = {"high_noise": "high_noise_model", "low_noise": "low_noise_model"}
# diffusers keeps the high-noise expert under the plain name.
DIFFUSERS_EXPERTS: dict[Expert, str] = {"high_noise": "transformer", "low_noise": "transformer_2"}
_INDEX = "diffusion_pytorch_model.safetensors.index.json"
_SHARD = "diffusion_pytorch_model-{number:05d}-of-00003.safetensors"
_NUM_SHARDS = 3  # of TI2V-5B, whose DiT lies beside the other parts, so that no pattern of folders names it


def download_command(
    part: DownloadPart,
    variant: VariantInfo | None,
    expert: Expert | None,
    target: Path,
    *,
    diffusers: bool = False,
) -> str:
    """The command that downloads a part of the published model into `target`, in the layout that `target` has.

    Args:
        part: what is missing.
        variant: of the model; None where nothing tells it, and the command names the others too where it matters.
        expert: of A14B, the one that is wanted; None for both.
        target: the checkpoint's directory.
        diffusers: whether `target` is laid out as diffusers does.
    """
    depends = part not in ("text_encoder", "tokenizer")  # these two are the same in all
    unknown = variant is None
    name = variant.name if variant is not None else ("t2v-a14b" if expert else "ti2v-5b")
    suffix = "-Diffusers" if diffusers else ""
    what = _diffusers_files(part, name, expert) if diffusers else _official_files(part, name, expert)
    command = f"hf download {REPOSITORIES[name]}{suffix} {what} --local-dir {shlex.quote(str(target))}"
    command = " ".join(command.split())
    if unknown and depends:
        others = [f"{one}{suffix}" for key, one in REPOSITORIES.items() if key != name]
        command += f" (or {' or '.join(others)})"
    return command


def _official_files(part: DownloadPart, name: str, expert: Expert | None) -> str:
    if part == "text_encoder":
        return TEXT_ENCODER_FILE
    if part == "tokenizer":
        return f'--include "{TOKENIZER_DIR}/*"'
    if part == "vae":
        return VAE_FILES["2.2" if name == "ti2v-5b" else "2.1"]
    if part == "everything":
        return ""
    if name == "ti2v-5b":
        shards = [_SHARD.format(number=number) for number in range(1, _NUM_SHARDS + 1)]
        return " ".join(("config.json", _INDEX, *shards))
    return " ".join(f'--include "{folder}/*"' for key, folder in EXPERT_DIRS.items() if expert in (None, key))


def _diffusers_files(part: DownloadPart, name: str, expert: Expert | None) -> str:
    if part == "everything":
        return ""
    if part != "transformer":
        return f'--include "{part}/*"'
    folders = [folder for key, folder in DIFFUSERS_EXPERTS.items() if expert in (None, key)]
    return " ".join(
        f'--include "{folder}/*"' for folder in (folders if name != "ti2v-5b" else ["transformer"])
    )
