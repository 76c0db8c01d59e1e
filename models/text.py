r"""Names and English as sequences of tokens, one per character: alphabets, data, networks.

The data do not come with the package: :func:`load_names`, :func:`load_english` read the original
files and check that they are the right ones. The networks were trained by ``training/text.py``,
which measures them as well (``training/text.json``); they have not seen what the parts
"validation" and "test" hold.

* *Names*: 29,494 first names in lower case (names.txt of github.com/karpathy/makemore). A name is
  followed by at least one full stop, up to :data:`NAME_LENGTH` characters.
* *English*: Tiny Shakespeare (github.com/karpathy/char-rnn), and WikiText-2 as running text; in
  windows of :data:`TEXT_LENGTH` characters.
"""

import hashlib
import os
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from jaxtyping import Int64
from torch import Tensor

from .datasets import data_roots
from .digits import finish, read_weights
from .transformer import Transformer

NAME_LENGTH: Final = 16
TEXT_LENGTH: Final = 64
PARTS: Final = ("train", "validation", "test")
SOURCES: Final = ("shakespeare", "wikipedia")
NUM_HELDOUT: Final = 1000  # names per held-out part

FILES: Final = {
    "names/names.txt": (
        "0a30b5557f192f32ab962680889aac5f6fda0f4cecf40a6d0b5694f58ea8cc4d",
        "https://raw.githubusercontent.com/karpathy/makemore/988aa59/names.txt",
    ),
    "tinyshakespeare/input.txt": (
        "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
        "https://raw.githubusercontent.com/karpathy/char-rnn/6f9487a/data/tinyshakespeare/input.txt",
    ),
    "wikitext2/valid.txt": (
        "f0737ed31fc1329026e95cb8b98e19c2a182c39c240ab909dc31abf2f8af58e8",
        "https://raw.githubusercontent.com/pytorch/examples/77f55b9/word_language_model/data/"
        "wikitext-2/valid.txt",
    ),
    "wikitext2/test.txt": (
        "d790b833ef8cf03a90db7bf1271b7520b83c45ce07ba3c1a9699df81e239eca0",
        "https://raw.githubusercontent.com/pytorch/examples/77f55b9/word_language_model/data/"
        "wikitext-2/test.txt",
    ),
}
"""SHA-256 and origin of every file."""


@dataclass(frozen=True)
class Alphabet:
    """Characters as tokens; the token after the last one is the mask.

    Attributes:
        symbols: the characters in the order of their tokens.
    """

    symbols: str

    def __len__(self) -> int:
        return len(self.symbols)

    def encode(self, text: str) -> Int64[Tensor, " length"]:
        """One token per character.

        Raises:
            ValueError: a character is not in the alphabet.
        """
        found = [self.symbols.find(character) for character in text]
        if -1 in found:
            raise ValueError(
                f"the alphabet has no {text[found.index(-1)]!r}, which stands in {text[:40]!r}: "
                f"its characters are {self.symbols!r}"
            )
        return torch.tensor(found, dtype=torch.int64)

    def decode(self, tokens: Int64[Tensor, "*batch length"], mask: str = "_") -> list[str]:
        """One string per row; masked characters are shown as `mask`."""
        shown = (*self.symbols, mask)
        rows = tokens.reshape(-1, tokens.shape[-1]).tolist()
        return ["".join(shown[token] for token in row) for row in rows]


END: Final = "."
NAMES: Final = Alphabet(END + "abcdefghijklmnopqrstuvwxyz")
ENGLISH: Final = Alphabet(
    "\n !\"$%&'(),-./0123456789:;?ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
)


def encode_names(names: Sequence[str], length: int = NAME_LENGTH) -> Int64[Tensor, "name length"]:
    """Names as tokens, filled up with full stops, of which there is at least one."""
    longest = max(names, key=len)
    if len(longest) >= length:
        raise ValueError(f"{longest!r} and its end do not fit into {length} characters")
    return torch.stack([NAMES.encode(name.ljust(length, END)) for name in names])


def decode_names(tokens: Int64[Tensor, "*batch length"]) -> list[str]:
    """Names, each up to its first full stop."""
    return [text.split(END)[0] for text in NAMES.decode(tokens)]


def load_names(
    part: str = "train", path: str | os.PathLike[str] | None = None
) -> Int64[Tensor, "name 16"]:
    """Different names, in random order: those of one part occur in no other.

    Args:
        part: "train" (27,494), "validation" or "test" (1,000 each).
        path: see :func:`read_original`.
    """
    check_part(part)
    names = sorted(set(read_original("names/names.txt", path).split()))
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(0)).tolist()
    start = PARTS[1:].index(part) * NUM_HELDOUT if part != "train" else 2 * NUM_HELDOUT
    stop = None if part == "train" else start + NUM_HELDOUT
    return encode_names([names[index] for index in order[start:stop]])


