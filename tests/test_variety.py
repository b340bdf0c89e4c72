"""The second judge, and what is said of a set of digits: how different, how much is covered."""

import math

import numpy as np
import pytest
import torch

from g2rpo import digits
from g2rpo.digits import rewards
from g2rpo.digits.variety import NEIGHBOURS


def names(labels):
    return [digits.PROMPTS[label] for label in labels]


def noisy(count, seed, level=0.3):
    """Scans of the "fit" half with noise, and what they show."""
    generator = torch.Generator().manual_seed(seed)
    scans, labels = digits.load_scans("fit")
    chosen = torch.randperm(len(scans), generator=generator)[:count]
    images = scans[chosen] + level * torch.rand(count, 1, 8, 8, generator=generator)
    return images.clamp(0, 1), names(labels[chosen].tolist())


def distance_by_loops(images, prompts) -> float:
    pixels, of_prompts = images.numpy().astype(np.float64), []
    for prompt in dict.fromkeys(prompts):
        mine = [p for p, asked in zip(pixels, prompts) if asked == prompt and np.isfinite(p).all()]
        pairs = [
            np.sqrt(np.mean((mine[i] - mine[j]) ** 2)) for i in range(len(mine)) for j in range(i)
        ]
        if pairs:
            of_prompts.append(np.mean(pairs))
    return float(np.mean(of_prompts)) if of_prompts else math.nan


def coverage_by_loops(images, prompts, neighbours=5) -> float:
    """Naeem et al. (arXiv 2002.09797), eq. 4, digit by digit: for each real sample, whether a fake
    one lies in the ball around it that reaches to its k-th nearest other real one."""
    scans, labels = digits.load_scans("judge")
    real, fake = scans.numpy().astype(np.float64), images.numpy().astype(np.float64)
    covered = []
    for prompt in dict.fromkeys(prompts):
        mine = [p for p, asked in zip(fake, prompts) if asked == prompt and np.isfinite(p).all()]
        theirs = [r for r, label in zip(real, labels.tolist()) if digits.PROMPTS[label] == prompt]
        for i, one in enumerate(theirs):
            others = sorted(np.linalg.norm(one - other) for j, other in enumerate(theirs) if j != i)
            nearest = min((np.linalg.norm(one - image) for image in mine), default=math.inf)
            covered.append(nearest <= others[neighbours - 1])
    return float(np.mean(covered))


# Pairwise distance


def test_pairwise_distance_by_loops():
    images, prompts = noisy(60, 0)
    assert digits.pairwise_distance(images, prompts) == pytest.approx(
        distance_by_loops(images, prompts), rel=1e-9
    )
    apart = torch.zeros(2, 1, 8, 8)
    apart[1, :, :, :2] = 1.0  # a quarter of the pixels, as far apart as they can be
    assert digits.pairwise_distance(apart, ["two", "two"]) == pytest.approx(0.5)


def test_every_prompt_counts_alike():
    """However many images it has: a mean over pairs alone would be that of the first prompt."""
    generator = torch.Generator().manual_seed(0)
    alike = torch.rand(1, 1, 8, 8, generator=generator).repeat(20, 1, 1, 1)
    apart = torch.tensor([0.0, 1.0]).view(2, 1, 1, 1).expand(2, 1, 8, 8)
    found = digits.pairwise_distance(torch.cat([alike, apart]), ["one"] * 20 + ["two"] * 2)
    assert found == pytest.approx(0.5)


def test_identical_images_have_no_distance():
    images = noisy(1, 0)[0].repeat(5, 1, 1, 1)
    assert digits.pairwise_distance(images, ["six"] * 5) == 0.0


def test_images_that_do_not_count():
    images, prompts = noisy(40, 1)
    images[3, 0, 1, 1], images[5, 0, 0, 0] = math.nan, math.inf
    sound = [i for i in range(40) if i not in (3, 5)]
    without = images[sound], [prompts[i] for i in sound]
    for measure, by_loops in (
        (digits.pairwise_distance, distance_by_loops), (digits.coverage, coverage_by_loops)
    ):  # fmt: skip
        assert measure(images, prompts) == pytest.approx(by_loops(images, prompts), rel=1e-9)
        if {prompts[3], prompts[5]} <= set(without[1]):  # nothing else was asked for
            assert measure(*without) == pytest.approx(measure(images, prompts), rel=1e-9)
    # one image of each prompt, or none that is sound: there are no pairs
    assert math.isnan(digits.pairwise_distance(images[:1], ["one"]))
    assert math.isnan(digits.pairwise_distance(images[:2], ["one", "two"]))
    lost = torch.full((4, 1, 8, 8), math.nan)
    assert math.isnan(digits.pairwise_distance(lost, ["one"] * 4))
    assert digits.coverage(lost, ["one"] * 4) == 0.0
    half_lost = torch.cat([lost[:1], images[:1]])
    assert math.isnan(digits.pairwise_distance(half_lost, ["one"] * 2))


