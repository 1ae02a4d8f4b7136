"""Plans: tables, counting, the loop that executes them, and what samplers refuse. Values: tests/samplers."""

import math
import re

import numpy as np
import pytest
import torch

from fastdiff import Plan, Prediction, ops, samplers
from fastdiff.ops.denoise_step import C, K
from fastdiff.plan import Row, execute
from fastdiff.samplers import SAMPLERS
from fastdiff.schedules import DDPM, EDM, VE, VP, Flow, SubVP

EPS, F = Prediction("eps"), Prediction("edm")
T = DDPM()
CHAIN = {"analytic-ddpm", "fast-ddpm", "lcm", "san-roman", "watson"}  # which need a discrete chain
SDES = {"ancestral", "annealed-langevin", "euler-maruyama", "predictor-corrector", "reverse-diffusion"}
PAIRS = {"annealed-langevin", "predictor-corrector"}  # two evaluations in every step
FEWEST = {
    "annealed-langevin": 2,
    "predictor-corrector": 2,
    "pndm": 13,
    "restart": 9,
}  # pndm: three steps of four, one to the image
STATISTICS = {
    "analytic-ddpm": {"gamma": np.full(1000, 0.9)},
    "san-roman": {"level": lambda x: torch.full((len(x),), 0.5)},
    "watson": {"mse": np.linspace(0.1, 1, 1000)},
}


def some_nfe(name):
    return 10 if name in PAIRS else {"pndm": 17, "restart": 17}.get(name, 9)


def any_plan(name, nfe=None):
    """A plan of this sampler on a schedule that it takes."""
    schedule = T if name in CHAIN else VE() if name in SDES else EDM()
    nfe = some_nfe(name) if nfe is None else nfe
    return SAMPLERS[name](schedule, EPS if name in CHAIN else F, nfe, **STATISTICS.get(name, {}))


@pytest.mark.parametrize(
    ("plan", "nfe"),
    [
        (samplers.heun(EDM(), F, 35), 35),
        (samplers.heun(EDM(), F, 35, S_churn=40.0), 35),
        (samplers.heun(VP(), EPS, 1), 1),
        (samplers.ddim(DDPM(), EPS, 50), 50),
        (samplers.ddpm(DDPM(), EPS, 1000), 1000),
        (samplers.euler(EDM(), F, 7, S_churn=3.0), 7),
        (samplers.euler_maruyama(VE(), EPS, 20), 20),
        (samplers.consistency(EDM(), F, 2), 2),
        (samplers.reverse_sde(VE(), F, 40, corrector="ald", corrections=3), 40),
        *[(any_plan(name), some_nfe(name)) for name in SAMPLERS],
        (samplers.reverse_sde(VE(), F, 2000, corrector="langevin"), 2000),
    ],
    ids=lambda p: p.name if isinstance(p, Plan) else str(p),
)
def test_nfe_is_what_the_network_sees(plan, nfe):
    calls = []

    def net(x, c_noise):
        assert x.shape == (2, 1, 2, 2) and c_noise.shape == (2,) and c_noise.dtype == torch.float32
        calls.append(c_noise[0].item())
        return torch.zeros_like(x)

    rows = []
    with torch.inference_mode():
        execute(plan, net, ops.seed_tensor([0, 1]), (1, 2, 2), on_row=lambda i, x: rows.append(i))
    assert len(calls) == plan.nfe == nfe == len(plan.times)
    assert rows == list(range(len(plan.rows)))
    if plan.revise is None:
        c = plan.prediction.coefficients(plan.schedule, np.array(plan.times))
        np.testing.assert_allclose(calls, c.c_noise, rtol=1e-6)


@pytest.mark.parametrize("name", SAMPLERS)
def test_rows_join(name):
    """Each row starts where the one before ended, and the last row leaves no noise behind."""
    plan = any_plan(name)
    first = plan.schedule.t_max if name != "fast-ddpm" else plan.rows[0].t  # 8/9 of the chain with uniform spacing
    assert plan.rows[0].t == pytest.approx(plan.rows[0].t if name == "ddim" else first)
    assert plan.prior_std == pytest.approx(plan.schedule.sigma(plan.rows[0].t))
    for row, after in zip(plan.rows[:-1], plan.rows[1:], strict=True):
        assert row.to == pytest.approx(after.t)
        assert name == "restart" or row.to <= row.t * (1 + 1e-12)
    assert not plan.rows[-1].noise
    draws = [draw for row in plan.rows for draw in row.noise]
    if name == "dpm-solver++sde":  # both stages see one Brownian path
        assert draws[:6] == [0, 0, 1, 2, 2, 3]
    else:
        assert len(draws) == len(set(draws)), "a draw is used twice, which correlates steps"


