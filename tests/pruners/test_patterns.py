"""Fixed patterns: exact, repeatable, without empty rows; each with the facts that it is known for; and mixing."""

from __future__ import annotations

import runpy
from itertools import count
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from sparsify import BlockSparseLinear
from sparsify.allocation.budget import Budget
from sparsify.blocks import BlockMask, BlockShape
from sparsify.errors import BlockShapeError, PrunerError
from sparsify.patterns import layers_to_mix, pattern_mask
from sparsify.pruner import PrunableLayer, create_pruner
from sparsify.stages.prune import prune_layers

PATTERNS = ["random_blocks", "balanced_random", "banded", "watts_strogatz", "barabasi_albert"]
RANDOM = [name for name in PATTERNS if name != "banded"]
BLOCK = BlockShape(16, 8)

patterns = pytest.mark.parametrize("pattern", PATTERNS)
grids = st.tuples(st.integers(1, 24), st.integers(1, 24))


def keep(pattern: str, rows: int, cols: int, blocks: int, name: str = "", **options: object) -> Tensor:
    sparsity = 1.0 - blocks / (rows * cols)
    shape = rows * BLOCK.rows, cols * BLOCK.cols
    return pattern_mask(pattern, shape, BLOCK, sparsity, name, **options).keep


@patterns
@given(grid=grids, share=st.floats(0.0, 1.0))
def test_the_density_is_exact_and_no_row_or_column_is_empty_where_that_is_possible(pattern, grid, share):
    rows, cols = grid
    blocks = max(1, round(share * rows * cols))
    mask = keep(pattern, rows, cols, blocks)
    assert int(mask.sum()) == blocks
    full_rows, full_cols = int(mask.any(1).sum()), int(mask.any(0).sum())
    assert full_rows == min(rows, blocks) or blocks < max(rows, cols)
    assert full_cols == min(cols, blocks) or blocks < max(rows, cols)
    assert min(full_rows, full_cols) >= min(rows, cols, blocks)


@patterns
@given(shape=st.tuples(st.integers(1, 200), st.integers(1, 200)), sparsity=st.floats(0.0, 0.999))
def test_edge_blocks_count_with_their_own_elements(pattern, shape, sparsity):
    mask = pattern_mask(pattern, shape, BLOCK, sparsity)
    # Half a block, and what the product of shares loses to rounding.
    assert abs(mask.elements_kept - (1 - sparsity) * shape[0] * shape[1]) <= BLOCK.numel / 2 + 1e-6


@patterns
@given(grid=grids, counts=st.tuples(st.integers(1, 576), st.integers(1, 576)))
def test_a_sparser_mask_lies_inside_a_denser_one(pattern, grid, counts):
    fewer, more = (min(number, grid[0] * grid[1]) for number in sorted(counts))
    assert not (keep(pattern, *grid, fewer) & ~keep(pattern, *grid, more)).any()


@pytest.mark.parametrize("pattern", RANDOM)
def test_seed_and_name_decide_and_nothing_else(pattern):
    first = keep(pattern, 12, 20, 60, name="a", seed=1)
    torch.manual_seed(99)
    assert torch.equal(first, keep(pattern, 12, 20, 60, name="a", seed=1))
    assert not torch.equal(first, keep(pattern, 12, 20, 60, name="b", seed=1))
    assert not torch.equal(first, keep(pattern, 12, 20, 60, name="a", seed=2))


def test_a_seed_means_the_same_mask_in_every_process():
    # Written down once: `hash` of a string, for one, would differ from process to process.
    assert keep("balanced_random", 4, 4, 4, seed=3).nonzero()[:, 1].tolist() == [1, 0, 3, 2]
    assert keep("barabasi_albert", 4, 4, 5, seed=3).sum(1).tolist() == [1, 1, 1, 2]


@given(grid=grids, share=st.floats(0.0, 1.0), seed=st.integers(0, 5))
def test_balanced_random_keeps_as_many_blocks_in_every_row_and_in_every_column(grid, share, seed):
    rows, cols = grid
    mask = keep("balanced_random", rows, cols, max(1, round(share * rows * cols)), seed=seed)
    across, down = (mask, mask.t())[:: 1 if rows >= cols else -1]
    assert int(across.sum(1).max() - across.sum(1).min()) <= 1
    divides = max(grid) % min(grid) == 0
    assert int(down.sum(1).max() - down.sum(1).min()) <= (1 if divides else 2)


