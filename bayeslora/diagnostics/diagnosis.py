"""What was found of a posterior: verdicts in words, numbers, pictures, and the data of arviz behind them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bayeslora import files
from bayeslora.diagnostics import versions
from bayeslora.predict.metrics import number_to_json
from bayeslora.predict.plots import save_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from bayeslora.predict.resampling import Interval

__all__ = ["MODEL", "NEAR", "WORTH", "Diagnosis", "listed"]

#: The questions.
NEAR, MODEL, WORTH = "How near is it to the posterior?", "How good is the model?", "What are the probabilities worth?"


@dataclass
class Diagnosis:
    """What was found.

    Attributes:
        verdicts: sentences, by the question that they answer.
        figures: numbers, by name.
        pictures: by the name of their file, without its ending.
        data: of `to_inference_data`.
    """

    verdicts: dict[str, list[str]] = field(default_factory=dict)
    figures: dict[str, Any] = field(default_factory=dict)
    pictures: dict[str, Figure] = field(default_factory=dict)
    data: Any = None

    def say(self, question: str, sentence: str, **figures: Any) -> None:
        """Add a verdict and the numbers that it rests on."""
        self.verdicts.setdefault(question, []).append(sentence)
        self.figures |= figures

    def markdown(self, title: str) -> str:
        """The verdicts as a Markdown text with the pictures."""
        lines = [f"# {title}", ""]
        for question, sentences in self.verdicts.items():
            lines += [f"## {question}", "", *(f"- {sentence}" for sentence in sentences), ""]
        lines += ["## Pictures", "", *(f"![{name}]({name}.png)" for name in self.pictures), ""]
        return "\n".join(lines)

    def save(self, folder: str | Path, title: str) -> None:
        """Write ``posterior.nc``, ``diagnosis.md``, ``diagnosis.json`` and the pictures as PNG."""
        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        versions.write(self.data, target / "posterior.nc")
        for name, picture in self.pictures.items():
            save_figure(picture, target / f"{name}.png")
        files.write_json(target / "diagnosis.json", _plain(self.figures))
        files.write_text(target / "diagnosis.md", self.markdown(title))


def listed(measured: Mapping[str, Interval], digits: str = ".3f") -> str:
    """Metrics with their intervals; what has no value, as a correlation of one row, is left out."""
    said = []
    for name, each in measured.items():
        ends = "" if math.isnan(each.low) else f" ({each.low:{digits}} to {each.high:{digits}})"
        said += [] if math.isnan(each.value) else [f"{name} {each.value:{digits}}{ends}"]
    return ", ".join(said)


def _plain(figures: Mapping[str, Any]) -> dict[str, Any]:
    """Figures as JSON has them."""
    return {
        name: _plain(value) if isinstance(value, Mapping) else number_to_json(value) for name, value in figures.items()
    }
