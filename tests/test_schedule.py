"""The schedule, the completion paths and their prefix tree."""

import pytest
import torch

from g2rpo.schedule import (
    completion_path,
    completion_tree,
    evaluations_per_prompt,
    noise_schedule,
)


def test_schedule_values():
    sigmas = noise_schedule(16, 3.0)
    assert sigmas.dtype == torch.float64 and sigmas.shape == (17,)
    assert sigmas[0] == 1 and sigmas[-1] == 0
    assert (sigmas[1:] < sigmas[:-1]).all()
    assert sigmas[8].item() == pytest.approx(0.75)  # t = 1/2: 1.5 / 2
    assert torch.equal(noise_schedule(4, 1.0), torch.tensor([1, 0.75, 0.5, 0.25, 0]).double())


@pytest.mark.parametrize("shift", [1e-17, 0.1, 0.2, 0.3, 1.15, 3.0, 7.3])
def test_schedule_starts_at_one_exactly(shift):
    """A first sigma that misses 1 by rounding would divide by what it misses."""
    sigmas = noise_schedule(16, shift)
    assert sigmas[0] == 1 and sigmas[-1] == 0 and (sigmas[1:] < sigmas[:-1]).all()


@pytest.mark.parametrize("steps, shift, name", [(0, 3.0, "steps"), (16, 0.0, "shift")])
def test_schedule_refuses(steps, shift, name):
    with pytest.raises(ValueError, match=f"{name} is 0"):
        noise_schedule(steps, shift)


@pytest.mark.parametrize(
    "position, granularity, path",
    [
        (0, 1, list(range(1, 16))),
        (14, 1, [15]),
        (0, 2, [1, 2, 4, 6, 8, 10, 12, 14]),  # arrives at sigma[16] = 0
        (1, 2, [2, 3, 5, 7, 9, 11, 13]),  # arrives at sigma[15] > 0: x0-prediction at 13
        (0, 3, [1, 2, 5, 8, 11]),  # arrives at sigma[14]
        (13, 3, [14]),  # no room for a coarse step: x0-prediction at once
        (7, 100, [8]),
    ],
)
def test_completion_path(position, granularity, path):
    assert completion_path(position, granularity, 16) == path


def test_completion_path_refuses():
    with pytest.raises(ValueError, match="position is 15; expected 0 <= position <= steps - 2"):
        completion_path(15, 1, 16)
    with pytest.raises(ValueError, match="granularity is 0"):
        completion_path(0, 0, 16)


def distinct_prefixes(position: int, granularities, steps: int) -> int:
    """How often sharing by hand would have to evaluate: distinct beginnings of all paths."""
    prefixes = set()
    for granularity in granularities:
        path = [position + 1] + list(range(position + 2, steps + 1, granularity))
        for length in range(1, len(path)):  # the last sigma is arrived at, not evaluated
            prefixes.add(tuple(path[:length]))
    return len(prefixes)


@pytest.mark.parametrize("granularities", [[1], [2], [1, 2], [2, 1], [1, 2, 3], [2, 4], [3, 50]])
@pytest.mark.parametrize("steps", [2, 5, 16])
def test_tree_has_a_node_a_prefix(granularities, steps):
    for position in range(steps - 1):
        tree = completion_tree(position, granularities, steps)
        assert tree.count() == distinct_prefixes(position, granularities, steps)
        ends = []

        def walk(node, depth, ends=ends):
            ends.extend((index, depth) for index in node.finished)
            below = [walk(child, depth + 1) for child in node.children]
            assert node.remaining == 1 + max(below, default=0)
            return node.remaining

        walk(tree, 1)
        lengths = [len(completion_path(position, g, steps)) for g in granularities]
        assert sorted(ends) == list(enumerate(lengths))


@pytest.mark.parametrize("granularities, count", [([1], 1120), ([1, 2], 1504), ([1, 2, 3], 1708)])
def test_published_counts(granularities, count):
    """design: T + G * (nodes), T 16, G 12, positions 0..7."""
    assert evaluations_per_prompt(16, range(8), granularities, 12) == count
