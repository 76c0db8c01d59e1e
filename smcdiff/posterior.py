"""Placeholder while the result class is written."""


class Posterior:
    def __init__(self, particles, program, method):
        self.particles, self.program, self.method = particles, program, method
