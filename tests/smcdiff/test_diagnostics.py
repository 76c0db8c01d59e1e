"""The diagnosis: figures by hand, and verdicts where the truth is known."""

import math
from dataclasses import replace

import pyro
import pyro.distributions as dist
import pytest
import torch

from smcdiff.diagnostics import Diagnosis, diagnose
from smcdiff.inference import SMC, TwistedSMC
from smcdiff.models import Diffusion, MixtureDenoiser, VariancePreserving
from smcdiff.posterior import Posterior

from . import examples as ex

FINE = Diagnosis(
    num_particles=256,
    num_runs=4,
    smallest_ess=0.3,
    smallest_ess_at=5,
    final_ess=0.7,
    worst_khat=0.4,
    largest_weight=0.05,
    num_roots=60,
    effective_roots=30.0,
    independent_particles=120.0,
    spread=0.1,
    standard_error=0.2,
    even=False,
    weighted=True,
    num_steps=20,
)


def test_figures_by_hand():
    d = diagnose(ex.by_hand())
    assert (d.num_particles, d.num_runs, d.num_steps) == (3, 2, 2)
    # 1 / (1/16 + 1/4 + 1/16) = 8/3 of 3 in run 0, 9/5 in run 1; the records say 2 of 3
    assert d.final_ess == pytest.approx(0.6, rel=1e-12)
    assert d.smallest_ess == pytest.approx(0.6, rel=1e-12)
    assert d.smallest_ess_at == 0
    assert math.isnan(d.worst_khat)
    assert d.largest_weight == pytest.approx(2 / 3, rel=1e-12)
    assert (d.num_roots, d.effective_roots) == (2, 1.5)
    # shares by root: (3/4, 0, 1/4) in run 0 with 2/11, (1/3, 2/3, 0) in run 1 with 9/11
    squares = (2 / 11) ** 2 * (9 / 16 + 1 / 16) + (9 / 11) ** 2 * (1 / 9 + 4 / 9)
    assert d.independent_particles == pytest.approx(1 / squares, rel=1e-12)
    assert d.spread == pytest.approx(abs(math.log(2 / 3) - math.log(3)) / math.sqrt(2), rel=1e-12)
    assert not d.even


def test_smallest_size_is_found_on_the_way():
    posterior = ex.by_hand()
    low = torch.tensor([1.01, 2.0], dtype=torch.float64)
    first, second, last = posterior.history
    history = (first, replace(second, ess=low), last)
    particles = replace(posterior.particles, history=history)
    d = diagnose(Posterior(particles, None, "ByHand"))
    assert d.smallest_ess == pytest.approx(1.01 / 3)
    assert d.smallest_ess_at == 2  # the weights that entered the second record stood at t = 2


@pytest.mark.parametrize(
    ("changes", "verdict", "reason"),
    [
        ({}, "reliable", None),
        ({"independent_particles": 24.0}, "doubtful", "rests on 24.0 independent particles"),
        ({"independent_particles": 3.0}, "failed", "rests on 3.0 independent particles"),
        ({"spread": 0.6}, "doubtful", "standard deviation is 0.6"),
        ({"spread": 2.0}, "failed", "log Z differs between runs"),
        ({"spread": math.inf}, "failed", "log Z differs between runs"),
        ({"smallest_ess": 0.015}, "doubtful", "fell to 1.5% of 256 particles at t = 5"),
        ({"num_runs": 1, "spread": math.nan}, "reliable", None),
        ({"num_runs": 1, "standard_error": 0.6}, "doubtful", "has the standard error 0.6"),
        ({"num_runs": 1, "standard_error": 0.9}, "failed", "has the standard error 0.9"),
        ({"num_runs": 1, "standard_error": math.nan}, "doubtful", "has the standard error nan"),
        ({"weighted": False}, "doubtful", "no valid weights"),
        ({"num_particles": 1, "num_runs": 1}, "doubtful", "one particle in one run"),
        ({"num_particles": 1, "independent_particles": 4.0, "even": True}, "reliable", None),
        ({"num_particles": 1, "num_runs": 3, "even": True, "independent_particles": 3.0}, "failed",
         "rests on 3.0"),
    ],
)  # fmt: skip
def test_verdicts(changes, verdict, reason):
    d = replace(FINE, **changes)
    assert d.verdict == verdict
    assert bool(d.reasons) == bool(d.advice) == (verdict != "reliable")
    if reason:
        assert any(reason in each for each in d.reasons)
        assert reason in str(d)
        assert "try: " in str(d)


