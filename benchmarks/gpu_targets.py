"""What was asked of numbabn on a GPU, beside what `gpu_report` has measured."""

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

# Forward passes in training, float16, and the microseconds that TileOps takes on an H200.
FIELD = {(4, 128, 1024, 1024): 911.0, (8, 64, 32, 32): 2.8, (4, 256, 28, 28): 3.6}
SMALL = (8, 64, 32, 32)  # of which the host's time is taken
BATCHES = (256, 32)  # of ResNet-50's shapes
COPIES = ("copy", "copy by a kernel")
PYTORCH = ("cuDNN", "native")
OTHERS = (*PYTORCH, "torch.compile", "numbabn swept twice")
ON_CHIP = 40e6  # bytes of inputs that fit on the chip, about
OF_COPY, OF_COPY_INFERENCE = 0.75, 0.9
MEAN, WORST = 1.2, 0.9  # times the better one of PyTorch's

Row = dict[str, Any]


class Line(NamedTuple):
    """One line of the table; nothing was measured where it is not known whether it is reached."""

    what: str
    target: str
    measured: str
    reached: bool | None
    how: str


def targets(found: dict[str, Any]) -> list[Line]:
    """Put beside each thing asked what was measured."""
    cases = found["cases"]
    l2 = found["environment"].get("l2_bytes", 60 << 20)
    lines = [_field(cases, shape) for shape in FIELD]
    lines.append(_resnet(cases, found["compiled"]))
    for op in ("forward", "backward"):
        rows = [row for row in cases if row["op"] == op and _reads(row) <= ON_CHIP]
        for key, how in (
            ("of_copy", "both through sets of buffers that three L2 caches hold"),
            ("of_copy_hot", "both on one set of buffers again and again, where L2 holds all"),
        ):
            what = f"{op}, inputs of at most {ON_CHIP / 1e6:.0f} MB" + ", hot" * ("hot" in key)
            lines.append(_fraction(what, rows, key, OF_COPY, how))
    rows = [row for row in cases if row["op"] == "inference" and row.get("bytes", 0) > l2]
    how = "x larger than L2, through several sets of buffers"
    lines.append(_fraction("large inference", rows, "of_copy", OF_COPY_INFERENCE, how))
    return lines + [_host(found["host"], op) for op in ("forward", "inference", "backward")]


def table(found: dict[str, Any]) -> str:
    """Write it in Markdown."""
    lines = ["## Asked and measured\n", "| What | Asked | Measured | Reached | How |"]
    lines.append("|---|---|---|---|---|")
    for line in targets(found):
        reached = {True: "yes", False: "**no**", None: "-"}[line.reached]
        lines.append(f"| {line.what} | {line.target} | {line.measured} | {reached} | {line.how} |")
    return "\n".join(lines) + "\n"


def compared(row: Row) -> Row:
    """Say what follows from a row's times: fractions of the copy, and times of the best other."""
    times = {way: each["ms"] for way, each in row.get("times", {}).items() if not dry(each)}
    ours, more = times.get("numbabn"), {}
    for end, key in (("", "of_copy"), (", hot", "of_copy_hot")):
        mine = times.get(f"numbabn{end}")
        copies = [times[way + end] for way in COPIES if way + end in times]
        if mine and copies:
            more[key] = row["traffic"] / mine / (2 * row["bytes"] / min(copies))
            if not end:
                more["gb_s"] = row["traffic"] / mine / 1e6
                more["copy_gb_s"] = 2 * row["bytes"] / min(copies) / 1e6
    if ours:
        theirs = {way: times[way] / ours for way in OTHERS if way in times}
        if theirs:
            more["best"] = min(theirs, key=lambda way: theirs[way])
            more["times_as_fast"] = theirs[more["best"]]
    return more


def dry(timing: dict[str, Any]) -> bool:
    """Whether the device has waited for the host in most samples: the time is not its own."""
    return bool(2 * timing["exposed"] > timing["samples"])


