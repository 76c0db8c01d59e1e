"""Runs that repeat, stop, die and go on; what they cost; and files that belong to others."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from smcdiff import Particles, Posterior
from smcdiff.inference import SMC, IntermediateReward, TwistedSMC
from smcdiff.models import Controlled, Diffusion, VariancePreserving
from smcdiff.particles import flatten_tree

from ..contract.kinds import masked, network
from . import long_run


@pytest.fixture(autouse=True)
def float32(float64):
    torch.set_default_dtype(torch.float32)


def assert_same(one, two):
    """Bit for bit."""
    (left, shape), (right, other) = (flatten_tree(p._as_tree()) for p in (one, two))
    assert left.keys() == right.keys()
    assert [k for k, v in left.items() if not v.nan_to_num().equal(right[k].nan_to_num())] == []
    assert str(shape) == str(other)


# -------------------------------------------------------------------------------- kill and resume


def test_a_killed_run_resumes_bit_for_bit(tmp_path):
    """The process dies of SIGKILL in the middle of a step; another one finishes its work."""
    checkpoint = tmp_path / "run.safetensors"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, long_run.__file__, str(checkpoint), "550"]
    child = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, cwd=Path(__file__).parents[2], text=True
    )
    try:
        assert child.stdout.readline() == "waiting\n"
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
        child.stdout.close()
    assert child.returncode == -signal.SIGKILL
    assert Particles.load(checkpoint).t == 6
    assert_same(long_run.run(checkpoint, resume=True), long_run.run(None))


def test_resuming_without_a_file_starts(tmp_path):
    assert_same(long_run.run(tmp_path / "none", resume=True), long_run.run(None))


def test_resuming_a_finished_run_costs_nothing(tmp_path):
    first = long_run.run(tmp_path / "run")
    assert_same(long_run.run(tmp_path / "run", pause_at=1e9, resume=True), first)


def test_a_half_written_file_is_never_read(tmp_path):
    """Writing is atomic: what a dying process leaves behind has another name."""
    long_run.run(tmp_path / "run")
    (tmp_path / "run.partial").write_bytes(b"half a header")
    assert Particles.load(tmp_path / "run").t == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run", "run.partial"]


# ------------------------------------------------------------------------------------------ files


def test_checkpoints_hold_tensors_and_no_code(tmp_path):
    long_run.run(tmp_path / "run")
    assert b"pickle" not in (tmp_path / "run").read_bytes()
    with safe_open(tmp_path / "run", "pt") as file:
        assert file.metadata()["format"] == "smcdiff-1"
        assert "/x/x" in set(file.keys())


def program(y=0.3, prior=None):
    x = (prior or network())("x")
    pyro.sample("y", dist.Normal(x.sum((-1, -2)), 1.0), obs=torch.as_tensor(y))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"num_particles": 5}, "axes"),
        ({"num_runs": 3}, "axes"),
        ({"model": lambda: masked()("w")}, "processes"),
        (
            {"model": lambda: Diffusion(network().network, event_shape=(1, 2), num_steps=1)("x")},
            "the saved run has 2 steps, but this program 1",
        ),
    ],
)
def test_the_checkpoint_of_another_run_is_refused(change, match, tmp_path):
    settings = {"model": program, "num_particles": 4, "num_runs": 2}
    next(SMC(**settings).iterate()).save(tmp_path / "run")
    other = SMC(**{**settings, **change})
    with pytest.raises(ValueError, match=match):
        other.run(checkpoint=tmp_path / "run", resume=True)


def test_other_data_are_refused(tmp_path):
    for problems, y in (((), 0.3), (("y",), torch.tensor([0.3, 0.5]))):
        method, file = SMC(program, num_particles=4, per_problem=problems), tmp_path / "run"
        first = method.run(y, checkpoint=file)
        again = method.run(y, checkpoint=file, resume=True)
        assert again.log_evidence.equal(first.log_evidence)
        with pytest.raises(ValueError, match="other data, or to another program"):
            method.run(y + 0.1, checkpoint=file, resume=True)


def test_files_of_others_are_refused(tmp_path):
    save_file({"x": torch.zeros(2)}, tmp_path / "weights")
    with pytest.raises(ValueError, match="not a saved run of this version of smcdiff"):
        Particles.load(tmp_path / "weights")
    next(SMC(program, num_particles=4).iterate()).save(tmp_path / "run")
    with pytest.raises(ValueError, match="is a checkpoint, not a posterior"):
        Posterior.load(tmp_path / "run")


# -------------------------------------------------------------------------------------- costs


class Counting(nn.Module):
    """Remembers the rows that pass through it, and counts those that come back."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.states, self.backward = [], 0

    def forward(self, x, time):
        self.states.append(torch.cat([time[:, None], x.detach()], -1))
        out = self.layer(x)
        if out.requires_grad:
            out.register_hook(self.count)
        return out

    def count(self, gradient):
        self.backward += len(gradient)


