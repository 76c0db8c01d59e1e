"""What every method promises. A new one gets a row in ``METHODS`` and inherits all of this."""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import Tensor

import smcdiff.inference
from smcdiff import RESAMPLERS, DegenerateWeights, Particles
from smcdiff.inference import (
    SMC,
    Behaviour,
    InferenceCompilation,
    IntermediateReward,
    LinearRamp,
    Mala,
    ParticleMethod,
    Proposal,
    Rejuvenation,
    RelativeTrajectoryBalance,
    ReplayBuffer,
    ResidualLoss,
    Settings,
    TrustRegionTwistedSMC,
    TwistedSMC,
)
from smcdiff.models import Controlled
from smcdiff.particles import flatten_tree
from smcdiff.twist import Twist

from .kinds import drift, masked, network, quadratic

Y = torch.tensor([0.4, -1.0])


def model(y: Tensor) -> None:
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    total = network()("x").sum((-1, -2))
    token = masked()("w")[..., 0]
    pyro.sample("y", dist.Normal(total + z, 1.0), obs=y)
    pyro.factor("reward", 0.3 * token.float())


def guide(y: Tensor) -> None:
    pyro.sample("z", dist.Normal(0.2, 1.2))
    Controlled(network(), drift)("x")
    masked()("w")


def learned(**options: Any) -> ParticleMethod:
    """With parameters as they are: learning has tests of its own."""
    return TrustRegionTwistedSMC(model, quadratic(), epsilon=0.1, **options)


METHODS: dict[str, Callable[..., ParticleMethod]] = {
    "SMC": lambda **options: SMC(model, **options),
    "SMC, importance sampling": lambda **options: SMC(model, **{**options, "ess_threshold": 0.0}),
    "SMC, guided": lambda **options: SMC(model, guide, **options),
    "SMC, rejuvenated": lambda **options: SMC(model, rejuvenation=Rejuvenation(), **options),
    "SMC, steered": lambda **options: SMC(model, twist=IntermediateReward("max"), **options),
    "TrustRegionTwistedSMC": lambda **options: learned(num_iterations=0, **options),
    "TwistedSMC": lambda **options: TwistedSMC(model, **options),
    "TwistedSMC, gradient": lambda **options: TwistedSMC(model, proposal="gradient", **options),
    "TwistedSMC, kernel": lambda **options: TwistedSMC(model, proposal="kernel", **options),
}
LEARNING = (
    InferenceCompilation,
    RelativeTrajectoryBalance,
    ResidualLoss,
    ReplayBuffer,
    Mala,
    LinearRamp,
)
ABSTRACT = {"Behaviour", "LearnedTwist", "ParticleMethod", "Proposal"}


@pytest.fixture(params=METHODS)
def method(request: pytest.FixtureRequest) -> Callable[..., ParticleMethod]:
    return METHODS[request.param]


def make(method: Callable[..., ParticleMethod], **options: Any) -> ParticleMethod:
    return method(**{"num_particles": 6, "num_runs": 2, "ess_threshold": 1.0, **options})


def exported(kind: type) -> set[str]:
    found = {name: getattr(smcdiff.inference, name) for name in smcdiff.inference.__all__}
    return {n for n, c in found.items() if inspect.isclass(c) and issubclass(c, kind)} - ABSTRACT


def test_every_exported_method_has_a_row() -> None:
    assert exported(ParticleMethod) == {name.split(",")[0] for name in METHODS}


def test_every_export_has_a_contract() -> None:
    """The rest are settings, and what learns (test_balance.py, referee/test_compilation.py)."""
    kinds = exported(ParticleMethod) | exported(Twist) | exported(Proposal) | exported(Behaviour)
    settings = {each.__name__ for each in (Settings, Rejuvenation, *LEARNING)}
    assert set(smcdiff.inference.__all__) == kinds | settings | ABSTRACT


def assert_equal(one: Particles, two: Particles) -> None:
    """Bit for bit: every tensor, the history and the random stream."""
    (left, shape), (right, other) = flatten_tree(one._as_tree()), flatten_tree(two._as_tree())
    assert left.keys() == right.keys()
    assert {
        k: v for k, v in left.items() if not torch.equal(v.nan_to_num(), right[k].nan_to_num())
    } == {}
    assert str(shape) == str(other)


# ------------------------------------------------------------------------------------- contract


def test_it_yields_every_state(method: Callable[..., ParticleMethod]) -> None:
    states = list(make(method).iterate(Y[0]))
    assert [s.t for s in states] == [2, 1, 0]
    assert [len(s.history) for s in states] == [1, 2, 3]
    assert all(s.axes == (2, 6) for s in states)
    assert all(s.log_weights.dtype == torch.float64 for s in states)


