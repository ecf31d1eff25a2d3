"""Memory planning: nothing overlaps that is needed at the same time, and memory is shared where it can be."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pow2quant.integer.lower import lower
from pow2quant.integer.memory import NARROW, WIDE, Buffer, Needs, Spot, place, plan
from tests.quantized_graphs import Graph, encoding


@st.composite
def buffers(draw):
    found = []
    for i in range(draw(st.integers(0, 25))):
        first, alignment = draw(st.integers(0, 20)), draw(st.sampled_from([1, 2, 4]))
        size = draw(st.integers(1, 50)) * alignment
        found.append(Buffer(str(i), size, first, first + draw(st.integers(0, 6)), alignment))
    return found


@given(buffers())
def test_buffers_that_meet_do_not_overlap(found):
    planned = plan(found)
    assert planned.lower_bound <= planned.peak <= sum(b.size + b.alignment - 1 for b in found)
    for i, a in enumerate(found):
        start = planned.offsets[a.name]
        assert start % a.alignment == 0
        assert start + a.size <= planned.peak
        for b in found[:i]:
            other = planned.offsets[b.name]
            assert not a.meets(b) or start + a.size <= other or other + b.size <= start


def test_a_chain_needs_no_more_than_its_bound():
    chain = [Buffer(str(i), size, i, i + 1) for i, size in enumerate([10, 30, 20, 30, 10, 5])]
    planned = plan(chain)
    assert (planned.peak, planned.lower_bound) == (50, 50)


def test_the_bound_counts_what_is_needed_at_one_time():
    assert plan([Buffer("a", 3, 0, 2), Buffer("b", 4, 1, 1), Buffer("c", 5, 2, 3)]).lower_bound == 8
    assert plan([]).peak == 0


def chain(*grids, ops, outputs=None):
    """Functions of one tensor behind each other; the n-th result is on the n-th grid."""
    g = Graph()
    names = [g.input("x", (4, 4), encoding(-4))]
    for i, (op, grid) in enumerate(zip(ops, grids, strict=True)):
        constants = [g.constant(f"shape{i}", np.array([-1, 16]))] if op == "Reshape" else []
        names.append(g.node(op, f"n{i}", [names[-1], *constants], grid))
    return lower(g.artifact(*(names[i] for i in outputs or [-1])))


A = encoding(-4)


def needs(program, *inplace):
    """Views as they are; the other steps may overwrite their first input where their index is given."""
    return [
        Needs(type(step).__name__ == "View", step.inputs[:1] if i in inplace else ())
        for i, step in enumerate(program.steps)
    ]


def test_views_and_dying_inputs_share_memory():
    program = chain(A, A, A, A, ops=("Sigmoid", "Reshape", "Tanh", "Sigmoid"))
    placed = place(program, needs(program, 0, 2, 3))
    arena = Spot(None, NARROW, 0)
    assert placed.spots["n0.output"] == placed.spots["n1.output"] == placed.spots["n2.output"] == arena
    assert placed.spots["x"] == Spot("x"), "the caller's input is never overwritten"
    assert placed.spots["n3.output"] == Spot("n3.output"), "the last step writes into the caller's array"
    assert (placed.ram, placed.lower_bound, placed.copies) == (16, 16, [])


def test_a_tensor_that_is_read_again_is_not_overwritten():
    g = Graph()
    a = g.node("Sigmoid", "a", [g.input("x", (4, 4), A)], A)
    b = g.node("Tanh", "b", [a], A)
    y = g.node("Add", "y", [a, b], A)
    program = lower(g.artifact(g.node("Tanh", "z", [y], A)))
    placed = place(program, needs(program, 1, 2))
    assert placed.spots["a.output"] != placed.spots["b.output"]
    assert placed.spots["a.output"] == placed.spots["y.output"]
    assert placed.ram == 32


def test_an_output_is_not_overwritten():
    program = chain(A, A, A, ops=("Sigmoid", "Tanh", "Tanh"), outputs=[1, 3])
    placed = place(program, needs(program, 1, 2))
    assert placed.spots["n0.output"] == Spot("n0.output")
    assert placed.spots["n1.output"] == Spot(None, NARROW, 0)


def test_outputs_that_share_memory_are_copied():
    program = chain(A, A, A, ops=("Reshape", "Sigmoid", "Reshape"), outputs=[1, 2, 3])
    placed = place(program, needs(program))
    assert placed.spots["n0.output"] == Spot("x")
    assert placed.spots["n2.output"] == placed.spots["n1.output"] == Spot("n1.output")
    assert placed.copies == ["n0.output", "n2.output"]


def test_wide_codes_have_an_arena_of_their_own():
    wide, middle = encoding(-20, 0, 20, True), encoding(-10, 0, 16)
    program = chain(middle, wide, A, A, ops=("Reshape", "Reshape", "Reshape", "Sigmoid"))
    steps = [Needs(False, step.inputs) for step in program.steps]
    placed = place(program, steps)
    assert placed.spots["n1.output"].width == WIDE
    assert placed.spots["n0.output"].width == placed.spots["n2.output"].width == NARROW
    assert placed.types == {NARROW: np.dtype(np.uint16), WIDE: np.dtype(np.int32)}
    assert placed.ram == 64 + 32


def test_scratch_memory_lives_for_one_step():
    program = chain(A, A, A, ops=("Sigmoid", "Tanh", "Sigmoid"))
    scratch = [(f"s{i}", np.dtype(np.uint8), 100) for i in range(3)]
    placed = place(program, [Needs(False, (), [s]) for s in scratch])
    assert placed.lower_bound == 132
    assert placed.ram == 132
    assert placed.spare(3) == [16, 0, 16]
