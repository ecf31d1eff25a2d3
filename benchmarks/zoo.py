"""Networks from other projects, W8A8, with random weights: does every executor give the simulation's bits?

    python benchmarks/zoo.py NETWORKS.py [NAME or GROUP …] --results zoo.jsonl [--page docs/zoo.md] [--timeout 180]

NETWORKS.py defines `ZOO`, a dictionary of name -> (group, factory, shapes of the inputs without the batch, kind), kind
being "img" (smoothed noise), "tok" (integers below 100), a function of (count, seed) that gives inputs, or anything
else (normal noise). What its factories need (timm, transformers, ...) must be installed; pow2quant needs none of it.
Each network runs in a process of its own; results are appended to a file of JSON lines, and a network that is in it is
not run again. --page writes the table, --each with a line for every network.

Batch norm statistics are estimated on a batch of noise: random weights make any input as good as any other. The engine
and the C run where one input costs few enough operations (--engine-macs, --c-macs).
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import platform
import subprocess
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from pow2quant import QuantPlan, prepare, simulate
from pow2quant.adapters import onnx_qdq
from pow2quant.config import from_file
from pow2quant.errors import ModelError, Pow2QuantError
from pow2quant.frontends.export import in_eval_mode, module_of
from pow2quant.integer.certificate import certify
from pow2quant.plugins import resolve
from pow2quant.runs.executors import simulation_executor
from pow2quant.validation.agreement import compare


def batch(shapes: tuple[tuple[int, ...], ...], kind: Any, count: int, seed: int) -> Any:
    """Inputs of one call, `count` samples."""
    if callable(kind):
        return kind(count, seed)
    generator = torch.Generator().manual_seed(seed)

    def one(shape: tuple[int, ...]) -> Tensor:
        if kind == "tok":
            return torch.randint(0, 100, (count, *shape), generator=generator)
        x = torch.randn(count, *shape, generator=generator)
        if kind == "img" and len(shape) == 3 and shape[1] >= 16:
            coarse = torch.randn(count, shape[0], shape[1] // 8, shape[2] // 8, generator=generator)
            x = F.interpolate(coarse, shape[1:], mode="bilinear") + 0.3 * x
        return x

    if kind == "dict":
        return {"x": torch.randn(count, 5, generator=generator)}
    made = tuple(one(s) for s in shapes)
    return made[0] if len(made) == 1 else made


def with_statistics(model: nn.Module, inputs: Any) -> nn.Module:
    """Sets every batch norm's statistics to those of one batch, where the network can be run in training mode."""
    model = module_of(model)
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
        norm.train()
    try:
        with torch.no_grad():
            model(*(inputs if isinstance(inputs, tuple) else (inputs,))) if norms else None
    except Exception:  # a network that takes no batch of this size is judged by `prepare`
        pass
    return in_eval_mode(model)


def try_one(network: tuple[str, Any, Any, str], options: argparse.Namespace) -> dict[str, Any]:
    """One network: what each executor says, or why there is none."""
    _, factory, shapes, kind = network
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = with_statistics(factory(), batch(shapes, kind, 4, 1))
    example = batch(shapes, kind, 4, 2)
    calibration = [example, batch(shapes, kind, 4, 5)]
    return judged(
        prepare(model, example), example, calibration, [batch(shapes, kind, options.inputs, s) for s in (7, 8)], options
    )


