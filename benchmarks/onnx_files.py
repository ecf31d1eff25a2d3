"""Float ONNX files: are they read, equal to onnxruntime, and quantized exactly?

    python benchmarks/onnx_files.py FILE.onnx … --results onnx.jsonl [--page docs/onnx-files.md]
    python benchmarks/onnx_files.py NETWORKS.py … --only structure,tinyml --results onnx.jsonl

A Python file defines `ZOO` as for `zoo.py`: each of its networks is exported by both of torch's exporters (with an open
batch where that works), and the codes from the file must be those from the PyTorch network, too. Inputs are noise; what
a file leaves open beside the batch is --size. Results are appended; what stands there is not run again.
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
import zoo
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from pow2quant import QuantPlan, prepare, simulate
from pow2quant.config import from_file
from pow2quant.errors import ModelError
from pow2quant.frontends.onnx.network import read_network

EXPORTERS = {"dynamo": True, "TorchScript": False}


def exported(model: nn.Module, batch: tuple[Tensor, ...], dynamo: bool, path: Path) -> bool:
    """Whether torch can export it: open in the batch, or else for a batch of one."""
    names = [f"input{i}" for i in range(len(batch))]
    for dynamic in (True, False):
        options: dict[str, Any] = {"dynamo": dynamo, "input_names": names, "verbose": False}
        if dynamic and dynamo:
            options["dynamic_shapes"] = [{0: torch.export.Dim.DYNAMIC} for _ in batch]
        elif dynamic:
            options["dynamic_axes"] = {name: {0: "n"} for name in names}
        try:
            torch.onnx.export(model, batch if dynamic else tuple(x[:1] for x in batch), path, **options)
        except Exception:  # exporters raise whatever they like
            continue
        return True
    return False


def noise(path: Path, count: int, size: int, seed: int) -> tuple[Tensor, ...]:
    """Inputs for a file. size: of the dimensions that it leaves open, beside the batch."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    graph = onnx.load(path, load_external_data=False).graph
    held = {i.name for i in graph.initializer}
    for given in (i for i in graph.input if i.name not in held):
        dims = [d.dim_value if d.dim_value > 0 else size for d in given.type.tensor_type.shape.dim]
        shape = (count, *dims[1:])
        kind = given.type.tensor_type.elem_type
        is_float = kind in (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.DOUBLE)
        values = torch.randn(shape, generator=generator)
        made.append(values if is_float else torch.randint(0, 100, shape, generator=generator))
    return tuple(made)


