"""sample(): an image belongs to its seed, nothing is changed behind the caller's back, bad requests say what to do."""

import dataclasses

import numpy as np
import pytest
import torch
from tiny import tiny

import fastdiff
from fastdiff import Model, Prediction, UNet, ops, schedules
from fastdiff.model import ASSETS

CONFIG = tiny(labels=3, dropout=0.5)  # so that a network left in training mode gives itself away


def tiny(labels=3, family="consistency"):
    torch.manual_seed(0)
    net = UNet(dataclasses.replace(CONFIG, labels=labels))
    for p in net.parameters():
        p.data.add_(0.1 * torch.randn_like(p))
    return Model(net, schedules.EDM(), Prediction("edm"), family, (1, 8, 8), labels, {2: [80.0, 0.8]})


@pytest.fixture(scope="module", params=["random", "packaged"])
def model(request, tmp_path_factory):
    if request.param == "packaged":
        path = ASSETS / "mnist-ect.safetensors"
        if not path.is_file():
            pytest.skip("fastdiff/assets/mnist-ect.safetensors is not there: the packaged model was not trained yet")
        return fastdiff.load(path)
    path = tmp_path_factory.mktemp("model") / "tiny.safetensors"
    tiny().save(path)
    return fastdiff.load(path)


def test_an_image_belongs_to_its_seed(model):
    """To rounding in general; on CPUs fastdiff.nn keeps the order of summation, which the next test holds to the bit."""
    both = fastdiff.sample(model, 2, seeds=range(8), labels=1)
    alone = fastdiff.sample(model, 2, seeds=[3], labels=1)
    assert both.shape == (8, *model.shape) and alone.shape == (1, *model.shape)
    assert (both[3] - alone[0]).abs().max() <= 1e-5
    assert (both[3] - both[4]).abs().max() > 0.05
    many, one = (ops.philox_normal(ops.seed_tensor(s), 0, model.shape) for s in (range(8), [3]))
    assert torch.equal(many[3], one[0])


@pytest.mark.parametrize("nfe", [1, 2, 5])
def test_batch_size_does_not_matter(model, nfe):
    # "auto" may go over to a program between two calls; tests/compile holds its own promise
    images = [fastdiff.sample(model, nfe, seeds=range(16), batch_size=size, compile="off") for size in (16, 3, 1)]
    for other in images[1:]:
        assert (images[0] - other).abs().max() <= 1e-5


def test_fifty_evaluations(model):
    """1e-5 holds for plans of up to 50 evaluations."""
    both, alone = (fastdiff.sample(model, 49, seeds=s, labels=2, sampler="heun") for s in ([7, 8, 9], [8]))
    assert (both[1] - alone[0]).abs().max() <= 1e-5


def test_default_labels_belong_to_the_seed(model):
    images = fastdiff.sample(model, 2, seeds=[4, 15])
    explicit = fastdiff.sample(model, 2, seeds=[4, 15], labels=[4 % model.labels, 15 % model.labels])
    assert torch.equal(images, explicit)


def test_order_and_duplicates(model):
    """Seeds may repeat, giving the same image, and come in any order."""
    x = fastdiff.sample(model, 2, seeds=[9, 2, 9], labels=0)
    y = fastdiff.sample(model, 2, seeds=[2, 9], labels=0)
    assert (x[0] - x[2]).abs().max() <= 1e-5 and (x[0] - y[1]).abs().max() <= 1e-5 and (x[1] - y[0]).abs().max() <= 1e-5


@pytest.mark.parametrize(
    "seeds", [range(3), [0, 1, 2], (0, 1, 2), np.arange(3), torch.arange(3), iter([0, 1, 2]), [np.uint64(0), 1, 2]]
)
def test_kinds_of_seeds(seeds):
    result = fastdiff.run(tiny(), 1, seeds=seeds)
    assert result.seeds == [0, 1, 2] and all(type(s) is int for s in result.seeds)


