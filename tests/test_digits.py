"""The digits world: scans, latents, embeddings, pre-training and its cache, reward and judge."""

import threading
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor

from g2rpo import digits
from g2rpo.digits import model, rewards

QUICK = {"steps": 2, "batch_size": 4, "seed": 0}
REWARDS = (
    digits.classifier_log_prob,
    digits.classifier_probability,
    digits.judge_probability,
    digits.judge_accuracy,
)


def names(labels: Tensor) -> list[str]:
    return [digits.PROMPTS[label] for label in labels]


def weights(transformer: torch.nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in transformer.parameters()])


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


# Transformer and pre-training


def test_new_transformer():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    transformer = digits.new_transformer(0)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert torch.equal(weights(transformer), weights(digits.new_transformer(0)))
    assert not torch.equal(weights(transformer), weights(digits.new_transformer(1)))
    assert weights(transformer).numel() == 311_684

    text_ids, image_ids = digits.token_ids()
    assert text_ids.tolist() == [[0, 0, 0]]
    assert image_ids.tolist() == [[0, row, column] for row in range(4) for column in range(4)]
    prompt_embeds, pooled = digits.embed_prompts(["three", "four"])
    velocity = transformer(
        hidden_states=torch.zeros(2, 16, 4),
        timestep=torch.tensor([1.0, 0.5]),
        encoder_hidden_states=prompt_embeds,
        pooled_projections=pooled,
        txt_ids=text_ids,
        img_ids=image_ids,
        return_dict=False,
    )[0]
    assert velocity.shape == (2, 16, 4)


def test_pretraining_lowers_the_loss():
    transformer = digits.new_transformer(0)
    seen: list[tuple[int, int, float]] = []
    digits.pretrain(transformer, steps=60, batch_size=32, on_step=lambda *step: seen.append(step))
    assert [step[:2] for step in seen] == [(step, 60) for step in range(1, 61)]
    losses = torch.tensor([step[2] for step in seen])
    # A model that predicts zero velocity scores E|noise|² + E|x0|², about 1.7.
    assert losses[:5].mean() > 1.5 and losses[-10:].mean() < 0.75
    assert all(parameter.grad is None for parameter in transformer.parameters())


def test_pretraining_is_decided_by_its_arguments():
    def trained(global_seed: int, **changes: int) -> Tensor:
        transformer = digits.new_transformer(0)
        torch.manual_seed(global_seed)
        before = torch.get_rng_state()
        digits.pretrain(transformer, **{**QUICK, **changes})
        assert torch.equal(torch.get_rng_state(), before)
        return weights(transformer)

    assert torch.equal(trained(1), trained(2))
    for changes in ({"seed": 1}, {"steps": 3}, {"batch_size": 5}):
        assert not torch.equal(trained(1), trained(1, **changes))


def test_pretraining_does_not_depend_on_the_number_of_threads():
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            transformer = digits.new_transformer(0)
            digits.pretrain(transformer, steps=2, batch_size=64)
            results.append(weights(transformer))
            assert torch.get_num_threads() == count
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*results)


def test_pretraining_refuses():
    transformer = digits.new_transformer(0)
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        digits.pretrain(transformer, steps=0)
    with pytest.raises(ValueError, match="batch_size must be at least 1, got -1"):
        digits.pretrain(transformer, batch_size=-1)
    with torch.no_grad():
        transformer.proj_out.weight[0, 0] = torch.nan
    with pytest.raises(RuntimeError, match="non-finite"):
        digits.pretrain(transformer, **QUICK)


# Cache


def cached(folder: Path, **changes: int) -> tuple[Tensor, int]:
    """(weights, training steps it took)"""
    steps: list[int] = []
    transformer = digits.pretrained_transformer(
        folder, on_step=lambda step, *_: steps.append(step), **{**QUICK, **changes}
    )
    return weights(transformer), len(steps)


def entries(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix != ".lock")


