import importlib
import io
import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numba
import numpy as np
import pytest
from matplotlib import rc_context
from matplotlib.colors import to_rgb
from matplotlib.image import imread
from rich.console import Console

import numbabn
from numbabn import reference
from numbabn.cli import bench, main
from numbabn.cli.bench import (
    devices,
    environment,
    figure,
    measurement,
    oracle,
    peers,
    report,
    results,
    suites,
)
from numbabn.cli.bench.arrays import EPS, make
from numbabn.cli.bench.cases import DTYPES, TRAFFIC, Case
from numbabn.cli.bench.devices import cpu_limits as limits
from numbabn.cli.bench.measurement import PeerResult, Result
from numbabn.cli.bench.oracle import Check
from numbabn.cli.bench.peers import worker
from numbabn.cli.bench.results import Results
from numbabn.cli.bench.sampling import LEAST, Sample, Sampler, Timing, WallClock, in_turn
from numbabn.cli.command import CommandError

ROOT = Path(numbabn.__file__).parents[1]


@pytest.fixture(autouse=True)
def _own_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)


def run_bench(*arguments, code=0):
    assert main(["bench", *arguments, "--json", "bench.json"]) == code
    with open("bench.json", encoding="utf-8") as file:
        return json.load(file)


def pixels(file, color):
    """Count those of a color."""
    picture = imread(file)[..., :3]
    assert picture.shape[1] == 1800
    return int((np.abs(picture - to_rgb(color)).max(axis=2) < 0.02).sum())


def timing(seconds, **others):
    return Timing(**(dict.fromkeys(
        ("least", "lower_quartile", "median", "upper_quartile", "most"), seconds
    ) | {"samples": 9, "disturbed": 0} | others))  # fmt: skip


# What to time.


def test_suites_are_those_of_the_networks():
    resnet = suites.choose(["resnet50"], ["forward"], None, ["float32"], 32)
    assert [case.name for case in resnet] == [
        "32x64x112x112", "32x64x56x56", "32x256x56x56", "32x128x28x28", "32x512x28x28",
        "32x256x14x14", "32x1024x14x14", "32x512x7x7", "32x2048x7x7",
    ]  # fmt: skip
    mlp = suites.choose(["mlp"], ["forward"], None, ["float32"], 8)
    assert [case.name for case in mlp] == ["128x1024", "4096x1024", "65536x64", "120000x512"]
    for name in "mobilenet", "inception":
        cases = suites.choose([name], ["forward"], ["nhwc"], ["float32"], 2)
        assert len(cases) == 12
        assert {case.shape[0] for case in cases} == {2}
        assert all(case.layout == "nhwc" and len(case.shape) == 4 for case in cases)
    quick = suites.choose(["quick"], ["forward"], None, ["float32"], 32)
    assert {case.layout for case in quick} == {"nchw", "nhwc", "nc"}


def test_cases_come_by_op_and_layout_each_once():
    cases = suites.choose(
        ["4x3x5x7,2x3x5,6x2", "6x2"], ["forward", "backward"], ["nhwc", "nc"], ["float64"], 32
    )
    assert [(case.op, case.layout, case.name, case.array_shape) for case in cases] == [
        (op, *rest)
        for op in ("forward", "backward")
        for rest in (
            ("nhwc", "4x3x5x7", (4, 5, 7, 3)),
            ("nhwc", "2x3x5", (2, 5, 3)),
            ("nc", "6x2", (6, 2)),
        )
    ]


@pytest.mark.parametrize("text", ["", "12", "0x3", "3x", "3x-1", "3x4.5", "3X4", "resnet"])
def test_what_is_no_shape(text):
    with pytest.raises(CommandError, match=f"expected a suite .* or a shape .*, got {text!r}"):
        suites.parse_shape(text)


