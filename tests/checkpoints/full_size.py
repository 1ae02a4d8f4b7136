"""Published networks as their own code names their tensors: names and shapes written down once more."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from writers import edm_pickle, state_of

Shapes = Iterator[tuple[str, tuple[int, ...]]]
ADM = {"channels": 192, "mult": (1, 2, 3, 4), "blocks": 3, "attention": (32, 16, 8), "size": 64}
CIFAR10 = {"channels": 128, "mult": (2, 2, 2), "blocks": 4, "attention": (16,), "size": 32}


@dataclasses.dataclass
class Named:
    """What the writers take: weights under their own names, a class and its arguments."""

    weights: dict[str, torch.Tensor]
    class_name: str
    constructor: dict[str, Any]


def norm(name: str, c: int) -> Shapes:
    yield from ((f"{name}.weight", (c,)), (f"{name}.bias", (c,)))


def layer(name: str, c_out: int, c_in: int, *kernel: int) -> Shapes:
    yield from ((f"{name}.weight", (c_out, c_in, *kernel)), (f"{name}.bias", (c_out,)))


def random_weights(shapes: Shapes) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.empty(shape).uniform_(-0.1, 0.1, generator=generator) for name, shape in shapes}


def openai(channels, mult, blocks, attention, size, classes=1000, out=6, updown=True, flat=True) -> Shapes:
    """UNetModel with use_scale_shift_norm: with resblock_updown, guided-diffusion and, not flat, consistency_models."""
    emb = 4 * channels

    def residual(name: str, c_in: int, c: int) -> Shapes:
        yield from norm(f"{name}.in_layers.0", c_in)
        yield from layer(f"{name}.in_layers.2", c, c_in, 3, 3)
        yield from layer(f"{name}.emb_layers.1", 2 * c, emb)
        yield from norm(f"{name}.out_layers.0", c)
        yield from layer(f"{name}.out_layers.3", c, c, 3, 3)
        if c_in != c:
            yield from layer(f"{name}.skip_connection", c, c_in, 1, 1)

    def attends(name: str, c: int) -> Shapes:
        yield from norm(f"{name}.norm", c)
        yield from layer(f"{name}.qkv", 3 * c, c, *((1,) if flat else (1, 1)))
        yield from layer(f"{name}.proj_out", c, c, *((1,) if flat else (1, 1)))

    def resample(name: str, c: int, conv: str) -> Shapes:
        yield from residual(name, c, c) if updown else layer(f"{name}.{conv}", c, c, 3, 3)

    yield from layer("time_embed.0", emb, channels)
    yield from layer("time_embed.2", emb, emb)
    if classes:
        yield "label_emb.weight", (classes, emb)
    width = int(mult[0] * channels)
    yield from layer("input_blocks.0.0", width, 3, 3, 3)
    skips, n = [width], 1
    for level, m in enumerate(mult):
        for _ in range(blocks):
            yield from residual(f"input_blocks.{n}.0", width, int(m * channels))
            width = int(m * channels)
            if size >> level in attention:
                yield from attends(f"input_blocks.{n}.1", width)
            skips.append(width)
            n += 1
        if level < len(mult) - 1:
            yield from resample(f"input_blocks.{n}.0", width, "op")
            skips.append(width)
            n += 1
    yield from residual("middle_block.0", width, width)
    yield from attends("middle_block.1", width)
    yield from residual("middle_block.2", width, width)
    n = 0
    for level, m in reversed(list(enumerate(mult))):
        for i in range(blocks + 1):
            yield from residual(f"output_blocks.{n}.0", width + skips.pop(), int(m * channels))
            width, last = int(m * channels), 1
            if size >> level in attention:
                yield from attends(f"output_blocks.{n}.1", width)
                last = 2
            if level and i == blocks:
                yield from resample(f"output_blocks.{n}.{last}", width, "conv")
            n += 1
    yield from norm("out.0", width)
    yield from layer("out.2", out, width, 3, 3)


def edm(channels, mult, blocks, attention, size, song: bool, classes=0, augment=0) -> Shapes:
    """EDM's DhariwalUNet (ADM) or SongUNet (DDPM++) within its preconditioner."""
    emb = 4 * channels

    def block(name: str, c_in: int, c: int, attends: bool = False, resample: bool = False) -> Shapes:
        name = f"model.{name}"
        yield from norm(f"{name}.norm0", c_in)
        yield from layer(f"{name}.conv0", c, c_in, 3, 3)
        yield from layer(f"{name}.affine", c if song else 2 * c, emb)
        yield from norm(f"{name}.norm1", c)
        yield from layer(f"{name}.conv1", c, c, 3, 3)
        if c_in != c or (song and resample):
            yield from layer(f"{name}.skip", c, c_in, 1, 1)
        if attends:
            yield from norm(f"{name}.norm2", c)
            yield from layer(f"{name}.qkv", 3 * c, c, 1, 1)
            yield from layer(f"{name}.proj", c, c, 1, 1)

    if classes:
        yield "model.map_label.weight", (emb, classes)
    if augment:
        yield "model.map_augment.weight", (channels, augment)
    yield from layer("model.map_layer0", emb, channels)
    yield from layer("model.map_layer1", emb, emb)
    width = channels if song else channels * mult[0]
    yield from layer(f"model.enc.{size}x{size}_conv", width, 3, 3, 3)
    skips = [width]
    for level, m in enumerate(mult):
        here = f"{size >> level}x{size >> level}"
        if level:
            yield from block(f"enc.{here}_down", width, width, resample=True)
            skips.append(width)
        for i in range(blocks):
            yield from block(f"enc.{here}_block{i}", width, m * channels, size >> level in attention)
            width = m * channels
            skips.append(width)
    for level, m in reversed(list(enumerate(mult))):
        here = f"{size >> level}x{size >> level}"
        if level == len(mult) - 1:
            yield from block(f"dec.{here}_in0", width, width, True)
            yield from block(f"dec.{here}_in1", width, width)
        else:
            yield from block(f"dec.{here}_up", width, width, resample=True)
        for i in range(blocks + 1):
            here_attends = size >> level in attention and (not song or i == blocks)
            yield from block(f"dec.{here}_block{i}", width + skips.pop(), m * channels, here_attends)
            width = m * channels
    last = ("out_norm", "out_conv") if not song else (f"dec.{size}x{size}_aux_norm", f"dec.{size}x{size}_aux_conv")
    yield from norm(f"model.{last[0]}", width)
    yield from layer(f"model.{last[1]}", 3, width, 3, 3)


