"""Check the spec, the noise schedule and the weights of a loaded model, whatever its source."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from qcgraph.errors import UsageError
from qcgraph.plan.spec import FLOW, GROUP, MODULATION_NAME, ROW, ModelSpec, NoiseSchedule

if TYPE_CHECKING:
    from torch import nn

_BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")
_PREDICTIONS = ("epsilon", "v_prediction", FLOW)

_Size = Annotated[int, Field(ge=1, le=2**20)]
_Beta = Annotated[float, Field(gt=0, lt=1)]


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, allow_inf_nan=False, extra="forbid")


class _FolderSamplerValues(_Strict):
    scheduler: Annotated[str, Field(min_length=1)]
    settings: tuple[tuple[str, bool | int | float | str | None], ...]


class _NoiseScheduleValues(_Strict):
    """The values that a `NoiseSchedule` may have."""

    train_steps: Annotated[int, Field(ge=1, le=100_000)]
    beta_start: _Beta
    beta_end: _Beta
    beta_schedule: str
    prediction: str
    rescale_zero_snr: bool
    shift: Annotated[float, Field(gt=0)]
    sampler: _FolderSamplerValues | None


class _ConditionValues(_Strict):
    """The values that a `Condition` may have."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$", max_length=100)]
    dtype: Literal["i64", "f32"]
    shape: Annotated[tuple[_Size, ...], Field(max_length=6)]
    count: _Size | None
    null: Annotated[int, Field(ge=0)] | float | None


class _Spec(_Strict):
    """The values that a `ModelSpec` may have."""

    name: Annotated[str, Field(min_length=1)]
    latent_shape: tuple[_Size, _Size, _Size]
    output_channels: _Size
    conditions: tuple[_ConditionValues, ...]
    noise_schedule: _NoiseScheduleValues
    is_image: bool


def check_spec(spec: ModelSpec, where: str) -> None:
    """Refuse a spec with values that no model can have.

    Args:
        spec: the spec, possibly from a factory.
        where: the name of the model in errors.

    Raises:
        UsageError: a value is wrong; the message names the first one.
    """
    if not isinstance(spec, ModelSpec) or not isinstance(spec.noise_schedule, NoiseSchedule):
        raise UsageError(
            f"the spec is a {type(spec).__name__} with the noise schedule {getattr(spec, 'noise_schedule', None)!r}",
            where=where,
            hint="give qcgraph.plan.spec.ModelSpec, and in it a qcgraph.plan.spec.NoiseSchedule",
        )
    _check_schedule(spec.noise_schedule, where)
    try:
        _Spec.model_validate(asdict(spec))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise UsageError(
            f"{place} = {first['input']!r} of its spec does not fit: {first['msg']}",
            where=where,
            hint="see qcgraph.plan.spec.ModelSpec",
        ) from None
    names = [tensor.name for tensor in (*spec.inputs, GROUP, ROW)] + [MODULATION_NAME]
    if shared := {name for name in names if names.count(name) > 1}:
        raise UsageError(
            f"the condition {min(shared)!r} has a name that is taken", where=where, hint="give it a name of its own"
        )
    for condition in spec.conditions:
        is_index = isinstance(condition.null, int) and condition.null >= 0
        if condition.dtype == "i64" and condition.null is not None and not is_index:
            raise UsageError(
                f"the null value {condition.null!r} of the condition {condition.name!r} is no index",
                where=where,
                hint="its values are whole numbers; the null value of a class label is the row after its classes",
            )
    for condition in spec.conditions:
        if condition.dtype == "i64" and condition.count is None:
            raise UsageError(
                f"the condition {condition.name} is of integers, and has no count",
                where=where,
                hint="give it a count: its values are then 0 to count - 1",
            )
    if spec.output_channels < spec.latent_shape[0]:
        raise UsageError(
            f"output_channels {spec.output_channels} are fewer than the {spec.latent_shape[0]} of the latent",
            where=where,
            hint="the first output channels are the prediction, one for each channel of the latent",
        )


def _check_schedule(schedule: NoiseSchedule, where: str) -> None:
    """Refuse a noise schedule that the schedulers do not support."""
    for field, value, known in (
        ("beta_schedule", schedule.beta_schedule, _BETA_SCHEDULES),
        ("prediction", schedule.prediction, _PREDICTIONS),
    ):
        if value not in known:
            raise UsageError(f"{field} {value!r} is not supported", where=where, hint=f"known: {', '.join(known)}")


def check_weights(module: nn.Module, where: str) -> None:
    """Refuse weights that are not dense floating point, or that are NaN or infinite.

    Buffers may also hold whole numbers and truth values, for indexing and masking.

    Raises:
        UsageError: a tensor is refused; the message names the first one.
    """
    import torch

    from qcgraph.models.checkpoint import unusual

    parameters = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    for path, tensor in module.state_dict().items():
        if path.endswith("_extra_state"):
            continue
        is_index = path not in parameters and _is_index(tensor)
        if not isinstance(tensor, torch.Tensor):
            raise UsageError(
                f"the module holds {path}, a {type(tensor).__name__}: its layers are packed, as quantized ones are",
                where=where,
                hint="give the model in floating point: qcgraph quantizes it itself",
            )
        if not is_index and (reason := unusual(tensor)):
            raise UsageError(
                f"parameter {path} is {reason}",
                where=where,
                hint="give the model in floating point: qcgraph quantizes it itself",
            )
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise UsageError(
                f"parameter {path} is not finite: it holds NaN or infinity",
                where=where,
                hint="the training diverged or the file is damaged; use an earlier checkpoint",
            )


def _is_index(tensor: object) -> bool:
    """Return whether a buffer holds dense whole numbers or truth values."""
    import torch

    whole = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
    return isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided and tensor.dtype in whole
