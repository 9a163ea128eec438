"""Write a small Wan 2.2 checkpoint with random weights in the official layout.

File for file and name for name what the published repositories hold, only narrower and (by default) shallower, so
that the whole of training can be run and tested on a laptop's CPU. The result is the same, byte for byte, for the
same arguments.

    python scripts/make_tiny_wan.py --variant ti2v-5b --out checkpoints/tiny-ti2v-5b

With --trained the weights are not random: they are those of the tiny Wan that `make tiny-world` trained, a T2V-A14B that
draws coloured shapes as it is told (docs/tiny_world.md).

    python scripts/make_tiny_wan.py --trained --out checkpoints/tiny-trained
"""

import argparse
import io
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import sentencepiece
import torch
import xxhash
from safetensors.torch import save_file
from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import Unigram

from models.wan.arch import VARIANTS, Shape, VariantInfo, WanArch, expected_shapes
from models.wan.component_shapes import Umt5Sizes, VaeSizes, expected_umt5_shapes, expected_vae_shapes
from models.wan.vae import LATENT_STATS
from utils.errors import EXIT_OK, EXIT_USER_ERROR, UserError
from utils.files import atomic_directory

TEXT_ENCODER_FILE = "models_t5_umt5-xxl-enc-bf16.pth"
NUM_SHARDS = {"ti2v-5b": 3, "t2v-a14b": 6, "i2v-a14b": 6}
# As in the published tokenizer, the token table has more rows than the tokenizer has tokens.
UMT5 = Umt5Sizes(vocab_size=384, d_model=64, num_heads=4, d_kv=16, d_ff=128, num_layers=3, num_buckets=32)
NUM_PIECES = 320
NUM_SENTINELS = 8
# On query and key. At 1, a caption of ten tokens would drown in the zero padding up to 512.
CROSS_ATTENTION_GAIN = 1.7
# Mean of silu(x)^2 for a standard normal x: what a convolution after "normalise, silu" sees.
SILU_POWER = 0.3556
# The residual branches add up; this keeps the sum of a whole VAE near 1.
BRANCH_GAIN = 0.5
# Keeps most decoded pixels inside [-1, 1], where they are clamped.
PIXEL_GAIN = 0.5

COLOURS = (
    "red",
    "green",
    "blue",
    "yellow",
    "orange",
    "purple",
    "white",
    "black",
    "grey",
    "pink",
    "brown",
    "cyan",
)
FORMS = ("circle", "square", "triangle", "star", "cross", "ring", "rectangle", "diamond")
MOTIONS = (
    "moves to the right",
    "moves to the left",
    "moves up",
    "moves down",
    "moves along a diagonal",
    "turns slowly",
    "grows larger",
    "becomes smaller",
    "stands still",
    "bounces between the walls",
)
GROUNDS = (
    "on a dark background",
    "on a light background",
    "in front of a plain wall",
    "in the middle of the picture",
)
SENTENCES = (
    "The quick brown fox jumps over the lazy dog near the river bank.",
    "A short video of a simple scene with soft light and a steady camera.",
    "The camera follows the shape while it is moving across the frame.",
    "Two shapes meet, touch for a moment and then drift apart again.",
    "This picture shows one object and nothing else; the rest is empty.",
    "In the morning the house by the lake was quiet, and the wind was cold.",
    "She reads a book about history, music, science and the art of painting.",
    "They walked through the market, bought bread, fruit and flowers, and went home.",
    "He said that every question has more than one answer, depending on the reader.",
    "Numbers such as 0 1 2 3 4 5 6 7 8 9, 10, 24 and 100 are written with digits.",
    "A drawing, a photograph, an animation and a film are four kinds of picture.",
    "Jazz, quartz, vexing, zephyr, oxygen, rhythm, kayak and jigsaw are rare words.",
    "Over the hills and under the bridge, between the trees, behind the old station.",
    "Please wait: the next train leaves at noon (platform 7), the last one at midnight!",
    "A small boat sails slowly across calm water while clouds move in the sky.",
    "The children built a tower of wooden blocks and painted every side another colour.",
    "Large objects look smaller when they are far away from the person who watches them.",
    "Rain fell during the whole afternoon, so the garden and the streets were wet.",
    "An old clock above the kitchen door shows the wrong time since last winter.",
    "Several teachers explained how light travels through glass and why it bends.",
    "With a camera in one hand and a map in the other, she climbed the mountain.",
    "It is important to describe what can be seen, where it is, and how it changes.",
    "Some people prefer coffee, others drink tea; most of them like warm weather.",
    "The second part of the film begins with a slow motion picture of falling leaves.",
    'What is this? "It is only a toy," they answered - and everyone laughed.',
)


