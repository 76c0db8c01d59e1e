r"""One guide for twelve wishes: a digit, an even one or an odd one, under a frozen prior of images.

    python benchmarks/rtb_images.py                   # 8x8 digits: minutes
    python benchmarks/rtb_images.py --dataset mnist   # two hours, of which half is learning
    python benchmarks/rtb_images.py --save guide.pt   # and --load guide.pt: without learning again

The reward of an image is what a classifier thinks of the likeliest digit of the wish,
log r = max log p(digit | x) (Venkatraman et al. 2024, section 3.2). The guide climbs a potential
V(x_t, t, wish), a small network beside the prior's. It learns log E[r(x_0) | x_t] of all wishes
first, by logistic regression of the rewards of draws on those draws with noise; then, with a gain
per step, from simulated paths, whose wishes are drawn in proportion to their rewards (no mode is
missed); and last by relative trajectory balance. On MNIST it learns what noised draws were
(`bridged`, `--denoising`) before it sees paths. Every rival gets for one posterior what it has cost
for it: a twelfth of the learning, and the draws; DPS and LGD-MC, which have no use for more, get
their draws.

DPS and LGD-MC are the look-ahead of `TwistedSMC` without weights, at a point and at eight draws of
x_0. "Own label" is the prior with the label that it was trained with: what supervision achieves.
Printed for each set of draws are the reward in the eyes of the guiding classifier, how often
another one, the judge, agrees, the squared Frechet distance from real images of the wish in the
judge's eyes beside that of as many other real images, and the mean distance of two draws there as a
share of that of real images; the effective number of independent draws, log Z (± its deviation over
four runs), and the calls of all networks, backward passes included. A call of the potential counts
as the share of a call of the prior that its floating-point operations are.
"""

import argparse
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from metrics import frechet
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode
from wishes import spread, strips

from smcdiff import Posterior
from smcdiff.averages import draw
from smcdiff.inference import (
    SMC,
    InferenceCompilation,
    OnPolicy,
    PowerTwist,
    PriorPaths,
    RelativeTrajectoryBalance,
    ResidualLoss,
    TrustRegionTwistedSMC,
    TwistedSMC,
)
from smcdiff.models import Controlled, Diffusion, Potential
from smcdiff.models.digits import load_digits_split
from smcdiff.models.mnist import load_mnist
from smcdiff.models.networks import Conditioning
from smcdiff.restoration import DATASETS

WISHES = {str(digit): [digit] for digit in range(10)}
WISHES |= {"even": [0, 2, 4, 6, 8], "odd": [1, 3, 5, 7, 9]}
MEMBERS = torch.zeros(len(WISHES), 10, dtype=torch.bool)
for _row, _digits in enumerate(WISHES.values()):
    MEMBERS[_row, _digits] = True
RUNS, PROBLEMS, PATHS = 4, 8, 8  # an update takes 8 wishes and 8 trajectories for each
READ = 4  # steps of every simulated path that an update sees
SIZES = {
    "digits": {"steps": 20, "regression": 1500, "denoising": 0, "compilation": 240, "updates": 60},
    "mnist": {"steps": 50, "regression": 1000, "denoising": 700, "compilation": 300, "updates": 30},
}
COLUMNS = "reward | judge agrees | Frechet | distance | independent | log Z | calls"


def log_reward(classifier: nn.Module, x: Tensor, wish: Tensor) -> Tensor:
    likely: Tensor = classifier(x).log_softmax(-1)
    return likely.masked_fill(~MEMBERS.to(x.device)[wish], -math.inf).amax(-1)


# ------------------------------------------------------------------------------------- learning


class Scores(nn.Module):
    """Logits of the wishes that a noisy image will fulfil, with layers modulated by the time."""

    def __init__(self, side: int, num_steps: int, width: int = 32) -> None:
        super().__init__()
        self.condition = Conditioning(64, time_scale=1000 / num_steps)
        widths = (1, width, 2 * width, 4 * width)
        if side == 8:
            widths = (1, 2 * width, 4 * width)
        pairs = list(itertools.pairwise(widths))
        self.layers = nn.ModuleList(nn.Conv2d(i, o, 3, stride=2, padding=1) for i, o in pairs)
        self.norms = nn.ModuleList(nn.GroupNorm(8, o) for _, o in pairs)
        self.modulations = nn.ModuleList(nn.Linear(64, 2 * o) for _, o in pairs)
        side = math.ceil(side / 2 ** len(pairs))
        self.hidden = nn.Linear(widths[-1] * side**2, widths[-1])
        self.last = nn.Linear(widths[-1], len(WISHES))

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        vector = self.condition(time)
        for layer, norm, modulation in zip(self.layers, self.norms, self.modulations, strict=True):
            scale, shift = modulation(vector)[..., None, None].chunk(2, dim=1)
            x = functional.silu(norm(layer(x)) * (1 + scale) + shift)
        logits: Tensor = self.last(functional.silu(self.hidden(x.flatten(1))))
        return logits


