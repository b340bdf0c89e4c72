"""The digits world: scans, latents, embeddings, the reward and its judge."""

import warnings

import pytest
import torch
from torch import Tensor

from g2rpo import digits
from g2rpo.digits import rewards

REWARDS = (
    digits.classifier_log_prob,
    digits.classifier_probability,
    digits.judge_probability,
    digits.judge_accuracy,
    digits.forest_probability,
)


def names(labels: Tensor) -> list[str]:
    return [digits.PROMPTS[label] for label in labels]


# Scans


def test_scans_are_the_1797_digits():
    images, labels = digits.load_scans()
    assert images.shape == (1797, 1, 8, 8) and images.dtype == torch.float32
    assert images.min() == 0 and images.max() == 1
    assert labels.dtype == torch.int64
    assert labels.bincount().tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    images.zero_()
    assert digits.load_scans()[0].max() == 1  # what a caller gets is a copy


def test_halves_share_no_scan_and_hold_every_digit_equally():
    fit, judge, everything = (digits.load_scans(half) for half in ("fit", "judge", None))
    assert (len(fit[0]), len(judge[0])) == (899, 898)
    assert (fit[1].bincount() - judge[1].bincount()).abs().max() <= 1
    # No scan occurs twice in the data, so pixels identify scans.
    fit_rows, judge_rows, rows = (
        {(*image.flatten().tolist(), label) for image, label in zip(images, labels.tolist())}
        for images, labels in (fit, judge, everything)
    )
    assert len(rows) == 1797
    assert fit_rows.isdisjoint(judge_rows)
    assert fit_rows | judge_rows == rows
    again = digits.load_scans("fit")
    assert torch.equal(again[0], fit[0]) and torch.equal(again[1], fit[1])


def test_unknown_half():
    with pytest.raises(ValueError, match="half must be None, 'fit' or 'judge', got 'test'"):
        digits.load_scans("test")


# Latents


def test_packing_follows_diffusers():
    from diffusers import FluxPipeline

    images = digits.load_scans()[0][:5]
    expected = FluxPipeline._pack_latents(images * 2 - 1, 5, 1, 8, 8)
    assert torch.equal(digits.pack(images), expected)
    back = FluxPipeline._unpack_latents(expected, 8, 8, vae_scale_factor=1)
    assert torch.equal(digits.unpack(expected), (back + 1) / 2)


def test_packing_round_trip():
    images = digits.load_scans()[0]
    assert torch.equal(digits.unpack(digits.pack(images)), images)  # sixteenths are exact
    transposed = images.transpose(2, 3)  # not contiguous
    assert torch.equal(digits.unpack(digits.pack(transposed)), transposed)
    assert digits.pack(images.double()).dtype == torch.float32


def test_unpack_clamps_and_keeps_nan():
    latents = torch.tensor([-3.0, 3.0, 0.0, torch.nan]).expand(2, 16, 4)
    top_left = digits.unpack(latents)[:, 0, :2, :2].flatten(1)
    expected = torch.tensor([0.0, 1.0, 0.5, torch.nan]).expand(2, 4)
    torch.testing.assert_close(top_left, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: digits.pack(torch.zeros(3, 8, 8)), r"images .*\[N, 1, 8, 8\], got \[3, 8, 8\]"),
        (lambda: digits.pack(torch.zeros(3, 3, 8, 8)), r"images .*got \[3, 3, 8, 8\]"),
        (lambda: digits.pack(torch.zeros(3, 1, 8, 8).int()), "images .*got torch.int32"),
        (lambda: digits.pack([0.0]), "images .*got list"),
        (lambda: digits.unpack(torch.zeros(3, 4, 16)), r"latents .*\[N, 16, 4\], got \[3, 4, 16\]"),
    ],
)
def test_packing_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# Embeddings


def test_embeddings_are_fixed():
    signs = {
        "zero": "+-" * 16,
        "one": "++--" * 8,
        "two": "+--+" * 8,
        "three": "++++----" * 4,
        "seven": ("+" * 8 + "-" * 8) * 2,
        "nine": ("++--" * 2 + "--++" * 2) * 2,
    }
    expected = torch.tensor([[1.0 if s == "+" else -1.0 for s in row] for row in signs.values()])
    prompt_embeds, pooled = digits.embed_prompts(list(signs))
    assert prompt_embeds.shape == (6, 1, 32) and prompt_embeds.dtype == torch.float32
    assert torch.equal(pooled, expected)
    assert torch.equal(prompt_embeds[:, 0], expected)


def test_embeddings_are_orthogonal_and_copies():
    prompt_embeds, pooled = digits.embed_prompts(digits.PROMPTS)
    assert torch.equal(pooled @ pooled.T, 32 * torch.eye(10))
    prompt_embeds.zero_()
    pooled.zero_()
    assert digits.embed_prompts(["zero"])[1].norm() > 0


def test_unknown_prompt():
    with pytest.raises(ValueError, match="'ten'; expected one of zero, one, .*, nine"):
        digits.embed_prompts(["one", "ten"])
    with pytest.raises(ValueError, match="prompts must be a sequence .* got the string 'one'"):
        digits.embed_prompts("one")


# Reward and judge


