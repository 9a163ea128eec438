import pytest
import torch

from models.wan.rope import apply_rope, rope_table

CPU = torch.device("cpu")


def rotate_as_complex_numbers(states_BSNK, grid):
    """The official formulation, written in complex128 from its definition and not from ours."""
    head_dim = states_BSNK.shape[-1]
    spatial = 2 * (head_dim // 6)
    widths = (head_dim - 2 * spatial, spatial, spatial)
    result = torch.empty(states_BSNK.shape, dtype=torch.float64)
    pairs = torch.view_as_complex(states_BSNK.double().unflatten(-1, (-1, 2)).contiguous())
    for token in range(states_BSNK.shape[1]):
        frame, rest = divmod(token, grid[1] * grid[2])
        position = (frame, *divmod(rest, grid[2]))
        angles = [
            place / 10000 ** (2 * index / width)
            for place, width in zip(position, widths, strict=True)
            for index in range(width // 2)
        ]
        turned = pairs[:, token] * torch.polar(
            torch.ones(len(angles)).double(), torch.tensor(angles).double()
        )
        result[:, token] = torch.view_as_real(turned).flatten(-2)
    return result


@pytest.mark.parametrize(("grid", "head_dim"), [((3, 4, 5), 128), ((2, 1, 7), 32), ((1, 3, 2), 16)])
def test_rotation_is_the_official_one(grid, head_dim):
    states_BSNK = torch.randn(
        2, grid[0] * grid[1] * grid[2], 3, head_dim, generator=torch.Generator().manual_seed(0)
    )
    rotated = apply_rope(states_BSNK, rope_table(grid, head_dim, CPU))
    # Measured: at most 4.2e-7.
    torch.testing.assert_close(
        rotated.double(), rotate_as_complex_numbers(states_BSNK, grid), rtol=0, atol=2e-6
    )


def test_the_published_head_gives_44_channels_to_time_and_42_to_rows_and_columns():
    cos, _ = rope_table((2, 2, 2), 128, CPU)
    moving = [(cos[token, 0] != cos[0, 0]).nonzero().flatten() for token in (4, 2, 1)]
    # The slowest pairs move too little to be seen in float32, so only the fast end of each axis is looked at.
    assert [indices[0].item() for indices in moving] == [0, 22, 43]
    assert moving[0].max() < 22
    assert moving[1].max() < 43


def test_far_positions_stay_exact():
    """Built in float64: at position 1023 an angle in float32 would be off by 4e-5."""
    cos, sin = rope_table((1024, 1, 1), 128, CPU)
    angles = 1023 / 10000 ** (torch.arange(0, 44, 2, dtype=torch.float64) / 44)
    torch.testing.assert_close(cos[-1, 0, :22].double(), angles.cos(), rtol=0, atol=6e-8)
    torch.testing.assert_close(sin[-1, 0, :22].double(), angles.sin(), rtol=0, atol=6e-8)


def test_scores_depend_on_distance_alone():
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(1, 1, 1, 32, generator=generator).expand(1, 8, 1, 32) for _ in range(2))
    table = rope_table((8, 1, 1), 32, CPU)
    scores = apply_rope(query, table)[0, :, 0] @ apply_rope(key, table)[0, :, 0].T
    for distance in range(-3, 4):
        diagonal = scores.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=0, atol=2e-5)


def test_shape_and_dtype_are_kept():
    states_BSNK = torch.randn(1, 4, 2, 16, dtype=torch.bfloat16)
    table = rope_table((1, 2, 2), 16, CPU)
    rotated = apply_rope(states_BSNK, table)
    assert (rotated.shape, rotated.dtype) == (states_BSNK.shape, torch.bfloat16)
    assert torch.equal(rotated[:, 0], states_BSNK[:, 0])  # the origin is not turned
    assert table[0].dtype == torch.float32


def test_tables_of_a_bucket_are_kept():
    assert rope_table((2, 3, 4), 32, CPU)[0] is rope_table((2, 3, 4), 32, CPU)[0]
    assert rope_table((2, 4, 3), 32, CPU)[0] is not rope_table((2, 3, 4), 32, CPU)[0]