def test_a_seeded_run_repeats_bit_for_bit(method: Callable[..., ParticleMethod]) -> None:
    def run() -> Particles:
        pyro.set_rng_seed(5)
        return make(method).run(Y[0]).particles

    assert_equal(run(), run())


def test_a_consumer_between_steps_changes_nothing(method: Callable[..., ParticleMethod]) -> None:
    def run(disturbed: bool) -> Particles:
        pyro.set_rng_seed(5)
        states = []
        for state in make(method).iterate(Y[0]):
            states.append(state)
            if disturbed:
                torch.randn(7)
                pyro.set_rng_seed(99)
        return states[-1]

    assert_equal(run(False), run(True))


def test_resumes_from_every_step_bit_for_bit(
    method: Callable[..., ParticleMethod], tmp_path: Path
) -> None:
    *_, last = states = list(make(method).iterate(Y[0]))
    for i, state in enumerate(states):
        state.save(tmp_path / f"{i}")
        torch.manual_seed(i)  # another process, another stream
        resumed = make(method).run(Y[0], checkpoint=tmp_path / f"{i}", resume=True)
        assert_equal(resumed.particles, last)


def test_it_is_silent_and_leaves_no_trace(
    method: Callable[..., ParticleMethod], capfd: pytest.CaptureFixture[str]
) -> None:
    make(method).run(Y[0])
    assert capfd.readouterr() == ("", "")
    assert torch.is_grad_enabled()
    assert len(pyro.get_param_store()) == 0
    assert not pyro.poutine.runtime._PYRO_STACK
    assert torch.get_default_dtype() == torch.float32


def test_problems_are_an_axis(method: Callable[..., ParticleMethod]) -> None:
    posterior = make(method, per_problem=("y",)).run(Y)
    assert posterior.log_evidence.shape == (2, 2)
    assert posterior.samples["x"].shape == (2, 2, 6, 1, 2)
    assert posterior.samples["z"].shape == (2, 2, 6)


def test_one_particle(method: Callable[..., ParticleMethod]) -> None:
    posterior = make(method, num_particles=1, num_runs=3).run(Y[0])
    assert posterior.log_evidence.isfinite().all()


@pytest.mark.parametrize("options", [{"num_particles": 0}, {"num_runs": 0}, {"chunk_size": 0}])
def test_nothing_to_run(method: Callable[..., ParticleMethod], options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(options))} must be (a )?positive"):
        make(method, **options)


def test_an_impossible_likelihood_names_step_and_run(
    method: Callable[..., ParticleMethod],
) -> None:
    def impossible(inner: Any) -> Callable[..., None]:
        def program(y: Tensor) -> None:
            inner(y)
            pyro.factor("impossible", torch.tensor(-torch.inf))

        return program

    made = make(method)
    made.model = impossible(made.model)
    with pytest.raises(DegenerateWeights, match=r"at step t = 0: all 6 particles .* runs 0, 1"):
        made.run(Y[0])


def test_handlers_around_it_are_honoured(method: Callable[..., ParticleMethod]) -> None:
    """A run inside somebody's trace, seed or block is the same run."""
    pyro.set_rng_seed(5)
    alone = make(method).run(Y[0]).particles
    with poutine.seed(rng_seed=5), poutine.block():
        inside = make(method).run(Y[0]).particles
    torch.testing.assert_close(inside.log_evidence, alone.log_evidence)


# ----------------------------------------------------------------------------------- resamplers


@pytest.mark.parametrize("scheme", RESAMPLERS)
def test_resampling_leaves_the_evidence_as_it_is(scheme: str) -> None:
    """Exactly, in each run: only what was already there is moved about."""
    method = make(METHODS["SMC, steered"], resampler=scheme, num_particles=8)
    engine = method.engine(Y[0])
    state = engine.start()
    where = torch.tensor([True, False])
    ancestors = smcdiff.resample(state.log_weights, scheme)
    moved = state.select(ancestors, where)
    torch.testing.assert_close(moved.log_evidence, state.log_evidence, rtol=0, atol=1e-14)
    assert moved.log_weights[0].equal(torch.zeros(8, dtype=torch.float64))
    assert moved.log_weights[1].equal(state.log_weights[1])
    assert moved.x["x"][1].equal(state.x["x"][1])


def test_unknown_resampler() -> None:
    with pytest.raises(ValueError, match="unknown resampling scheme 'fair'"):
        make(METHODS["SMC"], resampler="fair").run(Y[0])
