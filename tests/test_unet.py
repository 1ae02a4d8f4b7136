"""The one U-Net: sizes of the published networks, conditioning, shapes, precision."""

import dataclasses

import pytest
import torch
from tiny import awake, tiny

from fastdiff import UNet, UNetConfig
from fastdiff.nn import Attention, FourierEmbedding, PositionalEmbedding, Resample

TINY = tiny(dropout=0.0)
SMALL = {"resolution": 8, "in_channels": 1, "out_channels": 1, "channels": 8}
SMALL |= {"multipliers": (1, 2), "blocks": 1, "attention": (4,)}
VARIANTS = {
    "ddpm": TINY,
    "adm": dataclasses.replace(TINY, conditioning="scale_shift", resampling="block", head_channels=4, labels=3),
    "ddpmpp": dataclasses.replace(
        TINY, attention_up="last", resampling="block", project_resampled=True, skip_scale=0.5**0.5, group_channels=4
    ),
    "fourier": dataclasses.replace(TINY, embedding="fourier", labels=3),
    "ncsnpp": UNetConfig.ncsnpp(**SMALL, label_input=True, labels=3, augment=2),
    "ncsnpp-skip": UNetConfig.ncsnpp(**SMALL, input_pyramid="skip", output_pyramid="skip"),
    "wide-time": dataclasses.replace(TINY, channels=4, multipliers=(2, 4), time_multiplier=2, heads=2, frequency_shift=0),
    "bare-middle": dataclasses.replace(TINY, attention_middle="bare"),
    "tf-padding": dataclasses.replace(TINY, resampling="conv_end"),
}


def inputs(config, n=2, size=None):
    torch.manual_seed(1)
    size = size or (config.resolution, config.resolution)
    labels = torch.arange(n) % config.labels if config.labels else None
    return torch.randn(n, config.in_channels, *size), torch.linspace(-1, 1, n), labels


@pytest.mark.parametrize(
    ("config", "count"),
    [
        (UNetConfig(), 35_746_307),
        (UNetConfig.ddpmpp(), 55_732_739),
        (UNetConfig.ncsnpp(), 56_395_523),
        (UNetConfig.adm(), 295_899_267),
    ],
    ids=["ddpm", "ddpm++", "ncsn++", "adm"],
)
def test_parameter_counts(config, count):
    """DDPM's CIFAR-10 network, DDPM++ (55.73 M), NCSN++ and ADM for ImageNet-64 (295.9 M); built without memory."""
    with torch.device("meta"):
        net = UNet(config)
    assert sum(p.numel() for p in net.parameters()) == count


@pytest.mark.parametrize("name", VARIANTS)
def test_gradients_reach_every_parameter(name):
    config = VARIANTS[name]
    net = awake(config)
    x, c, labels = inputs(config, 3)
    augment = torch.randn(3, config.augment) if config.augment else None
    net(x, c, labels, augment).square().mean().backward()
    dead = [k for k, p in net.named_parameters() if p.grad is None or not p.grad.any()]
    assert not dead


@pytest.mark.parametrize("name", VARIANTS)
def test_depends_on_everything(name):
    config = VARIANTS[name]
    net = awake(config)
    x, c, labels = inputs(config)
    with torch.no_grad():
        y = net(x, c, labels)
        assert y.shape == x.shape and torch.isfinite(y).all()
        assert (net(x, c + 0.5, labels) - y).abs().max() > 1e-4
        if labels is not None:
            assert (net(x, c, (labels + 1) % config.labels) - y).abs().max() > 1e-4
        # no sample sees another
        alone = net(x[1:], c[1:], None if labels is None else labels[1:])
        torch.testing.assert_close(alone, y[1:], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["adm", "ncsnpp"])
def test_one_hot_labels(name):
    """One-hot rows pick what indices pick; augmentation labels change the image only where they are not zero."""
    config = VARIANTS[name]
    net = awake(config)
    x, c, labels = inputs(config, 3)
    with torch.no_grad():
        y = net(x, c, labels)
        torch.testing.assert_close(net(x, c, torch.eye(3)[labels]), y, rtol=1e-6, atol=1e-6)
        if config.augment:
            torch.testing.assert_close(net(x, c, labels, torch.zeros(3, 2)), y, rtol=0, atol=0)
            assert (net(x, c, labels, torch.ones(3, 2)) - y).abs().max() > 1e-4
    if not config.augment:
        with pytest.raises(ValueError, match="augment_labels: this network was not trained with augmentation"):
            net(x, c, labels, torch.ones(3, 2))