def test_one_seed_and_large_seeds():
    assert fastdiff.sample(tiny(), 1, seeds=5).shape[0] == 1
    x = fastdiff.sample(tiny(), 1, seeds=[2**64 - 1, 2**63, 2**32, 0], labels=0)
    assert len({tuple(i.flatten().tolist()) for i in x}) == 4, "a word of the seed is not used"


@pytest.mark.parametrize("labels", [2, [2, 2], torch.tensor([2, 2]), np.array([2, 2]), [2], torch.tensor(2)])
def test_kinds_of_labels(labels):
    assert fastdiff.run(tiny(), 1, seeds=[0, 1], labels=labels).labels == [2, 2]


def test_fresh_seeds_are_printed(capsys):
    first = fastdiff.sample(tiny(), 1, n=3)
    line = capsys.readouterr().err
    a, b = (int(w) for w in line.removeprefix("fastdiff: seeds ").split(" ... "))
    assert b == a + 2
    assert torch.equal(fastdiff.sample(tiny(), 1, seeds=range(a, b + 1)), first)
    assert capsys.readouterr().err == ""
    fastdiff.sample(tiny(), 1)
    assert int(capsys.readouterr().err.split()[2]) != a, "entropy is not fresh"


def test_result():
    model = tiny()
    result = fastdiff.run(model, 5, seeds=range(5), batch_size=2)
    assert result.images.dtype == torch.float32 and result.images.device.type == "cpu"
    assert result.images.abs().max() <= 1 and not result.images.is_inference()
    assert result.evaluations == result.plan.nfe == 5 and result.labels == [0, 1, 2, 0, 1] and result.model is model
    model.network.conv_out.bias.data.add_(2.0)  # beyond the range of images
    wide = fastdiff.run(model, 5, seeds=range(5), clip_output=False).images
    assert wide.abs().max() > 1 and torch.equal(wide.clamp(-1, 1), fastdiff.sample(model, 5, seeds=range(5)))


def test_recorded_times_and_automatic_samplers():
    """The model's times for this nfe; the one with the best published quality for the family."""
    assert fastdiff.make_plan(tiny(), 2).times == [80.0, 0.8]
    assert fastdiff.make_plan(tiny(), 2, times=[80.0, 2.0]).times == [80.0, 2.0]
    diffusion = tiny(family="diffusion")
    ddpm = dataclasses.replace(diffusion, schedule=schedules.DDPM(), prediction=Prediction("eps"))
    for model, nfe, name in (
        (tiny(), 3, "consistency"),
        (diffusion, 35, "heun"),
        (diffusion, np.int64(35), "heun"),
        (diffusion, 2, "euler"),
        (diffusion, 3, "heun"),
        (diffusion, 10, "unipc"),
        (diffusion, 36, "unipc"),
        (ddpm, 3, "ddim"),
        (ddpm, np.int64(50), "unipc"),
        (ddpm, 1000, "ddpm"),
    ):
        assert fastdiff.make_plan(model, nfe).name == name


def test_nothing_is_changed():
    """Training mode of every module, grad mode, requires_grad and weights are as they were, after errors too."""
    model = tiny()
    model.network.train()
    model.network.middle.eval()
    modes = [m.training for m in model.network.modules()]
    weights = {k: v.clone() for k, v in model.state.items()}
    with torch.enable_grad():
        a = fastdiff.sample(model, 2, seeds=[1], compile="off")
        assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled() and not torch.is_autocast_enabled("cpu")
    with torch.no_grad():
        b = fastdiff.sample(model, 2, seeds=[1], compile="off")
        assert not torch.is_grad_enabled()
    assert torch.equal(a, b), "dropout was active"
    assert [m.training for m in model.network.modules()] == modes
    assert all(p.requires_grad for p in model.network.parameters())
    assert all(torch.equal(v, weights[k]) for k, v in model.state.items())
    model.network.conv_out = torch.nn.Conv2d(1, 1, 1)  # 8 channels arrive: the forward pass raises
    modes = [m.training for m in model.network.modules()]
    with pytest.raises(RuntimeError):
        fastdiff.sample(model, 2, seeds=[1])
    assert [m.training for m in model.network.modules()] == modes and not torch.is_inference_mode_enabled()
    (2 * a).requires_grad_().sum().backward()  # an inference tensor would refuse


