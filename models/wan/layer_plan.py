"""Wan's pipeline layers as facts, from shapes alone: which there are in a mode, their work, their memory. No torch."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from models.wan import costs, layer_memory
from models.wan.arch import WanArch
from models.wan.component_shapes import text_encoder_sizes
from models.wan.layer_memory import Workload
from utils.config.experts import alternates
from utils.config.schema import TrainConfig
from utils.lora_targets import split_block_path
from utils.memory import LayerMemory, evenly_spread
from utils.planned_layer import PlannedLayer
from utils.tensor_source import Shape

TEXT_PREFIX = "text_encoder."


def first_trained_block(config: TrainConfig, num_layers: int) -> int:
    """Index of the lowest block of UMT5 that trains in encoder_ft."""
    wanted = config.model.text_train_blocks
    return 0 if wanted == 0 else num_layers - wanted


def swapped_blocks(config: TrainConfig, arch: WanArch) -> frozenset[int]:
    """The DiT's blocks whose weights live in host memory."""
    return frozenset(evenly_spread(config.blocks_to_swap, arch.num_layers))


def plan_text_layers(config: TrainConfig, shapes: dict[str, Shape], workload: Workload) -> list[PlannedLayer]:
    """UMT5's layers for encoder_ft: token table, blocks, final norm; trained from the first trained block up.

    `shapes` are the encoder's, under official names.
    """
    sizes, table_trained = text_encoder_sizes(shapes), config.model.train_token_embedding
    first_trained = first_trained_block(config, sizes.num_layers)
    flops = costs.umt5_block_flops(sizes, workload.text_tokens)
    memory = layer_memory.TextMemory(config, shapes, sizes, workload)

    def layer(name: str, trained: bool, kept: LayerMemory) -> PlannedLayer:
        return PlannedLayer(
            f"{TEXT_PREFIX}{name}", 0.0, trainable=trained, trains_weights=trained, memory=kept
        )

    layers = [layer("shared", table_trained, memory.table())]
    for index in range(sizes.num_layers):
        trained = index >= first_trained
        layers.append(
            PlannedLayer(
                f"{TEXT_PREFIX}encoder.block.{index}",
                flops,
                trainable=trained,
                trains_weights=trained,
                recompute=layer_memory.recomputed_share(config.activation_checkpointing),
                memory=memory.block(
                    trained=trained,
                    has_backward=trained or table_trained,
                    is_first_trained=index == first_trained and not (table_trained and index == 0),
                ),
                backward_flops=costs.umt5_block_backward_flops(sizes, workload.text_tokens, trained=trained),
            )
        )
    return [*layers, layer("encoder.final_layer_norm", True, memory.norm())]


def plan_dit_layers(
    config: TrainConfig,
    shapes: Mapping[str, Shape],
    arch: WanArch,
    targets: Sequence[str],
    workload: Workload,
) -> list[PlannedLayer]:
    """The DiT's layers: input, blocks, head; frozen, with adapters on `targets` (none in encoder_ft).

    Args:
        config: the run.
        shapes: of the DiT's weights, under official names.
        arch: its sizes.
        targets: adapted modules, e.g. `blocks.3.cross_attn.k`.
        workload: the mean sample.
    """
    adapted = [split_block_path(target) for target in targets]
    swapped, tokens = swapped_blocks(config, arch), workload.video_tokens
    block_flops = costs.dit_block_flops(arch, tokens)
    memory = layer_memory.DitMemory(config, shapes, arch, adapted, workload)
    input_flops = costs.dit_input_flops(arch, tokens, workload.time_rows)
    layers = [PlannedLayer("", input_flops, memory=memory.input())]
    for index in range(arch.num_layers):
        paths: Collection[str] = [path for number, path in adapted if number == index]
        layers.append(
            PlannedLayer(
                f"blocks.{index}",
                block_flops,
                trainable=bool(paths),
                recompute=layer_memory.recomputed_share(config.activation_checkpointing),
                memory=memory.block(index, is_swapped=index in swapped),
                backward_flops=costs.dit_block_backward_flops(
                    arch,
                    tokens,
                    paths,
                    hidden_wants_gradient=memory.hidden_wants_gradient(index),
                    text_wants_gradient=config.model.train_text_encoder,
                ),
            )
        )
    layers.append(PlannedLayer("head", costs.dit_head_flops(arch, tokens), memory=memory.head()))
    return [_with_both_experts(layer) for layer in layers] if alternates(config) else layers


def _with_both_experts(layer: PlannedLayer) -> PlannedLayer:
    """A sample goes through one of the two, but the weights of both are there, and each has its room for swapped blocks."""
    memory = layer.memory
    return replace(
        layer,
        memory=replace(
            memory,
            weights=2 * memory.weights,
            slot=2 * memory.slot,
            host_weights=2 * memory.host_weights,
        ),
    )