def judged(
    prepared: fx.GraphModule, example: Any, calibration: list[Any], tests: list[Any], options: argparse.Namespace
) -> dict[str, Any]:
    """A prepared network, quantized: what each executor says of the test batches."""
    sim = simulate(prepared, example, QuantPlan.default(), backend="custom")
    sim.calibrate(calibration)
    artifact = sim.export(example)
    proof = certify(artifact)
    arrays = [[x.numpy() for x in pytree.tree_leaves(test)] for test in tests]
    found: dict[str, Any] = {"proved": [sum(y.proved for y in proof.layers), len(proof.layers)], "executors": {}}
    reference = simulation_executor(sim, "custom", torch.device("cpu"))
    found["inputs"] = [sum(len(a[0]) for a in arrays), len(arrays[0][0])]
    found["distinct"] = len(np.unique(reference.run(arrays[0])[0]))
    with tempfile.TemporaryDirectory() as folder:
        path = onnx_qdq.export_qdq(artifact, Path(folder))
        macs = 0
        for name, limit in (("onnxruntime", None), ("engine", options.engine_macs), ("c", options.c_macs)):
            if limit is not None and macs > limit:
                found["executors"][name] = "left out: too large for this benchmark"
                continue
            try:
                made = resolve("validators", name)(path, None)
            except Pow2QuantError as error:
                found["executors"][name] = f"left out: {error}"
                continue
            macs = max(macs, *(e.work for e in made))
            if limit is not None and macs > limit:
                found["executors"][name] = "left out: too large for this benchmark"
                continue
            agreements = compare(reference, made, arrays if limit is None else arrays[:1], artifact, proof=proof)
            found["executors"][name] = [[a.differing, a.elements, a.claim] for a in agreements]
            if not all(a.agrees for a in agreements):
                found["first"] = next(str(a.first_diverging) for a in agreements if a.first_diverging)
    differs = any(a[0] for e in found["executors"].values() if isinstance(e, list) for a in e)
    return {"result": "differs" if differs else "exact", **found}


def child(run: Callable[[], dict[str, Any]], answer: Any) -> None:
    """What a process of its own runs: sends one dictionary."""
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    try:
        answer.send(run())
    except Pow2QuantError as error:
        answer.send({"result": "refused", "reason": str(error)})
    except BaseException as error:
        answer.send({"result": "traceback", "reason": repr(error), "traceback": traceback.format_exc()})


def guarded(run: Callable[[], dict[str, Any]], timeout: float) -> dict[str, Any]:
    """What `run` gives, in a process of its own, within the time limit."""
    started = time.perf_counter()
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=child, args=(run, theirs))
    process.start()
    theirs.close()
    try:
        result = ours.recv() if ours.poll(timeout) else {"result": "timeout"}
    except EOFError:
        result = {"result": "crash"}
    process.kill()
    process.join()
    return {**result, "seconds": round(time.perf_counter() - started, 1), "commit": commit()}


def commit() -> str:
    """The commit of this repository, shortened; "unknown" outside of one."""
    told = subprocess.run(
        ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"], capture_output=True
    )
    return told.stdout.decode().strip() or "unknown"


def commits(results: list[dict[str, Any]]) -> str:
    """Which commits the results are of, and how many of each where there are several."""
    counts = Counter(r.get("commit", "earlier ones") for r in results)
    parts = [name if len(counts) == 1 else f"{name} ({n} results)" for name, n in counts.most_common()]
    return f"Commit {parts[0]}." if len(parts) == 1 else f"Commits {', '.join(parts)}."


def page(results: list[dict[str, Any]], of: int, options: argparse.Namespace) -> str:
    """The table of the documentation, in Markdown. of: how many networks there are, those included that did not run."""
    count = Counter(r["result"] for r in results)
    others = ", ".join(f"{n} {kind}" for kind, n in sorted(count.items()) if kind != "exact")
    lines = [
        f"# {options.title}",
        "",
        f"`benchmarks/zoo.py` on {len(results)} of {of} networks with random weights, W8A8, `custom` backend, "
        f"torch {torch.__version__}, onnxruntime {onnxruntime.__version__}, Python {platform.python_version()}, "
        f"{time.strftime('%B %d, %Y')}: **{count['exact']} exact** (0 differing "
        "elements in onnxruntime without and with its optimizations, and in the engine and the C where they run)"
        + (f", {others}. Refused is one clear line; the reasons are below." if others else "."),
        "",
        f"The engine runs where one input costs at most {options.engine_macs:.0e} multiplications, the C at most "
        f"{options.c_macs:.0e}. {commits(results)}",
        "",
        "| group | networks | exact | engine runs | C runs |",
        "|---|---|---|---|---|",
    ]
    for group in dict.fromkeys(r["group"] for r in results):
        own = [r for r in results if r["group"] == group]
        runs = [sum(isinstance(r.get("executors", {}).get(e), list) for r in own) for e in ("engine", "c")]
        lines.append(f"| {group} | {len(own)} | {sum(r['result'] == 'exact' for r in own)} | {runs[0]} | {runs[1]} |")
    lines += ["", "| not exact | | why |", "|---|---|---|"] if others else []
    for r in results:
        if r["result"] != "exact":
            why = str(r.get("reason") or r.get("first") or "").split(". Write it with")[0]
            lines.append(f"| {r['name']} | {r['result']} | {shown(why)} |")
    return "\n".join([*lines, *(each(results) if options.each else [])]) + "\n"


