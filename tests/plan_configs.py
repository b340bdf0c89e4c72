"""Configurations as `g2rpo plan` is given them."""

from __future__ import annotations

from g2rpo import arguments as args
from g2rpo.config import Config


def config_of(*arguments) -> Config:
    config, _ = args.named_config(args.make_parser("plan"), [str(a) for a in arguments])
    config.validate(training=False)
    return config