class LogExpectedReward(nn.Module):
    """V(x_t, t, wish)."""

    def __init__(self, scores: Scores) -> None:
        super().__init__()
        self.scores = scores

    def forward(self, x: Tensor, time: Tensor, wish: Tensor) -> Tensor:
        return functional.logsigmoid(self.scores(x, time)).gather(-1, wish[:, None])


@dataclass
class Setting:
    """A prior, who rewards and who judges; the program and its guide."""

    prior: Diffusion
    classifier: nn.Module
    judge: nn.Module

    def __post_init__(self) -> None:
        self.scores = Scores(self.prior.event_shape[-1], self.prior.num_steps)
        potential = Potential(LogExpectedReward(self.scores), self.prior, label="wish")
        self.controlled = Controlled(self.prior, potential, reads=("wish",))
        self.parts = nn.ModuleDict({"control": potential})

    def share(self) -> float:
        """The operations of one call of the potential, as a share of those of the prior."""
        x, time = torch.zeros(8, *self.prior.event_shape), torch.ones(8)
        counts = []
        for network in (self.scores, self.prior.network):
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                network(x, time)
            counts.append(counter.get_total_flops())
        return counts[0] / counts[1]

    def reward(self, x: Tensor, wish: Tensor) -> Tensor:
        return log_reward(self.classifier, x, wish)

    def rewards(self, x: Tensor) -> Tensor:
        """Of all wishes, in a last dimension."""
        return torch.stack([self.reward(x, wish) for wish in torch.arange(len(WISHES))], -1)

    def model(self, wish: Tensor) -> None:
        pyro.factor("wish", self.reward(self.prior("x"), wish))

    def simulated(self, wish: Tensor) -> None:
        """The model as one that can draw wishes: in proportion to what x_0 is worth to them."""
        pyro.sample("wish", dist.Categorical(logits=self.rewards(self.prior("x"))), obs=wish)

    def guide(self, wish: Tensor) -> None:
        self.controlled("x", wish=wish)

    def labelled(self, wish: Tensor) -> None:
        self.prior("x", label=wish)


