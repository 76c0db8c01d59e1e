"""The result: weighted means by hand, unbiased draws, predictions, and files."""

import math
from dataclasses import fields

import pytest
import torch

from smcdiff.averages import draw, expectation
from smcdiff.evidence import combine_runs, relative_variance
from smcdiff.inference import SMC
from smcdiff.particles import Particles
from smcdiff.posterior import Posterior
from smcdiff.program import Program
from smcdiff.resampling import RESAMPLERS

from . import examples as ex

Z = 4.3  # two-sided level 2e-5


# --------------------------------------------------------------------------------------- by hand


def test_weights_count_runs_by_their_evidence():
    posterior = ex.by_hand()
    # Z = 0.5 * 4/3 and 1.5 * 6/3, hence 2/11 and 9/11 of the weight
    expected = torch.tensor([[0.25, 0.5, 0.25], [1 / 3, 0.0, 2 / 3]], dtype=torch.float64)
    expected = expected * torch.tensor([[2 / 11], [9 / 11]], dtype=torch.float64)
    torch.testing.assert_close(posterior.weights, expected, rtol=1e-14, atol=0)
    torch.testing.assert_close(
        posterior.log_evidence.exp(), torch.tensor([2 / 3, 3.0], dtype=torch.float64)
    )


def test_expectation_by_hand():
    posterior = ex.by_hand()
    found = posterior.expectation("x")
    mean = 2 / 11 * 2.25 + 9 / 11 * 2.0
    square = 2 / 11 * (0.25 + 0.5 * 4 + 0.25 * 16) + 9 / 11 * 2 / 3 * 9
    assert found.mean.shape == (1,)
    assert found.mean.item() == pytest.approx(mean, rel=1e-14)
    assert found.sd.item() == pytest.approx(math.sqrt(square - mean**2), rel=1e-12)
    shares = [2 / 11 * (0.75 * 5 / 3 - 0.75 * mean), 2 / 11 * 0.25 * (4 - mean)]
    shares += [9 / 11 / 3 * (0 - mean), 9 / 11 * 2 / 3 * (3 - mean)]  # by root: 0 and 2, 0 and 1
    error = math.sqrt(6 / 5 * sum(s**2 for s in shares))
    assert found.standard_error.item() == pytest.approx(error, rel=1e-10)


def test_expectation_of_a_function_and_of_integers():
    posterior = ex.by_hand()
    double = posterior.expectation(lambda s: 2 * s["x"][..., 0])
    assert double.mean.shape == ()
    assert double.mean.item() == pytest.approx(2 * posterior.expectation("x").mean.item())
    k = posterior.expectation("k").mean.item()
    assert k == pytest.approx(2 / 11 * (0.5 + 0.5) + 9 / 11 * 2 / 3, rel=1e-14)
    with pytest.raises(ValueError, match="one value per particle"):
        posterior.expectation(lambda s: s["x"].mean(1))
    with pytest.raises(ValueError, match=r"no site 'z': the sites are \['k', 'x'"):
        posterior.expectation("z")


def test_no_error_where_one_root_carries_the_weight():
    weights = torch.tensor([[0.1, 0.2, 0.3, 0.4]], dtype=torch.float64)
    values = torch.tensor([[1.0, 2.0, 3.0, 4.0]], dtype=torch.float64)
    roots = torch.tensor([[0, 0, 2, 3]])
    shares = [0.1 * -2 + 0.2 * -1, 0.0, 0.4]
    found = expectation(values, weights, roots).standard_error.item()
    assert found == pytest.approx(math.sqrt(4 / 3 * sum(s**2 for s in shares)), rel=1e-12)
    assert expectation(values, weights, 0 * roots).standard_error.isnan().all()
    assert expectation(values[:, :1], weights[:, :1] * 10, roots[:, :1]).standard_error.isnan()


def test_counts_and_history():
    posterior = ex.by_hand()
    assert (posterior.num_network_calls, posterior.num_gradient_calls) == (18, 6)
    assert [s.t for s in posterior.history] == [2, 1, 0]
    assert "ByHand" in repr(posterior)


def test_evidence_takes_the_scheme_into_account():
    posterior = ex.by_hand()
    args = posterior.log_weights, posterior.particles.roots
    for scheme in ("systematic", "multinomial"):
        again = Posterior(posterior.particles, None, "ByHand", scheme)
        expected = combine_runs(posterior.log_evidence, relative_variance(*args, 1, scheme))
        assert again.evidence.single_run_standard_error == expected.single_run_standard_error


