"""Show a planted slow-down on a dashboard: ``python benchmarks/dashboard_example.py``.

In a clone of this repository three commits follow main, from the first of which on forward on
planes takes half as long again. They and as many before them are measured against the reference,
and the clone's dashboard is written; asv's page of regressions must list the step.
"""

import shutil
import subprocess
import sys

from planted import ROOT, Clone

FOLDER = ROOT / ".asv" / "example"
SLOWER = 0.5
COMMITS = 3


def main() -> None:
    """Plant, measure, publish."""
    clone = Clone(FOLDER)
    # Beside the gains of long ago this step would be small.
    shutil.rmtree(FOLDER / "benchmarks" / "results")
    clone.plant("forward_planes", SLOWER)
    for _ in range(COMMITS - 1):
        clone.git("commit", "--quiet", "--allow-empty", "--message", "Leave it so")
    commits = f"main~{2 * COMMITS}..main"
    for command in (
        ["run", "--launch-method", "forkserver", "--bench", "against_reference", commits],
        ["publish"],
    ):
        subprocess.run([sys.executable, "-m", "asv", *command], cwd=FOLDER, check=True)
    print(f"asv preview in {FOLDER}")


if __name__ == "__main__":
    main()
