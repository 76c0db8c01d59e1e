"""The documentation: its recipes run, its links lead somewhere, and no public name is missing."""

import re
from pathlib import Path

import pyro
import pytest

import smcdiff
import smcdiff.inference
import smcdiff.models
import smcdiff.models.adapters

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
GUIDE, REFERENCE = ROOT / "docs" / "guide.md", ROOT / "docs" / "reference.md"
PACKAGES = (smcdiff, smcdiff.models, smcdiff.models.adapters, smcdiff.inference)


def test_recipes_run_one_after_the_other(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pyro.clear_param_store()
    names: dict[str, object] = {"__name__": "guide"}
    for number, block in enumerate(re.findall(r"```python\n(.*?)```", GUIDE.read_text(), re.S)):
        exec(compile(block, f"block {number} of guide.md", "exec"), names)
    assert {file.suffix for file in tmp_path.iterdir()} == {".png", ".safetensors"}


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.__name__)
def test_every_public_name_has_its_line(package):
    told = set(re.findall(r"`(\w+)`", REFERENCE.read_text()))
    missing = sorted(set(package.__all__) - told)
    assert not missing, f"give {missing} a line in docs/reference.md"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        if link.startswith("http"):
            continue
        path, _, place = link.partition("#")
        target = (page.parent / path).resolve()
        assert target.exists(), f"{link} in {page.name}"
        titles = re.findall(r"^#+ (.*)$", target.read_text(), re.M) if place else []
        assert place in ["", *(_anchor(title) for title in titles)], f"{link} in {page.name}"


def _anchor(title: str) -> str:
    """How a page names the place of a heading."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")