def test_random_state_is_left_alone():
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    fastdiff.sample(tiny(), 2, seeds=[0, 1])
    torch.manual_seed(3)
    before = torch.get_rng_state()
    fastdiff.sample(model := dataclasses.replace(tiny()), 2, seeds=[0])
    torch.manual_seed(3)
    assert torch.equal(torch.get_rng_state(), before) and torch.equal(torch.rand(1), expected) and model is not None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    """The network computes in `dtype`, the state stays float32: near the float32 images, not equal to them."""
    model = tiny()
    exact, half = (fastdiff.sample(model, 2, seeds=range(4), dtype=d) for d in (torch.float32, dtype))
    assert half.dtype == torch.float32
    error = ((half - exact).norm() / exact.norm()).item()
    # some 40 roundings of relative size eps / 2 in two passes through the network, adding like a random walk
    assert 0 < error <= 40 * torch.finfo(dtype).eps / 2, error


def test_wrapped_networks():
    """A function, a Module, and preconditioning asked for: all three the same model here."""
    x0 = 0.25

    def eps(x, t):
        return (x - x0) / t.reshape(-1, 1, 1, 1)

    class Net(torch.nn.Module):
        forward = staticmethod(eps)

    for net in (eps, Net()):
        model = fastdiff.wrap(net, schedule=schedules.EDM(), prediction="eps", shape=(2, 4, 4))
        got = fastdiff.sample(model, 5, seeds=range(3))
        # x at t = 80 carries rounding of 80 eps / 2, which the steps shrink
        torch.testing.assert_close(got, torch.full((3, 2, 4, 4), x0), rtol=0, atol=1e-5)


def test_weights_not_finite():
    model = tiny()
    model.network.conv_in.bias.data[0] = float("nan")
    with pytest.raises(
        FloatingPointError, match=r"model: \d+ of 64 pixels came out NaN .* weights conv_in.bias are not finite"
    ):
        fastdiff.sample(model, 2, seeds=[0])
    net = fastdiff.wrap(lambda x, t: x / 0, schedule=schedules.EDM(), shape=(1, 2, 2))
    with pytest.raises(FloatingPointError, match=r"its weights are finite: try dtype=torch.float32"):
        fastdiff.sample(net, 1, seeds=[0])


