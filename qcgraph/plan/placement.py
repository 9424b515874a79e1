"""Place the computing steps of a fitted solver, by a model of its trajectories that runs no network. NumPy only.

Everything that a linear solver does on recorded trajectories follows from inner products. With x_k and e_k the latent
and the prediction of the target run at its k-th timestep, the latent y of the solver is a linear combination of these
vectors. The prediction that the network would make there is modelled as ``e_k + rho_k * (y - x_k)``, so that it is one,
too; and the coefficients of every update are the least squares that a fit would find. rho_k, the response of the
prediction to an error of the latent, is measured as the ratio of the differences of two recorded runs, apart for bands
of spatial frequency: the network takes coarse errors for content, and fine ones for noise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

Table = npt.NDArray[np.float64]
Steps = tuple[int, ...]

BAND_EDGES = (0.08, 0.16, 0.3)  # cycles per position between bands of spatial frequency
RIDGE = 1e-7  # relative ridge of the fits that are simulated
MOST_PLACES = 100  # timesteps that may compute; more of them are thinned out evenly
SHIFTS = (1, -1, 2, -2, 4, -4)  # moves of a computing step that climbing tries, in places
MOST_TRIED = 1500  # sets of steps that climbing simulates
JUMP_RIDGE = 1e-9  # relative ridge of the residual of a single jump


@dataclass(frozen=True)
class Landscape:
    """The inner products of a target run, and the response of predictions to errors.

    Attributes:
        learned: inner products of x_0 .. x_T, e_0 .. e_{T-1} and the initial noise, by band, over the trajectories that
            coefficients are fitted to, f64[bands,2T+2,2T+2].
        judged: the same over the trajectories that errors are measured on.
        response: rho by band and timestep, f64[bands,T].
        history: the number of earlier predictions that an update may use.
    """

    learned: Table
    judged: Table
    response: Table
    history: int

    @property
    def places(self) -> int:
        """T, the number of timesteps of the target run."""
        return self.response.shape[1]

    def error(self, steps: Sequence[int]) -> float:
        """Return the mean squared error of final latents when these timesteps compute, as the model predicts it."""
        latent, earlier = self._unit(-1), list[Table]()
        for index, step in enumerate(steps):
            following = steps[index + 1] if index + 1 < len(steps) else self.places
            prediction = self._unit(self.places + 1 + step)
            prediction = prediction + self.response[:, step, None] * (latent - self._unit(step))
            terms = np.stack([latent, prediction, *earlier[: self.history]])
            latent = np.einsum("r,rbi->bi", self._fitted(terms, following), terms)
            earlier.insert(0, prediction)
        return self._square(latent - self._unit(self.places))

    def _fitted(self, terms: Table, place: int) -> Table:
        """Return the coefficients of terms [R,bands,V] that come closest to x at a place, f64[R]."""
        products = np.einsum("rbi,bij->rbj", terms, self.learned)
        own = np.einsum("rbj,sbj->rs", products, terms)
        cross = products[:, :, place].sum(axis=1)
        ridge = RIDGE * np.trace(own) / len(own)
        solution: Table = np.linalg.solve(own + ridge * np.eye(len(own)), cross)
        return solution

    def _unit(self, vector: int) -> Table:
        """Return one of the vectors as a combination of all of them, f64[bands,V]."""
        result = np.zeros(self.learned.shape[:2])
        result[:, vector] = 1.0
        return result

    def _square(self, vector: Table) -> float:
        return float(np.einsum("bi,bij,bj->", vector, self.judged, vector))


def inner_products(vectors: Sequence[npt.NDArray[np.float32]]) -> Table:
    """Return the inner products of vectors [N,C,H,W] by band of spatial frequency, over N and all positions, per value.

    By Parseval's theorem they are sums over frequencies, so that no band has to be transformed back.

    Args:
        vectors: V arrays, each f32[N,C,...]; the axes after C are spatial.

    Returns:
        f64[bands,V,V].
    """
    shape = vectors[0].shape[2:]
    weights = [weight.reshape(-1) for weight in _band_weights(shape)]
    total = np.zeros((len(weights), len(vectors), len(vectors)))
    axes = tuple(range(-len(shape), 0))
    for sample in range(len(vectors[0])):
        # In float64: what jumps leave is the small difference of large products.
        values = np.stack([vector[sample] for vector in vectors]).astype(np.float64)
        spectra = np.fft.fftn(values, axes=axes, norm="ortho")
        flat = spectra.reshape(len(vectors), vectors[0].shape[1], -1)
        for band, weight in enumerate(weights):
            part = flat[:, :, weight].reshape(len(vectors), -1)
            total[band] += (part.real @ part.real.T) + (part.imag @ part.imag.T)
    return total / vectors[0].size


def _band_weights(shape: Sequence[int]) -> list[npt.NDArray[np.bool_]]:
    """Return which frequencies of an array of this shape belong to each band, bool[*shape]."""
    squares = [np.fft.fftfreq(size) ** 2 for size in shape]
    grids = np.meshgrid(*squares, indexing="ij")
    frequency = np.sqrt(sum(grids)) if grids else np.zeros(())
    edges = (-1.0, *BAND_EDGES, np.inf)
    return [(frequency >= low) & (frequency < high) for low, high in pairwise(edges)]


def response(
    latents: Sequence[npt.NDArray[np.float32]],
    predictions: Sequence[npt.NDArray[np.float32]],
    other_latents: Sequence[npt.NDArray[np.float32]],
    other_predictions: Sequence[npt.NDArray[np.float32]],
) -> Table:
    """Return the change of a prediction for each 1 of change of the latent, by band and timestep, f64[bands,T].

    Args:
        latents: latents of one run at T timesteps, each f32[N,C,...].
        predictions: its predictions there.
        other_latents: latents of another run from the same noise.
        other_predictions: its predictions there.
    """
    columns = []
    for ours, made, theirs, other in zip(latents, predictions, other_latents, other_predictions, strict=False):
        products = inner_products([theirs - ours, other - made])
        length, common = products[:, 0, 0], products[:, 0, 1]
        columns.append(np.divide(common, length, out=np.zeros_like(common), where=length > 0))
    return np.stack(columns, axis=1)


def place(landscape: Landscape, count: int) -> tuple[Steps, ...]:
    """Return candidate sets of computing steps, the one of the least error by the model first.

    Candidates are the best set by the sum of the residuals of its jumps, and what climbing on the model makes of it.

    Args:
        landscape: the model of the trajectories.
        count: the number of computing steps; step 0 always computes.
    """
    places = landscape.places
    if count >= places:
        return (tuple(range(places)),)
    free = np.unique(np.linspace(0, places - 1, min(places, max(MOST_PLACES, count))).round().astype(int)).tolist()
    start = by_residuals(landscape, count, free)
    climbed, error = climbed_from(start, landscape.error, places)
    found = sorted({start: landscape.error(start), climbed: error}.items(), key=lambda item: item[1])
    return tuple(steps for steps, _ in found)


def by_residuals(landscape: Landscape, count: int, free: Sequence[int]) -> Steps:
    """Return the steps of least summed residual of their jumps, by dynamic programming over pairs of computing steps.

    The residual of a jump from r to s is the squared error of the least squares of x_s in x_r, e_r and the prediction
    of the computing step before r, on the target run.

    Args:
        landscape: the model of the trajectories.
        count: the number of computing steps.
        free: the timesteps that may compute, rising; the first one computes.
    """
    products = (landscape.learned + landscape.judged).sum(axis=0)
    offset, end, size = landscape.places + 1, landscape.places, len(free)
    later = [*free, end]
    residuals = np.full((size, size, size + 1), np.inf)  # the step before, the step, the next one; before = step: none
    for step in range(size):
        for before in range(step + 1):
            known = [free[step], offset + free[step], *([offset + free[before]] if before < step else [])]
            own = products[np.ix_(known, known)]
            own = own + JUMP_RIDGE * np.trace(own) / len(own) * np.eye(len(own))
            cross = products[np.ix_(known, later[step + 1 :])]
            squares = products[later[step + 1 :], later[step + 1 :]]
            left = squares - (cross * np.linalg.solve(own, cross)).sum(axis=0)
            residuals[before, step, step + 1 :] = np.maximum(left, 0)
    cost = np.full((size, size), np.inf)
    cost[0, 0] = 0.0
    parents = []
    for _ in range(1, count):
        through = cost[:, :, None] + residuals[:, :, :size]  # before, step, next
        parents.append(through.argmin(axis=0))
        cost = through.min(axis=0)
    final = cost + residuals[:, :, size]
    before, step = (int(value) for value in np.unravel_index(int(final.argmin()), final.shape))
    chosen = [step]
    for parent in reversed(parents):
        before, step = int(parent[before, step]), before
        chosen.append(step)
    return tuple(free[index] for index in reversed(chosen))


def climbed_from(start: Steps, error: Callable[[Steps], float], places: int) -> tuple[Steps, float]:
    """Return better steps and their error: single steps move as long as that lowers the error.

    Args:
        start: the steps to start from; the first one stays.
        error: the error of steps.
        places: the number of timesteps.
    """
    best, least, tried = start, error(start), {start}
    improved = True
    while improved and len(tried) < MOST_TRIED:
        improved = False
        for candidate in _moved(best, places):
            if candidate in tried:
                continue
            tried.add(candidate)
            found = error(candidate)
            if found < least:
                best, least, improved = candidate, found, True
                break
    return best, least


def _moved(steps: Steps, places: int) -> Iterator[Steps]:
    """Yield steps with one of them moved, in order."""
    bounds = (*steps, places)
    for index in range(1, len(steps)):
        for shift in SHIFTS:
            if bounds[index - 1] < steps[index] + shift < bounds[index + 1]:
                yield (*steps[:index], steps[index] + shift, *steps[index + 1 :])
