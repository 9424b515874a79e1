"""Place the steps of a fitted solver, by a model of its trajectories that runs no network. NumPy only.

Everything that a linear solver does on recorded trajectories follows from inner products. With x_k and e_k the latent
and the prediction of the target run at its k-th timestep, the latent y of the solver is a linear combination of these
vectors. The prediction that the network would make there is modelled as ``e_k + rho_k * (y - x_k)``, so that it is one,
too; and the coefficients of every update are the least squares that a fit would find. rho_k, the response of the
prediction to an error of the latent, is measured as the ratio of the differences of two recorded runs, apart for bands
of spatial frequency: the network takes coarse errors for content, and fine ones for noise.

A step may also compute the conditional half of guidance alone, and take the difference d of both halves from the last
step that computed both, at r. Of the guided prediction ``e = e_null + w * d`` it then makes ``e_k + (w - 1) *
(d_r - d_k)``, since the conditional half ``e_null + d`` is that of its own time.
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
MIXED_TRIED = 400  # the same for each number of steps of which some compute one half of guidance
WHOLE_SHARES = (0.3, 0.4, 0.5, 0.65, 0.8)  # shares of the work that steps of both halves take, as they are tried
MIXED = 2  # sets of steps of both kinds that are returned
SLACK = 1e-9  # tolerance for the rounding of a share of the work
JUMP_RIDGE = 1e-9  # relative ridge of the residual of a single jump


@dataclass(frozen=True)
class Placement:
    """The steps of a solver.

    Attributes:
        steps: the timesteps of the run that it takes, rising indices; the first one is 0.
        whole: for each step, whether it computes both halves of guidance; the first one does.
    """

    steps: Steps
    whole: tuple[bool, ...]

    @classmethod
    def of(cls, steps: Sequence[int]) -> Placement:
        """Return steps that all compute both halves."""
        return cls(tuple(steps), (True,) * len(steps))

    def work(self, half: float) -> float:
        """Return the work, in steps that compute both halves; one that computes a half costs ``half``."""
        return sum(1.0 if whole else half for whole in self.whole)


@dataclass(frozen=True)
class Landscape:
    """The inner products of a target run, and the response of predictions to errors.

    Attributes:
        learned: inner products of x_0 .. x_T, e_0 .. e_{T-1}, with guidance d_0 .. d_{T-1}, and the initial noise, by
            band, over the trajectories that coefficients are fitted to, f64[bands,V,V] with V = 2T+2 or 3T+2.
        judged: the same over the trajectories that errors are measured on.
        response: rho by band and timestep, f64[bands,T].
        history: the number of earlier predictions that an update may use.
        guidance: the weight w of guidance; 1 without it.
    """

    learned: Table
    judged: Table
    response: Table
    history: int
    guidance: float = 1.0

    @property
    def places(self) -> int:
        """T, the number of timesteps of the target run."""
        return self.response.shape[1]

    def error(self, placement: Placement) -> float:
        """Return the mean squared error of the final latents of a solver, as the model predicts it."""
        latent, earlier, last = self._unit(-1), list[Table](), 0
        steps = placement.steps
        for index, step in enumerate(steps):
            following = steps[index + 1] if index + 1 < len(steps) else self.places
            prediction = self._unit(self.places + 1 + step)
            prediction = prediction + self.response[:, step, None] * (latent - self._unit(step))
            if placement.whole[index]:
                last = step
            else:
                first = 2 * self.places + 1
                stale = self._unit(first + last) - self._unit(first + step)
                prediction = prediction + (self.guidance - 1) * stale
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


def place(landscape: Landscape, count: int, half: float | None = None) -> tuple[Placement, ...]:
    """Return candidates for the steps of a solver, those that take both halves of guidance first, then by their error.

    Candidates are the best set by the sum of the residuals of its jumps, and what climbing on the model makes of it;
    and, where some steps may compute one half of guidance, the best two of several shares of such steps, by the model.

    Args:
        landscape: the model of the trajectories.
        count: the work, in steps that compute both halves; step 0 always does.
        half: the cost of a step that computes one half, relative to both, below 1; None where none may.
    """
    places = landscape.places
    if count >= places:
        return (Placement.of(range(places)),)
    start = Placement.of(by_residuals(landscape, count, _free(places, count)))
    climbed, error = climbed_from(start, landscape.error, places, MOST_TRIED)
    found = sorted({start: landscape.error(start), climbed: error}.items(), key=lambda item: item[1])
    mixed = {} if half is None else dict(_mixed(landscape, count, half))
    best = sorted(mixed.items(), key=lambda item: item[1])[:MIXED]
    return tuple(placement for placement, _ in (*found, *best))


def _mixed(landscape: Landscape, count: int, half: float) -> Iterator[tuple[Placement, float]]:
    """Yield steps of both kinds that together cost at most as much as ``count`` whole ones, with their errors."""
    for whole in sorted({max(1, round(share * count)) for share in WHOLE_SHARES}):
        halves = int((count - whole) / half + SLACK)
        total = min(whole + halves, landscape.places)
        if whole >= count or total <= count:
            continue
        steps = by_residuals(landscape, total, _free(landscape.places, total))
        spread = [index * whole // total for index in range(total)]
        kinds = tuple(index == 0 or spread[index] > spread[index - 1] for index in range(total))
        yield climbed_from(Placement(steps, kinds), landscape.error, landscape.places, MIXED_TRIED)


def _free(places: int, count: int) -> list[int]:
    """Return the timesteps that may compute, at least ``count``."""
    spaced = np.linspace(0, places - 1, min(places, max(MOST_PLACES, count)))
    return [int(place) for place in np.unique(spaced.round())]


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


def climbed_from(
    start: Placement, error: Callable[[Placement], float], places: int, most: int
) -> tuple[Placement, float]:
    """Return better steps and their error: single steps move, or change their kind with a neighbour's, while it falls.

    Args:
        start: the steps to start from; the first one stays.
        error: the error of steps.
        places: the number of timesteps.
        most: how many sets of steps are tried.
    """
    best, least, tried = start, error(start), {start}
    improved = True
    while improved and len(tried) < most:
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


def _moved(placement: Placement, places: int) -> Iterator[Placement]:
    """Yield steps with one of them moved, in order, then with the kinds of two neighbours exchanged."""
    steps, whole = placement.steps, placement.whole
    bounds = (*steps, places)
    for index in range(1, len(steps)):
        for shift in SHIFTS:
            if bounds[index - 1] < steps[index] + shift < bounds[index + 1]:
                yield Placement((*steps[:index], steps[index] + shift, *steps[index + 1 :]), whole)
    for index in range(1, len(steps) - 1):
        if whole[index] != whole[index + 1]:
            yield Placement(steps, (*whole[:index], whole[index + 1], whole[index], *whole[index + 2 :]))
