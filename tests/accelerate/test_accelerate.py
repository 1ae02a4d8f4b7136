"""What accelerate refuses and leaves, what is kept of weights, and training in several processes."""

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from foreign_models import TOLERANCE, far
from torch import nn

import fastdiff
from fastdiff.accelerate.derived import _KEPT, derived
from fastdiff.accelerate.layers import has_packed


def small(norm=None, act=None):
    torch.manual_seed(0)
    return nn.Sequential(norm or nn.GroupNorm(2, 16), act or nn.SiLU(), nn.Conv2d(16, 16, 3, padding=1))


def test_not_a_module():
    for bad in (torch.zeros(3), "unet", None, small):
        with pytest.raises(TypeError, match=r"module: expected a torch\.nn\.Module"):
            fastdiff.accelerate(bad)
        with pytest.raises(TypeError, match=r"module: expected a torch\.nn\.Module"):
            fastdiff.restore(bad)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled_and_scripted():
    with pytest.raises(TypeError, match="compiled; call accelerate first"):
        fastdiff.accelerate(torch.compile(small()))
    inside = small()
    inside[2].compile()
    with pytest.raises(TypeError, match=r"2 \(Conv2d\) is compiled"):
        fastdiff.accelerate(inside)
    with pytest.raises(TypeError, match="scripted"):
        fastdiff.accelerate(torch.jit.trace(small(), torch.zeros(1, 16, 4, 4)))


def test_several_devices():
    module = small()
    module[2].to("meta")
    with pytest.raises(ValueError, match="several devices, cpu, meta"):
        fastdiff.accelerate(module)


def test_nothing_to_replace():
    """A patch that replaces nothing fails, and changes nothing."""
    for module in (nn.Linear(3, 3), nn.Sequential(nn.BatchNorm2d(4), nn.SiLU()), small(Scaled(2, 16))[:2]):
        kinds = [type(m) for m in module.modules()]
        with pytest.raises(ValueError, match="no GroupNorm, attention block or 3x3 convolution that can be replaced"):
            fastdiff.accelerate(module)
        assert [type(m) for m in module.modules()] == kinds


class Scaled(nn.GroupNorm):
    def forward(self, x):
        return super().forward(x) * 2


class Renamed(nn.GroupNorm):
    """A subclass that computes what GroupNorm does."""


def hooked():
    norm = nn.GroupNorm(2, 16)
    norm.register_forward_hook(lambda m, args, y: y + 1)
    return norm


def replaced_on_the_instance():
    norm = nn.GroupNorm(2, 16)
    norm.forward = lambda x: x * 3
    return norm


LEFT = {
    "forward of its own": lambda: Scaled(2, 16),
    "hooks": hooked,
    "affine=False": lambda: nn.GroupNorm(2, 16, affine=False),
    "no plain parameter": lambda: nn.utils.parametrizations.weight_norm(nn.GroupNorm(2, 16), dim=None),
}


@pytest.mark.parametrize("reason", LEFT)
def test_norms_that_are_left(reason):
    left, x = LEFT[reason](), torch.randn(2, 16, 6, 6)
    module = nn.Sequential(small(), left, nn.SiLU())
    expected = module(x)
    report = fastdiff.accelerate(module)
    assert [(entry.name, reason in entry.reason) for entry in report.left] == [("1", True)]
    assert report.counts["group_norm_silu"] == 1
    assert far(module(x), expected) <= TOLERANCE


def test_a_replaced_forward_stays():
    module, x = nn.Sequential(small(), replaced_on_the_instance(), nn.SiLU()), torch.randn(2, 16, 6, 6)
    expected = module(x)
    assert [entry.name for entry in fastdiff.accelerate(module).left] == ["1"]
    assert far(module(x), expected) <= TOLERANCE


def test_a_subclass_without_a_forward():
    module, x = small(Renamed(2, 16)), torch.randn(2, 16, 6, 6)
    expected = module(x)
    assert fastdiff.accelerate(module).counts["group_norm_silu"] == 1
    assert isinstance(module[0], Renamed)
    assert far(module(x), expected) <= TOLERANCE
    fastdiff.restore(module)
    assert type(module[0]) is Renamed


def test_hooks_added_afterwards():
    module, x, seen = small(), torch.randn(2, 16, 6, 6), []
    expected = module(x)
    fastdiff.accelerate(module)
    module[0].register_forward_hook(lambda m, args, y: seen.append(y))
    assert far(module(x), expected) <= TOLERANCE
    assert far(seen[0], nn.functional.group_norm(x, 2, module[0].weight, module[0].bias)) <= TOLERANCE


def test_report_reads_well():
    module = nn.Sequential(small(), Scaled(2, 16))
    report = fastdiff.accelerate(module)
    lines = str(report).splitlines()
    assert lines[0] == "replaced:" and lines[1].split() == ["1", "x", "group_norm_silu:", "0.0"]
    assert lines[-2] == "left:" and "Scaled is a GroupNorm with a forward of its own: 1" in lines[-1]


def test_functional_transforms():
    module, x = nn.Sequential(nn.GroupNorm(2, 16), nn.SiLU(), nn.Conv2d(16, 8, 3, padding=1)), torch.randn(2, 16, 6, 6)
    parameters = dict(module.named_parameters())

    def loss(p):
        return torch.func.functional_call(module, p, (x,)).square().mean()

    expected = torch.func.grad(loss)(parameters)
    _, tangent = torch.func.jvp(loss, (parameters,), (parameters,))
    fastdiff.accelerate(module)
    got = torch.func.grad(loss)(parameters)
    assert all(far(got[n], expected[n]) <= TOLERANCE for n in expected)
    with torch.no_grad():  # weights that have no memory to remember
        assert far(torch.func.jvp(loss, (parameters,), (parameters,))[1], tangent) <= TOLERANCE
    assert far(torch.func.jvp(loss, (parameters,), (parameters,))[1], tangent) <= TOLERANCE


