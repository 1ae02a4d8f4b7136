"""Which implementation serves an op, and why."""

import dataclasses

from fastdiff.ops import _register


@dataclasses.dataclass(frozen=True)
class Served:
    """name: "c++ avx512_bf16", "triton", "cuda", "composed" or "reference"; why: the reason where it is no kernel."""

    name: str
    why: str = ""


def native() -> str:
    """The native CPU code in one phrase: instruction set and build, or why there is none."""
    if _register.native_error is not None:
        return f"no native code ({_register.native_error})"
    from fastdiff import _C

    return f"native code for {_C.isa()} ({_C.BUILT})"


def implementations() -> dict[str, dict[str, Served]]:
    """op -> device ("cpu", "cuda") -> what serves it."""
    return {op: {device: served(op, device) for device in ("cpu", "cuda")} for op in _register.names()}


def served(op: str, device: str) -> Served:
    """What serves one op on "cpu" or "cuda"."""
    name = _register.serving(op, device)
    if name == "reference":
        return Served(name, _register.native_error or "" if device == "cpu" else _register.triton_error or "")
    if name == "composed":
        return Served(name, "composed: of other ops of this table and of PyTorch's own")
    if name == "c++":
        from fastdiff import _C

        name = f"c++ {_C.isa()}"
    return Served(name)
