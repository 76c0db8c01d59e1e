"""Posteriors over diffusion and flow priors: declared in Pyro, inferred and checked by weights."""

__version__ = "0.1.0"