@pytest.mark.parametrize("layout", ["nchw", "nhwc", "nc"])
def test_data_are_the_same_each_time(layout):
    case = Case("backward", layout, "float32", (50, 3) if layout == "nc" else (50, 3, 4, 5))
    arrays, again = make(case), make(case)
    assert arrays.x.shape == arrays.other.shape == arrays.out.shape == case.array_shape
    assert arrays.weight.shape == (case.channels,)
    np.testing.assert_array_equal(arrays.x, again.x)
    np.testing.assert_array_equal(arrays.other, again.other)
    assert (arrays.x != arrays.other).any()
    _, mean, m2 = reference.statistics(arrays.x, axis=case.axis)
    std = np.sqrt(m2 / (arrays.x.size // 3))
    assert (np.abs(mean - arrays.mean) < std).all()
    assert (np.abs(std * arrays.invstd - 1) < 0.5).all()


# The arithmetic of the table.


def test_fraction_speed_and_ratio():
    case = Case("backward", "nc", "float64", (1000, 500))
    result = Result(
        case,
        Check(500, {}, None),
        timing(4e-3),
        {"plain": timing(3e-3), "non-temporal": timing(2e-3)},
        {"torch": PeerResult({"fresh": timing(9e-3), "out=": timing(6e-3)}), "jax": PeerResult()},
    )
    assert case.traffic == 3 * 8 * 500_000
    assert result.gigabytes_per_second == pytest.approx(3.0)
    assert result.limit == "non-temporal"
    assert result.fraction == pytest.approx(0.5)
    assert result.ratio("torch") == pytest.approx(1.5)
    assert result.ratio("jax") is None
    faster = Result(case, Check(500, {}, None), timing(1e-3), {"plain": timing(2e-3)})
    assert measurement.means([result, faster], ["torch", "jax"]) == {
        "backward nc float64": {
            "fraction_of_limit": pytest.approx(1.0),
            "ratios": {"torch": pytest.approx(1.5), "jax": None},
        }
    }
    wrong = Result(case, Check(500, {}, "wrong: dx"))
    assert (wrong.gigabytes_per_second, wrong.fraction, wrong.ratio("torch")) == (None, None, None)


@pytest.mark.parametrize("op", TRAFFIC)
def test_traffic(op):
    sweeps = 2 if op in ("forward", "inference") else 3
    assert Case(op, "nchw", "float32", (2, 3, 5, 7)).traffic == sweeps * 4 * 2 * 3 * 5 * 7
    assert Case(op, "nc", "bfloat16", (2, 3)).traffic == sweeps * 2 * 2 * 3


def test_timing_leaves_out_the_disturbed():
    quiet = [Sample(second, False) for second in (3.0, 1.0, 2.0, 5.0, 4.0)]
    assert Timing.of([*quiet, Sample(90.0, True)]) == Timing(6, 1, 1.0, 2.0, 3.0, 4.0, 5.0)
    few = [Sample(second, False) for second in (1.0, 2.0)] + [Sample(90.0, True)]
    noisy = Timing.of(few)
    assert (noisy.median, noisy.most, noisy.left_out, noisy.noisy) == (1.5, 2.0, 1, True)
    hopeless = Timing.of([Sample(90.0, True)])
    assert (hopeless.median, hopeless.left_out, hopeless.noisy) == (90.0, 0, True)
    assert not Timing.of(quiet).noisy
    assert Timing.of(quiet).spread == pytest.approx(1 / 3)
    assert Timing.of([Sample(2.0, False)]) == Timing(1, 0, 2.0, 2.0, 2.0, 2.0, 2.0)


def test_sampler_times_single_calls():
    calls = []
    sampler = Sampler(lambda: calls.append(None), WallClock())
    before = len(calls)
    sample = sampler.sample()
    assert len(calls) - before == sampler.calls + 1  # one to warm the caches
    assert 0 < sample.seconds < 1e-3 < sampler.calls * 1.0
    assert sampler.samples == [sample]


class SlowClock:
    """One on which a call takes a given time, and nothing is called."""

    least, most = 1.0, 50

    def __init__(self, seconds):
        self.seconds = seconds
        self.asked = []

    def time(self, call, calls):
        self.asked.append(calls)
        return Sample(self.seconds, False)


@pytest.mark.parametrize(("seconds", "calls"), [(2.0, 1), (0.3, 4), (0.001, 50), (0.0, 50)])
def test_sampler_calls_as_often_as_its_clock_wants(seconds, calls):
    clock = SlowClock(seconds)
    sampler = Sampler(lambda: None, clock)
    assert sampler.calls == calls
    assert sampler.sample() == Sample(seconds, False)
    assert clock.asked[-1] == calls
    assert 1 <= sampler.per_turn <= 20


def test_calls_in_turn():
    made = []
    call = in_turn([lambda k=k: made.append(k) for k in range(3)])
    for _ in range(7):
        call()
    assert made == [0, 1, 2, 0, 1, 2, 0]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (1.2344e-6, "0.0012"), (9.994e-5, "0.100"), (1.2344e-4, "0.123"), (9.999e-4, "1.00"),
        (1.2344e-3, "1.23"), (9.999e-3, "10.0"), (1.2344e-2, "12.3"), (0.09999, "100"),
        (1.2344, "1234"),
    ],
)  # fmt: skip
def test_milliseconds_have_three_digits(seconds, text):
    assert report.milliseconds(seconds) == text


