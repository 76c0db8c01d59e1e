r"""One guide for every observation: learned from simulations, balanced, checked, corrected.

    python benchmarks/amortised.py                 # 8x8 digits, seen as 2 x 2 means: minutes
    python benchmarks/amortised.py --task box      # all pixels but a box: 48 sharp observations
    python benchmarks/amortised.py --dataset mnist --task box --updates 2000 --rate 1e-3 --balance 0
                                                   # 588 of them: an hour and a half
    python benchmarks/amortised.py --save guide.pt # and --load guide.pt: without learning again
    python benchmarks/amortised.py --plot ranks.png --picture draws.png

A digit is seen through a linear map with noise of standard deviation 0.05. The guide reads the
observation. First it learns from paths and observations that the program itself simulates
(`InferenceCompilation`), then from its own paths (`RelativeTrajectoryBalance`, VarGrad among those
of one observation). Each is judged on problems whose truths are draws of the prior, so that the
ranks of the truth among posterior draws are uniform if inference is exact (simulation-based
calibration, Talts et al. 2018), and 90 % intervals hold 90 % of the truths.

Printed are how often 90 % intervals hold the truth, over all unseen pixels and for two functionals,
their mean and a classifier's logit of a 3; the p-value of a chi-square test of the ranks of the
mean over five bins; the smallest effective sample size as a share and the deviation of log Z over
four runs (medians over problems), reliable verdicts, and calls per problem: network calls of prior
and guide, and backward passes.

What a rank is of must not be chosen by looking at the truth: the judge's logit of the digit that it
sees *in the truth* has ranks that are too high even where inference is exact.
"""

import argparse
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyro
import torch
from damage import Task, box, enlarge, rank
from torch import Tensor, nn
from wishes import strips

from smcdiff import Posterior
from smcdiff.inference import (
    SMC,
    DenoisedLikelihood,
    InferenceCompilation,
    RelativeTrajectoryBalance,
    ResidualLoss,
    TwistedSMC,
)
from smcdiff.models import Controlled, Diffusion, LearnedScale, Preconditioned
from smcdiff.models.networks import ResidualMLP, UNet
from smcdiff.restoration import DATASETS

NOISE, RUNS, BINS = 0.05, 4, 5


class Conditional(nn.Module):
    r"""A control that reads y = A x_0 + noise, and zero at first.

    .. math:: u_t = \mathrm{network}_t + g_t A^+ \frac{y - A \hat x_0}{\sqrt{v_t + s^2}},

    with noise s and :math:`v_t = \mathrm{Var}(x_0 | x_t)`. The network sees five images: x_t, its
    estimate of x_0, the observation and what of it is unexplained, as above, both pulled back to
    the pixels; and which pixels are seen.
    """

    def __init__(self, prior: Diffusion, task: Task, network: nn.Module) -> None:
        super().__init__()
        self.task, self.network = task, network
        self.signals = [prior.signal(t) for t in range(prior.num_steps + 1)]
        self.scale, self.event_shape = prior.scale, prior.event_shape
        self.gain = nn.Parameter(torch.zeros(len(self.signals)))
        for parameter in network.output.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor, t: int, denoised: Tensor, y: Tensor) -> Tensor:
        now, explained = self.signals[t], self.task.forward(denoised)
        event = explained.shape[x.dim() - 3 :]
        seen = y.reshape(-1, *event).expand(x.shape[:-3].numel(), *event).reshape(explained.shape)
        missing = (seen - explained) / math.sqrt(now.spread + NOISE**2)
        state = x / math.hypot(self.scale * now.alpha, now.sigma)
        pulled = [self.task.back(each) for each in (seen, missing, torch.ones_like(seen))]
        inputs = torch.cat([state, denoised, *pulled], -3).reshape(-1, 5, *self.event_shape[1:])
        out: Tensor = self.network(inputs, torch.full((len(inputs),), float(t)))
        return out[:, :1].reshape(x.shape) + self.gain[t] * pulled[1]


# ------------------------------------------------------------------------------------- learning


