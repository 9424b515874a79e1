"""A compiled denoiser in place of a diffusers transformer.

It runs on NumPy, and imports torch only where a host uses it. On a device, a runner takes tensors of it unchanged.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import numpy.typing as npt

from qcgraph.errors import BundleError, UsageError
from qcgraph.plan.spec import Condition, ModelSpec
from qcgraph.plan.steps import StepPlan
from qcgraph.sampling.conditions import Conditions
from qcgraph.sampling.device import NOT_FINITE, NOT_FINITE_HINT, DeviceRunner, LateHostCheck, OnDevice
from qcgraph.sampling.host_check import HALF_TOLERANCES, TOLERANCE, HostCheck
from qcgraph.sampling.loop import Request
from qcgraph.sampling.runner import Runner
from qcgraph.sampling.tensors import FLOATS, INTEGERS, Fetched, as_array, checked_values, is_tensor, like, on_device

if TYPE_CHECKING:
    import torch

DTYPES = ("torch.float32", "torch.float16", "torch.bfloat16")  # dtypes of latents that a host may use
DIFFUSERS_LABEL = "class_label"  # the condition that diffusers calls class_labels
DIFFUSERS_NULL_CLASS = 1000  # the class that DiTPipeline gives for the unconditional half, whatever the model
LARGEST_CLASS = 2**53  # classes below this are exact as floating-point numbers


class UncheckedLatentsWarning(UserWarning):
    """A denoiser cannot check whether the latents that it is given are updated as its plan says."""


@dataclass(frozen=True)
class DenoiserOutput:
    """The output of a diffusers transformer.

    Attributes:
        sample: the noise prediction [B,C_out,H,W].
    """

    sample: Any

    def __getitem__(self, index: int | str) -> Any:
        return (self.sample,)[index] if isinstance(index, int) else {"sample": self.sample}[index]


@dataclass(frozen=True)
class DenoiserConfig(Mapping[str, Any]):
    """The configuration that a diffusers pipeline reads from its transformer, as attributes and as a mapping.

    Attributes:
        in_channels: the channels of a latent.
        out_channels: the channels of the prediction, including the learned sigma.
        sample_size: the height and width of a latent; one number where they are the same.
        num_embeds_ada_norm: the number of classes; None where the model has no class label.
    """

    in_channels: int
    out_channels: int
    sample_size: int | tuple[int, int]
    num_embeds_ada_norm: int | None

    @classmethod
    def of(cls, spec: ModelSpec) -> DenoiserConfig:
        """Return the configuration of a denoiser."""
        channels, height, width = spec.latent_shape
        classes = None if spec.label is None else spec.label.count
        return cls(channels, spec.output_channels, height if height == width else (height, width), classes)

    def __getitem__(self, key: str) -> Any:
        if key not in set(self):
            raise KeyError(key)
        return getattr(self, key)

    def __iter__(self) -> Iterator[str]:
        return (field.name for field in fields(self))

    def __len__(self) -> int:
        return len(fields(self))


class Denoiser:
    """A compiled denoiser with the call of a diffusers transformer, with the cache state of one request.

    It replaces the transformer of a pipeline: ``pipe.transformer = qcgraph.load("out")``. The state follows the rules
    of `qcgraph.sampling.loop.Request`: the first timestep of the plan starts a new trajectory. Trajectories that
    interleave, in threads or in turns, need a `request` each. Trajectories that share one are told apart by their
    latents, and refused. Where any latents are allowed (``own_updates``), a trajectory that has not ended has to be
    given up with `restart` before the next one begins. Calls may come from any thread; simultaneous calls wait for each
    other.

    A copy (``copy.copy``, ``copy.deepcopy``) is a `request`. It cannot be pickled.

    Args:
        runner: the backend.
        plan: the step plan the denoiser was compiled for.
        spec: the specification of the denoiser.
        own_updates: whether the host may change latents in another way than the plan's sampler (see
            `qcgraph.sampling.host_check`).
    """

    def __init__(self, runner: Runner, plan: StepPlan, spec: ModelSpec, *, own_updates: bool = False) -> None:
        self._runner = runner
        self._device_runner = runner if isinstance(runner, DeviceRunner) else None
        self._request = Request(runner if self._device_runner is None else OnDevice(self._device_runner), plan, spec)
        self._host_check = None if own_updates else HostCheck(plan, spec)
        self._late = None if self._device_runner is None else LateHostCheck(self._host_check, len(plan))
        self._first: Any = None  # the first latent of the trajectory, where the latents do not identify it
        self._precision = ""  # dtype of the latents of the trajectory
        self._fetched = {condition.name: Fetched() for condition in spec.conditions}
        self._warned = False
        self._lock = threading.Lock()
        self._dtype = "float32"
        self.plan = plan
        self.spec = spec
        self.config = DenoiserConfig.of(spec)

    def __repr__(self) -> str:
        return f"Denoiser({self.spec.name}: {self.plan.describe()})"

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which a pipeline draws its latents. The denoiser always computes in float32."""
        import torch

        chosen: torch.dtype = getattr(torch, self._dtype)
        return chosen

    @property
    def device(self) -> torch.device:
        """The device that runs the graphs; other tensors are copied to it, and the prediction is copied back."""
        import torch

        return torch.device("cpu") if self._device_runner is None else self._device_runner.device

    def to(self, *args: Any, **kwargs: Any) -> Denoiser:
        """Return this denoiser on its own device, for latents in float32, float16 or bfloat16.

        Raises:
            UsageError: another device or dtype is asked for.
        """
        place = "cpu" if self._device_runner is None else str(self._device_runner.device)
        for asked in map(str, (*args, *(kwargs[name] for name in ("device", "dtype") if name in kwargs))):
            if asked in DTYPES:
                self._dtype = asked.removeprefix("torch.")
            elif asked != "None" and asked.removesuffix(":0") != place.removesuffix(":0"):
                raise UsageError(
                    f"{self!r} runs on {'the CPU' if place == 'cpu' else place}, not on {asked}",
                    hint="leave it there: it takes tensors of any device and answers on the same; its latents may be "
                    + " or ".join(DTYPES),
                )
        return self

    def request(self) -> Denoiser:
        """Return this denoiser for another trajectory, with a state of its own; graphs and weights are shared."""
        another = Denoiser(self._runner, self.plan, self.spec, own_updates=self._host_check is None)
        another._dtype = self._dtype
        return another

    def restart(self) -> None:
        """Give up the current trajectory; the next one begins with the first timestep of the plan."""
        with self._lock:
            self._request.restart()
            self._first = None
            if self._late is not None:
                self._late.forget()
            if self._host_check is not None:
                self._host_check.restart()

    def __copy__(self) -> Denoiser:
        return self.request()

    def __deepcopy__(self, memo: object) -> Denoiser:
        return self.request()

    def __reduce__(self) -> NoReturn:
        raise UsageError(
            f"{self!r} cannot be pickled: it holds what runs its graphs",
            hint="give the other process the path of the bundle, and call qcgraph.load there",
        )

    def __call__(
        self,
        hidden_states: Any,
        timestep: Any = None,
        class_labels: Any = None,
        cross_attention_kwargs: Mapping[str, Any] | None = None,
        return_dict: bool = True,
        **conditions: Any,
    ) -> Any:
        """Return the noise prediction at one timestep of the plan.

        Args:
            hidden_states: the latent [B,C,H,W], NumPy or torch.
            timestep: a number, or one equal value for each sample; of any dtype.
            class_labels: diffusers' name for the condition ``class_label``, integers [B]; with guidance the batch holds
                both halves.
            cross_attention_kwargs: must be empty, because the denoiser has no cross attention.
            return_dict: whether to return an object with ``.sample`` instead of a tuple.
            conditions: the other conditions of the model by name, [B, ...]; or one value for the batch.

        Returns:
            The noise prediction, of the kind, dtype and device of ``hidden_states``.

        Raises:
            BundleError: the timestep is not the next one of the plan, the batch or its classes differ from those that
                the trajectory began with, the latents come from another sampler than the plan's or from another
                trajectory, or ``own_updates`` is set and another trajectory has not ended.
            UsageError: the latent does not have the model's shape or is not finite, a class is out of range, the
                timesteps of the batch differ, or an argument is not made of numbers.

        Warns:
            UncheckedLatentsWarning: once, when latents come in a form that cannot be checked.
        """
        if cross_attention_kwargs:
            names = cross_attention_kwargs if isinstance(cross_attention_kwargs, Mapping) else ["given"]
            raise UsageError(
                f"cross_attention_kwargs {', '.join(map(str, names))} have no effect on a compiled denoiser",
                hint="leave them out; fuse a LoRA into the weights before compiling",
            )
        with self._lock:
            latent = self._latent(hidden_states)
            given = self._conditions(class_labels, conditions, len(latent))
            index = self.plan.index_of(self._timestep(timestep))
            precision = _precision(hidden_states)
            prediction = self._denoise(index, latent, given, precision)
            try:
                self._note(index, latent, given, prediction, precision)
                sample = like(hidden_states, prediction)
            except BaseException:
                self._request.interrupt()  # the host has no prediction to continue with
                raise
            unchecked = "" if self._host_check is None or self._warned else self._host_check.unchecked
            self._warned |= bool(unchecked)
        if unchecked:
            warnings.warn(unchecked, UncheckedLatentsWarning, stacklevel=2)
        return DenoiserOutput(sample) if return_dict else (sample,)

    def _denoise(self, index: int, latent: Any, conditions: Conditions, precision: str) -> Any:
        self._request.check(index, tuple(latent.shape), conditions)
        if index == 0:
            self._begin(latent, conditions, precision)
        elif precision != self._precision:
            raise BundleError(
                f"the latent is {precision}, this trajectory began with {self._precision}",
                hint="keep the dtype of latents within a trajectory",
            )
        if self._late is None and self._host_check is not None:
            self._host_check.check(index, latent, conditions, HALF_TOLERANCES.get(precision, TOLERANCE))
        return self._request.denoise(index, latent, conditions)

    def _note(self, index: int, latent: Any, conditions: Conditions, prediction: Any, precision: str) -> None:
        """Record a step for the host check; on a device, check the step before it."""
        if self._late is not None:
            self._late.took(index, latent, conditions, prediction, HALF_TOLERANCES.get(precision, TOLERANCE))
        elif self._host_check is not None:
            self._host_check.note(index, latent, conditions, prediction)

    def _begin(self, latent: Any, conditions: Conditions, precision: str) -> None:
        """Begin a trajectory, unless one is under way whose latents cannot be told from it."""
        if self._host_check is None:
            taken = self._request.taken
            is_again = taken == 1 and self._request.began_with(conditions) and _same(latent, self._first)
            if taken and not is_again:
                raise BundleError(
                    f"a trajectory is under way, of which timestep {self.plan.timesteps[taken]:g} comes next; where "
                    "latents may be any, nothing tells it from another one",
                    hint="use denoiser.request() for each trajectory, in threads or in turns; or give this one up with "
                    "denoiser.restart()",
                )
            self._first = latent if self._device_runner is None else latent.clone()
        self._precision = precision

    def _latent(self, hidden_states: Any) -> Any:
        """Return a copy of the latent that later changes by the host do not affect; a device orders them after it."""
        hint = f"{self.spec.name} takes floating-point numbers (batch, {', '.join(map(str, self.spec.latent_shape))})"
        given = checked_values(hidden_states, FLOATS, "the latent", hint)
        if given.ndim != 4 or tuple(given.shape[1:]) != self.spec.latent_shape or not len(given):
            shape = ", ".join(map(str, self.spec.latent_shape))
            raise UsageError(
                f"the latent has shape {tuple(given.shape)}", hint=f"{self.spec.name} takes (batch, {shape})"
            )
        if self._device_runner is not None:
            return on_device(given, self._device_runner.device)
        with np.errstate(over="ignore", invalid="ignore"):  # values too large for float32 become infinity
            latent = np.array(as_array(given), dtype=np.float32, order="C")
            if not np.isfinite(latent.sum()) and not np.isfinite(latent).all():
                raise UsageError(NOT_FINITE, hint=NOT_FINITE_HINT)
        return latent

    def _timestep(self, timestep: Any) -> float:
        """Return the timestep of the plan that equals the given one, after rounding to its dtype."""
        first = f"the plan starts at timestep {self.plan.timesteps[0]:g}"
        if timestep is None:
            raise UsageError("no timestep was given", hint=first)
        given = as_array(checked_values(timestep, FLOATS + INTEGERS, "the timestep", f"give a number; {first}"))
        if not given.size:
            raise UsageError("no timestep was given", hint=first)
        if not np.isfinite(given).all():
            raise UsageError("the timestep is NaN or infinite", hint=first)
        values = np.unique(given)
        if len(values) != 1:
            raise UsageError("the timesteps of a batch differ", hint="all samples of a call are at the same timestep")
        if given.dtype.kind != "f":
            return float(values[0])
        planned = list(self.plan.timesteps)
        rounded = as_array(timestep.new_tensor(planned)) if is_tensor(timestep) else np.array(planned, given.dtype)
        (meant,) = np.nonzero(rounded == values[0])
        if len(meant) > 1:
            between = " or ".join(f"{planned[index]:g}" for index in meant)
            raise UsageError(
                f"timestep {values[0]:g} may be {between}, which {getattr(timestep, 'dtype', given.dtype)} does not "
                "tell apart",
                hint="give timesteps as float32 or as integers",
            )
        return planned[meant[0]] if len(meant) else float(values[0])

    def _conditions(self, class_labels: Any, named: Mapping[str, Any], batch: int) -> Conditions:
        """Return the conditions of a batch.

        Raises:
            UsageError: a condition is missing, unknown, or has values that the model does not take.
        """
        given = dict(named)
        if class_labels is not None:
            given[DIFFUSERS_LABEL] = class_labels
        known = {condition.name for condition in self.spec.conditions}
        if unknown := sorted(given.keys() - known):
            takes = ", ".join(sorted(known)) or "no conditions"
            raise UsageError(
                f"{_argument(unknown[0])} is no condition of the model", hint=f"{self.spec.name} takes {takes}"
            )
        values = {item.name: self._values(item, given.get(item.name), batch) for item in self.spec.conditions}
        conditions = Conditions(batch, values)
        self._check_order(conditions)
        return conditions

    def _values(self, condition: Condition, value: Any, batch: int) -> npt.NDArray[np.generic]:
        """Return the values of one condition, [B, *shape]."""
        argument, takes = _argument(condition.name), f"{self.spec.name} takes {_known(condition)}"
        if value is None:
            raise UsageError(f"no {argument} were given", hint=takes)
        given = self._fetched[condition.name].array(checked_values(value, FLOATS + INTEGERS, argument, takes))
        of_one = given.shape in (condition.shape, (1, *condition.shape))
        if not of_one and given.shape != (batch, *condition.shape):
            raise UsageError(f"{argument} {given.dtype}{list(given.shape)} for a batch of {batch}", hint=takes)
        values = given.astype(np.float32) if condition.dtype == "f32" else _whole(given, argument, takes)
        if condition.count is not None:
            wrong = values[(values < 0) | ((values >= condition.count) & (values != condition.null))]
            if len(wrong):
                first, hint = int(wrong.flat[0]), takes
                if first == DIFFUSERS_NULL_CLASS:
                    hint += f"; DiTPipeline gives {first} for that half, so it fits models of {first} classes"
                raise UsageError(f"{argument}: {first} is out of range", hint=hint)
        return np.broadcast_to(values, (batch, *condition.shape)).copy()

    def _check_order(self, conditions: Conditions) -> None:
        """Refuse a batch whose second half is not unconditional, where one half is restored from the other."""
        second = conditions[len(conditions) // 2 :]
        if self.plan.restores_half and not second.is_null(self.spec).all():
            came = "; ".join(f"{name} {value.tolist()}" for name, value in second.values.items())
            raise UsageError(
                "some steps compute one half of guidance and restore the other; the second half of this batch is not "
                f"unconditional: {came}",
                hint="give both halves of guidance in one batch, the conditional one first (guidance_scale > 1 in a "
                "diffusers pipeline)",
            )


def _argument(name: str) -> str:
    """Return the name of a condition in a call by the host."""
    return "class_labels" if name == DIFFUSERS_LABEL else name


def _known(condition: Condition) -> str:
    """Say which values a condition may have."""
    shape = "one number a sample" if not condition.shape else f"numbers [B, {', '.join(map(str, condition.shape))}]"
    if condition.count is None:
        return shape
    null = f", and {condition.null} for the unconditional half of guidance" if condition.null is not None else ""
    return f"{shape.replace('number', 'integer')}: 0 to {condition.count - 1}{null}"


def _whole(given: npt.NDArray[np.generic], argument: str, takes: str) -> npt.NDArray[np.int64]:
    """Return the values as integers.

    Raises:
        UsageError: a value is not an integer, or too large to be exact as a floating-point number.
    """
    if given.dtype.kind == "f" and not bool((np.abs(given) < np.float64(LARGEST_CLASS)).all()):  # false for NaN
        raise UsageError(f"{argument} are not integers", hint=takes)
    whole = given.astype(np.int64)
    if not np.array_equal(whole, given):
        raise UsageError(f"{argument} are not integers", hint=takes)
    return whole


def _precision(hidden_states: Any) -> str:
    """Return the floating-point type that a host computes in, as `qcgraph.sampling.host_check` distinguishes them."""
    name = str(getattr(hidden_states, "dtype", "")).removeprefix("torch.")
    return name if name in HALF_TOLERANCES else "float32"


def _same(one: Any, other: Any) -> bool:
    """Return whether two latents are equal, also on a device."""
    return other is not None and one.shape == other.shape and bool((one == other).all())
