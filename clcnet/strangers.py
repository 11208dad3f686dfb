"""What strangers wrote, read within bounds and shown without effect: files, JSON, words for a screen or a sheet."""

import json
import os
import re
import stat
from pathlib import Path
from typing import Any, TextIO

LARGEST_JSON = 8 * 2**20  # bytes; a policy of four models of 21,843 named classes takes five million
_MOST_LISTS, _MOST_VALUES = 500, 250_000
_JSON_TOKEN = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+(?:"|\\?\Z)|[\[{,]', re.DOTALL)


def check_file(path: Path) -> None:
    """Refuse what is no file: a pipe or a device would be read forever.

    Raises:
        OSError: it is missing, or something else.
    """
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError(f"{path} is not a file, but a folder, pipe or device")


def read_bytes(path: Path, largest: int) -> bytes:
    """Read a file of at most so many bytes.

    Raises:
        OSError: it is missing or no file, or cannot be read.
        ValueError: it is larger.
    """
    check_file(path)
    with open(path, "rb") as file:
        content = file.read(largest + 1)
    if len(content) > largest:
        raise ValueError(f"{path} is larger than the {largest:,} bytes that such a file may have")
    return content


def parse_json(content: bytes) -> Any:
    """What JSON says, in no more memory than an honest file of ours takes.

    Raises:
        ValueError: it is no JSON, says a thing twice, or holds more than any file of ours: lists nested or many, or
            values by the hundred thousand.
    """
    lists = values = 0
    for token in _JSON_TOKEN.finditer(content):
        mark = content[token.start()]
        lists, values = lists + (mark in b"[{"), values + (mark == ord(","))
        if lists > _MOST_LISTS or values > _MOST_VALUES:
            raise ValueError(f"more than {_MOST_LISTS} lists and objects, or {_MOST_VALUES:,} values")
    try:
        return json.loads(content.decode("utf-8"), object_pairs_hook=_object)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a key is there twice")
    return dict(pairs)


def is_number(value: Any, low: float, high: float) -> bool:
    """Whether it is a number in this range: not NaN, and not true or false."""
    return type(value) in (int, float) and low <= value <= high


def is_line(value: Any) -> bool:
    """Whether it is text without line breaks, which could pass for lines of ours on a screen."""
    return isinstance(value, str) and len(value.splitlines()) < 2


def shown(text: str, keep: str = "") -> str:
    r"""Text as a screen may have it: what is not printable, `keep` apart, is written out, as in `\x1b[2J`."""
    if text.isprintable():
        return text
    return "".join(
        letter if letter.isprintable() or letter in keep else letter.encode("unicode_escape").decode()
        for letter in text
    )


class ShownStream:
    """A stream that writes nothing with an effect on a screen but line breaks, tabs and what is in `keep`."""

    def __init__(self, stream: TextIO, keep: str = "") -> None:
        self._stream, self._keep = stream, f"\n\t{keep}"
        self.in_line = False  # whether what was written last has not ended its line, as a progress bar

    def write(self, text: str) -> int:
        self.in_line = not text.endswith("\n") if text else self.in_line
        return self._stream.write(shown(text, self._keep))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def for_spreadsheet(cell: Any) -> Any:
    """A cell that a spreadsheet takes for text: one that would begin a formula gets a `'` before it."""
    return f"'{cell}" if isinstance(cell, str) and cell.startswith(("=", "+", "-", "@", "\t", "\r")) else cell
