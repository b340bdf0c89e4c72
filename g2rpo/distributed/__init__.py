"""A run on several processes, one a GPU, as torchrun starts them.

    ranks.py     who they are, and what they tell one another
    watch.py     who of them is where, so that none waits for one that has gone
    layout.py    where the weights lie: whole everywhere, or a part each (FSDP2)
    shards.py    a rank's part of a parameter, and the whole of one
    replica.py   the whole weights of a sharded transformer, for as long as completions last

Gathers, reductions and sharding are PyTorch's. Prompts carry their seeds with them, so that what is
drawn, and up to rounding what is learned, does not depend on the number of ranks.
"""

from .ranks import ALONE, Ranks, joined, launched

__all__ = ["ALONE", "Ranks", "joined", "launched"]
