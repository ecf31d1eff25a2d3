"""What quantizing without training costs by tool: the same network and images, W8A8, each by its defaults.

    python benchmarks/peers/cost.py [--network models.py:cifar10_resnet20 torchvision:mobilenet_v2] [--size 64]
        [--tools pow2quant onnxruntime aimet mct brevitas esp-ppq nncf]

256 images in batches of 32, weights as the network's code draws them: time does not depend on them. Process CPU time
on one thread of the second call in a process, from the float network to one that can run; imports and, for tools that
read ONNX, the export of the float file do not count. `pow2quant` calibrates only, and with its default methods. Prints
a markdown row per tool, also in FP32 forward passes over the same images. Tools that are absent are left out. (NNCF
compiles an extension in its first run; set NNCF_EXTENSION_LOAD_TIMEOUT=0 where a minute is too short for that.)
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.append(str(Path(__file__).resolve().parents[1]))
from families import images, with_statistics
from vendors import Array, Given

from peers.tools import TOOLS
from pow2quant import models, runs
from pow2quant.backends.base import SILENT
from pow2quant.config import RunConfig, with_values

COUNT, BATCH = 256, 32


class Batched(Given):
    """What every tool gets, with the images in batches."""

    @property
    def each(self) -> list[Array]:
        """Batch by batch."""
        return [self.images[i : i + BATCH] for i in range(0, len(self.images), BATCH)]


def nncf(given: Given, bits: int) -> Any:
    """Its default preset, on the PyTorch network."""
    import nncf

    dataset = nncf.Dataset([torch.from_numpy(batch) for batch in given.each])
    return nncf.quantize(given.network, dataset, subset_size=len(given.each))


def of_ours(methods: list[str] | None) -> Callable[[Given, int], Any]:
    """Capture, calibration and methods; None: the default ones."""

    def quantize(given: Given, bits: int) -> Any:
        data = [torch.from_numpy(batch) for batch in given.each]
        config = with_values(RunConfig(), {"ptq.methods": methods, "data.batch_size": BATCH})
        return runs.quantized(config, SILENT, runs.Given(model=given.network, data=data))

    return quantize


def all_tools() -> dict[str, tuple[Callable[[Given, int], Any], str]]:
    """By name: the function, and the package that quantizes."""
    ours = {"pow2quant, calibration": of_ours([]), "pow2quant, default methods": of_ours(None)}
    return {name: (function, "pow2quant") for name, function in ours.items()} | TOOLS | {"nncf": (nncf, "nncf")}


def seconds(function: Callable[..., object], *given: Any) -> float:
    """Process CPU time of one call, whose talk is not shown."""
    start = time.process_time()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        function(*given)
    return time.process_time() - start


def forward(network: nn.Module, batches: list[Tensor]) -> None:
    """One pass over all images."""
    with torch.no_grad():
        for batch in batches:
            network(batch)


def measure(name: str, size: int, tools: list[str]) -> None:
    """Prints one network's rows."""
    torch.manual_seed(0)
    network, seen = with_statistics(models.build(name), images(BATCH, size, 1)), images(COUNT, size, 2)
    batches = list(seen.split(BATCH))
    forward(network, batches[:1])
    base = seconds(forward, network, batches)
    print(f"| {name.rpartition(':')[2]} | FP32, one pass | | {base:.1f} s | 1.0 |", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "model.onnx")
        shape = {"x": {0: torch.export.Dim.DYNAMIC}}
        torch.onnx.export(network, (batches[0],), file, input_names=["x"], dynamic_shapes=shape, verbose=False)
        for tool, (function, package) in all_tools().items():
            if not any(tool.startswith(wanted) for wanted in tools):
                continue
            try:
                found = f"{package} {version(package)}"
                given = [Batched(copy.deepcopy(network), file, seen.numpy()) for _ in range(2)]
                spent = [seconds(function, one, 8) for one in given][1]
            except (PackageNotFoundError, ImportError) as error:
                print(f"{tool}: absent ({error})", file=sys.stderr)
                continue
            except Exception as error:  # whatever a tool does not take
                print(f"{tool}: {type(error).__name__}: {str(error)[:300]}", file=sys.stderr)
                continue
            print(f"| | {tool} | {found} | {spent:.1f} s | {spent / base:.1f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", nargs="+", default=["torchvision:mobilenet_v2"])
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--tools", nargs="+", default=["pow2quant", *TOOLS, "nncf"])
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    print("| network | tool | version | CPU | FP32 passes |\n|---|---|---|---|---|")
    for name in given.network:
        measure(name, given.size, given.tools)


if __name__ == "__main__":
    main()
