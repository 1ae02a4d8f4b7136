"""What a file or an object is, told by its content, and its weights and configuration without the network."""

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from fastdiff.checkpoints import edm, pickles
from fastdiff.checkpoints.errors import CheckpointError
from fastdiff.checkpoints.stored import Stored, Weight, safetensors

JSON = 1 << 20  # bytes of the largest configuration read
WEIGHTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin", "model.safetensors", "pytorch_model.bin")
FAMILY_OF = {  # a name that each family's state dicts have, and nobody else's
    "openai": r"^input_blocks\.0\.0\.weight$",
    "score_sde": r"^(module\.)?all_modules\.0\.(weight|W)$",
    "edm": r"^(model\.)?enc\.\d+x\d+_conv\.weight$",
    "diffusers": r"^down_blocks\.0\.resnets\.0\.conv1\.weight$",
}
UNREAD = {  # what is recognised, but has another block structure
    r"^(model\.)?init_conv\.weight$": "lucidrains' denoising-diffusion-pytorch, whose norms are RMS over channels, after "
    "the convolutions, and whose attention is linear or has keys of its own",
    r"^(model\.|inner_model\.)*(u_net\.)?d_blocks\.0\.": "k-diffusion's image U-Net, which has GELU, and norms that all, "
    "attention's too, take scale and shift from the embedding",
    r"^(model\.|unet\.)?enc\.\d+x\d+_conv\.weight_?gain$|emb_gain$": "EDM2, whose layers preserve magnitudes and have no "
    "norms or biases",
}
EXPECTED = "a fastdiff, diffusers, EDM, OpenAI or score_sde checkpoint"


class Foreign(NamedTuple):
    """A checkpoint of another project: what `convert` takes."""

    state: dict[str, Weight]
    family: str
    class_name: str | None
    config: dict[str, Any]
    asked: bool = False  # whether the caller was to say something of it


class Native(NamedTuple):
    """A checkpoint of ours."""

    state: dict[str, Weight]
    description: str


def read(path: Path, config: Mapping[str, Any]) -> Foreign | Native:
    """The checkpoint at a path; `config` says what it does not.

    Raises: CheckpointError, whatever the bytes are; nothing in them is executed.
    """
    try:
        found = _folder(path) if path.is_dir() else _file(path, config)
        if config and not (isinstance(found, Foreign) and found.asked):
            raise CheckpointError(f"it says itself what it is; leave {', '.join(config)} out")
        return found
    except CheckpointError as error:
        text = str(error)
        raise CheckpointError(text if text.startswith("model: ") else f"model: {path} is not read: {text}") from error
    except (OSError, RecursionError, MemoryError, AttributeError, TypeError, ValueError, KeyError, IndexError) as error:
        raise CheckpointError(f"model: {path} is damaged ({type(error).__name__}: {str(error)[:100]})") from error


def _file(path: Path, config: Mapping[str, Any]) -> Foreign | Native:
    with open(path, "rb") as file:
        start = file.read(9)
    if start[:4] == b"PK\x03\x04":
        return _object(pickles.read_zip(path), config)
    if start[:1] == b"\x80" and start[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05") and start[8:9] != b"{":
        return _object(pickles.read_pickle(path), config)
    state, metadata = safetensors(path)
    if "fastdiff" in metadata:
        return Native(state, str(metadata["fastdiff"]))
    beside = path.parent / "config.json"
    if _family(state) == "diffusers" and beside.is_file():
        return Foreign(state, "diffusers", *_unet_config(beside))
    return _state(state, config)


def _folder(path: Path) -> Foreign:
    """A diffusers model, or a pipeline with its scheduler."""
    if (path / "model_index.json").is_file():
        parts = _json(path / "model_index.json")
        if not (path / "unet" / "config.json").is_file():
            raise CheckpointError(f"its pipeline {str(parts.get('_class_name'))[:80]} has no unet folder")
        if "vae" in parts or "vqvae" in parts or "text_encoder" in parts:
            raise CheckpointError("its pipeline works on latents or text; only unconditional pipelines of pixels are read")
        found = _folder(path / "unet")
        scheduler = _json(path / "scheduler" / "scheduler_config.json")
        return found._replace(config=found.config | {"scheduler": scheduler})
    if not (path / "config.json").is_file():
        raise CheckpointError(f"there is no config.json or model_index.json in the folder; give {EXPECTED}")
    name, config = _unet_config(path / "config.json")
    weights = next((path / n for n in WEIGHTS if (path / n).is_file()), None)
    if weights is None:
        raise CheckpointError(f"the folder has none of {', '.join(WEIGHTS)}; weights in several parts are not read")
    with open(weights, "rb") as file:
        zipped = file.read(4) == b"PK\x03\x04"
    if weights.suffix == ".safetensors":
        return Foreign(safetensors(weights)[0], "diffusers", name, config)
    state = pickles.read_zip(weights) if zipped else pickles.read_pickle(weights)
    return Foreign(_tensors(state), "diffusers", name, config)


def _json(path: Path) -> dict[str, Any]:
    if os.path.getsize(path) > JSON:
        raise CheckpointError(f"{path.name} is larger than {JSON} bytes")
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path.name} is no JSON: {str(error)[:100]}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path.name} is no JSON object")
    return value


