"""Show a planted slow-down on a dashboard: ``python benchmarks/dashboard_example.py``.

In a clone of this repository four commits follow main, from the first of which on forward on planes
takes half as long again. They and main are measured, and the clone's dashboard is written; asv's
page of regressions must list the step.
"""

import subprocess

from planted import ROOT, Clone

FOLDER = ROOT / ".asv" / "example"
SLOWER = 0.5
COMMITS = 4  # asv takes two for noise, where those before them differ as they do on two cores
BENCHMARKS = r"times\.NCHW"


def main() -> None:
    """Plant, measure, publish."""
    clone = Clone(FOLDER)
    clone.plant("forward_planes", SLOWER)
    for _ in range(COMMITS - 1):
        clone.git("commit", "--quiet", "--allow-empty", "--message", "Leave it so")
    for command in (
        [
            "run",
            "--launch-method",
            "forkserver",
            "--bench",
            BENCHMARKS,
            f"main~{COMMITS + 1}..main",
        ],
        ["publish"],
    ):
        subprocess.run(["asv", *command], cwd=FOLDER, check=True)
    print(f"asv preview in {FOLDER}")


if __name__ == "__main__":
    main()