def test_balanced_random_is_random_elsewhere():
    # Of two rows with 16 of 64 blocks each, about 4 coincide; in a permuted band many would share 0 or 15.
    mask = keep("balanced_random", 64, 64, 64 * 16).float()
    shared = (mask @ mask.t())[~torch.eye(64, dtype=torch.bool)]
    assert abs(float(shared.mean()) - 4.0) < 0.5 and float(shared.std()) < 2.0


@given(grid=grids)
def test_banded_blocks_lie_nearest_to_the_diagonal(grid):
    rows, cols = grid
    mask = keep("banded", rows, cols, max(rows, cols, rows * cols // 3))
    away = ((torch.arange(rows) + 0.5)[:, None] / rows - (torch.arange(cols) + 0.5) / cols).abs()
    if not mask.all():
        assert float(away[mask].max()) <= float(away[~mask].min()) + 1e-6


def test_watts_strogatz_without_rewiring_is_a_closed_band_of_equal_rows():
    mask = keep("watts_strogatz", 32, 32, 5 * 32, rewire=0.0)
    offset = (torch.arange(32)[None] - torch.arange(32)[:, None] + 16) % 32 - 16
    assert torch.equal(mask, offset.abs() <= 2)
    for rewire in (0.1, 1.0):
        mask = keep("watts_strogatz", 32, 32, 5 * 32, rewire=rewire)
        assert torch.equal(mask.sum(1), torch.full((32,), 5)) and mask.any(0).all()
        assert mask.diagonal().all()


def graph(mask: Tensor) -> Tensor:
    """The mask of a square grid as an undirected graph without loops."""
    return (mask | mask.t()) & ~torch.eye(len(mask), dtype=torch.bool)


def clustering(links: Tensor) -> float:
    """Mean share of a vertex's pairs of neighbours that are linked themselves."""
    a = links.float()
    pairs = a.sum(1) * (a.sum(1) - 1)
    return float(((a @ a @ a).diagonal() / pairs.clamp_min(1)).mean())


def path_length(links: Tensor) -> float:
    """Mean number of links between two vertices."""
    reached, distance = torch.eye(len(links)), torch.zeros(len(links), len(links))
    step = links.float() + torch.eye(len(links))
    while not reached.all():
        distance += (reached == 0).float()
        reached = (reached @ step > 0).float()
    return float(distance.sum() / (len(links) * (len(links) - 1)))


def test_watts_strogatz_is_clustered_like_a_lattice_and_short_like_a_random_graph():
    lattice, small, scattered = (
        graph(keep("watts_strogatz", 128, 128, 128 * 9, rewire=rewire)) for rewire in (0.0, 0.05, 1.0)
    )
    assert clustering(small) > 0.7 * clustering(lattice)
    assert clustering(small) > 3 * clustering(scattered)
    assert path_length(small) < 0.45 * path_length(lattice)
    assert path_length(small) < 1.6 * path_length(scattered)


def test_barabasi_albert_has_hubs_among_rows_and_columns():
    blocks = 256 * 6
    mask, uniform = keep("barabasi_albert", 256, 256, blocks), keep("random_blocks", 256, 256, blocks)
    for axis in (0, 1):
        degree, other = mask.sum(axis).float(), uniform.sum(axis).float()
        # A random graph of mean degree 6 has none beyond 20 or so; its standard deviation is 2.4.
        assert float(degree.max()) > 2 * float(other.max()) and float(degree.std()) > 2 * float(other.std())
        # The tail of P(degree >= k) falls like a power of k, roughly the model's 2, not like an exponential.
        k = torch.tensor([4.0, 8.0, 16.0, 32.0])
        tail = torch.tensor([float((degree >= value).float().mean()) for value in k])
        assert bool((tail > 0).all())
        slope = torch.linalg.lstsq(torch.stack([k.log(), torch.ones(4)], 1), tail.log()).solution[0]
        assert -3.0 < float(slope) < -1.0


@patterns
def test_as_a_pruner_it_meets_any_budget_and_does_not_look_at_the_weights(pattern):
    def layers(scale: float) -> list[PrunableLayer]:
        return [
            PrunableLayer(name, name, nn.Parameter(scale * torch.randn(shape)), BLOCK)
            for name, shape in (("up", (192, 64)), ("down", (64, 192)), ("odd", (100, 90)))
        ]

    for scope in ("layer", "row", "global"):
        budget, pruner = Budget(0.7, scope), create_pruner(pattern)
        first, second = (prune_layers(pruner, layers(scale), budget) for scale in (1.0, 9.0))
        assert all(torch.equal(first[name].keep, second[name].keep) for name in first)
        total = sum(mask.shape[0] * mask.shape[1] for mask in first.values())
        assert abs(sum(mask.elements_kept for mask in first.values()) - 0.3 * total) <= BLOCK.numel / 2
        assert all(abs(mask.density - 0.3) < 0.05 and mask.keep.any(0).all() for mask in first.values())


def test_a_layer_can_be_trained_from_scratch_on_a_pattern():
    mask = pattern_mask("watts_strogatz", (64, 128), BLOCK, 0.75, rewire=0.2)
    layer = BlockSparseLinear(128, 64, BLOCK, mask)
    assert torch.equal(layer.mask.keep, mask.keep)
    layer(torch.randn(3, 128)).sum().backward()
    assert layer.weight.grad is not None and layer.weight.grad.any()


def test_a_band_mixes_as_slowly_as_its_width_says():
    for half_width, layers in ((1, 31), (2, 16), (5, 7), (31, 1)):  # a corner of 32 x 32 blocks is 31 away
        away = (torch.arange(32)[:, None] - torch.arange(32)).abs()
        blocks = int((away <= half_width).sum())
        masks = [pattern_mask("banded", (256, 256), BlockShape(8, 8), 1 - blocks / 1024)] * 40
        assert layers_to_mix(masks) == layers


def test_random_links_mix_exponentially_faster_than_a_band():
    def depth(pattern: str, **options: object) -> int:
        names = map(str, count())
        masks = (pattern_mask(pattern, (512, 512), BlockShape(8, 8), 0.92, name, **options) for name in names)
        return layers_to_mix(masks) or 1000

    assert depth("balanced_random") <= 4 and depth("random_blocks") <= 7
    assert depth("watts_strogatz", rewire=0.2) < depth("watts_strogatz", rewire=0.0) / 2
    assert depth("banded") > 15


def test_mixing_follows_features_through_blocks_of_any_shape_and_knows_when_it_fails():
    wide, tall = BlockShape(8, 32), BlockShape(32, 8)
    first = BlockMask(torch.tensor([[1, 0], [0, 1], [1, 1], [1, 1]]).bool(), (32, 64), wide)
    # Outputs 0 to 7 of the first layer lack its second input block; one column of 32 takes in outputs 8 to 31 too.
    assert layers_to_mix([first]) is None
    assert layers_to_mix([first, BlockMask(torch.tensor([[True]]), (8, 32), wide)]) == 2
    assert layers_to_mix([first, BlockMask(torch.tensor([[1, 0, 0, 0]]).bool(), (32, 32), tall)]) is None
    eye = BlockMask(torch.eye(4, dtype=torch.bool), (32, 32), BlockShape(8, 8))
    assert layers_to_mix((eye for _ in count()), limit=7) is None and layers_to_mix([]) is None
    with pytest.raises(BlockShapeError, match="layer 2 takes 64 features, the layer before gives 32"):
        layers_to_mix([first, first])


def test_the_script_draws_every_pattern_and_counts_the_layers(tmp_path: Path):
    script = runpy.run_path(str(Path(__file__).resolve().parents[2] / "scripts" / "draw_patterns.py"))
    depths = script["draw"](tmp_path / "patterns.png", side=12, sparsity=0.5)
    assert set(depths) == set(PATTERNS) and depths["banded"] >= depths["balanced_random"] >= 2
    assert (tmp_path / "patterns.png").stat().st_size > 1000


def test_wrong_use_says_what_is_wrong():
    with pytest.raises(PrunerError, match="'magnitude' is not a pattern"):
        pattern_mask("magnitude", (64, 64), BLOCK, 0.5)
    with pytest.raises(PrunerError, match=r"rewire 1.5 is out of range: it is a probability"):
        pattern_mask("watts_strogatz", (64, 64), BLOCK, 0.5, rewire=1.5)
    with pytest.raises(PrunerError, match="'banded' has no option 'seed': it has none"):
        pattern_mask("banded", (64, 64), BLOCK, 0.5, seed=1)
