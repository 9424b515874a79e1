"""The description of a denoiser and of its graphs that a host needs to sample. Plain data, no torch."""

from __future__ import annotations

from dataclasses import dataclass

from qcgraph.plan.roles import TensorRole

BATCH = "B"  # the one symbolic dimension, the batch, wherever shapes are shown
FLOW = "flow_prediction"
Setting = bool | int | float | str


@dataclass(frozen=True)
class FolderSampler:
    """The sampler of a model's folder, as far as a step plan can express it.

    Attributes:
        scheduler: the name of the scheduler (see `qcgraph.plan.schedulers.SOLVERS`), which is the default for the
            model.
        settings: settings of its diffusers class that choose the steps, by name, where they differ from its defaults.
            They belong to this scheduler: another scheduler does not get them.
    """

    scheduler: str
    settings: tuple[tuple[str, Setting], ...] = ()


@dataclass(frozen=True)
class NoiseSchedule:
    """The diffusion process that a denoiser was trained on, in diffusers' terms, and the sampler of its folder.

    Attributes:
        train_steps: the number of training timesteps.
        beta_start: the first beta.
        beta_end: the last beta.
        beta_schedule: ``linear``, ``scaled_linear`` or ``squaredcos_cap_v2``.
        prediction: the output of the network: ``epsilon``, ``v_prediction``, or ``flow_prediction``, the velocity
            noise - x0 of a flow x = (1 - s) * x0 + s * noise at timestep s * train_steps, which has no betas.
        rescale_zero_snr: whether the betas are rescaled until no signal is left at the last timestep (Lin et al., 2023,
            arXiv 2305.08891, algorithm 1).
        shift: how far the steps of a flow are shifted to its noisy end, s' = shift * s / (1 + (shift - 1) * s) (Esser
            et al., 2024, arXiv 2403.03206, equation 23); 1 shifts nothing.
        sampler: the sampler of the model's folder, or None if unknown.
    """

    train_steps: int = 1000
    beta_start: float = 1e-4
    beta_end: float = 2e-2
    beta_schedule: str = "linear"
    prediction: str = "epsilon"
    rescale_zero_snr: bool = False
    shift: float = 1.0
    sampler: FolderSampler | None = None

    @property
    def is_flow(self) -> bool:
        """Whether the process is a flow (flow matching, rectified flow) rather than a diffusion."""
        return self.prediction == FLOW