@pytest.mark.filterwarnings("error")
def test_cache_trains_once(tmp_path):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    expected = digits.new_transformer(0)
    digits.pretrain(expected, **QUICK)
    first, first_steps = cached(tmp_path / "made" / "on demand")
    second, second_steps = cached(tmp_path / "made" / "on demand")
    assert (first_steps, second_steps) == (2, 0)
    assert torch.equal(first, weights(expected)) and torch.equal(second, first)
    assert torch.equal(torch.get_rng_state(), before)


def test_cache_folder_from_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("G2RPO_CACHE", str(tmp_path / "theirs"))
    digits.pretrained_transformer(**QUICK)
    assert len(entries(tmp_path / "theirs")) == 1
    digits.pretrained_transformer(tmp_path / "argument", **QUICK)  # the argument comes first
    assert len(entries(tmp_path / "argument")) == 1
    monkeypatch.delenv("G2RPO_CACHE")
    monkeypatch.setattr("platformdirs.user_cache_dir", lambda name: str(tmp_path / name))
    digits.pretrained_transformer(**QUICK)
    assert len(entries(tmp_path / "g2rpo")) == 1


def test_cache_never_serves_another_recipe(tmp_path, monkeypatch):
    cached(tmp_path)
    for changes in ({"seed": 1}, {"steps": 3}, {"batch_size": 5}):
        assert cached(tmp_path, **changes)[1] > 0
    monkeypatch.setitem(model.RECIPE, "version", model.RECIPE["version"] + 1)
    assert cached(tmp_path)[1] == 2
    monkeypatch.setitem(model.ARCHITECTURE, "num_single_layers", 1)
    assert cached(tmp_path)[0].numel() < 311_684
    assert len(entries(tmp_path)) == 6


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    "damage, name, message",
    [
        (truncate, "diffusion_pytorch_model.safetensors", "do not match SHA256SUMS"),
        (flip_a_bit, "diffusion_pytorch_model.safetensors", "do not match SHA256SUMS"),
        (truncate, "config.json", "do not match SHA256SUMS"),
        (Path.unlink, "config.json", "config.json is missing"),
        (Path.unlink, "SHA256SUMS", "SHA256SUMS is missing"),
    ],
)
def test_cache_rebuilds_a_damaged_entry(tmp_path, damage, name, message):
    expected, _ = cached(tmp_path)
    [entry] = entries(tmp_path)
    damage(entry / name)
    with pytest.warns(UserWarning, match=f"{entry.name} is rebuilt: .*{message}"):
        rebuilt, steps = cached(tmp_path)
    assert steps == 2 and torch.equal(rebuilt, expected)
    assert entries(tmp_path) == [entry]
    assert cached(tmp_path)[1] == 0


@pytest.mark.filterwarnings("error")
def test_a_killed_run_leaves_no_entry(tmp_path, monkeypatch):
    class Killed(Exception):
        pass

    def kill(*_: object) -> None:
        raise Killed

    with pytest.raises(Killed):
        digits.pretrained_transformer(tmp_path, on_step=kill, **QUICK)
    assert entries(tmp_path) == []
    with monkeypatch.context() as patch:  # killed between saving and renaming
        patch.setattr(model, "_checksums", kill)
        with pytest.raises(Killed):
            cached(tmp_path)
    [leftover] = entries(tmp_path)
    assert leftover.suffix == ".new"
    assert cached(tmp_path)[1] == 2  # without a warning: nothing was damaged
    [entry] = entries(tmp_path)
    assert entry == leftover.with_suffix("")


def test_concurrent_runs_train_once(tmp_path):
    results: list[tuple[Tensor, int]] = []
    threads = [
        threading.Thread(target=lambda: results.append(cached(tmp_path))) for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(steps for _, steps in results) == [0, 0, 2]
    assert all(torch.equal(found, results[0][0]) for found, _ in results)


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
