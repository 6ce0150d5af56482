"""Families of posteriors beside the true one, in one picture. nearest.py draws it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bayeslora.predict.plots import save_figure

#: Told apart by the colour-blind (Okabe and Ito).
DOT, BAND, INK = "#0072B2", "#E69F00", "#333333"
#: Up to the first, draws stand for the posterior once they are weighted (see `khat`); the other ends the panel.
TRUSTED, MOST = 0.7, 3.0


def draw(
    families: Mapping[str, Mapping[str, Any]], reference: Mapping[str, Any], floor: Mapping[str, float], path: Path
) -> None:
    """Draw, a line for each family: distance of predictions, spread of logits, k-hat of layers, and leave-one-out.

    Args:
        families: figures by name, from top to bottom.
        reference: figures of the sampler.
        floor: how far two of its chains are from each other.
        path: of the picture.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    places = range(len(families))
    style: Any = {"font.size": 9, "axes.edgecolor": INK, "axes.spines.top": False, "axes.spines.right": False}
    with rc_context(style):
        figure = Figure(figsize=(11.5, 0.32 * len(families) + 1.3), dpi=160, layout="constrained")
        near, wide, khat, out = figure.subplots(1, 4, sharey=True, width_ratios=(1.1, 1, 1, 1))
        near.axvspan(0, floor["variation"], color=BAND, alpha=0.35, linewidth=0)
        near.scatter([row["variation"] for row in families.values()], places, color=DOT, s=28, zorder=3)
        near.set(xlim=(0, None), xlabel="total variation of predictions\n(band: two NUTS chains)")
        near.set_yticks(places, list(families))
        near.invert_yaxis()

        wide.axvline(1, color=BAND, linewidth=2)
        for place, row in zip(places, families.values(), strict=True):
            if "spread" not in row:
                continue
            wide.plot([row["spread_low"], row["spread_high"]], [place, place], color=DOT, linewidth=1.5)
            wide.scatter(row["spread"], place, color=DOT, s=28, zorder=3)
        wide.set_xscale("log", base=2)
        wide.xaxis.set_major_formatter("{x:g}")
        wide.set(xlabel="deviation of logits / that of NUTS\n(median, and 80 % of the rows)")

        khat.axvspan(0, TRUSTED, color=BAND, alpha=0.35, linewidth=0)
        for place, row in zip(places, families.values(), strict=True):
            for value in (row.get("khat_by_layer") or {}).values():
                marker = "o" if value < MOST else ">"
                khat.scatter(min(max(value, 0), MOST), place, color=DOT, marker=marker, s=28, zorder=3)
        khat.set(xlim=(0, MOST * 1.04), xlabel=f"k-hat of each layer\n(band: below {TRUSTED}; arrow: {MOST:g} or more)")

        out.axvspan(*_interval(reference), color=BAND, alpha=0.35, linewidth=0)
        for place, row in zip(places, families.values(), strict=True):
            if "elpd_loo" in row:
                out.plot(_interval(row), [place, place], color=DOT, linewidth=1.5)
                trusted = not row["pareto_k_bad"]
                out.scatter(
                    row["elpd_loo"], place, s=28, zorder=3, facecolor=DOT if trusted else "white", edgecolor=DOT
                )
        out.set(xlabel="elpd_loo ± standard error (band: NUTS)\nhollow: rows with a high k")
        for axes in (near, khat, out):
            axes.xaxis.set_major_locator(MaxNLocator(4))
        for axes in (near, wide, khat, out):
            axes.grid(axis="both", color="#E5E5E5", linewidth=0.6)
            axes.set_axisbelow(True)
            axes.tick_params(axis="y", length=0)
        save_figure(figure, path)


def _interval(row: Mapping[str, Any]) -> tuple[float, float]:
    return row["elpd_loo"] - row["elpd_loo_error"], row["elpd_loo"] + row["elpd_loo_error"]
