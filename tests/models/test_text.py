"""Names and English: alphabets, the files and their parts, and the networks that ship."""

import json
import os
from importlib.resources import files
from pathlib import Path
from typing import Any

import pyro
import pytest
import torch
from torch import Tensor

from smcdiff.models import MarkovDenoiser, contains, datasets, name_prior, text, text_prior
from smcdiff.models.masked_objective import MaskedObjective
from smcdiff.models.objectives import validation_loss
from smcdiff.models.text import (
    ENGLISH,
    NAME_LENGTH,
    NAMES,
    SOURCES,
    TEXT_LENGTH,
    Alphabet,
    decode_names,
    encode_names,
    load_english,
    load_names,
    name_network,
    read_original,
    running_text,
    text_network,
    windows,
)

REPORT = Path(__file__).resolve().parents[2] / "training" / "text.json"


@pytest.fixture(scope="module")
def names() -> dict[str, Tensor]:
    try:
        return {part: load_names(part) for part in text.PARTS}
    except FileNotFoundError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(str(error))


# ------------------------------------------------------------------------------------- alphabets


@pytest.mark.parametrize("alphabet", [NAMES, ENGLISH, Alphabet("ab")])
def test_alphabets_are_read_both_ways(alphabet: Alphabet) -> None:
    tokens = alphabet.encode(alphabet.symbols)
    assert tokens.tolist() == list(range(len(alphabet)))
    assert len(set(alphabet.symbols)) == len(alphabet)
    assert alphabet.decode(tokens) == [alphabet.symbols]
    assert alphabet.decode(tokens.new_full((2, 3), len(alphabet)), mask="#") == ["###"] * 2


def test_sizes() -> None:
    assert (len(NAMES), len(ENGLISH)) == (27, 79)


def test_unknown_characters_are_named() -> None:
    with pytest.raises(ValueError, match="the alphabet has no 'é', which stands in 'zoé'"):
        NAMES.encode("zoé")


def test_names_end() -> None:
    tokens = encode_names(["anna", "bo"], length=6)
    assert NAMES.decode(tokens) == ["anna..", "bo...."]
    assert decode_names(tokens) == ["anna", "bo"]
    assert decode_names(NAMES.encode("ab.c..")) == ["ab"]
    with pytest.raises(ValueError, match="'anna' and its end do not fit into 4"):
        encode_names(["anna"], length=4)


def test_running_text() -> None:
    raw = (
        " \n = Gold dollar = \n \n The coin , of 1 @.@ 6 grams , was a <unk> one @-@ dollar "
        "( gold ) piece ; it isn 't \" rare \" – café 's cost : $ 5 \n"
    )
    wanted = "The coin, of 1.6 grams, was a one-dollar (gold) piece; it isn't \"rare\" - cafe's "
    assert running_text(raw) == wanted + "cost: $5"


def test_windows_are_views() -> None:
    stream = torch.arange(200)
    rows = windows(stream, 64)
    assert rows.shape == (3, TEXT_LENGTH)
    assert rows[1].tolist() == list(range(64, 128))
    assert rows.data_ptr() == stream.data_ptr()


# ----------------------------------------------------------------------------------------- files


def test_parts_of_the_names(names: dict[str, Tensor]) -> None:
    assert {part: len(rows) for part, rows in names.items()} == {
        "train": 27_494,
        "validation": 1_000,
        "test": 1_000,
    }
    every = [name for rows in names.values() for name in decode_names(rows)]
    assert len(set(every)) == 29_494
    assert {len(row) for row in every} <= set(range(2, NAME_LENGTH))
    assert torch.equal(load_names("test"), names["test"])


@pytest.mark.usefixtures("names")
@pytest.mark.parametrize("source", SOURCES)
def test_parts_of_the_english_texts(source: str) -> None:
    parts = {part: ENGLISH.decode(load_english(part, source))[0] for part in text.PARTS}
    assert {len(part) > 50_000 for part in parts.values()} == {True}
    assert len({part[1000:1200] for part in parts.values()}) == 3
    assert "  " not in parts["train"] or source == "shakespeare"
    assert not any(set(part) & set("<>@=") for part in parts.values())


def test_missing_files_are_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    match = r"names/names.txt was found at none of .*: download https.*SMCDIFF_DATA"
    with pytest.raises(FileNotFoundError, match=match):
        load_names("train", tmp_path)
    monkeypatch.setenv("SMCDIFF_DATA", str(tmp_path))
    monkeypatch.setattr(datasets, "__file__", str(tmp_path / "models" / "datasets.py"))
    with pytest.raises(FileNotFoundError, match=str(tmp_path)):
        load_english("train", "wikipedia")


