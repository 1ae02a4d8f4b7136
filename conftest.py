"""`pytest` alone runs the tests in as many processes as there are cores, one thread each; `pytest -n 0` in one process."""

import os

import pytest

MOST = 8  # processes; each holds torch and some data, about a gigabyte

WORKER = "PYTEST_XDIST_WORKER" in os.environ
if WORKER:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is imported


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config):
    everything = config.args_source is config.ArgsSource.TESTPATHS
    if everything and not WORKER and getattr(config.option, "numprocesses", 0) is None and not config.option.usepdb:
        config.option.numprocesses, config.option.dist = min(os.cpu_count() or 1, MOST), "loadfile"
