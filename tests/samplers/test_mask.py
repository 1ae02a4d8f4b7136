"""known= and mask=: every sampler keeps known pixels, which follow their path; the others see them; bad masks are named."""

import pytest
import torch

import fastdiff
from fastdiff.samplers import SAMPLERS

SHAPE = (1, 2, 2)
KNOWN = torch.tensor([[[0.4, -0.7], [0.9, 0.1]]])
MASK = torch.tensor([[1.0, 1.0], [0.0, 0.0]])
RHO = 0.95  # correlation of a pixel and the one below
SEEDS = range(16)


def exact(schedule):
    """The exact D of Gaussian data, pixels N(0, 0.25), on a schedule."""
    identity = torch.eye(4, dtype=torch.float64)
    covariance = 0.25 * (identity + RHO * identity.roll(2, 1))

    def denoise(x, t):
        times = t.double().numpy().reshape(-1)
        a, s = (torch.as_tensor(f(times))[:, None, None] for f in (schedule.alpha, schedule.sigma))
        gain = a * covariance @ torch.linalg.inv(a**2 * covariance + s**2 * identity)
        return (gain @ x.double().flatten(1)[..., None]).reshape(x.shape).to(x)

    return fastdiff.wrap(denoise, schedule=schedule, prediction="x0", shape=SHAPE)


@pytest.fixture(scope="module")
def model():
    return exact(fastdiff.schedules.EDM())


SCHEDULES = (fastdiff.schedules.EDM(), fastdiff.schedules.DDPM(), fastdiff.schedules.VP(), fastdiff.schedules.VE())


def sample(model, **more):
    given = {"nfe": 12, "seeds": SEEDS, "sampler": "euler", "known": KNOWN, "mask": MASK, "clip_output": False} | more
    return fastdiff.sample(model, **given)


def first_plan(name):
    """(model, nfe) of the first schedule and number of evaluations that this sampler can do."""
    for schedule in SCHEDULES:
        for nfe in (12, 13, 24, 40):
            model = exact(schedule)
            try:
                fastdiff.make_plan(model, nfe, name)
                return model, nfe
            except (ValueError, TypeError):
                continue
    raise AssertionError(f"{name}: no plan on any schedule")


# Those that want statistics of the network first are DDPM chains like fast-ddpm.
@pytest.mark.parametrize("name", [n for n in SAMPLERS if n not in ("analytic-ddpm", "watson", "san-roman")])
def test_every_sampler_keeps_known_pixels(name):
    model, nfe = first_plan(name)
    images = sample(model, sampler=name, nfe=nfe)
    assert torch.equal(images[:, :, 0], KNOWN[:, 0].expand(16, 1, 2)) and images.isfinite().all()
    assert images[:, :, 1].std() > 0.01, "the others are made"


def test_known_pixels_follow_their_path(model):
    """At every level what is known is the known image, by the share of the way that was gone, plus that level's noise."""
    made = fastdiff.run(model, 12, seeds=SEEDS, sampler="euler", known=KNOWN, mask=MASK, trajectory=True)
    noise = fastdiff.ops.philox_normal(fastdiff.ops.seed_tensor(SEEDS), 0, SHAPE)
    first = made.plan.times[0]
    for t, x in zip(made.plan.times[1:], made.trajectory, strict=False):
        expected = (1 - t / first) * KNOWN + t * noise
        torch.testing.assert_close(x[:, :, 0], expected[:, :, 0], atol=2e-5, rtol=1e-5)


def test_the_others_see_them(model):
    """Each pixel leans to the side of the known one above it."""
    images = sample(model, seeds=range(256), sampler="euler-ancestral", nfe=24)
    plain = sample(model, seeds=range(256), sampler="euler-ancestral", nfe=24, known=None, mask=None)
    assert plain[:, 0, 1].mean(0).abs().max() < 0.15
    lean = images[:, 0, 1].mean(0) / KNOWN[0, 0]
    assert (lean > 0.3).all() and (lean < 1.1).all()


def test_zero_mask_changes_nothing_and_shapes(model):
    torch.testing.assert_close(sample(model, mask=torch.zeros(2, 2)), sample(model, known=None, mask=None))
    whole = sample(model)
    for shape in ((1, 2, 2), (16, 1, 2, 2)):
        assert torch.equal(sample(model, mask=MASK.expand(shape)), whole)
    assert torch.equal(sample(model, known=KNOWN.expand(16, *SHAPE), batch_size=3), whole)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"mask": None}, "known, mask: .* come together"),
        ({"known": None}, "known, mask: .* come together"),
        ({"mask": torch.ones(3, 2)}, r"mask: \(3, 2\) does not fit; use \(2, 2\)"),
        ({"mask": torch.ones(2, 1, 2, 2)}, r"mask: \(2, 1, 2, 2\) does not fit"),
        ({"mask": 255 * torch.ones(2, 2)}, "mask: expected values from 0"),
        ({"known": torch.zeros(1, 3, 3)}, r"known: expected \(16, 1, 2, 2\) or \(1, 2, 2\), got \(1, 3, 3\)"),
        ({"sampler": "rk45", "nfe": None}, "callback, trajectory, mask: rk45"),
    ],
    ids=["mask missing", "known missing", "size", "batch", "range", "known", "rk45"],
)
def test_bad_masks(model, given, words):
    with pytest.raises(ValueError, match=words):
        sample(model, **given)
