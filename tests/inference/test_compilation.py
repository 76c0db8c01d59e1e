"""Inference compilation: what it remembers, refuses and shares among processes."""

import sys
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import distributed, nn

from smcdiff.inference import SMC, InferenceCompilation, RelativeTrajectoryBalance
from smcdiff.models import Controlled, Diffusion, GaussianDenoiser, VariancePreserving

from ..torchrun import torchrun

Y = torch.tensor([0.3])


class Laws(nn.Module):
    """The guide's law of the latent, given data."""

    def __init__(self):
        super().__init__()
        self.weights = nn.Parameter(torch.tensor([0.1, 0.2, -0.1]))

    def forward(self, y):
        a, b, c = self.weights
        return dist.Normal(a + b * y[..., 0], c.exp())


class Affine(nn.Module):
    def __init__(self):
        super().__init__()
        self.weights = nn.Parameter(torch.zeros(4, 3))

    def forward(self, x, t, denoised, y):
        a, b, c = self.weights[t]
        return a * x + b + c * y


def chain(mean=0.4):
    denoiser = GaussianDenoiser(torch.tensor([mean]), torch.tensor([0.9]))
    schedule = VariancePreserving([0.3, 0.5, 0.8])
    return Diffusion(denoiser, schedule, num_steps=3, variance="large")


def program(prior):
    """The data are y; what else is given, is given."""

    def model(y=Y, noise=0.5):
        z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
        pyro.sample("y", dist.Normal(prior("x") + z[..., None], noise).to_event(1), obs=y)

    return model


def conditional(prior):
    process, laws = Controlled(prior, Affine(), reads=("y",)), Laws()

    def guide(y=Y, noise=0.5):
        pyro.module("laws", laws)
        pyro.sample("z", laws(y))
        process("x", y=y)

    return guide


def compilation(mean=0.4, seed=3, **options):
    """A training that has all that a checkpoint must hold."""
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    prior = chain(mean)
    optim = pyro.optim.ClippedAdam({"lr": 0.05, "lrd": 0.9})
    settings = {"num_paths": 40, "num_particles": 16, "subsample": 2, "max_gradient_norm": 1.0}
    return InferenceCompilation(
        program(prior), conditional(prior), optim, **{**settings, "refresh": 4, **options}
    )


def test_a_guide_that_is_the_prior_costs_nothing():
    prior = chain()
    process = Controlled(prior, Affine(), reads=("y",))

    def guide(y=Y, noise=0.5):
        pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
        process("x", y=y)

    optim = pyro.optim.Adam({"lr": 0.0})
    learner = InferenceCompilation(program(prior), guide, optim, num_paths=9, num_particles=9)
    assert learner.step(Y) == 0.0


def weights_of(learner):
    return {name: p.detach().clone() for name, p in learner.pair.parameters().items()}


def assert_same(one, other, tolerance=0.0):
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    ("killed", "options"),
    [
        (3, {}),
        (4, {}),
        (5, {}),
        (5, {"refresh": None}),
        (3, {"bridged": True}),
        (5, {"bridged": True}),
    ],
)
def test_a_killed_run_is_continued_bit_for_bit(killed, options, tmp_path):
    """Before, at and after the update that simulates others."""
    file = tmp_path / "guide.safetensors"
    whole = compilation(**options)
    whole.run(Y, num_updates=9)
    compilation(**options).run(Y, num_updates=killed, checkpoint=file)
    again = compilation(seed=5, **options)
    again.step(Y)  # whatever it did before is forgotten
    torch.randn(7)
    again.run(Y, num_updates=9, checkpoint=file, resume=True, checkpoint_every=2)
    assert again.history == whole.history
    assert again.calls == whole.calls
    assert_same(weights_of(again), weights_of(whole))
    assert_same(again.simulations.data, whole.simulations.data)
    assert_same(again.simulations.latents, whole.simulations.latents)
    for t, x in whole.simulations.x.items():
        assert_same(again.simulations.x[t], x)
    assert [each.name for each in tmp_path.iterdir()] == ["guide.safetensors"]


def test_a_resumed_run_is_saved_and_resumed_again(tmp_path):
    """The stream that simulated is kept, not the one after it."""
    file, whole = tmp_path / "guide.safetensors", compilation()
    whole.run(Y, num_updates=8)
    compilation().run(Y, num_updates=5, checkpoint=file)
    for number in (6, 8):
        again = compilation(seed=number)
        again.run(Y, num_updates=number, checkpoint=file, resume=True)
    assert again.history == whole.history


def test_a_checkpoint_does_not_grow_with_the_paths(tmp_path):
    sizes = []
    for number in (40, 4000):
        file = tmp_path / str(number)
        compilation(num_paths=number).run(Y, num_updates=1, checkpoint=file)
        sizes.append(file.stat().st_size)
    assert sizes[1] - sizes[0] < 9 * 3960  # one number tells each of the data from others


