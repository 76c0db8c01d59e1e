r"""Exact denoisers: laws of data whose noised versions can be written down.

x_0 is data with shape (d,), seen through noise as

.. math:: x_t = \alpha x_0 + \sigma \varepsilon, \qquad \varepsilon \sim N(0, I).

A `Denoiser` knows the law of x_0 given x_t at any noise level (alpha, sigma), sigma = 0 (data) and
alpha = 0 (noise) included: a prior in its own right, and the oracle of the tests. States are flat,
with shape (*batch, d). Sums run in float64; means and covariances come back in the dtype of the
state, while log-densities and log-weights stay in float64, where they can be subtracted.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TypeAlias

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor, nn

from smcdiff.arguments import check_kind

from .gaussians import Level, condition, described, gaussians, matrices, refused

State: TypeAlias = Float[Tensor, "*batch d"]
Noise: TypeAlias = float | Float[Tensor, ""] | Float[Tensor, "d_y d_y"]


class Denoiser(nn.Module, ABC):
    r"""The law of x_0 given x_t. Its first two moments are tied:

    .. math:: \mathrm{Cov}[x_0 | x_t] =
              \frac{\sigma^2}{\alpha} \frac{\partial}{\partial x_t} E[x_0 | x_t].
    """

    @abstractmethod
    def mean(self, x: State, alpha: Level, sigma: Level) -> State:
        """E[x_0 | x_t = x]."""

    @abstractmethod
    def covariance(self, x: State, alpha: Level, sigma: Level) -> Float[Tensor, "*batch d d"]:
        """Cov[x_0 | x_t = x]."""

    @abstractmethod
    def log_density(self, x: State, alpha: Level, sigma: Level) -> Float64[Tensor, "*batch"]:
        """The log-density of x_t at x."""

    def log_prob(self, x: State) -> Float64[Tensor, "*batch"]:
        """The log-density of x_0 at x."""
        return self.log_density(x, 1.0, 0.0)

    def forward(self, x: State, alpha: Level, sigma: Level) -> State:
        return self.mean(x, alpha, sigma)


@dataclass(frozen=True, eq=False)
class Components:
    r"""The law of x_0 given x_t, itself a mixture of K Gaussians:

    .. math:: p(x_0 | x_t) = \sum_k r_k\, N(x_0; \mu_k, C_k), \qquad r_k = p(k | x_t).

    `log_weights` are the log r_k, `means` the mu_k. `covariances` do not depend on the state, and
    keep their form in the prior: shape (K,) if isotropic, (K, d) if diagonal, (K, d, d) otherwise.
    """

    log_weights: Float64[Tensor, "*batch K"]
    means: Float[Tensor, "*batch K d"]
    covariances: Float[Tensor, "K *form"]


class MixtureDenoiser(Denoiser):
    r"""Data from a mixture of K Gaussians.

    .. math:: p(x_0) = \sum_k w_k N(x_0; m_k, C_k), \qquad
              r_k \propto w_k N(x_t; \alpha m_k, \alpha^2 C_k + \sigma^2 I), \qquad
              E[x_0 | x_t] = \sum_k r_k (m_k + G_k (x_t - \alpha m_k)), \quad
              G_k = \alpha C_k (\alpha^2 C_k + \sigma^2 I)^{-1}.

    Args:
        means: The m_k, with shape (K, d).
        covariances: The C_k, positive definite: one number for all, a number each with shape (K,),
            a diagonal each with shape (K, d), or a matrix each with shape (K, d, d). A leading 1
            in place of K shares one between all, which is also faster.
        weights: The w_k up to a factor, with shape (K,); equal if left out.

    Matrices are diagonalised once. Device and dtype follow `.to(...)`.
    """

    log_weights: Tensor

    def __init__(
        self,
        means: Float[Tensor, "K d"],
        covariances: Float[Tensor, "*form"] | float,
        weights: Float[Tensor, " K"] | None = None,
    ) -> None:
        super().__init__()
        self.gaussians = gaussians(means, covariances)
        self.register_buffer("log_weights", _log_weights(weights, self.means))

    @property
    def means(self) -> Float[Tensor, "K d"]:
        return self.gaussians.means

    @property
    def covariances(self) -> Float[Tensor, "k *form"]:
        """The C_k in the form they were given: (k,), (k, d) or (k, d, d), k = 1 if shared."""
        return self.gaussians.covariances(0.0, 1.0).to(self.means)

    @property
    def weights(self) -> Float[Tensor, " K"]:
        return self.log_weights.exp()

    def mean(self, x: State, alpha: Level, sigma: Level) -> State:
        precise = self._precise(x)
        weights = self._log_joint(precise, alpha, sigma).softmax(-1)
        return self.gaussians.average(precise, weights, alpha, sigma).to(x.dtype)

    def covariance(self, x: State, alpha: Level, sigma: Level) -> Float[Tensor, "*batch d d"]:
        parts = self.components(self._precise(x), alpha, sigma)
        weights = parts.log_weights.exp()[..., None]
        offsets = (parts.means - (weights * parts.means).sum(-2, keepdim=True)).to(x.dtype)
        between = (weights.to(x.dtype) * offsets).mT @ offsets
        return between + self._within(weights[..., 0], alpha, sigma).to(x.dtype)

    def log_density(self, x: State, alpha: Level, sigma: Level) -> Float64[Tensor, "*batch"]:
        return self._log_joint(self._precise(x), alpha, sigma).logsumexp(-1)

    def responsibilities(self, x: State, alpha: Level, sigma: Level) -> Float64[Tensor, "*batch K"]:
        """The r_k: how probable each component is, given x_t = x."""
        return self._log_joint(self._precise(x), alpha, sigma).softmax(-1)

    def components(self, x: State, alpha: Level, sigma: Level) -> Components:
        """The exact law of x_0 given x_t = x."""
        precise = self._precise(x)
        log_weights = self._log_joint(precise, alpha, sigma).log_softmax(-1)
        means = self.gaussians.denoised(precise, alpha, sigma)
        covariances = self.gaussians.covariances(alpha, sigma)
        covariances = covariances.expand(len(self.means), *covariances.shape[1:])
        return Components(log_weights, means.to(x.dtype), covariances.to(x.dtype))

    def posterior(
        self, operator: Float[Tensor, "d_y d"], noise: Noise, y: Float[Tensor, " d_y"]
    ) -> tuple["MixtureDenoiser", Float64[Tensor, ""]]:
        r"""The law of x_0 given y = A x_0 + N(0, R), and the log-evidence log p(y).

        .. math:: p(x_0 | y) = \sum_k w'_k N(x_0; m'_k, C'_k), \qquad
                  w'_k \propto w_k N(y; A m_k, A C_k A^T + R).

        A is the operator; R, the noise, is a matrix with shape (d_y, d_y), or a variance.
        """
        variance = _noise_covariance(operator, noise, y)
        given = condition(self.gaussians, operator.double(), variance, y.double())
        log_joint = self.log_weights.double() + given.log_evidence
        posterior = MixtureDenoiser(given.means, given.covariances, log_joint.softmax(-1))
        return posterior.to(self.means.dtype), log_joint.logsumexp(-1)

    def sample(self, n: int) -> Float[Tensor, "n d"]:
        """Draws of x_0."""
        return self.gaussians.draw(torch.multinomial(self.weights, n, replacement=True))

    def _log_joint(self, x: State, alpha: Level, sigma: Level) -> Float64[Tensor, "*batch K"]:
        """The logs of w_k N(x; alpha m_k, alpha^2 C_k + sigma^2 I)."""
        return self.log_weights.double() + self.gaussians.log_normal(x, alpha, sigma)

    def _within(
        self, weights: Float64[Tensor, "*batch K"], alpha: Level, sigma: Level
    ) -> Float64[Tensor, "*some d d"]:
        """The average of Cov[x_0 | x_t, k]. If all share one, that one, without the batch."""
        covariances = self.gaussians.covariances(alpha, sigma)
        form, d = covariances.ndim - 1, self.means.shape[-1]
        if len(covariances) == 1:
            return matrices(covariances[0], form, d)
        return matrices(torch.tensordot(weights, covariances, 1), form, d)

    def _precise(self, x: State) -> State:
        if x.ndim == 0 or x.shape[-1] != self.means.shape[-1]:
            raise refused(
                f"x with shape (*batch, {self.means.shape[-1]})",
                f"shape {tuple(x.shape)}",
                "States are flat here: flatten the event into the last axis.",
            )
        return x.double()


class GaussianDenoiser(Denoiser):
    r"""Data from one Gaussian.

    .. math:: p(x_0) = N(x_0; m, C), \qquad
              E[x_0 | x_t] = m + \alpha C (\alpha^2 C + \sigma^2 I)^{-1} (x_t - \alpha m).

    Args:
        mean: m, with shape (d,).
        covariance: C, positive definite: a number, a diagonal with shape (d,), or a matrix with
            shape (d, d).
    """

    def __init__(
        self, mean: Float[Tensor, " d"], covariance: Float[Tensor, "*form"] | float
    ) -> None:
        super().__init__()
        check_kind("mean", mean, Tensor, "torch.zeros(2)")
        single = covariance[None] if isinstance(covariance, Tensor) else covariance
        self.mixture = MixtureDenoiser(mean[None], single)

    def mean(self, x: State, alpha: Level, sigma: Level) -> State:
        return self.mixture.mean(x, alpha, sigma)

    def covariance(self, x: State, alpha: Level, sigma: Level) -> Float[Tensor, "*batch d d"]:
        return self.mixture.covariance(x, alpha, sigma)

    def log_density(self, x: State, alpha: Level, sigma: Level) -> Float64[Tensor, "*batch"]:
        return self.mixture.log_density(x, alpha, sigma)

    def posterior(
        self, operator: Float[Tensor, "d_y d"], noise: Noise, y: Float[Tensor, " d_y"]
    ) -> tuple["GaussianDenoiser", Float64[Tensor, ""]]:
        """The law of x_0 given y = A x_0 + N(0, R), and log p(y), as in `MixtureDenoiser`."""
        mixture, log_evidence = self.mixture.posterior(operator, noise, y)
        posterior = GaussianDenoiser(mixture.means[0], 1.0)
        posterior.mixture = mixture
        return posterior, log_evidence

    def sample(self, n: int) -> Float[Tensor, "n d"]:
        """Draws of x_0."""
        return self.mixture.sample(n)


class EnumeratedDenoiser(nn.Module):
    r"""Data from a small table: L tokens, each in 0 .. V - 1, and V for "masked".

    .. math:: p(x_0^l = v | x_t) = \frac{\sum_{x \sim x_t} J(x) 1[x^l = v]}{\sum_{x \sim x_t} J(x)},

    where the sums run over the x that agree with the revealed tokens of x_t. A revealed token has
    probability 1. Where the revealed tokens are impossible together, masked ones are uniform.

    Args:
        joint: J up to a factor, with shape (V, ..., V): one axis per position.
    """

    table: Tensor  # log J, with a last entry on every axis for the sum over it

    def __init__(self, joint: Float[Tensor, "*tokens"]) -> None:
        super().__init__()
        check_kind("joint", joint, Tensor, "torch.ones(3, 3)")
        _check_joint(joint)
        table = (joint.detach() / joint.detach().sum()).log()
        for axis in range(joint.ndim):
            table = torch.cat([table, table.logsumexp(axis, keepdim=True)], axis)
        self.register_buffer("table", table)

    def log_prob(self, tokens: Int64[Tensor, "*batch L"]) -> Float[Tensor, "*batch"]:
        """The log-probability of the revealed tokens."""
        self._check(tokens)
        logs: Tensor = self.table[tokens.unbind(-1)]
        return logs

    def forward(self, tokens: Int64[Tensor, "*batch L"]) -> Float[Tensor, "*batch L V"]:
        """The log-probabilities of every token at every position."""
        possible = self.log_prob(tokens)[..., None, None] > -torch.inf
        values = torch.arange(len(self.table) - 1, device=tokens.device)
        here = torch.eye(tokens.shape[-1], dtype=torch.bool, device=tokens.device)[:, None]
        filled = torch.where(here, values[:, None], tokens[..., None, None, :])
        logits = torch.where(possible, self.table[filled.unbind(-1)], 0.0)
        shown = tokens[..., None]
        allowed = (shown == len(values)) | (shown == values)
        return logits.masked_fill(~allowed, -torch.inf).log_softmax(-1)

    def _check(self, tokens: Int64[Tensor, "*batch L"]) -> None:
        length, mask = self.table.ndim, len(self.table) - 1
        shaped = tokens.ndim > 0 and tokens.shape[-1] == length
        if not (shaped and bool(((tokens >= 0) & (tokens <= mask)).all())):
            raise refused(
                f"tokens with shape (*batch, {length}), each in 0..{mask}",
                described(tokens),
                f"Write masked positions as {mask}.",
            )


def _log_weights(
    weights: Float[Tensor, " K"] | None, means: Float[Tensor, "K d"]
) -> Float[Tensor, " K"]:
    check_kind("weights", weights, Tensor, "torch.ones(3)", optional=True)
    table = means.new_ones(len(means)) if weights is None else weights.detach()
    fine = table.shape == means.shape[:1] and bool((table >= 0).all())
    if not (fine and bool(table.isfinite().all()) and bool(table.sum() > 0)):
        raise refused(
            f"weights with shape ({len(means)},), finite, not negative and not all zero",
            described(table),
            "Give one weight per mean (not its logarithm), or leave them out for equal ones.",
        )
    return (table.double() / table.double().sum()).log().to(means)


def _noise_covariance(
    operator: Float[Tensor, "d_y d"], noise: Noise, y: Float[Tensor, " d_y"]
) -> Float64[Tensor, "d_y d_y"]:
    table = torch.as_tensor(noise, dtype=torch.float64, device=y.device)
    matrix = table * torch.eye(len(y)).to(table) if table.ndim == 0 else table
    fits = operator.shape[:1] == y.shape and matrix.shape == (len(y), len(y))
    if not (fits and int(torch.linalg.cholesky_ex(matrix).info) == 0):
        raise refused(
            "an operator (d_y, d), y with shape (d_y,) and a positive definite noise covariance",
            f"operator {tuple(operator.shape)}, y {tuple(y.shape)}, noise {described(table)}",
            "noise is a variance above 0, or a covariance with shape (d_y, d_y).",
        )
    return matrix


def _check_joint(joint: Float[Tensor, "*tokens"]) -> None:
    cube = joint.ndim > 0 and joint.numel() > 0 and len(set(joint.shape)) == 1
    positive = bool((joint >= 0).all() & joint.isfinite().all())
    if not (cube and positive and bool(joint.sum() > 0)):
        raise refused(
            "joint probabilities with shape (V, ..., V), finite, not negative and not all zero",
            described(joint),
            "Give one axis per position, each as long as the vocabulary without the mask.",
        )