def load_english(
    part: str = "train", source: str = "shakespeare", path: str | os.PathLike[str] | None = None
) -> Int64[Tensor, " length"]:
    """One long text.

    Args:
        part: "train", "validation" or "test": of Shakespeare 90%, 5% and 5%. Of WikiText-2, its
            validation file to train on, and the two halves of its test file.
        source: "shakespeare" or "wikipedia".
        path: see :func:`read_original`.
    """
    check_part(part)
    if source == "shakespeare":
        text = read_original("tinyshakespeare/input.txt", path)
        cuts = [0, len(text) * 90 // 100, len(text) * 95 // 100, len(text)]
        index = PARTS.index(part)
        return ENGLISH.encode(text[cuts[index] : cuts[index + 1]])
    if source != "wikipedia":
        raise ValueError(f"source must be one of {SOURCES}, got {source!r}")
    if part == "train":
        return ENGLISH.encode(running_text(read_original("wikitext2/valid.txt", path)))
    text = running_text(read_original("wikitext2/test.txt", path))
    half = len(text) // 2
    return ENGLISH.encode(text[:half] if part == "validation" else text[half:])


def windows(
    text: Int64[Tensor, " length"], stride: int = 1, size: int = TEXT_LENGTH
) -> Int64[Tensor, "window size"]:
    """All windows that start at a multiple of `stride`: a view, without copies."""
    return text.unfold(0, size, stride)


def running_text(tokens: str) -> str:
    """WikiText's tokens as they were in print: without headings, spaces and unknown words.

    Characters with accents lose them, and what is not in the alphabet then is left out.
    """
    lines = [line.strip() for line in tokens.split("\n")]
    text = "\n".join(line for line in lines if line and not line.startswith("="))
    for pattern, replacement in (
        ("<unk>", ""),
        (" @([-,.])@ ", r"\1"),
        ("[–—‑−]", "-"),
        ("[’‘′]", "'"),
        ("[“”″]", '"'),
        ('" ([^"\n]*?) ?"', r'"\1"'),
        (r" +([,.;:!?)%]|'[a-z]|n't\b)", r"\1"),
        (r"([($]) +", r"\1"),
    ):
        text = re.sub(pattern, replacement, text)
    known = set(ENGLISH.symbols)
    text = "".join(c for c in unicodedata.normalize("NFKD", text) if c in known)
    return re.sub(" *\n *", "\n", re.sub(" +", " ", text))


def read_original(name: str, path: str | os.PathLike[str] | None = None) -> str:
    """One of :data:`FILES`, after a check of its SHA-256.

    Args:
        name: folder and file.
        path: a folder with the file, or with its folder. Without it, they are looked for in the
            folder that the environment variable SMCDIFF_DATA names, then in ``../shared/data`` next
            to the checkout.

    Raises:
        FileNotFoundError: no folder has the file; says what to download.
        ValueError: the file is not the original one.
    """
    checksum, origin = FILES[name]
    candidates = [root / part for root in data_roots(path) for part in (name, Path(name).name)]
    file = next((each for each in candidates if each.is_file()), None)
    if file is None:
        raise FileNotFoundError(
            f"{name} was found at none of {', '.join(map(str, candidates))}: download {origin}, "
            f"and pass the folder that holds {name} as path or set the environment variable "
            "SMCDIFF_DATA to it"
        )
    content = file.read_bytes()
    found = hashlib.sha256(content).hexdigest()
    if found != checksum:
        raise ValueError(
            f"{file} is not the original {name}: expected SHA-256 {checksum}, got {found}; "
            f"download it again from {origin}"
        )
    return content.decode("utf-8")


def check_part(part: str) -> None:
    """Refuses anything but a part."""
    if part not in PARTS:
        raise ValueError(f"part must be one of {PARTS}, got {part!r}")


def name_network(device: torch.device | str | None = None) -> Transformer:
    """The network trained on names; frozen, in evaluation mode."""
    settings, tensors = read_weights("names", "training/text.py names")
    return finish(Transformer(**settings), tensors, device)


def text_network(device: torch.device | str | None = None) -> Transformer:
    """The network trained on Shakespeare and WikiText-2; frozen, in evaluation mode."""
    settings, tensors = read_weights("text", "training/text.py text")
    return finish(Transformer(**settings), tensors, device)
