"""A stage's bytes, told apart, with what crosses its boundaries."""

import pytest

from utils.memory import LayerMemory
from utils.plan_memory import WireSize, stage_bytes
from utils.planned_layer import PlannedLayer

FROZEN = PlannedLayer("frozen", 10.0, memory=LayerMemory(weights=100.0, working=3.0))
ADAPTED = PlannedLayer(
    "adapted",
    10.0,
    trainable=True,
    memory=LayerMemory(weights=110.0, gradients=10.0, state=20.0, stored=7.0, working=5.0, host_weights=1.0),
)
WIRE = WireSize(own=8.0, others=2.0, gradient=8.0)


def test_every_byte_has_its_place():
    (stage,) = stage_bytes([FROZEN, ADAPTED, ADAPTED], [WIRE] * 2, (0, 3), 4, 0.5)
    assert (stage.weights, stage.trainables, stage.gradients, stage.optimizer) == (300.0, 20.0, 20.0, 20.0)
    assert (stage.activations, stage.transfers, stage.host) == (14.0 + 5.0, 0.0, 2.0)
    assert stage.device == 300 + 20 + 20 + 20 + 19


def test_below_the_first_trainable_layer_wires_are_passed_on_and_no_gradient_comes():
    frozen, trained = stage_bytes([FROZEN, FROZEN, ADAPTED], [WIRE] * 2, (0, 2, 3), 4, 1.0)
    assert frozen.activations == 3.0 and frozen.transfers == WIRE.sent
    assert trained.transfers == WIRE.sent  # received, nothing sent back


@pytest.mark.parametrize(("micro_batches", "flying"), [(1, 1), (2, 2), (8, 3)])
def test_what_went_out_is_held_until_its_gradient_comes(micro_batches, flying):
    first, middle, last = stage_bytes([ADAPTED] * 3, [WIRE] * 2, (0, 1, 2, 3), micro_batches, 1.0)
    assert first.transfers == flying * 8 + 2 + 8
    assert middle.transfers == (10 + 8) + min(2, micro_batches) * 8 + 2 + 8
    assert last.transfers == 10 + 8
    assert first.activations == flying * 7 + 5
