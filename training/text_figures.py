"""What `python training/text.py --measure` reports about the stored weights."""

import itertools
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import torch
from torch import Tensor, nn

from smcdiff.models.masked import MaskedDiffusion
from smcdiff.models.masked_objective import MaskedObjective
from smcdiff.models.objectives import validation_loss
from smcdiff.models.priors import name_prior, text_prior
from smcdiff.models.text import (
    END,
    ENGLISH,
    NAME_LENGTH,
    NAMES,
    SOURCES,
    TEXT_LENGTH,
    decode_names,
    encode_names,
    load_english,
    load_names,
    name_network,
    text_network,
    windows,
)

DRAWS = 16  # of masks per test sequence
ORDERS = range(1, 8)
PER_SOURCE = 500  # windows of each part that are measured
REVEALS = ("independent", "even")
STEPS = {"names": (4, 16), "text": (16, 64)}


class NGram:
    r"""The baseline: counts of characters after the last k ones, interpolated (Witten & Bell),

    .. math:: p(c \mid h) = \frac{n(h c) + \tau(h)\, p(c \mid h')}{n(h) + \tau(h)},

    with h' one character shorter than h, and tau(h) the number of different characters after h.
    """

    def __init__(self, rows: Tensor, order: int, vocabulary: int) -> None:
        self.order, self.vocabulary = order, vocabulary
        self.tables = []
        for size in range(order + 1):
            seen, counts = np.unique(self._codes(rows, size), return_counts=True)
            contexts, inverse = np.unique(seen // (vocabulary + 1), return_inverse=True)
            totals = np.bincount(inverse, weights=counts)
            self.tables.append((seen, counts, contexts, totals, np.bincount(inverse)))

    def bits(self, rows: Tensor) -> np.ndarray:
        """-log2 p of every character, given those before it in its row."""
        probability: Any = 1 / self.vocabulary
        for size, (seen, counts, contexts, totals, types) in enumerate(self.tables):
            codes = self._codes(rows, size)
            hits = _looked_up(seen, counts, codes)
            total, kinds = (
                _looked_up(contexts, table, codes // (self.vocabulary + 1))
                for table in (totals, types)
            )
            mixed = (hits + kinds * probability) / np.maximum(total + kinds, 1)
            probability = np.where(total > 0, mixed, probability)
        return -np.log2(probability).reshape(rows.shape)

    def _codes(self, rows: Tensor, size: int) -> np.ndarray:
        """The last `size` characters and the next as one number; before a row there is nothing."""
        base, tokens = self.vocabulary + 1, rows.numpy()
        padded = np.pad(tokens, [(0, 0), (size, 0)], constant_values=self.vocabulary)
        code = np.zeros(tokens.shape, dtype=np.int64)
        for shift in range(size + 1):
            code = code * base + padded[:, shift : shift + tokens.shape[1]]
        return code.ravel()


def _looked_up(keys: np.ndarray, values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """The value of each wanted key; 0 if it is not there."""
    found = np.searchsorted(keys, wanted).clip(max=len(keys) - 1)
    return np.where(keys[found] == wanted, values[found], 0)


def measure(folder: Path | None) -> dict[str, Any]:
    """Everything that `training/text.json` says."""
    torch.manual_seed(0)
    return {"names": measure_names(folder), "text": measure_text(folder)}


def measure_names(folder: Path | None) -> dict[str, Any]:
    """Bits per character, the full stop at the end of a name among them."""
    network, objective = name_network(), MaskedObjective(NAME_LENGTH, len(NAMES))
    train, heldout, test = (load_names(p, folder) for p in ("train", "validation", "test"))
    grams = [NGram(train, order, len(NAMES)) for order in ORDERS]
    best = min(grams, key=lambda gram: _per_character(gram, heldout))
    lengths = torch.tensor([len(name) + 1.0 for name in decode_names(test)])
    loss = validation_loss(network, test, None, objective, num_draws=DRAWS)
    known = set(decode_names(train))
    figures: dict[str, Any] = {
        **_facts(network, NAME_LENGTH),
        "test_loss_one_draw": round(
            validation_loss(network, test, None, objective, num_draws=1), 5
        ),
        "bits_per_character": round(_bits(loss) * NAME_LENGTH / lengths.mean().item(), 4),
        "ngram_bits_per_character": round(_per_character(best, test), 4),
        "ngram_order": best.order,
        "samples": {},
    }
    for reveal, steps in itertools.product(REVEALS, STEPS["names"]):
        drawn = draw(name_prior(steps, reveal=reveal), 500)
        names = decode_names(drawn)
        complete = (drawn == encode_names(names)).all(-1)
        figures["samples"][f"{reveal}, {steps} steps"] = {
            "ngram_bits_per_character": round(_per_character(best, encode_names(names)), 4),
            "nothing_after_the_end": round(complete.double().mean().item(), 4),
            "in_the_training_data": round(sum(n in known for n in names) / len(names), 4),
            "examples": names[:20],
        }
    return figures


def measure_text(folder: Path | None) -> dict[str, Any]:
    """Bits per character of windows without any context, for each source."""
    network, objective = text_network(), MaskedObjective(TEXT_LENGTH, len(ENGLISH))
    train = torch.cat([load_english("train", source, folder) for source in SOURCES])
    parts = {
        part: torch.cat([pieces(part, source, folder) for source in SOURCES])
        for part in ("validation", "test")
    }
    grams = [NGram(train[None], order, len(ENGLISH)) for order in ORDERS]
    best = min(grams, key=lambda gram: gram.bits(parts["validation"]).mean())
    figures: dict[str, Any] = {
        **_facts(network, TEXT_LENGTH),
        "test_loss_one_draw": round(
            validation_loss(network, parts["test"], None, objective, num_draws=1), 5
        ),
        "ngram_order": best.order,
    }
    for source in SOURCES:
        some = pieces("test", source, folder)
        whole = some.reshape(1, -1)
        loss = validation_loss(network, some, None, objective, num_draws=DRAWS)
        figures[source] = {
            "bits_per_character": round(_bits(loss), 4),
            "ngram_bits_per_character": round(best.bits(some).mean().item(), 4),
            "ngram_bits_per_character_in_context": round(best.bits(whole).mean().item(), 4),
        }
    figures["samples"] = {}
    for reveal, steps in itertools.product(REVEALS, STEPS["text"]):
        drawn = draw(text_prior(steps, reveal=reveal), 100)
        figures["samples"][f"{reveal}, {steps} steps"] = {
            "ngram_bits_per_character": round(best.bits(drawn).mean().item(), 4),
            "examples": ENGLISH.decode(drawn[:8]),
        }
    return figures


def pieces(part: str, source: str, folder: Path | None) -> Tensor:
    """Windows that do not overlap."""
    return windows(load_english(part, source, folder), TEXT_LENGTH)[:PER_SOURCE]


@torch.no_grad()
def draw(prior: MaskedDiffusion, count: int) -> Tensor:
    """Samples from the prior as it ships."""
    pyro.set_rng_seed(0)
    with pyro.plate("strings", count):
        drawn: Tensor = prior("x")
    return drawn


def _per_character(gram: NGram, names: Tensor) -> float:
    """Up to the first full stop, with it."""
    ended = (names == NAMES.symbols.index(END)).long().cumsum(-1)
    counted = ((ended == 0) | ((ended == 1) & (names == NAMES.symbols.index(END)))).numpy()
    return float(gram.bits(names)[counted].mean())


def _bits(nats: float) -> float:
    return nats / math.log(2)


def _facts(network: nn.Module, length: int) -> dict[str, Any]:
    """How large and how fast."""
    tokens = torch.zeros(1000, length, dtype=torch.int64)
    start = time.process_time()
    with torch.no_grad():
        network(tokens)
    spent = time.process_time() - start
    return {
        "parameters": sum(p.numel() for p in network.parameters()),
        "forward_ms_per_1000_one_thread": round(1000 * spent, 1),
    }