@dataclass
class Learned:
    """A guide, its trainable parts, and the calls that they have cost."""

    guide: Callable[[Tensor], None]
    parts: nn.ModuleDict
    calls: int = 0


def make_guide(prior: Diffusion, task: Task, width: int) -> Learned:
    side, time = prior.event_shape[-1], 1000 / prior.num_steps
    if side == 8:
        network: nn.Module = ResidualMLP(5 * side**2, 6 * width, 2, time_scale=time)
    else:
        network = UNet(5, (width, 2 * width), patch=2, time_scale=time)
    control = Preconditioned(Conditional(prior, task, network), prior)
    scale = LearnedScale(prior.num_steps, shape=prior.event_shape)
    process = Controlled(prior, control, scale=scale, reads=("y",))

    def guide(y: Tensor) -> None:
        process("x", y=y)

    return Learned(guide, nn.ModuleDict({"control": control, "scale": scale}))


def fading(rate: float, updates: int) -> pyro.optim.PyroOptim:
    """Adam, down to a fiftieth of its rate; single numbers learn five times as fast."""

    def settings(name: str) -> dict[str, float]:
        faster = 5.0 if "scale" in name or "gain" in name else 1.0
        return {"lr": faster * rate, "lrd": 0.02 ** (1 / updates), "clip_norm": 1e9}

    return pyro.optim.ClippedAdam(settings)


def compile_guide(task: Task, learned: Learned, arguments: argparse.Namespace) -> Tensor:
    """Maximum likelihood of simulated paths, four random steps of each; returns observations."""
    steps, rows, updates = 4, 64, arguments.updates
    learner = InferenceCompilation(
        task.model,
        learned.guide,
        fading(arguments.rate, updates),
        num_paths=arguments.paths,
        num_particles=rows,
        subsample=steps,
        max_gradient_norm=300.0,
    )
    learner.run(task.forward(torch.zeros(task.unseen.shape)), num_updates=updates)
    learned.calls += learner.calls.network + 2 * steps * rows * updates
    gained = -statistics.mean(learner.history[-100:])
    print(f"log q - log p of simulated paths rose to {gained:.2f}", flush=True)
    assert learner.simulations is not None
    return learner.simulations.data["y"]


def balance_guide(task: Task, learned: Learned, observations: Tensor, updates: int) -> None:
    """The guide's own paths, 16 for each of 8 observations in an update."""
    steps, rows = 8, 16 * 8
    rtb = RelativeTrajectoryBalance(
        task.model,
        learned.guide,
        fading(5e-4, updates),
        evidence="vargrad",
        num_particles=16,
        loss=ResidualLoss(huber=3.0),
        subsample=steps,
        max_gradient_norm=100.0,
        per_problem={"y": observations[0].dim()},
    )
    for _ in range(updates):
        rtb.step(observations[torch.randint(len(observations), (8,))])
    learned.calls += 2 * rtb.calls.network + steps * rows * updates
    spread = statistics.median(update.loss for update in rtb.history[-20:])
    print(f"Huber loss of residuals on the guide's own paths: {spread:.2f}", flush=True)


# ------------------------------------------------------------------------------------- judging


@dataclass
class Record:
    """What came out of all problems."""

    inside: list[float] = field(default_factory=list)
    ranks: list[float] = field(default_factory=list)
    threes: list[float] = field(default_factory=list)
    ess: list[float] = field(default_factory=list)
    spread: list[float] = field(default_factory=list)
    calls: list[float] = field(default_factory=list)
    reliable: int = 0


