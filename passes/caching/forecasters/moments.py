"""Sufficient statistics for fitting forecasts, and the form in which facts and constants hold their coefficients."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Moments:
    """Sufficient statistics of the regression of a value on its earlier values, per channel, in float64.

    The regressors are the last value, its differences to each value before it, and one. Differences keep the normal
    equations of nearly equal values solvable.

    Args:
        terms: the number of computed values.
        channels: the number of channels of the value.
    """

    def __init__(self, terms: int, channels: int) -> None:
        self.gram = torch.zeros(channels, terms + 1, terms + 1, dtype=torch.float64)
        self.cross = torch.zeros(channels, terms + 1, dtype=torch.float64)
        self.power = torch.zeros(channels, dtype=torch.float64)
        self.count = 0

    def add(self, values: Sequence[Tensor], target: Tensor) -> None:
        """Add samples to the statistics.

        Args:
            values: the computed values, the last one first, each [..., C].
            target: the value to forecast, [..., C].
        """
        last, *before = (value.double() for value in values)
        columns = [last, *(last - value for value in before), torch.ones_like(last)]
        regressors = torch.stack([column.flatten(0, -2).T for column in columns], dim=1)  # [C, terms + 1, S]
        goal = target.double().flatten(0, -2).T.unsqueeze(2)  # [C, S, 1]
        self.gram += torch.bmm(regressors, regressors.transpose(1, 2))
        self.cross += torch.bmm(regressors, goal).squeeze(2)
        self.power += goal.square().sum(dim=(1, 2))
        self.count += goal.shape[1]

    def __add__(self, other: Moments) -> Moments:
        result = Moments(self.gram.shape[1] - 1, len(self.power))
        result.gram, result.cross = self.gram + other.gram, self.cross + other.cross
        result.power, result.count = self.power + other.power, self.count + other.count
        return result

    def ridge(self, prior: Sequence[float], strength: float, *, offset: bool) -> Tensor:
        """Return the coefficients of the regressors by ridge regression towards a prior, f64[C, terms + 1].

        They solve ``(G + strength * diag(G)) (c - prior) = b - G prior``, per channel.
        """
        used = torch.arange(len(prior) + offset)
        towards = torch.zeros(self.cross.shape[1], dtype=torch.float64)
        towards[: len(prior)] = torch.tensor(prior, dtype=torch.float64)
        gram = self.gram[:, used][:, :, used]
        diagonal = torch.diagonal(gram, dim1=1, dim2=2)
        tiny = torch.finfo(torch.float64).tiny + 1e-12 * diagonal.amax(dim=1, keepdim=True)
        residual = (self.cross - self.gram @ towards)[:, used]
        solved = torch.linalg.solve(gram + torch.diag_embed(strength * diagonal + tiny), residual)
        result = towards.expand(len(self.cross), -1).clone()
        result[:, used] += solved
        return result

    def error(self, coefficients: Tensor) -> float:
        """Return the summed squared error of coefficients of the regressors [C, terms + 1] on these samples."""
        fitted = (coefficients * (self.gram @ coefficients.unsqueeze(2)).squeeze(2)).sum()
        return max(0.0, float(self.power.sum() - 2 * (coefficients * self.cross).sum() + fitted))


def gains_of(coefficients: Tensor) -> Tensor:
    """Convert coefficients of the regressors [C, terms + 1] to gains of the values and the offset, [terms + 1, C]."""
    last, *differences, offset = coefficients.unbind(dim=1)
    gains = [last + sum(differences, torch.zeros_like(last)), *(-value for value in differences), offset]
    return torch.stack(gains)