def test_eps_rows_are_the_same_numbers():
    """A row in eps gives what one in D gives: the table's c_skip and c_out make (x - alpha D) / sigma of the output."""
    x, out, t = 0.7, -0.3, 0.4
    for schedule, prediction in ((EDM(), F), (VP(), EPS), (VP(), Prediction("v"))):
        rows = tuple(Row(t, 0.1, x=1.0, d=1.0, estimate=e) for e in ("x0", "eps"))
        d, eps = (
            (p[0, [C.SKIP, C.OUT]] * (x, out)).sum()
            for p in (Plan("one", (r,), schedule, prediction, 1.0).tables()[0] for r in rows)
        )
        assert eps == pytest.approx((x - float(schedule.alpha(t)) * d) / float(schedule.sigma(t)), rel=1e-12)


def test_tables():
    """Columns of the table are the row's numbers; NEXT_IN is the c_in of the next evaluation."""
    rows = (
        Row(80.0, 90.0, evaluate=False, x=1.0, noise={7: 0.5, 9: 0.25}),
        Row(90.0, 1.0, x=0.1, d=0.9, save_x=True, save_d=2, save_clipped=True),
        Row(1.0, 0.5, saved=0.3, d_clip=0.7, history={2: -0.4}),
    )
    plan = Plan("test", rows, EDM(sigma_max=100.0), F, 80.0)
    table, codes = plan.tables()
    assert table.dtype == np.float64 and codes.dtype == np.int32
    assert plan.nfe == 2 and plan.slots == 3 and plan.saves and plan.first_input() == 1.0 and plan.times == [90.0, 1.0]
    assert table[0, [C.X, C.N1, C.N2]].tolist() == [1.0, 0.5, 0.25] and codes[0, [K.DRAW1, K.DRAW2]].tolist() == [7, 9]
    assert codes[:, K.SAVE_X].tolist() == [0, 1, 0] and codes[:, K.SAVE_D].tolist() == [-1, 2, -1]
    assert codes[:, K.SAVE_CLIPPED].tolist() == [0, 1, 0]
    assert table[2, [C.SAVED, C.D_CLIP, C.H2, C.D]].tolist() == [0.3, 0.7, -0.4, 0.0]
    for i, t in ((1, 90.0), (2, 1.0)):
        c = F.coefficients(EDM(), t)
        np.testing.assert_allclose(table[i, [C.SKIP, C.OUT, C.NOISE]], [c.c_skip, c.c_out, c.c_noise])
        assert table[i - 1, C.NEXT_IN] == c.c_in
    assert table[2, C.NEXT_IN] == 0.0


def test_row_limits():
    for bad in ({"noise": {0: 1.0, 1: 1.0, 2: 1.0}}, {"history": {4: 1.0}}):
        with pytest.raises(ValueError, match="at most two noise terms and history slots"):
            Row(1.0, 0.5, **bad)


def test_network_input():
    """net_in is c_in x in the network's dtype, channels-last, and labels come along."""
    plan = samplers.consistency(EDM(), F, 2, times=[80.0, 0.8])
    seen = []

    def net(x, c_noise, labels):
        seen.append((x.clone(), labels))
        assert x.dtype == torch.bfloat16 and x.is_contiguous(memory_format=torch.channels_last)
        return torch.zeros_like(x)

    seeds, labels = ops.seed_tensor([3, 4]), torch.tensor([1, 2])
    with torch.inference_mode():
        out = execute(plan, net, seeds, (3, 4, 4), labels, dtype=torch.bfloat16)
    z = ops.philox_normal(seeds, 0, (3, 4, 4))
    x = 80 * z
    assert torch.equal(seen[0][0], (x * float(F.coefficients(EDM(), 80.0).c_in)).bfloat16()) and seen[0][1] is labels
    # F = 0: D = c_skip x, then noise 0.8 z of draw 0
    c80, c08 = (F.coefficients(EDM(), t) for t in (80.0, 0.8))
    x = float(c80.c_skip) * x + 0.8 * ops.philox_normal(seeds, 0, (3, 4, 4), domain=ops.Domain.STEP)
    # half a unit in bfloat16's last place at |x| <= 4, and x is off by float32 rounding
    torch.testing.assert_close(seen[1][0].float(), float(c08.c_in) * x, rtol=2**-8, atol=1e-6)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, float(c08.c_skip) * x, rtol=1e-6, atol=1e-6)


