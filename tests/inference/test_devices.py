"""The tests of devices.py, in a process of their own.

Torch must hear of another device before its first backward pass, and forgets it never.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__)


def test_every_method_on_another_device() -> None:
    tests = str(HERE.with_name("devices.py"))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", tests]
    workers = {name: value for name, value in os.environ.items() if "XDIST" not in name}
    done = subprocess.run(
        command, cwd=HERE.parents[2], env=workers, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout
    if " passed" not in done.stdout:
        pytest.skip("this version of torch cannot be taught another device")
