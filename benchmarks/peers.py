r"""The peers, in the same run: the same models on the same thread, one after the other in turn.

    python benchmarks/peers.py                                      # what is installed
    python benchmarks/peers.py --only chain --particles-python ENV/bin/python
    python benchmarks/peers.py --only mixture mnist

- chain: a bootstrap filter with look-ahead weights on a linear-Gaussian chain (chain.py), by Pyro's
  SMCFilter and by `particles` (Chopin), which needs numpy < 2 and thus an environment of its own;
- mixture: 25 modes (mixtures.py), where the error is sliced W1 over that of two exact sets;
- mnist: a missing box (mnist.py), where it is the CRPS of the missing pixels, and the misses of
  the seen ones should be as large as the noise.

Times are medians of one thread's CPU time (which other programs hardly disturb), per particle and
step or per network call; ratios are to ours on the chain, to azula's TDS elsewhere. Peak memory is
that of a process of its own above what it holds before the run.
"""

import argparse
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import mixtures
import mnist
import pyro
import samplers
import torch
from chain import Chain, with_pyro, with_smcdiff
from metrics import sliced_wasserstein
from overhead import peak_memory
from torch import Tensor

from smcdiff import Posterior
from smcdiff.inference import TwistedSMC
from smcdiff.models import Diffusion
from smcdiff.models.priors import mnist_prior
from smcdiff.restoration import DATASETS

NOISE = 0.05  # of the observed pixels
WORKER = Path(__file__).parent / "peers" / "particles_chain.py"
HAS_AZULA = samplers.Schedule is not object
INSTALL = (
    "`particles` is left out: python -m venv ENV && ENV/bin/pip install particles, then "
    "--particles-python ENV/bin/python"
)

# ----------------------------------------------------------------------------------------- chain


class Worker:
    """`particles`, in an environment of its own, ready to filter."""

    def __init__(self, python: str, chain: Chain, folder: str) -> None:
        if subprocess.run([python, "-c", "import particles"], capture_output=True).returncode:
            raise SystemExit(f"{python} cannot import `particles`. {INSTALL}")
        tables = Path(folder) / "chain.npz"
        chain.save(tables)
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            [python, str(WORKER), str(tables)],
            stdin=pipe,
            stdout=pipe,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        )

    def __call__(self, chain: Chain, particles: int, seed: int) -> tuple[float, float]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"{particles} {seed}\n")
        self.process.stdin.flush()
        log_z, seconds = map(float, self.process.stdout.readline().split())
        return log_z, seconds

    def close(self) -> None:
        self.process.communicate()


def chain_table(arguments: argparse.Namespace) -> None:
    chain = Chain.make(arguments.chain_steps, 4)
    contestants = {"smcdiff": with_smcdiff, "Pyro's SMCFilter": with_pyro}
    with tempfile.TemporaryDirectory() as folder:
        if arguments.particles_python:
            contestants["particles"] = Worker(arguments.particles_python, chain, folder)
        else:
            print(INSTALL)
        print("| particles | method | Z / exact Z | z-score | sd log Z | ", end="")
        print("us per particle and step | ratio |\n|" + "---|" * 7)
        for number, repeats in zip(arguments.chain_particles, arguments.chain_repeats, strict=True):
            chain_rows(chain, contestants, number, repeats)
        if arguments.particles_python:
            contestants["particles"].close()  # type: ignore[attr-defined]


def chain_rows(chain: Chain, contestants: dict[str, Callable], number: int, repeats: int) -> None:
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in contestants}
    for seed in range(-1, repeats):  # the first is for warming up
        for name, contestant in contestants.items():
            result = contestant(chain, number, seed + 1)
            if seed >= 0:
                found[name].append(result)
    times = {n: statistics.median(s for _, s in rows) for n, rows in found.items()}
    for name, rows in found.items():
        logs = [log_z - chain.log_z for log_z, _ in rows]
        ratios = [math.exp(log) for log in logs]
        mean, error = statistics.mean(ratios), statistics.stdev(ratios) / len(ratios) ** 0.5
        each = 1e6 * times[name] / (number * chain.num_steps)
        print(
            f"| {number} | {name} | {mean:.4f} | {(mean - 1) / error:+.1f} | "
            f"{statistics.stdev(logs):.4f} | {each:.3f} | {times[name] / times['smcdiff']:.2f} |",
            flush=True,
        )


# --------------------------------------------------------------------------------------- mixture

Sampled = tuple[Tensor, float, float]  # samples, network calls and backward passes


