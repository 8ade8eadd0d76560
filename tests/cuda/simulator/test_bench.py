"""``numbabn bench --device cuda`` from end to end, but for its clock: nothing tells time here."""

import json

import ml_dtypes
import numba.cuda
import numpy as np
import pytest
from numba.cuda.simulator.cudadrv.devices import FakeCUDADevice

from numbabn.cli import bench, main
from numbabn.cli.bench.arrays import make
from numbabn.cli.bench.cases import Case
from numbabn.cli.bench.devices import cuda, cuda_clock, cuda_limits
from numbabn.cli.bench.sampling import Sample

FACTS = {"name": "a simulated GPU", "MULTIPROCESSOR_COUNT": 3, "L2_CACHE_SIZE": 1 << 10}


class Clock:
    """One on which every call takes a millisecond, and each third is disturbed."""

    least, most = 4e-4, 96

    def __init__(self):
        self.samples = 0

    def time(self, call, calls):
        for _ in range(calls):
            call()
        self.samples += 1
        return Sample(1e-3, self.samples % 3 == 0)


@pytest.fixture(autouse=True)
def device(monkeypatch):
    for name, value in FACTS.items():
        monkeypatch.setattr(FakeCUDADevice, name, value, raising=False)
    monkeypatch.setattr(cuda, "CudaClock", Clock)
    return cuda.CUDA()


def run_bench(tmp_path, *arguments, code=0):
    file = tmp_path / "bench.json"
    assert main(["bench", *arguments, "--device", "cuda", "--json", str(file)]) == code
    return json.loads(file.read_text(encoding="utf-8"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bench(tmp_path, capsys, dtype):
    document = run_bench(
        tmp_path, "4x3x2x4", "10x4", "--op", "forward,inference,backward,add_relu",
        "--layout", "nhwc,nc", "--dtype", dtype, "--repeats", "2",
        "--plot", str(tmp_path / "bench.png"),
    )  # fmt: skip
    out = capsys.readouterr().out
    for line in (
        "8 of 8 cases agree with the float64 oracle", "by CUDA events",
        "Device time on a simulated GPU (compute capability 5.2, 3 multiprocessors",
    ):  # fmt: skip
        assert line in " ".join(out.split())
    assert len(document["cases"]) == 8
    for case in document["cases"]:
        assert case["check"] == {**case["check"], "problem": None}
        assert case["seconds"]["median"] == 1e-3
        ways = {"kernel", "driver"} if case["op"] in ("forward", "inference") else {"kernel"}
        assert case["limits"].keys() == ways
    assert document["settings"]["device"] == "cuda"
    assert document["environment"]["gpu"]["name"] == "a simulated GPU"
    assert "CUDA events" in document["environment"]["notes"]["timed"]


def test_a_wrong_kernel_is_not_timed(tmp_path, capsys, monkeypatch):
    right = bench.calls.call_of

    def wrong(case, arrays):
        call = right(case, arrays)

        def slightly_wrong():
            result = call()
            arrays.out[1, 2] = 7
            return result

        return slightly_wrong

    monkeypatch.setattr(bench.measurement, "call_of", wrong)
    document = run_bench(tmp_path, "10x4", "--op", "inference", "--repeats", "1", code=1)
    (case,) = document["cases"]
    assert case["check"]["problem"].startswith("wrong: y is off by ")
    assert case["seconds"] is None


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_sets_are_the_same_and_lie_apart(device, dtype):
    case = Case("backward", "nchw", dtype, (4, 3, 5, 7))
    arrays = make(case)
    placed = device.place(arrays)
    assert len(placed) == cuda.sets_of(3 * case.nbytes, FACTS["L2_CACHE_SIZE"])
    addresses = {
        array.__array_interface__["data"][0]
        for each in placed
        for array in (each.x, each.other, each.out)
    }
    assert len(addresses) == 3 * len(placed)
    for each in placed:
        assert each.weight is placed[0].weight
        for name in ("x", "other", "weight", "mean"):
            got = getattr(each, name).copy_to_host()
            assert got.dtype == getattr(arrays, name).dtype
            np.testing.assert_array_equal(got, getattr(arrays, name))


@pytest.mark.parametrize("reads", [1, 2])
@pytest.mark.parametrize(
    ("size", "dtype"),
    [(1, "f4"), (7, ml_dtypes.bfloat16), (1024, "f8"), (1030, "f8"), (2100, "f8"), (515, "f2")],
)
def test_sweeps_move_everything(device, reads, size, dtype):
    rng = np.random.default_rng(0)
    dtype = np.dtype(dtype)
    bits = [rng.integers(0, 256, size * dtype.itemsize, dtype=np.uint8) for _ in range(2)]
    sources = [device.put(each.view(dtype)) for each in bits[:reads]]
    outs = [device.put(np.zeros(size, dtype)) for _ in range(2)]
    ways = cuda_limits.sweeps([(sources, out) for out in outs])
    assert ways.keys() == ({"kernel", "driver"} if reads == 1 else {"kernel"})
    expected = bits[0] if reads == 1 else bits[0] ^ bits[1]
    for call in ways.values():
        for out in outs:
            cuda.bits(out)[:] = 0
            call()
            np.testing.assert_array_equal(out.copy_to_host().view(np.uint8), expected)


class Timeline:
    """Stands in for the holding kernel and for events: notes the order, and when the gate opens."""

    def __init__(self, monkeypatch, late):
        self.order, self.late = [], late
        monkeypatch.setattr(cuda_clock, "_hold", self)
        monkeypatch.setattr(numba.cuda, "event", lambda timing: self)

    def __getitem__(self, configuration):
        return self.hold

    def hold(self, gate, looks):
        self.order.append("hold")
        self.gate = gate
        gate[1] = self.late

    def record(self, stream):
        self.order.append("record")
        assert not self.gate[0]

    def synchronize(self):
        self.order.append("synchronize")
        assert self.gate[0], "it would never end"

    def elapsed_time(self, end):
        return 6.0

    def call(self):
        self.order.append("call")
        assert not self.gate[0]


@pytest.mark.parametrize("late", [False, True])
def test_clock_holds_the_device_while_it_enqueues(monkeypatch, late):
    timeline = Timeline(monkeypatch, late)
    clock = cuda_clock.CudaClock()
    timeline.order.clear()
    assert clock.time(timeline.call, 3) == Sample(2e-3, late)
    assert timeline.order == ["hold", "record", "call", "call", "call", "record", "synchronize"]


def test_clock_lets_the_device_go_after_an_error(monkeypatch):
    timeline = Timeline(monkeypatch, late=False)
    clock = cuda_clock.CudaClock()

    def fail():
        raise RuntimeError("no such kernel")

    with pytest.raises(RuntimeError, match="no such kernel"):
        clock.time(fail, 3)
    assert timeline.gate[0]
