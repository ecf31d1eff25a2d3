"""Recurrent networks step by step: the same bits as the whole sequence, in the engine and in C, and for longer ones."""

import copy
import ctypes
import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pow2quant import compiled, prepare, simulate
from pow2quant.adapters import onnx_qdq
from pow2quant.artifact import RECURRENT, Artifact, Table, recurrent_of
from pow2quant.backends.base import Simulation
from pow2quant.config import QuantPlan
from pow2quant.errors import UnsupportedModelError
from pow2quant.integer import run
from pow2quant.integer.emit_c import export_c
from pow2quant.integer.lower import lower
from pow2quant.integer.stream import advance, first_states, one_step, sequence
from pow2quant.methods import lapq
from pow2quant.plugins import resolve
from pow2quant.validation import c99

needs_compiler = pytest.mark.skipif(compiled.compiler() is None, reason="needs a C compiler")
STEPS, LONGER = 4, 11


class Last(nn.Module):
    """A layer on the last result."""

    def __init__(self, kind: type[nn.RNNBase], layers: int = 1, **more: bool) -> None:
        super().__init__()
        self.layer, self.head = kind(3, 5, layers, batch_first=True, **more), nn.LazyLinear(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x)[0][:, -1])


class Every(nn.Module):
    """All results, of two layers with something in front, between and behind, time first."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.norm = nn.Linear(3, 6), nn.LayerNorm(6)
        self.first, self.second, self.head = nn.LSTM(6, 5, 2), nn.GRU(5, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.norm(self.enter(x))).transpose(0, 1)
        return self.head(self.second(torch.relu(self.first(x)[0]))[0]).transpose(0, 1)


class Tokens(nn.Module):
    """Integers that choose rows of a table."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.layer, self.head = nn.Embedding(9, 3), nn.RNN(3, 5, batch_first=True), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(self.table(x))[1][-1])


class Cells(nn.Module):
    """Cells in a loop, with a layer in front and a layer behind them in every step."""

    def __init__(self) -> None:
        super().__init__()
        self.front, self.first, self.second = nn.Linear(3, 4), nn.LSTMCell(4, 5), nn.GRUCell(5, 5)
        self.head = nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        first, second, found = None, None, []
        for part in x.unbind(1):
            first = self.first(torch.tanh(self.front(part)), first)
            second = self.second(first[0], second)
            found.append(self.head(second))
        return torch.stack(found, 1)


class Loop(nn.Module):
    """A cell in a loop: forwards, backwards, or with a norm on its state."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.cell, self.norm, self.how = nn.RNNCell(3, 5), nn.LayerNorm(5), how

    def forward(self, x: Tensor) -> Tensor:
        state = None
        for part in x.unbind(1)[:: -1 if self.how == "backwards" else 1]:
            state = self.cell(part, state)
            state = self.norm(state) if self.how == "norm" else state
        return state


class Given(nn.Module):
    """The first state is an input."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.GRU(3, 5, batch_first=True)

    def forward(self, x: Tensor, state: Tensor) -> Tensor:
        return self.layer(x, state.unsqueeze(0))[0]


class Around(nn.Module):
    """Something in front of a layer, or behind it."""

    def __init__(self, front: nn.Module | None, behind: nn.Module | None) -> None:
        super().__init__()
        self.front, self.layer, self.behind = (
            front or nn.Identity(),
            nn.GRU(3, 3, batch_first=True),
            behind or nn.Identity(),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.behind(self.layer(self.front(x.mT).mT)[0].mT).mT


class Reduced(nn.Module):
    """Something that reads all results."""

    def __init__(self, reduce: str) -> None:
        super().__init__()
        self.layer, self.reduce = nn.GRU(3, 3, batch_first=True), reduce

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)[0]
        return {"mean": lambda: y.mean(1), "first": lambda: y[:, 0], "two": lambda: y[:, -1] + y[:, -3]}[self.reduce]()


def quantized(network: nn.Module, *inputs: Tensor, bits: int = 8) -> Artifact:
    torch.manual_seed(0)
    network(*inputs)  # lazy layers
    network = network.eval()
    example = inputs if len(inputs) > 1 else inputs[0]
    sim = simulate(prepare(network, example), example, QuantPlan.default(8, bits), backend="custom")
    sim.calibrate([example])
    return onnx_qdq.from_qdq(onnx_qdq.to_qdq(sim.export(example)))


def values(count: int = 6) -> Tensor:
    return torch.randn(count, STEPS, 3, generator=torch.Generator().manual_seed(1))