@dataclass(frozen=True)
class TensorSpec:
    """The name, dtype, shape and role of a graph input or output.

    Attributes:
        name: the name in the graph.
        dtype: ``f32``, ``i64`` ...
        shape: the dimensions; a string is symbolic: the batch `BATCH`, or an expression of it.
        role: the purpose of the tensor; None for a value inside of a graph.
        value: the name of the cached value, for CACHE alone.
        age: the number of computing steps from the cached value to the last computed one, for CACHE alone.
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]
    role: TensorRole | None = None
    value: str = ""
    age: int = 0

    @property
    def batch_axis(self) -> int | None:
        """The axis of the batch, or None where the tensor has none."""
        return self.shape.index(BATCH) if BATCH in self.shape else None

    @property
    def type(self) -> tuple[str, tuple[int | str, ...]]:
        """The dtype and shape."""
        return self.dtype, self.shape

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.shape))}]"


# The inputs of a captured denoiser except its conditions, which the model's spec names; the inputs that passes add; and
# the names of results.
TIMESTEP = TensorSpec("timestep", "f32", (BATCH,), TensorRole.STEP)
GROUP = TensorSpec("group", "i64", (), TensorRole.GROUP)
ROW = TensorSpec("row", "i64", (), TensorRole.ROW)
LATENT_NAME = "latent"
PREDICTION_NAME = "noise_prediction"
MODULATION_NAME = "modulation"


@dataclass(frozen=True)
class Condition:
    """An input of a denoiser that describes the image. It is constant over the steps of a request.

    Attributes:
        name: the name in the graphs, ``class_label`` for example.
        dtype: ``i64`` or ``f32``.
        shape: the shape of one sample; empty for one number.
        count: the number of values, which are ``0 .. count - 1``; None where any value is allowed.
        null: the value of all elements in the unconditional half of guidance; None where there is none.
    """

    name: str
    dtype: str
    shape: tuple[int, ...] = ()
    count: int | None = None
    null: int | float | None = None

    @property
    def tensor(self) -> TensorSpec:
        """The graph input."""
        return TensorSpec(self.name, self.dtype, (BATCH, *self.shape), TensorRole.REQUEST)


def class_label(count: int, null: int | None = None, name: str = "class_label") -> Condition:
    """Return the condition of a class-conditional model.

    Args:
        count: the number of classes; labels are ``0 .. count - 1``.
        null: the label of the unconditional half of guidance; ``count`` when None.
        name: the name in the graphs.
    """
    return Condition(name, "i64", (), count, count if null is None else null)


@dataclass(frozen=True)
class ModelSpec:
    """A denoiser as its host sees it.

    Attributes:
        name: the name of the model, e.g. ``digits`` or ``dit-s-2``.
        latent_shape: (channels, height, width) of one latent.
        output_channels: the channels that the network returns; the first ``latent_shape[0]`` are the noise prediction,
            the rest (a learned sigma) is not used by the samplers.
        conditions: the inputs besides latent and timestep, in order.
        noise_schedule: the noise schedule that the model was trained on.
        is_image: whether the latent is an image in [-1, 1] rather than the latent of an autoencoder.
    """

    name: str
    latent_shape: tuple[int, int, int]
    output_channels: int
    conditions: tuple[Condition, ...]
    noise_schedule: NoiseSchedule = NoiseSchedule()
    is_image: bool = False

    @classmethod
    def class_conditional(
        cls,
        name: str,
        latent_shape: tuple[int, int, int],
        class_count: int,
        null_class: int,
        output_channels: int,
        noise_schedule: NoiseSchedule = NoiseSchedule(),
        is_image: bool = False,
    ) -> ModelSpec:
        """Describe a model whose only condition is a class label.

        Args:
            name: see `ModelSpec`.
            latent_shape: see `ModelSpec`.
            class_count: the number of classes; labels are ``0 .. class_count - 1``.
            null_class: the label of the unconditional half of guidance.
            output_channels: see `ModelSpec`.
            noise_schedule: see `ModelSpec`.
            is_image: see `ModelSpec`.
        """
        label = class_label(class_count, null_class)
        return cls(name, latent_shape, output_channels, (label,), noise_schedule, is_image)

    @property
    def latent(self) -> TensorSpec:
        """The graph input that every step changes, f32[B,C,H,W]."""
        return TensorSpec(LATENT_NAME, "f32", (BATCH, *self.latent_shape), TensorRole.STATE)

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """The inputs of the captured denoiser, in order: latent, timestep, and the conditions."""
        return (self.latent, TIMESTEP, *(condition.tensor for condition in self.conditions))

    @property
    def label(self) -> Condition | None:
        """The condition that names the class of a sample; None where the model has none, or several."""
        labels = [condition for condition in self.conditions if condition.count is not None and not condition.shape]
        return labels[0] if len(labels) == 1 else None

    @property
    def conditions_text(self) -> str:
        """The inputs besides latent and timestep, in a few words: ``10 classes``."""
        if self.label is not None and len(self.conditions) == 1:
            return f"{self.label.count} classes"
        texts = [f"{item.name} {item.tensor}" for item in self.conditions]
        return f"conditions {', '.join(texts)}" if texts else "no conditions"

    def describe(self) -> str:
        """Return one line: name, latent, conditions and the output of the network."""
        shape = "x".join(map(str, self.latent_shape))
        return f"{self.name}: latent {shape}, {self.conditions_text}, predicts {self.noise_schedule.prediction}"

    def lines(self) -> list[str]:
        """Return the lines about this model in the text of a program."""
        return [f"model {self.describe()}"]

    @property
    def is_guided(self) -> bool:
        """Whether classifier-free guidance has an unconditional half: some condition has a null value."""
        return any(condition.null is not None for condition in self.conditions)


@dataclass(frozen=True)
class Interface:
    """The ordered inputs and outputs of a variant.

    Raises:
        ValueError: an input or output has no role, or two share a name.
    """

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    def __post_init__(self) -> None:
        for specs in (self.inputs, self.outputs):
            if nameless := [spec.name for spec in specs if spec.role is None]:
                raise ValueError(f"{nameless[0]} has no role")
            if len({spec.name for spec in specs}) != len(specs):
                raise ValueError("two inputs or two outputs share a name")

    @property
    def input_names(self) -> tuple[str, ...]:
        """The names of the inputs, in order."""
        return tuple(spec.name for spec in self.inputs)

    @property
    def output_names(self) -> tuple[str, ...]:
        """The names of the outputs, in order."""
        return tuple(spec.name for spec in self.outputs)

    def taken(self, *roles: TensorRole) -> tuple[TensorSpec, ...]:
        """Return the inputs of these roles, in order."""
        return tuple(spec for spec in self.inputs if spec.role in roles)

    def given(self, *roles: TensorRole) -> tuple[TensorSpec, ...]:
        """Return the outputs of these roles, in order."""
        return tuple(spec for spec in self.outputs if spec.role in roles)

    @property
    def result(self) -> TensorSpec:
        """The output that a step needs: the noise prediction, or the modulation of a preparing variant.

        Raises:
            ValueError: the variant has no such output, or both.
        """
        (result,) = self.given(TensorRole.PREDICTION, TensorRole.MODULATION)
        return result

    @property
    def caches(self) -> tuple[TensorSpec, ...]:
        """The cached values that the variant computes."""
        return self.given(TensorRole.CACHE)