def edm_adm() -> Named:
    """ADM of edm-imagenet-64x64-cond-adm.pkl."""
    constructor = {"img_resolution": 64, "img_channels": 3, "label_dim": 1000, "model_type": "DhariwalUNet"}
    return Named(random_weights(edm(**ADM, song=False, classes=1000)), "EDMPrecond", constructor)


def edm_cifar10() -> Named:
    """DDPM++ of edm-cifar10-32x32-uncond-vp.pkl."""
    constructor = {"img_resolution": 32, "img_channels": 3, "label_dim": 0, "model_type": "SongUNet", "augment_dim": 9}
    constructor |= {"channel_mult": [2, 2, 2], "embedding_type": "positional", "dropout": 0.13, "model_channels": 128}
    return Named(random_weights(edm(**CIFAR10, song=True, augment=9)), "EDMPrecond", constructor)


def openai_adm() -> Named:
    """64x64_diffusion.pt of guided-diffusion, which gives its variance too."""
    return Named(random_weights(openai(**ADM)), "UNetModel", {"image_size": 64, "num_head_channels": 64})


# DDPM's CIFAR-10 network and ADM as diffusers builds them: google/ddpm-cifar10-32, openai/diffusers-cd_imagenet64_l2.
DDPM_CIFAR10: dict[str, Any] = {
    "sample_size": 32,
    "block_out_channels": (128, 256, 256, 256),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 2,
    "downsample_padding": 0,
    "attention_head_dim": None,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "norm_eps": 1e-6,
}
DIFFUSERS_ADM: dict[str, Any] = {
    "sample_size": 64,
    "block_out_channels": (192, 384, 576, 768),
    "down_block_types": ("ResnetDownsampleBlock2D", *["AttnDownBlock2D"] * 3),
    "up_block_types": (*["AttnUpBlock2D"] * 3, "ResnetUpsampleBlock2D"),
    "layers_per_block": 3,
    "num_class_embeds": 1000,
    "attention_head_dim": 64,
    "attn_norm_num_groups": 32,
    "resnet_time_scale_shift": "scale_shift",
    "downsample_type": "resnet",
    "upsample_type": "resnet",
}

FORMATS = ["edm pickle", "openai zip", "openai legacy", "ours", "diffusers", "diffusers bin"]


def write(kind: str, folder) -> tuple[Any, dict[str, Any]]:
    """A file of ADM's 296 M weights in one of FORMATS; what `fastdiff.load` takes."""
    path = folder / "adm"
    if kind == "edm pickle":
        edm_pickle(path, edm_adm())
    elif kind.startswith("openai"):
        torch.save(state_of(openai_adm()), path, _use_new_zipfile_serialization=kind == "openai zip")
        return path, {"preset": "64x64_diffusion"}
    elif kind == "ours":
        import fastdiff

        named = edm_adm()
        fastdiff.from_state_dict(named.weights, "edm", named.class_name, **named.constructor).save(path)
    else:
        import diffusers

        with torch.device("meta"):
            net = diffusers.UNet2DModel(**DIFFUSERS_ADM)
        shapes = ((k, tuple(v.shape)) for k, v in net.state_dict().items())
        net.load_state_dict(random_weights(shapes), assign=True)
        net.save_pretrained(path, safe_serialization=kind == "diffusers")
    return path, {}
