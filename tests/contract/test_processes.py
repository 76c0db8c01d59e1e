"""What every process promises. A new one gets a row in ``PROCESSES`` and inherits all of this."""

import inspect
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import Tensor, nn

import smcdiff.models
import smcdiff.models.adapters
from smcdiff import Process
from smcdiff.dissection import draw
from smcdiff.inference import SMC
from smcdiff.models import (
    Chain,
    ClassifierFree,
    Controlled,
    Diffusion,
    EnumeratedDenoiser,
    Finetuned,
    Flow,
    GaussianDenoiser,
    MaskedDiffusion,
    MixtureDenoiser,
    Team,
    VariancePreserving,
)
from smcdiff.models.adapters import Scheduled
from smcdiff.models.adapters.scheduled import Level, step
from smcdiff.particles import flatten_tree, map_tree
from smcdiff.process import is_deterministic

from .kinds import labelled

SHORT = VariancePreserving([0.3, 0.5, 0.7])


class Counting(nn.Module):
    """A network of one layer that counts the rows it is asked for."""

    def __init__(self, size: int, channels: int = 1) -> None:
        super().__init__()
        self.layer, self.rows = nn.Linear(size, channels * size), 0

    def forward(self, x: Tensor, time: Tensor, label: Tensor | None = None) -> Tensor:
        self.rows += len(x)
        out: Tensor = self.layer(x.flatten(1)) + 0.01 * time[:, None]
        if label is not None:
            out = out * (1 + 0.1 * label[:, None])
        return out.reshape(len(x), -1, *x.shape[2:])


