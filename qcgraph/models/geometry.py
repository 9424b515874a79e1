"""Define the sizes of DiT models as plain data without torch, so that models can be listed without loading any."""

from __future__ import annotations

from dataclasses import dataclass, fields

from qcgraph.plan.spec import ModelSpec, NoiseSchedule

TIMESTEP_FREQUENCIES = 256
"""Sinusoidal features of a timestep before its MLP; the original fixes it."""

LARGEST_SIZE = 2**20
"""No known model has a size near it; a damaged file may claim more, which would take for ever to build."""


@dataclass(frozen=True)
class DiTConfig:
    """The sizes that define a DiT.

    Attributes:
        input_size: height and width of the square latent, in latent pixels.
        patch_size: height and width of one square patch, in latent pixels.
        channels: channels of the latent.
        width: channels of one token.
        depth: number of blocks.
        heads: attention heads per block.
        class_count: classes, not counting the null class of guidance.
        learn_sigma: whether the network also returns a variance, which doubles its output channels.
        mlp_ratio: hidden width of the MLP over ``width``.

    Raises:
        ValueError: a size is not positive or exceeds `LARGEST_SIZE`, or the sizes are not divisible as the architecture
            requires.
    """

    input_size: int = 32
    patch_size: int = 2
    channels: int = 4
    width: int = 1152
    depth: int = 28
    heads: int = 16
    class_count: int = 1000
    learn_sigma: bool = True
    mlp_ratio: float = 4.0

    def __post_init__(self) -> None:
        for field in fields(self):
            if field.name != "learn_sigma" and getattr(self, field.name) <= 0:
                raise ValueError(f"{field.name} {getattr(self, field.name)} is not positive")
            if getattr(self, field.name) > LARGEST_SIZE:
                raise ValueError(f"{field.name} {getattr(self, field.name)} is more than {LARGEST_SIZE}")
        if self.input_size % self.patch_size:
            raise ValueError(f"input_size {self.input_size} is not a multiple of patch_size {self.patch_size}")
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")
        if self.width % 4:
            raise ValueError(f"width {self.width} is not a multiple of 4, which sin-cos position embeddings need")
        if self.mlp_width < 1:
            raise ValueError(f"mlp_ratio {self.mlp_ratio} of width {self.width} leaves the MLP no channel")

    @property
    def grid_size(self) -> int:
        """The number of patches along one side of the latent."""
        return self.input_size // self.patch_size

    @property
    def token_count(self) -> int:
        """The number of tokens of one latent."""
        return self.grid_size**2

    @property
    def output_channels(self) -> int:
        """The number of channels that the network returns."""
        return self.channels * 2 if self.learn_sigma else self.channels

    @property
    def mlp_width(self) -> int:
        """The number of hidden channels of a block's MLP."""
        return int(self.width * self.mlp_ratio)

    @property
    def null_class(self) -> int:
        """The label of the unconditional half of guidance: the row after the last class."""
        return self.class_count

    @property
    def parameter_count(self) -> int:
        """The number of parameters, including the fixed position embedding, as the original DiT counts them."""
        width = self.width
        patch_values = self.patch_size**2
        embedders = (
            _linear(patch_values * self.channels, width)
            + self.token_count * width
            + _linear(TIMESTEP_FREQUENCIES, width)
            + _linear(width, width)
            + (self.class_count + 1) * width
        )
        block = (
            _linear(width, 3 * width)
            + _linear(width, width)
            + _linear(width, self.mlp_width)
            + _linear(self.mlp_width, width)
            + _linear(width, 6 * width)
        )
        final = _linear(width, 2 * width) + _linear(width, patch_values * self.output_channels)
        return embedders + self.depth * block + final

    def model_spec(
        self, name: str, *, noise_schedule: NoiseSchedule | None = None, is_image: bool = False
    ) -> ModelSpec:
        """Return the spec of a DiT of these sizes.

        Args:
            name: the name of the model.
            noise_schedule: the noise schedule of the training, by default that of the original DiT.
            is_image: whether the latent is an image in [-1, 1].
        """
        return ModelSpec.class_conditional(
            name=name,
            latent_shape=(self.channels, self.input_size, self.input_size),
            class_count=self.class_count,
            null_class=self.null_class,
            output_channels=self.output_channels,
            noise_schedule=noise_schedule or NoiseSchedule(),
            is_image=is_image,
        )


def _linear(inputs: int, outputs: int) -> int:
    """Return the number of parameters of a linear layer with a bias."""
    return inputs * outputs + outputs


# name: (depth, width, heads), table 1 of Peebles & Xie, "Scalable Diffusion Models with Transformers", 2023
_SIZES = {"dit-s": (12, 384, 6), "dit-b": (12, 768, 12), "dit-l": (24, 1024, 16), "dit-xl": (28, 1152, 16)}

GEOMETRIES: dict[str, DiTConfig] = {
    f"{size}-{patch_size}": DiTConfig(patch_size=patch_size, width=width, depth=depth, heads=heads)
    for size, (depth, width, heads) in _SIZES.items()
    for patch_size in (2, 4, 8)
} | {
    # The one released checkpoint for 512 x 512 images: the same network on a latent of twice the size.
    "dit-xl-2-512": DiTConfig(input_size=64),
}
"""Geometries of the original, by name: ``dit-<size>-<patch>`` for latents of 4 x 32 x 32."""
