"""Adding layers up to a stage: what is alive at the worst moment of the backward pass."""

from utils.memory import LayerMemory, evenly_spread, stage_memory

BLOCK = LayerMemory(stored=7.0, rebuilt=50.0, working=5.0, shared=2.0)
HEAD = LayerMemory(stored=30.0, working=4.0)


def test_the_backward_pass_frees_from_the_end():
    """While the last block recomputes, what the head behind it stored is gone; at the head itself all is there."""
    assert stage_memory([BLOCK, BLOCK, HEAD], 1).activations == 2.0 + max(14 + 55, 44 + 4)
    large = LayerMemory(stored=100.0, working=4.0)
    assert stage_memory([BLOCK, BLOCK, large], 1).activations == 2.0 + 114 + 4


def test_other_micro_batches_in_flight_keep_all_they_stored():
    assert stage_memory([BLOCK, BLOCK, HEAD], 3).activations == 2 * (44.0 + 2.0) + 2.0 + 69.0


def test_a_stage_without_backward_holds_what_its_largest_layer_works_with():
    assert stage_memory([LayerMemory(working=9.0), LayerMemory(working=4.0)], 0).activations == 9.0


def test_an_early_layer_that_rebuilds_much_counts_with_what_lies_below_it_alone():
    first = LayerMemory(stored=1.0, rebuilt=60.0)
    assert stage_memory([first, LayerMemory(stored=40.0)], 1).activations == 61.0
    assert evenly_spread(2, 8) == [2, 6]
