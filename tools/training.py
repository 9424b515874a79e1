"""Train a denoiser on any images: the loop, the loss, the weight average, sampling, FID-small."""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from safetensors.torch import save
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from qcgraph.errors import QcgraphError, UsageError
from qcgraph.files.atomic import writing_file
from qcgraph.models.dit import DiT, DiTConfig, initialize_zero
from qcgraph.models.image_classifier import scaled
from qcgraph.plan.spec import NoiseSchedule

if TYPE_CHECKING:
    from PIL import Image

SAVE_SECONDS = 180.0  # seconds between two snapshots
REPORTED_STEPS = 100
SPEED_STEPS = 100  # steps, all of them in the warm-up, after which the speed is known
SAMPLED_AT_ONCE = 500
CURVE_POINTS = 20
TITLE_SIZE = 15  # pixels


def exit_code_of(train: Callable[[argparse.Namespace], None], options: argparse.Namespace) -> int:
    """Run a training, print its error if there is one, and return the exit code of the tool."""
    try:
        train(options)
    except QcgraphError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


@dataclass(frozen=True)
class Training:
    """The settings of a denoiser's training, in the form that the card stores.

    Attributes:
        steps: optimizer steps.
        batch_size: images per step.
        learning_rate: peak of the cosine schedule.
        warmup_steps: steps of the linear warm-up.
        weight_decay: weight decay of AdamW.
        ema_decay: decay of the weight average that is stored.
        label_dropout: share of labels replaced by the null class, for guidance.
        seed: seed of initialisation, batches, timesteps and noise.
    """

    steps: int
    batch_size: int
    learning_rate: float
    warmup_steps: int
    weight_decay: float
    ema_decay: float
    label_dropout: float
    seed: int