# Coverage


def test_coverage_by_loops():
    images, prompts = noisy(60, 2)
    found = digits.coverage(images, prompts)
    assert 0.02 < found < 0.9  # or the comparison would say little
    assert found == pytest.approx(coverage_by_loops(images, prompts, NEIGHBOURS), abs=1e-12)


def test_the_scans_cover_themselves_and_one_image_little():
    scans, labels = digits.load_scans("judge")
    assert digits.coverage(scans, names(labels.tolist())) == 1.0
    three = scans[labels == 3]
    assert digits.coverage(three, ["three"] * len(three)) == 1.0  # of the digits that are asked for
    repeated = digits.coverage(three[:1].repeat(len(three), 1, 1, 1), ["three"] * len(three))
    assert repeated == digits.coverage(three[:1], ["three"])  # again and again is once
    assert 1 / len(three) <= repeated < 0.3
    assert digits.coverage(three, ["eight"] * len(three)) < 0.2


def test_coverage_grows_with_more_images_and_falls_with_noise():
    images, prompts = noisy(200, 3, level=0.2)
    asked = list(digits.PROMPTS)
    blank = torch.zeros(10, 1, 8, 8)  # so that every digit is asked for from the start
    grown = [
        digits.coverage(torch.cat([blank, images[:n]]), asked + prompts[:n])
        for n in (0, 20, 50, 100, 200)
    ]
    assert grown == sorted(grown) and grown[-1] > grown[1] > grown[0] == 0.0
    cleaner, noisier = (digits.coverage(*noisy(200, 3, level)) for level in (0.0, 0.9))
    assert cleaner > grown[-1] > noisier


@pytest.mark.parametrize("measure", [digits.pairwise_distance, digits.coverage])
def test_wrong_images_and_prompts(measure):
    with pytest.raises(ValueError, match="one digit name per image: got 1 prompts for 2 images"):
        measure(torch.zeros(2, 1, 8, 8), ["one"])
    with pytest.raises(ValueError, match="'ten'; expected one of"):
        measure(torch.zeros(1, 1, 8, 8), ["ten"])
    with pytest.raises(ValueError, match=r"images must have shape .*got \[2, 64\]"):
        measure(torch.zeros(2, 64), ["one", "two"])
    assert math.isnan(measure(torch.zeros(0, 1, 8, 8), []))


def test_measures_take_any_floating_point_and_no_gradient():
    images, prompts = noisy(40, 4)
    images = (images * 16).round() / 16  # exact in bfloat16
    for measure in (digits.pairwise_distance, digits.coverage):
        found = measure(images.bfloat16().requires_grad_(), prompts)
        assert isinstance(found, float) and found == measure(images, prompts)


# The second judge


def test_the_forest_reads_the_half_it_was_not_fitted_on():
    images, labels = digits.load_scans("fit")
    votes = torch.stack(
        [digits.forest_probability(images, [name] * len(images)) for name in digits.PROMPTS], dim=1
    )
    assert votes.dtype == torch.float32 and 0 <= votes.min() and votes.max() <= 1
    torch.testing.assert_close(votes.sum(1), torch.ones(len(images)))
    assert (votes.argmax(1) == labels).float().mean() > 0.95
    assert torch.equal(digits.forest_probability(images, names(labels)), votes.gather(
        1, labels[:, None])[:, 0])  # fmt: skip


def test_the_forest_is_fitted_on_the_judges_half_alone():
    """Trees without a limit know the scans they were fitted on by heart, and no others."""
    images, labels = digits.load_scans("judge")
    assert digits.forest_probability(images, names(labels)).min() > 0.99
    others, of_others = digits.load_scans("fit")
    assert digits.forest_probability(others, names(of_others)).min() < 0.5


def test_the_forest_is_the_same_every_time_and_another_judge():
    images, prompts = noisy(100, 5, level=0.8)
    pixels = images.flatten(1).double().numpy()
    again = rewards._forest.__wrapped__()
    assert (again.predict_proba(pixels) == rewards._forest().predict_proba(pixels)).all()
    forest, judge = (f(images, prompts) for f in (digits.forest_probability,
                                                   digits.judge_probability))  # fmt: skip
    assert (forest - judge).abs().mean() > 0.05


def test_a_score_is_that_of_the_image_alone():
    images, prompts = noisy(30, 6)
    together = digits.forest_probability(images, prompts)
    images[4, 0, 2, 2] = math.nan
    broken = digits.forest_probability(images, prompts)
    assert broken.isnan().nonzero().flatten().tolist() == [4]
    sound = [i for i in range(30) if i != 4]
    assert torch.equal(broken[sound], together[sound])
    one = digits.forest_probability(images[7:8], prompts[7:8])
    assert torch.equal(one, together[7:8])
