"""The reward and the held-out judges: classifiers fitted on disjoint halves of the scans.

Every function here is `f(images [N,1,8,8] in [0,1], prompts: N digit names) -> float32 [N]` on the
images' device, without gradient. An image with a NaN pixel scores NaN: a failed score, which the
trainer counts, not an exception. Each classifier is fitted once per process, at its first use.

The judges are never trained on. The first, a support-vector classifier, gives calibrated
probabilities and a prediction by one model: the digit it predicts is the one it finds most
probable. The second, a forest of trees, is of another kind: what fools one need not fool the other.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from g2rpo.digits.scans import check_images, digits_of, load_scans


def _asked_digits(images: Tensor, prompts: Sequence[str]) -> Tensor:  # [N] on images' device
    check_images(images)
    digits = digits_of(prompts)
    if len(digits) != len(images):
        raise ValueError(f"prompts must hold one digit name per image: got {len(digits)} prompts "
                         f"for {len(images)} images")  # fmt: skip
    # A NaN compares false on both sides, so it passes here and becomes a NaN score.
    if ((images < 0) | (images > 1)).any():
        low, high = images.min().item(), images.max().item()
        raise ValueError(f"images must lie in [0, 1], got values from {low:.4g} to {high:.4g}")
    return digits.to(images.device)


@cache
def _classifier() -> tuple[Tensor, Tensor]:  # weight [10,64], bias [10]
    from sklearn.linear_model import LogisticRegression  # slow imports, wanted only here
    from threadpoolctl import threadpool_limits  # scikit-learn depends on it

    images, labels = load_scans("fit")
    # C = 1 on pixels in [0, 1]: soft enough for log-probabilities to keep a slope between scans.
    fitted = LogisticRegression(C=1.0, max_iter=1000)
    with threadpool_limits(1):  # many tiny products: one thread is faster, and the same everywhere
        fitted.fit(images.flatten(1).double().numpy(), labels.numpy())
    return torch.from_numpy(fitted.coef_).float(), torch.from_numpy(fitted.intercept_).float()


@torch.no_grad()
def classifier_log_prob(images: Tensor, prompts: Sequence[str]) -> Tensor:  # [N], <= 0, nats
    """Log-probability of the asked digit under logistic regression fitted on the "fit" half."""
    digits = _asked_digits(images, prompts)
    weight, bias = (parameter.to(images.device) for parameter in _classifier())
    log_probs = (images.float().flatten(1) @ weight.T + bias).log_softmax(dim=1)
    return log_probs.gather(1, digits[:, None])[:, 0]


def classifier_probability(images: Tensor, prompts: Sequence[str]) -> Tensor:  # [N] in [0,1]
    """The same as a probability: exp of `classifier_log_prob`."""
    return classifier_log_prob(images, prompts).exp()


@cache
def _forest() -> Any:
    from sklearn.ensemble import ExtraTreesClassifier

    images, labels = load_scans("judge")
    forest = ExtraTreesClassifier(n_estimators=200, random_state=0, n_jobs=1)
    return forest.fit(images.flatten(1).double().numpy(), labels.numpy())


@cache
def _judge() -> Any:
    from sklearn.calibration import CalibratedClassifierCV  # slow imports, wanted only here
    from sklearn.multiclass import OneVsRestClassifier
    from sklearn.svm import SVC

    images, labels = load_scans("judge")
    # SVC(probability=True) is deprecated. This is what scikit-learn names instead (one model on the
    # whole half, sigmoids fitted to its cross-validated scores; unshuffled folds, no seed), on
    # one-vs-rest margins: an SVC's own ten scores are vote counts, which calibrate poorly (mean
    # negative log-likelihood on the other half 0.16, against 0.07 here; accuracy alike).
    judge = CalibratedClassifierCV(OneVsRestClassifier(SVC(C=10.0)), ensemble=False, cv=5)
    return judge.fit(images.flatten(1).double().numpy(), labels.numpy())


@torch.no_grad()
def _probabilities(judge: Any, images: Tensor) -> Tensor:  # [N,10] float32, NaN for NaN images
    pixels = images.flatten(1).cpu().double()
    probabilities = torch.full((len(pixels), 10), torch.nan)
    sound = ~pixels.isnan().any(dim=1)
    if sound.any():
        scored = judge.predict_proba(pixels[sound].numpy())
        probabilities[sound] = torch.from_numpy(scored).float()
    return probabilities.to(images.device)


def judge_probability(images: Tensor, prompts: Sequence[str]) -> Tensor:  # [N] in [0,1]
    """Probability of the asked digit under the held-out judge: an RBF support-vector classifier
    fitted on the "judge" half, its scores calibrated to probabilities."""
    digits = _asked_digits(images, prompts)
    return _probabilities(_judge(), images).gather(1, digits[:, None])[:, 0]


def forest_probability(images: Tensor, prompts: Sequence[str]) -> Tensor:  # [N] in [0,1]
    """Probability of the asked digit under the second judge: the share of votes of 200 extremely
    randomised trees (Geurts et al. 2006) fitted on the "judge" half."""
    digits = _asked_digits(images, prompts)
    return _probabilities(_forest(), images).gather(1, digits[:, None])[:, 0]


def judge_accuracy(images: Tensor, prompts: Sequence[str]) -> Tensor:  # [N], 0, 1 or NaN
    """1.0 where the digit the held-out judge predicts (its most probable) is the asked one."""
    digits = _asked_digits(images, prompts)
    probabilities = _probabilities(_judge(), images)
    correct = (probabilities.argmax(dim=1) == digits).float()
    return torch.where(probabilities[:, 0].isnan(), torch.nan, correct)
