"""import fastdiff is cheap beyond torch: kernels, data sets and the command line load when they are used."""

import os
import subprocess
import sys

PROGRAM = """
import sys, time
import torch, numpy, safetensors.torch, tqdm, PIL.Image  # what it stands on
before, start = set(sys.modules), time.process_time()
import fastdiff
seconds, new = time.process_time() - start, set(sys.modules) - before
print(seconds, *sorted({name.split(".")[0] for name in new}))
"""


def test_import():
    process = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    seconds, *packages = process.stdout.split()
    assert not {"triton", "torchvision", "typer", "matplotlib"} & set(packages), packages
    # Processor time, so that a busy machine does not count; it takes about 0.1 s.
    assert float(seconds) < 1.0


def test_a_first_call_loads_no_compiler():
    """torch.compile's machinery takes two seconds to import, and is not needed to weigh a program's cost or to make one."""
    program = """
import sys, fastdiff
from fastdiff.compile import program
model = fastdiff.wrap(
    fastdiff.UNet(fastdiff.UNetConfig(resolution=8, channels=8, multipliers=(1,), blocks=1, groups=4, attention=())),
    schedule=fastdiff.schedules.DDPM(),
)
for light in (0, 1e9):
    program.LIGHT = light
    print(fastdiff.run(model, 2, seeds=[0]).engine.partition(":")[0])
print("torch._dynamo" in sys.modules)
"""
    given = {"capture_output": True, "text": True, "check": True, "env": os.environ | {"OMP_NUM_THREADS": "1"}}
    assert subprocess.run([sys.executable, "-c", program], **given).stdout.split() == ["network", "fast", "False"]
