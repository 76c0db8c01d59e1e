"""Teams: laws side by side and apart again, and which processes can stand together."""

import math

import pyro.distributions as dist
import pytest
import torch

from smcdiff.laws import CovariantNormal
from smcdiff.models import (
    Diffusion,
    GaussianDenoiser,
    MaskedDiffusion,
    MixtureDenoiser,
    Team,
    VariancePreserving,
)

STEPS = 4


def gaussian(dim=2, **options):
    denoiser = GaussianDenoiser(torch.arange(dim).double(), torch.ones(dim).double())
    return Diffusion(denoiser, VariancePreserving(), num_steps=STEPS, **options)


def mixture(**options):
    means = torch.tensor([[-2.0, 0.0, 1.0], [1.0, 2.0, 0.5]], dtype=torch.float64)
    return Diffusion(
        MixtureDenoiser(means, 0.3), num_steps=STEPS, **{"variance": "exact", **options}
    )


def tokens(length=3, **options):
    def network(x):
        return torch.zeros(*x.shape, 4) + torch.arange(4) * 0.3

    return MaskedDiffusion(network, length, 4, num_steps=STEPS, **options)


def states(team, t, batch=5):
    x = team.initial().expand([batch]).sample()
    for step in range(team.num_steps, t, -1):
        x = team.kernel(x, step).law.sample()
    return x


@pytest.mark.parametrize(
    "agents",
    [
        {"a": gaussian(), "b": gaussian(3)},
        {"a": mixture(), "b": gaussian(2, variance="large")},
        {"a": tokens(3), "b": tokens(2)},
    ],
    ids=["normal", "one has a low-rank covariance", "tokens"],
)
def test_the_joint_law_is_the_product_of_the_members(agents):
    team = Team(agents)
    for t in (STEPS, 2):
        x = states(team, t)
        law = team.kernel(x, t).law
        after = law.sample()
        parts, before = team.split("", after), team.split("", x)
        laws = team.split_law("", law)
        together = torch.zeros(len(x))
        for name, agent in agents.items():
            alone = agent.kernel(before[name], t).law.log_prob(parts[name])
            torch.testing.assert_close(laws[name].log_prob(parts[name]), alone)
            together = together + alone
        torch.testing.assert_close(law.log_prob(after), together)


def test_covariances_are_block_diagonal():
    team = Team({"a": mixture(), "b": mixture()})
    x = states(team, 2)
    kernel, parts = team.kernel(x, 2), team.split("", x)
    assert isinstance(kernel.law, CovariantNormal)
    assert kernel.covariance is not None
    diagonal, factor = kernel.covariance()
    whole = diagonal.diag_embed() + factor @ factor.mT
    for i, (name, agent) in enumerate(team.agents.items()):
        diagonal, factor = agent.kernel(parts[name], 2).covariance()
        block = slice(3 * i, 3 * i + 3)
        torch.testing.assert_close(
            whole[:, block, block], diagonal.diag_embed() + factor @ factor.mT
        )
    assert bool((whole[:, :3, 3:] == 0).all())


def test_levels_stand_side_by_side():
    team = Team({"a": gaussian(1), "b": mixture()})
    signal = team.signal(2)
    for field in ("alpha", "sigma", "slope", "variance", "spread"):
        own = [getattr(agent.signal(2), field) for agent in team.agents.values()]
        assert getattr(signal, field).tolist() == pytest.approx([own[0], *[own[1]] * 3])


def test_no_levels_where_a_member_has_none():
    assert Team({"a": tokens()}).signal(2) is None


def test_a_last_step_without_variance_is_a_point():
    team = Team({"a": gaussian(), "b": gaussian(1)})
    x = states(team, 1)
    law = team.kernel(x, 1).law
    assert isinstance(law, dist.Delta)
    points, parts = team.split_law("", law), team.split("", x)
    for name, agent in team.agents.items():
        assert torch.equal(points[name].v, agent.kernel(parts[name], 1).law.mean)
        assert points[name].event_dim == 1


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: Team({}), "at least one process"),
        (
            lambda: Team({"a": gaussian(), "b": Diffusion(MixtureDenoiser(torch.eye(2), 1.0))}),
            r"lockstep and need equal num_steps, got \{'a': 4, 'b': 100\}",
        ),
    ],
    ids=["nobody", "unequal steps"],
)
def test_who_cannot_stand_together(make, match):
    with pytest.raises(ValueError, match=match):
        make()


@pytest.mark.parametrize(
    ("agents", "kinds"),
    [
        ((gaussian(), mixture(variance="mixture")), "'MixtureSameFamily', 'Normal'"),
        ((tokens(4, reveal="even"), tokens(4, reveal="even")), "'EvenReveal'"),
    ],
    ids=["two kinds", "tokens revealed together"],
)
def test_transitions_that_cannot_be_joined_are_refused(agents, kinds):
    team = Team(dict(zip("ab", agents, strict=True)))
    with pytest.raises(ValueError, match=rf"at step t = 4 they are \[{kinds}\]: declare"):
        team.kernel(team.initial().expand([2]).sample(), STEPS)


def test_a_last_step_of_two_kinds_is_refused():
    team = Team({"a": gaussian(), "b": mixture()})
    with pytest.raises(
        ValueError, match="at step t = 1 some processes of the Team have no variance"
    ):
        team.kernel(torch.zeros(2, 5).double(), 1)


def test_laws_without_members_are_refused():
    team = Team({"a": gaussian()})
    with pytest.raises(TypeError, match="its members' sites from a Laplace"):
        team.split_law("", dist.Laplace(torch.zeros(2), 1.0).to_event(1))


def test_members_of_any_shape_come_apart():
    network = Diffusion(lambda x, time: 0.1 * x, event_shape=(2, 3), num_steps=STEPS)
    team = Team({"a": network, "b": gaussian(1)})
    assert team.event_shape == (7,)
    x = states(team, 2)
    parts = team.split("", x)
    assert parts["a"].shape == (5, 2, 3)
    assert torch.equal(team.join("", parts), x)
    scale = team.split_law("", team.kernel(x, 3).law)["a"].stddev
    assert scale.shape == (5, 2, 3)
    assert math.isclose(
        float(scale[0, 0, 0]) ** 2, network.grid.posterior(3).variance, rel_tol=1e-6
    )
