"""Files that are written whole or not at all."""

import os
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path


def atomically(path: str | os.PathLike, write: Callable[[str], None]) -> None:
    """Call write(temporary name in the same folder), then move it to `path`: a reader never sees half a file."""
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path}: the folder {path.parent} does not exist; create it first")
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.{_here()}.", suffix=".part")
    except OSError as error:
        raise PermissionError(f"{path}: cannot write in {path.parent} ({error.strerror}); choose another place") from error
    os.close(handle)
    try:
        write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _here() -> str:
    """This process: what `remove_leftovers` looks for."""
    return f"{socket.gethostname()}.{os.getpid()}"


def remove_leftovers(folder: str | os.PathLike) -> int:
    """Delete what `atomically` left in a folder when its process was killed, and count it; living processes keep theirs."""
    removed = 0
    for path in Path(folder).glob(f".*.{socket.gethostname()}.*.part"):
        pid = path.name.split(".")[-3]
        if pid.isdigit() and not _alive(int(pid)):
            path.unlink(missing_ok=True)
            removed += 1
    return removed


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # somebody else's
        return True
    return True


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