def in_place_step(m):
    with torch.no_grad():
        m.weight.mul_(1.5)


def of_one_element(m):
    with torch.no_grad():
        m.weight[3, 1, 2, 0] += 1


def optimiser_step(m):
    m.weight.grad = torch.ones_like(m.weight)
    torch.optim.SGD([m.weight], lr=0.1).step()


def data_swapped(m):
    m.weight.data = m.weight.data * 2


def data_in_place(m):
    m.weight.data.mul_(0.5)  # averages and old optimisers: autograd's version does not count it


def data_swapped_twice(m):
    m.weight.data = m.weight.data.clone()
    m.weight.data = m.weight.data * 2


def another_parameter(m):
    m.weight = nn.Parameter(m.weight.detach() + 1)


def loaded(m):
    m.load_state_dict({k: v + 0.25 for k, v in m.state_dict().items()})


def loaded_by_assignment(m):
    m.load_state_dict({k: v + 0.25 for k, v in m.state_dict().items()}, assign=True)


def to_and_back(m):
    m.to(torch.bfloat16).to(torch.float32)


def other_layout(m):
    m.to(memory_format=torch.channels_last)


CHANGES = [
    in_place_step, of_one_element, optimiser_step, data_swapped, data_in_place, data_swapped_twice, another_parameter,
    loaded, loaded_by_assignment, to_and_back, other_layout,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_what_is_kept_follows_the_weights(change):
    """Both the tensor that is kept and the module that uses it, and no new one while nothing changes."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.GroupNorm(2, 16), nn.SiLU(), nn.Conv2d(16, 8, 3, padding=1))
    made, conv, x = [], module[2], torch.randn(1, 16, 12, 12)

    def make(weight):
        made.append(1)
        return weight * 1

    fastdiff.accelerate(module)
    with torch.no_grad():
        module(x)
        assert (conv in _KEPT) == has_packed()
        for _ in range(3):
            assert torch.equal(derived(module[1], (conv.weight,), make), conv.weight)
        assert len(made) == 1
        change(conv)
        assert torch.equal(derived(module[1], (conv.weight,), make), conv.weight)
        ours = module(x)
        fastdiff.restore(module)
        assert conv not in _KEPT and far(ours, module(x)) <= TOLERANCE


def test_what_is_kept_goes_with_the_module():
    module = small()
    before = len(_KEPT)
    derived(module, (module[2].weight,), lambda w: w * 1)
    assert len(_KEPT) == before + 1
    del module
    assert len(_KEPT) == before


def test_weights_without_a_version_are_not_kept():
    with torch.inference_mode():
        module = nn.Sequential(nn.GroupNorm(2, 16), nn.SiLU(), nn.Conv2d(16, 8, 3, padding=1))
        x = torch.randn(1, 16, 12, 12)
        expected = module(x)
        fastdiff.accelerate(module)
        assert far(module(x), expected) <= TOLERANCE
        module[2].weight.mul_(2), module[2].bias.mul_(2)
        assert far(module(x), 2 * expected) <= TOLERANCE


def distributed_step(rank, world, path, results):
    """One step of DDP on a share of the batch; the parameters of rank 0 in results."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=world)
    try:
        module = small()
        fastdiff.accelerate(module)
        parallel = nn.parallel.DistributedDataParallel(module)
        optimiser = torch.optim.SGD(parallel.parameters(), lr=0.1)
        parallel(images()[rank::world]).square().mean().backward()
        optimiser.step()
        if rank == 0:
            torch.save(module.state_dict(), results)
    finally:
        torch.distributed.destroy_process_group()


def images():
    return torch.linspace(-1, 1, 4 * 16 * 36).reshape(4, 16, 6, 6).sin()


def check_distributed(results):
    module = small()
    module(images()).square().mean().backward()
    torch.optim.SGD(module.parameters(), lr=0.1).step()
    for name, p in torch.load(results).items():
        assert far(p, module.state_dict()[name]) <= TOLERANCE, name


def test_distributed(tmp_path):
    distributed_step(0, 1, tmp_path / "store", tmp_path / "parameters.pt")
    check_distributed(tmp_path / "parameters.pt")


@pytest.mark.slow
def test_distributed_over_two_processes(tmp_path):
    here = Path(__file__).parent
    script = "import sys; sys.path[:0] = sys.argv[1:3]\nfrom test_accelerate import distributed_step\n"
    script += "distributed_step(int(sys.argv[3]), 2, *sys.argv[4:])"
    command = [sys.executable, "-c", script, str(here), str(here.parent.parent)]
    paths = [str(tmp_path / "store"), str(tmp_path / "parameters.pt")]
    started = [subprocess.Popen([*command, str(rank), *paths]) for rank in range(2)]
    assert [process.wait(timeout=300) for process in started] == [0, 0]
    check_distributed(tmp_path / "parameters.pt")


def test_data_parallel_wrapper_and_averages():
    """Wrapped before or averaged after: the layers are found inside, and an average of the model runs fused."""
    module, x = small(), torch.randn(2, 16, 6, 6)
    report = fastdiff.accelerate(nn.ModuleDict({"module": module}))
    assert report.replaced[0].name == "module.0"
    average = torch.optim.swa_utils.AveragedModel(module)
    average.update_parameters(module)
    assert far(average(x), module(x)) <= TOLERANCE
    assert fastdiff.restore(average) and fastdiff.accelerate(copy.deepcopy(module)).counts
