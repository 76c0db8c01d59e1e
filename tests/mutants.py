"""Breaks the engine on purpose, one term at a time, and demands that a named test notices.

    python tests/mutants.py            all of them, as a table
    python tests/mutants.py gather     those with "gather" in their name

Every mutant is one replacement in a copy of the packages; the checkout is left alone. The last
column is the test that failed. A mutant that survives is a term of the weights that nothing checks.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COPIED = ("smcdiff", "models", "inference", "tests", "pyproject.toml")

CHAIN = "test_linear_gaussian.py::test_one_particle_knows_the_evidence[jacobian]"
WEIGHT = "test_latents.py::test_weight_is_the_evidence_given_the_latent"
GATHER = "test_latents.py::test_resampling_moves_everything_that_belongs_to_a_particle[systematic]"
ROOTS = "test_latents.py::test_genealogy_is_that_of_the_resampling_steps"
PROPOSED = "test_latents.py::test_proposed_latent_pays_for_its_proposal"
WALK = "test_latents.py::test_rejuvenation_leaves_the_target_invariant[random_walk]"
MALA = "test_latents.py::test_rejuvenation_leaves_the_target_invariant[mala]"
PREPAID = "test_masked.py::test_fully_adapted_weights_are_functions_of_the_parent[0.5]"
RESAMPLED = "test_masked.py::test_resampling_happens_on_what_is_prepaid[1.0]"
GUIDE = "test_mixtures.py::test_one_particle_knows_the_evidence[no twist]"
OWED = "test_smoothing.py::test_all_is_paid_in_the_end"
BRIDGE = "test_bridges.py::test_the_posterior_is_where_the_gradient_vanishes"
FENCE = "test_unbiased.py::test_hard_constraint[0]"


@dataclass(frozen=True)
class Mutant:
    """One replacement and the tests that must notice it.

    Attributes:
        before: text that occurs exactly once in the file.
        after: what takes its place.
        tests: nodes below tests/referee.
    """

    name: str
    file: str
    before: str
    after: str
    tests: tuple[str, ...]


def engine(name: str, before: str, after: str, *tests: str) -> Mutant:
    return Mutant(name, "inference/engine.py", before, after, tests)


def gather(name: str, before: str, after: str, *tests: str) -> Mutant:
    return Mutant(f"gather of {name}", "smcdiff/particles.py", before, after, tests)


def moves(name: str, before: str, after: str, *tests: str) -> Mutant:
    return Mutant(f"rejuvenation: {name}", "inference/rejuvenation.py", before, after, tests)


INCREMENT = 'increment = after["log_psi"] - cache["log_psi"]'
RETURN = 'increment = self.settings.exponent * increment - cache.get("prepaid", 0.0)'

MUTANTS = (
    # the weights
    engine(
        "kernel / proposal",
        "increment = increment + move.log_ratio",
        "increment = increment + 0.0 * move.log_ratio",
        CHAIN,
    ),
    engine("log psi_{t-1}", INCREMENT, INCREMENT.replace('after["log_psi"]', "0.0"), CHAIN),
    engine("log psi_t", INCREMENT, INCREMENT.replace(' - cache["log_psi"]', ""), CHAIN),
    engine(
        "the last weight",
        "log_weights = state.log_weights + due.reshape(self.axes)",
        "log_weights = state.log_weights + (t > 1) * due.reshape(self.axes)",
        GUIDE,
    ),
    engine(
        "x_T: p / q",
        "weights = weights + move.log_ratio",
        "weights = weights + 0.0 * move.log_ratio",
        CHAIN,
    ),
    engine(
        "latents: -log q",
        'weights = cache["log_psi"] - log_q',
        'weights = cache["log_psi"]',
        PROPOSED,
    ),
    engine(
        "latents: -log q of those drawn by the program",
        "log_q = log_q + execution.log_prob(name)",
        "log_q = log_q + 0.0 * execution.log_prob(name)",
        WEIGHT,
    ),
    Mutant(
        "latents: log p",
        "inference/evaluation.py",
        "return log_psi.double() + view.execution.log_joint(upstream)[: view.batch]",
        "return log_psi.double()",
        (WEIGHT,),
    ),
    Mutant(
        "a guide's p / q",
        "inference/guided.py",
        "return Move(x, torch.stack(ratios).sum(0))",
        "return Move(x, 0.0 * torch.stack(ratios).sum(0))",
        (GUIDE,),
    ),
    Mutant(
        "bridges: the prior keeps its variance",
        "inference/differences.py",
        "_of_normals(one, other, mean, 1.0)",
        "_of_normals(one, other, mean)",
        (BRIDGE,),
    ),
    Mutant(
        "bridges: they start at x_0",
        "inference/bridges.py",
        "x_0.expand(number, *x_0.shape), t, since=0)",
        "x_0.expand(number, *x_0.shape), t)",
        (BRIDGE,),
    ),
    Mutant(
        "conjugate proposal: determinant",
        "inference/linear_gaussian.py",
        "return plain + 0.5 * white.square().sum((-2, -1)) - log_det",
        "return plain + 0.5 * white.square().sum((-2, -1))",
        (CHAIN,),
    ),
    Mutant(
        "hard constraints count before t = 0",
        "smcdiff/twist.py",
        "self.execution.log_joint(names, VIOLATED)",
        "self.execution.log_joint(names)",
        (FENCE,),
    ),
    engine(
        "smoothing: what is owed is forgotten",
        'total = increment + cache.get("owed", 0.0)',
        "total = increment",
        OWED,
    ),
    engine(
        "smoothing: the rest is never paid",
        "share = self.settings.smoothing if t > 1 else 0.0",
        "share = self.settings.smoothing",
        OWED,
    ),
    # resampling
    gather("x", "x=map_tree(gather, self.x),", "x=self.x,", GATHER),
    gather("latents", "latents=map_tree(gather, self.latents),", "latents=self.latents,", GATHER),
    gather("cache", "cache=map_tree(gather, self.cache),", "cache=self.cache,", GATHER),
    gather("roots", "roots=gather(self.roots),", "roots=self.roots,", ROOTS),
    gather(
        "log_norm",
        "log_norm=torch.where(where, self.log_evidence, self.log_norm),",
        "log_norm=self.log_norm,",
        GATHER,
    ),
    gather(
        "weights: they stay unequal",
        "log_weights=torch.where(where[..., None], zeros, self.log_weights),",
        "log_weights=self.log_weights,",
        GATHER,
    ),
    engine(
        "kernels of before resampling",
        "x, cache = self._flatten(state.x), self._flatten(state.cache)\n"
        "            kernels = self.evaluator.kernels(t, x, cache)",
        "x, cache = self._flatten(state.x), self._flatten(state.cache)",
        GATHER,
    ),
    # rejuvenation
    moves(
        "acceptance",
        "accept = torch.rand_like(log_accept).log() < log_accept",
        "accept = torch.rand_like(log_accept).log() < 0.0",
        WALK,
    ),
    moves(
        "log psi of the new latents",
        'for name in ("log_psi", "memory", "proposal"):',
        'for name in ("memory", "proposal"):',
        WALK,
    ),
    moves(
        "what the proposal has seen of the new latents",
        'for name in ("log_psi", "memory", "proposal"):',
        'for name in ("log_psi", "memory"):',
        "test_masked_proposals.py::"
        "test_candidates_are_looked_at_with_the_latents_as_they_have_been_moved",
    ),
    moves(
        "the twist's tensors of the new latents",
        'taken["twist"] = {**cache["twist"], **choose(accept, looked["twist"], cache["twist"])}',
        'taken["twist"] = cache["twist"]',
        WALK,
    ),
    moves(
        "the map's Jacobian",
        "n: self._transforms[n].log_abs_det_jacobian(u, self._transforms[n](u))",
        "n: torch.zeros_like(u)",
        WALK,
    ),
    moves(
        "proposal ratio of Langevin moves",
        "return moved, 0.5 * _total(squares)",
        "return moved, 0.0 * _total(squares)",
        MALA,
    ),
    # paying before the draw
    engine(
        "prepaid: payment",
        'paid = state.log_weights + cache["prepaid"].reshape(self.axes)',
        "paid = state.log_weights",
        PREPAID,
    ),
    engine("prepaid: return", RETURN, RETURN.replace(' - cache.get("prepaid", 0.0)', ""), PREPAID),
    engine(
        "prepaid: gather",
        "state = replace(state, log_weights=paid, cache=self._unflatten(cache))",
        "state = replace(state, log_weights=paid)",
        RESAMPLED,
    ),
)


def occurrences(mutant: Mutant) -> int:
    """How often the text to replace occurs: once, or the mutant has rotted."""
    return (ROOT / mutant.file).read_text().count(mutant.before)


# --------------------------------------------------------------------------------- running them


@dataclass(frozen=True)
class Verdict:
    """What became of a mutant."""

    name: str
    killers: list[str]
    seconds: float
    log: str


def copy_to(folder: Path) -> None:
    """The packages (with their links) and the tests."""
    ignored = shutil.ignore_patterns("__pycache__", ".*")
    for part in COPIED:
        source = ROOT / part
        if source.is_dir():
            shutil.copytree(source, folder / part, symlinks=True, ignore=ignored)
        else:
            shutil.copy(source, folder / part)


def run_tests(folder: Path, tests: tuple[str, ...]) -> tuple[int, str]:
    """pytest's exit status and output, on the copy in the folder."""
    command = [sys.executable, "-m", "pytest", "-q", "-rf", "--tb=no", "-p", "no:cacheprovider"]
    nodes = [f"tests/referee/{test}" for test in tests]
    environment = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, *nodes], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    return done.returncode, done.stdout + done.stderr


