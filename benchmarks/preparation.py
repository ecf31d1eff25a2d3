"""What preparing a network costs, beside its own forward: memory and time, on Linux.

    python benchmarks/preparation.py [--layers 12] [--size 512] [--channels 24] [--batch 2] [--model NAME]

The network is a chain of 3x3 convolutions with ReLU, or the one that --model names. Memory is how far the process grows
above what it held before the call, at its peak, where every freed tensor goes back to the system at once (else what the
allocator keeps for later counts, too, by the order of the calls). Seconds are those of one thread. `prepare` compares
the network with its capture on two samples and on one, whatever the batch is.
"""

from __future__ import annotations

import argparse
import ctypes
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from pow2quant import prepare
from pow2quant.models import build

MMAP_THRESHOLD = -3
"""Of glibc's mallopt: from which size on memory comes from the system, and goes back when it is freed."""


def chain(layers: int, channels: int) -> nn.Module:
    """Convolutions that keep the size of the image."""
    convolutions = [nn.Conv2d(3 if i == 0 else channels, channels, 3, padding=1) for i in range(layers)]
    return nn.Sequential(*[module for c in convolutions for module in (c, nn.ReLU())]).eval()


def cost(call: Callable[[], object]) -> tuple[float, float]:
    """(MiB above what the process held before the call, seconds)."""
    Path("/proc/self/clear_refs").write_text("5")  # starts the peak anew
    before, started = _held("VmRSS"), time.process_time()
    call()
    return _held("VmHWM") - before, time.process_time() - started


def _held(key: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--channels", type=int, default=24)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--model", help="a name as for `pow2quant ptq --model`")
    options = parser.parse_args()
    torch.set_num_threads(1)
    ctypes.CDLL(None).mallopt(MMAP_THRESHOLD, 1 << 16)
    model = build(options.model).eval() if options.model else chain(options.layers, options.channels)
    x = torch.randn(options.batch, 3, options.size, options.size)

    def forward() -> None:
        with torch.no_grad():
            model(x)

    def export() -> None:
        with torch.no_grad():
            torch.export.export(model, (x,), strict=False)

    prepare(chain(1, 3), torch.randn(2, 3, 64, 64))  # what is imported at first use is no cost of a network
    forward()
    weights = sum(p.numel() * p.element_size() for p in model.parameters()) / 2**20
    print(f"weights       {weights:8.1f} MiB")
    for name, call in (("forward", forward), ("torch.export", export), ("prepare", lambda: prepare(model, x))):
        memory, seconds = cost(call)
        print(f"{name:12s}  {memory:8.1f} MiB {seconds:8.2f} s")


if __name__ == "__main__":
    main()
