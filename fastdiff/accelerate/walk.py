"""accelerate and restore: which layers of a module get which forward."""

import itertools
from collections.abc import Callable

import torch
from torch import nn

from fastdiff.accelerate import blocks, layers, rewrite
from fastdiff.accelerate.derived import forget
from fastdiff.accelerate.report import Left, Replaced, Report
from fastdiff.accelerate.swap import Fast, plain, swap, unswap


def accelerate(module: nn.Module) -> Report:
    """Serve a module's GroupNorms, the SiLUs behind them, attention blocks and 3x3 convolutions by fused ops, in place.

    For models that fastdiff has no format for: diffusers' UNet2DModel, UNet2DConditionModel and AutoencoderKL, U-Nets of
    your own. What is recognised:

        nn.GroupNorm                                    group_norm
        ... with SiLU behind it: in nn.Sequential, in diffusers' ResnetBlock2D, or where the owner's forward
            says act(self.norm(x)), in one statement or in two that follow each other     group_norm_silu
        diffusers' Attention with norm and residual     group_norm_attention (inference)
        nn.Conv2d, 3x3, stride 1, padding 1             conv3x3 (eager float32 inference on CPUs)

    Only the class of a layer changes (to one derived from its own, of the same name): parameters, state_dict, hooks and
    attributes stay, and with them optimisers, averages, loading, `.to()`, copies and pickles. Results agree with the old
    ones to rounding, forward and backward, under torch.compile, autocast and DistributedDataParallel. Layers that are
    exchanged or hooked afterwards are called as they are; call `accelerate` again to fuse them too.

    Args:
        module: any torch module whose parameters are on one device; not compiled yet.

    Returns: a Report: `replaced` (name, kind), `counts` (kind -> how many), `left` (name, reason). Called twice, it gives
        the same report and changes nothing.

    Raises: TypeError if module is none, or is compiled or scripted; ValueError if its parameters are on several devices or
        if nothing in it can be replaced. Then nothing is changed.

    Memory: in eager float32 inference on CPUs packed weights of the 3x3 convolutions are kept beside the weights, from the
    first call to `restore`.
    """
    _check(module)
    restore(module)
    found = _Found(module)
    found.norms()
    found.convolutions()
    found.owners()
    report = found.report()
    if not report.replaced:
        restore(module)
        raise ValueError(
            f"module: {type(module).__name__} has no GroupNorm, attention block or 3x3 convolution that can be replaced"
            f" (fastdiff's own networks are fused already); {report}"
        )
    return report