def test_a_foreign_checkpoint_is_refused(tmp_path):
    file = tmp_path / "guide.safetensors"
    with pytest.raises(ValueError, match="nothing to save"):
        compilation().save(file)
    compilation().run(Y, num_updates=2, checkpoint=file)
    others = {"num_paths": 50, "refresh": None, "subsample": 1, "num_particles": 8, "bridged": True}
    for other in ({name: value} for name, value in others.items()):
        with pytest.raises(ValueError, match=f"belongs to another training: {next(iter(other))}="):
            compilation(**other).run(Y, num_updates=3, checkpoint=file, resume=True)
    learner = compilation()
    learner.guide = lambda y=Y, noise=0.5: Controlled(chain(), Affine(), reads=("y",))("x", y=y)
    with pytest.raises(ValueError, match="belongs to another training: parameters="):
        learner.load(file, Y)
    prior = chain()
    settings = {"num_particles": 4, "evidence": "vargrad"}
    optim = pyro.optim.Adam({"lr": 0.1})
    rtb = RelativeTrajectoryBalance(program(prior), conditional(prior), optim, **settings)
    with pytest.raises(ValueError, match="format 'smcdiff-1 compilation', expected .* balance"):
        rtb.load(file, Y)
    SMC(program(prior), num_particles=4).run(Y).particles.save(tmp_path / "run")
    with pytest.raises(ValueError, match="not a saved run"):
        compilation().load(tmp_path / "run", Y)


def test_the_values_of_the_example_do_not_matter(tmp_path):
    file, whole = tmp_path / "guide.safetensors", compilation()
    whole.run(Y, num_updates=7)
    compilation().run(Y + 1, num_updates=5, checkpoint=file)
    again = compilation()
    again.run(Y - 2, num_updates=7, checkpoint=file, resume=True)
    assert again.history == whole.history


def test_another_program_is_refused_when_a_run_is_resumed(tmp_path):
    """Other arguments that are no data, another prior with networks of the same shapes."""
    file = tmp_path / "guide.safetensors"
    compilation().run(Y, num_updates=5, checkpoint=file)
    with pytest.raises(ValueError, match="other data, or to another program"):
        compilation().run(Y, 0.6, num_updates=6, checkpoint=file, resume=True)
    with pytest.raises(ValueError, match="other data, or to another program"):
        compilation(mean=0.5).run(Y, num_updates=6, checkpoint=file, resume=True)
    changed = compilation()
    changed.load(file, Y, 0.6)  # which says that others come now
    assert changed.done == 5
    assert len(changed.run(Y, 0.6, num_updates=9)) == 9


def test_progress_is_shown_if_asked_for(capsys):
    compilation().run(Y, num_updates=2)
    assert capsys.readouterr() == ("", "")
    compilation().run(Y, num_updates=2, progress=True)
    assert "2/2" in capsys.readouterr().err


def test_a_checkpoint_without_a_folder_is_refused_before_any_update(tmp_path):
    learner = compilation()
    with pytest.raises(ValueError, match="there is no folder .*nowhere for the checkpoint"):
        learner.run(Y, num_updates=1, checkpoint=tmp_path / "nowhere" / "guide.safetensors")
    assert learner.done == 0
    with pytest.raises(ValueError, match="checkpoint_every must be a positive integer"):
        learner.run(Y, num_updates=1, checkpoint_every=0)


def test_a_loss_that_is_no_number_stops():
    learner = compilation()
    learner.step(Y)
    with torch.no_grad():
        for parameter in learner.pair.parameters().values():
            parameter.fill_(torch.nan)
    with pytest.raises(ValueError, match="update 1: the guide has no finite log-density at 16 of"):
        learner.step(Y)
    assert learner.done == 1


def test_a_guide_without_parameters_is_refused():
    prior = chain()
    learner = compilation()
    learner.model, learner.guide = program(prior), program(prior)
    with pytest.raises(ValueError, match="no trainable parameters"):
        learner.step(Y)


# ----------------------------------------------------------------------------------- processes


def joint(bridged, folder=None, seed=3):
    torch.set_default_dtype(torch.float64)
    learner = compilation(seed=seed, bridged=bridged)
    file = folder and folder / f"bridged {bridged}.safetensors"
    learner.run(Y.double(), num_updates=10, checkpoint=file)
    return learner


def train_in_one_of_two(folder):
    """Whatever the second process was seeded with, its stream is that of the first."""
    distributed.init_process_group("gloo")
    for bridged in (True, False):
        learner = joint(bridged, folder, seed=3 + distributed.get_rank())
        mine = torch.tensor(learner.history)
        first = mine.clone()
        distributed.broadcast(first, 0)
        assert mine.equal(first)
    learner.num_particles = 15
    with pytest.raises(ValueError, match="cannot be shared by 2 processes"):
        learner.step(Y.double())
    distributed.destroy_process_group()


def test_two_processes_make_the_run_of_one(tmp_path):
    torchrun("tests.inference.test_compilation", tmp_path)
    for bridged in (False, True):
        one = joint(bridged)
        two = compilation(bridged=bridged)
        two.load(tmp_path / f"bridged {bridged}.safetensors", Y.double())
        torch.set_default_dtype(torch.float32)
        assert two.history == pytest.approx(one.history, abs=1e-10)
        assert_same(weights_of(two), weights_of(one), 1e-10)
        assert_same(two.simulations.data, one.simulations.data)


if __name__ == "__main__":
    train_in_one_of_two(Path(sys.argv[1]))