def test_labels_optional():
    """Where labels are optional, leaving them out is a row of zeros."""
    config = dataclasses.replace(VARIANTS["adm"], label_optional=True)
    net = awake(config)
    x, c, _ = inputs(config)
    with torch.no_grad():
        torch.testing.assert_close(net(x, c), net(x, c, torch.zeros(2, 3)), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("taps", [(1, 1), (1, 3, 3, 1), (1, 5, 10, 10, 5, 1)])
@pytest.mark.parametrize("size", [(8, 8), (2, 6)])
def test_resample(taps, size):
    """Against one dense convolution: outer product of the filter over its sum, stride 2; transposed and times 4 up."""
    torch.manual_seed(0)
    x = torch.randn(2, 3, *size)
    f = torch.tensor(taps, dtype=torch.float64)
    kernel = (f[:, None] * f / f.sum() ** 2).expand(3, 1, -1, -1)
    pad = (len(taps) - 1) // 2
    down = torch.nn.functional.conv2d(x.double(), kernel, stride=2, padding=pad, groups=3)
    up = torch.nn.functional.conv_transpose2d(x.double(), 4 * kernel, stride=2, padding=pad, groups=3)
    torch.testing.assert_close(Resample("down", taps)(x).double(), down, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(Resample("up", taps)(x).double(), up, rtol=1e-6, atol=1e-6)
    assert torch.equal(Resample("", taps)(x), x)


def test_heads_and_narrow_blocks():
    """head_channels: C / head_channels heads, and no attention in narrower blocks, the middle's included (EDM's ADM)."""
    config = dataclasses.replace(TINY, head_channels=16, attention=(8, 4))
    net = UNet(config)
    assert net.down[0].attention is None and net.down[2].attention.heads == 1
    assert UNet(dataclasses.replace(config, head_channels=32)).middle[0].attention is None
    assert UNet(dataclasses.replace(TINY, attention_middle="none")).middle[0].attention is None


def test_description_leaves_out_younger_defaults():
    """Descriptions written before a field existed are those of its default."""
    assert "heads" not in TINY.describe() and "labels" in TINY.describe()
    for config in VARIANTS.values():
        assert UNetConfig(**config.describe()) == config


def test_starts_as_zero():
    """DDPM's initialiser: the last convolution is zero, so an untrained network returns zeros."""
    net = UNet(TINY)
    assert not net(*inputs(TINY)).any()


@pytest.mark.parametrize("size", [(8, 8), (4, 10), (2, 2), (14, 6)])
def test_any_size_that_can_be_halved(size):
    """Other sizes than the one it was made for, and no square."""
    net = awake(TINY)
    x, c, _ = inputs(TINY, 2, size)
    with torch.no_grad():
        assert net(x, c).shape == x.shape


@pytest.mark.parametrize("size", [(7, 8), (8, 3)])
@pytest.mark.parametrize("name", ["ddpm", "adm"])
def test_odd_size(name, size):
    net = awake(VARIANTS[name])
    x, c, labels = inputs(VARIANTS[name], 2, size)
    with pytest.raises(ValueError, match=f"x: {size[0]} x {size[1]} cannot be halved to the last level; use multiples of 2"):
        net(x, c, labels)


@pytest.mark.parametrize("name", VARIANTS)
def test_memory_format(name):
    config = VARIANTS[name]
    net = awake(config)
    x, c, labels = inputs(config)
    with torch.no_grad():
        plain = net(x, c, labels)
        last = net.to(memory_format=torch.channels_last)(x.contiguous(memory_format=torch.channels_last), c, labels)
    torch.testing.assert_close(last, plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", VARIANTS)
def test_bfloat16_autocast(name):
    """Near float32, though c_noise goes up to 999: the embedding's angles must stay in float32."""
    config = VARIANTS[name]
    net = awake(config)
    x, _, labels = inputs(config)
    c = torch.tensor([999.0, 641.0]) if config.embedding == "positional" else torch.tensor([1.1, -1.5])
    with torch.no_grad():
        exact = net(x, c, labels)
        with torch.autocast("cpu", torch.bfloat16):
            got = net(x, c, labels)
    # About 20 roundings of relative size 2^-9 in a row, which add like a random walk; angles in bfloat16 give 0.5.
    assert ((got.float() - exact).norm() / exact.norm()) <= 0.03


def test_conditioning_kinds_differ():
    """add: a shift of the second norm's input; scale_shift: an affine map of its output, (1 + scale) h + shift."""
    for conditioning, rows in (("add", 8), ("scale_shift", 16)):
        net = UNet(dataclasses.replace(TINY, conditioning=conditioning))
        assert net.down[0].condition.weight.shape[0] == rows
    block = awake(VARIANTS["adm"]).down[0]
    x, e = torch.randn(2, 8, 8, 8), torch.randn(2, TINY.embedding_width)
    scale, shift = block.condition(e).chunk(2, 1)
    h = torch.nn.functional.group_norm(
        block.conv0(block.norm0(x)), block.norm1.groups, block.norm1.weight, block.norm1.bias, 1e-6
    )
    h = torch.nn.functional.silu(h * (1 + scale[..., None, None]) + shift[..., None, None])
    torch.testing.assert_close(block(x, e), x + block.conv1(h), rtol=1e-5, atol=1e-5)


def test_embeddings():
    c = torch.tensor([0.0, 3.0, 999.0])
    got = PositionalEmbedding(8)(c)
    angle = c.double()[:, None] * 10000 ** (-torch.arange(4, dtype=torch.float64) / 3)
    # float32 angles up to 999 are off by 3e-5
    torch.testing.assert_close(got.double(), torch.cat((angle.sin(), angle.cos()), 1), rtol=0, atol=1e-4)
    fourier = FourierEmbedding(8)
    angle = 2 * torch.pi * c[:2, None].double() * fourier.frequencies.double()
    torch.testing.assert_close(fourier(c[:2]).double(), torch.cat((angle.sin(), angle.cos()), 1), rtol=0, atol=1e-4)
    assert "frequencies" in fourier.state_dict() and not PositionalEmbedding(8).state_dict()


@pytest.mark.parametrize("heads", [1, 4])
def test_attention(heads):
    """Against softmax(q k^T / sqrt(d)) v written out, heads as blocks of channels within q, k and v."""
    torch.manual_seed(0)
    block = Attention(16, heads, 4, 1e-5, 0.7)
    torch.nn.init.normal_(block.proj.weight, std=0.2)
    x = torch.randn(2, 16, 3, 5)
    h = torch.nn.functional.group_norm(x, 4, block.norm.weight, block.norm.bias, 1e-5)
    q, k, v = block.qkv(h).flatten(2).chunk(3, 1)  # [B, C, HW]
    out = []
    for i in range(heads):
        part = slice(i * 16 // heads, (i + 1) * 16 // heads)
        weights = torch.softmax(q[:, part].transpose(1, 2) @ k[:, part] / (16 / heads) ** 0.5, -1)
        out.append((weights @ v[:, part].transpose(1, 2)).transpose(1, 2))
    expected = (x + block.proj(torch.cat(out, 1).reshape(x.shape))) * 0.7
    torch.testing.assert_close(block(x), expected, rtol=1e-5, atol=1e-5)


def test_where_attention_is():
    """DDPM: at 16x16 after every block; DDPM++: on the way up after the last block of the level; the middle always."""
    for config, down, up in ((UNetConfig(), 2, 3), (UNetConfig.ddpmpp(), 4, 1)):
        with torch.device("meta"):
            net = UNet(config)
        count = [sum(getattr(m, "attention", None) is not None for m in side) for side in (net.down, net.up, net.middle)]
        assert count == [down, up, 1]


def test_labels_required_or_refused():
    x, c, labels = inputs(VARIANTS["adm"])
    with pytest.raises(ValueError, match="labels: this network is class-conditional"):
        awake(VARIANTS["adm"])(x, c)
    with pytest.raises(ValueError, match="labels: this network is unconditional"):
        awake(TINY)(x, c, labels)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"conditioning": "film"}, "UNetConfig.conditioning: 'film' is not known; use one of add, scale_shift"),
        ({"resampling": "fir"}, "UNetConfig.resampling: 'fir'"),
        ({"embedding": "learned"}, "UNetConfig.embedding: 'learned'"),
        ({"attention_up": "none"}, "UNetConfig.attention_up: 'none'"),
        ({"input_pyramid": "residue"}, "UNetConfig.input_pyramid: 'residue'"),
        ({"attention_middle": True}, "UNetConfig.attention_middle: True is not known"),
        ({"output_pyramid": "residual"}, "UNetConfig.output_pyramid: 'residual'"),
        ({"filter": (1, 2, 1)}, r"UNetConfig.filter: \(1, 2, 1\) is not even in length"),
        ({"filter": (1, 2)}, r"UNetConfig.filter: \(1, 2\) is not even in length and symmetric"),
        ({"channels": 9}, "UNetConfig.channels: 9 is odd"),
        ({"blocks": 0}, "UNetConfig.blocks: 0 is no integer in 1 ... 64"),
        ({"heads": 3}, "heads: 3 heads do not divide 16 channels"),
        ({"channels": 2**40}, "UNetConfig.channels: .* is no integer in 1 ... 16384"),
        ({"multipliers": (1,) * 20}, "UNetConfig.multipliers: 20 levels"),
        ({"multipliers": (1, 1.3)}, "UNetConfig.multipliers: 1.3 times 8 is no number of channels"),
        ({"resolution": 9}, "UNetConfig.resolution: 9 cannot be halved 1 times; use a multiple of 2"),
    ],
)
def test_bad_configs(change, words):
    with pytest.raises(ValueError, match=words):
        UNet(dataclasses.replace(TINY, **change))


def test_config_from_json_lists():
    """Checkpoints hold lists where the dataclass has tuples."""
    values = dataclasses.asdict(TINY) | {"multipliers": [1, 2], "attention": [4]}
    assert UNetConfig(**values) == TINY


@pytest.mark.slow
def test_compiles_without_breaks():
    """fullgraph=True, forward: what the sampling loop needs to be one graph. The aot_eager back end needs no compiler."""
    config = VARIANTS["adm"]
    net = awake(config)
    x, c, labels = inputs(config)
    with torch.no_grad():
        compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x, c, labels), net(x, c, labels), rtol=1e-5, atol=1e-5)