def of(posterior: Posterior) -> Sampled:
    x = posterior.resample()["x"].flatten(0, 1)
    return x, posterior.num_network_calls, posterior.num_gradient_calls


def unweighted(x: Tensor, prior: Diffusion, backward: int = 1) -> Sampled:
    calls = len(x) * prior.num_steps
    return x, calls, backward * calls


def mixture_contestants(problem: mixtures.Problem, steps: int, number: int) -> dict[str, Callable]:
    def prior(variance: str) -> Diffusion:
        schedule = problem.adapted(steps)
        return Diffusion(problem.denoiser, schedule, num_steps=steps, variance=variance)  # type: ignore[arg-type]

    def ours(covariance: str, variance: str) -> Sampled:
        model = problem.program(prior(variance))
        return of(mixtures.method_of(covariance, model, number // 2, None).run(problem.y))

    a, small = problem.operator, prior("small")
    seen = samplers.Linear(problem.y, lambda x: x @ a.mT, problem.noise, a @ a.mT)
    found: dict[str, Callable] = {
        "smcdiff, Jacobian, exact kernels": lambda: ours("jacobian", "exact"),
        "smcdiff, scalar, exact kernels": lambda: ours("scalar", "exact"),
        "smcdiff, scalar, small kernels": lambda: ours("scalar", "small"),
    }
    if HAS_AZULA:
        rank = len(problem.y)
        found |= {"azula TDS": lambda: unweighted(samplers.tds(small, seen, number), small)}
        for strength in (0.1, 0.3, 1.0, 3.0):
            found[f"azula DPS {strength}"] = lambda s=strength: unweighted(
                samplers.dps(small, seen, number, s), small
            )
        found["azula MMPS"] = lambda: unweighted(
            samplers.mmps(small, seen, number, rank), small, 1 + rank
        )
    return found


def mixture_table(arguments: argparse.Namespace) -> None:
    print("| d,d_y | method | SW / floor | us per call | ratio | calls | backward | peak MB |")
    print("|" + "---|" * 8)
    for dim in arguments.dims:
        rows: dict[str, list[Row]] = {}
        for seed in range(arguments.problems):
            problem = mixtures.Problem.draw(dim, 2, seed)
            exact, _ = problem.denoiser.posterior(problem.operator, problem.noise**2, problem.y)
            pyro.set_rng_seed(seed)
            one, two = (exact.sample(arguments.particles) for _ in range(2))
            floor = sliced_wasserstein(one, two)
            for name, contestant in mixture_contestants(problem, 100, arguments.particles).items():
                sampled, seconds = timed(contestant, seed)
                finite = bool(sampled[0].isfinite().all())
                error = sliced_wasserstein(sampled[0], one) / floor if finite else math.inf
                rows.setdefault(name, []).append(Row((error,), sampled[1:], seconds))
        print_rows(f"{dim},2", rows, ["mixture", str(dim)])


# ----------------------------------------------------------------------------------------- mnist


def mnist_contestants(prior: Diffusion, y: Tensor, number: int) -> dict[str, Callable]:
    task = mnist.tasks(DATASETS["mnist"], prior, NOISE)[0]
    options = {"num_particles": number // 2, "num_runs": 2, "proposal": "gradient"}

    def ours(covariance: str) -> Sampled:
        return of(TwistedSMC(task.model, covariance=covariance, **options).run(y))  # type: ignore[arg-type]

    found: dict[str, Callable] = {"smcdiff, scalar": lambda: ours("scalar")}
    if HAS_AZULA:
        seen = samplers.Linear(y, task.forward, NOISE, 1.0)
        found["azula TDS"] = lambda: unweighted(samplers.tds(prior, seen, number), prior)
        for strength in (0.3, 1.0):
            found[f"azula DPS {strength}"] = lambda s=strength: unweighted(
                samplers.dps(prior, seen, number, s), prior
            )
        found["azula MMPS"] = lambda: unweighted(samplers.mmps(prior, seen, number, 1), prior, 2)
    return found


def crps(x: Tensor, truth: Tensor) -> float:
    """E|x - truth| - E|x - x'| / 2, averaged over elements: a proper score, 0 at best."""
    apart = (x[:, None] - x).abs().sum((0, 1)) / (len(x) * (len(x) - 1))
    return float(((x - truth).abs().mean(0) - apart / 2).mean())


def mnist_table(arguments: argparse.Namespace) -> None:
    prior, dataset = mnist_prior(arguments.steps), DATASETS["mnist"]
    task, judge = mnist.tasks(dataset, prior, NOISE)[0], dataset.classifier("judge")
    rows: dict[str, list[Row]] = {}
    images = zip(*mnist.real_images("mnist", arguments.images, "cpu"), strict=True)
    for number, (truth, label) in enumerate(images):
        pyro.set_rng_seed(number)
        y = task.observe(truth)
        for name, contestant in mnist_contestants(prior, y, arguments.image_particles).items():
            (x, *calls), seconds = timed(contestant, number)
            miss = (task.forward(x) - y).square().mean().sqrt() / NOISE
            agreed = (judge(x).argmax(-1) == label).float().mean()
            found = crps(x[..., task.unseen], truth[task.unseen]), float(miss), float(agreed)
            rows.setdefault(name, []).append(Row(found, calls, seconds))
    print(
        "| problem | method | CRPS | misses / noise | judge agrees | us per call | ratio | ", end=""
    )
    print("calls | backward | peak MB |\n|" + "---|" * 10)
    print_rows("box", rows, ["mnist", "0"])


# ---------------------------------------------------------------------------------------- tables


@dataclass(frozen=True)
class Row:
    """One contestant on one problem: errors, calls (network, backward) and seconds."""

    errors: Sequence[float]
    calls: Sequence[float]
    seconds: float


def timed(contestant: Callable[[], Sampled], seed: int) -> tuple[Sampled, float]:
    pyro.set_rng_seed(100 + seed)
    start = time.process_time()
    sampled = contestant()
    return sampled, time.process_time() - start


def print_rows(where: str, rows: dict[str, list[Row]], case: list[str]) -> None:
    """Medians over problems."""
    each = {n: statistics.median(r.seconds / r.calls[0] for r in of) for n, of in rows.items()}
    base = each.get("azula TDS", math.nan)
    for name, found in rows.items():
        errors = [statistics.median(e) for e in zip(*(r.errors for r in found), strict=True)]
        network, backward = found[0].calls
        command = [sys.executable, __file__, "--one", *case, name]
        out = subprocess.run(command, capture_output=True, text=True, check=True)
        print(
            f"| {where} | {name} | {' | '.join(f'{e:.3g}' for e in errors)} | "
            f"{1e6 * each[name]:.3g} | {each[name] / base:.2f} | {network} | {backward} | "
            f"{float(out.stdout):.0f} |",
            flush=True,
        )


def peak_of_one(case: str, dim: str, name: str, arguments: argparse.Namespace) -> None:
    """Prints the peak memory of one contestant in MB; few steps tell it."""
    if case == "mixture":
        problem = mixtures.Problem.draw(int(dim), 2, 0)
        contestants = mixture_contestants(problem, 10, arguments.particles)
    else:
        prior = mnist_prior(4)
        y = mnist.tasks(DATASETS["mnist"], prior, NOISE)[0].observe(torch.zeros(1, 28, 28))
        contestants = mnist_contestants(prior, y, arguments.image_particles)
    before = peak_memory()
    contestants[name]()
    print(peak_memory() - before)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    tables = {"chain": chain_table, "mixture": mixture_table, "mnist": mnist_table}
    parser.add_argument("--only", nargs="+", choices=tables, default=list(tables))
    parser.add_argument("--particles-python", help="an interpreter that has `particles`")
    parser.add_argument("--chain-steps", type=int, default=100)
    parser.add_argument("--chain-particles", type=int, nargs="+", default=[1000, 100_000])
    parser.add_argument("--chain-repeats", type=int, nargs="+", default=[50, 10])
    parser.add_argument("--dims", type=int, nargs="+", default=[8, 80])
    parser.add_argument("--problems", type=int, default=5)
    parser.add_argument("--particles", type=int, default=2000, help="of the mixture, in two runs")
    parser.add_argument("--images", type=int, default=3)
    parser.add_argument("--image-particles", type=int, default=32, help="in two runs")
    parser.add_argument("--steps", type=int, default=50, help="of the MNIST prior")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.one:
        case, dim, name = arguments.one
        torch.set_default_dtype(torch.float32 if case == "mnist" else torch.float64)
        peak_of_one(case, dim, name, arguments)
        return
    if not HAS_AZULA:
        print("azula is left out: pip install azula")
    for name in arguments.only:
        torch.set_default_dtype(torch.float32 if name == "mnist" else torch.float64)
        print(f"\n{name}\n")
        tables[name](arguments)


if __name__ == "__main__":
    main()