BAD = [
    ({"nfe": 0}, ValueError, "nfe: 0 evaluations make no image; the fewest that consistency can do is 1"),
    ({"nfe": -1}, ValueError, "nfe: -1 evaluations"),
    ({"nfe": 2.5}, TypeError, "nfe: 2.5 is no integer"),
    ({"nfe": "2"}, TypeError, "nfe: '2' is no integer"),
    ({"nfe": 18, "sampler": "heun"}, ValueError, "nfe: heun .* 18.*the nearest are 17 and 19"),
    ({"labels": 3}, ValueError, r"labels: 3 is out of range; this model has classes 0 \.\.\. 2"),
    ({"labels": -1}, ValueError, "labels: -1 is out of range"),
    ({"labels": 1.0}, (TypeError, ValueError), "labels|float"),
    ({"labels": [0, 7]}, ValueError, "labels: 7 is out of range"),
    ({"labels": [0, 1, 2]}, ValueError, "labels: 3 given for 2 images; give one for all or one for each"),
    ({"labels": []}, ValueError, "labels: 0 given for 2 images"),
    ({"seeds": []}, ValueError, "seeds: the list is empty; give one integer per image"),
    ({"seeds": [2**64]}, ValueError, rf"seeds: {2**64} is out of range; give integers in 0 \.\.\. 2\*\*64 - 1"),
    ({"seeds": [-1]}, ValueError, "seeds: -1 is out of range"),
    ({"seeds": [0.5]}, TypeError, "seeds: 0.5 is no integer"),
    ({"seeds": torch.tensor([1.5])}, TypeError, "seeds: 1.5 is no integer"),
    ({"seeds": [True]}, TypeError, "seeds: True is no integer"),
    ({"n": 3}, ValueError, "n: 3 images asked for, but 2 seeds given; leave one of them out"),
    ({"n": 0, "seeds": None}, ValueError, "n: 0 images cannot be made"),
    ({"n": 2.5, "seeds": None}, ValueError, "n: 2.5 images cannot be made"),
    ({"generator": torch.Generator()}, TypeError, r"generator: noise belongs to the sample here; pass seeds=\[\.\.\.\]"),
    ({"sampler": "magic"}, ValueError, "sampler: 'magic' is not known; use auto, rk45 or one of analytic-ddpm, ancestral"),
    ({"eta": 0.5}, TypeError, "eta: sampler 'consistency' has no such option; it has times, clip"),
    ({"batch_size": 0}, ValueError, "batch_size: 0 is no size"),
    ({"dtype": torch.int32}, ValueError, "dtype: torch.int32 is not supported here; use torch.float32"),
    ({"guidance": 2.0}, ValueError, r"which label stands for none; give Guide\(weight, null_label=...\)"),
    ({"guidance": fastdiff.Guide([1.0, 2.0, 3.0])}, ValueError, "guidance: weights .* one for each of the 2 images"),
    ({"guidance": fastdiff.Guide(2.0, rescale=2.0)}, ValueError, "guidance: rescale 2.0 is out of range"),
    ({"guidance": fastdiff.Guide(2.0, interval=(2.0, 1.0))}, ValueError, "guidance: interval"),
    ({"guidance": fastdiff.Guide(2.0, tiny(labels=2))}, ValueError, "guidance: the weaker model's schedule"),
    ({"model": tiny(labels=0), "guidance": 2.0}, ValueError, "guidance: this model is unconditional; give a weaker one"),
    ({"start": torch.zeros(1, 8, 8)}, ValueError, "start, t_start: .* come together"),
    ({"sampler": "heun", "nfe": 3, "t_start": 5.0}, ValueError, "start, t_start: .* come together"),
    ({"sampler": "euler", "start": torch.zeros(3, 8, 8), "t_start": 5.0}, ValueError, r"start: expected \(2, 1, 8, 8\) or"),
    ({"sampler": "euler", "start": torch.zeros(1, 8, 8), "t_start": 90.0}, ValueError, "t_start: 90.0 lies outside EDM"),
    ({"noise": [torch.zeros(2, 1, 8, 8)]}, ValueError, "noise: consistency uses the start and 1 draws, 1 arrays given"),
    (
        {"noise": [torch.zeros(2, 1, 8, 8)] * 2, "seeds": [0]},
        ValueError,
        r"noise: entry 0 has shape .*, expected \(1, 1, 8, 8\)",
    ),
    ({"threshold": 0.0}, ValueError, "threshold: quantile 0.0 is out of range"),
    ({"model": torch.nn.Identity()}, TypeError, "alone does not say how it was trained; wrap it with its schedule"),
    ({"model": lambda x, t: x}, TypeError, "alone does not say how it was trained"),
    ({"model": "nowhere.safetensors"}, FileNotFoundError, "nowhere.safetensors is no file"),
    (
        {"model": fastdiff.wrap(lambda x, t: x, schedule=schedules.EDM())},
        ValueError,
        "its image shape is not known; give it",
    ),
    ({"model": tiny(labels=0), "labels": 1}, ValueError, "labels: this model is unconditional; leave labels out"),
]


@pytest.mark.parametrize(("request_", "error", "words"), BAD, ids=lambda v: " ".join(v) if isinstance(v, dict) else "")
def test_bad_requests(request_, error, words):
    with pytest.raises(error, match=words):
        fastdiff.sample(**({"model": tiny(), "nfe": 2, "seeds": [0, 1]} | request_))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_no_cuda():
    for device in ("cuda", "cuda:1", torch.device("cuda")):
        with pytest.raises(ValueError, match="was asked for, but this machine has no usable CUDA GPU; use device='cpu'"):
            fastdiff.sample(tiny(), 2, seeds=[0], device=device)