def random_tensor(seed: int, key: str, shape: Shape, std: float, mean: float = 0.0) -> torch.Tensor:
    """Normal numbers that depend on nothing but the seed and the tensor's own key."""
    generator = torch.Generator().manual_seed(xxhash.xxh3_64_intdigest(f"{seed}/{key}".encode()) >> 1)
    return torch.randn(shape, generator=generator) * std + mean


def fan_in(shape: Shape) -> int:
    """How many inputs each output of a linear layer or convolution sums over."""
    total = 1
    for size in shape[1:]:
        total *= size
    return total


def tiny_arch(info: VariantInfo, num_layers: int) -> WanArch:
    """Sizes of the small DiT; what the variant fixes (channels, text length) is as published."""
    return WanArch(
        model_type=info.model_type,
        dim=128,
        ffn_dim=256,
        freq_dim=256,
        in_dim=info.in_dim,
        out_dim=info.out_dim,
        num_heads=4,
        num_layers=num_layers,
        text_len=512,
        eps=1e-6,
        text_dim=UMT5.d_model,
    )


def tiny_vae_sizes(info: VariantInfo) -> VaeSizes:
    """Sizes of the small VAE; the 2.2 decoder is wider than its encoder, as published."""
    return VaeSizes(info.vae_kind, base_dim=8, decoder_base_dim=16 if info.vae_kind == "2.2" else 8)


def dit_weights(arch: WanArch, seed: int, component: str) -> dict[str, torch.Tensor]:
    """float32 weights of a DiT whose activations and output are of order 1 and depend on text, time and every bias."""
    weights = {}
    for name, shape in expected_shapes(arch).items():
        key = f"{component}/{name}"
        if "modulation" in name:
            weights[name] = random_tensor(seed, key, shape, std=arch.dim**-0.5)
        elif "norm" in name and name.endswith("weight"):
            mean = CROSS_ATTENTION_GAIN if "cross_attn" in name else 1.0
            weights[name] = random_tensor(seed, key, shape, std=0.1, mean=mean)
        elif name.endswith("bias"):
            weights[name] = random_tensor(seed, key, shape, std=0.02)
        else:
            weights[name] = random_tensor(seed, key, shape, std=fan_in(shape) ** -0.5)
    return weights


def umt5_weights(seed: int, sizes: Umt5Sizes = UMT5) -> dict[str, torch.Tensor]:
    """bfloat16 weights of a UMT5 encoder; T5 has no 1/sqrt(d) in its attention, so the query carries it."""
    weights = {}
    for name, shape in expected_umt5_shapes(sizes).items():
        if "norm" in name:
            tensor = random_tensor(seed, f"umt5/{name}", shape, std=0.1, mean=1.0)
        elif name == "token_embedding.weight":
            tensor = random_tensor(seed, f"umt5/{name}", shape, std=1.0)
        elif "pos_embedding" in name:
            tensor = random_tensor(seed, f"umt5/{name}", shape, std=0.5)
        else:
            narrowing = sizes.d_kv**-0.5 if name.endswith("attn.q.weight") else 1.0
            tensor = random_tensor(seed, f"umt5/{name}", shape, std=fan_in(shape) ** -0.5 * narrowing)
        weights[name] = tensor.to(torch.bfloat16)
    return weights


def vae_gain(name: str) -> float:
    """What keeps the sum of the residual branches, and the decoded pixels, in range."""
    if name.endswith("residual.6.weight"):
        return BRANCH_GAIN
    return PIXEL_GAIN if name == "decoder.head.2.weight" else 1.0


def vae_weights(sizes: VaeSizes, seed: int) -> dict[str, torch.Tensor]:
    """float32 weights of a VAE whose normalised latents have mean 0 and standard deviation near 1."""
    weights = {}
    for name, shape in expected_vae_shapes(sizes).items():
        key = f"vae/{name}"
        if name.endswith("gamma"):
            weights[name] = random_tensor(seed, key, shape, std=0.1, mean=1.0)
        elif name.endswith("bias"):
            weights[name] = random_tensor(seed, key, shape, std=0.05)
        else:
            power = SILU_POWER if ".residual." in name or ".head." in name else 1.0
            weights[name] = random_tensor(
                seed, key, shape, std=vae_gain(name) * (fan_in(shape) * power) ** -0.5
            )
    stats, channels = LATENT_STATS[sizes.kind], sizes.latent_channels
    weights["conv1.weight"][:channels] *= torch.tensor(stats.std).view(-1, 1, 1, 1, 1)
    weights["conv1.bias"][:channels] += torch.tensor(stats.mean)
    return weights


