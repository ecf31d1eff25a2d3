"""Peak memory and processor time of the simulation over network size, against the FP32 forward pass on the same batch.

    python benchmarks/large.py [resnet18 …] [--size 224] [--batch 8]

Random weights, one thread. Every network is measured in two processes of its own: one that holds the float network
only, and one in which the simulation is made, calibrated on one batch, and run. Memory is the peak of resident memory
(VmHWM, reset before each phase; Linux) less what the process held before the network was built, so weights count.
Both processes give back what they free (MALLOC_MMAP_THRESHOLD_): glibc otherwise keeps up to twice what is in use.
Processor time is of one pass, the second one for the two forward passes.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from pow2quant import models, simulate

NETWORKS = ("resnet18", "mobilenet_v2", "resnet50", "vit_b_16", "vgg16")


def resident(field: str) -> int:
    """VmRSS or VmHWM of this process, in bytes."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(field))
    return int(line.split()[1]) * 1024


def phase(run: Callable[[], Any], base: int) -> tuple[Any, int, float]:
    """What `run` gives, its peak of memory over `base`, and its processor time."""
    Path("/proc/self/clear_refs").write_text("5")
    start = time.process_time()
    result = run()
    return result, resident("VmHWM") - base, time.process_time() - start


@torch.no_grad()
def measured(name: str, size: int, batch_size: int, simulated: bool) -> dict[str, Any]:
    """Bytes and seconds by phase."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    batch = torch.randn(batch_size, 3, size, size)
    torch.nn.functional.conv2d(batch[:1], torch.randn(4, 3, 3, 3))  # what the first convolution loads
    base = resident("VmRSS")
    model, *_ = phase(lambda: models.build(f"torchvision:{name}").eval(), base)
    found: dict[str, Any] = {"parameters": sum(p.numel() for p in model.parameters())}
    if not simulated:
        phase(lambda: model(batch), base)
        _, *found["forward"] = phase(lambda: model(batch), base)
        return found
    sim, *found["making"] = phase(lambda: simulate(model, batch[:1]), base)
    _, *found["calibration"] = phase(lambda: sim.calibrate([batch]), base)
    phase(lambda: sim.model(batch), base)
    _, *found["forward"] = phase(lambda: sim.model(batch), base)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=NETWORKS)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--measure", choices=("float", "simulation"), help="one network in this process, as JSON")
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measured(options.names[0], options.size, options.batch, options.measure == "simulation")))
        return
    print("| network | parameters | FP32 forward | simulation's forward | calibration | making it |")
    print("|---|---|---|---|---|---|")
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(2**20)}
    for name in options.names:
        sizes = ["--size", str(options.size), "--batch", str(options.batch)]
        plain, ours = (
            json.loads(subprocess.check_output([sys.executable, __file__, name, *sizes, "--measure", kind], env=env))
            for kind in ("float", "simulation")
        )
        memory, seconds = plain["forward"]
        cells = [f"{memory / 2**20:.0f} MiB, {seconds:.1f} s"]
        for key in ("forward", "calibration", "making"):
            cells.append(f"{ours[key][0] / memory:.2f}, {ours[key][1] / seconds:.2f}")
        print(f"| {name} | {plain['parameters'] / 1e6:.1f} M | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