NETWORKS = {
    "LSTM": (lambda: Last(nn.LSTM), values),
    "GRU, two layers": (lambda: Last(nn.GRU, 2), values),
    "LSTM without bias": (lambda: Last(nn.LSTM, bias=False), values),
    "several, every result": (Every, values),
    "cells, every result": (Cells, values),
    "a cell, the last result": (lambda: Loop("forwards"), values),
    "tokens": (Tokens, lambda: torch.randint(0, 9, (6, STEPS), generator=torch.Generator().manual_seed(1))),
}


@needs_compiler
@pytest.mark.parametrize("name", NETWORKS)
def test_steps_give_the_bits_of_the_whole_sequence_and_c_those_of_longer_ones(name: str, tmp_path: Path) -> None:
    make, given = NETWORKS[name]
    artifact = quantized(make(), given(), bits=16 if name == "LSTM" else 8)
    program, step = lower(artifact), one_step(artifact)
    codes = run.quantize(program, [given().numpy()])
    whole = run.run(program, codes)[0]
    results = np.stack([sequence(step, [x[:, None], *first_states(step, 1)])[0] for x in codes[0]])
    found = results.reshape(whole.shape) if name.endswith("every result") else results[:, -1]
    assert len(np.unique(whole)) > 5
    np.testing.assert_array_equal(found, whole)
    in_c = c99.Steps(program, step).run(codes)[0]
    np.testing.assert_array_equal(in_c, whole)

    folder = export_c(artifact, tmp_path / "c") / "step"
    library = tmp_path / "step.so"
    compiled.build(folder / "model_step.c", library, ("-std=c99", "-Wall", "-Werror", "-shared", "-fPIC"))
    loaded = ctypes.CDLL(str(library))
    state, tensor = ctypes.create_string_buffer(4096), step.tensors[step.inputs[0]]
    loaded.model_step_reset(state)
    states = first_states(step, 1)
    for x in np.random.default_rng(0).integers(
        tensor.low, min(tensor.high, 8), (LONGER, 1, *tensor.shape), tensor.dtype
    ):
        expected, states = advance(step, [x], states)
        made = np.empty_like(expected[0])
        loaded.model_step(state, x.ctypes.data_as(ctypes.c_void_p), made.ctypes.data_as(ctypes.c_void_p))
        np.testing.assert_array_equal(made, expected[0])


@needs_compiler
def test_the_exported_folder_tests_itself_with_a_sequence(tmp_path: Path) -> None:
    folder = export_c(quantized(Last(nn.GRU), values()), tmp_path / "c", prefix="net")
    done = subprocess.run(["make", "test"], cwd=folder / "step", capture_output=True, encoding="utf-8", check=True)
    assert "0 of 64 output codes differ in 16 test vectors" in done.stdout
    assert "net_step(&state, " in (folder / "step/README.md").read_text("utf-8")
    assert "one step of the sequence at a time" in (folder / "README.md").read_text("utf-8")


def test_every_step_has_the_encodings_and_parameters_of_the_last() -> None:
    artifact = quantized(Last(nn.LSTM), values())
    (layer,) = recurrent_of(artifact.model)
    assert layer.steps == STEPS
    assert len(layer.states) == 2
    for role, names in layer.tensors.items():
        if role != "sequence":
            assert len({repr(artifact.encodings[name]) for name in names.values() if name in artifact.encodings}) == 1


METHODS = {
    "bias_correction": {}, "output_mse": {}, "gptq": {}, "gpfq": {}, "aciq": {}, "lapq": {"passes": 1},
    "adaround": {"iterations": 2}, "qdrop": {"iterations": 2},
}  # fmt: skip


@pytest.fixture(scope="module")
def gru() -> Simulation:
    torch.manual_seed(0)
    network = Last(nn.GRU)
    network(values())
    sim = simulate(prepare(network.eval(), values()), values(), QuantPlan.default(4, 8), backend="custom")
    sim.calibrate([values()])
    return sim


@pytest.mark.parametrize("method", METHODS)
def test_every_step_stays_alike_under_a_method(gru: Simulation, method: str) -> None:
    sim = copy.deepcopy(gru)
    resolve("methods", method)(**METHODS[method]).apply(sim, [values()])
    artifact = sim.export(values())
    step, program = one_step(artifact), lower(artifact)
    codes = run.quantize(program, [values().numpy()])
    results = np.stack([sequence(step, [x[:, None], *first_states(step, 1)])[0][-1] for x in codes[0]])
    np.testing.assert_array_equal(results, run.run(program, codes)[0])


