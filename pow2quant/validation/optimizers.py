"""Which of onnxruntime's graph optimizers changes what a file computes: found by leaving optimizers out."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from pow2quant.rewrites import REWRITES

Same = Callable[[Sequence[str]], bool]
"""Whether a file gives the same as without any optimization when every optimizer but these is used."""


def culprits(same: Same) -> list[str]:
    """The optimizers without which the difference is gone: none of them can be left away from the list.

    Empty where the difference stays without all that are known. Tries to use larger parts of the list again, then
    smaller ones.
    """
    names = [rewrite.name for rewrite in REWRITES]
    if not same(names):
        return []
    size = len(names) // 2
    while size:
        for part in [names[i : i + size] for i in range(0, len(names), size)]:
            rest = [name for name in names if name not in part]
            if rest and same(rest):
                names = rest
        size //= 2
    return names


def sentence(name: str, found: Sequence[str]) -> str:
    """What to tell of an executor's file whose values optimizers change."""
    if not found:
        return f"the graph optimizations of {name} change values of its file; without them it gives the same"
    what, does = ("an optimizer", "changes") if len(found) == 1 else ("optimizers", "change")
    without = "it" if len(found) == 1 else "them"
    return (
        f"{' and '.join(found)}, {what} of onnxruntime, {does} values of the file; "
        f"without {without} the optimized file gives the same"
    )
