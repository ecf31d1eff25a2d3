"""The drop-in of the trained network, on both backends."""

import pytest

from pow2quant.backends import aimet
from tests.aimet_flows.digits import images, trained
from tests.drop_in.networks import DUMMY, prepared


@pytest.fixture
def installed():
    with aimet.quiet():
        return pytest.importorskip("aimet_torch", reason="the extra 'aimet' is not installed")


@pytest.fixture(params=["custom", "aimet"])
def backend(request):
    if request.param == "aimet":
        request.getfixturevalue("installed")
    return request.param


@pytest.fixture
def make(backend):
    """Makes a drop-in of the trained network on the backend."""
    return lambda model=None, **options: prepared(model or trained(), DUMMY, backend=backend, **options)


@pytest.fixture
def calibrated(make):
    sim = make()
    sim.compute_encodings(lambda model: model(images()))
    return sim
