"""Low-rank covariances against the matrices that they stand for."""

import pyro
import pyro.distributions as dist
import pytest
import torch

from smcdiff.inference import TwistedSMC
from smcdiff.inference.linear_gaussian import Covariance
from smcdiff.laws import FEW_COLUMNS, thin_product
from smcdiff.models import Diffusion, FromAlphas, MixtureDenoiser
from smcdiff.models.low_rank import low_rank_covariance

P, D = 4, 6
each_rank = pytest.mark.parametrize("rank", [None, 1, FEW_COLUMNS, FEW_COLUMNS + 1])


def covariance(rank):
    factor = None if rank is None else torch.randn(P, D, rank, dtype=torch.float64)
    return Covariance(torch.rand(P, D, dtype=torch.float64) + 0.1, factor)


def full(law):
    matrix = torch.diag_embed(law.diagonal)
    return matrix if law.factor is None else matrix + law.factor @ law.factor.mT


@each_rank
@pytest.mark.parametrize("batch", [1, P])
def test_products(rank, batch):
    law, rows = covariance(rank), torch.randn(batch, 3, D, dtype=torch.float64)
    torch.testing.assert_close(law.times(rows), (rows @ full(law)).expand(P, -1, -1))
    torch.testing.assert_close(law.between(rows), rows @ full(law) @ rows.mT)


@each_rank
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e8])
def test_what_a_measurement_leaves(rank, scale):
    law, precision = covariance(rank), scale * torch.rand(D, dtype=torch.float64)
    wanted = torch.linalg.inv(torch.linalg.inv(full(law)) + torch.diag(precision))
    found = full(law.given(precision))
    torch.testing.assert_close(found, wanted, rtol=1e-8, atol=1e-8 * float(wanted.abs().max()))


@pytest.mark.parametrize("rank", [0, 1, FEW_COLUMNS, FEW_COLUMNS + 1])
def test_thin_products(rank):
    left, right = torch.randn(P, 3, rank), torch.randn(P, D, rank)
    torch.testing.assert_close(thin_product(left, right), left @ right.mT)
    torch.testing.assert_close(thin_product(left, right[0]), left @ right[0].mT)


def test_covariances_of_mixtures_exist_in_single_precision():
    """Where all but two components are ruled out, their spread has one direction."""
    grid = torch.tensor([(8.0 * i, 8.0 * j) for i in range(-2, 3) for j in range(-2, 3)])
    for dim in (2, 80):
        denoiser = MixtureDenoiser(grid.repeat(1, dim // 2), 1.0, torch.rand(25))
        for alpha in torch.linspace(0.01, 0.99, 12).tolist():
            sigma = (1 - alpha**2) ** 0.5
            x = alpha * denoiser.sample(200) + sigma * torch.randn(200, dim)
            diagonal, factor = low_rank_covariance(denoiser, x, alpha, sigma)
            wanted = denoiser.covariance(x, alpha, sigma)
            found = torch.diag_embed(diagonal) + factor @ factor.mT
            assert found.dtype == torch.float32
            torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3 * float(wanted.max()))


def test_observations_may_repeat_each_other():
    """A A' is singular then; every particle still knows the evidence."""
    alphas = torch.tensor([0.9, 0.6, 0.2], dtype=torch.float64)
    levels = FromAlphas(alphas, time=alphas)  # unit Gaussian data: E[x_0 | x_t] = alpha_t x_t
    prior = Diffusion(lambda x, alpha: alpha[:, None] * x, levels, (2,), 3, parameterization="x0")

    def program(unit):
        total = unit * prior("x").sum(-1)
        twice = torch.stack([total, total], -1)
        pyro.sample("y", dist.Normal(twice, 0.5).to_event(1), obs=torch.tensor([1.0, 0.5]))

    for unit in (0.5, 0.6, 0.7, 1.0):
        method = TwistedSMC(
            program,
            covariance="jacobian",
            proposal="conjugate",
            damping=0.0,
            num_particles=1,
            num_runs=20,
        )
        found = method.run(unit).log_evidence
        assert float(found.std()) < 1e-6
