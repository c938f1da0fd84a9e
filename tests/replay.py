"""Recording of decode steps on a CPU, as a CUDA graph records them: operators with the tensors that they change."""

from functools import partial
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map


class Tape(TorchDispatchMode):
    """Records operators with their arguments, whatever the host computed for them, and can run them again."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Run an operator and record it."""
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, result))
        return result

    def replay(self, wanted: torch.Tensor) -> torch.Tensor:
        """Run all operators again; tensors that they did not make are those of the recording."""
        made: dict[int, Any] = {}
        renew = partial(tree_map, lambda one: made.get(id(one), one))
        for func, args, kwargs, result in self.calls:
            again = func(*renew(args), **renew(kwargs))
            made |= {id(old): new for old, new in zip(tree_leaves(result), tree_leaves(again), strict=True)}
        return made[id(wanted)]


def record(run):
    """Record a step as a CUDA graph does; the step is run meanwhile, so that it is undone."""
    cache = run.__closure__[0].cell_contents
    counters = (cache._columns, cache._positions)
    before = [one.clone() for one in counters]
    with Tape() as tape:
        recorded = run()
    for counter, old in zip(counters, before, strict=True):
        counter.copy_(old)
    result = recorded.clone()
    return lambda: result.copy_(tape.replay(recorded)), result
