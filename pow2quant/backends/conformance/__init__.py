"""What every backend must do: `CHECKS`, each a function of a backend that raises AssertionError where it does not.

For a backend of your own, in a test file:

    import pytest
    from pow2quant.backends.conformance import CHECKS

    @pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
    def test_conforms(check):
        check(MyBackend)

There is no tolerance anywhere: what is compared is equal to the last bit.
"""

from __future__ import annotations

from collections.abc import Callable

from pow2quant.backends.base import Backend
from pow2quant.backends.conformance import arithmetic, encodings, placement, taps, training
from pow2quant.backends.conformance.network import (
    BLOCKS,
    FREE,
    LOW_BITS,
    PER_TENSOR,
    PLAN,
    WIDE,
    Network,
    batch,
    prepared,
)

__all__ = [
    "BLOCKS",
    "CHECKS",
    "FREE",
    "LOW_BITS",
    "PER_TENSOR",
    "PLAN",
    "WIDE",
    "Check",
    "Network",
    "batch",
    "prepared",
]

Check = Callable[[Backend], None]

CHECKS: tuple[Check, ...] = (
    placement.sites_are_those_of_the_placement,
    placement.submodules_keep_their_names_and_float_parameters,
    placement.the_network_is_left_as_it_is,
    placement.methods_find_what_they_look_for,
    placement.onnx_names_are_the_users,
    encodings.equal_data_give_equal_encodings,
    encodings.scales_are_powers_of_two,
    encodings.biases_lie_on_the_lattice,
    encodings.blocks_are_those_of_custom_or_refused,
    encodings.ties_share_an_encoding,
    encodings.a_table_survives_loading,
    encodings.a_part_of_a_table_can_be_loaded,
    encodings.unknown_sites_are_refused,
    encodings.roles_are_calibrated_on_their_own,
    encodings.calibration_is_deterministic,
    encodings.bad_calibration_data_are_refused,
    encodings.export_needs_every_encoding,
    arithmetic.values_are_fake_quantized,
    arithmetic.batches_have_any_size_and_stay_unharmed,
    arithmetic.results_stay_on_the_device,
    taps.a_float_tap_gives_the_float_network,
    taps.every_site_is_tapped_once,
    taps.what_is_tapped_stays,
    taps.what_a_tap_returns_flows_on,
    taps.taps_end_with_their_context,
    training.gradients_reach_the_parameters,
    training.gradients_reach_what_a_weight_tap_adds,
    training.training_keeps_powers_of_two,
    training.state_can_be_saved_and_restored,
    training.writing_a_weight_takes_effect,
    training.copies_are_independent,
)
"""What a backend is held to, one property each."""
