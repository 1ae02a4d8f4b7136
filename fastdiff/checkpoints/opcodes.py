"""A walk over a pickle's opcodes before it runs, so that no file can ask for much memory or time."""

import pickle
from typing import Any

from fastdiff.checkpoints.errors import CheckpointError

OPERATIONS = 600_000  # of a pickle; ADM's has 150,000
NAME = 4096  # bytes of the longest module's or class's name
TEXT = 64 << 20  # bytes of all text; EDM's pickles carry their source, 40 KB for each class

# Opcodes that a pickle of weights needs: bytes of argument, or where the length of the argument is.
_FIXED = {"PROTO": 1, "BININT": 4, "BININT1": 1, "BININT2": 2, "BINFLOAT": 8, "BINGET": 1, "LONG_BINGET": 4}
_PUTS = {"BINPUT": 1, "LONG_BINPUT": 4}
_COUNTED = {
    "SHORT_BINUNICODE": 1,
    "BINUNICODE": 4,
    "BINUNICODE8": 8,
    "SHORT_BINSTRING": 1,
    "SHORT_BINBYTES": 1,
    "LONG1": 1,
}
_DATA = {"BINBYTES": 4, "BINBYTES8": 8}
_FRAMES = {"FRAME": 8}
_PLAIN = ["MARK", "STOP", "POP", "NONE", "NEWTRUE", "NEWFALSE", "EMPTY_DICT", "EMPTY_LIST", "EMPTY_TUPLE", "EMPTY_SET"]
_PLAIN += ["APPEND", "APPENDS", "SETITEM", "SETITEMS", "ADDITEMS", "FROZENSET", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"]
_PLAIN += ["STACK_GLOBAL", "NEWOBJ", "REDUCE", "BUILD", "MEMOIZE", "BINPERSID"]


def _table() -> list[tuple[str, int] | None]:
    table: list[tuple[str, int] | None] = [None] * 256
    for kind, names in (("fixed", _FIXED), ("put", _PUTS), ("counted", _COUNTED), ("data", _DATA), ("frame", _FRAMES)):
        for name, width in names.items():
            table[getattr(pickle, name)[0]] = (kind, width)
    for name in _PLAIN:
        table[getattr(pickle, name)[0]] = ("stop" if name == "STOP" else "fixed", 0)
    table[pickle.GLOBAL[0]] = ("lines", 2)
    return table


TABLE = _table()


def scan(data: Any, start: int = 0) -> int:
    """The end of the pickle that begins at `start` of a bytes-like; CheckpointError for one that is not as it should be."""
    at, size, text = start, len(data), 0
    for _ in range(OPERATIONS):
        if at >= size:
            raise CheckpointError("it ends in the middle of a pickle")
        entry = TABLE[data[at]]
        if entry is None:
            raise CheckpointError(f"its pickle holds opcode {data[at]:#04x} at byte {at}, which no weights need")
        kind, width = entry
        at += 1
        if kind == "fixed":
            at += width
        elif kind == "stop":
            return at
        elif kind == "lines":
            for _ in range(width):
                end = data.find(b"\n", at, at + NAME)
                if end < 0:
                    raise CheckpointError("a name in its pickle does not end")
                at = end + 1
        else:
            number = int.from_bytes(data[at : at + width], "little")
            at += width
            if kind == "frame":
                if number > size - at:  # it would be asked for at once
                    raise CheckpointError(f"its pickle claims {number} bytes of the {size - at} that follow")
                continue
            if kind == "put":
                if number > OPERATIONS:
                    raise CheckpointError(f"its pickle numbers an object {number}")
                continue
            at += number
            text += number if kind == "counted" else 0
            if text > TEXT:
                raise CheckpointError(f"its pickle holds {text} bytes of text or more, no weights do")
    raise CheckpointError(f"its pickle has more than {OPERATIONS} operations, no weights do")
