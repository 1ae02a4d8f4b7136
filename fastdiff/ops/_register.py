"""One recipe by which every op reaches PyTorch's dispatcher.

Schema, plain-torch reference (the default on every device), fake, back ends by device, and autograd by an old-style
``autograd.Function`` below the Autograd key. ``torch.library.register_autograd`` is not used: it gives silently wrong
forward-mode tangents. Eager functorch transforms refuse old-style functions, so an op's Python wrapper sends those
calls to a ``setup_context`` twin made from the same two formulas.
"""

import importlib.util
import os
from collections.abc import Callable, Mapping

import torch
from torch.autograd import Function, forward_ad

NAMESPACE = "fastdiff"
_LIBRARY = torch.library.Library(NAMESPACE, "DEF")
_OPS: dict[str, str] = {}  # op -> schema, in the order of definition
_DEFAULTS: dict[str, Callable] = {}  # op -> what serves it where nothing better does

# Set by load_native(): why there is no native CPU code, or None when it is loaded.
native_error: str | None = "not loaded yet"

# Set by load_triton(): why there are no Triton kernels, or None when they are registered.
triton_error: str | None = "not loaded yet"
KERNELS = "fastdiff.kernels"
_TRITON: set[str] = set()  # the ops that Triton serves
_COMPOSED: dict[str, Callable] = {}  # ops made of other ops where they have no kernel of their own
_COMPOSED_FOR: set[tuple[str, str]] = set()  # (op, dispatch key) where that serves
_OVERRIDDEN: dict[str, Callable] = {}  # the extension's kernels that Triton's stand in front of


def strict() -> bool:
    """True when FASTDIFF_STRICT=1 asks that no op is served by its reference without being told to."""
    return os.environ.get("FASTDIFF_STRICT", "0") not in ("", "0")


def define(name: str, schema: str, reference: Callable, fake: Callable) -> None:
    """Define `fastdiff::name` with the reference as its implementation on every device that has no better one."""

    def default(*args, **kwargs):
        if strict():
            device = next((a.device.type for a in args if isinstance(a, torch.Tensor)), "cpu")
            raise RuntimeError(
                f"fastdiff::{name} has no {device} kernel here and FASTDIFF_STRICT=1 forbids its plain-torch reference; "
                f"`fastdiff info` says why the kernel is missing. Unset FASTDIFF_STRICT to run the reference."
            )
        return reference(*args, **kwargs)

    def checked_fake(*args, **kwargs):
        # One meta tensor among real ones is dispatched here too, and the others' results would be unwritten memory.
        devices = {str(a.device) for a in (*args, *kwargs.values()) if isinstance(a, torch.Tensor)}
        if len(devices) > 1:
            raise ValueError(f"{name}: its tensors are on several devices, {', '.join(sorted(devices))}; move them to one")
        return fake(*args, **kwargs)

    _LIBRARY.define(name + schema)
    _LIBRARY.impl(name, default, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", checked_fake, lib=_LIBRARY)
    _OPS[name] = schema
    _DEFAULTS[name] = default


def overload(name: str):
    """The dispatcher's handle of `fastdiff::name`."""
    return getattr(getattr(torch.ops, NAMESPACE), name).default


def differentiable(name: str, save: Callable, backward: Callable, jvp: Callable) -> Callable:
    """Give `fastdiff::name` reverse- and forward-mode derivatives; returns the callable that an op's wrapper ends with.

    save(args, out) -> (tensors, rest): what both derivatives need. backward(tensors, rest, needs, *grads) -> gradients
    of all arguments. jvp(tensors, rest, *tangents) -> tangent of the first output. Outputs after the first are not
    differentiable.
    """
    op = overload(name)

    def keep(ctx, args, out):
        tensors, ctx.rest = save(args, out)
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)
        if isinstance(out, tuple):
            ctx.mark_non_differentiable(*out[1:])

    def run_backward(ctx, *grads):
        out = backward(ctx.saved_tensors, ctx.rest, ctx.needs_input_grad, *grads)
        if torch.is_grad_enabled() and f"{name}_backward" in _OPS and not functorch_active():
            return _once(name, out, (*grads, *ctx.saved_tensors))
        return out

    def run_jvp(ctx, *tangents):
        tangent = jvp(ctx.saved_tensors, ctx.rest, *tangents)
        return (tangent, *[None] * (ctx.rest["outputs"] - 1)) if ctx.rest["outputs"] > 1 else tangent

    class Below(Function):
        @staticmethod
        def forward(ctx, *args):
            with torch._C._AutoDispatchBelowAutograd():
                out = op(*args)
            keep(ctx, args, out)
            return out

        backward = staticmethod(run_backward)
        jvp = staticmethod(run_jvp)

    class Twin(Function):
        @staticmethod
        def forward(*args):
            return op(*args)

        setup_context = staticmethod(keep)  # type: ignore[assignment]
        backward = staticmethod(run_backward)
        jvp = staticmethod(run_jvp)

    def autograd(*args):
        return Below.apply(*args)

    def call(*args):
        if torch.compiler.is_compiling() or torch.is_inference_mode_enabled():
            return op(*args)
        if torch._C._are_functorch_transforms_active():
            return Twin.apply(*args)
        if forward_ad._current_level >= 0 or (torch.is_grad_enabled() and any(map(_requires_grad, args))):
            return op(*args)
        with torch._C._AutoDispatchBelowAutograd():  # Function.apply's bookkeeping costs as much as the rest of a call
            return op(*args)

    _LIBRARY.impl(name, autograd, "Autograd")
    return call


def _requires_grad(argument) -> bool:
    return isinstance(argument, torch.Tensor) and argument.requires_grad


