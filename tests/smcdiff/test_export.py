"""ArviZ containers of both generations: groups, values, and a round trip through a file."""

from importlib.metadata import version

import pytest
import torch

from smcdiff import export

from . import examples as ex

CURRENT = int(version("arviz").split(".")[0]) >= 1


@pytest.fixture(autouse=True)
def quiet() -> None:
    """ArviZ 0.23 announces its successor once a day, when it is imported first."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        import arviz  # noqa: F401


def group(container, name):
    return container[name].dataset if CURRENT else container[name]


def group_names(container) -> set[str]:
    return set(container.children) if CURRENT else set(container.groups())


def values(dataset, name) -> torch.Tensor:
    return torch.as_tensor(dataset[name].values)


def test_container_of_this_version():
    import xarray

    container = ex.by_hand().to_arviz()
    if CURRENT:
        assert isinstance(container, xarray.DataTree)
    else:
        import arviz

        assert isinstance(container, arviz.InferenceData)


def test_groups_and_dimensions():
    posterior = ex.bootstrap(model=ex.noisy)
    container = posterior.to_arviz()
    assert group_names(container) == {"posterior", "weighted_posterior", "smc", "observed_data"}
    draws = group(container, "posterior")
    assert draws["x"].dims == ("chain", "draw", "x_dim_0")
    assert draws["noise"].dims == ("chain", "draw")
    assert draws["x"].shape == (4, 64, 3)
    weighted = group(container, "weighted_posterior")
    assert weighted["log_weights"].dims == ("chain", "particle")
    smc = group(container, "smc")
    assert smc["ess"].dims == ("chain", "step")
    assert smc["ancestors"].dims == ("chain", "step", "particle")
    assert smc["network_calls"].dims == ("step",)
    assert smc["step"].values.tolist() == list(range(8, -1, -1))
    assert values(group(container, "observed_data"), "y").tolist() == ex.Y.tolist()


def test_draws_are_particles_of_their_run():
    posterior = ex.by_hand()
    draws = values(group(posterior.to_arviz(), "posterior"), "x")[..., 0]
    for run in (0, 1):
        alive = posterior.samples["x"][run, posterior.weights[run] > 0, 0]
        assert set(draws[run].tolist()) <= set(alive.tolist())


def test_draws_are_in_random_order():
    """Neighbours are no likelier to be copies than any two draws of a run."""
    posterior = ex.bootstrap(num_particles=400, num_runs=20)
    x = values(group(posterior.to_arviz(), "posterior"), "x")[..., 0]
    x = x - x.mean(1, keepdim=True)
    correlation = (x[:, 1:] * x[:, :-1]).mean(1) / x.square().mean(1)
    error = correlation.std() / 20**0.5
    assert abs(correlation.mean() + 1 / 400) < 4.3 * error


def test_weights_hold_within_and_between_chains():
    posterior = ex.by_hand()
    log_weights = values(group(posterior.to_arviz(), "weighted_posterior"), "log_weights")
    weights = log_weights.flatten().softmax(0).reshape(2, 3)
    torch.testing.assert_close(weights, posterior.weights)
    evidence = (log_weights.logsumexp(-1) - torch.tensor(3.0).double().log()).exp()
    torch.testing.assert_close(evidence, posterior.log_evidence.exp())


def test_effective_sample_sizes_of_draws_come_with_a_warning():
    posterior = ex.bootstrap()
    attributes = group(posterior.to_arviz(), "posterior").attrs
    assert attributes["weight_ess"] == posterior.particles.ess.tolist()
    assert attributes["log_evidence"] == posterior.log_evidence.tolist()
    assert "az.ess" in attributes["note"]
    assert "not" in attributes["note"]


def test_steps_are_those_of_the_history():
    posterior = ex.bootstrap(ess_threshold=1.0, model=ex.noisy)
    smc = group(posterior.to_arviz(), "smc")
    for name in (*export.PER_RUN, *export.PER_PARTICLE):
        wanted = torch.stack([getattr(s, name) for s in posterior.history], 1)
        torch.testing.assert_close(values(smc, name), wanted, equal_nan=True, rtol=0, atol=0)
    assert int(smc["network_calls"].sum()) == posterior.num_network_calls


def test_files_hold_everything(tmp_path):
    import arviz

    container = ex.bootstrap(model=ex.noisy).to_arviz()
    container.to_netcdf(str(tmp_path / "run.nc"), engine="h5netcdf")
    again = arviz.from_netcdf(str(tmp_path / "run.nc"), engine="h5netcdf")
    assert group_names(again) == group_names(container)
    for name in group_names(container):
        one, two = group(container, name), group(again, name)
        assert one.equals(two)
        assert one.attrs.keys() == two.attrs.keys()
        assert all(one[v].dtype == two[v].dtype for v in one.data_vars)


def test_arviz_reads_the_container():
    import arviz

    table = arviz.summary(ex.infer(num_particles=200).to_arviz(), round_to="none")
    mean, _, _ = ex.exact_posterior()
    found = torch.tensor(table["mean"].astype(float).tolist())
    assert bool(((found - mean).abs() < 0.25).all())


def test_problems_are_one_more_dimension():
    posterior = ex.for_problems()
    container = posterior.to_arviz()
    draws = group(container, "posterior")["x"]
    assert draws.dims == ("chain", "draw", "problem", "x_dim_0")
    assert draws.shape == (2, 32, 3, 3)
    assert group(container, "smc")["ess"].dims == ("chain", "step", "problem")
    assert group(container, "observed_data")["y"].dims == ("problem", "y_dim_0")
    log_weights = values(group(container, "weighted_posterior"), "log_weights")
    torch.testing.assert_close(log_weights.permute(2, 0, 1), posterior.log_weights)


def test_methods_without_weights_export_no_weights():
    container = ex.by_hand(weighted=False).to_arviz()
    assert group_names(container) == {"posterior", "smc"}
    assert "log_evidence" not in group(container, "posterior").attrs


def test_a_site_may_not_take_the_name_of_the_weights():
    posterior = ex.by_hand()
    posterior.particles.latents["log_weights"] = posterior.particles.latents["k"]
    with pytest.raises(ValueError, match="give the site another name"):
        posterior.to_arviz()


def test_half_precision_is_widened():
    posterior = ex.by_hand()
    posterior.particles.x["x"] = posterior.particles.x["x"].bfloat16()
    draws = group(posterior.to_arviz(), "posterior")
    assert str(draws["x"].dtype) == "float32"


@pytest.mark.skipif(CURRENT, reason="only ArviZ 0.23 writes a stamp when it is imported")
def test_a_home_that_cannot_be_written_is_named(monkeypatch):
    import builtins

    original = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name == "arviz":
            raise FileNotFoundError("no cache")
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(OSError, match="XDG_CACHE_HOME"):
        export.container({})
