"""Checkpoints as other projects write them, made of recorded weights; their own code is not needed."""

import collections
import contextlib
import json
import pickle
import sys
import types

import torch


def _reconstruct_persistent_obj(meta):
    raise AssertionError("code in the pickle was run")


class Persistent:
    """An object that is pickled as NVlabs' persistence does: a record with its source, its class's name and its state."""

    def __init__(self, name, state):
        self.name, self.state = name, state

    def __reduce__(self):
        meta = {
            "type": "class",
            "version": 6,
            "module_src": "import os\nos.abort()\n" + "#" * 50_000,
            "class_name": self.name,
            "state": self.state,
        }
        return _reconstruct_persistent_obj, (meta,), None


@contextlib.contextmanager
def persistence():
    """While NVlabs' module seems to exist."""
    module = types.ModuleType("torch_utils.persistence")
    module._reconstruct_persistent_obj = _reconstruct_persistent_obj
    before = _reconstruct_persistent_obj.__module__
    _reconstruct_persistent_obj.__module__ = "torch_utils.persistence"
    sys.modules |= {"torch_utils": types.ModuleType("torch_utils"), "torch_utils.persistence": module}
    try:
        yield
    finally:
        _reconstruct_persistent_obj.__module__ = before
        del sys.modules["torch_utils"], sys.modules["torch_utils.persistence"]


def _module(tree, class_name, kwargs):
    """The __dict__ of a torch module, nested."""
    leaves = {k: v for k, v in tree.items() if not isinstance(v, dict)}
    buffers = {k: v for k, v in leaves.items() if k in ("resample_filter", "freqs")}
    state = dict(torch.nn.Module().__dict__)
    state["_parameters"] = {k: torch.nn.Parameter(v) for k, v in leaves.items() if k not in buffers} | {"absent": None}
    state["_buffers"] = collections.OrderedDict(buffers)
    state["_init_args"], state["_init_kwargs"] = (), kwargs
    children = collections.OrderedDict()
    for name, child in tree.items():
        if name in ("enc", "dec"):
            children[name] = torch.nn.ModuleDict()
            children[name].__dict__["_modules"] = {
                k: _module(v, "UNetBlock", {"skip_scale": _half()}) for k, v in child.items()
            }
        elif isinstance(child, dict):
            children[name] = _module(child, "Linear", {"init_weight": _half()})
    state["_modules"] = children
    return Persistent(class_name, state)


def _half():
    import numpy as np

    return np.sqrt(0.5)


def tree_of(weights):
    tree: dict = {}
    for key, value in weights.items():
        *path, leaf = key.split(".")
        node = tree
        for part in path:
            node = node.setdefault(part, {})
        node[leaf] = value.float()
    return tree


def edm_pickle(path, recorded, protocol=4):
    """network-snapshot-*.pkl of NVlabs/edm."""
    with persistence(), open(path, "wb") as file:
        net = _module(tree_of(recorded.weights), recorded.class_name, recorded.constructor)
        loss = Persistent("EDMLoss", {"P_mean": -1.2, "P_std": 1.2})
        pickle.dump({"ema": net, "loss_fn": loss, "augment_pipe": None, "dataset_kwargs": {"path": "x"}}, file, protocol)


def state_of(recorded):
    return collections.OrderedDict((k, v.float() if v.dtype != torch.float64 else v) for k, v in recorded.weights.items())


def score_sde_checkpoint(path, recorded, legacy=False):
    """checkpoint_*.pth: weights that training left off at, and moving averages, which count."""
    state = state_of(recorded)
    trained = [k for k in sorted(state, key=_natural) if k != "sigmas"]
    model = {"module.sigmas": state["sigmas"]} | {f"module.{k}": torch.zeros_like(state[k]) for k in trained}
    ema = {"decay": 0.9999, "num_updates": 7, "shadow_params": [state[k] for k in trained]}
    value = {"optimizer": {"state": {0: {"step": 3}}, "param_groups": [{"lr": 2e-4}]}, "model": model, "ema": ema, "step": 7}
    torch.save(value, path, _use_new_zipfile_serialization=not legacy)


def _natural(key):
    return [int(p) if p.isdigit() else 0 for p in key.split(".")], key


def diffusers_folder(path, recorded, scheduler=None, bin=False):
    """save_pretrained of a model, or of a pipeline with a scheduler."""
    unet = path / "unet" if scheduler else path
    unet.mkdir(parents=True)
    (unet / "config.json").write_text(json.dumps({"_class_name": "UNet2DModel", **recorded.constructor}))
    if bin:
        torch.save(state_of(recorded), unet / "diffusion_pytorch_model.bin")
    else:
        from safetensors.torch import save_file

        save_file(dict(recorded.weights), unet / "diffusion_pytorch_model.safetensors")
    if scheduler:
        index = {"_class_name": "DDPMPipeline", "unet": ["diffusers", "UNet2DModel"], "scheduler": ["diffusers", "x"]}
        (path / "model_index.json").write_text(json.dumps(index))
        (path / "scheduler").mkdir()
        (path / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
