"""The temperature of what a guide predicts, chosen on rows that its weights have not seen."""

from __future__ import annotations

import time
from dataclasses import replace

from bayeslora.inference.base import Run
from bayeslora.inference.variational.posterior import VariationalPosterior
from bayeslora.predict.prediction import ClassPrediction
from bayeslora.predict.temperature import gain, weighed_temperature

__all__ = ["DRAWS", "soften"]

#: Draws by which the rows are predicted: as many as by default in any prediction.
DRAWS = 10


def soften(posterior: VariationalPosterior, run: Run) -> None:
    """Choose the temperature of a posterior's predictions on the run's held-out rows, and say so in its record.

    A bound on the likelihood of the training rows cannot tell how sure predictions of other rows may be: all that is a
    point estimate, such as B, the head and, with ``prior_mean="learned"``, the mean of A, fits the training rows as
    closely as it can. One number, chosen under a hyperprior (see `weighed_temperature`), tells what is left of that
    beside the noise. It is 1 at least: the noise is what the guide does not know, and as few rows as are set aside of
    little data say at times by chance that it knows more (of 400 rows of the demo 40 ask for 0.77, by which 2,000
    others have an NLL of 0.556 in place of 0.530). It is of the default predictions alone, and the best guess of a
    label stays what it was.

    Args:
        posterior: a guide that was trained on other rows.
        run: whose ``heldout`` rows have labels that are classes.

    References:
        Guo, Pleiss, Sun and Weinberger, *On calibration of modern neural networks*, ICML 2017.
    """
    begun = time.monotonic()
    found = posterior.predict(run.heldout, DRAWS, seed=run.seed, progress=run.progress)
    assert isinstance(found, ClassPrediction)
    temperature = max(1.0, weighed_temperature(found)[0])
    posterior.soften(temperature)
    record = posterior.record
    cost = record.cost | {"seconds": record.cost["seconds"] + time.monotonic() - begun}
    posterior.record = replace(record, cost=cost, history=[*record.history, gain(found, temperature)])
