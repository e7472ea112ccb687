"""Follows what a step allocates: bytes that are there, by what they are there for, and when most are."""

import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry

#: what a step's bytes are there for
KEPT, BACKWARD, HEAD, DEQUANTISED, REFERENCE = (
    *("kept", "backward", "head", "dequantised", "reference"),
)


class Peaks(dict[str, Counter[str]]):
    """ "forward" and "backward" -> bytes by purpose when most was allocated in that pass; "written" -> bytes of
    everything that was ever allocated; "saved" -> bytes that the backward pass begins with; "flops" -> floating point operations of products; "calls" -> operations that the
    host starts."""

    @property
    def bytes(self) -> int:
        """The peak of the step."""
        return self.parts.total()

    @property
    def parts(self) -> Counter[str]:
        """Bytes by purpose at the peak of the step."""
        return max((self["forward"], self["backward"]), key=Counter.total)


class Tracker(TorchDispatchMode):
    """Follows every storage from its first tensor to its last."""

    def __init__(self, known: Iterator[Tensor], vocabulary: int):
        super().__init__()
        self.purpose, self.phase = KEPT, "forward"
        names = ("forward", "backward", "saved", "written", "flops", "calls")
        self.found = Peaks({name: Counter() for name in names})
        self._vocabulary = vocabulary
        self._live: Counter[str] = Counter()
        self._most = {"forward": 0, "backward": 0}
        self._seen = weakref.WeakSet(tensor.untyped_storage() for tensor in known)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        self.found["calls"][self.purpose] += not func.is_view
        if (flops := flop_registry.get(func.overloadpacket)) is not None:
            self.found["flops"][self.purpose] += flops(*args, **kwargs, out_val=out)
        for tensor in tree_iter(out):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage not in self._seen:
                    self._seen.add(storage)
                    is_logits = tensor.dim() > 1 and tensor.shape[-1] == self._vocabulary
                    self._add(storage, HEAD if is_logits else self.purpose)
        return out

    def turn(self) -> None:
        """From forward to backward."""
        self.phase = "backward"
        self.found["saved"] = +self._live
        self._look()

    def _add(self, storage: Any, purpose: str) -> None:
        size = storage.nbytes()
        self._live[purpose] += size
        self.found["written"][purpose] += size
        weakref.finalize(storage, self._free, purpose, size)
        self._look()

    def _look(self) -> None:
        total = self._live.total()
        if total > self._most[self.phase]:
            self._most[self.phase] = total
            self.found[self.phase] = +self._live

    def _free(self, purpose: str, size: int) -> None:
        self._live[purpose] -= size

    def __enter__(self) -> "Tracker":
        _CURRENT.append(self)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        _CURRENT.remove(self)
        super().__exit__(*error)

    @contextmanager
    def taking(self, purpose: str) -> Iterator[None]:
        before, self.purpose = self.purpose, purpose
        try:
            yield
        finally:
            self.purpose = before

    @contextmanager
    def held(self, size: int, flops: int) -> Iterator[None]:
        """Temporaries of a kernel, for the length of a call."""
        self.found["flops"][HEAD] += flops
        self.found["written"][HEAD] += size
        self._live[HEAD] += size
        self._look()
        yield
        self._live[HEAD] -= size


_CURRENT: list[Tracker] = []


def current() -> Tracker:
    """The one that follows the step in progress."""
    return _CURRENT[-1]