def regress(setting: Setting, x_0: Tensor, updates: int) -> float:
    """V from rewards of the prior's draws, which are noised anew each time; returns its calls."""
    prior, rows = setting.prior, 512
    with torch.no_grad():
        rewards = torch.cat([setting.rewards(part) for part in x_0.split(rows)]).exp()
    optimiser = torch.optim.AdamW(setting.scores.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 2e-3, total_steps=updates)
    losses: list[float] = []
    for update in range(updates):
        chosen = torch.randint(len(x_0), (rows,))
        times = torch.randint(prior.num_steps, (rows,)) + 1
        x = noised(prior, x_0[chosen], times)
        logits = setting.scores(x, times.float())
        loss = functional.binary_cross_entropy_with_logits(logits, rewards[chosen])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        losses.append(float(loss.detach()))
        if (update + 1) % max(1, updates // 4) == 0:
            entropy = statistics.mean(losses[-(updates // 4) :])
            print(f"{update + 1} updates: cross entropy per wish {entropy:.4f}", flush=True)
    return 2 * setting.share() * rows * updates


def noised(prior: Diffusion, x_0: Tensor, times: Tensor) -> Tensor:
    """x_t given x_0, for times of its own in every row."""
    levels = prior.grid.alpha, prior.grid.sigma
    alpha, sigma = (level[times].to(x_0)[:, None, None, None] for level in levels)
    return alpha * x_0 + sigma * torch.randn_like(x_0)


def rates(updates: int, network: float, gains: float) -> pyro.optim.PyroOptim:
    """Adam, down to a fiftieth of its rate; gains learn faster than networks."""

    def settings(name: str) -> dict[str, float]:
        rate = gains if "gain" in name else network
        return {"lr": rate, "lrd": 0.02 ** (1 / max(updates, 1)), "clip_norm": 1e9}

    return pyro.optim.ClippedAdam(settings)


def compilation(
    setting: Setting, optim: pyro.optim.PyroOptim, **options: Any
) -> InferenceCompilation:
    """A learner from what the model simulates."""
    return InferenceCompilation(
        setting.simulated,
        setting.guide,
        optim,
        data=("wish",),
        subsample=READ,
        max_gradient_norm=300.0,
        **options,
    )


def learn(setting: Setting, learner: InferenceCompilation, updates: int) -> float:
    """Simulates and updates; returns the calls."""
    for update in range(updates):
        learner.step(torch.tensor(0))
        if (update + 1) % max(1, updates // 4) == 0:
            gained = -statistics.mean(learner.history[-(updates // 4) :])
            print(f"{update + 1} updates: log q - log p {gained:.2f}", flush=True)
    return learner.calls.network + 4 * setting.share() * READ * learner.num_particles * updates


def denoise(setting: Setting, draws: int, regression: int, updates: int) -> float:
    """From draws of the prior: their rewards first, then, noised, what they were; returns calls."""
    optim = rates(updates, network=1e-3, gains=1e-2)
    learner = compilation(setting, optim, num_paths=draws, num_particles=64, bridged=True)
    learner.step(torch.tensor(0))  # which simulates
    calls = regress(setting, learner.simulations.x[0]["x"], regression)
    return calls + learn(setting, learner, updates)


def compile_guide(setting: Setting, updates: int) -> float:
    """From simulated paths, every step of which is read once; returns its calls."""
    optim, paths, rows = rates(updates, network=2e-4, gains=1e-2), 2048, 128
    refresh = paths * setting.prior.num_steps // (READ * rows)
    learner = compilation(setting, optim, num_paths=paths, num_particles=rows, refresh=refresh)
    return learn(setting, learner, updates)


def balance(setting: Setting, updates: int) -> float:
    """Half of the updates on the guide's own paths, half on the prior's; returns its calls."""
    rtb = RelativeTrajectoryBalance(
        setting.model,
        setting.guide,
        rates(updates, network=5e-5, gains=2e-3),
        evidence="vargrad",
        num_particles=PATHS,
        behaviours=(OnPolicy(), PriorPaths()),
        loss=ResidualLoss(huber=3.0),
        max_gradient_norm=100.0,
        per_problem={"wish": 0},
    )
    for update in range(updates):
        rtb.step(torch.randint(len(WISHES), (PROBLEMS,)))
        if (update + 1) % max(2, updates // 4) == 0:
            bound = statistics.mean(u.mean for u in rtb.history[::2][-max(1, updates // 8) :])
            print(f"{update + 1} updates: evidence lower bound {bound:.2f}", flush=True)
    # the potential has a gradient, and backward passes of both
    asked = setting.prior.num_steps * PROBLEMS * PATHS * updates
    return rtb.calls.network + 4 * setting.share() * asked


# ---------------------------------------------------------------------------------- the contestants


@dataclass(frozen=True)
class Found:
    """Draws, and what the weights say (nan where there are none)."""

    draws: Tensor
    calls: float
    independent: float = math.nan
    log_z: float = math.nan
    deviation: float = math.nan


def calls_of(posterior: Posterior, networks: float = 1) -> float:
    return networks * posterior.num_network_calls + posterior.num_gradient_calls


def weighted(posterior: Posterior, number: int, networks: float = 1) -> Found:
    """As many draws by weight, from all runs together."""
    log_z = posterior.log_evidence
    logs = (posterior.log_weights.log_softmax(-1) + log_z[:, None]).flatten()
    chosen = draw(logs, number)
    return Found(
        posterior.samples["x"].flatten(0, 1)[chosen],
        calls_of(posterior, networks),
        posterior.diagnose().independent_particles,
        float(posterior.evidence.log_evidence),
        float(log_z.std()),
    )


def unweighted(posterior: Posterior, number: int, networks: float = 1) -> Found:
    return Found(posterior.samples["x"].flatten(0, 1)[:number], calls_of(posterior, networks))


def contestants(
    setting: Setting, wish: Tensor, number: int, share: float
) -> Iterator[tuple[str, Found]]:
    """Every method's draws for one wish; ``share`` is what this posterior has cost to learn."""
    model, steps = setting.model, setting.prior.num_steps
    apart: Any = {"ess_threshold": 0.0, "num_runs": RUNS, "chunk_size": 256}
    guided = SMC(model, guide=setting.guide, num_particles=number // RUNS, **apart).run(wish)
    both = 1 + 2 * setting.share()  # the prior's network, and the potential with its gradient
    yield "guide, as drawn", unweighted(guided, number, both)
    yield "guide, corrected", weighted(guided, number, both)
    budget = share + calls_of(guided, both)

    groups = max(1, round(budget / steps / number))
    best = SMC(model, num_particles=groups, ess_threshold=0.0, num_runs=number, chunk_size=256)
    posterior = best.run(wish)
    yield f"best of {groups}", Found(posterior.best()["x"], calls_of(posterior))

    size: Any = {"num_runs": RUNS, "chunk_size": 256}
    particles = round(budget / steps / RUNS)
    yield (
        "prior, weighted",
        weighted(SMC(model, num_particles=particles, **apart).run(wish), number),
    )
    ahead: Any = {"covariance": "none", "damping": 0.0, "num_draws": 0, **apart}
    few: Any = {"num_particles": number // RUNS}
    yield "DPS", unweighted(TwistedSMC(model, **ahead, **few).run(wish), number)
    ahead |= {"covariance": "scalar", "num_draws": 8}
    yield "LGD-MC", unweighted(TwistedSMC(model, **ahead, **few).run(wish), number)
    twisted = TwistedSMC(model, num_particles=particles // 2, **size)
    yield "TwistedSMC", weighted(twisted.run(wish), number)
    yield "trust region", trust_region(model, wish, number, particles // 2)
    if len(WISHES[list(WISHES)[int(wish)]]) == 1:
        own = SMC(model, guide=setting.labelled, num_particles=number // RUNS, **apart).run(wish)
        yield "own label, as drawn", unweighted(own, number)
        yield "own label, corrected", weighted(own, number)


def trust_region(model: Callable[..., None], wish: Tensor, number: int, particles: int) -> Found:
    """A quarter of the calls in two sweeps of learning, the rest in the final runs."""
    method = TrustRegionTwistedSMC(
        model,
        PowerTwist(),
        num_iterations=2,
        learning_particles=max(2, particles * RUNS // 8),
        num_particles=particles * 3 // 4,
        num_runs=RUNS,
        chunk_size=256,
        smoothing=0.7,
    )
    found = weighted(method.run(wish), number)
    spent = method.learning_calls
    calls = found.calls + spent.network + spent.gradient
    return Found(found.draws, calls, found.independent, found.log_z, found.deviation)


# --------------------------------------------------------------------------------------- judging


@dataclass(frozen=True)
class Reference:
    """Real images of a wish, and others of it, as the judge sees them."""

    features: Tensor
    others: Tensor

    def row(self, setting: Setting, wish: Tensor, found: Found) -> str:
        x = found.draws
        seen = features(setting.judge, x)
        agrees = MEMBERS[wish][setting.judge(x).argmax(-1)].float().mean()
        cells = [
            f"{setting.reward(x, wish).mean():.3f}",
            f"{agrees:.3f}",
            f"{frechet(seen, self.features):.2f}",
            f"{spread(seen) / spread(self.others):.3f}",
            f"{found.independent:.0f}",
            f"{found.log_z:.3f} ± {found.deviation:.3f}",
            f"{found.calls:.0f}",
        ]
        return " | ".join(cells).replace("nan ± nan", "-").replace("nan", "-")


@torch.no_grad()
def features(judge: nn.Module, x: Tensor) -> Tensor:
    """What the last layer of the judge sees; of the small one its logits, for want of images."""
    last: nn.Module = getattr(judge, "features", judge)
    return torch.cat([last(part) for part in x.split(500)])


def real_images(name: str, wish: str, number: int) -> tuple[Tensor, Tensor]:
    """Many real images of a wish, and ``number`` others."""
    if name == "mnist":
        many, others = load_mnist("train"), load_mnist("test")
    else:
        many, others = load_digits_split().train, load_digits_split().heldout
    kept = [torch.isin(each.labels, torch.tensor(WISHES[wish])) for each in (many, others)]
    found = others.images[kept[1]]
    return many.images[kept[0]], found[torch.randperm(len(found))[:number]]


def judge_all(setting: Setting, arguments: argparse.Namespace, share: float) -> dict[str, Any]:
    """Prints the tables; returns what each method has found, by wish."""
    rows: dict[str, Any] = {}
    for wish in arguments.wishes:
        pyro.set_rng_seed(1)
        many, others = real_images(arguments.dataset, wish, arguments.draws)
        reference = Reference(features(setting.judge, many), features(setting.judge, others))
        print(f"\n### {wish}\n\n| method | {COLUMNS} |\n" + "|---" * 8 + "|")
        index = torch.tensor(list(WISHES).index(wish))
        real = Found(others, math.nan)
        rows[wish] = {"real images": real}
        print(f"| {len(others)} real images | {reference.row(setting, index, real)} |", flush=True)
        for name, found in contestants(setting, index, arguments.draws, share):
            print(f"| {name} | {reference.row(setting, index, found)} |", flush=True)
            rows[wish][name] = found
    return rows


def amortisation(rows: dict[str, dict[str, Found]], training: float) -> None:
    """Calls for so many independent draws, over all posteriors of the guide together."""
    names = ["guide, corrected", "prior, weighted", "TwistedSMC", "trust region"]
    price = {
        name: statistics.mean(each[name].calls / each[name].independent for each in rows.values())
        for name in names
    }
    print(f"\nLearning took {training / 1e6:.2f} million calls. Millions of calls for")
    print(f"| independent draws | {' | '.join(names)} |\n" + "|---" * (len(names) + 1) + "|")
    for number in (100, 1000, 10_000, 100_000):
        cells = [f"{(number * price[n] + training * (n == names[0])) / 1e6:.2f}" for n in names]
        print(f"| {number} | {' | '.join(cells)} |")
    for name in names[1:]:
        if price[name] > price[names[0]]:
            pays = math.ceil(training / (price[name] - price[names[0]]))
            print(f"Learning pays against {name!r} after {pays} draws.")
        else:
            print(f"Learning never pays against {name!r}.")


def picture(path: Path, found: dict[str, Found]) -> None:
    """Sixteen draws of each method."""
    rows = {name: each.draws[:: max(1, len(each.draws) // 16)][:16] for name, each in found.items()}
    strips(path, rows, width=7.2)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--dataset", choices=DATASETS, default="digits")
    parser.add_argument("--simulations", type=int, default=8192, help="draws to learn from first")
    sizes = parser.add_argument_group("sizes, the data's own unless given")
    sizes.add_argument("--steps", type=int, help="of the chain")
    sizes.add_argument("--regression", type=int, help="updates from the draws' rewards")
    sizes.add_argument("--denoising", type=int, help="updates from what the draws were")
    sizes.add_argument("--compilation", type=int, help="updates from paths")
    sizes.add_argument("--updates", type=int, help="by trajectory balance")
    parser.add_argument("--draws", type=int, default=256, help="from each posterior")
    parser.add_argument("--wishes", nargs="+", choices=WISHES, default=["3", "7", "even", "odd"])
    parser.add_argument("--save", type=Path, help="the guide, once it has learned")
    parser.add_argument("--load", type=Path, help="a guide that was saved")
    parser.add_argument("--picture", type=Path, help="a PNG of draws for the first wish")
    arguments = parser.parse_args()
    for name, size in SIZES[arguments.dataset].items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, size)
    torch.set_num_threads(1)
    pyro.set_rng_seed(0)
    dataset, start = DATASETS[arguments.dataset], time.process_time()
    judges = dataset.classifier("guide"), dataset.classifier("judge")
    setting = Setting(dataset.prior(arguments.steps), *judges)
    if arguments.load is not None:
        stored = torch.load(arguments.load)
        calls = stored["calls"]
        setting.parts.load_state_dict(stored["parts"])
    else:
        calls = denoise(setting, arguments.simulations, arguments.regression, arguments.denoising)
        calls += compile_guide(setting, arguments.compilation)
        calls += balance(setting, arguments.updates)
    if arguments.save is not None:
        torch.save({"calls": calls, "parts": setting.parts.state_dict()}, arguments.save)
    print(f"Learning: {time.process_time() - start:.0f} s of CPU, {calls:.0f} calls", flush=True)
    rows = judge_all(setting, arguments, calls / len(WISHES))
    amortisation(rows, calls)
    if arguments.picture is not None:
        picture(arguments.picture, rows[arguments.wishes[0]])


if __name__ == "__main__":
    main()
