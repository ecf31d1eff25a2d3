"""The C writer: a program as a folder of C99 that stands alone.

Every step writes itself (`emit_c` in `ops/`) as a function that calls kernels; the kernels are templates, written out
for the types that the steps have. Where the tensors lie is planned by `memory.py`. A recurrent network is written
twice: for a whole sequence, and in `step/` for one step, whose states the caller keeps.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pow2quant.artifact import recurrent_of
from pow2quant.errors import ConfigError, UnsupportedModelError
from pow2quant.integer.c_layer import BLOCK, Array, Layer
from pow2quant.integer.c_text import comment, ctype, fitted, numbers, plain, shape
from pow2quant.integer.layout import LAYOUTS, channels_last
from pow2quant.integer.lower import lower
from pow2quant.integer.memory import NARROW, WIDE, Needs, Spot, place
from pow2quant.integer.pack import sample_codes
from pow2quant.integer.run import run
from pow2quant.integer.stream import one_step, sequence
from pow2quant.integer.vectors import has_vectors
from pow2quant.pow2_constraints.arithmetic import HALF_EVEN, ROUNDINGS
from pow2quant.saving import staged

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jinja2 import Environment
    from numpy.typing import NDArray

    from pow2quant.artifact import Artifact
    from pow2quant.integer.program import Program, Tensor

PLAN = "plan.json"
STEP = "step"
"""The folder of the program of one step, and what its prefix ends in."""

CODE = ("model.h", "model.c", "kernels.h", "vectors.h", "weights.h")
FILES = (*CODE, "test_vectors.h", "main.c", "Makefile", "README.md")
"""The templates of files; `model` becomes the prefix."""

VECTORS = 16
LARGEST_VECTORS = 2**20
"""There are so many test vectors, or fewer where their inputs would have more codes than that."""

WORDS = {"": "with round half to even"} | {rule: f"by the rule {rule} ({text})" for rule, text in ROUNDINGS.items()}
"""What the kernels' comments say of each rounding; half to even has no name there."""

ARENAS = {NARROW: "arena", WIDE: "wide"}
"""What the static arrays are called."""


def export_c(artifact: Artifact, folder: str | Path, *, prefix: str = "model", layout: str = "nchw") -> Path:
    """C99 that stands alone, in `folder`, which an older export may take up. Returns it.

    prefix: of the files and of the function, `<prefix>_run`. layout: of images that come in, of `layout.LAYOUTS`.
    Raises what `lower` raises; OutputError where the folder holds something else, or cannot be written.
    """
    if layout not in LAYOUTS:
        raise ConfigError(f"layout: {layout!r} is not legal; legal: {', '.join(LAYOUTS)}")
    program, folder = lower(artifact), Path(folder)
    program = channels_last(program) if layout == "nhwc" else program
    step, reason = _step(artifact)
    texts = files(program, prefix, reason)
    if step is not None:
        texts |= {f"{STEP}/{name}": text for name, text in files(step, f"{prefix}_{STEP}").items()}
    with staged(folder, PLAN) as staging:
        for name, text in texts.items():
            (staging / name).parent.mkdir(exist_ok=True)
            (staging / name).write_text(text, encoding="utf-8", newline="\n")
    return folder


def _step(artifact: Artifact) -> tuple[Program | None, str]:
    """The program of one step of a recurrent network, and what a README says of it."""
    if not recurrent_of(artifact.model):
        return None, ""
    try:
        return one_step(artifact), f"`{STEP}/` has the same network for one step of the sequence at a time."
    except UnsupportedModelError as error:
        return None, f"It cannot go step by step: {error}."


def files(program: Program, prefix: str = "model", steps: str = "") -> dict[str, str]:
    """The text of every file by name. steps: what the README says of the network step by step."""
    source = _source(program, prefix)
    return _filled(FILES, prefix, source.document() | source.tests() | {"steps": steps}) | {PLAN: source.plan_json()}


def code(program: Program) -> dict[str, str]:
    """The text of the files that compute the network, by name."""
    return _filled(CODE, "model", _source(program, "model").document())


def memory(program: Program) -> tuple[int, int]:
    """(RAM, flash) of a program's C in bytes, as its README says them."""
    source = _source(program, "model")
    return source.memory.ram, source.flash