@dataclass
class Bench:
    """Problems from the prior, the same ones for every method."""

    prior: Diffusion
    judge: nn.Module
    task: Task
    problems: int
    particles: int
    records: dict[str, Record] = field(default_factory=dict)
    draws: dict[str, Tensor] = field(default_factory=dict)

    def run(self, name: str, method: Any, calls_per_network_call: int, alone: str = "") -> None:
        """Adds a record; and under the name ``alone`` that of the same draws without weights."""
        for seed in range(self.problems):
            pyro.set_rng_seed(10_000 + seed)
            truth = self.prior("truth").detach()
            y = self.task.observe(truth)
            posterior = method.run(y)
            self._judge(name, posterior, truth, posterior.weights.flatten())
            calls = calls_per_network_call * posterior.num_network_calls
            self.records[name].calls.append(calls + posterior.num_gradient_calls)
            if alone:
                equal = torch.full_like(posterior.weights, 1 / posterior.weights.numel())
                self._judge(alone, posterior, truth, equal.flatten())
                self.records[alone].calls.append(calls)
            if seed == 0:
                self.draws["truth, observed"] = torch.stack([truth, self.task.back(y)])
                if alone:
                    self.draws[alone] = posterior.samples["x"].flatten(0, 1)[:16]
                self.draws[name] = posterior.resample(4)["x"].flatten(0, 1)

    def _judge(self, name: str, posterior: Posterior, truth: Tensor, weights: Tensor) -> None:
        record = self.records.setdefault(name, Record())
        x, unseen = posterior.samples["x"].flatten(0, 1), self.task.unseen
        pixels = rank(x[..., unseen], truth[unseen], weights)
        record.inside.append(float(((pixels > 0.05) & (pixels < 0.95)).double().mean()))
        means = x[..., unseen].mean(-1, keepdim=True)
        record.ranks.append(float(rank(means, truth[unseen].mean(-1, keepdim=True), weights)))
        with torch.no_grad():
            logits, true_logit = self.judge(x)[:, 3:4], self.judge(truth[None])[0, 3:4]
        record.threes.append(float(rank(logits, true_logit, weights)))
        resamples = any(bool(step.resampled.any()) for step in posterior.history)
        sizes = [float(step.ess.min()) for step in posterior.history if resamples]
        sizes.append(float(posterior.particles.ess.min()))
        record.ess.append(min(sizes) / self.particles)
        record.spread.append(float(posterior.log_evidence.std()))
        record.reliable += posterior.diagnose().verdict == "reliable"


def uniform(ranks: list[float]) -> float:
    """The p-value of a chi-square test."""
    from scipy.stats import chisquare

    counts = torch.tensor(ranks).histc(BINS, 0.0, 1.0)
    return float(chisquare(counts.tolist()).pvalue)


def covered(ranks: list[float]) -> float:
    return statistics.mean(0.05 < value < 0.95 for value in ranks)


HEAD = (
    "| method | pixels | their mean | p of its ranks | logit of a 3 | smallest ESS | sd log Z "
    "| reliable | calls |"
)


def table(records: dict[str, Record]) -> None:
    print(f"\n{HEAD}\n|" + "---|" * (HEAD.count("|") - 1))
    for name, record in records.items():
        cells = [f"{statistics.mean(record.inside):.3f}", f"{covered(record.ranks):.2f}"]
        cells += [f"{uniform(record.ranks):.3f}", f"{covered(record.threes):.2f}"]
        if name.endswith("alone"):
            cells += ["-", "-", "-"]
        else:
            cells += [f"{statistics.median(record.ess):.3f}"]
            cells += [f"{statistics.median(record.spread):.2f}"]
            cells += [f"{record.reliable} of {len(record.inside)}"]
        print(f"| {name} | {' | '.join(cells)} | {statistics.mean(record.calls):.0f} |")


def amortisation(records: dict[str, Record], training: int) -> None:
    """When learning pays, if the variance of log Z falls as one over the calls of a method."""
    c, d = (statistics.mean(records[name].calls) for name in (GUIDE, OTHER))
    spreads = [statistics.median(records[name].spread) for name in (GUIDE, OTHER)]
    d *= (spreads[1] / spreads[0]) ** 2
    print(f"\nLearning took {training / 1e6:.1f} million calls. At equal precision of log Z:")
    print(f"| problems | {GUIDE} | {OTHER} |\n|---|---|---|")
    for number in (1, 10, 100, 1000):
        print(f"| {number} | {(training + number * c) / 1e6:.1f} M | {number * d / 1e6:.1f} M |")
    if d > c:
        print(f"Learning pays after {math.ceil(training / (d - c))} problems.")


