"""Trains what ships as `smcdiff/models/weights/names|text.safetensors`, and measures it.

    python training/text.py names --minutes 10   # the network of names
    python training/text.py text --minutes 40    # the network of Shakespeare and WikiText-2
    python training/text.py text --resume        # the same, continued from its last checkpoint
    python training/text.py text --further       # a second training, from the weights that ship
    python training/text.py --measure            # only the figures, from stored weights

Needs the texts (see `smcdiff.models.text.read_original`). Writes `models/weights/*.safetensors`,
the curve `training/text_curve.json`, and with `--measure` `training/text.json`; checkpoints go to
`--checkpoints`. Nothing is trained on the parts "validation" and "test".

The weights that ship took two trainings, from nothing and `--further`, on a share of one core:
names 22 and 12 minutes, text 66 and 75 minutes. Both were still improving, and counts of short
contexts predict single characters better (`ngram_bits_per_character`): `--further` goes on.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from text_figures import measure
from torch import Tensor

from smcdiff.models.masked_objective import MaskedObjective
from smcdiff.models.text import (
    ENGLISH,
    NAME_LENGTH,
    NAMES,
    SOURCES,
    TEXT_LENGTH,
    load_english,
    load_names,
    name_network,
    text_network,
    windows,
)
from smcdiff.models.training import DenoisingTrainer, TrainingConfig
from smcdiff.models.transformer import Transformer

HERE = Path(__file__).resolve().parent
WEIGHTS = HERE.parent / "models" / "weights"
CURVE = HERE / "text_curve.json"
SIZE: dict[str, Any] = {"width": 128, "depth": 4, "heads": 4}
NETWORKS: dict[str, dict[str, Any]] = {
    "names": {"vocabulary": len(NAMES), "length": NAME_LENGTH, **SIZE},
    "text": {"vocabulary": len(ENGLISH), "length": TEXT_LENGTH, **SIZE},
}
SHIPPED = {"names": name_network, "text": text_network}
BATCHES = {"names": 64, "text": 64}


def config(which: str, minutes: float, further: bool) -> TrainingConfig:
    """The settings of a training; its length follows the clock."""
    return TrainingConfig(
        steps=1_000_000,
        batch_size=BATCHES[which],
        learning_rate=2e-3,
        warmup=100,
        weight_decay=0.01,
        ema_decay=0.9995 if further else 0.998,
        seed=int(further),
        minutes=minutes,
        validate_every=400 if which == "names" else 100,
    )


def sequences(which: str, part: str, folder: Path | None) -> Tensor:
    """Training: every window; otherwise some that do not overlap, as many of each source."""
    if which == "names":
        return load_names(part, folder)
    texts = [load_english(part, source, folder) for source in SOURCES]
    if part == "train":
        return windows(torch.cat(texts))
    return torch.cat([windows(text, TEXT_LENGTH)[:500] for text in texts])


def train(which: str, options: argparse.Namespace) -> None:
    """Trains and stores a network, with a checkpoint every two minutes."""
    torch.manual_seed(0)
    settings = NETWORKS[which]
    network = SHIPPED[which]() if options.further else Transformer(**settings)
    network = network.requires_grad_(True).to(options.device)
    data, heldout = (
        sequences(which, part, options.data).to(options.device) for part in ("train", "validation")
    )
    trainer = DenoisingTrainer(
        network,
        data,
        config=config(which, options.minutes, options.further),
        objective=MaskedObjective(settings["length"], settings["vocabulary"]),
        validation=(heldout, None),
    )
    options.checkpoints.mkdir(parents=True, exist_ok=True)
    checkpoint = options.checkpoints / f"{which}.safetensors"
    if options.resume:
        trainer.load(checkpoint)

    def report(step: int, loss: float) -> None:
        if step % trainer.config.validate_every == 0:
            print(json.dumps(trainer.history[-1]), flush=True)

    trainer.run(report, checkpoint=checkpoint, checkpoint_minutes=2.0)
    curves = json.loads(CURVE.read_text()) if CURVE.exists() else {}
    before = curves.get(which, []) if options.further else []
    last = {key: before[-1][key] for key in ("step", "minutes")} if before else {}
    rows = [{key: row[key] + last.get(key, 0) for key in row} for row in trainer.history]
    CURVE.write_text(json.dumps({**curves, which: before + rows}, indent=2) + "\n")
    write(which, trainer.ema.cpu())


def write(which: str, module: torch.nn.Module) -> None:
    """Stores a module in half precision, what builds it as JSON in the header."""
    tensors = {key: value.half().contiguous() for key, value in module.state_dict().items()}
    file = WEIGHTS / f"{which}.safetensors"
    save_file(tensors, file, {"settings": json.dumps(NETWORKS[which])})
    file.chmod(0o644)  # safetensors alone makes it private


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("which", nargs="*", help="what to train: names, text")
    parser.add_argument("--data", type=Path, help="the folder with the texts")
    parser.add_argument("--minutes", type=float, default=40.0, help="for each training")
    parser.add_argument("--resume", action="store_true", help="from the last checkpoint")
    parser.add_argument("--further", action="store_true", help="start with what ships")
    parser.add_argument("--checkpoints", type=Path, default=HERE.parent / "results" / "text")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--measure", action="store_true", help="only measure what is stored")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for which in options.which:
        train(which, options)
    if options.measure:
        figures = measure(options.data)
        figures["bytes"] = {f"{n}.safetensors": _size(n) for n in NETWORKS}
        (HERE / "text.json").write_text(json.dumps(figures, indent=2) + "\n")
        print(json.dumps(figures, indent=2))


def _size(which: str) -> int:
    return (WEIGHTS / f"{which}.safetensors").stat().st_size


if __name__ == "__main__":
    main()