def _source(program: Program, prefix: str) -> Source:
    """Written twice: what memory the first plan leaves over, the second uses."""
    least = Source(program, prefix)
    return Source(program, prefix, least.memory.spare(len(program.steps)))


def _filled(templates: Sequence[str], prefix: str, values: dict[str, Any]) -> dict[str, str]:
    texts = ((name, _environment().get_template(f"{name}.j2").render(values)) for name in templates)
    return {name.replace("model", prefix): text.rstrip("\n") + "\n" for name, text in texts}


@cache
def _environment() -> Environment:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    loader = FileSystemLoader(Path(__file__).with_name("templates"))
    return Environment(loader=loader, undefined=StrictUndefined, autoescape=False)


@dataclass
class Place:
    """An input or output of the network, as the C function's parameter."""

    role: str
    name: str
    tensor: Tensor
    pixels: bool = False

    @property
    def values(self) -> dict[str, Any]:
        """For the templates."""
        t = self.tensor
        centre = f"(q - {t.zero})" if t.zero > 0 else f"(q + {-t.zero})" if t.zero else "q"
        real = f"2^{t.exponent} * {centre}"
        return {
            "role": self.role,
            "name": self.name,
            "tensor": comment(t.name),
            "shape": shape(t),
            "ctype": ctype(t),
            "size": t.size,
            "low": t.low,
            "high": t.high,
            "real": real,
            "pixels": self.pixels,
            "meaning": "the image's bytes as the camera gives them, not normalized"
            if self.pixels
            else f"a code q of {t.low} .. {t.high} stands for {real}",
        }


