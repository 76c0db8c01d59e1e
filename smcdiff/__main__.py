"""The command line: ``python -m smcdiff demo``."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from . import __version__


def parser() -> argparse.ArgumentParser:
    """All commands and options, with their help."""
    main = argparse.ArgumentParser(
        prog="python -m smcdiff",
        description="Posteriors over diffusion priors, declared in Pyro and checked by weights.",
    )
    main.add_argument("--version", action="version", version=f"smcdiff {__version__}")
    commands = main.add_subparsers(dest="command", title="commands")
    demo = commands.add_parser(
        "demo",
        help="restore damaged handwritten digits, and say whether the answers can be trusted",
        description="Posteriors over a diffusion prior of handwritten digits: a missing box, a "
        "blur with noise of unknown scale, super-resolution (mnist), and the wish for a class.",
    )
    demo.add_argument(
        "--dataset",
        choices=("digits", "mnist"),
        default="digits",
        help="digits: 8x8, in minutes; mnist: 28x28, longer, on images that you have downloaded "
        "(the folder is in SMCDIFF_DATA) or your own --image (%(default)s)",
    )
    demo.add_argument("--image", type=Path, help="your own picture of a digit (PNG or JPEG)")
    demo.add_argument("--label", type=digit, help="the digit to wish for (7, or that of --image)")
    demo.add_argument("--seed", type=int, default=0, help="of all random numbers (%(default)s)")
    demo.add_argument("--particles", type=at_least_two, help="per run (digits: 512, mnist: 32)")
    demo.add_argument("--runs", type=at_least_two, help="independent ones (4)")
    demo.add_argument("--steps", type=at_least_two, help="of the prior (50)")
    demo.add_argument("--out", type=Path, default=Path("results/demo"), help="folder (%(default)s)")
    demo.add_argument(
        "--quick", action="store_true", help="a few seconds, rough: 2 runs, 32 particles, 10 steps"
    )
    return main


def digit(text: str) -> int:
    if text not in set("0123456789"):
        raise argparse.ArgumentTypeError(f"a digit from 0 to 9 was expected, but got {text!r}")
    return int(text)


def at_least_two(text: str) -> int:
    if not text.isdecimal() or int(text) < 2:
        raise argparse.ArgumentTypeError(f"a whole number from 2 on was expected, but got {text!r}")
    return int(text)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit status."""
    command_line = parser()
    options = command_line.parse_args(arguments)
    if options.command is None:
        command_line.print_help()
        return 0
    from .demo import Demo, ImageError  # heavy: not needed to print help
    from .restoration import DATASETS

    usual = (32, 2, 10) if options.quick else DATASETS[options.dataset].size
    given = (options.particles, options.runs, options.steps)
    particles, runs, steps = (a or b for a, b in zip(given, usual, strict=True))
    demo = Demo(options.dataset, particles, runs, steps, options.seed, options.out)
    try:
        demo.run(options.image, options.label)
    except (ImageError, FileNotFoundError) as error:
        print(f"{command_line.prog}: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