def name_of(row: Row) -> str:
    return f"{row['op']} {row['layout']} {row['dtype']} {'x'.join(map(str, row['shape']))}"


def mean(numbers: Iterable[float | None]) -> float:
    """Give the geometric mean of what there is."""
    logarithms = [math.log(number) for number in numbers if number]
    return math.exp(sum(logarithms) / len(logarithms)) if logarithms else math.nan


def spread(found: dict[str, float]) -> str:
    """Sum up numbers by name, the least of them by itself."""
    if not found:
        return "not measured"
    worst = min(found, key=lambda name: found[name])
    return (
        f"{mean(found.values()):.2f} in the mean, {found[worst]:.2f} at worst ({worst}), "
        f"{len(found)} cases"
    )


def _reads(row: Row) -> float:
    """Bytes of x, or of dy and x."""
    return float(row["traffic"] - row["bytes"]) if "traffic" in row else math.inf


def _field(cases: list[Row], shape: tuple[int, ...]) -> Line:
    what = f"forward training float16 {shape}"
    target = f"at most {FIELD[shape]:g} us"
    for row in cases:
        if tuple(row["shape"]) != shape or row["op"] != "forward" or "of_copy" not in row:
            continue
        times = row["times"]
        us = 1e3 * times["numbabn"]["ms"]
        copy = 1e3 * min(times[way]["ms"] for way in COPIES if way in times)
        how = f"from call to call; 2 reads + 1 write at the copy's speed would be {1.5 * copy:.2f}"
        hot = times.get("numbabn, hot")
        measured = f"{us:.2f} us" + (f", hot in L2 {1e3 * hot['ms']:.2f} us" if hot else "")
        return Line(what, target, measured, us <= FIELD[shape], how)
    return _nothing(what, target)


def _resnet(cases: list[Row], compiled: list[Row]) -> Line:
    what = "ResNet-50, N = 256 and 32, forward and backward"
    target = f"at least {MEAN} times the better one in the mean, {WORST} at worst"

    def fits(row: Row) -> bool:
        trained = row["op"] in ("forward", "backward") and row["shape"][0] in BATCHES
        return trained and "times_as_fast" in row

    eager = {name_of(row): row["times_as_fast"] for row in cases if fits(row)}
    inductor = {name_of(row): row["times_as_fast"] for row in compiled if fits(row)}
    both = {name: min(eager[name], inductor[name]) for name in eager if name in inductor}
    alone = spread(eager)
    if not both:
        line = _nothing(what, target)
        return line._replace(measured=f"no torch.compile; eager PyTorch alone: {alone}")
    reached = mean(both.values()) >= MEAN and min(both.values()) >= WORST
    how = (
        "better one: the best of cuDNN and native kernels through PyTorch, timed in turns with "
        f"numbabn, and of torch.compile, likewise; cuDNN and native alone: {alone}"
    )
    return Line(what, target, spread(both), reached, how)


def _fraction(what: str, rows: list[Row], key: str, least: float, how: str) -> Line:
    target = f"at least {least} of the copy"
    found = {name_of(row): row[key] for row in rows if key in row}
    if not found:
        return _nothing(what, target)
    good = sum(each >= least for each in found.values())
    return Line(what, target, f"{spread(found)}; {good} reach it", good == len(found), how)


def _host(calls: list[Row], op: str) -> Line:
    what, target = f"host time of {op}", "no more than PyTorch's eager call"
    whole: dict[str, float] = {
        row["call"]: row["whole"] for row in calls if tuple(row["shape"]) == SMALL
    }
    ours, theirs = whole.get(op), whole.get(f"PyTorch's {op}")
    if not ours or not theirs:
        return _nothing(what, target)
    how = f"median of ten calls each, {'x'.join(map(str, SMALL))} float16, fresh results"
    return Line(what, target, f"{ours:.1f} us, PyTorch {theirs:.1f} us", ours <= theirs, how)


def _nothing(what: str, target: str) -> Line:
    return Line(what, target, "not measured", None, "-")