def test_classifier_reads_the_other_half():
    images, labels = digits.load_scans("judge")
    log_probs = torch.stack(
        [digits.classifier_log_prob(images, [name] * len(images)) for name in digits.PROMPTS], dim=1
    )
    torch.testing.assert_close(log_probs.exp().sum(1), torch.ones(898))
    assert (log_probs.argmax(1) == labels).float().mean() > 0.95
    probability = digits.classifier_probability(images, names(labels))
    assert torch.equal(probability, log_probs.gather(1, labels[:, None])[:, 0].exp())
    assert probability.mean() > 0.85


def test_classifier_is_scikit_learns_logistic_regression():
    from sklearn.linear_model import LogisticRegression
    from threadpoolctl import threadpool_limits

    images, labels = digits.load_scans("fit")
    fitted = LogisticRegression(max_iter=1000)
    with threadpool_limits(1):  # a fit of many tiny products waits long on shared cores
        fitted.fit(images.flatten(1).double().numpy(), labels.numpy())
    samples = torch.rand(50, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    expected = torch.from_numpy(fitted.predict_log_proba(samples.flatten(1).double().numpy()))
    for digit, name in enumerate(digits.PROMPTS):
        log_prob = digits.classifier_log_prob(samples, [name] * 50)
        torch.testing.assert_close(log_prob, expected[:, digit].float(), rtol=1e-4, atol=1e-4)


def test_judge_reads_the_other_half():
    images, labels = digits.load_scans("fit")
    assert digits.judge_accuracy(images, names(labels)).mean() > 0.98
    assert digits.judge_probability(images, names(labels)).mean() > 0.93


def test_judge_accuracy_is_the_judges_own_prediction():
    images, labels = digits.load_scans("fit")
    generator = torch.Generator().manual_seed(0)
    images = (images[:200] + 0.3 * torch.rand(200, 1, 8, 8, generator=generator)).clamp(0, 1)
    probability, accuracy = (
        torch.stack([judge(images, [name] * 200) for name in digits.PROMPTS], dim=1)
        for judge in (digits.judge_probability, digits.judge_accuracy)
    )
    torch.testing.assert_close(probability.sum(1), torch.ones(200))
    assert torch.equal(accuracy.sum(1), torch.ones(200))
    assert torch.equal(accuracy.argmax(1), probability.argmax(1))


def test_fits_are_silent_and_repeatable():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        weight, bias = rewards._classifier.__wrapped__()
        judge = rewards._judge.__wrapped__()
    assert torch.equal(weight, rewards._classifier()[0])
    assert torch.equal(bias, rewards._classifier()[1])
    pixels = digits.load_scans("fit")[0].flatten(1).double().numpy()
    assert (judge.predict_proba(pixels) == rewards._judge().predict_proba(pixels)).all()


@pytest.mark.parametrize("reward", REWARDS)
def test_reward_contract(reward):
    images, labels = digits.load_scans("fit")
    images, prompts = images[::100].requires_grad_(), names(labels[::100])
    scores = reward(images, prompts)
    assert scores.shape == (9,) and scores.dtype == torch.float32 and not scores.requires_grad
    assert torch.isfinite(scores).all()
    torch.testing.assert_close(reward(images[4:6].bfloat16(), prompts[4:6]), scores[4:6])
    assert reward(images[:0], []).shape == (0,)


@pytest.mark.parametrize("reward", REWARDS)
def test_nan_pixel_fails_that_image_alone(reward):
    images, labels = digits.load_scans("fit")
    images, prompts = images[:3], names(labels[:3])
    expected = reward(images, prompts)
    images[1, 0, 3, 3] = torch.nan
    scores = reward(images, prompts)
    assert scores.isnan().tolist() == [False, True, False]
    torch.testing.assert_close(scores[::2], expected[::2])
    assert reward(images[1:2], prompts[1:2]).isnan().all()


@pytest.mark.parametrize("reward", REWARDS)
def test_reward_errors(reward):
    images = torch.zeros(2, 1, 8, 8)
    with pytest.raises(ValueError, match="one digit name per image: got 1 prompts for 2 images"):
        reward(images, ["one"])
    with pytest.raises(ValueError, match="'ten'; expected one of"):
        reward(images, ["one", "ten"])
    with pytest.raises(ValueError, match=r"images must have shape .*got \[2, 64\]"):
        reward(images.flatten(1), ["one", "two"])
    with pytest.raises(ValueError, match=r"images must lie in \[0, 1\], got values from -1 to -1"):
        reward(images - 1, ["one", "two"])


def test_an_update_in_bfloat16(monkeypatch, caplog):
    """model.dtype acts on the digits too; quietly, and on-policy to the last bit."""
    from tiny import tiny_config

    from g2rpo.models import load_model
    from g2rpo.rewards import Reward
    from g2rpo.trainer import Trainer

    monkeypatch.setattr(digits, "pretrained_transformer", lambda **_: digits.new_transformer(0))
    config = tiny_config()
    config.model.dtype = "bfloat16"
    model = load_model(config)
    assert model.policy.dtype == torch.bfloat16
    row = Trainer(config, model, [Reward("log_prob", digits.classifier_log_prob)]).update()
    assert row["ratio_max"] == 1.0 and row["grad_norm"] > 0
    assert not caplog.records
