"""The main job, small: files, closing line, own pictures, and messages a person can act on."""

import arviz
import pytest
import torch
from PIL import Image

from smcdiff import __version__
from smcdiff.__main__ import main
from smcdiff.demo import ImageError, read_digit
from smcdiff.models.digits import load_heldout_examples
from smcdiff.restoration import blur, reduce

QUICK = ("demo", "--quick")
NAMES = ("box", "blur", "wish")


def demo(out, *options):
    return main([*QUICK, "--out", str(out), *map(str, options)])


def picture(path, x, invert=False, **options):
    """An enlarged digit as a person's file."""
    grey = ((x[0] + 1) * 127.5).byte()
    image = Image.fromarray((255 - grey if invert else grey).numpy())
    image.resize((80, 80), Image.Resampling.NEAREST).convert("RGB").save(path, **options)
    return path


@pytest.fixture
def three():
    return load_heldout_examples().images[3]


def test_demo_writes_pictures_and_draws_and_says_where(tmp_path, capsys):
    out = tmp_path / "new" / "folder"
    assert demo(out) == 0
    files = {f"{n}{end}" for n in NAMES for end in (".png", "_steps.png", ".nc")}
    assert {file.name for file in out.iterdir()} == files
    printed = capsys.readouterr()
    assert printed.out.count("verdict") == 3
    assert "The noise is found to be" in printed.out
    assert "10/10" in printed.err  # progress
    last = printed.out.strip().splitlines()[-1]
    assert last.startswith("Done in")
    assert f"Look at {out}/*.png" in last
    data = arviz.from_netcdf(out / "blur.nc")
    assert data.posterior["x"].shape == (2, 32, 1, 8, 8)
    assert data.posterior["noise"].shape == (2, 32)


def test_demo_takes_a_picture_of_ones_own(tmp_path, capsys, three):
    path = picture(tmp_path / "mine.jpg", three, invert=True)
    assert demo(tmp_path, "--image", path) == 0
    assert "The wish for a 3" in capsys.readouterr().out  # what the classifier sees in it


def test_picture_is_read_as_the_prior_knows_digits(tmp_path, three):
    rescaled = 2 * (three + 1) / (three.max() + 1) - 1
    bright = read_digit(picture(tmp_path / "bright.png", three), 8)
    dark = read_digit(picture(tmp_path / "dark.png", three, invert=True), 8)
    assert bright.shape == (1, 8, 8)
    assert (bright - rescaled).abs().max() < 0.02  # eight bits
    assert (bright - dark).abs().max() < 0.02


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "there is no file"), (b"no picture", "cannot be read as a picture")],
)
def test_bad_picture_is_refused_before_anything_runs(tmp_path, capsys, content, message):
    path = tmp_path / "mine.png"
    if content is not None:
        path.write_bytes(content)
    assert demo(tmp_path / "out", "--image", path) == 2
    error = capsys.readouterr().err
    assert message in error
    assert str(path) in error
    assert not (tmp_path / "out").exists()


def test_blank_picture_is_refused(tmp_path):
    path = picture(tmp_path / "blank.png", torch.zeros(1, 8, 8))
    with pytest.raises(ImageError, match="one grey value only"):
        read_digit(path, 8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--label", "11"), "a digit from 0 to 9 was expected, but got '11'"),
        (("--particles", "1"), "a whole number from 2 on was expected, but got '1'"),
        (("--steps", "x"), "a whole number from 2 on was expected, but got 'x'"),
    ],
)
def test_bad_options_are_refused(tmp_path, capsys, options, message):
    with pytest.raises(SystemExit, match="2"):
        demo(tmp_path, *options)
    assert message in capsys.readouterr().err


def test_without_a_command_there_is_help(capsys):
    assert main([]) == 0
    assert "restore damaged handwritten digits" in capsys.readouterr().out


def test_version(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out.strip() == f"smcdiff {__version__}"


def test_blur_keeps_a_constant_image():
    flat = torch.full((3, 1, 8, 8), 0.3)
    assert (blur(flat, 1.5) - flat).abs().max() < 1e-6


def test_reduction_is_the_mean_of_squares():
    x = torch.arange(16.0).reshape(1, 4, 4)
    assert reduce(x, 2).flatten().tolist() == [2.5, 4.5, 10.5, 12.5]
    assert reduce(x.expand(3, 2, 1, 4, 4), 2).shape == (3, 2, 1, 2, 2)
