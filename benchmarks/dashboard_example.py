"""Show a planted slow-down on a dashboard: ``python benchmarks/dashboard_example.py``.

In a clone of this repository two commits follow main, in which forward on planes takes half as long
again. They and main are measured, and the clone's dashboard is written; asv's page of regressions
must list them.
"""

import subprocess

from planted import ROOT, Clone

FOLDER = ROOT / ".asv" / "example"
SLOWER = 0.5
BENCHMARKS = r"times\.NCHW"


def main() -> None:
    """Plant, measure, publish."""
    clone = Clone(FOLDER)
    clone.plant("forward_planes", SLOWER)
    clone.git("commit", "--quiet", "--allow-empty", "--message", "Leave it so")
    for command in (
        ["run", "--launch-method", "forkserver", "--bench", BENCHMARKS, "main~3..main"],
        ["publish"],
    ):
        subprocess.run(["asv", *command], cwd=FOLDER, check=True)
    print(f"asv preview in {FOLDER}")


if __name__ == "__main__":
    main()
