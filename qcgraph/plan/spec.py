"""What the host must know of a denoiser and of its graphs to sample with them. Plain data, no torch."""

from __future__ import annotations

from dataclasses import dataclass

BATCH = "B"  # how the one symbolic dimension, the batch, is called wherever shapes are shown
OUTPUT = "noise_prediction"  # the first output of every variant that is a step; the others are cache tensors
MODULATION = "modulation"  # f32[B,M]: the only output of a preparing variant, and an input of the one it prepares
FLOW = "flow_prediction"
_PREPARATION = "prepare_"


def preparation(variant: str) -> str:
    """The name of the variant that computes, of timestep and class alone, the modulation of another."""
    return f"{_PREPARATION}{variant}"


def is_preparation(variant: str) -> bool:
    """Whether a variant only prepares another."""
    return variant.startswith(_PREPARATION)


Setting = bool | int | float | str


@dataclass(frozen=True)
class FolderSampler:
    """How the folder of a model samples, as far as a step plan can hold that.

    Attributes:
        scheduler: the name of the scheduler (see `qcgraph.plan.schedulers.SOLVERS`), which is taken where none is
            asked for.
        settings: settings of its diffusers class that choose the steps, by name, where they differ from its defaults.
            They belong to this scheduler: another one that is asked for does not take them.
    """

    scheduler: str
    settings: tuple[tuple[str, Setting], ...] = ()


@dataclass(frozen=True)
class NoiseSchedule:
    """The diffusion process a denoiser was trained on, in diffusers' terms, and how its folder samples it.

    Attributes:
        train_steps: number of training timesteps.
        beta_start: first beta.
        beta_end: last beta.
        beta_schedule: ``linear``, ``scaled_linear`` or ``squaredcos_cap_v2``.
        prediction: what the network predicts: ``epsilon``, ``v_prediction``, or ``flow_prediction``, the velocity
            noise - x0 of a flow x = (1 - s) * x0 + s * noise at timestep s * train_steps, which has no betas.
        rescale_zero_snr: whether the betas are rescaled until no signal is left at the last timestep (Lin et al., 2023,
            arXiv 2305.08891, algorithm 1).
        shift: how far the steps of a flow are shifted to its noisy end, s' = shift * s / (1 + (shift - 1) * s) (Esser
            et al., 2024, arXiv 2403.03206, equation 23); 1 is not at all.
        sampler: how the folder of the model samples, or None where nothing says.
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
class ModelSpec:
    """A class-conditional denoiser as its host sees it.

    Attributes:
        name: how the model is called, e.g. ``digits`` or ``dit-s-2``.
        latent_shape: (channels, height, width) of one latent.
        class_count: number of classes; labels are ``0 .. class_count - 1``.
        null_class: the label of the unconditional half of guidance.
        output_channels: channels the network returns; the first ``latent_shape[0]`` are the noise prediction,
            the rest (a learned sigma) is not used by the samplers.
        schedule: the training noise schedule.
        is_image: whether the latent is an image in [-1, 1] rather than the latent of an autoencoder.
    """

    name: str
    latent_shape: tuple[int, int, int]
    class_count: int
    null_class: int
    output_channels: int
    schedule: NoiseSchedule = NoiseSchedule()
    is_image: bool = False


@dataclass(frozen=True)
class TensorSpec:
    """Name, dtype (``f32``, ``i64`` ...) and shape of a graph input or output; a string dimension is symbolic."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.shape))}]"


@dataclass(frozen=True)
class Interface:
    """The ordered inputs and outputs of a variant."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    @property
    def input_names(self) -> tuple[str, ...]:
        """Names of the inputs, in order."""
        return tuple(spec.name for spec in self.inputs)

    @property
    def output_names(self) -> tuple[str, ...]:
        """Names of the outputs, in order."""
        return tuple(spec.name for spec in self.outputs)