def test_advice_depends_on_where_it_collapsed():
    collapsed = replace(FINE, smallest_ess=0.01)
    start, end = (replace(collapsed, smallest_ess_at=t).advice[0] for t in (20, 1))
    assert "x_T" in start
    assert "near the data" in end
    assert "covariance" in collapsed.advice[0]


def test_runs_that_are_absurdly_far_apart_question_the_prior():
    assert replace(FINE, spread=2.0).advice == ["use more particles per run"]
    assert replace(FINE, spread=1e9).advice[0].startswith("look at some draws")


# ------------------------------------------------------------------------- where truth is known


def modes(covariance: str, num_particles: int, num_runs: int, noise: float = 0.1) -> Posterior:
    """Four modes far apart, two of which explain y."""
    means = torch.tensor([[-3.0, -3.0], [-3.0, 3.0], [3.0, -3.0], [3.0, 3.0]], dtype=torch.float64)
    denoiser = MixtureDenoiser(means, 0.05)
    prior = Diffusion(denoiser, VariancePreserving(), num_steps=12, variance="exact")

    def model(y):
        x = prior("x")
        pyro.sample("y", dist.Normal(x[..., 0], noise), obs=y)

    sizes = {"num_particles": num_particles, "num_runs": num_runs}
    method = TwistedSMC(model, covariance=covariance, **sizes)
    return method.run(torch.tensor(3.0, dtype=torch.float64))


def test_a_good_run_is_reliable():
    posterior = modes("jacobian", 256, 4)
    upper = posterior.expectation(lambda s: (s["x"][..., 1] > 0).double())
    assert abs(upper.mean - 0.5) < 4.3 * upper.standard_error
    assert posterior.diagnose().verdict == "reliable"


def test_a_collapsed_run_is_seen_although_its_final_weights_are_even():
    d = modes("none", 256, 4).diagnose()
    assert d.final_ess > 0.2
    assert d.verdict == "failed"


def test_few_particles_are_doubtful():
    d = ex.bootstrap(num_particles=8, num_runs=1).diagnose()
    assert d.verdict != "reliable"
    assert "use more particles" in d.advice[0]


def test_exact_runs_of_one_particle():
    assert ex.infer(num_particles=1, num_runs=4).diagnose().verdict == "reliable"
    d = ex.infer(num_particles=1, num_runs=1).diagnose()
    assert (d.verdict, d.reasons) == ("doubtful", ["there is one particle in one run"])


def test_importance_sampling_has_as_many_roots_as_its_effective_sample_size():
    posterior = ex.bootstrap(num_particles=100, num_runs=1, ess_threshold=0.0)
    d = posterior.diagnose()
    assert d.independent_particles == pytest.approx(float(posterior.particles.ess), rel=1e-9)
    assert d.num_roots == 100


def test_problems_are_judged_one_by_one():
    y = torch.tensor([[1.0, 0.0], [40.0, -40.0], [0.5, -0.5]], dtype=torch.float64)
    method = SMC(ex.linear, num_particles=256, num_runs=4, per_problem=("y",))
    worst = method.run(y).diagnose()
    assert worst.problem == 1
    assert [d.problem for d in worst.problems] == [0, 1, 2]
    assert [d.verdict for d in worst.problems] == ["reliable", "failed", "reliable"]
    assert "failed (problem 1, the worst)" in str(worst)


def test_methods_without_weights():
    d = ex.by_hand(weighted=False).diagnose()
    assert d.verdict == "doubtful"
    assert "SMC(model, guide)" in d.advice[0]
    assert math.isnan(d.final_ess)
