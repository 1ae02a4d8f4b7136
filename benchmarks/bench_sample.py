"""fastdiff.sample of the packaged model at nfe 2 against the same network and sampler in plain PyTorch."""

import pytest
import torch
from engines.case import plain_network

import fastdiff


def plain_sample(network, model, times, noise, labels):
    """Multistep consistency sampling as one writes it down; `noise` is called for each draw."""
    x = times[0] * noise(0)
    for i, t in enumerate(times):
        sd = model.prediction.sigma_data
        c_in, c_skip, c_out = 1 / (t * t + sd * sd) ** 0.5, sd * sd / (t * t + sd * sd), t * sd / (t * t + sd * sd) ** 0.5
        c_noise = torch.full((len(x),), t, device=x.device).log() / 4
        d = c_skip * x + c_out * network(c_in * x, c_noise, labels)
        x = d if i == len(times) - 1 else d + times[i + 1] * noise(i + 1)
    return x.clamp(-1, 1)


def diffusers_loop(network, shape, labels):
    """The same network under diffusers' consistency scheduler, at two times of its own table."""
    from diffusers import CMStochasticIterativeScheduler

    scheduler = CMStochasticIterativeScheduler()

    @torch.inference_mode()
    def loop():
        scheduler.set_timesteps(2, device=labels.device)
        x = torch.randn(shape, device=labels.device) * scheduler.init_noise_sigma
        for t in scheduler.timesteps:
            c_noise = (t / 1000).float().expand(len(x))  # its times are 250 ln sigma, in float64
            x = scheduler.step(network(scheduler.scale_model_input(x, t), c_noise, labels), t, x).prev_sample
        return x.clamp(-1, 1)

    return loop


@pytest.mark.parametrize("batch", [1, 8, 64])
def test_sample(compare, device, batch, missing):
    model = fastdiff.load("mnist-ect", device)
    network, times, seeds = plain_network(model.network), model.times[2], list(range(batch))
    labels = torch.tensor([s % 10 for s in seeds], device=device)
    table = fastdiff.ops.seed_tensor(seeds, device)

    def same_noise(i):
        domain = fastdiff.ops.Domain.STEP if i else fastdiff.ops.Domain.INITIAL
        return fastdiff.ops.philox_normal(table, max(i - 1, 0), model.shape, domain=domain)

    def check():
        with torch.inference_mode():
            expected = plain_sample(network, model, times, same_noise, labels)
        got = fastdiff.sample(model, nfe=2, seeds=seeds)
        # float32 convolutions of about 30 layers; at t = 80 one rounding of x is 80 * 6e-8
        assert float((got - expected.cpu()).abs().max()) < 1e-3

    @torch.inference_mode()
    def plain():
        return plain_sample(network, model, times, lambda i: torch.randn(batch, *model.shape, device=device), labels)

    variants = {"fastdiff": lambda: fastdiff.sample(model, nfe=2, seeds=seeds), "pytorch": plain}
    why = missing("diffusers")
    if why is None:
        variants["diffusers"] = diffusers_loop(network, (batch, *model.shape), labels)
    skipped = {} if why is None else {"diffusers": why}
    compare("sample", f"packaged MNIST model, nfe 2, batch {batch}", variants, check, images=batch, skipped=skipped)