def restore(module: nn.Module) -> tuple[str, ...]:
    """Undo `accelerate`: every layer gets its own class back and what was kept for it is freed.

    Returns: the names of the layers that changed; none if module was not accelerated.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module: expected a torch.nn.Module, got {type(module).__name__}")
    names = []
    for name, layer in module.named_modules():
        if unswap(layer):
            forget(layer)
            names.append(name)
    return tuple(names)


def _check(module: nn.Module) -> None:
    if not isinstance(module, nn.Module):
        raise TypeError(f"module: expected a torch.nn.Module, got {type(module).__name__}; a pipeline has several: pass its"
                        " .unet or .vae")  # fmt: skip
    for name, layer in module.named_modules():
        where = f"{name or 'module'} ({type(layer).__name__})"
        if isinstance(layer, torch.jit.ScriptModule):
            raise TypeError(f"module: {where} is scripted; accelerate the module it was made from, and do not script it")
        if isinstance(layer, torch._dynamo.OptimizedModule) or layer._compiled_call_impl is not None:
            raise TypeError(f"module: {where} is compiled; call accelerate first and torch.compile afterwards")
    devices = {str(t.device) for t in (*module.parameters(), *module.buffers())}
    if len(devices) > 1:
        raise ValueError(f"module: its tensors are on several devices, {', '.join(sorted(devices))}; move them to one")


class _Found:
    """What one walk over a module found; `kinds` and `reasons` by layer."""

    def __init__(self, module: nn.Module):
        self.names = {layer: name for name, layer in module.named_modules()}
        self.kinds: dict[nn.Module, str] = {}
        self.reasons: dict[nn.Module, str] = {}

    def report(self) -> Report:
        layers = list(self.names.items())
        replaced = tuple(Replaced(name, self.kinds[layer]) for layer, name in layers if layer in self.kinds)
        return Report(replaced, tuple(Left(name, self.reasons[layer]) for layer, name in layers if layer in self.reasons))

    def _consider(self, layer: nn.Module, why_not: str, kind: type[Fast], op: str) -> None:
        if why_not:
            self.reasons[layer] = why_not
        else:
            swap(layer, kind)
            self.kinds[layer] = op

    def norms(self) -> None:
        for layer in self.names:
            if isinstance(layer, nn.GroupNorm):
                self._consider(layer, _why_not_norm(layer), layers.GroupNorm, "group_norm")

    def convolutions(self) -> None:
        for layer in self.names if layers.has_packed() else ():
            if isinstance(layer, nn.Conv2d):
                self._consider(layer, _why_not_convolution(layer), layers.Conv2d, "conv3x3")

    def owners(self) -> None:
        for layer in self.names:
            own = layer.original if isinstance(layer, Fast) else type(layer)
            if "forward" in layer.__dict__:
                self._say(layer, "its forward was replaced on the instance")
            elif blocks.is_resnet(layer):
                self._block(layer, blocks.why_not_resnet, blocks.ResnetBlock, {"norm1": True, "norm2": True})
            elif blocks.is_attention(layer):
                self._block(layer, blocks.why_not_attention, blocks.Attention, {"group_norm": False})
            elif own.forward is nn.Sequential.forward:
                self._sequential(layer)
            elif any(layers.is_norm(child) for child in layer.children()):
                self._reader(layer)

    def _say(self, owner: nn.Module, reason: str) -> None:
        """Why the fast norms that owner holds are not fused with what surrounds them."""
        for child in owner.children():
            if self.kinds.get(child) == "group_norm":
                self.reasons[child] = f"nothing fused with it: {reason}"

    def _block(self, layer: nn.Module, why_not: Callable, kind: type[Fast], norms: dict[str, bool]) -> None:
        reason = why_not(layer)
        if reason:
            self._say(layer, reason)
            return
        swap(layer, kind)
        for name, silu in norms.items():
            self.kinds[getattr(layer, name)] = "group_norm_silu" if silu else "group_norm_attention"

    def _sequential(self, layer: nn.Module) -> None:
        inner = list(layer.children())
        pairs = [a for a, b in itertools.pairwise(inner) if layers.is_norm(a) and layers.is_silu(b)]
        if pairs:
            swap(layer, layers.Sequential)
        for norm in pairs:
            self.kinds[norm] = "group_norm_silu"

    def _reader(self, layer: nn.Module) -> None:
        """An owner whose forward's text may say what follows its norms."""
        names = tuple(name for name, child in layer.named_children() if layers.is_norm(child))
        try:
            _, chains, function = rewrite.rewrite(type(layer), names)
        except rewrite.Unreadable as error:
            self._say(layer, str(error))
            return
        pairs = [c.norm for c in chains if layers.is_silu(rewrite.resolve(c.then[0], layer, function))]
        if pairs:
            swap(layer, rewrite.Rewritten, *names)
        for name in pairs:
            self.kinds[getattr(layer, name)] = "group_norm_silu"


def _why_not_norm(norm: nn.GroupNorm) -> str:
    """ "" or why a GroupNorm is left."""
    if type(norm).forward is not nn.GroupNorm.forward:
        return f"{type(norm).__name__} is a GroupNorm with a forward of its own"
    if not plain(norm):
        return "it has hooks, which would not see what happens inside a fused op"
    if norm.weight is None or norm.bias is None:
        return "it has no weight and bias (affine=False)"
    return _why_not_parameters(norm)


def _why_not_convolution(layer: nn.Conv2d) -> str:
    """ "" or why a convolution is left."""
    if type(layer).forward is not nn.Conv2d.forward:
        return f"{type(layer).__name__} is a convolution with a forward of its own"
    if layer.kernel_size != (3, 3):
        return "its kernel is not 3x3"
    usual = layer.stride == layer.dilation == (1, 1) and layer.padding in ((1, 1), "same") and layer.groups == 1
    if not usual or layer.padding_mode != "zeros":
        return "it is strided, dilated, grouped or padded with other than one zero"
    if layer.in_channels < layers.CHANNELS:
        return f"it has fewer than {layers.CHANNELS} input channels, too few for packed weights to pay"
    return _why_not_parameters(layer)


def _why_not_parameters(layer: nn.Module) -> str:
    own = type(layer.weight) is nn.Parameter and not hasattr(layer, "parametrizations")
    return "" if own else "its weight is no plain parameter"
