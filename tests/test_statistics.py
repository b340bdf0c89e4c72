"""What a table of rewards says: intervals that cover, win rates by counting, failures counted."""

import math

import pytest
import torch

from g2rpo.evaluate.result import Evaluation
from g2rpo.evaluate.statistics import CONFIDENCE, Estimate, compare, estimate

DRAWS, IMAGES, RESAMPLES = 300, 40, 500


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("shape", ["normal", "skewed"])
def test_an_interval_holds_the_true_mean_as_often_as_it_says(shape):
    values = normal(DRAWS, IMAGES)
    values, truth = (values, 0.0) if shape == "normal" else (values.exp(), math.exp(0.5))
    found = [estimate(row, RESAMPLES) for row in values]
    covered = sum(e.low <= truth <= e.high for e in found) / DRAWS
    # percentile intervals of 40 values are a little narrow, of a skewed distribution more so
    assert (0.90 if shape == "normal" else 0.84) < covered < 0.98, covered
    width = sum(e.high - e.low for e in found) / DRAWS
    if shape == "normal":  # the textbook's, for a known spread of 1
        assert width == pytest.approx(2 * 1.96 / math.sqrt(IMAGES), rel=0.05)
    missed_low = sum(truth < e.low for e in found) / DRAWS
    assert shape == "skewed" or missed_low == pytest.approx((1 - CONFIDENCE) / 2, abs=0.02)


def test_a_change_within_pairs_is_known_far_better_than_between_images():
    base = normal(100)
    policy = base + 0.1 + 0.05 * normal(100, seed=1)
    row = compare("r", False, policy, base)
    assert row.change.mean == pytest.approx(0.1, abs=0.02)
    assert row.change.low > 0  # clear, though both intervals of the means hold the other's mean
    assert row.base.low < row.policy.mean < row.base.high
    widths = [e.high - e.low for e in (row.base, row.policy, row.change)]
    assert widths[2] < 0.1 * min(widths[:2])
    shuffled = compare("r", False, policy, base.flip(0))
    assert shuffled.change.mean == pytest.approx(row.change.mean)
    assert shuffled.change.low < 0 < shuffled.change.high


def test_the_interval_of_a_change_covers_it_and_holds_zero_without_one():
    base = normal(DRAWS, IMAGES)
    noise = 0.2 * normal(DRAWS, IMAGES, seed=1)
    rows = [compare("r", False, b + n, b, 200) for b, n in zip(base, noise)]
    assert 0.90 < sum(r.change.low <= 0 <= r.change.high for r in rows) / DRAWS < 0.98
    assert 0.90 < sum(r.win_rate.low <= 0.5 <= r.win_rate.high for r in rows) / DRAWS <= 0.99


def test_win_rates_count_pairs_and_ties_are_halves():
    base = torch.tensor([1.0, 1.0, 1.0, 1.0])
    row = compare("r", True, torch.tensor([2.0, 0.0, 1.0, 3.0]), base)
    assert row.win_rate.mean == (1 + 0 + 0.5 + 1) / 4 and row.win_rate.count == 4
    assert compare("r", True, base, base).win_rate == Estimate(0.5, 0.5, 0.5, 4)
    assert compare("r", True, base + 1, base).win_rate == Estimate(1.0, 1.0, 1.0, 4)
    assert compare("r", True, base - 1, base).win_rate.mean == 0.0


def test_a_failed_score_takes_its_pair_out_and_is_counted():
    nan, inf = math.nan, math.inf
    policy = torch.tensor([1.0, nan, 3.0, 5.0, inf])
    base = torch.tensor([0.0, 0.0, nan, 1.0, inf])
    row = compare("r", False, policy, base)
    assert row.failed == 4
    assert (row.policy.count, row.policy.mean) == (3, 3.0)
    assert (row.base.count, row.base.mean) == (3, pytest.approx(1 / 3))
    assert (row.change.count, row.change.mean) == (2, 2.5)
    assert (row.win_rate.count, row.win_rate.mean) == (2, 1.0)


def test_where_all_failed_there_is_no_number():
    row = compare("r", False, torch.full((3,), math.nan), torch.ones(3))
    assert row.failed == 3 and row.policy.count == row.change.count == 0
    for found in (row.policy, row.change, row.win_rate):
        assert math.isnan(found.mean) and not found.has_interval and found.text == "–"
    assert row.base.text == "1.000 [1.000, 1.000]"


def test_one_image_has_a_mean_and_no_interval():
    row = compare("r", False, torch.tensor([0.75]), torch.tensor([0.5]))
    assert (row.change.mean, row.change.count, row.win_rate.mean) == (0.25, 1, 1.0)
    assert math.isnan(row.change.low) and math.isnan(row.change.high)
    assert row.policy.text == "0.750"


def test_the_same_scores_give_the_same_intervals_whatever_their_dtype_and_the_seed():
    values = normal(50).float()
    first = estimate(values)
    torch.manual_seed(5)
    assert estimate(values.double()) == first == estimate(values.clone())
    assert estimate(values).text == f"{first.mean:.3f} [{first.low:.3f}, {first.high:.3f}]"


def test_many_images_in_batches_of_resamples():
    """More numbers than are in memory at once; the interval is the textbook's."""
    values = normal(100_000)
    found = estimate(values, 200)
    half = 1.96 / math.sqrt(len(values))
    assert found.high - found.low == pytest.approx(2 * half, rel=0.15)
    assert found.mean == pytest.approx(float(values.mean()), abs=1e-12)


def test_pairs_must_be_pairs():
    with pytest.raises(ValueError, match=r"base has shape \(2,\); expected \(3,\)"):
        compare("r", False, torch.zeros(3), torch.zeros(2))


@pytest.mark.parametrize("paired", [True, False])
def test_the_table_is_sorted_and_marked(paired):
    names = ["judge", "probability", "log_prob", "other"]
    table = Evaluation(
        name="run",
        prompts=["a"] * 3,
        rewards=names,
        heldout=[True, False, False, True],
        trained=[False, False, True, False],
        scores=normal(4, 3),
        images=[],
        base_scores=normal(4, 3, seed=1) if paired else None,
    ).comparisons
    assert [(row.reward, row.mark) for row in table] == [
        ("log_prob", "in-domain"), ("probability", "reported"), ("judge", "held-out"),
        ("other", "held-out"),
    ]  # fmt: skip
    assert all((row.change is not None) == paired for row in table)


def test_nothing_is_marked_where_nothing_is_known_of_a_training():
    evaluation = Evaluation("x", ["a", "b"], ["r"], [False], normal(1, 2), [])
    assert [row.mark for row in evaluation.comparisons] == [""]
