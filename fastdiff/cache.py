"""The user's cache folder: what is in it can be made again, and nothing that is wrong with it stops anything."""

import os
from pathlib import Path

VARIABLE = "FASTDIFF_CACHE"  # another folder, or "off"


def folder() -> Path | None:
    """$FASTDIFF_CACHE, or fastdiff in $XDG_CACHE_HOME or in ~/.cache; made where it is absent.

    None where FASTDIFF_CACHE is "off" or no such folder can be made.
    """
    named, shared = os.environ.get(VARIABLE, ""), os.environ.get("XDG_CACHE_HOME", "")
    if named.lower() == "off":
        return None
    try:
        home = Path(shared) if os.path.isabs(shared) else Path.home() / ".cache"
        path = Path(named) if named else home / "fastdiff"
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except (OSError, RuntimeError, ValueError):  # a home that nobody knows is a RuntimeError, a null byte a ValueError
        return None
    return path