def test_given_start():
    """x_T takes the place of the seeds' initial noise, and is unit noise like it."""
    plan, seeds = samplers.euler(EDM(), F, 3), ops.seed_tensor([11, 12])
    z = ops.philox_normal(seeds, 0, (1, 2, 3))
    with torch.inference_mode():
        own, given, other = (
            execute(plan, lambda x, c: torch.tanh(x), seeds, (1, 2, 3), x_T=x_T) for x_T in (None, z.double(), 2 * z)
        )
    assert torch.equal(own, given) and not torch.equal(own, other)


def test_describe():
    assert samplers.consistency(EDM(), F, 1).describe() == "consistency, 1 evaluation at t = 80"
    assert samplers.heun(EDM(), F, 35).describe().startswith("heun, 35 evaluations at t = 80, 57.59, 57.59, 40.79")


@pytest.mark.parametrize("nfe", [0, -3])
@pytest.mark.parametrize("name", SAMPLERS)
def test_no_evaluations(name, nfe):
    words = f"nfe: {nfe} evaluations make no image; the fewest that {name} can do is {FEWEST.get(name, 1)}"
    with pytest.raises(ValueError, match=re.escape(words)):
        any_plan(name, nfe)


@pytest.mark.parametrize("name", SAMPLERS)
def test_fewest_evaluations(name):
    fewest = FEWEST.get(name, 1) + 2 * (name == "restart")  # with 9 its grid has no level to restart from
    assert any_plan(name, fewest).nfe == fewest


@pytest.mark.parametrize("nfe", [2.5, 2.0, "2", None, True])
@pytest.mark.parametrize("name", SAMPLERS)
def test_no_integer(name, nfe):
    with pytest.raises(TypeError, match=f"nfe: {nfe!r} is no integer"):
        any_plan(name, nfe) if nfe is not None else SAMPLERS[name](VP(), EPS, None)