class Tokens(nn.Module):
    """The same for tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.rows = EnumeratedDenoiser(1.0 + torch.rand(3, 3)), 0

    def forward(self, tokens: Tensor) -> Tensor:
        self.rows += len(tokens)
        logits: Tensor = self.table(tokens)
        return logits


def mixture() -> MixtureDenoiser:
    return MixtureDenoiser(torch.randn(3, 2), 0.2 + torch.rand(3, 2))


def network(shape: tuple[int, ...] = (2, 3), **options: Any) -> Diffusion:
    size = torch.Size(shape).numel()
    channels = 2 if options.get("variance") == "learned" else 1
    return Diffusion(Counting(size, channels), SHORT, shape, 3, **options)


def flow(shape: tuple[int, ...] = (2, 3), **options: Any) -> Flow:
    return Flow(Counting(torch.Size(shape).numel()), shape, 3, **options)


def guidance(*interval: float) -> dict[str, Any]:
    return {"guidance": ClassifierFree(3.0, {"label": 0.0}, interval)}  # type: ignore[arg-type]


def scheduled(variance: str = "small") -> Scheduled:
    """Steps of a library that ends with a little noise in x_0 and clips x_0, but not the noise."""
    base = network(variance=variance, clip_denoised=(-1.0, 1.0))
    pairs = zip(base.grid.alpha.tolist(), base.grid.sigma.tolist(), strict=True)
    levels = [Level(0.99, 0.1), *(Level(*pair) for pair in pairs if pair[1] > 0)]
    steps = [
        step(now, then, 0.5, raw)
        for then, now, raw in zip(levels, levels[1:], base.preconditioning[1:], strict=False)
    ]
    if variance == "learned":
        steps = [replace(each, bounds=(each.variance, 2 * each.variance)) for each in steps]
    return Scheduled(base, steps)


def masked(reveal: Any = "independent") -> MaskedDiffusion:
    return MaskedDiffusion(Tokens(), 2, 3, num_steps=3, reveal=reveal)


def zero(x: Tensor, t: int, denoised: Tensor) -> Tensor:
    return torch.zeros_like(x)


def tilt(x: Tensor, t: int, denoised: Tensor) -> Tensor:
    return torch.arange(4.0).expand(*x.shape, 4)


def link(x: Tensor) -> Any:
    return dist.Normal(x[..., None].expand(*x.shape, 3), 0.5).to_event(2)


PROCESSES: dict[str, Callable[[], Process]] = {
    "Diffusion": network,
    "Diffusion, large": lambda: network(variance="large"),
    "Diffusion, learned": lambda: network(variance="learned"),
    "Diffusion, flow": lambda: network(eta=0.0),
    "Diffusion, guided": lambda: labelled(network(**guidance(0.0, 9.0)), 2.0),
    "Diffusion, guided in between": lambda: labelled(network(**guidance(1.0, 2.0)), 2.0),
    "Diffusion, guided and learned": lambda: labelled(
        network(variance="learned", **guidance(1.0, 2.0)), 2.0
    ),
    "Diffusion, Gaussian": lambda: Diffusion(
        GaussianDenoiser(torch.randn(2), 1.3), SHORT, num_steps=3, variance="exact"
    ),
    "Diffusion, exact": lambda: Diffusion(mixture(), SHORT, num_steps=3, variance="exact"),
    "Diffusion, mixture": lambda: Diffusion(mixture(), SHORT, num_steps=3, variance="mixture"),
    "Flow": flow,
    "Flow, noise": lambda: flow(noise=0.5, method="euler", data_at=0),
    "Flow, ODE": lambda: flow(noise=0.0),
    "Flow, Heun": lambda: flow(noise=0.0, method="heun"),
    "Flow, guided": lambda: labelled(flow(**guidance(1.0, 3.0)), 2.0),
    "Flow, guided within steps": lambda: labelled(
        flow(noise=0.0, method="heun", **guidance(1.0, 3.0)), 2.0
    ),
    "Flow, torchdiffeq": lambda: flow(noise=0.0, method="rk4"),
    "Finetuned": lambda: Finetuned(network()),
    "Scheduled": scheduled,
    "Scheduled, learned": lambda: scheduled("learned"),
    "MaskedDiffusion": masked,
    "MaskedDiffusion, even": lambda: masked("even"),
    "Controlled": lambda: Controlled(network(variance="large"), zero, scale=lambda t: 1.1),
    "Controlled, masked": lambda: Controlled(masked(), tilt),
    "Team": lambda: Team({"a": network((2,)), "b": network((1, 3))}),
    "Team, exact": lambda: Team(
        {n: Diffusion(mixture(), SHORT, num_steps=3, variance="exact") for n in "ab"}
    ),
    "Team, masked": lambda: Team({"a": masked(), "b": masked()}),
    "Team, controlled": lambda: Controlled(Team({"a": network((2,)), "b": network((3,))}), zero),
    "Chain": lambda: Chain(network((2,)), network((2,))),
    "Chain, flow": lambda: Chain(network((2,)), flow((2,), noise=0.0)),
    "Chain, linked": lambda: Chain(network((2,)), network((2, 3)), link),
}


NO_BRIDGE = {  # because of tokens, guidance, a control, averaged velocities
    "Diffusion, guided",
    "Flow, Heun",
    "Flow, guided within steps",
    "Flow, torchdiffeq",
    "MaskedDiffusion",
    "MaskedDiffusion, even",
    "Controlled",
    "Controlled, masked",
    "Team, masked",
    "Team, controlled",
}


@pytest.fixture(params=PROCESSES)
def process(request: pytest.FixtureRequest) -> Process:
    return PROCESSES[request.param]()


def test_every_exported_process_has_a_row() -> None:
    exported = {
        name
        for module in (smcdiff.models, smcdiff.models.adapters)
        for name in module.__all__
        if inspect.isclass(found := getattr(module, name)) and issubclass(found, Process)
    }
    assert exported == {name.split(",")[0] for name in PROCESSES}


def states(process: Process, *batch: int) -> Iterator[tuple[int, Tensor]]:
    """One state per step on the way down, all from one path."""
    x = draw(process.initial(), batch)
    for t in range(process.num_steps, 0, -1):
        yield t, x
        law = process.kernel(x, t).law
        x = law.mean if is_deterministic(law) else law.sample()
    yield 0, x


def counters(process: Process) -> list[Counting | Tokens]:
    """The networks inside a process."""
    found, todo = [], [process]
    while todo:
        part = todo.pop()
        for inner in [*vars(part).values(), *getattr(part, "agents", {}).values()]:
            if isinstance(inner, Process):
                todo.append(inner)
            elif isinstance(inner, Counting | Tokens):
                found.append(inner)
    return found


# --------------------------------------------------------------------------------------- shapes


def test_states_have_the_shapes_that_are_declared(process: Process) -> None:
    assert process.shape_at(0) == process.event_shape
    for t, x in states(process, 4, 2):
        assert x.shape == (4, 2, *process.shape_at(t))
        assert x.dtype in (torch.float32, torch.int64)


def test_laws_are_batched_over_particles_and_plates(process: Process) -> None:
    for t, x in states(process, 4, 2):
        if t == 0:
            break
        kernel = process.kernel(x, t)
        assert kernel.law.batch_shape == (4, 2)
        assert kernel.law.event_shape == process.shape_at(t - 1)
        assert kernel.denoised.batch_shape == (4, 2)
        assert kernel.denoised.event_shape == process.event_shape
        if not is_deterministic(kernel.law):
            assert kernel.law.log_prob(kernel.law.sample()).isfinite().all()


def test_evaluation_belongs_to_particles(process: Process) -> None:
    for t, x in states(process, 4, 2):
        if t > 0:
            leaves, _ = flatten_tree(process.evaluate(x, t))
            assert leaves
            assert all(leaf.shape[:2] == (4, 2) for leaf in leaves.values())


# ------------------------------------------------------------------------------------- function


@pytest.mark.parametrize("name", PROCESSES)
def test_bridge_leads_where_a_kernel_with_that_estimate_does(name: str) -> None:
    """Where nothing is clipped: some libraries clip x_0, and not the noise."""
    process, known = PROCESSES[name](), 0
    for t, x in states(process, 5):
        if t == 0 or process.shape_at(t) != process.event_shape:
            continue
        kernel = process.kernel(x, t)
        found = process.bridge(x if name in NO_BRIDGE else kernel.denoised.mean, x, t)
        if found is not None:
            mean, inside = kernel.law.mean.to(found), ...
            if name.startswith("Scheduled"):
                inside = kernel.denoised.mean.abs() < 1
                assert inside.any()
            torch.testing.assert_close(found[inside], mean[inside], atol=2e-6, rtol=0)
            known += 1
    assert (known > 0) == (name not in NO_BRIDGE)


def test_kernel_is_a_function_of_the_evaluation(process: Process) -> None:
    """No network call is made for it, and a gathered evaluation gives the gathered kernel."""
    rows = torch.tensor([2, 0, 0])
    for t, x in states(process, 3):
        if t == 0:
            break
        evaluation = process.evaluate(x, t)
        before = [each.rows for each in counters(process)]
        kernel = process.kernel(x, t, evaluation)
        again = process.kernel(x[rows], t, map_tree(lambda v: v[rows], evaluation))
        assert [each.rows for each in counters(process)] == before
        assert_same_law(kernel.law, process.kernel(x, t).law)
        assert_same_law(process.kernel(x[rows], t).law, again.law)


def test_particles_do_not_see_each_other(process: Process) -> None:
    for t, x in states(process, 3, 2):
        if t == 0:
            break
        together = process.kernel(x, t)
        alone = [process.kernel(x[i : i + 1], t) for i in range(3)]
        for i in range(3):
            assert_rows(together.law, alone[i].law, i)
            assert_rows(together.denoised, alone[i].denoised, i)


def assert_same_law(one: Any, two: Any) -> None:
    point = one.mean if is_deterministic(one) else one.sample()
    if is_deterministic(one):
        torch.testing.assert_close(point, two.mean)
    else:
        torch.testing.assert_close(one.log_prob(point), two.log_prob(point))


def assert_rows(together: Any, alone: Any, i: int) -> None:
    """Row i of one law is the other."""
    point = together.mean if is_deterministic(together) else together.sample()
    if is_deterministic(together):
        torch.testing.assert_close(point[i : i + 1], alone.mean)
    else:
        joint = together.log_prob(point)[i : i + 1]
        torch.testing.assert_close(joint, alone.log_prob(point[i : i + 1]), rtol=1e-5, atol=1e-4)


def test_calls_are_counted(process: Process) -> None:
    for t, x in states(process, 5):
        before = sum(each.rows for each in counters(process))
        if t > 0 and counters(process):
            process.evaluate(x, t)
            asked = sum(each.rows for each in counters(process)) - before
            assert asked == 5 * process.calls(t)


def test_look_ahead_agrees_with_the_closed_form(process: Process) -> None:
    for t, x in states(process, 4):
        if t > 0 and process.closed_form:
            covariance = process.kernel(x, t).covariance
            assert covariance is not None
            diagonal, factor = covariance()
            assert diagonal.shape == x.shape
            assert factor.shape[:-1] == x.shape
            assert (diagonal > 0).all()


def test_signals_fall_from_data_to_noise(process: Process) -> None:
    signals = [process.signal(t) for t in range(process.num_steps + 1)]
    known = [s for s in signals if s is not None]
    if known:
        assert signals[0] is not None, "x_0 is data"
        assert (torch.as_tensor(known[0].alpha) == 1).all()
        assert (torch.as_tensor(known[0].sigma) == 0).all()
        assert all((torch.as_tensor(s.variance) >= 0).all() for s in known)


# ------------------------------------------------------------------------------------ statement


def test_statement_emits_one_site_per_state(process: Process) -> None:
    trace = poutine.trace(process).get_trace("x")
    members = process.members("x")
    wanted = [f"{m}_{t}" for t in range(process.num_steps, -1, -1) for m in members]
    named = [n for n in trace.nodes if n not in ("_INPUT", "_RETURN") and n[:1] != "$"]
    assert [n for n in named if trace.nodes[n]["type"] == "sample"] == [*wanted, *members]
    last = trace.nodes["_RETURN"]["value"]
    for member in members:
        value = last[member] if isinstance(last, dict) else last
        assert value is trace.nodes[member]["value"] or value.equal(trace.nodes[member]["value"])
        assert value.equal(trace.nodes[f"{member}_0"]["value"])
    assert trace.log_prob_sum().isfinite()


def test_members_come_apart_and_together_again(process: Process) -> None:
    for t, x in states(process, 3):
        if process.members("x") == ("x",) or t == 0:
            continue
        parts = process.split("x", x)
        assert set(parts) == set(process.members("x"))
        assert process.join("x", parts).equal(x)
        law = process.kernel(x, t).law
        after = draw(law, (3,))
        laws, values = process.split_law("x", law), process.split("x", after)
        if not is_deterministic(law):
            total = sum(laws[name].log_prob(values[name]) for name in laws)
            torch.testing.assert_close(total, law.log_prob(after))


def test_a_site_needs_a_name(process: Process) -> None:
    with pytest.raises(ValueError, match="needs a site name"):
        process("")


# ------------------------------------------------------------------------------------ inference


def test_bootstrap_of_nothing_has_no_weights(process: Process) -> None:
    """A program that observes nothing: every log-weight is exactly zero, whatever the process."""
    threshold = 0.0 if process.deterministic else 1.0
    method = SMC(lambda: process("x"), num_particles=4, num_runs=2, ess_threshold=threshold)
    posterior = method.run()
    assert posterior.log_weights.equal(torch.zeros(2, 4, dtype=torch.float64))
    assert posterior.log_evidence.equal(torch.zeros(2, dtype=torch.float64))
    shapes = {n: v.shape[2:] for n, v in posterior.samples.items()}
    assert torch.Size(sum(shapes.values(), ())).numel() > 0


def test_chunks_change_nothing(process: Process) -> None:
    def run(chunk_size: int | None) -> Tensor:
        torch.manual_seed(1)
        options = {"chunk_size": chunk_size, "ess_threshold": 0.0}
        method = SMC(lambda: process("x"), num_particles=7, **options)
        x = method.run().particles.x["x"]
        return x

    torch.testing.assert_close(run(None), run(3))
    torch.testing.assert_close(run(None), run(1))
