"""Marks: `gpu` tests run where there is a CUDA device and are skipped, with that reason, where there is none.

Without a CUDA device Triton's kernels are interpreted. Triton reads that choice when a kernel is decorated, so it is made
here, before anything imports one; what needs the compiler instead runs in a process of its own (see aot.py).
"""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# decoded images are kept away from the user's cache
os.environ["CIPS_CACHE"] = tempfile.mkdtemp(prefix="cips-cache-")
atexit.register(shutil.rmtree, os.environ["CIPS_CACHE"], ignore_errors=True)

torch.set_num_threads(min(2, torch.get_num_threads()))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture
def served(request: pytest.FixtureRequest) -> None:
    """Skips a `gpu` test with the `cuda` backend's own reason where the device is not one of csrc's."""
    from cips_kernels import cuda

    if torch.cuda.is_available() and "gpu" in request.keywords:
        ok, reason = cuda.available()
        if not ok:
            pytest.skip(reason)