# The limit.


@pytest.mark.parametrize("reads", [1, 2])
@pytest.mark.parametrize("way", ["plain", "non-temporal", "plain, one thread"])
def test_sweeps_at_any_size_and_alignment(reads, way):
    if way == "non-temporal" and not limits.X86:
        pytest.skip("the stores are those of x86")
    rng = np.random.default_rng(0)
    sweep = limits.sweep(reads, streaming=way == "non-temporal", parallel="one" not in way)
    for size in (0, 1, 7, 63, 64, 65, 127, 128, 500, 1000, 65537):
        for start, shift in (0, 0), (1, 0), (16, 16), (63, 1), (5, 40):
            a, b = rng.integers(0, 256, (2, size + 200), dtype=np.uint8)
            memory = np.full(size + 200, 77, np.uint8)
            out = memory[64 + start :][:size]
            a, b = a[64 + start + shift :][:size], b[start:][:size]
            sweep(a, b, out)
            np.testing.assert_array_equal(out, a if reads == 1 else a ^ b)
            assert (memory[: 64 + start] == 77).all()
            assert (memory[64 + start + size :] == 77).all()


def test_ways_to_sweep():
    x = np.arange(35, dtype=np.float64).reshape(5, 7)
    out = np.empty_like(x)
    ways = limits.sweeps([x], out)
    assert {"plain"} <= ways.keys() <= {"plain", "non-temporal", "plain, one thread"}
    for call in ways.values():
        out.fill(0)
        call()
        np.testing.assert_array_equal(out, x)


def test_non_temporal_stores_are_in_the_machine_code():
    if not limits.X86:
        pytest.skip("the stores are those of x86")
    sweep = limits.sweep(1, streaming=True, parallel=False)
    sweep(*np.zeros((3, 64), np.uint8))
    code = "".join(sweep.inspect_asm().values())
    assert re.search(r"\bv?movnt", code)
    assert "sfence" in code


# The check.


OPS = list(TRAFFIC)
LAYOUTS = {"nchw": (4, 3, 5, 7), "nhwc": (4, 3, 5, 7), "nc": (40, 3)}


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_check_passes_what_is_right(op, layout, dtype):
    case = Case(op, layout, dtype, LAYOUTS[layout])
    arrays = make(case)
    checked = oracle.check(case, arrays, bench.calls.call_of(case, arrays))
    assert checked.problem is None
    assert checked.channels == 3
    assert checked.errors.keys() == {
        "inference": {"y"},
        "backward": {"dx", "dweight", "dbias"},
    }.get(op, {"y", "mean", "invstd", "running_mean", "running_var"})


@pytest.mark.parametrize("op", OPS)
def test_check_finds_one_wrong_element(op):
    case = Case(op, "nchw", "float32", (4, 3, 5, 7))
    arrays = make(case)
    call = bench.calls.call_of(case, arrays)

    def slightly_wrong():
        result = call()
        arrays.out[2, 1, 3, 4] += 1e-3
        return result

    checked = oracle.check(case, arrays, slightly_wrong)
    assert re.match(r"wrong: d?[xy] is off by \d", checked.problem)


def test_check_finds_what_is_left_unwritten_in_any_channel(monkeypatch):
    monkeypatch.setattr(oracle, "ELEMENTS", 4 * 5 * 7 * 2)
    case = Case("inference", "nhwc", "float32", (4, 9, 5, 7))
    arrays = make(case)
    call = bench.calls.call_of(case, arrays)

    def forgetful():
        result = call()
        arrays.out[2, 3, 4, 5] = np.nan
        return result

    assert oracle.check(case, arrays, call).channels == 2
    problem = "wrong: not all of the result is written"
    assert oracle.check(case, arrays, forgetful).problem == problem


