"""``numbabn bench --device cuda`` on a real GPU, and its clock."""

import json
import math
import time

import numpy as np
import pytest

from numbabn.cli import bench, main

pytestmark = pytest.mark.gpu


@pytest.fixture
def cuda():
    pytest.importorskip("numba_cuda")
    from numba import cuda

    if not cuda.is_available():
        pytest.skip("no GPU for Numba")
    return cuda


def run_bench(tmp_path, *arguments):
    file = tmp_path / "bench.json"
    assert main(["bench", *arguments, "--device", "cuda", "--json", str(file)]) == 0
    return json.loads(file.read_text(encoding="utf-8"))


def check_times(timing, *, least=0.0):
    assert least < timing["least"] <= timing["median"] <= timing["most"] < 1
    assert timing["disturbed"] == 0, "the device has waited for the host"


def test_bench(cuda, tmp_path):
    document = run_bench(
        tmp_path, "quick", "--repeats", "3", "--dtype", "float32,bfloat16",
        "--plot", str(tmp_path / "bench.png"),
    )  # fmt: skip
    assert {case["op"] for case in document["cases"]} == set(bench.OPS)
    for case in document["cases"]:
        assert case["check"]["problem"] is None
        check_times(case["seconds"])
        for timing in case["limits"].values():
            check_times(timing)
        assert 0.05 < case["fraction_of_limit"] < 2
    assert document["environment"]["gpu"]["name"] == cuda.get_current_device().name
    assert document["environment"]["gpu"]["l2_bytes"] > 0


def test_against_torch(cuda, tmp_path):
    if not pytest.importorskip("torch").cuda.is_available():
        pytest.skip("no GPU for PyTorch")
    document = run_bench(
        tmp_path, "32x64x56x56", "4096x1024", "--repeats", "3", "--against", "torch",
        "--dtype", "float32,float16,bfloat16", "--layout", "nchw,nhwc,nc",
    )  # fmt: skip
    for case in document["cases"]:
        peer = case["peers"]["torch"]
        assert peer["reason"] is None
        assert "native" in peer["seconds"]
        for timing in peer["seconds"].values():
            check_times(timing)


def test_the_clock_tells_device_time(cuda):
    """Two copies take twice as long as one, however long the host takes to enqueue them."""
    from numbabn.cli.bench.devices.cuda_clock import CudaClock

    clock, stream = CudaClock(), cuda.legacy_default_stream()
    x, y = (cuda.to_device(np.zeros(1 << 25, np.float32)) for _ in range(2))

    def copy():
        y.copy_to_device(x, stream=stream)

    def twice():
        copy()
        time.sleep(1e-3)
        copy()

    samples = [[clock.time(call, 5) for call in (copy, twice)] for _ in range(5)]
    assert not any(sample.disturbed for pair in samples for sample in pair)
    once, both = (min(pair[k].seconds for pair in samples) for k in range(2))
    assert math.isclose(both, 2 * once, rel_tol=0.1)


def test_a_host_that_takes_too_long_is_noticed(cuda):
    from numbabn.cli.bench.devices.cuda_clock import CudaClock

    assert CudaClock().time(lambda: time.sleep(2), 1).disturbed
    assert CudaClock().time(cuda.synchronize, 1).disturbed
    assert not CudaClock().time(lambda: None, 1).disturbed
