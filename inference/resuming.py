"""Whether a saved run can be continued: the same program, settings and data."""

import torch
from jaxtyping import Float64
from torch import Tensor

from smcdiff.particles import Particles
from smcdiff.program import Program

from .guided import at_start
from .streams import stream_untouched


@torch.no_grad()
def mark(program: Program) -> Float64[Tensor, " problem"]:
    """The program's log-density at one point per problem, the same ones in every run."""
    number = program.num_problems
    rows = None if number is None else torch.arange(number, device=program.device)
    with stream_untouched():
        torch.manual_seed(0)
        return program.execute(at_start, {}, number or 1, rows).log_joint()


def check_resumable(state: Particles, program: Program, axes: tuple[int, ...]) -> None:
    """Refuses a saved run of other sizes, processes, steps or data.

    Args:
        axes: the sizes of ``(problem) run particle`` that are asked for.

    Raises:
        ValueError: saying what differs.
    """
    shapes = {n: tuple(x.shape[len(axes) :]) for n, x in state.x.items()}
    if state.axes != axes or set(state.x) != set(program.processes):
        raise ValueError(
            f"the saved run has axes {state.axes} and processes {shapes}, but this one has "
            f"axes {axes} and processes {sorted(program.processes)}: resume with the "
            "program and settings that it was started with"
        )
    started = state.history[0].t if state.history else state.t
    if started != program.num_steps:
        raise ValueError(
            f"the saved run has {started} steps, but this program {program.num_steps}: "
            "resume with the processes that it was started with"
        )
    check_data(state.mark, mark(program))


def agrees(saved: Tensor | None, here: Tensor) -> bool:
    """Whether two marks are of the same data (None: not known of which)."""
    if saved is None:
        return True
    return saved.shape == here.shape and torch.allclose(saved.to(here), here, 1e-4, equal_nan=True)


def check_data(saved: Tensor | None, here: Tensor) -> None:
    """Refuses a saved run whose mark is another than that of the program and data here.

    Raises:
        ValueError: saying so.
    """
    if saved is None or agrees(saved, here):
        return
    raise ValueError(
        "the saved run belongs to other data, or to another program: at one and the same "
        f"point its log-density is {_first(saved)}, and here {_first(here)}. Resume "
        "with the arguments that it was started with, or start again without resume"
    )


def _first(values: Tensor) -> str:
    """A few of them."""
    more = ", ..." if len(values) > 3 else ""
    return f"[{', '.join(f'{v:.6g}' for v in values[:3].tolist())}{more}]"
