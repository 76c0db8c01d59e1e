"""One thread, a fixed seed and a clean slate for every test.

``smcdiff`` is not imported here: pytest installs the shape checks after this file is read.
"""

import os
from collections.abc import Iterator

os.environ["MPLBACKEND"] = "Agg"  # before anything imports matplotlib

import hypothesis
import jaxtyping
import pyro
import pytest
import torch

torch.set_num_threads(1)  # the workers of pytest-xdist share the cores
hypothesis.settings.register_profile("smcdiff", deadline=None, derandomize=True)
hypothesis.settings.load_profile("smcdiff")


@pytest.fixture(autouse=True)
def clean_slate() -> None:
    """Seed every random stream and forget Pyro's parameters."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)


@pytest.fixture
def no_type_checks() -> Iterator[None]:
    """Users have no checker of types between them and the messages."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