class Source:
    """A program's C under construction. spare: bytes that the memory has left over at every step."""

    def __init__(self, program: Program, prefix: str, spare: Sequence[int] = ()) -> None:
        self.program, self.prefix = program, prefix
        self.arrays: list[Array] = []
        self.kernels: dict[str, str] = {}
        self.vectors: list[str] = []
        self.used: set[str] = set()
        self.constants: dict[str, str] = {}
        taken: set[str] = set()
        tensors, carried = program.tensors, {name for pair in program.states for name in pair}
        roles = {name: role for role in ("input", "output") for name in getattr(program, f"{role}s")}
        roles |= dict.fromkeys(carried, "state")
        self.inputs = [
            Place(roles[name], _identifier(roles[name], name, taken), tensors[name], program.pixels)
            for name in program.inputs
        ]
        self.outputs = [
            Place(roles[name], _identifier(roles[name], name, taken), tensors[name]) for name in program.outputs
        ]
        digits = len(str(max(0, len(program.steps) - 1)))
        self.layers = []
        for i, step in enumerate(program.steps):
            layer = Layer(self, step, i, f"layer{i:0{digits}d}_{plain(step.node)[:40]}", spare[i] if spare else 0)
            layer.body = step.emit_c(layer)
            self.layers.append(layer)
        needs = [Needs(not layer.body, tuple(layer.overwrites), layer.scratch) for layer in self.layers]
        self.memory = place(program, needs)

    def kernel(self, name: str, **types: str) -> str:
        """A kernel's name; its text, and before it those of the kernels it calls, are written out when first needed."""
        short = [kind.removesuffix("_t").replace("uint", "u").replace("int", "s") for kind in types.values()]
        full = "_".join([name, *filter(None, short)])
        if full not in self.kernels:
            template = _environment().get_template(f"{name}.c.j2")
            twice = has_vectors(name, types)
            given: dict[str, Any] = {"rounding": "", "words": WORDS, "bits": _bits, "block": BLOCK}
            given |= {"name": full, "kernel": self.kernel, "has_vectors": twice} | types
            self.kernels[full] = template.render(given)
            if twice:
                self.vectors.append(_environment().get_template(f"{name}.vectors.j2").render(given).strip())
        return full

    def constant(self, tensor: Tensor) -> str:
        """The array of a constant tensor."""
        if tensor.name not in self.constants:
            assert tensor.constant is not None
            name = f"constant{len(self.constants)}_{plain(tensor.name)[:40]}"
            values = tensor.constant.astype(tensor.dtype)
            self.arrays.append(Array(name, f"{comment(tensor.name)}, {shape(tensor)}", values))
            self.constants[tensor.name] = name
        return self.constants[tensor.name]

    def offsets(self, values: NDArray[np.int32], *, vectors: bool) -> str:
        """The array of some offsets, one for layers that have the same. vectors: only dot instructions need it."""
        array = Array(f"offsets{len(self.arrays)}", f"where codes lie, {len(values)}", values, vectors)
        for i, other in enumerate(self.arrays):
            if other.comment == array.comment and np.array_equal(other.values, values):
                self.arrays[i] = replace(other, vectors=vectors and other.vectors)
                return other.name
        self.arrays.append(array)
        return array.name

    def document(self) -> dict[str, Any]:
        """What the templates are filled with."""
        inputs, outputs = ([p for p in all_ if p.role != "state"] for all_ in (self.inputs, self.outputs))
        befores, places = self.inputs[len(inputs) :], [*inputs, *outputs]
        calls = [f"{p.name}[v]" for p in inputs] + [p.name for p in outputs]
        all_calls = [p.name for p in inputs] + [f"state->{p.name}" for p in befores]
        all_calls += [p.name for p in outputs] + [f"next.{p.name}" for p in befores]
        stack = [layer.held * BLOCK * _bits(layer.sums) // 8 for layer in self.layers if layer.sums]
        rules = [step.rule for step in self.program.steps if step.rule is not None]
        ends = [e for rule in rules for e in (rule.zero, rule.low, rule.high)]
        layers, copies = (
            [self._layer(layer) for layer in self.layers],
            [self._copy(name) for name in self.memory.copies],
        )
        calling = [text for each in layers if each["body"] for text in each["arguments"]]
        read = set(re.findall(r"\w+", " ".join([*calling, *(copy["source"] for copy in copies)])))
        return {
            "prefix": self.prefix,
            "ram": self.memory.ram + sum(_bytes(p) for p in befores),
            "lower_bound": self.memory.lower_bound,
            "flash": self.flash,
            "stack": max(stack, default=0),
            "caller": sum(map(_bytes, (*places, *befores))),
            "inputs": [p.values for p in inputs],
            "outputs": [p.values for p in outputs],
            "states": [p.values | {"zero": p.tensor.zero} for p in befores],
            "signature": _parameters(places, inputs),
            "all_parameters": _parameters([*self.inputs, *self.outputs], self.inputs),
            "all_calls": ", ".join(all_calls),
            "names": ", ".join(p.name for p in places),
            "calls": ", ".join(calls),
            "used": self.used,
            "round": "round_half_even" if all(rule.rounding == HALF_EVEN for rule in rules) else "round",
            "rule_type": "int32_t" if all(-(2**31) <= e < 2**31 for e in ends) else "int64_t",
            "kernels": list(self.kernels.values()),
            "tiles": self.vectors,
            "arrays": self.arrays,
            "arenas": [self._arena(width) for width, arena in self.memory.arenas.items() if arena.peak],
            "unread": [p.name for p in self.inputs if p.name not in read],
            "layers": layers,
            "copies": copies,
            "work": self.program.work,
        }

    def tests(self) -> dict[str, Any]:
        """What the test vectors' template is filled with besides."""
        samples = max(1, min(VECTORS, LARGEST_VECTORS // max(1, sum(p.tensor.size for p in self.inputs))))
        codes = sample_codes(self.program, samples)
        expected = sequence(self.program, codes) if self.program.states else run(self.program, codes)
        tests = [(p, p.name, c) for p, c in zip(self.inputs, codes, strict=True) if p.role == "input"]
        tests += [(p, f"expected_{p.name}", c) for p, c in zip(self.outputs, expected, strict=False)]
        return {
            "vectors": samples,
            "tests": [
                {
                    "ctype": ctype(p.tensor),
                    "name": name,
                    "size": p.tensor.size,
                    "text": ",\n".join(f"{{\n{numbers(row)}\n}}" for row in c.astype(p.tensor.dtype)),
                }
                for p, name, c in tests
            ],
        }

    @property
    def flash(self) -> int:
        """Bytes of all constants, without what only processors with dot instructions read."""
        return sum(array.values.nbytes for array in self.arrays if not array.vectors)

    def plan_json(self) -> str:
        """Sizes, and where every tensor of the arenas lies and from which layer to which."""
        memory = self.memory
        sizes = {"ram": memory.ram, "lower_bound": memory.lower_bound, "flash": self.flash}
        arenas = {
            ARENAS[width]: [
                {"name": b.name, "offset": arena.offsets[b.name], "bytes": b.size, "layers": [b.first, b.last]}
                for b in memory.buffers[width]
            ]
            for width, arena in memory.arenas.items()
        }
        return json.dumps(sizes | {name: buffers for name, buffers in arenas.items() if buffers}, indent=1) + "\n"

    def pointer(self, tensor: Tensor) -> str:
        """The C expression that points to a tensor."""
        if tensor.constant is not None:
            return self.constant(tensor)
        spot = self.memory.spots[tensor.name]
        if spot.caller is None:
            return self._in_arena(spot, tensor.dtype)
        home = next(p for p in (*self.inputs, *self.outputs) if p.tensor.name == spot.caller)
        return home.name if home.tensor.dtype == tensor.dtype else f"({ctype(tensor)} *){home.name}"

    def _in_arena(self, spot: Spot, dtype: np.dtype[np.integer]) -> str:
        name = ARENAS[spot.width]
        pointer = name if dtype == self.memory.types[spot.width] else f"({dtype}_t *){name}"
        return f"{pointer} + {spot.offset // dtype.itemsize}" if spot.offset else pointer

    def _arena(self, width: int) -> dict[str, Any]:
        dtype = self.memory.types[width]
        count = -(-self.memory.arenas[width].peak // dtype.itemsize)
        return {"ctype": f"{dtype}_t", "name": ARENAS[width], "count": count}

    def _copy(self, name: str) -> dict[str, Any]:
        place = next(p for p in self.outputs if p.tensor.name == name)
        return {"to": place.name, "source": self.pointer(place.tensor), "bytes": _bytes(place)}

    def _layer(self, layer: Layer) -> dict[str, Any]:
        step, output = layer.step, layer.output
        kind = type(step).__name__
        inputs = [self.program.tensors[name] for name in dict.fromkeys(step.inputs)]
        computed = [t for t in inputs if t.constant is None]
        parameters = [f"const {ctype(t)} *{layer.operand(step.inputs.index(t.name))}" for t in computed]
        parameters.append(f"{ctype(output)} *y")
        arguments = [self.pointer(t) for t in computed] + [self.pointer(output)]
        for name, dtype, _ in layer.scratch:
            parameters.append(f"{dtype}_t *{name.rpartition(' ')[2]}")
            arguments.append(self._in_arena(self.memory.spots[name], dtype))
        rule = step.rule
        shift = "" if rule is None else " … ".join(map(str, sorted({int(rule.shift.min()), int(rule.shift.max())})))
        return {
            "index": layer.index,
            "name": layer.name,
            "node": comment(step.node),
            "kind": kind,
            "title": f"{layer.index}: {kind} {comment(step.node)}, "
            f"{' and '.join(map(shape, inputs))} to {shape(output)}",
            "shape": shape(output),
            "ctype": ctype(output),
            "sums": f"`{layer.sums}`" if layer.sums else "",
            "shift": shift,
            "work": step.work(self.program),
            "flash": layer.flash,
            "body": "\n".join(fitted(layer.body)),
            "signature": ", ".join(parameters),
            "arguments": arguments,
            "result": self.pointer(output),
            "count": output.size,
        }


def _parameters(places: Sequence[Place], read: Sequence[Place]) -> str:
    """The parameters of a function for these arrays, of which some are only read."""
    return ", ".join(f"{'const ' * (p in read)}{ctype(p.tensor)} {p.name}[{p.tensor.size}]" for p in places)


def _bytes(place: Place) -> int:
    return place.tensor.size * place.tensor.dtype.itemsize


def _bits(kind: str) -> int:
    return int(kind.removeprefix("u").removeprefix("int").removesuffix("_t"))


def _identifier(role: str, name: str, taken: set[str]) -> str:
    """A C identifier for an input or output that is not taken yet; none is a word of C's."""
    text = plain(name)[:40]
    stem = found = text if text.startswith(role) else f"{role}_{text}"
    while found in taken:
        found = f"{stem}_{len(taken)}"
    taken.add(found)
    return found