class _Once(Function):
    """Its first `count` tensors, which depend on all of them, but cannot be differentiated."""

    @staticmethod
    def forward(ctx, name, count, *tensors):
        ctx.name = name
        return tuple(t.view_as(t) for t in tensors[:count])

    @staticmethod
    def backward(ctx, *grads):
        raise RuntimeError(
            f"fastdiff::{ctx.name} has a first derivative alone, and this asks for its second; use a network of plain "
            f"torch modules where a gradient is differentiated again"
        )


def _once(name: str, out: tuple, inputs: tuple) -> tuple:
    """Gradients that an op without derivatives of its own computed, so that a second derivative is an error, not wrong."""
    given = [t for t in out if t is not None]
    kept = iter(_Once.apply(name, len(given), *given, *(t for t in inputs if t is not None)))
    return tuple(None if t is None else next(kept) for t in out)


def functorch_active() -> bool:
    """True inside an eager torch.func transform (compiled code traces through the ordinary path)."""
    return torch._C._are_functorch_transforms_active() and not torch.compiler.is_compiling()


def load_native() -> None:
    """Import the compiled extension, whose static initialisers register the CPU (and CUDA) kernels."""
    global native_error
    try:
        from fastdiff import _C  # noqa: F401
    except ImportError as error:
        absent = isinstance(error, ModuleNotFoundError) or "cannot import name '_C'" in str(error)
        native_error = "fastdiff._C was not built; FASTDIFF_BUILD=none does that" if absent else str(error)
    else:
        native_error = None


def load_triton(on_cuda: Mapping[str, tuple[str, str]]) -> None:
    """Register the Triton kernels for CUDA tensors; they, and Triton, are imported at the first CUDA call.

    After load_native(): where the extension has a kernel too, on_cuda[op][0], "cuda" or "triton", says which one serves. The
    extension's kernel finds Triton's as `fastdiff::<op>_triton` for the cases it does not take.
    """
    global triton_error
    if importlib.util.find_spec("triton") is None:
        triton_error = "Triton is not installed; pip install triton"
    elif importlib.util.find_spec(KERNELS) is None:
        triton_error = f"{KERNELS} is not installed; install the package (pip install -e .) rather than put it on the path"
    else:
        triton_error = None
    for name, schema in _OPS.items():
        launcher = _lazily(name) if triton_error is None and importlib.util.find_spec(f"{KERNELS}.{name}") else None
        if _has_kernel(name, "CUDA"):
            _LIBRARY.define(f"{name}_triton{schema}")
            _LIBRARY.impl(f"{name}_triton", launcher or _DEFAULTS[name], "CUDA")
        if launcher:
            _choose(name, launcher, on_cuda.get(name, ("cuda", ""))[0])


def _choose(name: str, launcher: Callable, wanted: str) -> None:
    """Let Triton serve `name` on CUDA unless the extension does and is wanted."""
    extension = _has_kernel(name, "CUDA")
    if extension and wanted == "cuda":
        return
    if extension:
        kernel, keys = torch.library.get_kernel(overload(name), "CUDA"), torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
        _OVERRIDDEN[name] = lambda *args: kernel.call_boxed(keys, *args)
    _LIBRARY.impl(name, launcher, "CUDA", allow_override=extension)
    _TRITON.add(name)


def on_cuda(name: str) -> dict[str, Callable]:
    """Every CUDA implementation of `fastdiff::name` here, by name: "cuda" (C++), "triton". For benchmarks and tests."""
    found: dict[str, Callable] = {}
    if name in _OVERRIDDEN:
        found["cuda"] = _OVERRIDDEN[name]
    elif _has_kernel(name, "CUDA") and name not in _TRITON:
        found["cuda"] = overload(name)
    if triton_error is None and importlib.util.find_spec(f"{KERNELS}.{name}"):
        found["triton"] = _lazily(name)
    return found


def compose(name: str, fn: Callable) -> None:
    """Let `fn`, which calls ops that have kernels, serve `fastdiff::name` on CPU and CUDA until it has kernels itself.

    FASTDIFF_STRICT=1 allows that: nothing slow stands in, or the op that `fn` calls raises.
    """
    _COMPOSED[name] = fn


def load_composed() -> None:
    """Register what `compose` was given where nothing better is; the last of the three loads.

    The extension's kernel finds it as `fastdiff::<op>_composed` for the cases it does not take.
    """
    for name, fn in _COMPOSED.items():
        if _has_kernel(name, "CPU"):
            _LIBRARY.define(f"{name}_composed{_OPS[name]}")
            _LIBRARY.impl(f"{name}_composed", fn, "CompositeExplicitAutograd")
        for key in ("CPU", "CUDA"):
            if not _has_kernel(name, key):
                _LIBRARY.impl(name, fn, key)
                _COMPOSED_FOR.add((name, key))


def _lazily(name: str) -> Callable:
    """The launcher `fastdiff.kernels.<name>.<name>`, imported when it is first called."""

    def launch(*args):
        return getattr(importlib.import_module(f"{KERNELS}.{name}"), name)(*args)

    return launch


def _has_kernel(name: str, key: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::{name}", key)


def serving(name: str, device: str) -> str:
    """What serves `fastdiff::name` on "cpu" or "cuda": "c++", "cuda", "triton", "composed" or "reference"."""
    key = {"cpu": "CPU", "cuda": "CUDA"}[device]
    if not _has_kernel(name, key):
        return "reference"
    if (name, key) in _COMPOSED_FOR:
        return "composed"
    if device == "cpu":
        return "c++"
    return "triton" if name in _TRITON else "cuda"


def names() -> list[str]:
    """Every op, in the order of definition."""
    return list(_OPS)
