"""Pictures: every one can be drawn, shows the right numbers, and says so in its title."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

from smcdiff.inference import SMC
from smcdiff.models import Diffusion, GaussianDenoiser, VariancePreserving
from smcdiff.plots import lineages

from . import examples as ex

PLOTS = ("plot_steps", "plot_evidence", "plot_weights", "plot_genealogy")


@pytest.fixture(autouse=True)
def nothing_left_open():
    """New figures are not kept by pyplot, which would warn of the twentieth."""
    import matplotlib.pyplot as plt

    yield
    assert plt.get_fignums() == []


def title(figure) -> str:
    above = figure.get_suptitle()
    return above or figure.axes[0].get_title()


@pytest.mark.parametrize("name", PLOTS)
@pytest.mark.parametrize(
    "make",
    [
        ex.bootstrap,
        lambda: ex.bootstrap(num_runs=1, num_particles=1),
        lambda: ex.bootstrap(num_runs=12, num_particles=40, ess_threshold=1.0, model=ex.noisy),
        ex.infer,
        ex.for_problems,
        lambda: ex.bootstrap(ess_threshold=0.0, y=20 * ex.Y),
    ],
)
def test_every_plot_draws_every_posterior(name, make):
    posterior = make()
    figure = getattr(posterior, name)()
    figure.draw_without_rendering()
    assert title(figure).startswith("Problem ") == (len(posterior.particles.axes) == 3)
    assert min(ax.get_position().height for ax in figure.axes) > 0.1
    assert all(ax.get_xlabel() or ax.get_ylabel() for ax in figure.axes)


@pytest.mark.parametrize("name", PLOTS[1:])
def test_plots_draw_into_given_axes(name):
    from matplotlib.figure import Figure

    figure = Figure()
    ax = figure.subplots()
    assert getattr(ex.bootstrap(), name)(ax=ax) is figure
    assert ex.bootstrap().plot_steps(fig=Figure()) is not figure


def test_steps_say_where_it_collapsed():
    posterior = ex.bootstrap(num_particles=200, num_runs=1, y=torch.tensor([4.0, -4.0]).double())
    d = posterior.diagnose()
    expected = f"falls to {d.smallest_ess:.1%} of 200 particles, at t = {d.smallest_ess_at}"
    assert expected in title(posterior.plot_steps())
    assert "stays above" in title(ex.infer().plot_steps())


def test_steps_show_weights_at_their_own_time():
    posterior = ex.bootstrap(ess_threshold=1.0, model=ex.noisy)
    above = posterior.plot_steps().axes[0]
    line = above.lines[0]
    assert list(line.get_xdata()) == list(range(8, -1, -1))
    assert line.get_ydata()[-1] == pytest.approx(float(posterior.particles.ess[0]) / 64)
    assert line.get_ydata()[-2] == pytest.approx(float(posterior.history[-1].ess[0]) / 64)


def test_weights_say_who_carries_half():
    posterior = ex.by_hand()
    figure = posterior.plot_weights()
    assert title(figure) == "Half of the final weight lies on 1 of 3 particles"
    curve = figure.axes[0].lines[1]  # run 1, with weights 1/3, 0, 2/3
    assert curve.get_ydata().tolist() == pytest.approx([0, 2 / 3, 1, 1])
    assert curve.get_xdata().tolist() == pytest.approx([0, 1 / 3, 2 / 3, 1])


def test_evidence_shows_all_runs_and_the_answer():
    posterior = ex.bootstrap()
    figure = posterior.plot_evidence()
    value = float(posterior.evidence.log_evidence)
    assert f"log Z = {value:.2f}" in title(figure)
    ends = [line.get_ydata()[-1] for line in figure.axes[0].lines[:4]]
    assert ends == pytest.approx(posterior.log_evidence.tolist())
    with pytest.raises(ValueError, match="no valid weights"):
        ex.by_hand(weighted=False).plot_evidence()


def test_lineages_by_hand():
    posterior = ex.by_hand()
    assert lineages(posterior, (0,)).tolist() == [[0, 0, 2], [0, 1, 2], [0, 1, 2]]
    assert lineages(posterior, (1,)).tolist() == [[0, 1, 1], [0, 1, 2], [0, 1, 2]]
    assert title(posterior.plot_genealogy(run=1)).startswith("3 final particles descend from 2")


def test_lineages_end_in_the_roots():
    posterior = ex.bootstrap(ess_threshold=1.0, model=ex.noisy)
    for run in range(4):
        assert torch.equal(lineages(posterior, (run,))[0], posterior.particles.roots[run])


# ---------------------------------------------------------------------------------------- images


def images(shape: tuple[int, ...], num_particles: int = 8):
    size = math.prod(shape)
    denoiser = GaussianDenoiser(torch.zeros(size).double(), 1.0)
    prior = Diffusion(denoiser, VariancePreserving(), event_shape=shape, num_steps=4)

    def model(y):
        x = prior("x")
        pyro.sample("y", dist.Normal(x.flatten(-len(shape)).mean(-1), 1.0), obs=y)

    return SMC(model, num_particles=num_particles, num_runs=2).run(torch.tensor(0.0).double())


@pytest.mark.parametrize("shape", [(4, 5), (1, 4, 5), (3, 4, 5)])
def test_images_of_every_kind(shape):
    posterior = images(shape)
    hole = torch.full(shape, math.nan)
    figure = posterior.plot_samples(num_draws=6, beside={"observed": hole})
    figure.canvas.draw()
    titles = [ax.get_title() for ax in figure.axes]
    assert titles[:3] == ["observed", "posterior mean", "standard deviation"]
    assert sum(len(ax.images) for ax in figure.axes) >= 3 + 6
    sd = posterior.expectation("x").sd
    assert f"± {float(sd.mean()):.2g} on average" in title(figure)


def test_images_laid_flat():
    posterior = images((20,))
    assert posterior.plot_samples(shape=(4, 5), num_draws=3)
    with pytest.raises(ValueError, match=r"no site has events shaped .*\{'x': \(20,\)\}"):
        posterior.plot_samples()
    with pytest.raises(ValueError, match="which are no images"):
        posterior.plot_samples("x")
    with pytest.raises(ValueError, match="beside draws of shape"):
        posterior.plot_samples(shape=(4, 5), beside={"truth": torch.zeros(3)})
