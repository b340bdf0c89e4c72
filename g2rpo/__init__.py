"""g2rpo: a lean trainer that fine-tunes FLUX models with Granular-GRPO (arXiv 2510.01982).

    g2rpo train digits          # the command line
    g2rpo.trainer.Trainer       # the same from Python

It is built on the public names of `g2rpo_kernels` and on diffusers' `FluxTransformer2DModel`.
"""

__version__ = "0.1.0"