def distance(path: Path, network: nn.Module, batch: tuple[Tensor, ...]) -> tuple[float, str]:
    """The largest difference to onnxruntime, relative to the largest value of the output; if large, which is right."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    given, count = session.get_inputs(), len(batch[0])
    step = given[0].shape[0] if isinstance(given[0].shape[0], int) and given[0].shape[0] > 0 else count
    rows = np.arange(-(-count // step) * step) % count  # a fixed batch may be larger
    kinds = {"tensor(int32)": np.int32, "tensor(int64)": np.int64}
    arrays = [
        (i.name, x.numpy().astype(kinds.get(i.type, np.float32))[rows]) for i, x in zip(given, batch, strict=True)
    ]
    parts = [session.run(None, {n: x[i : i + step] for n, x in arrays}) for i in range(0, len(rows), step)]
    with torch.no_grad():
        got = [x.numpy() for x in pytree.tree_leaves(network(*batch))]
    wanted = [np.concatenate(p, _grown(g, p[0])) for g, p in zip(got, zip(*parts, strict=True), strict=True)]
    wanted = [w[: len(g)] for g, w in zip(got, wanted, strict=True)]
    far = _farthest(got, wanted)
    return far, "" if far <= 1e-5 else _double(network, batch, got, wanted)


def _farthest(got: list[Any], wanted: list[Any]) -> float:
    return max(float(np.abs(g - w).max() / max(1e-12, np.abs(w).max())) for g, w in zip(got, wanted, strict=True))


def _double(network: nn.Module, batch: tuple[Tensor, ...], got: list[Any], wanted: list[Any]) -> str:
    """How far the network and onnxruntime are from the network in float64."""
    try:
        with torch.no_grad():
            exact = pytree.tree_leaves(
                copy.deepcopy(network).double()(*(x.double() if x.is_floating_point() else x for x in batch))
            )
    except Exception:  # the file holds tensors or conversions of its own to float32
        return ""
    exact = [x.numpy() for x in exact]
    return f"from float64 the network is {_farthest(got, exact):.1e} away, onnxruntime {_farthest(wanted, exact):.1e}"


def _grown(whole: Any, part: Any) -> int:
    """The dimension in which a part is smaller than the whole: that of the batch."""
    return next((d for d, (a, b) in enumerate(zip(whole.shape, part.shape, strict=True)) if a != b), 0)


def codes(network: nn.Module, example: Any) -> list[Tensor]:
    """What the quantized network gives for the batch that it was calibrated on."""
    sim = simulate(network, example, QuantPlan.default(), backend="custom")
    sim.calibrate([example])
    with torch.no_grad():
        return pytree.tree_leaves(sim.model(*(example if isinstance(example, tuple) else (example,))))


def try_file(
    path: Path, options: argparse.Namespace, model: nn.Module | None = None, example: Any = None
) -> dict[str, Any]:
    """model: the PyTorch network that the file was exported from, if there is one, and inputs for it."""
    torch.set_num_threads(1)
    network = read_network(path)
    batches = [noise(path, n, options.size, seed) for n, seed in ((4, 0), (4, 5), (2, 7), (2, 8))]
    if example is not None:
        batches[0] = example
        batches[1:] = [tuple(x[i : i + 2] for x in example) for i in (0, 1, 2)]
    far, why = distance(path, network, batches[0])
    found = zoo.judged(prepare(network, batches[0]), batches[0], batches[:2], batches[2:], options)
    if far > 1e-5 and found["result"] == "exact":
        found |= {"result": "far", "reason": why}
    if model is not None:
        pairs = zip(codes(model, batches[0]), codes(network, batches[0]), strict=False)
        found["same_codes"] = all(torch.equal(a, b) for a, b in pairs)
    return {**found, "distance": far, "nodes": len(onnx.load(path, load_external_data=False).graph.node)}


def try_export(network: tuple[str, Any, Any, str], exporter: str, options: argparse.Namespace) -> dict[str, Any]:
    """A network of PyTorch, exported and read again."""
    _, factory, shapes, kind = network
    torch.manual_seed(0)
    model = zoo.with_statistics(factory(), zoo.batch(shapes, kind, 4, 1))
    example = tuple(pytree.tree_leaves(zoo.batch(shapes, kind, 4, 2)))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "net.onnx")
        if not exported(model, example, EXPORTERS[exporter], path):
            return {"result": "not exported"}
        return try_file(path, options, model, example)


def page(results: list[dict[str, Any]]) -> str:
    """The table of the documentation, in Markdown."""
    lines = [
        "# ONNX files that were tried",
        "",
        "`benchmarks/onnx_files.py`, W8A8, inputs of noise: every file is read, compared with onnxruntime on the float",
        "file, quantized, and run in every executor. Exact: 0 differing elements, and within 1e-5 of onnxruntime,",
        "relative to the largest value; far: quantized with 0 differing elements, but farther from the float file.",
        f"The engine and the C run where the network is small. {zoo.commits(results)}",
    ]
    lines += [f"torch {torch.__version__}, onnxruntime {onnxruntime.__version__}, {time.strftime('%B %d, %Y')}.", ""]
    lines += ["| exported by | files | exact | same codes as from PyTorch | largest distance to onnxruntime |"]
    lines += ["|---|---|---|---|---|"]
    for exporter in EXPORTERS:
        own = [r for r in results if r.get("exporter") == exporter and r["result"] != "not exported"]
        far = max((r["distance"] for r in own if "distance" in r), default=0)
        counts = [len(own), sum(r["result"] == "exact" for r in own), sum(r.get("same_codes", False) for r in own)]
        lines.append(f"| torch, {exporter} | {counts[0]} | {counts[1]} | {counts[2]} | {far:.1e} |" if own else "")
    lines += ["", "| file from elsewhere | nodes | | distance to onnxruntime | claim |", "|---|---|---|---|---|"]
    for r in (r for r in results if "exporter" not in r):
        claims = {a[2] for e in r.get("executors", {}).values() if isinstance(e, list) for a in e}
        far = f"{r['distance']:.1e}" if "distance" in r else ""
        lines.append(f"| {r['name']} | {r.get('nodes', '')} | {r['result']} | {far} | {', '.join(sorted(claims))} |")
    lines += ["", "| not exact | | why |", "|---|---|---|"]
    for r in (r for r in results if r["result"] not in ("exact", "not exported")):
        why = zoo.shown(str(r.get("reason") or r.get("first") or ""))
        lines.append(f"| {r['name']} {r.get('exporter', '')} | {r['result']} | {why} |")
    return "\n".join(line for i, line in enumerate(lines) if line or lines[i - 1]) + "\n"


Job = tuple[dict[str, Any], Callable[[], dict[str, Any]]]


def jobs(options: argparse.Namespace) -> Iterator[Job]:
    """For every file what its row begins with, and what makes the rest."""
    for source in options.sources:
        if source.endswith(".onnx"):
            yield {"name": Path(source).name}, partial(try_file, Path(source), options)
            continue
        for name, network in from_file(f"{source}:ZOO", ModelError).items():
            if not options.only or {name, network[0]} & set(options.only.split(",")):
                for exporter in EXPORTERS:
                    yield {"name": name, "exporter": exporter}, partial(try_export, network, exporter, options)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", nargs="*", help="ONNX files, and Python files with ZOO")
    parser.add_argument("--only", help="names or groups of networks, separated by commas")
    parser.add_argument("--results", type=Path, default=Path("onnx.jsonl"))
    parser.add_argument("--page", type=Path)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--timeout", type=float, default=180)
    parser.add_argument("--engine-macs", type=float, default=4e7)
    parser.add_argument("--c-macs", type=float, default=1e7)
    options = parser.parse_intermixed_args()
    done = [json.loads(line) for line in options.results.read_text().splitlines()] if options.results.exists() else []
    for row, run in jobs(options):
        if (row["name"], row.get("exporter")) in {(r["name"], r.get("exporter")) for r in done}:
            continue
        done.append({**row, **zoo.guarded(run, options.timeout)})
        with options.results.open("a") as file:
            file.write(json.dumps(done[-1]) + "\n")
        last = done[-1]
        print(f"{last['result']:9s} {last['name']} {last.get('exporter', '')} {last['seconds']} s", flush=True)
        print(f"    {last.get('distance', '')} {last.get('same_codes', '')} {last.get('reason', '')}", flush=True)
    if options.page:
        options.page.write_text(page(done), encoding="utf-8")
    print(", ".join(f"{n} {kind}" for kind, n in Counter(r["result"] for r in done).items()))


if __name__ == "__main__":
    main()
