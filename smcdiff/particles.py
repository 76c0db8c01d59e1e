r"""Particles: everything that a run of the engine knows at one step, as a value.

Leading axes are always ``run particle`` (with a ``problem`` axis in front where data are declared
per problem). The log-weights are unnormalised, in float64, and count from the last resampling; what
they were worth before it is kept in ``log_norm``, so that

.. math:: \log \hat Z_t = \text{log\_norm} + \log \frac1N \sum_i e^{\ell_i}

does not change when particles are resampled.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float64, Int64
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .arguments import check_kind, check_whole
from .process import Tree
from .weights import effective_sample_size, log_mean_exp

FORMAT = "smcdiff-1"


@dataclass(frozen=True)
class Calls:
    """Evaluations so far, one per particle and state: a batch of 64 particles counts 64."""

    network: int = 0
    gradient: int = 0
    program: int = 0

    def __add__(self, other: "Calls") -> "Calls":
        return Calls(
            self.network + other.network,
            self.gradient + other.gradient,
            self.program + other.program,
        )


@dataclass(frozen=True)
class Step:
    """What a person wants to know of one step; the next step needs none of it.

    Attributes:
        t: the steps that remain *after* this one.
        ess: effective sample size (a count) of the weights that entered the step's resampling
            decision.
        khat: Pareto k-hat of those weights (nan where it cannot be estimated).
        max_weight: the largest normalised weight.
        resampled: whether each run was resampled.
        ancestors: the parent of each particle (its own index where nothing was resampled).
        num_roots, effective_roots: distinct ancestors at T, and 1 / sum of squared root weights.
        log_evidence: the estimate after the step.
        log_weights: the log-weights after the step.
        calls: evaluations made in this step.
        acceptance: the acceptance rate of rejuvenation moves (nan where there were none).
    """

    t: int
    ess: Float64[Tensor, "*runs"]
    khat: Float64[Tensor, "*runs"]
    max_weight: Float64[Tensor, "*runs"]
    resampled: Tensor
    ancestors: Int64[Tensor, "*runs particle"]
    num_roots: Int64[Tensor, "*runs"]
    effective_roots: Float64[Tensor, "*runs"]
    log_evidence: Float64[Tensor, "*runs"]
    log_weights: Float64[Tensor, "*runs particle"]
    calls: Calls
    acceptance: Float64[Tensor, "*runs"]


@dataclass(frozen=True)
class Particles:
    """The state of a run with t steps to go.

    Attributes:
        x: the processes' states x_t by site, with shape ``(*axes, *plates, *event)``.
        latents: the ordinary latents by site.
        log_weights: unnormalised, since the last resampling.
        log_norm: what earlier weights contributed to log Z, per run.
        roots: the index at T that each particle descends from, within its run.
        cache: everything else that belongs to a particle (network output, contexts, log-twist,
            gradients, memory), a tree of tensors with ``axes`` in front: gathered with the rest.
        history: one :class:`Step` per step so far.
        rng: the state of torch's random stream (and of its device).
        weighted: whether the weights are valid.
        mark: the program's log-density at one fixed point per problem, by which a checkpoint knows
            other data.
    """

    t: int
    x: dict[str, Tensor]
    latents: dict[str, Tensor]
    log_weights: Float64[Tensor, "*runs particle"]
    log_norm: Float64[Tensor, "*runs"]
    roots: Int64[Tensor, "*runs particle"]
    cache: Tree
    history: tuple[Step, ...] = ()
    rng: dict[str, Tensor] | None = None
    weighted: bool = True
    mark: Float64[Tensor, " problem"] | None = None

    @property
    def axes(self) -> tuple[int, ...]:
        """The sizes of ``(problem) run particle``."""
        return tuple(self.log_weights.shape)

    @property
    def num_particles(self) -> int:
        return self.log_weights.shape[-1]

    @property
    def ess(self) -> Float64[Tensor, "*runs"]:
        """The effective sample size of each run, a count."""
        return effective_sample_size(self.log_weights)

    @property
    def log_evidence(self) -> Float64[Tensor, "*runs"]:
        """The estimate of log Z, per run."""
        return self.log_norm + log_mean_exp(self.log_weights)

    def select(self, ancestors: Tensor, where: Tensor) -> "Particles":
        """Replaces the particles of some runs by copies of their ancestors, with equal weights.

        Args:
            ancestors: indices within the run, with the shape of ``axes``.
            where: the runs to resample, with the shape of ``axes[:-1]``.
        """
        own = torch.arange(self.num_particles, device=ancestors.device).expand(self.axes)
        index = torch.where(where[..., None], ancestors, own)
        num_runs = max(1, index[..., 0].numel())
        start = torch.arange(num_runs, device=index.device)[:, None] * self.num_particles
        rows = (index.reshape(num_runs, -1) + start).reshape(-1)
        lead = len(self.axes)

        def gather(leaf: Tensor) -> Tensor:
            return leaf.flatten(0, lead - 1)[rows].reshape(leaf.shape)

        zeros = torch.zeros_like(self.log_weights)
        return replace(
            self,
            x=map_tree(gather, self.x),
            latents=map_tree(gather, self.latents),
            cache=map_tree(gather, self.cache),
            roots=gather(self.roots),
            log_norm=torch.where(where, self.log_evidence, self.log_norm),
            log_weights=torch.where(where[..., None], zeros, self.log_weights),
        )

    # ------------------------------------------------------------------------------- checkpoints

    def save(self, path: str | Path) -> None:
        """Writes everything to one safetensors file (no pickled code), atomically."""
        save_tree(path, self._as_tree(), FORMAT)

    @classmethod
    def load(cls, path: str | Path, device: torch.device | str = "cpu") -> "Particles":
        """Reads what :meth:`save` wrote."""
        return cls._from_tree(load_tree(path, FORMAT, device))

    def _as_tree(self) -> dict[str, Tree]:
        tree = dict(vars(self))
        tree["history"] = [dict(vars(s), calls=vars(s.calls)) for s in self.history]
        return tree

    @classmethod
    def _from_tree(cls, tree: dict[str, Any]) -> "Particles":
        steps = tuple(Step(**{**s, "calls": Calls(**s["calls"])}) for s in tree["history"])
        if tree["rng"] is not None:
            tree["rng"] = {k: v.cpu() for k, v in tree["rng"].items()}
        return cls(**{**tree, "history": steps})


def map_tree(function: Callable[[Tensor], Tensor], tree: Tree) -> Tree:
    """Applies a function to every tensor of a tree; other leaves stay."""
    if isinstance(tree, dict):
        return {k: map_tree(function, v) for k, v in tree.items()}
    return function(tree) if isinstance(tree, Tensor) else tree


def flatten_tree(tree: Tree, prefix: str = "") -> tuple[dict[str, Tensor], Any]:
    """The tensors of a tree by path, and its shape as JSON with the paths in their place."""
    if isinstance(tree, Tensor):
        return {prefix: tree}, {"tensor": prefix}
    tensors: dict[str, Tensor] = {}
    if isinstance(tree, dict):
        parts = {str(k): flatten_tree(v, f"{prefix}/{k}") for k, v in tree.items()}
        for part, _ in parts.values():
            tensors.update(part)
        return tensors, {"dict": {k: shape for k, (_, shape) in parts.items()}}
    if isinstance(tree, list | tuple):
        items = [flatten_tree(v, f"{prefix}/{i}") for i, v in enumerate(tree)]
        for part, _ in items:
            tensors.update(part)
        return tensors, {"list": [shape for _, shape in items]}
    return tensors, {"value": tree}


def unflatten_tree(shape: Any, tensors: dict[str, Tensor]) -> Tree:
    """The inverse of :func:`flatten_tree`."""
    ((kind, content),) = shape.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {k: unflatten_tree(v, tensors) for k, v in content.items()}
    if kind == "list":
        return [unflatten_tree(v, tensors) for v in content]
    return content


def save_tree(path: str | Path, tree: Tree, kind: str) -> None:
    """Writes a tree of that kind to one safetensors file (no pickled code), atomically."""
    check_checkpoint(path)
    tensors, shape = flatten_tree(tree)
    target = Path(path)
    partial = target.with_name(target.name + ".partial")
    contiguous = {k: v.detach().clone().contiguous().cpu() for k, v in tensors.items()}
    save_file(contiguous, str(partial), {"format": kind, "tree": json.dumps(shape)})
    partial.replace(target)


def check_checkpoint(path: str | Path | None, every: int = 1, resume: bool = False) -> None:
    """Refuses what could not be written to, before anything is computed."""
    check_whole("checkpoint_every", every)
    check_kind("checkpoint", path, str | Path, "'run.safetensors'", optional=True)
    if resume and path is None:
        raise ValueError("resume=True needs the file to continue from: give checkpoint as well")
    if path is not None and not Path(path).absolute().parent.is_dir():
        raise ValueError(f"there is no folder {Path(path).absolute().parent} for the checkpoint")


def load_tree(path: str | Path, kind: str, device: torch.device | str = "cpu") -> Tree:
    """Reads what :func:`save_tree` wrote.

    Raises:
        ValueError: the file holds something else.
    """
    try:
        with safe_open(str(path), "pt") as file:
            metadata = file.metadata() or {}
            tensors = {k: file.get_tensor(k).to(device) for k in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is not a saved run of smcdiff, or damaged: {error}") from error
    if metadata.get("format") != kind:
        raise ValueError(
            f"{path} is not a saved run of this version of smcdiff (format "
            f"{metadata.get('format')!r}, expected {kind!r})"
        )
    return unflatten_tree(json.loads(metadata["tree"]), tensors)
