"""The test of the tests: each of these backends has one defect, and the suite must find it."""

import copy

import pytest
import torch

from pow2quant.backends import conformance
from pow2quant.backends.base import ALL
from pow2quant.backends.calibration import calibrate
from pow2quant.backends.conformance import CHECKS, FREE
from pow2quant.backends.custom import CustomSimulation
from pow2quant.backends.fake_quant import FakeQuantize
from pow2quant.errors import EncodingError


class WithQuantizer(CustomSimulation):
    """`custom` with quantizers of another class."""

    quantizer = FakeQuantize

    def _quantizer(self, site, **options):
        self._quantizers[site.name] = type(self).quantizer(site, **options)
        return self._quantizers[site.name]


def with_forward(forward):
    quantizer = type("Defective", (FakeQuantize,), {"forward": forward})
    return type("WithDefective", (WithQuantizer,), {"quantizer": quantizer})


def rounds_half_away(self, x):
    if self.encoding is not None and self.tap is None:
        return super(type(self), self).forward(x)
    if self.encoding is None:
        return self.tap(self.site, x, x) if self.tap else x
    nudged = x + torch.sign(x) * x.abs() * 2**-23  # a tie becomes a little more
    tap, self.tap = self.tap, None
    quantized = super(type(self), self).forward(nudged)
    self.tap = tap
    return tap(self.site, x, quantized)


def ignores_what_biases_become(self, x):
    result = super(type(self), self).forward(x)
    return x if self.site.role == "bias" else result


def taps_no_input(self, x):
    tap = self.tap
    if self.site.role == "input":
        self.tap = None
    result = super(type(self), self).forward(x)
    self.tap = tap
    return result


def drops_what_the_tap_returns(self, x):
    before = x.detach().clone()
    super(type(self), self).forward(x)
    tap, self.tap = self.tap, None
    result = super(type(self), self).forward(before if not x.requires_grad else x)
    self.tap = tap
    return result


def blocks_gradients(self, x):
    return super(type(self), self).forward(x.detach() if self.site.role == "weight" else x)


def writes_over_what_it_reads(self, x):
    result = super(type(self), self).forward(x)
    if self.tap is None and self.site.role == "input":
        x.zero_()
    return result


def keeps_the_first_weight_forever(self, x):
    if self.site.role == "weight" and not torch.is_grad_enabled() and self.tap is None:
        if not hasattr(self, "first"):
            self.first = super(type(self), self).forward(x).clone()
        return self.first
    return super(type(self), self).forward(x)


class CalibratesEverything(CustomSimulation):
    def calibrate(self, batches, roles=ALL):
        return calibrate(self, batches, ALL)


class KeepsOldEncodings(CustomSimulation):
    def load(self, table):
        super().load({**self.encodings(), **table})


class TakesUnknownSites(CustomSimulation):
    def load(self, table):
        super().load({name: e for name, e in table.items() if name in self._quantizers})


class LoadsHalfOfAWrongTable(CustomSimulation):
    def load(self, table):
        super().load({name: e for name, e in table.items() if name in self._quantizers})
        if set(table) - set(self._quantizers):
            raise EncodingError(f"unknown: {sorted(set(table) - set(self._quantizers))}")


class ForgetsTheConstraint(CustomSimulation):
    def __init__(self, network, example, plan):
        super().__init__(network, example, FREE)


class LeavesTapsBehind(CustomSimulation):
    def intercept(self, tap):
        for quantizer in self._quantizers.values():
            quantizer.tap = tap
        return torch.no_grad()


class SharesTheNetwork(CustomSimulation):
    def __init__(self, network, example, plan):
        super().__init__(network, example, plan)
        for name, parameter in network.named_parameters():
            self.model.get_submodule(name.rpartition(".")[0])._parameters[name.rpartition(".")[2]] = parameter


class RenamesModules(CustomSimulation):
    def export(self, example):
        artifact = super().export(example)
        for node in artifact.model.graph.node:
            node.name = f"/{node.name}"
        return artifact


class SharesItsCopies(CustomSimulation):
    def __deepcopy__(self, memo):
        return copy.copy(self)


class ForgetsTies(CustomSimulation):
    def __init__(self, network, example, plan):
        super().__init__(network, example, plan)
        self.placement.leaders.clear()


WRONG = {
    "rounds_half_away": (with_forward(rounds_half_away), "values_are_fake_quantized"),
    "ignores_what_biases_become": (with_forward(ignores_what_biases_become), "biases_lie_on_the_lattice"),
    "taps_no_input": (with_forward(taps_no_input), "every_site_is_tapped_once"),
    "drops_what_the_tap_returns": (with_forward(drops_what_the_tap_returns), "what_a_tap_returns_flows_on"),
    "blocks_gradients": (with_forward(blocks_gradients), "gradients_reach_the_parameters"),
    "writes_over_what_it_reads": (with_forward(writes_over_what_it_reads), "batches_have_any_size_and_stay_unharmed"),
    "keeps_the_first_weight_forever": (with_forward(keeps_the_first_weight_forever), "writing_a_weight_takes_effect"),
    "calibrates_everything": (CalibratesEverything, "roles_are_calibrated_on_their_own"),
    "keeps_old_encodings": (KeepsOldEncodings, "a_part_of_a_table_can_be_loaded"),
    "takes_unknown_sites": (TakesUnknownSites, "unknown_sites_are_refused"),
    "loads_half_of_a_wrong_table": (LoadsHalfOfAWrongTable, "unknown_sites_are_refused"),
    "forgets_the_constraint": (ForgetsTheConstraint, "scales_are_powers_of_two"),
    "leaves_taps_behind": (LeavesTapsBehind, "taps_end_with_their_context"),
    "shares_the_network": (SharesTheNetwork, "the_network_is_left_as_it_is"),
    "renames_modules": (RenamesModules, "onnx_names_are_the_users"),
    "shares_its_copies": (SharesItsCopies, "copies_are_independent"),
    "forgets_ties": (ForgetsTies, "ties_share_an_encoding"),
}


@pytest.mark.parametrize(("backend", "check"), WRONG.values(), ids=WRONG)
def test_a_defect_is_found(backend, check):
    (check,) = (c for c in CHECKS if c.__name__ == check)
    check(CustomSimulation)
    with pytest.raises(AssertionError):
        check(backend)


def test_every_check_is_listed():
    topics = (
        conformance.placement,
        conformance.encodings,
        conformance.arithmetic,
        conformance.taps,
        conformance.training,
    )
    defined = [f for topic in topics for f in vars(topic).values() if getattr(f, "__module__", "") == topic.__name__]
    public = [f for f in defined if callable(f) and not f.__name__.startswith("_")]
    assert tuple(public) == CHECKS
