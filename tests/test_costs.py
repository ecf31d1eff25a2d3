"""The layers that cost most: shares by hand, and advice that fits the noisier quantizer."""

import pytest

from pow2quant.report.costs import costly


def box(name, reads, weight=None):
    return {"name": name, "reads": reads, "writes": f"{name}.output", "weight": weight}


NETWORK = [box("a", ["x"], "a.weight"), box("b", ["a.output"]), box("c", ["b.output"]), box("d", ["x", "c.output"])]


def test_shares_are_of_the_noise_that_layers_add():
    """Noise 0.01 behind a, the same behind b, 0.04 behind c, 0.03 behind d: a adds 0.01, c 0.03, d nothing."""
    decibels = {"a": 20.0, "b": 20.0, "c": 13.9794, "d": 15.2288}
    tensors = {f"{name}.output": {"network_sqnr_db": db, "sqnr_db": 30.0} for name, db in decibels.items()}
    found = costly(NETWORK, tensors)
    assert [cost.layer for cost in found] == ["c", "a"]
    assert [cost.share for cost in found] == pytest.approx([75, 25], abs=0.01)


@pytest.mark.parametrize(
    ("weight", "output", "expected"),
    [
        ({"sqnr_db": 10.0}, {"sqnr_db": 30.0}, "more bits for its weights, or gptq or adaround"),
        ({"sqnr_db": 40.0}, {"sqnr_db": 30.0}, "more bits for its output"),
        ({}, {"sqnr_db": 30.0, "clipped": 2.5}, "2.5 % of the output saturate"),
        ({"sqnr_db": 10.0, "clipped": 3.0}, {}, "3.0 % of the weights saturate: range minmax"),
        ({"sqnr_db": 9.0, "free_scale_db": 14.0, "power_of_2_db": 9.0}, {"sqnr_db": 30.0}, "fits 2^k badly"),
        ({"sqnr_db": None}, {"sqnr_db": None}, "more bits for this layer"),
    ],
)
def test_advice_fits_the_noisier_quantizer(weight, output, expected):
    tensors = {"a.weight": weight, "a.output": {"network_sqnr_db": 20.0, **output}}
    (cost,) = costly(NETWORK[:1], tensors)
    assert expected in cost.advice


def test_what_was_done_is_not_advised():
    tensors = {"a.weight": {"sqnr_db": 10.0}, "a.output": {"network_sqnr_db": 20.0}}
    (cost,) = costly(NETWORK[:1], tensors, ["align", "calibrate", "gptq", "export"])
    assert cost.advice == "more bits for its weights, or adaround"


def test_nothing_measured_costs_nothing():
    assert costly(NETWORK, {}) == []
    assert costly([], {}) == []
