"""Where and how PyTorch computes in a run: the device, and exactly."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from pow2quant.errors import ConfigError


def device_of(name: str) -> torch.device:
    """Raises ConfigError for a device that is not there."""
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = " ".join(str(error).split())[:120]
        raise ConfigError(f"device: {name!r} cannot be used here: {reason}") from error
    return device


def be_exact() -> None:
    """Deterministic, no reduced precision, and sums of products only (NNPACK's Winograd computes others).

    Both of PyTorch's ways to say so are used, in this order: after it, each can still be read.
    """
    torch.backends.nnpack.set_flags(False)
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    libraries: Any = torch.backends
    if hasattr(libraries, "fp32_precision"):  # since PyTorch 2.9
        for part in (libraries.cuda.matmul, libraries.cudnn.conv, libraries.cudnn.rnn):
            part.fp32_precision = "ieee"
        for part in (libraries.mkldnn.matmul, libraries.mkldnn.conv, libraries.mkldnn.rnn):
            part.fp32_precision = "ieee"
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False


@contextmanager
def own_numbers() -> Iterator[None]:
    """Around a call that seeds PyTorch's random numbers: behind it, the caller's go on where they were."""
    cards = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=cards):
        yield
