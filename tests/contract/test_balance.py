"""What trajectories promise, whoever draws them. A new behaviour gets a row in ``BEHAVIOURS``."""

from collections.abc import Callable
from typing import Any

import pyro
import pytest
import torch
from torch import Tensor, nn

import smcdiff.inference
from smcdiff import Process
from smcdiff.inference import (
    BackAndForth,
    Behaviour,
    Inflated,
    LinearRamp,
    Noised,
    OnPolicy,
    PriorPaths,
    RelativeTrajectoryBalance,
    ResidualLoss,
)
from smcdiff.models import Controlled

from .kinds import KINDS, drift, drift_and_widen, tilt

Make = Callable[[Tensor], Behaviour]
BEHAVIOURS: dict[str, Make] = {
    "OnPolicy": lambda data: OnPolicy(),
    "Inflated": lambda data: Inflated(LinearRamp(1.2, 1.0, 10)),
    "PriorPaths": lambda data: PriorPaths(),
    "Noised": Noised,
    "BackAndForth": BackAndForth,
}
LOSSES = {
    "square": ResidualLoss(),
    "tame": ResidualLoss(dead_zone=0.01, huber=1.0),
    "importance": ResidualLoss(importance=0.5),
}
REPLAYED = ("Noised", "BackAndForth")


class Gain(nn.Module):
    """A known control, times a number that is learned."""

    def __init__(self, control: Callable[..., Tensor], gain: float) -> None:
        super().__init__()
        self.control, self.gain = control, nn.Parameter(torch.tensor(gain))

    def forward(self, x: Tensor, t: int, denoised: Tensor, **context: Any) -> Tensor:
        return self.gain * self.control(x, t, denoised)


def prior_of(kind: str) -> Process:
    """Those with independent elements, which alone can be controlled."""
    return KINDS[kind].guide().base if kind == "exact" else KINDS[kind].make()  # type: ignore[attr-defined]


def balance(
    kind: str, gain: float, make: Make = BEHAVIOURS["OnPolicy"], **options: Any
) -> tuple[RelativeTrajectoryBalance, Gain]:
    """A guide of that kind, and a reward that is the same for all."""
    prior = prior_of(kind)
    controls = {"chain": drift_and_widen, "masked": tilt}
    control = Gain(controls.get(kind, drift), gain)
    process = Controlled(prior, control)

    def model() -> None:
        pyro.factor("constant", 0.7 + 0.0 * KINDS[kind].total(prior("x")))

    data = torch.zeros(5, *prior.event_shape)
    data = data.long() if KINDS[kind].discrete else data
    settings = {"behaviours": [make(data)], "num_particles": 20, **options}
    still = pyro.optim.Adam({"lr": 0.0})
    return RelativeTrajectoryBalance(model, lambda: process("x"), still, **settings), control


each_kind = pytest.mark.parametrize("kind", KINDS)
each_behaviour = pytest.mark.parametrize("name", BEHAVIOURS)


def test_every_exported_behaviour_has_a_row() -> None:
    found = {name: getattr(smcdiff.inference, name) for name in smcdiff.inference.__all__}
    exported = {n for n, c in found.items() if isinstance(c, type) and issubclass(c, Behaviour)}
    assert exported == {"Behaviour", *BEHAVIOURS}


@each_kind
@each_behaviour
@pytest.mark.parametrize("loss", LOSSES)
def test_nothing_is_left_where_the_guide_is_the_posterior(kind: str, name: str, loss: str) -> None:
    """A constant reward makes the prior its own posterior: no residual, and no gradient."""
    if loss == "importance" and name in REPLAYED:
        with pytest.raises(ValueError, match="nobody knows that of x_0"):
            balance(kind, 0.0, BEHAVIOURS[name], loss=LOSSES[loss])
        return
    rtb, control = balance(kind, 0.0, BEHAVIOURS[name], loss=LOSSES[loss])
    if kind == "chain" and name in REPLAYED:
        with pytest.raises(ValueError, match="does not say how x_t came from x_0"):
            rtb.step()
        return
    assert abs(rtb.loss_and_grads()) < 1e-12
    assert control.gain.grad is None or control.gain.grad.abs() < 1e-6
    rtb.step()
    if name != "BackAndForth":  # whose log-weights are those of some steps
        assert rtb.history[0].mean == pytest.approx(0.7, abs=1e-6)


@each_kind
@pytest.mark.parametrize("name", [n for n in BEHAVIOURS if n not in REPLAYED])
def test_trajectories_know_the_law_that_drew_them(kind: str, name: str) -> None:
    """E_b[p / b] = 1, as they count for the importance weights."""
    rtb, _ = balance(kind, 1.0, BEHAVIOURS[name])
    rtb.loss_and_grads()
    assert rtb.pair is not None
    plan = rtb.behaviours[0].plan(rtb.pair, 3000, 0)
    walked = rtb.pair.walk(plan, 3000, ())
    weights = (walked.log_behaviour - walked.log_ratio).exp()
    error = weights.std() / len(weights) ** 0.5
    assert (weights.mean() - 1).abs() < 4.3 * error + 1e-6


@each_kind
@each_behaviour
def test_two_passes_are_one(kind: str, name: str) -> None:
    if kind == "chain" and name in REPLAYED:
        return
    gradients = []
    for chunk in (None, 1):
        torch.manual_seed(0)
        rtb, control = balance(kind, 0.5, BEHAVIOURS[name], chunk_steps=chunk, evidence="vargrad")
        rtb.loss_and_grads()
        assert control.gain.grad is not None
        gradients.append(control.gain.grad)
    assert gradients[0].abs() > 0
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-6)