def plot(records: dict[str, Record], path: Path) -> None:
    """Empirical distributions of the ranks less the uniform one, in bands of 90 %."""
    import arviz as az
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2.7 * len(records), 2.5), layout="constrained")
    axes = figure.subplots(1, len(records), sharey=True)
    for ax, (name, record) in zip(axes, records.items(), strict=True):
        az.plot_ecdf(
            torch.tensor(record.ranks).numpy(),
            eval_points=torch.linspace(0, 1, 101).numpy(),
            cdf=lambda u: u,
            difference=True,
            confidence_bands="pointwise",
            ci_prob=0.9,
            ax=ax,
            plot_outline_kwargs={"color": "none"},
        )
        ax.set_title(name, fontsize=9)
        ax.set_xlabel("rank of the true mean")
    axes[0].set_ylabel("ECDF - uniform")
    figure.savefig(path, dpi=70)


GUIDE, OTHER = "guide with look-ahead", "TwistedSMC"


def learn(task: Task, learned: Learned, arguments: argparse.Namespace) -> None:
    """Both stages of learning; or a guide that was saved."""
    if arguments.load is not None:
        stored = torch.load(arguments.load)
        learned.calls = stored["calls"]
        learned.parts.load_state_dict(stored["parts"])
        return
    y = compile_guide(task, learned, arguments)
    if arguments.balance:
        balance_guide(task, learned, y, arguments.balance)
    if arguments.save is not None:
        state = {"calls": learned.calls, "parts": learned.parts.state_dict()}
        torch.save(state, arguments.save)


def judge_all(bench: Bench, learned: Learned) -> None:
    """The guide by itself and corrected, with and without a look-ahead; and that alone."""
    model, size = bench.task.model, {"num_particles": bench.particles, "num_runs": RUNS}
    whole: Any = {"ess_threshold": 0.0, **size}
    weighted = SMC(model, guide=learned.guide, **whole)
    bench.run("guide, weighted", weighted, 2, alone="guide alone")
    ahead: Any = {"twist": DenoisedLikelihood("scalar", gradient=False), "smoothing": 0.7, **size}
    bench.run(GUIDE, SMC(model, guide=learned.guide, **ahead), 2)
    usual: Any = {"covariance": "scalar", "proposal": "gradient", **size}
    bench.run(OTHER, TwistedSMC(model, **usual), 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--dataset", choices=DATASETS, default="digits")
    parser.add_argument("--task", choices=("enlarge", "box"), default="enlarge")
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--problems", type=int, default=50)
    parser.add_argument("--particles", type=int, default=128, help="in each of four runs")
    parser.add_argument("--paths", type=int, default=16_384, help="that are simulated")
    parser.add_argument("--updates", type=int, default=3000, help="on simulated paths")
    parser.add_argument("--rate", type=float, default=2e-3, help="of learning, at first")
    parser.add_argument("--balance", type=int, default=60, help="updates on the guide's own paths")
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--save", type=Path, help="the guide, once it has learned")
    parser.add_argument("--load", type=Path, help="a guide that was saved")
    parser.add_argument("--plot", type=Path, help="a picture of the ranks")
    parser.add_argument("--picture", type=Path, help="a picture of draws for the first problem")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    pyro.set_rng_seed(0)
    dataset = DATASETS[arguments.dataset]
    prior = dataset.prior(arguments.steps, spacing="log_snr")  # type: ignore[call-arg]
    task = box(prior, dataset.seen, NOISE)
    if arguments.task == "enlarge":
        task = enlarge(prior, 4, NOISE)
    learned = make_guide(prior, task, arguments.width)
    start = time.process_time()
    learn(task, learned, arguments)
    print(f"Learning: {time.process_time() - start:.0f} s of CPU", flush=True)
    judge = dataset.classifier("judge")
    bench = Bench(prior, judge, task, arguments.problems, arguments.particles)
    judge_all(bench, learned)
    table(bench.records)
    amortisation(bench.records, learned.calls)
    if arguments.plot is not None:
        plot(bench.records, arguments.plot)
    if arguments.picture is not None:
        strips(arguments.picture, bench.draws, width=7.2)


if __name__ == "__main__":
    main()
