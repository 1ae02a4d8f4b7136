"""The CUDA C++ kernels as nvcc makes them for sm_80, sm_90 and sm_100: the same rules as for Triton's."""

import re
import subprocess
from pathlib import Path

import cuda_sources
import machine_code
import pytest
from ahead_cases import declared

SOURCES = cuda_sources.SOURCES


@pytest.fixture(scope="module", params=SOURCES, ids=lambda path: path.stem)
def source(request):
    if reason := cuda_sources.why_not():
        pytest.skip(reason)
    return request.param


@pytest.fixture(scope="module")
def facts(source, tmp_path_factory):
    return cuda_sources.facts(source, tmp_path_factory.mktemp(source.stem))


def where(fact):
    return f"{fact['kernel']} ({fact['function']}), sm_{fact['architecture']}"


def test_every_kernel_for_every_architecture(source, facts):
    listed = set(cuda_sources.kernel_names(source))
    for architecture in {f["architecture"] for f in facts}:
        assert {f["kernel"] for f in facts if f["architecture"] == architecture} == listed
    assert {f["architecture"] for f in facts} == set(cuda_sources.architectures())


def test_no_spills(facts):
    for f in facts:
        assert f["local"] == 0 and f["stack"] == 0 and not machine_code.spills(f["sass"]), where(f)


def test_dependent_launches_wait_first(facts):
    """ACQBULK is griddepcontrol.wait, PREEXIT launch_dependents."""
    for f in facts:
        ops = machine_code.operations(f["sass"])
        assert ops.count("ACQBULK") == ops.count("PREEXIT") == (f["architecture"] >= 90), where(f)
        assert f["architecture"] < 90 or not machine_code.unguarded(f["sass"]), where(f)


def test_wide_accesses(source, facts):
    narrow = declared("NARROW").get(source.stem, {})
    for f in facts:
        for word in machine_code.ACCESSES:
            if f"{f['kernel']} {word}" not in narrow:
                assert machine_code.is_wide(f["sass"], word), (where(f), word)


def test_noise_is_not_contracted_or_approximated(source, facts, tmp_path):
    noisy = [f for f in facts if machine_code.makes_noise(f["sass"])]
    assert bool(noisy) == declared("NOISE").get(source.stem, False)
    for f in noisy:
        assert not machine_code.contractions(f["sass"]), where(f)
    if not noisy:
        return
    # Without the build's --fmad=false: the source alone has to be enough. Noise is float32: exp in float64 may contract.
    ptx = Path(tmp_path, "noise.ptx")
    subprocess.run([*cuda_sources.command(), "-arch=compute_90", "-ptx", source, "-o", ptx], check=True)
    text = ptx.read_text()
    assert not re.findall(r"fma\.rn\.f32|\.approx|\.ftz|mad\.f32", text)
    assert "sqrt.rn.f32" in text
