"""Memory of CPU work as a GPU's allocator would count it: bytes of storages that are alive."""

from __future__ import annotations

import weakref

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Live(TorchDispatchMode):
    """Within the block, `now` is the bytes of the storages made in it and still alive, `peak` the
    highest that was. Not what an op allocates and frees within itself."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for value in tree_leaves((args, kwargs)):
            self._see(value, count=False)  # made before
        for value in tree_leaves(out):
            self._see(value, count=True)
        return out

    def _see(self, value: object, count: bool) -> None:
        if not isinstance(value, Tensor):
            return
        storage = value.untyped_storage()
        key, size = storage._cdata, storage.nbytes() if count else 0
        if key in self._known:
            return
        self._known.add(key)
        weakref.finalize(storage, self._gone, key, size)
        self.now += size
        self.peak = max(self.peak, self.now)

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size