def test_unfinished_particles_are_refused():
    with pytest.raises(ValueError, match="at t = 2: let the run finish"):
        ex.by_hand(t=2)


def test_methods_without_weights_have_no_evidence():
    posterior = ex.by_hand(weighted=False)
    for ask in (lambda: posterior.log_evidence, lambda: posterior.evidence):
        with pytest.raises(ValueError, match="ByHand gives no valid weights"):
            ask()
    text = str(posterior.summary())
    assert "none: ByHand gives no valid weights" in text
    assert "doubtful" in text


# ------------------------------------------------------------------------------------- the draws


@pytest.mark.parametrize("scheme", list(RESAMPLERS))
@pytest.mark.parametrize("n", [1, 3, 5, 8, 13])
def test_draws_are_unbiased(scheme, n):
    weights = torch.tensor([0.05, 0.4, 0.0, 0.3, 0.25], dtype=torch.float64)
    repeats = 4000
    indices = draw(weights.log().expand(repeats, 5), n, scheme)
    assert indices.shape == (repeats, n)
    counts = torch.nn.functional.one_hot(indices, 5).sum(1).double()
    error = counts.std(0) / math.sqrt(repeats)
    assert bool(((counts.mean(0) - n * weights).abs() <= Z * error + 1e-12).all())
    first = torch.nn.functional.one_hot(indices[:, 0], 5).double()  # order is random
    assert bool(((first.mean(0) - weights).abs() <= Z * first.std(0) / math.sqrt(repeats)).all())


@pytest.mark.parametrize("n", [2, 5, 7, 64])
def test_systematic_draws_are_as_even_as_can_be(n):
    log_weights = torch.randn(50, 9, dtype=torch.float64)
    expected = n * log_weights.softmax(-1)
    counts = torch.nn.functional.one_hot(draw(log_weights, n), 9).sum(1)
    assert bool(((counts - expected).abs() < 1 + 1e-9).all())


def test_resample_gathers_all_sites_alike():
    posterior = ex.by_hand()
    drawn = posterior.resample(500)
    assert drawn["x"].shape == (2, 500, 1)
    pairs = {(r, *p) for r in (0, 1) for p in zip(*(_run(drawn, s, r) for s in "xk"), strict=True)}
    assert pairs == {(0, 1.0, 0), (0, 2.0, 1), (0, 4.0, 2), (1, 0.0, 2), (1, 3.0, 0)}
    assert posterior.resample()["k"].shape == (2, 3)


def _run(samples, site, run):
    return samples[site][run].flatten().tolist()


@pytest.mark.parametrize(
    ("options", "message"),
    [({"n": 0}, "a positive integer"), ({"scheme": "magic"}, "unknown resampling scheme 'magic'")],
)
def test_bad_draws_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ex.by_hand().resample(**options)


# ------------------------------------------------------------------------------- against the truth


def test_posterior_of_a_linear_gaussian_program():
    posterior = ex.bootstrap(num_particles=400, num_runs=40)
    mean, variance, log_evidence = ex.exact_posterior()
    found = posterior.expectation("x")
    assert bool(((found.mean - mean).abs() < Z * found.standard_error).all())
    square = posterior.expectation(lambda s: (s["x"] - mean) ** 2)
    assert bool(((square.mean - variance).abs() < Z * square.standard_error).all())
    ratio = posterior.log_evidence.exp() / math.exp(log_evidence)
    assert abs(ratio.mean() - 1) < Z * ratio.std() / math.sqrt(40)