@pytest.mark.parametrize("folder", ["names", "."])
def test_other_files_are_refused(folder: str, tmp_path: Path) -> None:
    (tmp_path / folder).mkdir(exist_ok=True)
    (tmp_path / folder / "names.txt").write_text("anna")
    with pytest.raises(ValueError, match=r"is not the original names/names.txt: expected SHA-256"):
        read_original("names/names.txt", tmp_path)


def test_unknown_parts_and_sources_are_refused() -> None:
    with pytest.raises(ValueError, match="part must be one of"):
        load_names("dev")
    with pytest.raises(ValueError, match="source must be one of"):
        load_english("train", "bible")


def test_a_markov_chain_of_names_is_an_oracle(names: dict[str, Tensor]) -> None:
    """A name ends with something if it contains that and then a full stop."""
    torch.manual_seed(0)
    chain = MarkovDenoiser.fit(names["train"], len(NAMES))
    assert chain.transitions[0, 0].tolist() == [1.0, *[0.0] * 26]
    posterior = chain.tilted(contains(NAMES.encode("ia."), len(NAMES), 0.0, -torch.inf))
    assert all(name.endswith("ia") for name in decode_names(posterior.sample(50)))
    share = sum(name.endswith("ia") for name in decode_names(chain.sample(4000))) / 4000
    exact = float(posterior.log_evidence.exp())
    assert abs(share - exact) < 4.3 * (exact * (1 - exact) / 4000) ** 0.5


# ------------------------------------------------------------------------------------ what ships


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    return json.loads(REPORT.read_text())


@pytest.mark.smoke
def test_weights_ship_and_are_small() -> None:
    for name, network in (("names", name_network()), ("text", text_network())):
        resource = files("smcdiff.models") / "weights" / f"{name}.safetensors"
        assert len(resource.read_bytes()) < 2_000_000
        assert not network.training
        assert {(p.dtype, p.requires_grad) for p in network.parameters()} == {
            (torch.float32, False)
        }


def test_likelihoods_are_the_reported_ones(names: dict[str, Tensor], report: Any) -> None:
    objective = MaskedObjective(NAME_LENGTH, len(NAMES))
    loss = validation_loss(name_network(), names["test"], None, objective, num_draws=1)
    assert loss == pytest.approx(report["names"]["test_loss_one_draw"], abs=1e-4)
    some = [windows(load_english("test", source), TEXT_LENGTH)[:500] for source in SOURCES]
    objective = MaskedObjective(TEXT_LENGTH, len(ENGLISH))
    loss = validation_loss(text_network(), torch.cat(some), None, objective, num_draws=1)
    assert loss == pytest.approx(report["text"]["test_loss_one_draw"], abs=1e-4)


@torch.no_grad()
def test_names_look_like_names() -> None:
    pyro.set_rng_seed(0)
    with pyro.plate("names", 200):
        drawn = name_prior(reveal="even")("x")
    found = decode_names(drawn)
    complete = (drawn == encode_names(found)).all(-1)  # nothing after the end
    assert complete.sum() >= 190
    assert sum(bool(set(name) & set("aeiouy")) for name in found) >= 190
    assert 5 < sum(map(len, found)) / 200 < 8
    assert len(set(found)) >= 180


@torch.no_grad()
def test_text_looks_like_text() -> None:
    pyro.set_rng_seed(0)
    with pyro.plate("windows", 50):
        drawn = text_prior(reveal="even")("x")
    letters = "".join(ENGLISH.decode(drawn))
    words = letters.split()
    assert 0.6 < sum(c.islower() for c in letters) / len(letters) < 0.9
    assert 3 < len(letters) / len(words) < 8
    assert sum(
        word in {"the", "and", "of", "to", "a", "in", "I", "is"} for word in words
    ) > 0.05 * len(words)


@torch.no_grad()
def test_infilling_between_a_beginning_and_an_end() -> None:
    pyro.set_rng_seed(0)
    given = torch.full((NAME_LENGTH,), len(NAMES))
    given[:2], given[6:10] = NAMES.encode("an"), NAMES.encode("lia.")
    with pyro.plate("names", 20):
        drawn = name_prior(8)("x", given=given)
    assert {(name[:2], name[6:]) for name in decode_names(drawn)} == {("an", "lia")}
