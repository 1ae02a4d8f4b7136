"""A network's modules and tensors are those that PyTorch lists."""

from torch import nn

from fastdiff.modules import modules_of, tensors_of


def test_modules_and_tensors():
    shared = nn.Linear(2, 2, bias=False)
    network = nn.Sequential(shared, nn.ModuleDict({"a": shared, "b": nn.BatchNorm1d(2)}), nn.Sequential(nn.ReLU()))
    network.register_module("none", None)
    network[1]["b"].register_buffer("nothing", None)
    network[2].loop = nn.ModuleList([network[1]])
    found = modules_of(network)
    assert found[0] is network and len(found) == len(set(found))
    assert set(found) == set(network.modules())
    tensors = [*network.parameters(), *network.buffers()]
    assert sorted(map(id, tensors_of(found))) == sorted(map(id, tensors))