def test_check_finds_a_wrong_mask():
    case = Case("add_relu", "nchw", "float32", (4, 3, 5, 7))
    arrays = make(case)
    call = bench.calls.call_of(case, arrays)

    def inverted():
        result = call()
        return result._replace(mask=~result.mask)

    problem = "wrong: the mask is not that of the result"
    assert oracle.check(case, arrays, inverted).problem == problem


# The peers.


def test_peer_in_its_own_process():
    case = Case("forward", "nchw", "float32", (4, 3, 5, 7))
    with peers.started("numpy", 1) as peer:
        assert peer.version == np.__version__
        for _ in range(2):
            peer.prepare(case)
            peer.sample(2)
            peer.sample(1)
            (times,) = peer.timings().values()
            assert times.samples == 3
            assert times.least > 0
            peer.release()
        with pytest.raises(peers.PeerError, match=r"^no add_relu$"):
            peer.prepare(Case("add_relu", "nchw", "float32", (4, 3, 5, 7)))
        with pytest.raises(peers.PeerError, match=r"^ValueError: "):
            peer.prepare(Case("forward", "nchw", "float32", (4, -3, 5, 7)))
        peer.prepare(case)  # an error does no harm


@pytest.mark.skipif(sys.platform == "win32", reason="signals are POSIX's")
def test_peer_that_dies_is_started_again():
    case = Case("inference", "nc", "float32", (4, 3))
    with peers.started("numpy", 1) as peer:
        os.kill(peer._process.pid, signal.SIGKILL)
        with pytest.raises(peers.PeerError, match="its process ended with code -9"):
            peer.prepare(case)
        peer.release()
        peer.prepare(case)
        peer.sample(1)
        assert peer.timings()


def test_worker_answers_in_lines_of_json(monkeypatch):
    case = {"op": "inference", "layout": "nc", "dtype": "float64", "shape": [4, 3]}
    requests = [{"do": "prepare", "case": case}, {"do": "sample", "most": 2}, {"do": "release"}]
    text, answers = "".join(json.dumps(request) + "\n" for request in requests), io.StringIO()
    worker.serve(io.StringIO(text), answers, "numpy", 1)
    hello, prepared, sampled, released = map(json.loads, answers.getvalue().splitlines())
    assert hello == {"version": np.__version__}
    assert prepared == released == {}
    ((way, samples),) = sampled["samples"].items()
    assert way == "out="
    assert len(samples) == 2
    answers = io.StringIO()
    worker.serve(io.StringIO(), answers, "no_such", 1)
    assert "error" in json.loads(answers.getvalue())


ABLE = [
    (name, op)
    for name in peers.NEEDS
    for op in (["inference"] if name == "onnxruntime" else bench.OPS)
    if not peers.missing(name)
]


def load_peer(name):
    peer = importlib.import_module(f"numbabn.cli.bench.peers.{name}_peer")
    peer.load(os.cpu_count())
    return peer


@pytest.mark.parametrize(("name", "op"), ABLE)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_peers_compute_the_same(name, op, layout, dtype):
    case = Case(op, layout, dtype, LAYOUTS[layout])
    arrays = make(case)
    ways = load_peer(name).calls_of(case, arrays)
    x, weight, bias = arrays.x, arrays.weight, arrays.bias
    running = arrays.running_mean.copy(), arrays.running_var.copy()
    expected = {
        "forward": lambda: reference.forward(x, weight, bias, eps=EPS, axis=case.axis)[0],
        "inference": lambda: reference.inference(
            x, *running, weight, bias, eps=EPS, axis=case.axis
        ),
        "backward": lambda: reference.backward(
            arrays.other, x, weight, arrays.mean, arrays.invstd, axis=case.axis
        )[0],
    }[op]()
    for way, call in ways.items():
        arrays.out.fill(np.nan)
        result = call()
        if way in ("fresh", "donated"):
            result = np.asarray(result[0])
            if name == "torch" and layout == "nhwc":
                result = np.moveaxis(result, 1, -1)
        else:
            result = arrays.out
        tolerance = 5e-6 if dtype == "float32" else 1e-11  # ONNX keeps eps in float32
        np.testing.assert_allclose(result, expected, rtol=0, atol=tolerance, err_msg=way)


@pytest.mark.parametrize("name", sorted({name for name, _ in ABLE}))
def test_peers_say_what_they_cannot_do(name):
    case = Case("add_relu", "nchw", "float32", (4, 3, 5, 7))
    with pytest.raises(worker.Unable):
        load_peer(name).calls_of(case, make(case))


# The command from end to end.