def judge(mutant: Mutant) -> Verdict:
    """Applies a mutant to a fresh copy and runs its tests."""
    start = time.time()
    with tempfile.TemporaryDirectory(prefix="mutant-") as name:
        folder = Path(name)
        copy_to(folder)
        path = folder / mutant.file
        text = path.read_text()
        assert text.count(mutant.before) == 1, f"{mutant.name}: its text is no longer there"
        path.write_text(text.replace(mutant.before, mutant.after))
        _, log = run_tests(folder, mutant.tests)
    killers = re.findall(r"^FAILED \S*/(\S+\.py::.+?)(?: - .*)?$", log, re.MULTILINE)
    return Verdict(mutant.name, killers, time.time() - start, log)


def main() -> int:
    chosen = [m for m in MUTANTS if not sys.argv[1:] or any(a in m.name for a in sys.argv[1:])]
    with tempfile.TemporaryDirectory(prefix="original-") as name:
        copy_to(Path(name))
        status, log = run_tests(Path(name), tuple(sorted({t for m in chosen for t in m.tests})))
    if status != 0:
        print(log)
        print("the tests fail without any mutant, so they cannot judge one")
        return 1
    survivors = 0
    print(f"{'mutant':48} {'':>5}  killed by")
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for verdict in pool.map(judge, chosen):
            killed = ", ".join(verdict.killers) or f"NOTHING: it survives\n{verdict.log[-600:]}"
            survivors += not verdict.killers
            print(f"{verdict.name:48} {verdict.seconds:4.0f}s  {killed}", flush=True)
    print(f"{len(chosen) - survivors} of {len(chosen)} mutants were noticed")
    return int(survivors > 0)


if __name__ == "__main__":
    sys.exit(main())
