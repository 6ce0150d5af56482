from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from command_line import call

from bayeslora.app.studies import Study, estimate
from bayeslora.errors import SettingError

Made = Callable[..., dict[str, Any]]
#: Of twelve rows.
BATCHES, EPOCHS = 6, 8
#: Seconds of a fit that are always the same, and of a row that is predicted.
FIXED, ROW = 2.0, 0.1


class Clock:
    """Fits and predictions whose seconds are known, and what was asked of them."""

    def __init__(self, step: float, once: float, least: float) -> None:
        self.now, self.step, self.once, self.least = 0.0, step, once, least
        self.fits: list[tuple[str, int, float]] = []
        #: Seconds that a fit takes by chance, by its number.
        self.noise: dict[int, float] = {}

    def monotonic(self) -> float:
        return self.now

    def fit(self, program: Any, rows: Any, backend: str, **settings: Any) -> Any:
        inner = settings.get("of_settings", settings)
        batches, epochs = math.ceil(len(rows) / inner["batch_size"]), inner["epochs"]
        if epochs < self.least:
            raise SettingError("So few epochs are not enough.")
        self.fits.append((backend, batches, epochs))
        self.now += self.noise.get(len(self.fits), 0.0)
        one = FIXED + self.step * math.ceil(epochs * batches) + self.once * batches
        self.now += one * settings.get("members", 1)
        found = SimpleNamespace(predict=self.predict)
        found.chains = [found]
        return found

    def predict(self, rows: Any, *args: Any, **how: Any) -> None:
        self.now += ROW * len(rows)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Clock]:
    def made(step: float = 0.3, once: float = 0.0, least: float = 0.0) -> Clock:
        found = Clock(step, once, least)
        monkeypatch.setattr(estimate, "time", found)
        monkeypatch.setattr(estimate, "inference", found)
        monkeypatch.setattr(estimate, "mixture_of", lambda fits: fits[0])
        return found

    return made


def estimated(study: Study) -> Iterator[estimate.Estimate]:
    return estimate.estimate(study.targets, study.results)


def known(study: Made, methods: Any) -> Study:
    """A study whose fits have `BATCHES` and `EPOCHS`."""
    common = {"train_size": 12, "heldout_size": 20, "settings": {"batch_size": 2, "epochs": EPOCHS}}
    return Study(study(methods=methods, seeds=[0, 3], common=common))


@pytest.mark.parametrize(
    ("step", "once", "least"),
    [(0.3, 0.0, 0.0), (0.3, 0.7, 0.0), (0.01, 0.0, 0.0), (0.01, 0.3, 0.0), (0.0, 0.5, 0.0), (0.3, 0.0, 3.0)],
)
def test_seconds_are_of_steps_and_of_rows(
    step: float, once: float, least: float, study: Made, clock: Callable[..., Clock]
) -> None:
    made = clock(step, once, least)
    (found,) = estimated(known(study, ["mle"]))
    assert found.fit_seconds == pytest.approx(FIXED + step * EPOCHS * BATCHES + once * BATCHES)
    assert found.predict_seconds == pytest.approx(20 * ROW)
    if step == 0.3:  # slow ones are not made in full
        assert all(batches * epochs <= 2 * max(least + 1, 1) for _, batches, epochs in made.fits)


def test_noise_tells_nothing_of_steps_where_all_rows_are_one_batch(study: Made, clock: Callable[..., Clock]) -> None:
    made, noise = clock(0.3), 0.5
    made.noise = {3: noise}  # the longer of the two fits on as many batches as there are
    settings = {"train_size": 12, "heldout_size": 20, "settings": {"batch_size": 12, "epochs": EPOCHS}}
    (found,) = estimated(Study(study(methods=["mle"], seeds=[0, 3], common=settings)))
    assert (made.fits[1], made.fits[2]) == (("mle", 1, 1.0),) * 2
    # Three steps of four epochs, less one, are told from it by that noise.
    assert found.fit_seconds == pytest.approx(FIXED + 0.3 * EPOCHS, abs=noise * EPOCHS / 3)


def test_fits_that_are_made_of_others_take_their_times(study: Made, clock: Callable[..., Clock]) -> None:
    made = clock()
    ensemble = {"backend": "ensemble", "settings": {"of": "mle", "members": 4}}
    methods = {"mle": {}, "whole": ensemble, "over": {**ensemble, "start": "mle"}, "chains": {"backend": "mle"}}
    methods["chains"]["chains"] = 3
    mle, whole, over, chains = estimated(known(study, methods))
    assert whole.fit_seconds == pytest.approx(4 * mle.fit_seconds)
    assert over.fit_seconds == pytest.approx(3 * mle.fit_seconds)  # the first member is there
    assert chains.fit_seconds == pytest.approx(3 * mle.fit_seconds)
    assert made.fits