def test_bench(capsys):
    document = run_bench(
        "4x3x5x7", "40x3", "--repeats", "2", "--against", "numpy", "--plot", "bench.png",
        "--threads", "1",
    )  # fmt: skip
    out, err = capsys.readouterr()
    assert err == ""
    for line in (
        " float32 ", "forward nchw", "backward nc", "geometric means",
        "forward and inference 1 read + 1 write; backward 2 reads + 1 write",
        "6 of 6 cases agree with the float64 oracle.", "1 thread on ",
    ):  # fmt: skip
        assert line in out
    assert re.search(r"^ 4x3x5x7 .*x *$", out, re.M)
    assert re.search(r"^Picture: .*bench\.png$", out, re.M)
    assert max(map(len, out.splitlines())) <= 120

    assert [(case["op"], case["layout"]) for case in document["cases"]] == [
        (op, layout) for op in bench.OPS for layout in ("nchw", "nc")
    ]
    for case in document["cases"]:
        assert case["check"]["problem"] is None
        assert case["check"]["channels"] == 3
        seconds, peer = case["seconds"], case["peers"]["numpy"]
        assert seconds["samples"] == 2
        assert seconds["least"] <= seconds["median"] <= seconds["most"]
        assert case["traffic_bytes"] == case["bytes_of_x"] * (3 if case["op"] == "backward" else 2)
        limit = case["limits"][case["limit"]]["median"]
        assert limit == min(way["median"] for way in case["limits"].values())
        assert case["fraction_of_limit"] == pytest.approx(limit / seconds["median"])
        assert case["gigabytes_per_second"] == pytest.approx(
            case["traffic_bytes"] / seconds["median"] / 1e9
        )
        assert peer["ratio"] == pytest.approx(peer["seconds"]["out="]["median"] / seconds["median"])
    assert next(iter(document.items())) == ("format", results.FORMAT)
    assert document["settings"]["repeats"] == 2
    assert document["settings"]["seconds"] is None
    assert document["environment"]["threads_used"] == 1
    assert document["environment"]["peers"] == {"numpy": np.__version__}
    assert str(ROOT) not in json.dumps(document)
    assert document["geometric_means"].keys() == {
        f"{op} {layout} float32" for op in bench.OPS for layout in ("nchw", "nc")
    }
    assert numba.get_num_threads() == numba.config.NUMBA_NUM_THREADS

    assert pixels("bench.png", figure.BLUE)
    assert pixels("bench.png", figure.PEERS["numpy"][1])


def test_json_to_stdout_is_only_json(capsys):
    arguments = ["40x3", "--op", "forward,inference", "--seconds", "0.001"]
    assert main(["bench", *arguments, "--json", "-"]) == 0
    out, err = capsys.readouterr()
    document = json.loads(out)
    assert [case["op"] for case in document["cases"]] == ["forward", "inference"]
    assert all(case["seconds"]["samples"] >= LEAST for case in document["cases"])
    assert "geometric means" in err


def test_a_wrong_kernel_is_not_timed(capsys, monkeypatch):
    def garbage(x, *args, out, **options):
        out.fill(3)
        return out

    monkeypatch.setattr(numbabn, "batch_norm_inference", garbage)
    document = run_bench(
        "4x3x5x7", "--op", "inference,backward", "--repeats", "1", "--plot", "bench.svg", code=1
    )
    wrong, right = document["cases"]
    assert wrong["check"]["problem"].startswith("wrong: y is off by ")
    assert (wrong["seconds"], wrong["limits"], wrong["fraction_of_limit"]) == (None, {}, None)
    assert right["seconds"]["samples"] == 1
    out = capsys.readouterr().out
    assert re.search(r"^ 4x3x5x7 +wrong *$", out, re.M)
    assert "inference nchw float32 4x3x5x7 wrong: y is off by" in out
    assert "1 of 2 cases agree" in out


def test_what_the_library_refuses_is_said(capsys):
    document = run_bench("1x3", "--op", "forward", "--repeats", "1", "--plot", "a.pdf", code=1)
    (case,) = document["cases"]
    assert case["check"]["problem"].startswith("refused: x: expected more than one value per")
    out, err = capsys.readouterr()
    assert re.search(r"^ 1x3 +refused *$", out, re.M)
    assert err == "numbabn: --plot: nothing to draw, for no case was timed\n"
    assert not Path("a.pdf").exists()


