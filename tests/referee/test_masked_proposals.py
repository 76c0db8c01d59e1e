"""Look-aheads and proposals for tokens: exact where they should be, unbiased everywhere."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

from smcdiff.inference import (
    SMC,
    IntermediateReward,
    NestedProposal,
    NoTwist,
    Rejuvenation,
    RelaxedLikelihood,
    Tempered,
    TiltedTokens,
)
from smcdiff.models import MaskedDiffusion
from smcdiff.particles import Calls

from .checks import BOUND, assert_zero_variance, finish, z_of_evidence, z_of_mean, z_score
from .test_masked import (
    ALPHAS,
    FINAL,
    KERNELS,
    LOG_Z,
    MASK,
    OPTIMAL,
    REWARDS,
    START,
    Table,
    chain,
    index,
    model,
    tempered,
)

LENGTH, VOCABULARY = 4, 3
LAW = torch.randn(LENGTH, VOCABULARY, generator=torch.Generator().manual_seed(0)).double()
WORTH = torch.randn(LENGTH, VOCABULARY, generator=torch.Generator().manual_seed(1)).double()
EXACT = (LAW.log_softmax(-1) + WORTH).logsumexp(-1)


# --------------------------------------------------------- independent tokens: nothing is left


def independent(**settings):
    return MaskedDiffusion(lambda x: LAW.expand(len(x), -1, -1), LENGTH, VOCABULARY, **settings)


def worth(x):
    return WORTH.expand(*x.shape, -1).gather(-1, x[..., None])[..., 0].sum(-1)


def summed(given=None, **settings):
    process = independent(**settings)

    def program():
        x = process("x") if given is None else process("x", given=given)
        pyro.factor("reward", worth(x) - 0.3)

    return program


def relaxed_worth(probabilities):
    return (probabilities["x"] * WORTH).sum((-1, -2)) - 0.3


def test_a_power_of_the_look_ahead_weakens_what_tokens_prefer():
    """Tilting by half of the preferences, whichever of twist and proposal was told so."""
    twists = (Tempered(RelaxedLikelihood(), 0.5), RelaxedLikelihood())
    proposals = (TiltedTokens(), TiltedTokens(temper=0.5))
    drawn = []
    for twist, proposal in zip(twists, proposals, strict=True):
        pyro.set_rng_seed(0)
        method = SMC(
            summed(num_steps=6), twist=twist, proposal=proposal, num_particles=50, ess_threshold=0.0
        )
        drawn.append(method.run().samples["x"])
    assert drawn[0].equal(drawn[1])


@pytest.mark.parametrize("reward", [None, relaxed_worth], ids=["tabulated", "relaxed"])
@pytest.mark.parametrize(
    "settings",
    [
        {"num_steps": 1},
        {"num_steps": 6},
        {"alphas": (1.0, 0.9, 0.9, 0.2, 0.0)},
        {"num_steps": 3, "reveal": "even"},
    ],
    ids=str,
)
def test_one_particle_knows_the_evidence(reward, settings):
    method = SMC(
        summed(**settings),
        twist=RelaxedLikelihood(reward),
        proposal=TiltedTokens(),
        num_particles=1,
        num_runs=50,
    )
    for state in method.iterate():
        assert_zero_variance(state.log_evidence, float(EXACT.sum()) - 0.3)


def test_clamped_tokens_count_as_they_are():
    given = torch.tensor([VOCABULARY, 1, VOCABULARY, 0])
    method = SMC(
        summed(given, num_steps=3),
        twist=RelaxedLikelihood(),
        proposal=TiltedTokens(),
        num_particles=1,
        num_runs=20,
    )
    truth = float(EXACT[0] + WORTH[1, 1] + EXACT[2] + WORTH[3, 0]) - 0.3
    for state in method.iterate():
        assert_zero_variance(state.log_evidence, truth)
    assert bool((state.x["x"][..., [1, 3]] == torch.tensor([1, 0])).all())


def test_plates_and_several_processes():
    def program():
        with pyro.plate("strings", 2):
            x = independent(num_steps=3)("x")
            pyro.factor("each", worth(x))
        pyro.factor("other", 0.5 * (independent(num_steps=3)("z")[..., 0] == 2))

    method = SMC(
        program, twist=RelaxedLikelihood(), proposal=TiltedTokens(), num_particles=1, num_runs=20
    )
    bonus = (LAW[0].softmax(-1) * torch.tensor([1.0, 1.0, math.exp(0.5)])).sum().log()
    for state in method.iterate():
        assert_zero_variance(state.log_evidence, float(2 * EXACT.sum() + bonus))


def test_tempered_preferences_are_paid_for():
    method = SMC(
        summed(num_steps=3),
        twist=RelaxedLikelihood(),
        proposal=TiltedTokens(temper=0.5),
        num_particles=4,
        num_runs=2000,
    )
    assert abs(z_of_evidence(finish(method), float(EXACT.sum()) - 0.3)) < BOUND


# ----------------------------------------------------------------- Test C: a reward of two tokens


def relaxed(probabilities):
    p = probabilities["x"]
    return 2.0 * (p[..., 0, :] * p[..., 1, :]).sum(-1) + 1.5 * p[..., 2, 2]


def test_look_ahead_is_the_first_order_model():
    """By hand at the first state: all three tokens are masked."""
    twist, start = RelaxedLikelihood(relaxed), torch.full((1, 3), MASK)
    *_, state = (s for s in SMC(model, twist=twist, num_particles=1).iterate() if s.t == 3)
    p = chain().kernel(start, 3).denoised.base_dist.probs[0]
    bias = torch.stack([2 * p[1], 2 * p[0], 1.5 * (torch.arange(3) == 2)])
    value = relaxed({"x": p}) + ((p * bias.exp()).sum(-1).log() - (p * bias).sum(-1)).sum()
    torch.testing.assert_close(state.log_weights[0, 0], value, rtol=0, atol=1e-12)
    torch.testing.assert_close(state.cache["twist"]["bias/x"][0, 0], bias, rtol=0, atol=1e-12)


METHODS = {
    "tilted": SMC(model, twist=RelaxedLikelihood(relaxed), proposal=TiltedTokens()),
    "tilted half, always resampled": SMC(
        model, twist=RelaxedLikelihood(relaxed), proposal=TiltedTokens(0.5), ess_threshold=1.0
    ),
    "look-ahead alone": SMC(model, twist=RelaxedLikelihood(relaxed)),
    "nested": SMC(model, twist=Table(OPTIMAL), proposal=NestedProposal(4)),
    "nested, no twist": SMC(model, twist=NoTwist(), proposal=NestedProposal(3)),
    "nested, random twist": SMC(
        model, twist=IntermediateReward(num_draws=2), proposal=NestedProposal(3), ess_threshold=1.0
    ),
    "nested in tilted tokens": SMC(
        model, twist=RelaxedLikelihood(relaxed), proposal=NestedProposal(2, TiltedTokens())
    ),
    "nested, weights held back": SMC(
        model, twist=IntermediateReward(num_draws=2), proposal=NestedProposal(2), smoothing=0.7
    ),
}


@pytest.mark.parametrize("name", METHODS)
def test_evidence_and_mean_reward(name):
    method = METHODS[name]
    settings = vars(method.settings) | {"num_particles": 4, "num_runs": 2500}
    method.settings = type(method.settings)(**settings)
    last = finish(method)
    assert abs(z_of_evidence(last, LOG_Z)) < BOUND
    assert abs(z_of_mean(last, REWARDS[index(last.x["x"])], 2.6349944, LOG_Z)) < BOUND


# ------------------------------------------------------------------ nested proposals, enumerated


def second_moment(tables, candidates):
    r"""E[Z-hat^2] of one particle, whose weight gains the mean of M values v at every step.

    E[mean(v) mean(v s)] = E[v^2 s] / M + (1 - 1 / M) E[v] E[v s].
    """
    moment = torch.ones_like(FINAL)
    for t in (1, 2, 3):
        v = tables[t - 1]
        apart = (KERNELS[t] @ v) * (KERNELS[t] @ (v * moment))
        together = KERNELS[t] @ (v * v * moment)
        moment = (together / candidates + (1 - 1 / candidates) * apart) / tables[t] ** 2
    return float(tables[3][START] ** 2 * moment[START])


@pytest.mark.parametrize("power", [0.5, 1.0])
@pytest.mark.parametrize("candidates", [1, 2, 5])
def test_second_moment_is_the_enumerated_one(candidates, power):
    tables = tempered(power)
    twist, proposal = Table(tables), NestedProposal(candidates)
    method = SMC(model, twist=twist, proposal=proposal, num_particles=1, num_runs=8000)
    weights = finish(method).log_weights[:, 0].exp()
    assert abs(z_score(weights, math.exp(LOG_Z))) < BOUND
    assert abs(z_score(weights**2, second_moment(tables, candidates))) < BOUND


def test_many_candidates_approach_the_optimal_proposal():
    square = math.exp(2 * LOG_Z)
    excess = [second_moment(OPTIMAL, m) / square - 1 for m in (1, 10, 100, 1000)]
    for few, many in zip(excess, excess[1:], strict=False):
        assert many == pytest.approx(few / 10, rel=0.3)


def test_one_candidate_is_the_inner_proposal():
    runs = []
    for proposal in (None, NestedProposal(1)):
        torch.manual_seed(0)
        method = SMC(model, twist=Table(OPTIMAL), proposal=proposal, num_particles=8, num_runs=4)
        runs.append(finish(method))
    torch.testing.assert_close(runs[0].log_weights, runs[1].log_weights, rtol=0, atol=1e-14)
    assert torch.equal(runs[0].x["x"], runs[1].x["x"])


def test_candidates_are_counted_and_never_looked_at_twice():
    twist, steps = Table(OPTIMAL), len(ALPHAS) - 1
    method = SMC(model, twist=twist, proposal=NestedProposal(5), num_particles=6)
    calls = sum((step.calls for step in finish(method).history), Calls())
    assert calls.network == 6 * (1 + 5 * (steps - 1))
    assert calls.program == 6 * (1 + 5 * steps)


def test_nested_proposals_know_latents_and_problems():
    """Z = E over z of a reward that z scales, per problem."""
    y = torch.tensor([0.2, 0.7])

    def program(y):
        z = pyro.sample("z", dist.Bernoulli(0.5))
        x = chain()("x")
        pyro.factor("reward", (z + y) * (x[..., 2] == 2))

    method = SMC(
        program,
        twist=IntermediateReward(),
        proposal=NestedProposal(3),
        num_particles=4,
        num_runs=1500,
        per_problem={"y": 0},
    )
    last = finish(method, y)
    row = KERNELS[3][START] @ KERNELS[2] @ KERNELS[1]
    hits = float(row[(torch.arange(64) % 4) == 2].sum())
    for problem, value in enumerate(y.tolist()):
        truth = sum(1 + hits * math.expm1(z + value) for z in (0, 1)) / 2
        assert abs(z_score(last.log_evidence[problem].exp(), truth)) < BOUND


# ------------------------------------------------------------------------------------ bad input


def test_rewards_that_do_not_factorise_are_refused():
    with pytest.raises(ValueError, match="no finite sum over positions .* by up to 4"):
        SMC(model, twist=RelaxedLikelihood()).run()


def test_programs_with_other_sources_are_refused():
    def program():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.factor("reward", z * worth(independent(num_steps=2)("x")))

    with pytest.raises(ValueError, match=r"but this one has \['z'\]: give it a reward"):
        SMC(program, twist=RelaxedLikelihood()).run()


@pytest.mark.parametrize(
    ("reward", "match"),
    [
        (lambda p: p["x"].sum((-1, -2)).detach(), "differentiable .* without a gradient"),
        (lambda p: p["x"].sum(-1), r"shape \(4,\).* returned shape \(4, 3\), with a gradient"),
    ],
)
def test_rewards_of_the_wrong_kind_are_refused(reward, match):
    with pytest.raises(ValueError, match=match):
        SMC(model, twist=RelaxedLikelihood(reward), num_particles=4).run()


def test_no_candidates_are_refused():
    with pytest.raises(ValueError, match="num_candidates must be a positive integer"):
        NestedProposal(0)


def test_candidates_are_looked_at_with_the_latents_as_they_have_been_moved():
    process = independent(num_steps=3)

    def program():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.factor("reward", -(z - worth(process("x"))).square())

    moves = Rejuvenation(step_size=1.0, num_moves=3)
    method = SMC(
        program, proposal=NestedProposal(2), twist=IntermediateReward(), rejuvenation=moves
    )
    posterior = method.run()
    z, x = posterior.samples["z"], posterior.samples["x"]
    wanted = dist.Normal(0.0, 1.0).log_prob(z) - (z - worth(x)).square()
    torch.testing.assert_close(posterior.log_density, wanted.double(), rtol=1e-5, atol=1e-5)