def _unet_config(path: Path) -> tuple[str, dict[str, Any]]:
    config = _json(path)
    return str(config.get("_class_name", "UNet2DModel")), config


def _object(value: Any, config: Mapping[str, Any]) -> Foreign:
    """What was pickled: EDM's record of a network, score_sde's checkpoint, or a state dict."""
    if isinstance(value, dict):
        for name in ("ema", "net", "G_ema"):
            if isinstance(value.get(name), pickles.Module):
                return _edm(value[name])
    if isinstance(value, pickles.Module):
        return _edm(value)
    if not isinstance(value, dict):
        raise CheckpointError(f"it holds a {type(value).__name__}, not {EXPECTED}")
    model, ema = value.get("model"), value.get("ema")
    if isinstance(model, dict) and isinstance(ema, dict) and isinstance(ema.get("shadow_params"), list):
        return _state(_shadowed(_tensors(model), ema["shadow_params"]), config)
    for name in ("state_dict", "model", "ema"):
        if isinstance(value.get(name), dict):
            value = value[name]
            break
    return _state(_tensors(value), config)


def _edm(module: pickles.Module) -> Foreign:
    if module.name not in edm.CLASSES:
        raise CheckpointError(
            f"it holds a network of class {module.name[:80]}, of EDM's only {', '.join(edm.CLASSES)} are read"
        )
    return Foreign(module.weights(), "edm", module.name, module.init_kwargs())


def _tensors(value: Any) -> dict[str, Weight]:
    if not isinstance(value, dict) or not all(isinstance(k, str) for k in value):
        raise CheckpointError(f"it holds no state dict, not {EXPECTED}")
    bad = [k for k, v in value.items() if not isinstance(v, (Stored, Tensor))]
    if bad:
        raise CheckpointError(f"its state dict holds {len(bad)} entries that are no tensors: {', '.join(bad[:5])[:200]}")
    return dict(value)


def _shadowed(model: dict[str, Weight], shadow: list) -> dict[str, Weight]:
    """The moving averages in place of the weights: they lie in the order of the parameters that are trained."""
    fixed = re.compile(r"(^|\.)sigmas$|all_modules\.0\.W$")
    trained = [k for k in model if not fixed.search(k)]
    if len(trained) != len(shadow):
        raise CheckpointError(f"its moving averages are {len(shadow)}, its trained weights {len(trained)}")
    for name, value in zip(trained, shadow, strict=True):
        if not isinstance(value, (Stored, Tensor)) or tuple(value.shape) != tuple(model[name].shape):
            raise CheckpointError(f"its moving average for {name} has another shape")
    return model | dict(zip(trained, shadow, strict=True))


def _family(state: Mapping[str, Any]) -> str | None:
    for family, pattern in FAMILY_OF.items():
        if any(re.search(pattern, k) for k in state):
            return family
    return None


def _state(state: dict[str, Weight], config: Mapping[str, Any]) -> Foreign:
    for pattern, what in UNREAD.items():
        if any(re.search(pattern, k) for k in state):
            raise CheckpointError(f"its names are those of {what}; use fastdiff.wrap with the original network")
    family = _family(state)
    if family is None:
        names = ", ".join(list(state)[:4])[:200]
        raise CheckpointError(
            f"its {len(state)} tensors ({names}, ...) are of another program: it is not {EXPECTED}. Build the network "
            f"yourself, load these weights into it and use fastdiff.wrap(net, schedule=..., prediction=...)"
        )
    if family in ("edm", "diffusers") and not config:
        raise CheckpointError(
            f"its names are those of {family}, whose state dicts do not say how the network was built; give the arguments: "
            f"fastdiff.load(path, class_name=..., ...), or the folder or pickle that holds them"
        )
    if family == "score_sde":
        state = {k.removeprefix("module."): v for k, v in state.items()}
    rest = {k: v for k, v in config.items() if k != "class_name"}
    return Foreign(state, family, config.get("class_name"), rest, asked=True)


def of_object(value: Any) -> Foreign | None:
    """A diffusers model or pipeline in memory; None for anything else. diffusers itself is not imported."""
    if not type(value).__module__.startswith("diffusers."):
        return None
    unet, scheduler = getattr(value, "unet", None), getattr(value, "scheduler", None)
    if unet is not None and scheduler is not None:
        if getattr(value, "vae", None) is not None or getattr(value, "vqvae", None) is not None:
            raise CheckpointError("model: the pipeline works on latents; only unconditional pipelines of pixels are read")
        found = of_object(unet)
        if found is None:
            raise CheckpointError(f"model: the pipeline's unet is a {type(unet).__name__}, not a diffusers model")
        about = {"_class_name": type(scheduler).__name__, **dict(scheduler.config)}
        return found._replace(config=found.config | {"scheduler": about})
    if not hasattr(value, "config") or not hasattr(value, "state_dict"):
        return None
    return Foreign(dict(value.state_dict()), "diffusers", type(value).__name__, dict(value.config))
