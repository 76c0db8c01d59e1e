r"""Inpainting and super-resolution of real digits, and whether the intervals are honest.

    python benchmarks/mnist.py --images 100                  # a GPU's job: --device cuda
    python benchmarks/mnist.py --images 100 --record FILE    # rows found before are not run again
    python benchmarks/mnist.py --images 4 --particles 4 16   # a quick look
    python benchmarks/mnist.py --coverage 50                 # intervals, on images of the prior
    python benchmarks/mnist.py --dataset digits ...          # the same on 8x8 digits, in minutes

Observations are sharp (standard deviation 0.05), so steps are spent where little noise is left
(`--spacing`); `--noise` makes them blunter. The strengths of DPS are those, among twelve between .1
and 30, whose draws a judge of digits recognised most often, in 25 steps on four other images.

First table, by problem and method, medians over images: PSNR of the posterior mean (of the best
particle for best-of-n; grey values span 2), how often a judge that did not guide sees the true
digit in a draw, the smallest effective sample size as a share of N, the deviation of log Z over the
two runs, network calls and backward passes per image, seconds (of one CPU, or of waiting for a
GPU), and peak memory in MB. Coverage: how often 90 % intervals hold the truth when the truth is a
draw of the prior, over all unseen pixels and for two functionals, their mean and the judge's logit
of a 3. (The truth must not choose the functional: the logit of what the judge sees *there* is large
by choice, and fails exact inference.)
"""

import argparse
import json
import statistics
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pyro
import torch
from damage import Task, box, enlarge, rank
from torch import Tensor

from smcdiff import Posterior
from smcdiff.inference import SMC, TwistedSMC
from smcdiff.models import Diffusion
from smcdiff.models.digits import load_digits_split
from smcdiff.models.mnist import load_mnist
from smcdiff.restoration import DATASETS, Dataset

COVARIANCES = ("none", "scalar", "diagonal")


def tasks(dataset: Dataset, prior: Diffusion, noise: float) -> list[Task]:
    return [box(prior, dataset.seen, noise), enlarge(prior, dataset.reduction or 2, noise)]


def real_images(name: str, number: int, device: str) -> tuple[Tensor, Tensor]:
    """Images that nothing was trained on, and their digits."""
    images, labels = load_mnist("test") if name == "mnist" else load_digits_split().heldout
    chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:number]
    return images[chosen].to(device), labels[chosen].to(device)


def guided(task: Task, prior: Diffusion, y: Tensor, number: int, strength: float) -> Tensor:
    """Diffusion posterior sampling (Chung et al. 2023): steps along a gradient, no weights."""
    x = prior.initial().expand([number]).sample()
    for t in range(prior.num_steps, 0, -1):
        tracked = x.clone().requires_grad_()
        kernel = prior.kernel(tracked, t)
        miss = (y - task.forward(kernel.denoised.mean)).flatten(1).norm(dim=-1)
        gradient = torch.autograd.grad(miss.sum(), tracked)[0]
        x = kernel.law.sample().detach() - strength * gradient
    return x


@dataclass(frozen=True)
class Row:
    psnr: float
    agreement: float
    smallest_ess: float
    spread: float
    network: float
    gradient: float
    seconds: float
    peak: float = float("nan")


def psnr(found: Tensor, truth: Tensor) -> float:
    return float(-10 * torch.log10((found - truth).square().mean() / 4))


def smallest_ess(posterior: Posterior) -> float:
    sizes = [float(step.ess.min()) for step in posterior.history]
    return min(*sizes, float(posterior.particles.ess.min())) / posterior.particles.num_particles


def run(  # type: ignore[no-untyped-def]
    name: str, task: Task, prior: Diffusion, judge, truth: Tensor, label: Tensor, strength: float
) -> Row:
    kind, _, count = name.partition(" ")
    particles, y, nan = int(count), task.observe(truth), float("nan")
    clock = time.process_time if y.device.type == "cpu" else time.perf_counter
    start = clock()
    if kind == "DPS":
        x = guided(task, prior, y, 2 * particles, strength)
        calls, seconds = 2 * particles * prior.num_steps, clock() - start
        hit = float((judge(x).argmax(-1) == label).float().mean())
        return Row(psnr(x.mean(0), truth), hit, nan, nan, calls, calls, seconds)
    size = {"num_particles": particles, "num_runs": 2}
    if kind == "best-of-n":
        posterior = SMC(task.model, ess_threshold=0.0, **size).run(y)  # type: ignore[arg-type]
        x = posterior.best()["x"]
        found = x[int(posterior.log_density.max(-1).values.argmax())]
        x = found[None]
    else:
        method = TwistedSMC(task.model, covariance=kind, proposal="gradient", **size)  # type: ignore[arg-type]
        posterior = method.run(y)
        found, x = posterior.expectation("x").mean, posterior.resample()["x"].flatten(0, 1)
    seconds = clock() - start
    return Row(
        psnr(found, truth),
        float((judge(x).argmax(-1) == label).float().mean()),
        smallest_ess(posterior),
        float(posterior.log_evidence.std()),
        posterior.num_network_calls,
        posterior.num_gradient_calls,
        seconds,
    )


