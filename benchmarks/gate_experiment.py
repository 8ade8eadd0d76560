"""Try how far the gate can be trusted: ``python benchmarks/gate_experiment.py --json FILE``.

In a clone of this repository, a commit is compared with itself, which must raise no alarm, and with
commits in which one kernel takes a tenth longer, each kernel in its turn, which must. The two kinds
of runs alternate, so that the machine is the same to both.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from time import perf_counter
from typing import Any

from planted import ROOT, Clone

FOLDER = ROOT / ".asv" / "experiment"
KERNELS = [
    f"{operation}_{view}"
    for operation in ("forward", "normalize", "statistics", "backward")
    for view in ("planes", "rows")
]
SLOWER = 0.1


def plant(clone: Clone, kernel: str) -> str:
    """Commit a slow-down of one kernel to a branch of its own, whose name is given."""
    branch = f"slower-{kernel}"
    clone.git("switch", "--quiet", "--create", branch, "main")
    clone.plant(kernel, SLOWER)
    clone.git("switch", "--quiet", "main")
    return branch


def gate(head: str) -> dict[str, Any]:
    """Run the gate in the clone; tell what it said and how long that took."""
    start = perf_counter()
    answer = FOLDER / ".asv" / "gate.json"
    answer.unlink(missing_ok=True)
    command = [sys.executable, "benchmarks/gate.py", "main", head, "--json", str(answer)]
    done = subprocess.run(command, cwd=FOLDER, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if done.returncode not in (0, 1) or not answer.exists():
        raise SystemExit(done.stdout.decode())
    found = json.loads(answer.read_text(encoding="utf-8"))["benchmarks"]
    return {
        "head": head,
        "alarm": done.returncode == 1,
        "seconds": round(perf_counter() - start, 1),
        "slower": {
            name: round(each["ratio"], 4)
            for name, each in found.items()
            if each["verdict"] == "slower"
        },
        "largest": round(max(each["ratio"] for each in found.values() if "ratio" in each), 4),
        "median": round(
            statistics.median(each["ratio"] for each in found.values() if "ratio" in each), 4
        ),
    }


def main() -> None:
    """Run both kinds in turns, and print a line of each."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--runs", type=int, default=20, help="of each kind (default: %(default)s)")
    parser.add_argument("--json", type=Path, required=True, metavar="FILE")
    args = parser.parse_args()
    clone = Clone(FOLDER)
    branches = [plant(clone, kernel) for kernel in KERNELS]
    runs: list[dict[str, Any]] = []
    for at in range(args.runs):
        for head in ("main", branches[at % len(branches)]):
            runs.append(gate(head))
            print(json.dumps(runs[-1]), flush=True)
            args.json.write_text(json.dumps(runs, indent=1) + "\n", encoding="utf-8")
    alarms = sum(run["alarm"] for run in runs if run["head"] == "main")
    caught = sum(run["alarm"] for run in runs if run["head"] != "main")
    print(f"{alarms} of {args.runs} false alarms; {caught} of {args.runs} slow-downs caught")


if __name__ == "__main__":
    main()