@dataclass(frozen=True)
class Data:
    """The training data, on the device that trains.

    Attributes:
        images: f32[N,C,S,S] in [-1, 1], or pixels u8[N,C,S,S].
        labels: i64[N].
        mirrors: whether every second image is mirrored, by chance.
    """

    images: Tensor
    labels: Tensor
    mirrors: bool = False

    def batch(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return random images f32[B,C,S,S] in [-1, 1] and their labels [B]."""
        picked = torch.randint(len(self.images), (count,), generator=generator, device=generator.device)
        images = self.images[picked]
        if images.dtype == torch.uint8:
            images = scaled(images)
        if self.mirrors:
            mirrored = torch.rand(count, generator=generator, device=generator.device) < 0.5
            images = torch.where(mirrored.view(-1, 1, 1, 1), images.flip(3), images)
        return images, self.labels[picked]


class Denoising:
    """A denoiser in training (DDPM, epsilon loss), with all the state that a snapshot needs to resume.

    On a GPU products are in bfloat16; weights, their average and the loss are in float32.

    Args:
        config: the sizes of the network.
        training: the settings.
        data: the training data; its device trains.
        snapshot: the file that an interrupted training resumes from. It is removed by `finish`.
        compiled: whether ``torch.compile`` compiles the network, which makes the first step slow and later ones fast.
        time_limit: seconds that the training may take; the steps become fewer where the settings have more than fit.
    """

    def __init__(
        self,
        config: DiTConfig,
        training: Training,
        data: Data,
        snapshot: Path,
        *,
        compiled: bool = False,
        time_limit: float | None = None,
    ) -> None:
        self._training, self._data, self._snapshot, self._time_limit = training, data, snapshot, time_limit
        self._step, self._steps, self._seconds = 0, training.steps, 0.0
        images = {"images": list(data.images.shape), "mirrors": data.mirrors}
        settings = asdict(training) | {"time_limit": time_limit}
        self._settings = {"config": asdict(config), "training": settings, "data": images}
        device = data.images.device
        model = DiT(config)
        generator = torch.Generator().manual_seed(training.seed)
        initialize_zero(model, generator)  # on the CPU: the same start on every device
        on_cpu = device.type == "cpu"
        self._generator = generator if on_cpu else torch.Generator(device).manual_seed(training.seed)
        self.model = model.to(device)
        self._forward = torch.compile(model) if compiled else model
        self.average = DiT(config).to(device).requires_grad_(False)
        self.average.load_state_dict(model.state_dict())
        self._trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(
            self._trainable,
            lr=training.learning_rate,
            weight_decay=training.weight_decay,
            betas=(0.9, 0.99),
            fused=device.type == "cuda",
        )
        rate = torch.optim.lr_scheduler.LambdaLR(optimizer, self._learning_rate_factor)
        self._optimizer, self._rate = optimizer, rate
        self._parts: dict[str, Any] = {"model": model, "average": self.average, "optimizer": optimizer, "rate": rate}
        self._levels = tuple(level.to(device) for level in noise_levels(NoiseSchedule()))
        self._losses = torch.zeros(training.steps, device=device)

    def run(self, *, save_seconds: float = SAVE_SECONDS) -> None:
        """Train to the last step, from the snapshot if there is one.

        Raises:
            UsageError: the snapshot has other settings.
        """
        self._resume()
        if self._time_limit is not None:
            self._fit_steps(self._time_limit, save_seconds)
        self._train_to(self._steps, save_seconds)

    def finish(self) -> None:
        """Remove the snapshot, once the results are stored."""
        self._snapshot.unlink(missing_ok=True)

    def summary(self) -> dict[str, Any]:
        """Return the settings, the loss curve, and the wall time in seconds, for the card."""
        losses = self._losses[: self._steps].double().tolist()
        window = max(1, len(losses) // CURVE_POINTS)
        ends = range(window, len(losses) + 1, window)
        curve = [[end, round(sum(losses[end - window : end]) / window, 5)] for end in ends]
        return asdict(self._training) | {
            "steps": self._steps,
            "train_images": len(self._data.images),
            "optimizer": "AdamW, betas 0.9 and 0.99, gradient norm clipped at 1, cosine after a linear warm-up",
            "parameters": self.average.config.parameter_count,
            "final_loss": curve[-1][1],
            "loss_curve": curve,
            "seconds": round(self._seconds),
        }

    def _fit_steps(self, time_limit: float, save_seconds: float) -> None:
        """Reduce the number of steps to what fits into the time limit, at the speed that is measured in the warm-up.

        A snapshot after these steps holds the reduced number. The learning rates of the warm-up do not depend on it,
        and the cosine ends with it: the weights are those of a training with as many steps and no limit.
        """
        measured = min(SPEED_STEPS, self._training.warmup_steps, self._steps)
        if self._step >= measured:
            return
        self._train_to(measured // 2, save_seconds)  # the first steps compile and allocate
        first, began = self._step, self._seconds
        self._train_to(measured, save_seconds)
        seconds_per_step = (self._seconds - began) / (measured - first)
        fitting = measured + int((time_limit - self._seconds) / seconds_per_step)
        self._steps = max(measured, min(self._steps, fitting))
        print(f"{self._steps} steps fit into {time_limit:.0f} s", flush=True)

    def _train_to(self, last: int, save_seconds: float) -> None:
        started = time.perf_counter() - self._seconds
        saved = time.perf_counter()
        while self._step < last:
            self._losses[self._step] = self._advance(self._step)
            self._step, self._seconds = self._step + 1, time.perf_counter() - started
            if self._step % REPORTED_STEPS == 0:
                loss = self._losses[self._step - REPORTED_STEPS : self._step].mean()
                print(f"step {self._step}/{self._steps}  loss {loss:.4f}  {self._seconds:.0f} s", flush=True)
            if self._step < last and time.perf_counter() - saved >= save_seconds:
                self._save()
                saved = time.perf_counter()
        self._losses[-1].item()  # waits for a GPU, so that the seconds are those of the steps
        self._seconds = time.perf_counter() - started

    def _learning_rate_factor(self, step: int) -> float:
        """Return the share of the peak learning rate at a step: linear warm-up, then a cosine to zero."""
        warmup = self._training.warmup_steps
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, self._steps - warmup)))

    def _advance(self, step: int) -> Tensor:
        loss = self._loss()
        self._optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self._trainable, 1.0)
        self._optimizer.step()
        self._rate.step()
        update_average(self.average, self.model, self._training.ema_decay, step)
        return loss.detach()

    def _loss(self) -> Tensor:
        """Return the epsilon loss of a random batch (Ho et al. 2020, equation 14), with labels dropped for guidance."""
        count, generator, (signal, noise_level) = self._training.batch_size, self._generator, self._levels
        device = generator.device
        images, labels = self._data.batch(count, generator)
        # One timestep per stratum instead of independent ones: the same expectation, a much quieter loss.
        strata = (torch.arange(count, device=device) + torch.rand(count, generator=generator, device=device)) / count
        timesteps = (strata * len(signal)).long().clamp(max=len(signal) - 1)
        noise = torch.randn(images.shape, generator=generator, device=device)
        dropped = torch.rand(count, generator=generator, device=device) < self._training.label_dropout
        classes = torch.where(dropped, self.model.config.null_class, labels)
        noisy = signal[timesteps].view(-1, 1, 1, 1) * images + noise_level[timesteps].view(-1, 1, 1, 1) * noise
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            predicted = self._forward(noisy, timesteps, classes)
        return F.mse_loss(predicted.float(), noise)

    def _save(self) -> None:
        counts = {"step": self._step, "steps": self._steps, "seconds": self._seconds}
        progress = {"settings": self._settings, "losses": self._losses} | counts
        states = {name: part.state_dict() for name, part in self._parts.items()}
        with writing_file(self._snapshot) as path:
            torch.save(progress | states | {"generator": self._generator.get_state()}, path)

    def _resume(self) -> None:
        if not self._snapshot.is_file():
            return
        state = torch.load(self._snapshot, map_location="cpu", weights_only=True)  # moved to the device of each part
        if state["settings"] != self._settings:
            raise UsageError(
                "it belongs to a training with other options",
                where=str(self._snapshot),
                hint="finish that, or delete it",
            )
        for name, part in self._parts.items():
            part.load_state_dict(state[name])
        self._generator.set_state(state["generator"])
        self._losses.copy_(state["losses"])
        self._step, self._steps, self._seconds = state["step"], state["steps"], state["seconds"]
        print(f"resuming at step {self._step}", flush=True)


def noise_levels(schedule: NoiseSchedule) -> tuple[Tensor, Tensor]:
    """Return sqrt(alpha_bar) and sqrt(1 - alpha_bar) of every training timestep (Ho et al. 2020, equation 4)."""
    betas = torch.linspace(schedule.beta_start, schedule.beta_end, schedule.train_steps, dtype=torch.float64)
    alpha_bar = torch.cumprod(1 - betas, dim=0)
    return alpha_bar.sqrt().float(), (1 - alpha_bar).sqrt().float()


@torch.no_grad()
def update_average(average: DiT, model: DiT, decay: float, step: int) -> None:
    """Move the weight average; at the beginning it forgets faster, so that it does not remember the start."""
    effective = min(decay, (1 + step) / (10 + step))
    move_all = get_ema_multi_avg_fn(effective)  # one kernel for many tensors
    move_all(list(average.parameters()), list(model.parameters()), step)


def save_weights(state: dict[str, Tensor], path: Path, dtype: torch.dtype) -> None:
    """Write weights in 16 bits, which halves the file; they are loaded as float32."""
    content = save({name: tensor.to("cpu", dtype).contiguous() for name, tensor in state.items()})
    with writing_file(path) as partial:
        partial.write_bytes(content)


@torch.no_grad()
def sample(model: DiT, labels: Tensor, steps: int, guidance: float, seed: int) -> Tensor:
    """Sample with plain DDIM (Song et al. 2021, equation 12, eta 0) and classifier-free guidance.

    Args:
        model: the denoiser; sampling runs on its device.
        labels: classes [N].
        steps: DDIM steps.
        guidance: classifier-free guidance scale; 1 means none.
        seed: seed of the initial noise, which is the same on every device.

    Returns:
        Images [N, C, S, S], on the CPU.
    """
    config = model.config
    shape = (config.channels, config.input_size, config.input_size)
    noise = torch.randn(len(labels), *shape, generator=torch.Generator().manual_seed(seed))
    parts = zip(noise.split(SAMPLED_AT_ONCE), labels.split(SAMPLED_AT_ONCE), strict=True)
    return torch.cat([_sample(model, latent, classes, steps, guidance).cpu() for latent, classes in parts])


def _sample(model: DiT, latent: Tensor, labels: Tensor, steps: int, guidance: float) -> Tensor:
    device = next(model.parameters()).device
    schedule = NoiseSchedule()
    signal, noise_level = (level.tolist() for level in noise_levels(schedule))
    stride = schedule.train_steps // steps
    latent = latent.to(device)
    classes = torch.cat([labels, torch.full_like(labels, model.config.null_class)]).to(device)
    for timestep in range((steps - 1) * stride, -1, -stride):
        times = torch.full((len(classes),), timestep, device=device)
        conditional, unconditional = model(latent.repeat(2, 1, 1, 1), times, classes).chunk(2)
        noise = unconditional + guidance * (conditional - unconditional)
        clean = (latent - noise_level[timestep] * noise) / signal[timestep]
        after = timestep - stride
        latent = signal[after] * clean + noise_level[after] * noise if after >= 0 else clean
    return latent


@torch.no_grad()
def frechet_distance(features: Callable[[Tensor], Tensor], real: Tensor, generated: Tensor) -> float:
    """Return FID-small: the Frechet distance of features of two sets of images (Heusel et al. 2017, equation 6).

    Args:
        features: images [N, C, S, S] -> features [N, F].
        real: images [N, C, S, S].
        generated: images [M, C, S, S].
    """
    found = [features(images).double() for images in (real, generated)]
    means = [values.mean(0) for values in found]
    covariances = [values.T.cov() for values in found]
    mixed = torch.linalg.eigvals(covariances[0] @ covariances[1]).sqrt().real.sum()
    distance = (means[0] - means[1]).square().sum() + sum(each.trace() for each in covariances) - 2 * mixed
    return float(distance)


def write_grid(images: Tensor, path: Path, *, enlarged: int, titles: Sequence[str] = ()) -> None:
    """Write images [rows, columns, C, S, S] in [-1, 1], grey or RGB, as one PNG.

    Args:
        images: the images.
        path: the file to write.
        enlarged: pixels of the file along one side of a pixel of an image.
        titles: one for each row, which stands to the left of it; without titles there is no margin for them.
    """
    from PIL import Image

    framed = F.pad(images.clamp(-1, 1), (1, 1, 1, 1), value=0.0)  # [rows, columns, C, S + 2, S + 2]
    rows, columns, channels, height, width = framed.shape
    tiled = framed.permute(0, 3, 1, 4, 2).reshape(rows * height, columns * width, channels)
    pixels = ((tiled + 1) * 127.5).byte().numpy()
    picture = Image.fromarray(pixels[:, :, 0] if channels == 1 else pixels)
    picture = picture.resize((columns * width * enlarged, rows * height * enlarged), Image.Resampling.NEAREST)
    with writing_file(path) as partial:
        (_titled(picture, titles) if titles else picture).save(partial, format="PNG", optimize=True)


def _titled(picture: Image.Image, titles: Sequence[str]) -> Image.Image:
    """Return a picture of rows with a title to the left of each row."""
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default(TITLE_SIZE)
    margin = math.ceil(max(font.getlength(title) for title in titles)) + TITLE_SIZE
    titled = Image.new(picture.mode, (margin + picture.width, picture.height), "white")
    titled.paste(picture, (margin, 0))
    draw, height = ImageDraw.Draw(titled), picture.height / len(titles)
    for index, title in enumerate(titles):
        place = margin - TITLE_SIZE // 2, round(height * (index + 0.5))
        draw.text(place, title, "black", font, anchor="rm")  # the right end of its middle line is at the place
    return titled