def test_a_peer_that_cannot_shows_a_dash(capsys, monkeypatch):
    def unable(peer, case):
        raise peers.PeerError("inference only")

    monkeypatch.setattr(peers.Peer, "prepare", unable)
    document = run_bench("40x3", "--op", "forward", "--repeats", "1", "--against", "numpy")
    assert document["cases"][0]["peers"]["numpy"] == {
        "seconds": {}, "ratio": None, "reason": "inference only"
    }  # fmt: skip
    assert re.search(r"^ 40x3 .* - *$", capsys.readouterr().out, re.M)


# The results file, the table and the figure of it.


@pytest.fixture(scope="module")
def facts():
    return environment.gather(1, devices.find("cpu")) | {"peers": {"torch": "2.9+cpu"}}


def case_of(op, layout="nchw", problem=None, peer="torch", **others):
    case = Case(op, layout, "float32", LAYOUTS[layout])
    if problem is not None:
        return Result(case, Check(3, {}, problem))
    times = timing(4e-3, **others), {"plain": timing(2e-3)}, {peer: timing(8e-3, **others)}
    able = PeerResult({"out=": times[2][peer]})
    return Result(case, Check(3, {"y": 1e-7}, None), *times[:2], {peer: able})


def write(facts, *found, **changes):
    settings = bench.SETTINGS | {"op": list(dict.fromkeys(result.case.op for result in found))}
    document = results.document(settings, facts, list(found)) | changes
    Path("bench.json").write_text(json.dumps(document), encoding="utf-8")
    return document


def test_results_survive_the_file(facts):
    right, wrong = case_of("forward"), case_of("backward", "nc", problem="wrong: dx is off by 1")
    unable = replace(right, peers={"torch": PeerResult(reason="no forward")})
    document = write(facts, right, wrong, unable)
    again = results.read(Path("bench.json"))
    assert again.found == [right, wrong, unable] == Results.of(document).found
    assert json.dumps(again.document) == json.dumps(document)
    assert again.peers == {"torch": "2.9+cpu"}


def test_from_shows_and_draws_the_same(capsys, monkeypatch):
    run_bench("4x3x5x7", "40x3", "--repeats", "1", "--against", "numpy", "--plot", "bench.png")
    out, _ = capsys.readouterr()

    def refuse(*args, **options):
        raise AssertionError("nothing is measured")

    monkeypatch.setattr(devices, "find", refuse)
    monkeypatch.setattr(peers, "started", refuse)
    monkeypatch.setattr(peers, "missing", refuse)
    assert main(["bench", "--from", "bench.json", "--plot", "again.png"]) == 0
    again, err = capsys.readouterr()
    assert err == ""
    assert again == out.replace("bench.png", "again.png")
    np.testing.assert_array_equal(imread("again.png"), imread("bench.png"))


def test_from_of_a_wrong_case(capsys, facts):
    write(facts, case_of("forward"), case_of("inference", problem="wrong: y is off by 1"))
    assert main(["bench", "--from", "bench.json", "--plot", "bench.png"]) == 1
    assert "inference nchw float32 4x3x5x7 wrong: y is off by 1" in capsys.readouterr().out
    assert pixels("bench.png", figure.RED)
    write(facts, case_of("inference", problem="wrong: y is off by 1"))
    assert main(["bench", "--from", "bench.json", "--plot", "none.png"]) == 1
    out, err = capsys.readouterr()
    assert "0 of 1 cases agree" in out
    assert err == "numbabn: --plot: nothing to draw, for no case was timed\n"
    assert not Path("none.png").exists()


@pytest.mark.parametrize("ops", [OPS[:1], OPS])
@pytest.mark.parametrize("layouts", [["nc"], ["nchw", "nhwc", "nc"]])
@pytest.mark.parametrize("noisy", [False, True])
def test_figure_of_any_results(facts, ops, layouts, noisy):
    others = {"disturbed": 9} if noisy else {}
    found = [case_of(op, layout, **others) for op in ops for layout in layouts]
    figure.draw(Path("bench.png"), Results.of(write(facts, *found)))
    assert pixels("bench.png", figure.PEERS["torch"][1])
    assert not pixels("bench.png", figure.RED)
    figure.draw(Path("alone.png"), Results.of(write(facts | {"peers": {}}, *found)))
    assert not pixels("alone.png", figure.PEERS["torch"][1])
    for file in "bench.png", "alone.png":
        assert pixels(file, figure.BLUE)
        edges = imread(file)[..., :3]
        assert (edges[[0, -1]] == 1).all()
        assert (edges[:, [0, -1]] == 1).all()


