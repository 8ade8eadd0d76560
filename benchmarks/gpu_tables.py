"""What is read of what `gpu_report` has found, in Markdown."""

from itertools import groupby
from typing import Any

import gpu_targets
from gpu_targets import PYTORCH, SMALL, dry, mean, name_of, spread


def readable(found: dict[str, Any]) -> str:
    """Write the report, what was asked first."""
    compiled = found["compiled"]
    parts = [
        "# numbabn on a GPU\n",
        gpu_targets.table(found),
        summary(found),
        table("Against PyTorch in eager mode", found["cases"], (*PYTORCH, "numbabn fresh")),
        table(f"Against torch.compile, {len(compiled)} cases", compiled, ("torch.compile",)),
        table(
            "Held on the chip, and swept twice", found["variants"], ("numbabn swept twice",)
        ),
        f"Sweeping twice takes, times what held takes: {swept(found['variants'])}.\n",
        host(found["host"]),
        "## Kernels\n\nRegisters of a thread, bytes of shared memory of a block beside what it "
        "holds, bytes spilled, blocks of a multiprocessor compiled for.\n",
        listing({
            name: f"{each['registers']}, {each['shared']}, {each['spilled']}, {each['resident']}"
            for name, each in found["kernels"].items()
        }),
        "## Seconds\n",
        listing({name: f"{each:.1f}" for name, each in found["seconds"].items()}),
    ]  # fmt: skip
    return "\n".join(parts)


def summary(found: dict[str, Any]) -> str:
    """Sum up the machine, the tests, the problems, and the means of the figures."""
    lines = ["## Machine\n", listing(found["environment"]), "## Tests\n"]
    for name, each in found["tests"].items():
        lines.append(f"- {name}: {each['last'].strip('= ')}")
        lines += [f"  - {line[:300]}" for line in each["lines"][:12]]
    lines.append("\n## Problems\n")
    lines += [f"- {text[:600]}" for text in found["problems"]] or ["None."]
    lines.append("\n## Geometric means\n")
    lines.append("| | N | cases | of a copy | times PyTorch's best |")
    lines.append("|---|---|---|---|---|")
    for title, group in groups(found["cases"]):
        means = [mean(row.get(key) for row in group) for key in ("of_copy", "times_as_fast")]
        N = group[0]["shape"][0]
        lines.append(f"| {title} | {N} | {len(group)} | {means[0]:.2f} | {means[1]:.2f} |")
    return "\n".join(lines) + "\n"


def groups(rows: list[dict[str, Any]]) -> list[tuple[str, list[dict[str, Any]]]]:
    def key(row: dict[str, Any]) -> tuple[Any, ...]:
        return row["op"], row["layout"], row["dtype"], row["shape"][0]

    ordered = sorted(rows, key=key)
    return [(" ".join(k[:3]), list(group)) for k, group in groupby(ordered, key)]


def table(title: str, rows: list[dict[str, Any]], ways: tuple[str, ...]) -> str:
    """One line for each shape, and some ways to compare with."""
    lines = [
        f"## {title}\n",
        "Milliseconds on the device, of numbabn into a given result. GB/s count 1 read and 1 write "
        "of x, backward 2 and 1; the copy is of x, by the faster of two ways. Hot is the fraction "
        "of the copy on one set of buffers that L2 holds. !: the device has waited for the "
        "host.\n",
    ]
    for name, group in groups(rows):
        lines.append(f"\n### {name}, N = {group[0]['shape'][0]}\n")
        cells = [
            "shape", "ms", "±", "GB/s", "copy GB/s", "of copy", "hot", *ways, "times as fast",
            "kernels: blocks, bytes held",
        ]  # fmt: skip
        lines += [f"| {' | '.join(cells)} |", "|" + "---|" * len(cells)]
        lines += [line(row, ways) for row in group]
    return "\n".join(lines) + "\n"


def line(row: dict[str, Any], ways: tuple[str, ...]) -> str:
    times = row.get("times", {})
    ours = times.get("numbabn")

    def ms(way: str) -> str:
        return f"{times[way]['ms']:.4f}" if way in times else "-"

    def number(key: str, digits: int) -> str:
        return f"{row[key]:.{digits}f}" if key in row else "-"

    spread = (ours["upper"] - ours["lower"]) / 2 / ours["ms"] if ours else 0.0
    waited = "!" if any(map(dry, times.values())) else ""
    why = "" if ours else (row.get("failed") or "; ".join(row.get("wrong", [])) or "-")[:80]
    kernels = ", ".join(
        f"{each['kernel']} {each['view']} x{each['width']}: {each['blocks']}, {each['shared']}"
        for each in row.get("kernels", {}).get("numbabn", [])
    )
    cells = [
        "x".join(map(str, row["shape"])) + waited, ms("numbabn") if ours else why,
        f"{100 * spread:.0f}%", number("gb_s", 0), number("copy_gb_s", 0), number("of_copy", 2),
        number("of_copy_hot", 2), *map(ms, ways), number("times_as_fast", 2), kernels,
    ]  # fmt: skip
    return "| " + " | ".join(cells) + " |"


def swept(rows: list[dict[str, Any]]) -> str:
    """Sum up whether it is right to hold what is held; below 1 it is not."""
    return spread({
        name_of(row): row["times_as_fast"]
        for row in rows
        if "times_as_fast" in row and len(row["kernels"]["numbabn"]) == 1
    })  # fmt: skip


def host(calls: list[dict[str, Any]]) -> str:
    """One line for each call, with its pieces."""
    names = list(next((row["pieces"] for row in calls if row["pieces"]), {}))
    lines = [
        "## Host\n",
        f"Microseconds of a call on {'x'.join(map(str, SMALL))} float16, nothing waited for, and "
        "of its pieces, each without those inside it. Clocks take part of each piece.\n",
        f"| {' | '.join(['call', 'whole', *names])} |", "|" + "---|" * (2 + len(names)),
    ]  # fmt: skip
    for row in calls:
        pieces = [f"{row['pieces'][name]:.1f}" if row["pieces"] else "-" for name in names]
        cells = [row["call"], f"{row['whole']:.1f}", *pieces]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def listing(values: Any) -> str:
    if not isinstance(values, dict):
        return f"{values}\n"
    rows = [f"| {k} | {f'{v:.2f}' if isinstance(v, float) else v} |" for k, v in values.items()]
    return "\n".join(["| | |", "|---|---|", *rows]) + "\n"