def each(results: list[dict[str, Any]]) -> list[str]:
    """A line for every network: executors of one outcome stand together."""
    lines = [
        "",
        "Inputs: those of onnxruntime, and of engine and C. Distinct codes: among the results of the latter.",
        "",
        "| network | inputs | distinct codes | differing of | claim | layers proved | seconds |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in results:
        found: dict[str, list[str]] = {}
        for name, agreements in r.get("executors", {}).items():
            for a in agreements if isinstance(agreements, list) else [[agreements, "", ""]]:
                outcome = f"{a[0]:,} of {a[1]:,}" if a[1] else str(a[0])
                names = found.setdefault(f"{outcome} | {str(a[2]).partition(' on ')[0]}", [])
                if name not in names:
                    names.append(name)
        outcomes = [key.split(" | ") for key in found]
        differing = "; ".join(f"{', '.join(found[' | '.join(o)])}: {o[0]}" for o in outcomes) or r["result"]
        claims = ", ".join(dict.fromkeys(o[1] for o in outcomes if o[1]))
        inputs, proved = (" and ".join(map(str, r.get(key, []))) for key in ("inputs", "proved"))
        proved = proved.replace(" and ", " of ")
        lines.append(
            f"| {r['name']} | {inputs} | {r.get('distinct', '')} | {differing} | {claims} | {proved} | {r['seconds']} |"
        )
    return lines


def shown(text: str) -> str:
    """One line for a table, without folders of this machine."""
    words = [w.rpartition("/")[2] if w.count("/") > 1 else w for w in text.replace("|", "\\|").split()]
    return " ".join(words)[:300]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks")
    parser.add_argument("names", nargs="*", help="names or groups; all without them")
    parser.add_argument("--results", type=Path, default=Path("zoo.jsonl"))
    parser.add_argument("--page", type=Path)
    parser.add_argument("--title", default="Networks that were tried", help="of the page")
    parser.add_argument("--each", action="store_true", help="a line for every network on the page")
    parser.add_argument(
        "--inputs", type=int, default=2, help="in each of the two batches that executors are compared on"
    )
    parser.add_argument("--timeout", type=float, default=180)
    parser.add_argument("--engine-macs", type=float, default=4e7)
    parser.add_argument("--c-macs", type=float, default=1e7)
    options = parser.parse_intermixed_args()
    zoo = from_file(f"{options.networks}:ZOO", ModelError)
    done = [json.loads(line) for line in options.results.read_text().splitlines()] if options.results.exists() else []
    for name, network in zoo.items():
        wanted = not options.names or name in options.names or network[0] in options.names
        if wanted and name not in {r["name"] for r in done}:
            done.append(
                {"name": name, "group": network[0], **guarded(partial(try_one, network, options), options.timeout)}
            )
            with options.results.open("a") as file:
                file.write(json.dumps(done[-1]) + "\n")
            print(
                f"{done[-1]['result']:9s} {name:45s} {done[-1]['seconds']:6.1f} s  {done[-1].get('reason', '')[:150]}",
                flush=True,
            )
    if options.page:
        order = {name: i for i, name in enumerate(zoo)}
        done.sort(key=lambda r: order.get(r["name"], len(order)))
        options.page.write_text(page(done, len(zoo), options), encoding="utf-8")
    print(", ".join(f"{n} {kind}" for kind, n in Counter(r["result"] for r in done).items()))
    raise SystemExit(0 if all(r["result"] in ("exact", "refused", "timeout") for r in done) else 1)


if __name__ == "__main__":
    main()