PARTICLES, RUNS, STEPS = 5, 2, 4
SIZES = {"num_particles": PARTICLES, "num_runs": RUNS, "ess_threshold": 1.0}


def counted(name, chunk_size):
    """The calls of a run, and what its network saw of it."""
    net = Counting()
    prior = Diffusion(net, VariancePreserving([0.2, 0.3, 0.4, 0.5]), (2,), STEPS, variance="large")
    guide = Controlled(prior, lambda x, t, denoised: 0.1 * x)
    options = {**SIZES, "chunk_size": chunk_size}

    def model():
        x = prior("x")
        pyro.sample("y", dist.Normal(x, 1.0).to_event(1), obs=torch.ones(2))
        pyro.factor("reward", x[..., 0].tanh())

    proposal, _, covariance = name.partition("-")
    method = {
        "bootstrap": lambda: SMC(model, **options),
        "guided": lambda: SMC(model, lambda: guide("x"), **options),
        "steered": lambda: SMC(model, twist=IntermediateReward(), **options),
    }.get(name, lambda: TwistedSMC(model, proposal=proposal, covariance=covariance, **options))
    engine = method().engine()
    net.states, net.backward = [], 0  # taking the program apart costs a little, too
    *_, last = engine.iterate()
    return [step.calls for step in last.history], net


@pytest.mark.parametrize(
    ("name", "first", "measured"),
    [
        ("bootstrap", 1, None),
        ("guided", 1, None),
        ("steered", 1, None),
        ("kernel-scalar", 1, None),
        ("gradient-scalar", 1, 0),
        ("gradient-diagonal", 1, 1),
        ("gradient-jacobian", 1, 2),  # one per observation
        ("conjugate-jacobian", 2, 2),  # the twisted start looks at where it starts from
    ],
)
@pytest.mark.parametrize("chunk_size", [None, 4])
def test_every_state_is_evaluated_once(name, first, measured, chunk_size):
    """Forwards once per particle and step (a twisted start looks twice). Backwards once, for the
    gradient, and as often as the network is measured: not at t = 1, where nothing is uncertain."""
    calls, net = counted(name, chunk_size)
    particles, states = PARTICLES * RUNS, torch.cat(net.states)
    assert [c.network for c in calls] == [first * particles, *[particles] * (STEPS - 1), 0]
    assert sum(c.network for c in calls) == len(states)
    assert sum(c.gradient for c in calls) == net.backward
    if measured is None:
        assert net.backward == 0
    else:
        *before, last, end = [c.gradient for c in calls]
        assert before == [(1 + measured) * c.network for c in calls[:-2]]
        assert (last, end) == (particles, 0)
    assert len(states.unique(dim=0)) == particles * STEPS + (first - 1)


def test_downstream_latents_cost_a_look_before_the_first():
    """Their proposal needs an estimate of x_0 before there are any latents to look with."""
    net = Counting()
    prior = Diffusion(net, VariancePreserving([0.2, 0.3]), (2,), 2)

    def model():
        z = pyro.sample("z", dist.Normal(prior("x")[..., 0], 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=torch.tensor(0.0))

    engine = SMC(model, num_particles=5).engine()
    net.states = []
    *_, last = engine.iterate()
    calls = [step.calls.network for step in last.history]
    assert calls == [10, 5, 0]
    assert sum(map(len, net.states)) == 15