class Record:
    """Rows by image, problem and method; kept in a file, if there is one, line by line."""

    def __init__(self, path: Path | None, settings: dict[str, Any]) -> None:
        self.path, self.settings = path, settings
        self.rows: dict[tuple[Any, ...], Row] = {}
        for line in path.read_text().splitlines() if path and path.exists() else []:
            saved = json.loads(line)
            if saved["settings"] == settings:
                self.rows[tuple(saved["key"])] = Row(**saved["row"])

    def add(self, key: tuple[Any, ...], row: Row) -> None:
        self.rows[key] = row
        if self.path:
            line = json.dumps({"settings": self.settings, "key": key, "row": asdict(row)})
            with self.path.open("a") as file:
                file.write(line + "\n")


def table(dataset: Dataset, prior: Diffusion, arguments: argparse.Namespace) -> None:
    judge = dataset.classifier("judge").to(arguments.device)
    images, labels = real_images(arguments.dataset, arguments.images, arguments.device)
    names = [f"{kind} {max(arguments.particles)}" for kind in ("best-of-n", "DPS")]
    names += [f"{kind} {n}" for kind in arguments.covariances for n in arguments.particles]
    keys = ("dataset", "steps", "spacing", "noise")
    record = Record(arguments.record, {key: getattr(arguments, key) for key in keys})
    problems = tasks(dataset, prior, arguments.noise)
    for number, (truth, label) in enumerate(zip(images, labels, strict=True)):
        for task, strength in zip(problems, arguments.strengths, strict=True):
            for name in names:
                if (number, task.name, name) not in record.rows:
                    pyro.set_rng_seed(number)
                    forget_peak(arguments.device)
                    row = run(name, task, prior, judge, truth, label, strength)
                    row = replace(row, peak=peak(arguments.device))
                    record.add((number, task.name, name), row)
    print(f"medians over {arguments.images} images, {arguments.steps} steps\n")
    print(
        "| problem | method, particles | PSNR | judge agrees | smallest ESS | sd log Z | calls ",
        end="",
    )
    print("| backward | seconds | peak MB |\n|" + "---|" * 10)
    for task in problems:
        for name in names:
            rows = [record.rows[number, task.name, name] for number in range(len(images))]
            columns = [[getattr(row, f) for row in rows] for f in Row.__dataclass_fields__]
            middle = [statistics.median(column) for column in columns]
            middle[1] = statistics.mean(columns[1])
            print(f"| {task.name} | {name} | " + " | ".join(form(v) for v in middle) + " |")


def form(value: float) -> str:
    return f"{value:.0f}" if value >= 1000 else f"{value:.3g}"


def forget_peak(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def peak(device: str) -> float:
    """The largest memory since it was forgotten, in MB."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated() / 2**20
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024


def coverage(dataset: Dataset, prior: Diffusion, arguments: argparse.Namespace) -> None:
    """Truths drawn from the chain itself, so that 90 % is what exact inference attains."""
    judge, particles = dataset.classifier("judge").to(arguments.device), max(arguments.particles)
    print(f"\n90 % intervals over {arguments.coverage} posteriors, {particles} particles x 4 runs")
    print("| problem | pixels | their mean | the logit of a 3 | reliable |\n|" + "---|" * 5)
    for task in tasks(dataset, prior, arguments.noise):
        inside: dict[str, list[float]] = {"pixels": [], "mean": [], "logit": []}
        reliable = 0
        for seed in range(arguments.coverage):
            pyro.set_rng_seed(10_000 + seed)
            truth = prior("truth").detach()
            method = TwistedSMC(
                task.model,
                covariance="scalar",
                proposal="gradient",
                num_particles=particles,
                num_runs=4,
                rejuvenation=None,
            )
            posterior = method.run(task.observe(truth))
            reliable += posterior.diagnose().verdict == "reliable"
            weights = posterior.weights.flatten()
            x = posterior.samples["x"].flatten(0, 1)
            functionals = {
                "pixels": lambda v, unseen=task.unseen: v[..., unseen],
                "mean": lambda v, unseen=task.unseen: v[..., unseen].mean(-1, keepdim=True),
                "logit": lambda v: judge(v)[..., 3:4],
            }
            for name, function in functionals.items():
                ranks = rank(function(x), function(truth), weights)
                inside[name].append(float(((ranks > 0.05) & (ranks < 0.95)).double().mean()))
        shares = " | ".join(f"{statistics.mean(values):.3f}" for values in inside.values())
        print(f"| {task.name} | {shares} | {reliable} of {arguments.coverage} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--dataset", choices=DATASETS, default="mnist")
    parser.add_argument("--images", type=int, default=0, help="of the first table")
    parser.add_argument("--coverage", type=int, default=0, help="posteriors of the second")
    parser.add_argument("--particles", type=int, nargs="+", default=[4, 16, 64])
    parser.add_argument("--covariances", nargs="+", default=COVARIANCES)
    parser.add_argument(
        "--strengths", type=float, nargs=2, default=(5.0, 20.0), help="of DPS: box, enlarge"
    )
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--spacing", default="karras")
    parser.add_argument("--noise", type=float, default=0.05)
    parser.add_argument("--record", type=Path, help="a file of rows, to go on from")
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    dataset = DATASETS[arguments.dataset]
    prior = dataset.prior(  # type: ignore[call-arg]
        arguments.steps, device=arguments.device, spacing=arguments.spacing
    )
    if arguments.images or not arguments.coverage:
        arguments.images = arguments.images or 4
        table(dataset, prior, arguments)
    if arguments.coverage:
        coverage(dataset, prior, arguments)


if __name__ == "__main__":
    main()