def test_figure_of_a_gpu(facts):
    gpu = {
        "name": "A GPU", "compute_capability": [9, 0], "multiprocessors": 132,
        "l2_bytes": 1 << 25, "driver_version": "580.1",
    }  # fmt: skip
    document = write(facts | {"gpu": gpu}, case_of("forward"))
    document["settings"] = document["settings"] | {"device": "cuda"}
    with rc_context({"svg.fonttype": "none"}):
        figure.draw(Path("bench.svg"), Results.of(document))
    text = Path("bench.svg").read_text(encoding="utf-8")
    for words in "Batch normalization on a GPU", "Device time on A GPU", "torch 2.9<":
        assert words in text


@pytest.mark.parametrize(
    ("argv", "refused"),
    [
        (["resnet50"], "SUITE or SHAPE"),
        (["--op", "forward"], "--op"),
        (["--layout", "nc"], "--layout"),
        (["--dtype", "float32"], "--dtype"),
        (["--device", "cpu"], "--device"),
        (["--batch", "32"], "--batch"),
        (["--threads", "1"], "--threads"),
        (["--against", "all"], "--against"),
        (["--seconds", "1"], "--seconds"),
        (["--repeats", "2"], "--repeats"),
        (["--json", "again.json"], "--json"),
        (["--json", "-", "--op", "forward", "--plot", "a.png"], "--op, --json"),
    ],
)
def test_from_refuses_what_to_measure(capsys, argv, refused):
    assert main(["bench", "--from", "bench.json", *argv]) == 2
    message = f"numbabn: --from measures nothing: expected no {refused} beside it\n"
    assert capsys.readouterr() == ("", message)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "--from: 'bench.json' cannot be read: No such file or directory"),
        ("", "--from: 'bench.json' is not JSON: Expecting value: line 1 column 1 (char 0)"),
        ('{"format": 1,', "--from: 'bench.json' is not JSON: "),
        ("[]", "--from: 'bench.json' is JSON, but no results of numbabn bench"),
        ('{"versions": {}}', "--from: 'bench.json' is JSON, but no results of numbabn bench"),
        (
            '{"settings": {}, "environment": {}, "cases": []}',
            f"--from: 'bench.json': expected results of format {results.FORMAT}, got format none; "
            "measure them again: numbabn bench ... --json bench.json",
        ),
    ],
)
def test_what_is_no_results_file(capsys, text, message):
    if text is not None:
        Path("bench.json").write_text(text, encoding="utf-8")
    assert main(["bench", "--from", "bench.json"]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith(f"numbabn: {message}")


def test_results_of_another_format_or_damaged(capsys, facts):
    write(facts, case_of("forward"), format=99)
    assert main(["bench", "--from", "bench.json"]) == 2
    expected = f"expected results of format {results.FORMAT}, got format 99; measure them again: "
    assert expected in capsys.readouterr().err
    document = write(facts, case_of("forward"))
    for damaged in {}, document["cases"][0] | {"limits": 3}:
        write(facts, case_of("forward"), cases=[damaged])
        assert main(["bench", "--from", "bench.json"]) == 2
        out, err = capsys.readouterr()
        assert (out, err.count("\n")) == ("", 1)
        assert "'bench.json': expected what numbabn bench wrote, got " in err


def test_bytes_that_are_no_text(capsys):
    Path("bench.json").write_bytes(b"\x89PNG\r\n")
    assert main(["bench", "--from", "bench.json"]) == 2
    assert "numbabn: --from: 'bench.json' is not JSON: " in capsys.readouterr().err


def test_progress_on_a_terminal_only():
    shown = {}
    for terminal in True, False:
        console = Console(file=io.StringIO(), force_terminal=terminal, width=100)
        with report.progress(console, 3) as begin:
            begin("forward nchw 4x3x5x7")
            begin("forward nc 40x3")
        shown[terminal] = console.file.getvalue()
    assert "forward nc 40x3" in shown[True]
    assert "1/3" in shown[True]
    assert shown[False].strip() == ""


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["vgg"], "expected a suite (resnet50, mobilenet, inception, mlp, quick) or a shape like"),
        (["3x0x4"], "got '3x0x4'"),
        (["mlp", "--layout", "nhwc"], "--layout: mlp has no layout nhwc"),
        (["4x3x5", "--layout", "nc"], "--layout: 4x3x5 has no layout nc"),
        (["--layout", "chwn"], "expected some of nchw, nhwc, nc, with commas between, got 'chwn'"),
        (["--op", "fold"], "expected some of forward, inference, backward, add_relu, with commas"),
        (["--op", ","], "got ','"),
        (["--dtype", "float32,int8"], "got 'float32,int8'"),
        (["--device", "cuda", "--threads", "2"], "--threads: expected none with --device cuda"),
        (
            ["--device", "cuda", "--against", "numpy,torch"],
            "--against: expected some of torch with --device cuda, got numpy",
        ),
        (["--device", "tpu"], "argument --device: invalid choice: 'tpu'"),
        (["--threads", "4096"], "--threads: expected at most numba's "),
        (["--threads", "0"], "expected a whole number, 1 or more, got '0'"),
        (["--batch", "no"], "expected a whole number, 1 or more, got 'no'"),
        (["--seconds", "-1"], "expected a number above 0, got '-1'"),
        (["--seconds", "1", "--repeats", "2"], "not allowed with argument"),
        (["--against", "tensorflow"], "expected some of numpy, torch, onnxruntime, jax, all"),
        (["--plot", "bench.txt"], "expected a name ending in .png, .pdf, .svg, got 'bench.txt'"),
    ],
)
def test_wrong_use_takes_one_line(capsys, argv, message):
    assert main(["bench", *argv]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith("numbabn: ")
    assert message in err


def test_a_device_that_is_not_there_takes_one_line(capsys, monkeypatch):
    def nothing():
        raise RuntimeError("CUDA arrays: expected NVIDIA's driver and a device, got none: a reason")

    monkeypatch.setattr(devices, "cuda_backend", nothing)
    assert main(["bench", "40x3", "--device", "cuda"]) == 2
    message = "CUDA arrays: expected NVIDIA's driver and a device, got none: a reason\n"
    assert capsys.readouterr().err == f"numbabn: --device: {message}"


def test_a_refused_dtype_takes_one_line(capsys, monkeypatch):
    def refuse(x):
        raise TypeError(f"x: expected something else, got {x.dtype}")

    monkeypatch.setattr(numbabn, "batch_stats", refuse)
    for dtype in DTYPES:
        assert main(["bench", "40x3", "--dtype", dtype]) == 2
        message = f"--dtype: numbabn refuses {dtype}: x: expected something else, got {dtype}\n"
        assert capsys.readouterr().err == f"numbabn: {message}"


def test_against_what_is_installed(capsys, monkeypatch):
    monkeypatch.setattr(peers, "missing", lambda name: ["onnx"] * (name == "onnxruntime"))
    assert bench._peers(["all"], "cpu") == ["numpy", "torch", "jax"]
    assert bench._peers(["all"], "cuda") == ["torch"]
    assert main(["bench", "40x3", "--against", "numpy,onnxruntime"]) == 2
    message = "--against: onnxruntime not found: pip install onnx\n"
    assert capsys.readouterr().err == f"numbabn: {message}"


def test_a_peer_that_cannot_start_takes_one_line(capsys, monkeypatch):
    monkeypatch.setitem(peers.NEEDS, "nothing", ())
    monkeypatch.setattr(bench, "_peers", lambda against, device: ["nothing"])
    assert main(["bench", "40x3"]) == 1
    err = capsys.readouterr().err
    assert err.startswith("numbabn: --against: nothing: ModuleNotFoundError: ")
    assert err.count("\n") == 1


def test_cpu_model_as_linux_tells_it(monkeypatch, tmp_path):
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nmodel name\t: A CPU @ 3: fast\n")
    monkeypatch.setattr(environment, "CPU_INFO", tmp_path / "cpuinfo")
    assert environment.cpu_model() == "A CPU @ 3: fast"
    monkeypatch.setattr(environment, "CPU_INFO", tmp_path / "none")
    assert environment.cpu_model()


def test_import_loads_no_extra():
    code = (
        "import sys, numbabn.cli.bench.peers.worker;"
        "extras = {'matplotlib', 'rich', 'torch', 'jax', 'onnx', 'onnxruntime', 'numba_cuda'};"
        "sys.exit(bool(extras & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
