"""Every Triton kernel compiled ahead of time for 8.0, 9.0 and 10.0, with the arguments that the backend really passes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="this machine has no triton")

EVERY = {
    "counter_noise_kernel", "modulate_fwd_kernel", "modulate_bwd_kernel", "modulate_style_sum_kernel", "rgb_fwd_kernel",
    "rgb_sum_kernel", "rgb_wgrad_kernel", "rgb_wgrad_chain_kernel", "rgb_wgrad_chain_sum_kernel", "modfc_head_kernel",
    "noise_bwd_kernel", "counter_strength_kernel", "modfc_dgrad_input_kernel", "modfc_fwd_kernel", "modfc_dgrad_kernel",
    "modfc_wgrad_kernel", "blur_kernel", "blur_transposed_kernel", "bias_lrelu_kernel",
}  # fmt: skip
DESCRIPTORS = {
    "modfc_fwd_descriptor_kernel",
    "modfc_dgrad_descriptor_kernel",
    "modfc_wgrad_descriptor_kernel",
}

SHARED = {"8.0": 163 * 1024, "9.0": 227 * 1024, "10.0": 227 * 1024}  # bytes that a block may have


@pytest.fixture(scope="module", params=["8.0", "9.0", "10.0"])
def compiled(request: pytest.FixtureRequest) -> tuple[str, list[dict]]:
    """The kernels of a stack with aligned and with odd widths, as `tests/aot.py` reports them for one capability."""
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    run = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("aot.py")), request.param],
        env=environment, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    return request.param, json.loads(run.stdout.splitlines()[-1])


def test_every_kernel_compiles(compiled: tuple[str, list[dict]]) -> None:
    capability, kernels = compiled
    names = {kernel["name"] for kernel in kernels}
    assert names == (EVERY if capability == "8.0" else EVERY | DESCRIPTORS)
    assert {kernel["dtype"] for kernel in kernels} == {"bfloat16", "float16", "float32"}


def test_products_use_the_matrix_units(compiled: tuple[str, list[dict]]) -> None:
    capability, kernels = compiled
    instruction = {"8.0": "mma.sync", "9.0": "wgmma.mma_async", "10.0": "tcgen05.mma"}[capability]
    products = [
        k for k in kernels if k["name"] in DESCRIPTORS or (k["name"] == "modfc_fwd_kernel" and k["large"])
    ]
    assert products
    for kernel in products:
        if kernel["dtype"] != "float32":
            assert instruction in kernel["instructions"], kernel


def test_hopper_kernels_keep_to_registers(compiled: tuple[str, list[dict]]) -> None:
    capability, kernels = compiled
    if capability == "9.0":
        for kernel in kernels:
            if kernel["dtype"] != "float32" and kernel["large"]:
                # "sinrelu", which computes both branches, puts up to four registers away once a tile
                assert kernel["local_bytes"] <= (16 if kernel["sine"] else 0), kernel
        copies = [k for k in kernels if k["name"] in DESCRIPTORS]
        assert copies and all("cp.async.bulk.tensor" in k["instructions"] for k in copies)


def test_shared_memory_is_what_a_block_may_have(compiled: tuple[str, list[dict]]) -> None:
    capability, kernels = compiled
    for kernel in kernels:
        assert kernel["shared"] <= SHARED[capability], kernel
