"""What is shipped: the package list, the links, the guards and the files of the package."""

import configparser
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = {"smcdiff": "smcdiff", "smcdiff.inference": "inference", "smcdiff.models": "models"}
SHIPPED = ("*.py", "py.typed", "weights/*")

each_folder = pytest.mark.parametrize(("package", "folder"), FOLDERS.items())
setup = configparser.ConfigParser()
setup.read(ROOT / "setup.cfg")


def test_package_list_names_every_folder_with_code():
    found = {
        ".".join((package, *file.parent.relative_to(ROOT / folder).parts))
        for package, folder in FOLDERS.items()
        for file in (ROOT / folder).rglob("*.py")  # does not follow the links
    }
    assert sorted(found) == setup["options"]["packages"].split()


def test_package_map_points_to_the_folders():
    lines = setup["options"]["package_dir"].strip().splitlines()
    assert dict(line.split(" = ") for line in lines) == FOLDERS


@pytest.mark.parametrize("name", ["models", "inference"])
def test_links_show_tools_what_the_map_ships(name):
    assert (ROOT / "smcdiff" / name).readlink() == Path("..", name)
    assert not (ROOT / name).is_symlink()


@pytest.mark.parametrize("name", ["models", "inference"])
def test_folders_refuse_to_be_imported_under_their_bare_names(name):
    command = [sys.executable, "-c", f"import {name}"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert f"ImportError: this folder is the package smcdiff.{name}" in run.stderr


@pytest.mark.smoke
@each_folder
def test_installed_package_has_the_files_of_the_checkout(package, folder, pytestconfig):
    def shipped(path):
        return {str(file.relative_to(path)) for glob in SHIPPED for file in path.glob(glob)}

    installed = Path(importlib.import_module(package).__file__).parent
    assert shipped(installed) == shipped(ROOT / folder)
    tests_the_checkout = bool(pytestconfig.getini("pythonpath"))  # `make wheel` empties it
    assert installed.samefile(ROOT / folder) == tests_the_checkout


@pytest.mark.smoke
@each_folder
def test_every_module_can_be_imported(package, folder):
    for file in (ROOT / folder).glob("[!_]*.py"):
        importlib.import_module(f"{package}.{file.stem}")
