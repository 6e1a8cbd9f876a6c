import tracemalloc
from collections import Counter
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ray_stateful.states.permutation import MAX_LENGTH, Permutation

SIZES = sorted({0, 1, 2, 3, 4, 5, 7, 11, 97, 1009, 65537, *(2**k + d for k in range(2, 17) for d in (-1, 0, 1))})


def order(length, seed=0, epoch=0):
    return Permutation(length, seed=seed, epoch=epoch).take(range(length))


def chi_square_z(counts):
    """How many standard deviations the counts are from equal ones; the statistic has mean k-1 and variance 2(k-1)."""
    counts = np.asarray(counts, dtype=np.float64).ravel()
    expected = counts.sum() / counts.size
    statistic = ((counts - expected) ** 2 / expected).sum()
    return (statistic - (counts.size - 1)) / np.sqrt(2 * (counts.size - 1))


@pytest.mark.parametrize("length", SIZES)
def test_every_sample_has_exactly_one_position(length):
    assert np.array_equal(np.sort(order(length, seed=5, epoch=2)), np.arange(length))


@settings(max_examples=50, deadline=None)
@given(length=st.integers(1, 5000), seed=st.integers(), epoch=st.integers(0, 10**6))
def test_any_seed_and_epoch_gives_a_permutation_and_single_look_ups_agree_with_it(length, seed, epoch):
    whole = order(length, seed, epoch)
    permutation = Permutation(length, seed=seed, epoch=epoch)

    assert np.array_equal(np.sort(whole), np.arange(length))
    assert [permutation[p] for p in range(0, length, 997)] == whole[::997].tolist()
    assert len(permutation) == length


def test_the_order_is_the_one_of_every_version_and_platform():
    # Written down, not computed: a run that was saved by an earlier version goes on in this order.
    assert order(10, seed=17, epoch=0).tolist() == [9, 5, 4, 0, 6, 8, 3, 1, 7, 2]
    assert [Permutation(10**12, seed=-3, epoch=4)[p] for p in (0, 1, 10**11)] == [
        148335898795,
        757591588624,
        901215055939,
    ]


def test_no_position_prefers_a_sample_over_many_seeds():
    length, num_seeds = 50, 4000
    counts = np.zeros((length, length))
    for seed in range(num_seeds):
        counts[np.arange(length), order(length, seed)] += 1

    assert abs(chi_square_z(counts)) < 4
    assert max(abs(chi_square_z(row)) for row in counts) < 6


def test_no_pair_of_samples_is_adjacent_more_often_than_chance():
    # Within one long epoch: where the successor of a sample lies, in a grid of 32 x 32 cells.
    length = 2**17 + 3
    samples = order(length, seed=1)
    cells = samples * 32 // length
    grid = np.bincount(cells[:-1] * 32 + cells[1:], minlength=1024)

    assert abs(chi_square_z(grid)) < 4
    # Distances of neighbours: of two random samples, d apart has probability 2 (n - d) / n**2, a mean of n / 3.
    assert abs(np.abs(np.diff(samples)).mean() / (length / 3) - 1) < 0.01


@pytest.mark.parametrize("length", [2, 3, 4, 5])
def test_every_order_of_a_small_dataset_is_equally_likely(length):
    num_seeds = 6000
    counts = Counter(tuple(order(length, seed).tolist()) for seed in range(num_seeds))

    assert abs(chi_square_z([counts[p] for p in permutations(range(length))])) < 4


@pytest.mark.parametrize(("seed", "epoch"), [(1, 0), (0, 1), (1, 1), (-1, 0), (2**64, 0)])
def test_another_epoch_or_seed_is_another_order(seed, epoch):
    ours, theirs = order(10_000), order(10_000, seed, epoch)

    # Two random orders agree in one position on average.
    assert (ours == theirs).sum() < 10
    assert abs(np.corrcoef(ours, theirs)[0, 1]) < 0.05


def test_a_billion_samples_cost_no_more_than_a_thousand():
    def cost(length):
        """How many values are computed for 512 look-ups, and the most memory that they take."""
        permutation, sizes = Permutation(length, seed=3, epoch=0), []
        network = permutation._network
        permutation._network = lambda values: sizes.append(values.size) or network(values)
        tracemalloc.start()
        permutation.take(range(100, 612))
        _, most_bytes = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return sum(sizes), most_bytes

    large = Permutation(10**9 + 7, seed=3, epoch=0)
    for length in (1000, 10**9 + 7):
        num_values, most_bytes = cost(length)
        # Less than half of the values are past the end, and computed again.
        assert num_values < 3 * 512
        assert most_bytes < 1 << 18
    assert len({large[p] for p in range(10**9, 10**9 + 7)}) == 7


def test_the_ends_of_the_range_are_checked():
    permutation = Permutation(10, seed=0, epoch=0)

    assert permutation.take(range(4, 4)).tolist() == []
    for bad in (-1, 10):
        with pytest.raises(IndexError, match="within the 10"):
            permutation[bad]
    for length in (-1, MAX_LENGTH + 1):
        with pytest.raises(ValueError, match=f"length={length} can't be permuted"):
            Permutation(length, seed=0, epoch=0)
    assert 0 <= Permutation(MAX_LENGTH, seed=0, epoch=0)[MAX_LENGTH - 1] < MAX_LENGTH
