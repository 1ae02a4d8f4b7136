"""EDM's VP and iDDPM preconditioners, of which there are no recordings: D written out after Karras 2022, table 1.

F is the raw network, which the recordings hold (test_recorded.py); its weights do not depend on the preconditioner.
"""

import math

import numpy as np
import pytest
import torch
from recorded_networks import error

import fastdiff

SIGMAS = (0.003, 0.1, 1.0, 7.0, 80.0)
LIMIT = 1e-5


@pytest.mark.parametrize(("beta_d", "beta_min", "M"), [(19.9, 0.1, 1000), (7.0, 0.3, 200)])
def test_vp(case, beta_d, beta_min, M):
    """D = x - s F(x / sqrt(1 + s^2), (M - 1) t), t = (sqrt(beta_min^2 + 2 beta_d ln(1 + s^2)) - beta_min) / beta_d."""
    data = case("edm_ddpmpp_uncond")
    changes = {"beta_d": beta_d, "beta_min": beta_min, "M": M, "epsilon_t": 1e-5}
    model = fastdiff.from_state_dict(data.weights, "edm", "VPPrecond", **(data.constructor | changes))
    x = data.io["x"][1]
    for s in SIGMAS:
        t = (math.sqrt(beta_min**2 + 2 * beta_d * math.log1p(s**2)) - beta_min) / beta_d
        F = model.net(x / math.sqrt(1 + s**2), (M - 1) * t)
        assert error(model.denoise(x, s), x - s * F) <= LIMIT
    high = math.sqrt(math.expm1(beta_d / 2 + beta_min))
    assert math.isclose(model.schedule.t_max, high, rel_tol=1e-12)


def test_iddpm(case):
    """D = x - s F(x / sqrt(1 + s^2), M - 1 - j)[:, :3], j the nearest of the levels u_j, as its code finds them."""
    data = case("edm_adm_cond")
    state = dict(data.weights)
    for name in ("model.out_conv.weight", "model.out_conv.bias"):  # as many channels again, of the variance
        state[name] = torch.cat((state[name].float(), torch.full_like(state[name].float(), 3.0)))
    model = fastdiff.from_state_dict(state, "edm", "iDDPMPrecond", **data.constructor)
    x, labels = data.io["x"][1], data.io["class_labels"]
    M, C_1, C_2 = 1000, 0.001, 0.008
    u = np.zeros(M + 1)
    alpha_bar = np.sin(0.5 * np.pi * np.arange(M + 1) / M / (C_2 + 1)) ** 2
    for j in range(M, 0, -1):
        u[j - 1] = math.sqrt((u[j] ** 2 + 1) / max(alpha_bar[j - 1] / alpha_bar[j], C_1) - 1)
    for s in SIGMAS:
        F = model.net(x / math.sqrt(1 + s**2), float(M - 1 - np.abs(s - u).argmin()), labels)
        assert F.shape[1] == 6
        assert error(model.denoise(x, s, labels), x - s * F[:, :3]) <= LIMIT
    assert model.prediction.learned_variance and math.isclose(model.schedule.t_max, u[0], rel_tol=1e-6)


def test_ve(case):
    """D = x + s F(x, ln(s / 2)); recorded too."""
    model, x = case("edm_ncsnpp_ve").model(), case("edm_ncsnpp_ve").io["x"][1]
    for s in SIGMAS:
        assert error(model.denoise(x, s), x + s * model.net(x, math.log(s / 2))) <= LIMIT


@pytest.mark.parametrize(("name", "value"), [("M", 500), ("C_1", 0.01), ("C_2", 0.01)])
def test_other_iddpm(case, name, value):
    data = case("edm_adm_cond")
    with pytest.raises(fastdiff.CheckpointError, match=f"iDDPMPrecond is read with .*{name}"):
        fastdiff.from_state_dict(data.weights, "edm", "iDDPMPrecond", **(data.constructor | {name: value}))