def write_dit(directory: Path, arch: WanArch, weights: dict[str, torch.Tensor], num_shards: int) -> None:
    """Write `config.json`, the shards and their index, as they are published."""
    directory.mkdir(exist_ok=True)
    total_bytes = sum(tensor.nbytes for tensor in weights.values())
    weight_map: dict[str, str] = {}
    shards: list[dict[str, torch.Tensor]] = [{} for _ in range(num_shards)]
    written = 0
    for name, tensor in weights.items():
        number = min(written * num_shards // total_bytes, num_shards - 1)
        shards[number][name] = tensor
        weight_map[name] = f"diffusion_pytorch_model-{number + 1:05d}-of-{num_shards:05d}.safetensors"
        written += tensor.nbytes
    for shard in shards:
        save_file(shard, directory / weight_map[next(iter(shard))], metadata={"format": "pt"})
    write_json(directory / "config.json", arch.to_config_json())
    index = {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
    write_json(directory / "diffusion_pytorch_model.safetensors.index.json", index)


def corpus() -> list[str]:
    """What the tokenizer is trained on: captions of moving shapes, and some general English."""
    captions = [
        f"{'an' if colour[0] in 'aeiou' else 'a'} {colour} {form} {motion} {GROUNDS[(i + j + k) % len(GROUNDS)]}"
        for i, colour in enumerate(COLOURS)
        for j, form in enumerate(FORMS)
        for k, motion in enumerate(MOTIONS)
    ]
    # SentencePiece proposes only pieces that occur in two different words, and "circle" and "circle," are two.
    words = sorted(set(" ".join(captions).split()))
    enumerations = [f"{word}, {word}." for word in words for _ in range(20)]
    alphabet = " ".join(chr(code) for code in range(ord("!"), ord("~") + 1))
    return captions + enumerations + [sentence for sentence in SENTENCES for _ in range(4)] + [alphabet]


def train_spiece() -> bytes:
    """Train a SentencePiece unigram model with UMT5's special ids (pad 0, eos 1, unk 2)."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(corpus()),
        model_writer=model,
        model_type="unigram",
        vocab_size=NUM_PIECES,
        character_coverage=1.0,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        pad_piece="<pad>",
        num_threads=1,  # sums over threads would differ from run to run
        minloglevel=2,
    )
    return model.getvalue()


def write_tokenizer(directory: Path, spiece: bytes) -> None:
    """Write a tokenizer as `transformers` does for T5: the SentencePiece model and its fast twin."""
    directory.mkdir(parents=True)
    (directory / "spiece.model").write_bytes(spiece)
    proto = sentencepiece_model_pb2.ModelProto.FromString(spiece)  # type: ignore[attr-defined]
    sentinels = [f"<extra_id_{number}>" for number in range(NUM_SENTINELS)]
    vocab = [(piece.piece, piece.score) for piece in proto.pieces] + [
        (name, 0.0) for name in reversed(sentinels)
    ]
    fast = Tokenizer(Unigram(vocab, unk_id=2, byte_fallback=False))
    fast.normalizer = normalizers.Precompiled(proto.normalizer_spec.precompiled_charsmap)
    metaspace = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    fast.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), metaspace])
    fast.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always")
    fast.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    specials = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    fast.add_special_tokens(
        [AddedToken(name, special=True) for name in ("<pad>", "</s>", "<unk>", *sentinels)]
    )
    fast.save(str(directory / "tokenizer.json"))
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    added = {
        str(fast.token_to_id(name)): {"content": name} | flags
        for name in ("<pad>", "</s>", "<unk>", *reversed(sentinels))
    }
    config = {
        "added_tokens_decoder": added,
        "additional_special_tokens": sentinels,
        "clean_up_tokenization_spaces": True,
        "extra_ids": NUM_SENTINELS,
        "model_max_length": 1000000000000000019884624838656,  # "no limit", as published
        "sp_model_kwargs": {},
        "tokenizer_class": "T5Tokenizer",
    } | specials
    write_json(directory / "tokenizer_config.json", dict(sorted(config.items())))
    special_map = {"additional_special_tokens": sentinels} | {
        key: {"content": name} | {flag: False for flag in flags if flag != "special"}
        for key, name in specials.items()
    }
    write_json(directory / "special_tokens_map.json", special_map)


def write_json(path: Path, value: object) -> None:
    """Write JSON as the published files are written: two spaces, newline at the end."""
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def make_checkpoint(
    variant: str, out: Path, seed: int, num_layers: int, num_text_layers: int = UMT5.num_layers
) -> None:
    """Write a whole checkpoint directory, or nothing.

    Raises:
        UserError: `out` exists and is not an empty directory, or cannot be written.
    """
    info = VARIANTS[variant]
    arch = tiny_arch(info, num_layers)
    if out.is_dir() and not any(out.iterdir()):
        out.rmdir()
    with atomic_directory(out) as directory:
        if info.has_experts:
            for expert in ("high_noise_model", "low_noise_model"):
                write_dit(directory / expert, arch, dit_weights(arch, seed, expert), NUM_SHARDS[variant])
        else:
            write_dit(directory, arch, dit_weights(arch, seed, "dit"), NUM_SHARDS[variant])
        torch.save(
            umt5_weights(seed, replace(UMT5, num_layers=num_text_layers)), directory / TEXT_ENCODER_FILE
        )
        torch.save(vae_weights(tiny_vae_sizes(info), seed), directory / f"Wan{info.vae_kind}_VAE.pth")
        write_tokenizer(directory / "google" / "umt5-xxl", train_spiece())
        write_json(
            directory / "configuration.json", {"framework": "Pytorch", "task": "text-to-video-synthesis"}
        )


def make_trained(out: Path) -> str:
    """Write the trained tiny Wan, and return in words what it is.

    Raises:
        UserError: as `make_checkpoint`, or the trained weights are not in this copy of the repository.
    """
    # Scripts are run by their path, and then only their own directory is looked into.
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from scripts.tiny_world.asset import ASSET, write_official

    arch = write_official(ASSET, out)
    return f"t2v-a14b, dim {arch.dim}, {arch.num_layers} blocks, trained on the tiny world"


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n\n    ")[0], formatter_class=argparse.RawDescriptionHelpFormatter
    )
    kind = parser.add_mutually_exclusive_group(required=True)
    kind.add_argument("--variant", choices=sorted(VARIANTS), help="which published model to imitate")
    kind.add_argument(
        "--trained",
        action="store_true",
        help="the trained T2V-A14B of the tiny world; it has one seed and depth",
    )
    parser.add_argument(
        "--out", required=True, type=Path, help="directory to make; must not exist, or be empty"
    )
    defaults = {"seed": 0, "layers": 4, "text_layers": UMT5.num_layers}
    for name, what in (
        ("seed", "every weight follows from it"),
        ("layers", "number of DiT blocks"),
        ("text_layers", "number of UMT5 blocks"),
    ):
        # No default here: whether a flag was given is asked below.
        parser.add_argument(
            f"--{name}", type=int, help=f"{what} (default: {defaults[name]}; not with --trained)"
        )
    arguments = parser.parse_args(argv)
    given = [f"--{name}" for name in defaults if getattr(arguments, name) is not None]
    if arguments.trained and given:
        parser.error(f"{', '.join(given)}: not allowed with --trained, whose weights have one seed and depth")
    for name, value in defaults.items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
    if arguments.text_layers < 1:
        parser.error(f"--text_layers {arguments.text_layers}: an encoder has at least 1 block")
    if arguments.layers < 1:
        parser.error(f"--layers {arguments.layers}: a DiT has at least 1 block")
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Write the checkpoint and say what was written."""
    arguments = parse_arguments(argv)
    try:
        if arguments.trained:
            what = make_trained(arguments.out)
        else:
            make_checkpoint(
                arguments.variant, arguments.out, arguments.seed, arguments.layers, arguments.text_layers
            )
            arch = tiny_arch(VARIANTS[arguments.variant], arguments.layers)
            what = f"{arguments.variant}, dim {arch.dim}, {arch.num_layers} blocks, seed {arguments.seed}"
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    files = sorted(path for path in arguments.out.rglob("*") if path.is_file())
    print(f"{arguments.out}: {what}")
    for path in files:
        print(f"  {path.stat().st_size:>10,} B  {path.relative_to(arguments.out)}")
    print(f"  {sum(path.stat().st_size for path in files):>10,} B  in all")
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(main())
