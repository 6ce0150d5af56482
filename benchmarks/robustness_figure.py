"""Draw the figure of robustness: ``python benchmarks/robustness_figure.py``.

The points are of six runs of ``benchmarks/studies/robustness.yaml``: of most methods, later of `svi` alone, without
and with a temperature, with the second moments and, at 5e-3, the limit that are its default now, and of `adalora`.
"""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from bayeslora.app.studies.figures import boxes

ROOT = Path(__file__).parent.parent


def main() -> None:
    """Read the points and write the picture."""
    points = pd.read_csv(ROOT / "benchmarks/results/robustness/points.csv")
    boxes(points).savefig(ROOT / "docs/images/robustness.png", dpi=110, bbox_inches="tight")


if __name__ == "__main__":
    main()
