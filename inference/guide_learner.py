"""What all that train a guide share: updates, runs, checkpoints, several processes.

A checkpoint is one safetensors file, without pickled code, with everything that the next update
needs: a run that was killed is continued bit for bit.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

from jaxtyping import Float64
from pyro import poutine
from pyro.optim import PyroOptim
from torch import Tensor, nn
from tqdm.auto import tqdm

from smcdiff.arguments import check_kind, check_whole
from smcdiff.particles import Calls, check_checkpoint, load_tree, save_tree
from smcdiff.program import check_model

from . import ranks
from .pair import Pair, leaves
from .resuming import agrees, check_data, mark
from .streams import restore_streams, stream_states

Record = TypeVar("Record")


class GuideLearner(ABC, Generic[Record]):
    """Trains a guide's parameters, update by update; the model stays as it is.

    Args:
        model: a Pyro callable with at least one process.
        guide: a Pyro callable with the same process sites.
        optim: a ``pyro.optim`` optimiser of the guide's parameters.
        num_particles: trajectories per update, of all processes of ``torchrun``.
        max_gradient_norm: gradients are scaled down to it (None: as they are).

    Attributes:
        calls: of networks and program, by this process.
        history: a record of every update.
        pair: model and guide, taken apart.
        data_mark: tells the data of all updates from others (None: they changed).
    """

    kind: ClassVar[str]  # of its checkpoints

    def __init__(
        self,
        model: Callable[..., Any],
        guide: Callable[..., Any],
        optim: PyroOptim,
        num_particles: int,
        max_gradient_norm: float | None,
    ) -> None:
        check_model("model", model)
        check_model("guide", guide)
        check_kind("optim", optim, PyroOptim, "pyro.optim.Adam({'lr': 1e-3})")
        self.model, self.guide, self.optim = model, guide, optim
        self.num_particles, self.max_gradient_norm = num_particles, max_gradient_norm
        self.calls, self.history = Calls(), list[Record]()
        self.pair: Pair | None = None
        self.data_mark: Float64[Tensor, " problem"] | None = None

    @property
    def done(self) -> int:
        """How many updates were made, those that were skipped included."""
        return len(self.history)

    # ------------------------------------------------------------------------------- one update

    def step(self, *args: Any, **kwargs: Any) -> float:
        """One update at ``model(*args, **kwargs)``; returns its loss (nan if it was skipped)."""
        with poutine.trace(param_only=True) as seen:
            record = self._accumulate(args, kwargs)
        parameters, loss = list(leaves(seen.trace).values()), self._loss(record)
        if math.isfinite(loss):
            self._move(parameters)
        for parameter in (*parameters, *self._own_parameters()):
            parameter.grad = None
        self.history.append(record)
        return loss

    @abstractmethod
    def _accumulate(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Record:
        """Adds the gradients of this process's share of a batch."""

    @abstractmethod
    def _loss(self, record: Record) -> float:
        """The loss of an update."""

    def _own_parameters(self) -> list[Tensor]:
        """What is learned beside the guide."""
        return []

    def _move(self, parameters: list[Tensor]) -> None:
        """Sums gradients over the processes, clips them, and takes a step."""
        everything = [*parameters, *self._own_parameters()]
        ranks.add_gradients(everything)
        if self.max_gradient_norm is not None:
            used = [p for p in everything if p.grad is not None]
            nn.utils.clip_grad_norm_(used, self.max_gradient_norm)
        self.optim([p for p in parameters if p.grad is not None])

    # ------------------------------------------------------------------------------- a whole run

    def run(
        self,
        *args: Any,
        num_updates: int,
        progress: bool = False,
        checkpoint: str | Path | None = None,
        checkpoint_every: int = 100,
        resume: bool = False,
        **kwargs: Any,
    ) -> list[Record]:
        """Updates until there are ``num_updates`` of them, at the same arguments.

        Args:
            progress: show a progress bar.
            checkpoint: a file that keeps the state of the run.
            checkpoint_every: updates between two writes of it.
            resume: continue from the checkpoint, bit for bit, if the file exists.

        Raises:
            ValueError: the checkpoint is of another training, or all its updates saw other data.
        """
        check_checkpoint(checkpoint, checkpoint_every)
        if resume and checkpoint is not None and Path(checkpoint).exists():
            self._read(checkpoint, args, kwargs, same_data=True)
        with tqdm(initial=self.done, total=num_updates, disable=not progress, unit="update") as bar:
            while self.done < num_updates:
                bar.set_postfix_str(f"loss {self.step(*args, **kwargs):.3g}")
                bar.update()
                if checkpoint is not None and self.done % checkpoint_every == 0:
                    self.save(checkpoint)
        if checkpoint is not None:
            self.save(checkpoint)
        return self.history

    def save(self, path: str | Path) -> None:
        """Writes everything that the next update needs to one safetensors file, atomically."""
        if ranks.place()[0] > 0:
            return
        if self.pair is None:
            raise ValueError("there is nothing to save before the first update")
        tree = {
            "about": self._about(self.pair),
            "parameters": {n: p.detach() for n, p in self.pair.parameters().items()},
            "optim": self.optim.get_state(),
            "history": [self._plain(each) for each in self.history],
            "calls": vars(self.calls),
            "data_mark": self.data_mark,
            "rng": stream_states(self.pair.model.device),
        }
        save_tree(path, tree | self._extra(), self.kind)

    def load(self, path: str | Path, *args: Any, **kwargs: Any) -> None:
        """Reads what :meth:`save` wrote; the next updates may see other data.

        Args:
            args, kwargs: of the model, to run the guide once and find its parameters.

        Raises:
            ValueError: the file belongs to another model, guide or training.
        """
        self._read(path, args, kwargs, same_data=False)

    def _read(
        self, path: str | Path, args: tuple[Any, ...], kwargs: dict[str, Any], same_data: bool
    ) -> None:
        tree = load_tree(path, self.kind)
        pair = self._prepare(args, kwargs)
        _compare(path, tree["about"], self._about(pair))
        saved, here = tree.get("data_mark"), mark(self._learned_from(tree, args, kwargs).model)
        if same_data:
            check_data(saved, here)
        self.data_mark = saved if agrees(saved, here) else None
        for name, parameter in pair.parameters().items():
            parameter.data.copy_(tree["parameters"][name])
            self.optim.optim_objs.pop(parameter, None)
        self.optim.set_state({n: numbered(state) for n, state in tree["optim"].items()})
        self._restore_extra(tree)
        self.history = [self._record(each) for each in tree["history"]]
        self.calls = Calls(**tree["calls"])
        restore_streams(tree["rng"], pair.model.device)

    @abstractmethod
    def _plain(self, record: Record) -> Any:
        """A record as numbers, to be saved."""

    @abstractmethod
    def _record(self, saved: Any) -> Record:
        """A record as it was before it was saved."""

    def _about(self, pair: Pair) -> dict[str, Any]:
        """What must be the same for a run to be continued."""
        return {
            "sites": {n: list(p.event_shape) for n, p in pair.model.processes.items()},
            "latents": sorted(pair.model.latents),
            "num_steps": pair.num_steps,
            "parameters": shapes(pair.parameters()),
            "num_particles": self.num_particles,
        }

    def _extra(self) -> dict[str, Any]:
        """What else the next update needs."""
        return {}

    def _restore_extra(self, tree: dict[str, Any]) -> None:
        """Puts that back."""

    def _learned_from(
        self, tree: dict[str, Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Pair:
        """Model and guide at the data that the saved run learned from, if these arguments do."""
        return self._prepare(args, kwargs)

    # ------------------------------------------------------------------------------ taking it apart

    @abstractmethod
    def _prepare(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Pair:
        """Model and guide for these arguments."""

    def _begin(self, pair: Pair) -> None:
        """Once: refuses what cannot be learned; all processes start from the same values."""
        pair.refuse_trainable()
        parameters = pair.parameters()
        if not parameters:
            raise ValueError(
                "the guide has no trainable parameters: use a process with a module as its control "
                "(Controlled), or with a copy of the network (Finetuned)"
            )
        ranks.same_everywhere([*parameters.values(), *self._own_parameters()])

    def _notice(self, pair: Pair) -> None:
        """Remembers which data these are, or that they changed."""
        here = mark(pair.model)
        known = None if self.data_mark is None else agrees(self.data_mark, here)
        self.data_mark = here if known or not self.history else None


def refuse_sizes(**sizes: int | None) -> None:
    """Refuses settings that are no positive integers (None: not set)."""
    for name, value in sizes.items():
        check_whole(name, value, or_none="not set")


def shapes(parameters: Mapping[str, Tensor]) -> dict[str, list[int]]:
    """The shape of each, by name."""
    return {name: list(parameter.shape) for name, parameter in sorted(parameters.items())}


def numbered(state: dict[str, Any]) -> dict[str, Any]:
    """An optimiser's state as torch wants it: its parameters are numbers, not their digits."""
    return {**state, "state": {int(k): v for k, v in state["state"].items()}}


def _compare(path: str | Path, saved: dict[str, Any], current: dict[str, Any]) -> None:
    different = [name for name in current if saved.get(name) != current[name]]
    if different:
        found = ", ".join(f"{n}={saved.get(n)} (here {current[n]})" for n in different)
        raise ValueError(
            f"{path} belongs to another training: {found}; continue it with the model, guide and "
            "settings that it was started with"
        )