@pytest.mark.parametrize("runs", [1, 8])
def test_standard_errors_are_those_of_repetition(runs):
    """Over many posteriors, the squared z-scores of the mean average to one."""
    posterior = ex.bootstrap(num_particles=100, num_runs=480)
    groups = (480 // runs, runs, 100)
    log_weights = posterior.log_weights + posterior.particles.log_norm[:, None]
    weights = log_weights.reshape(480 // runs, -1).softmax(-1).reshape(groups)
    x, roots = posterior.samples["x"].reshape(*groups, 3), posterior.particles.roots
    found = expectation(x, weights, roots.reshape(groups))
    scores = (found.mean - ex.exact_posterior()[0]) / found.standard_error
    square = scores[:, 0].square()  # coordinates of one posterior are not independent
    assert abs(square.mean() - 1) < Z * square.std() / math.sqrt(len(square))


def test_zero_variance_runs_agree_to_rounding():
    posterior = ex.infer(num_particles=1, num_runs=6)
    assert float(posterior.evidence.spread) < 1e-9
    assert posterior.diagnose().verdict == "reliable"


# ----------------------------------------------------------------------------------- predictions


def test_predictive_shapes_and_values():
    posterior = ex.infer()
    draws = posterior.predictive()
    assert {name: tuple(v.shape) for name, v in draws.items()} == {
        "total": (4, 64),
        "constant": (4, 64),
        "y": (4, 64, 2),
    }
    assert torch.equal(draws["total"], posterior.samples["x"].sum(-1))
    assert bool((draws["constant"] == 2).all())
    assert not bool((draws["y"] == ex.Y).any())


def test_predictive_law():
    posterior = ex.infer(num_particles=1000, num_runs=8)  # equal weights: the twist is exact
    noise = posterior.predictive()["y"] - posterior.samples["x"][..., :2]
    assert abs(noise.mean()) < Z * ex.NOISE / math.sqrt(noise.numel())
    scale = noise.std() / ex.NOISE
    assert abs(scale - 1) < Z / math.sqrt(2 * noise.numel())


def test_predictive_ignores_factors_and_keeps_latents():
    posterior = ex.bootstrap(model=ex.noisy)
    draws = posterior.predictive()
    assert set(draws) == {"y"}
    residual = draws["y"] - posterior.samples["x"][..., :2]
    scaled = residual / posterior.samples["noise"][..., None]
    assert abs(scaled.std() - 1) < Z / math.sqrt(2 * scaled.numel())


def test_predictive_with_other_arguments():
    def model(y, gain):
        x = ex.PRIOR("x")
        ex.pyro.sample("y", ex.dist.Normal(gain * x, 1e-3).to_event(1), obs=y)

    posterior = ex.SMC(model, num_particles=8).run(torch.zeros(3).double(), gain=0.01)
    draws = posterior.predictive(gain=100.0)["y"]
    assert bool(((draws - 100 * posterior.samples["x"]).abs() < 0.01).all())
    with pytest.raises(ValueError, match="no argument 'loss' to replace; it has y, gain"):
        posterior.predictive(loss=1.0)


def test_predictive_of_teams_and_problems():
    team = ex.bootstrap(num_particles=8, model=ex.pair, y=torch.zeros(3).double())
    assert set(team.samples) == {"left", "right"}
    assert team.predictive()["y"].shape == (4, 8, 3)
    problems = ex.for_problems()
    assert problems.predictive()["y"].shape == (3, 2, 32, 2)
    assert problems.observed["y"].shape == (3, 2)


def test_observed_values_are_those_of_the_program():
    assert torch.equal(ex.infer().observed["y"], ex.Y)
    posterior = ex.for_problems()
    y = posterior.program.args[0]
    assert torch.equal(posterior.observed["y"].reshape(y.shape), y)


# ----------------------------------------------------------------------------------------- files


def same(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a.nan_to_num(nan=-1.5), b.nan_to_num(nan=-1.5)) and a.dtype == b.dtype
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if hasattr(a, "__dataclass_fields__"):
        return all(same(getattr(a, f.name), getattr(b, f.name)) for f in fields(a))
    return a == b or (a != a and b != b)


@pytest.mark.parametrize(
    "make",
    [
        ex.by_hand,
        lambda: ex.bootstrap(model=ex.noisy),
        lambda: ex.bootstrap(model=ex.pair, y=torch.zeros(3).double()),
        ex.for_problems,
        lambda: ex.by_hand(weighted=False),
    ],
)
def test_files_are_exact(make, tmp_path):
    posterior = make()
    posterior.save(tmp_path / "run.safetensors")
    again = Posterior.load(tmp_path / "run.safetensors")
    assert same(posterior.particles, again.particles)
    assert same(posterior.samples, again.samples)
    assert same(posterior.observed, again.observed)
    for site in posterior.samples:
        assert posterior.event_dim(site) == again.event_dim(site)
    assert str(posterior.summary()) == str(again.summary())
    assert same(posterior.diagnose(), again.diagnose())


def test_loading_without_and_with_the_program(tmp_path):
    posterior = ex.infer()
    posterior.save(tmp_path / "run.safetensors")
    again = Posterior.load(tmp_path / "run.safetensors")
    for ask, what in ((again.predictive, "predictive"), (again.plot_graph, "plot_graph")):
        with pytest.raises(ValueError, match=rf"{what}\(\) needs the program"):
            ask()
    full = Posterior.load(tmp_path / "run.safetensors", Program(ex.linear, (ex.Y,)))
    assert full.predictive()["y"].shape == (4, 64, 2)


def test_checkpoints_are_no_posteriors(tmp_path):
    ex.by_hand().particles.save(tmp_path / "checkpoint")
    with pytest.raises(ValueError, match="is a checkpoint, not a posterior"):
        Posterior.load(tmp_path / "checkpoint")
    ex.infer().save(tmp_path / "posterior")
    assert isinstance(Particles.load(tmp_path / "posterior"), Particles)


# ------------------------------------------------------------------------------------- summaries


def test_summary_says_what_matters():
    posterior = ex.bootstrap(model=ex.noisy)
    text = str(posterior.summary())
    assert "SMC: 4 runs of 64 particles, 8 steps, 2,048 network calls" in text
    for part in ("log evidence", "standard error", "effective sample size", "k-hat", "verdict"):
        assert part in text
    found = posterior.expectation("noise")
    row = next(line for line in text.splitlines() if line.startswith("noise"))
    assert row.split()[1:3] == [f"{float(v):.4g}" for v in (found.mean, found.sd)]


def test_summary_of_a_program_that_observes_nothing():
    prior = ex.gaussian_prior(2)
    text = str(SMC(lambda: prior("x"), num_particles=3).run().summary())
    assert "nothing is observed, and no factor weighs: this is the prior" in text
    assert "nothing is observed" not in str(ex.bootstrap(model=ex.noisy).summary())


def test_summary_warns_of_disagreeing_runs():
    posterior = ex.by_hand()
    posterior.particles.log_norm[0] = -5.0
    assert "above 1" in str(posterior.summary())


def test_summary_of_large_sites_problems_and_html():
    def images(y):
        x = ex.PRIOR("<x>")
        ex.pyro.sample("y", ex.dist.Normal(x, 1.0).to_event(1), obs=y)

    table = ex.SMC(images, num_particles=4).run(torch.zeros(3).double()).summary()
    assert "&lt;x&gt;[0]" in table._repr_html_()
    assert "<x>" not in table._repr_html_()
    text = str(ex.for_problems().summary())
    assert "3 problems" in text
    assert "problem 2: " in text
    assert "x (problem 2)[1]" in text
    posterior = ex.by_hand()
    posterior.particles.x["x"] = torch.zeros(2, 3, 5, 5).double()
    assert "x (5, 5)  0 to 0, average 0" in str(posterior.summary())


# ------------------------------------------------------------------------------------------ best


def test_best_is_the_particle_of_highest_density():
    posterior = ex.by_hand()
    density = torch.tensor([[0.0, -1.0, 0.5], [3.0, -2.0, 0.0]], dtype=torch.float64)
    posterior.particles.cache["log_psi"] = density
    best = posterior.best()
    assert torch.equal(posterior.log_density, density)
    assert best["x"].shape == (2, *posterior.samples["x"].shape[2:])
    assert torch.equal(
        best["x"], torch.stack([posterior.samples["x"][0, 2], posterior.samples["x"][1, 0]])
    )
    assert best["k"].tolist() == [2, 2]


def test_whole_numbers_are_summarised_by_their_probabilities():
    posterior = ex.by_hand()
    x = torch.tensor([[[3], [7], [3]], [[7], [3], [7]]])
    share = float(posterior.weights[x[..., 0] == 7].sum())
    posterior.particles.x["x"] = x
    assert f"x[0]  7: {share:.0%}, 3: {1 - share:.0%}\n" in f"{posterior.summary()}\n"
    posterior.particles.x["x"] = x.expand(2, 3, 20)
    assert f"x (20,)  probability of the most probable value: {share:.3g} to {share:.3g}" in str(
        posterior.summary()
    )
