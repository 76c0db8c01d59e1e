"""The chain of ``benchmarks/chain.py`` filtered by `particles` (Chopin), in its own environment.

    PATH/TO/python benchmarks/peers/particles_chain.py TABLES.npz

Reads lines with a number of particles and a seed, and answers each with log Z and CPU seconds.
"""

import sys
import time

import numpy as np
import particles


class Chain(particles.FeynmanKac):
    """Moves k x + c + sqrt(v) z, weights psi_T and psi_{t-1} / psi_t."""

    def __init__(self, tables):
        self.k, self.c, self.scale = tables["k"], tables["c"], np.sqrt(tables["v"])
        self.h, self.e, self.s = tables["h"], tables["e"], tables["s"]
        self.y = tables["y"]
        super().__init__(len(self.k))

    def log_psi(self, t, x):
        miss = self.y - x @ self.h[t] - self.e[t]
        return -0.5 * (miss**2 / self.s[t] + np.log(2 * np.pi * self.s[t]))

    def M0(self, N):
        return np.random.standard_normal((N, self.k.shape[1]))

    def M(self, n, xp):
        t = self.T - n
        return self.k[t] * xp + self.c[t] + self.scale[t] * np.random.standard_normal(xp.shape)

    def logG(self, n, xp, x):
        t = self.T - 1 - n
        log_psi = self.log_psi(t, x)
        return log_psi if n == 0 else log_psi - self.log_psi(t + 1, xp)


def main():
    chain = Chain(np.load(sys.argv[1]))
    for line in sys.stdin:
        number, seed = map(int, line.split())
        np.random.seed(seed)
        start = time.process_time()
        run = particles.SMC(fk=chain, N=number, resampling="systematic", ESSrmin=0.5)
        run.run()
        print(run.logLt, time.process_time() - start, flush=True)


if __name__ == "__main__":
    main()