@pytest.mark.parametrize("name", SAMPLERS)
def test_numpy_integers_count(name):
    assert any_plan(name, np.int64(18 if name in PAIRS else 17)).nfe in (17, 18)


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: samplers.heun(EDM(), F, 18), ValueError, "not 18; the nearest are 17 and 19"),
        (lambda: samplers.ddim(T, EPS, 1001), ValueError, "ddim can do at most 1000 evaluations.*not 1001; use 1000"),
        (lambda: samplers.ddpm(T, EPS, 5000), ValueError, "ddpm can do at most 1000 evaluations"),
        (lambda: samplers.ddim(T, EPS, 900, spacing="quadratic"), ValueError, "distinct times, not 900; use less"),
        (lambda: samplers.ddim(T, EPS, 9, spacing="log"), ValueError, "spacing: 'log' is not known"),
        (lambda: samplers.ddim(T, EPS, 9, eta=1.5), ValueError, "eta: 1.5 is out of range; use 0"),
        (lambda: samplers.ddpm(T, EPS, 9, variance="huge"), ValueError, "variance: 'huge' is not known"),
        (lambda: samplers.ddim(T, EPS, 2, times=[10, 900]), ValueError, "times: .* do not strictly descend"),
        (lambda: samplers.ddim(T, EPS, 2, times=[900.0]), ValueError, "times: 1 given for nfe = 2; give exactly 2"),
        (lambda: samplers.ddim(T, EPS, 2, times=900.0), ValueError, "times: 1 given for nfe = 2; give exactly 2"),
        (
            lambda: samplers.consistency(EDM(), F, 2, times=[80.0, 0.001]),
            ValueError,
            "times: 0.001 lies outside EDM's range",
        ),
        (lambda: samplers.consistency(EDM(), F, 2, times=[80.0, math.nan]), ValueError, "times: nan lies outside"),
        (lambda: samplers.euler_maruyama(EDM(), F, 9), ValueError, "EDM has no SDE here; use VP, SubVP or VE"),
        (
            lambda: samplers.reverse_sde(VP(), EPS, 19),
            ValueError,
            "in 19 steps would have betas beyond 1; use 20 or more",
        ),
        (
            lambda: samplers.reverse_sde(VP(), EPS, 20, predictor="ancestral"),
            ValueError,
            "in 20 steps would have betas beyond 1; use 21 or more",
        ),
        (
            lambda: samplers.reverse_sde(VP(), EPS, 7, corrector="ald"),
            ValueError,
            "2 evaluations in each step, not 7; use a mult",
        ),
        (lambda: samplers.reverse_sde(VE(), EPS, 8, corrector="mala"), ValueError, "corrector: 'mala' is not known"),
        (lambda: samplers.reverse_sde(VE(), EPS, 8, norms="all"), ValueError, "norms: 'all' is not known; use 'sample'"),
        (
            lambda: samplers.reverse_sde(SubVP(), EPS, 80, predictor="ancestral"),
            ValueError,
            "use reverse-diffusion for SubVP",
        ),
        (lambda: samplers.unipc(VP(), EPS, 8, order=4), ValueError, "order: 4 is not known; use 1, 2 or 3"),
        (
            lambda: samplers.unipc(VP(), EPS, 8, estimate="eps", clip=True),
            ValueError,
            "clip: unipc combines estimates of the noise",
        ),
        (lambda: samplers.lms(VP(), EPS, 8, order=5), ValueError, "order: 5 is not known; use 1, 2, 3 or 4"),
        (
            lambda: samplers.dpm_solver_multi(VP(), EPS, 8, estimate="eps", eta=1.0),
            ValueError,
            "eta: noise is added to DPM-Sol",
        ),
        (lambda: samplers.dpm_solver_single(VP(), EPS, 8, inner="linear"), ValueError, "inner: 'linear' is not known"),
        (
            lambda: samplers.dpm_solver_single(VP(), EPS, 9, lower_order_final=False),
            ValueError,
            r"steps of order 3 alone make 3 N \+ 1 evaluations, not 9",
        ),
        (
            lambda: samplers.midpoint(EDM(), F, 9, mean="harmonic"),
            ValueError,
            "mean: 'harmonic' is not known; use one of arith",
        ),
        (lambda: samplers.midpoint(EDM(), F, 9, mean="cubic"), ValueError, "midpoint makes 2 N evaluations .* not 9"),
        (lambda: samplers.heun(EDM(), F, 9, to_zero=False), ValueError, "heun makes 2 N evaluations in N steps, not 9"),
        (lambda: samplers.euler(EDM(), F, 9, variable="sigma"), ValueError, "variable: 'sigma' is not known"),
        (lambda: samplers.euler(Flow(), F, 9, variable="time"), ValueError, "Flow has no SDE here"),
        (lambda: samplers.euler(Flow(t_max=1.0), EPS, 2, times=[1.0, 0.5]), ValueError, "alpha is 0 at t = 1.0.*use ddim"),
        (lambda: samplers.restart(EDM(), F, 44), ValueError, r"makes 8 \+ 2 N - 1 evaluations, not 44"),
        (lambda: samplers.restart(EDM(), F, 43, intervals=((0.2, 0.1, 2, 1),)), ValueError, "need 0 < low < high"),
        (lambda: samplers.ddpm(T, EPS, 25, sections=(10, 8, 8)), ValueError, "times: 26 given for nfe = 25"),
        (lambda: samplers.ddpm(VP(), EPS, 9, sections=(9,)), ValueError, "sections: VP has no discrete steps"),
        (lambda: samplers.fast_ddpm(VP(), EPS, 9), ValueError, "FastDPM shortens a DDPM chain, not VP"),
        (lambda: samplers.watson(T, EPS, 9), ValueError, "mse: .* needed at each of the 1000 steps"),
        (lambda: samplers.lcm(EDM(), F, 4), ValueError, "LCM's times are steps of a DDPM chain, not of EDM; give times"),
        (lambda: samplers.euler_ancestral(EDM(), F, 4, eta=-1.0), ValueError, "eta: -1.0 is negative"),
        (lambda: samplers.heun(Flow(t_max=1.0), F, 9), ValueError, "ratio_min, ratio_max: .* from inf .*ratio_max=80"),
        (lambda: samplers.euler(EDM(), F, 9, ratio_max=0.001), ValueError, "ratio_min, ratio_max: .* 0.001 to 0.002"),
    ],
)
@pytest.mark.filterwarnings("ignore:divide by zero")
def test_refused(make, error, words):
    with pytest.raises(error, match=words):
        make()


def test_pure_noise_start():
    """From alpha = 0 exactly, DDIM works with networks that can (v, flow): Lin et al. 2023's zero terminal SNR."""
    schedule = Flow(t_max=1.0)
    x0 = 0.4

    def net(x, t):  # the exact flow velocity of a single image: F = (x - x0) / t
        return (x - x0) / t.reshape(-1, 1, 1, 1)

    plan = samplers.ddim(schedule, Prediction("flow", raw=True), 4)
    with torch.inference_mode():
        out = execute(plan, net, ops.seed_tensor(range(3)), (1, 4, 4))
    torch.testing.assert_close(out, torch.full_like(out, x0), rtol=0, atol=1e-6)
