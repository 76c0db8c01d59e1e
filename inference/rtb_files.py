"""Checkpoints of a guide's training: one safetensors file, without pickled code."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from smcdiff.particles import Calls, load_tree, map_tree, save_tree

from . import ranks
from .streams import restore_streams, stream_states

if TYPE_CHECKING:
    from .pair import Pair
    from .rtb import RelativeTrajectoryBalance

FORMAT = "smcdiff-1 balance"


def write(rtb: "RelativeTrajectoryBalance", path: str | Path) -> None:
    """Everything that the next update needs."""
    if ranks.place()[0] > 0:
        return
    pair = rtb.pair
    if pair is None:
        raise ValueError("there is nothing to save before the first update")
    log_z = rtb.log_z
    tree = {
        "about": about(rtb, pair),
        "parameters": {n: p.detach() for n, p in pair.parameters().items()},
        "optim": rtb.optim.get_state(),
        "log_z": None if log_z is None else log_z.state_dict(),
        "evidence_optim": None if log_z is None else rtb.evidence_optim.state_dict(),
        "buffers": [buffer.as_tree() for buffer in rtb.buffers],
        "history": [vars(update) for update in rtb.history],
        "calls": vars(rtb.calls),
        "rng": stream_states(pair.model.device),
    }
    save_tree(path, tree, FORMAT)


def read(rtb: "RelativeTrajectoryBalance", path: str | Path, pair: "Pair") -> None:
    """Puts everything back.

    Raises:
        ValueError: the file belongs to another model, guide or training.
    """
    tree = load_tree(path, FORMAT)
    _compare(path, tree["about"], about(rtb, pair))
    parameters = pair.parameters()
    for name, parameter in parameters.items():
        parameter.data.copy_(tree["parameters"][name])
        rtb.optim.optim_objs.pop(parameter, None)
    rtb.optim.set_state({n: _numbered(state) for n, state in tree["optim"].items()})
    if rtb.log_z is not None:
        rtb.log_z.load_state_dict(tree["log_z"])
        rtb.evidence_optim.load_state_dict(_numbered(tree["evidence_optim"]))
    for buffer, content in zip(rtb.buffers, tree["buffers"], strict=True):
        buffer.from_tree(map_tree(lambda v: v.to(pair.model.device), content))
    rtb.restore(tree["history"], Calls(**tree["calls"]))
    restore_streams(tree["rng"], pair.model.device)


def about(rtb: "RelativeTrajectoryBalance", pair: "Pair") -> dict[str, Any]:
    """What must be the same for a run to be continued."""
    log_z = {} if rtb.log_z is None else dict(rtb.log_z.named_parameters())
    return {
        "sites": {n: list(p.event_shape) for n, p in pair.model.processes.items()},
        "latents": sorted(pair.model.latents),
        "num_steps": pair.num_steps,
        "parameters": {n: list(p.shape) for n, p in sorted(pair.parameters().items())},
        "log_z": {n: list(p.shape) for n, p in sorted(log_z.items())},
        "num_particles": rtb.num_particles,
        "behaviours": [type(behaviour).__name__ for behaviour in rtb.behaviours],
        "loss": repr(rtb.loss),
        "subsample": rtb.subsample,
    }


def _compare(path: str | Path, saved: dict[str, Any], current: dict[str, Any]) -> None:
    different = [name for name in current if saved.get(name) != current[name]]
    if different:
        found = ", ".join(f"{n}={saved.get(n)} (here {current[n]})" for n in different)
        raise ValueError(
            f"{path} belongs to another training: {found}; continue it with the model, guide and "
            "settings that it was started with"
        )


def _numbered(state: dict[str, Any]) -> dict[str, Any]:
    """An optimiser's state as torch wants it: its parameters are numbers, not their digits."""
    return {**state, "state": {int(k): v for k, v in state["state"].items()}}
