"""Imports point one way: torch, pyro <- smcdiff <- models, and smcdiff <- inference.

Siblings import relatively, other folders absolutely, heavy packages when they are needed.
"""

import ast
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("smcdiff", "models", "inference")
FILES = [file for folder in FOLDERS for file in sorted((ROOT / folder).rglob("*.py"))]
# The command line may import everything.
APPLICATION = {f"smcdiff/{name}.py" for name in ("__main__", "demo", "restoration")}


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imports(source: str) -> Iterator[tuple[int, str]]:
    """The level (0: absolute) and the dotted name of all imports, also those inside functions."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((0, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            prefix = f"{node.module}." if node.module else ""
            yield from ((node.level, prefix + alias.name) for alias in node.names)


def packages(source: str) -> set[str]:
    """The names of the top-level packages that are imported."""
    return {name.split(".")[0] for level, name in imports(source) if level == 0}


def violations(file: str, source: str) -> list[str]:
    """What a file (such as "models/flow.py") must not import, with the reason."""
    folder, *inside = file.split("/")
    allowed = set(FOLDERS) if file in APPLICATION else {folder, "smcdiff"}
    found = []
    for level, target in imports(source):
        first, second, *_ = [*target.split("."), ""]
        owner = second if first == "smcdiff" and second in FOLDERS else first
        if level > len(inside) or (level > 0 and first in FOLDERS):
            found.append(f"{target} is in another folder: import it absolutely")
        elif level == 0 and first in ("models", "inference"):
            found.append(f"{target} is smcdiff.{target}")
        elif level == 0 and owner == folder:
            found.append(f"{target} is a sibling: import it relatively")
        elif level == 0 and owner in FOLDERS and owner not in allowed:
            found.append(f"{target}: {folder} must not import {owner}")
    return found


@pytest.mark.parametrize("path", FILES, ids=name)
def test_imports_point_one_way(path):
    found = violations(name(path), path.read_text())
    assert not found


@pytest.mark.parametrize(
    ("file", "source", "is_wrong"),
    [
        ("models/flow.py", "from smcdiff.process import Process", False),
        ("models/flow.py", "from .schedules import Linear", False),
        ("models/flow.py", "import scipy.stats", False),
        ("models/flow.py", "from smcdiff.models.schedules import Linear", True),
        ("models/flow.py", "from models.schedules import Linear", True),
        ("models/flow.py", "from ..process import Process", True),
        ("models/adapters/latent.py", "from ..calls import place", False),
        ("models/adapters/latent.py", "from ...process import Process", True),
        ("models/flow.py", "def f():\n    from smcdiff import inference", True),
        ("inference/smc.py", "import smcdiff.models.flow", True),
        ("smcdiff/process.py", "from .models import Diffusion", True),
        ("smcdiff/process.py", "from . import inference", True),
        ("smcdiff/process.py", "from smcdiff.models import Diffusion", True),
        ("smcdiff/demo.py", "from smcdiff.models import Diffusion", False),
    ],
)
def test_rules_see_what_they_should(file, source, is_wrong):
    assert bool(violations(file, source)) == is_wrong


@pytest.mark.parametrize(("package", "most"), [("arviz", 1), ("networkx", 3)])
def test_few_files_touch(package, most):
    assert len([path for path in FILES if package in packages(path.read_text())]) <= most


def test_every_imported_package_is_a_declared_dependency():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = sum(project["optional-dependencies"].values(), project["dependencies"])
    names = {re.match(r"[\w-]+", requirement)[0] for requirement in declared}
    imported = set().union(*(packages(path.read_text()) for path in FILES))
    distributions = packages_distributions()
    for package in imported - sys.stdlib_module_names - {"smcdiff"}:
        assert names & set(distributions[package]), f"{package} is not in pyproject.toml"


def import_smcdiff() -> tuple[float, set[str]]:
    """Processor seconds of `import smcdiff` after torch and Pyro, and the modules then loaded."""
    program = """
import json, sys, time, pyro, torch
start = time.process_time()
import smcdiff
print(json.dumps([time.process_time() - start, list(sys.modules)]))
"""
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, check=True)
    seconds, modules = json.loads(run.stdout)
    return seconds, set(modules)


def test_import_is_light():
    seconds, modules = import_smcdiff()
    assert not modules & {"arviz", "scipy.stats", "networkx", "matplotlib"}
    assert not modules & {"smcdiff.models", "smcdiff.inference"}
    for _ in range(2):  # a busy machine gets three attempts
        if seconds > 0.2:
            seconds, _ = import_smcdiff()
    assert seconds <= 0.2
