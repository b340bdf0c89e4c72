"""A policy whose images break: said, counted, and no end of the run."""

import torch
from tiny import TinyModel, tiny_config

from g2rpo import run
from g2rpo.metrics import MetricsLog


class Broken(TinyModel):
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        images = super().decode(latents)
        images[0] = torch.nan
        return images


def test_images_that_are_not_finite(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run, "load_model", lambda config, **_: Broken())
    config = tiny_config()
    config.train.updates = 1
    assert run.start(config, tmp_path / "run") == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "Update 1: 1 of 6 evaluation images hold NaN" in said
    assert not list((tmp_path / "run" / "samples").iterdir())
    assert (tmp_path / "run" / "report.html").exists()
    row = MetricsLog(tmp_path / "run" / "metrics.jsonl").rows()[-1]
    assert 0 < row["failed_groups"] < row["reward_groups"]