def test_what_is_shared_is_made_once_and_lines_come_one_by_one(
    study: Made, clock: Callable[..., Clock], monkeypatch: pytest.MonkeyPatch
) -> None:
    made, networks = clock(), []
    build = estimate.runs.build_program
    monkeypatch.setattr(estimate.runs, "build_program", lambda *args: networks.append(1) or build(*args))
    methods = {"around": {"backend": "map", "start": "mle"}, "again": {"backend": "map", "start": "mle"}, "mle": {}}
    lines = estimated(known(study, methods))
    next(lines)
    first = len(made.fits)
    assert {backend for backend, *_ in made.fits} == {"mle", "map"}
    assert max(epochs for backend, _, epochs in made.fits if backend == "map") > 1  # it may make no steps at all
    list(lines)
    assert len(made.fits) == first and len(networks) == 1  # "again" is the same fit, and "mle" was needed before


def test_a_chain_is_as_long_as_its_draws(
    study: Made, clock: Callable[..., Clock], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = clock()

    def fit(program: Any, rows: Any, backend: str, draws: int, warmup: int, **settings: Any) -> Any:
        made.now += FIXED + 0.1 * (draws + warmup)
        made.fits.append((backend, len(rows), draws))
        return SimpleNamespace(predict=made.predict)

    monkeypatch.setattr(made, "fit", fit)
    chain = {"settings": {"draws": 400, "warmup": 200}}
    (found,) = estimated(Study(study(methods={"sgld": chain}, common={"train_size": 12, "heldout_size": 20})))
    assert found.fit_seconds == pytest.approx(FIXED + 60.0)
    assert made.fits == [("sgld", 12, 4), ("sgld", 12, 8)]


def test_estimates_are_of_what_is_left_and_errors_are_told(study: Made, tmp_path: Path) -> None:
    methods = {"quick": {"settings": {"seconds": 0.4}}, "around": {"backend": "quick", "start": "quick"}, "hungry": {}}
    quick, around, hungry = estimated(Study(study(methods=methods, seeds=[0, 1]), tmp_path / "out"))
    assert quick.fit_seconds >= 0.4 and around.fit_seconds < quick.fit_seconds
    assert (quick.cells, around.cells, hungry.cells) == (2, 2, 2)
    assert hungry.error.startswith("MemoryError: no room") and not (tmp_path / "out").exists()


def test_a_dry_run_shows_cells_and_runs_none(
    study: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str], plugin: Path
) -> None:
    made = study(methods=["quick"], seeds=[0])
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(made))
    words = ["compare", tmp_path / "study.yaml", "--output", tmp_path / "out", "--plugin", plugin]
    assert call(*words, "--dry-run") == 0
    shown = capsys.readouterr().out
    assert Study(made).cells[0].name in shown and "[1/1] demo, demo, quick: 1 left, " in shown
    assert "1 cells at most, about " in shown
    assert not (tmp_path / "out").exists()


def test_a_part_of_the_rows_has_its_part_of_those_that_are_set_aside() -> None:
    settings = {"heldout_size": 60, "of_settings": {"heldout_size": 5, "epochs": 1}}
    assert estimate._set_aside(settings, 0.1) == {"heldout_size": 6, "of_settings": {"heldout_size": 1, "epochs": 1}}
    assert estimate._set_aside({"heldout_size": None, "epochs": 2}, 0.1) == {"heldout_size": None, "epochs": 2}


def test_a_dry_run_of_what_would_fail_says_so(
    study: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str], plugin: Path
) -> None:
    methods = {"quick": {}, "hungry": {}, "too": {"backend": "hungry"}}
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study(methods=methods, seeds=[0, 1])))
    words = ["compare", tmp_path / "study.yaml", "--output", tmp_path / "out", "--plugin", plugin, "--dry-run"]
    assert call(*words) == 1
    told = capsys.readouterr()
    assert told.out.count("MemoryError: no room") == 1 and "too: 2 left, fails as [1/3] does" in told.out
    assert "2 cells at most, about " in told.out and "2 of 3 lines would fail" in told.err