def test_lapq_moves_the_weights_of_all_steps_together(gru: Simulation, monkeypatch: pytest.MonkeyPatch) -> None:
    moved: list[tuple[str, ...]] = []

    def descend(table: Table, names: tuple[str, ...], loss: object, now: float) -> tuple[Table, float]:
        if moved or not any(".state" in name and name.endswith(".weight") for name in names):
            return table, now
        moved.append(names)
        return lapq.scaled(table, names, 2.0), now

    monkeypatch.setattr(lapq, "descend", descend)
    sim = copy.deepcopy(gru)
    lapq.Lapq(passes=1).apply(sim, [values()])
    assert [len(names) for names in moved] == [STEPS]
    assert one_step(sim.export(values())).states


REFUSED = {
    "bidirectional": (lambda: Last(nn.GRU, bidirectional=True), "layer: is bidirectional"),
    "a convolution over time": (lambda: Around(nn.Conv1d(3, 3, 3, padding=1), None), "front.*mixes the steps"),
    "a pooling over time": (lambda: Around(None, nn.MaxPool1d(3, 1, 1)), "behind.*mixes the steps"),
    "the mean of all steps": (lambda: Reduced("mean"), "its result is not one of each"),
    "the first step": (lambda: Reduced("first"), "no result needs its steps behind number 1 of 4"),
    "two steps": (lambda: Reduced("two"), "a result needs its step 2 of 4"),
    "no recurrent layer": (lambda: nn.Linear(3, 3), "no recurrent layer"),
    "a loop backwards": (lambda: Loop("backwards"), r"cell\.input\.output: differs from cell\.input_3\.output"),
    "a norm of a cell's state": (
        lambda: Loop("norm"),
        "no recurrent layer .* nor a loop of cells",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_go_step_by_step_says_why(name: str, tmp_path: Path) -> None:
    make, reason = REFUSED[name]
    artifact = quantized(make(), values())
    with pytest.raises(UnsupportedModelError, match=reason):
        one_step(artifact)
    folder = export_c(artifact, tmp_path / "c")
    assert not (folder / "step").exists()
    assert ("cannot go step by step" in (folder / "README.md").read_text("utf-8")) == ("no recurrent" not in reason)


def test_a_first_state_that_is_an_input_is_refused() -> None:
    artifact = quantized(Given(), values(), torch.randn(6, 5))
    with pytest.raises(UnsupportedModelError, match="its first state is computed, or an input"):
        one_step(artifact)


def test_steps_that_differ_are_refused_by_name() -> None:
    artifact = quantized(Last(nn.GRU), values())
    (name,) = [n for n in artifact.encodings if n.endswith("layer.state_1.weight")]
    table = artifact.encodings | {name: artifact.encodings["layer.input_1.weight"]}
    with pytest.raises(UnsupportedModelError, match=r"layer\.state_1\.output: differs from layer\.state_3\.output"):
        one_step(Artifact(artifact.model, table))


NOTES: dict[str, Callable[[dict[str, Any]], object]] = {
    "no such tensor": lambda note: note["tensors"]["0.1"].update({"1": "nothing"}),
    "tensors of other steps": lambda note: note["tensors"]["0.1"].update({"1": note["tensors"]["0.1"]["2"]}),
    "no part of the sequence": lambda note: note["tensors"].pop("sequence"),
    "a role of no step": lambda note: note["tensors"].update(a={}),
    "more steps": lambda note: note.update(steps=STEPS + 1),
    "no steps": lambda note: note.update(steps=0),
    "no number": lambda note: note.update(steps="4"),
    "no name": lambda note: note["tensors"]["0.1"].update({"1": 3}),
    "no roles": lambda note: note.update(tensors=[1]),
}


@pytest.mark.parametrize("name", NOTES)
def test_a_note_in_a_file_that_does_not_fit_its_graph_is_not_believed(name: str) -> None:
    artifact = quantized(Last(nn.GRU), values())
    model = copy.deepcopy(artifact.model)
    (entry,) = [e for e in model.metadata_props if e.key == RECURRENT]
    (note,) = json.loads(entry.value)
    NOTES[name](note)
    entry.value = json.dumps([note])
    with pytest.raises(UnsupportedModelError, match=r"not alike|is noted for the steps|no recurrent layer"):
        one_step(Artifact(model, artifact.encodings))


def test_a_sequence_of_one_step_is_its_step() -> None:
    x = torch.randn(8, 1, 3, generator=torch.Generator().manual_seed(0))
    artifact = quantized(Last(nn.LSTM), x)
    program, step = lower(artifact), one_step(artifact)
    codes = [program.tensors["x"].dtype.type(np.arange(24).reshape(8, 1, 3) - 12)]
    found, _ = advance(step, codes, first_states(step, 8))
    assert np.array_equal(found[0], run.run(program, codes)[0])
