"""How long a step will take, fitted while running."""

from collections.abc import Sequence

from baton_engine.runner import StepLoad

_DECAY = 0.98  # weight of an observation per later one: about 50 steps are remembered
_PRIOR_WEIGHT = 0.05  # of one observation: keeps coefficients of what has not happened lately
_REFIT_EVERY = 8
_SWEEPS = 12
_OUTLIER = 5.0  # a step this many times longer than predicted counts as this long: the machine was busy elsewhere
_SETTLED = 16


class StepTimeFit:
    """Seconds = non-negative coefficients x (1, fields of StepLoad), least squares of the relative error.

    Plain floats: it runs once per step on a few numbers.
    """

    def __init__(self) -> None:
        size = len(StepLoad._fields) + 1
        self._products = [[0.0] * size for _ in range(size)]
        self._targets = [0.0] * size
        self._largest = [0.0] * size  # of squared features: the scale of each coefficient's prior
        self._coefficients = [0.0] * size
        self.observations = 0

    def predict_s(self, load: StepLoad) -> float:
        """Predicted seconds; non-decreasing in every field."""
        return sum(c * x for c, x in zip(self._coefficients, _features(load), strict=True))

    def observe(self, load: StepLoad, seconds: float) -> None:
        """Learn from a step that took this long."""
        if self.observations >= _SETTLED:
            seconds = min(seconds, _OUTLIER * self.predict_s(load))
        seconds = max(seconds, 1e-6)
        scaled = [x / seconds for x in _features(load)]
        for i, x in enumerate(scaled):
            self._products[i] = [_DECAY * p + x * y for p, y in zip(self._products[i], scaled, strict=True)]
            self._targets[i] = _DECAY * self._targets[i] + x
            self._largest[i] = max(self._largest[i], x * x)
        self.observations += 1
        if self.observations < _SETTLED or self.observations % _REFIT_EVERY == 0:
            self._refit()

    def _refit(self) -> None:
        """Coordinate descent, each coefficient clipped at zero."""
        prior = list(self._coefficients)
        for _ in range(_SWEEPS):
            for i, row in enumerate(self._products):
                if self._largest[i] == 0.0:
                    continue
                weight = _PRIOR_WEIGHT * self._largest[i]
                others = sum(p * c for p, c in zip(row, self._coefficients, strict=True)) - row[i] * self._coefficients[i]
                self._coefficients[i] = max(0.0, (self._targets[i] - others + weight * prior[i]) / (row[i] + weight))


def _features(load: StepLoad) -> Sequence[float]:
    return (1.0, *load)
