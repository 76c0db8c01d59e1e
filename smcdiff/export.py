"""Posteriors as ArviZ containers: the only file that knows ArviZ and its versions.

============== ====================================================================================
group          contents
============== ====================================================================================
posterior      equally weighted draws of every site, with dims ``chain draw``: a chain is a run,
               resampled by its own weights and shuffled. Draws repeat particles: ``az.ess`` of
               them is *not* the precision of the answer. The effective sample size of the weights
               is in the attributes.
weighted       the particles themselves, with dims ``chain particle``, and their unnormalised
_posterior     ``log_weights``, which hold within a chain and between chains (they average to the
               chain's evidence)
smc            what each step was like (:class:`smcdiff.Step`), with dims
               ``chain step [particle]``; the coordinate ``step`` is t
observed_data  the values of the program's observed sites
============== ====================================================================================

Where data are declared per problem, ``problem`` is one more dimension of every variable, behind the
two that ArviZ wants in front: one container for all, in which no statistic of ArviZ mixes problems.

ArviZ 0.23 gets an ``InferenceData``, ArviZ 1.x an ``xarray.DataTree``; both read and write netCDF.
The datasets are built here and handed over whole, because ``az.from_dict`` takes different things
in the two.
"""

from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .posterior import Posterior

NOTE = (
    "Draws are particles resampled to equal weights, some of them several times: az.ess and "
    "az.mcse of this group do not measure precision. See weight_ess, the group weighted_posterior, "
    "and smcdiff's Posterior.expectation(...).standard_error."
)
PER_RUN = (
    "ess",
    "khat",
    "max_weight",
    "resampled",
    "num_roots",
    "effective_roots",
    "log_evidence",
    "acceptance",
)
PER_PARTICLE = ("ancestors", "log_weights")


def to_arviz(posterior: "Posterior") -> Any:
    """The posterior as an ``InferenceData`` (ArviZ 0.23) or ``xarray.DataTree`` (1.x).

    Draws come from torch's random stream.
    """
    groups = {
        "posterior": _draws(posterior),
        "weighted_posterior": _particles(posterior),
        "smc": _steps(posterior),
        "observed_data": _observed(posterior),
    }
    return container({name: dataset for name, dataset in groups.items() if dataset.data_vars})


def container(groups: dict[str, Any]) -> Any:
    """Datasets by group, as the installed ArviZ wants them."""
    if int(version("arviz").split(".")[0]) >= 1:
        import xarray

        return xarray.DataTree.from_dict(groups)
    try:
        from arviz import InferenceData
    except OSError as error:
        raise OSError(
            "ArviZ 0.23 cannot write its cache: set the environment variable XDG_CACHE_HOME to a "
            "folder that can be written"
        ) from error
    return InferenceData(warn_on_custom_groups=False, **groups)


# ----------------------------------------------------------------------------------- the groups


def _draws(posterior: "Posterior") -> Any:
    lead = (*_problem(posterior), "chain", "draw")
    variables = {site: _variable(x, lead, site) for site, x in posterior.resample().items()}
    facts: dict[str, Any] = {"note": NOTE}
    if posterior.particles.weighted:
        facts["weight_ess"] = posterior.particles.ess.flatten().tolist()
        facts["log_evidence"] = posterior.log_evidence.flatten().tolist()
    return _dataset(variables, posterior, facts).transpose("chain", "draw", ...)


def _particles(posterior: "Posterior") -> Any:
    lead = (*_problem(posterior), "chain", "particle")
    if not posterior.particles.weighted:
        return _dataset({}, posterior)
    variables = {site: _variable(x, lead, site) for site, x in posterior.samples.items()}
    if "log_weights" in variables:
        raise ValueError("the export calls the weights 'log_weights': give the site another name")
    total = posterior.log_weights + posterior.particles.log_norm[..., None]
    variables["log_weights"] = _variable(total, lead)
    return _dataset(variables, posterior).transpose("chain", "particle", ...)


def _steps(posterior: "Posterior") -> Any:
    history = posterior.history
    if not history:
        return _dataset({}, posterior)
    runs = (*_problem(posterior), "chain")
    variables = {}
    for name in (*PER_RUN, *PER_PARTICLE):
        values = torch.stack([getattr(step, name) for step in history], len(runs))
        dims = (*runs, "step", *(("particle",) if name in PER_PARTICLE else ()))
        variables[name] = _variable(values, dims)
    for kind in ("network", "gradient", "program"):
        calls = torch.tensor([getattr(step.calls, kind) for step in history])
        variables[f"{kind}_calls"] = _variable(calls, ("step",))
    dataset = _dataset(variables, posterior, {"step": "the coordinate is t, the steps that remain"})
    times = [step.t for step in history]
    return dataset.assign_coords(step=times).transpose("chain", "step", "particle", ...)


def _observed(posterior: "Posterior") -> Any:
    lead = _problem(posterior)
    variables = {site: _variable(y, lead, site) for site, y in posterior.observed.items()}
    return _dataset(variables, posterior)


def _problem(posterior: "Posterior") -> tuple[str, ...]:
    return ("problem",) if len(posterior.particles.axes) == 3 else ()


def _variable(values: Tensor, lead: tuple[str, ...], site: str = "") -> tuple[tuple[str, ...], Any]:
    """Dimension names and a NumPy array; what is left of the dimensions is named after the site."""
    own = tuple(f"{site}_dim_{i}" for i in range(values.dim() - len(lead)))
    if values.dtype in (torch.bfloat16, torch.float16):  # not in NumPy, not in netCDF
        values = values.float()
    return (*lead, *own), values.detach().cpu().numpy()


def _dataset(variables: dict[str, Any], posterior: "Posterior", facts: Any = None) -> Any:
    """A dataset that numbers its dimensions and says where it comes from."""
    import xarray

    from . import __version__

    dataset = xarray.Dataset(variables)
    counts = {dim: range(size) for dim, size in dataset.sizes.items()}
    facts = {"method": posterior.method, **(facts or {})}
    library = {"inference_library": "smcdiff", "inference_library_version": __version__}
    return dataset.assign_coords({dim: list(r) for dim, r in counts.items()}).assign_attrs(
        facts | library
    )
