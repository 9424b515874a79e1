"""Trains a model of digits and its classifier, judges both, and writes a folder of weights and card.

    python tools/train_digits.py                                      reproduces qcgraph/models/digits
    python tools/train_digits.py --only evaluate                      judges what is there again
    python tools/train_digits.py --width 256 --patch-size 1 -o FOLDER another geometry

``load_model`` and every command take such a folder; the card of each states the command that reproduces it.

The run is seeded; the same options on the same machine and thread count give the same weights. An interrupted run
resumes from its ``training.pt`` (kept beside the output until the training is complete).
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from model_card import render
from safetensors.torch import save
from torch import Tensor, nn

from qcgraph.models.classifier import DigitsClassifier, load_classifier
from qcgraph.models.digits_data import CLASS_COUNT, IMAGE_SHAPE, load_digits, split_indices
from qcgraph.models.dit import DiT, DiTConfig, initialize_zero
from qcgraph.models.trained_folder import (
    CARD_FILE,
    CLASSIFIER_FILE,
    DIGITS_FOLDER,
    WEIGHTS_FILE,
    load_trained_folder,
    read_card,
)
from qcgraph.spec import NoiseSchedule


@dataclass(frozen=True)
class Training:
    """The settings of a denoiser's training; they go into the card as they are.

    Attributes:
        steps: optimizer steps.
        batch_size: images per step.
        learning_rate: peak of the cosine.
        warmup_steps: steps of the linear warm-up.
        weight_decay: of AdamW.
        ema_decay: decay of the weight average that is shipped.
        label_dropout: share of labels replaced by the null class, for guidance.
        seed: of initialisation, batches, timesteps and noise.
        train_fraction: share of the digits that is trained on.
        split_seed: seed of the split.
    """

    steps: int
    batch_size: int
    learning_rate: float
    warmup_steps: int
    weight_decay: float
    ema_decay: float
    label_dropout: float
    seed: int
    train_fraction: float
    split_seed: int


@dataclass(frozen=True)
class Judgement:
    """The settings of the evaluation.

    Attributes:
        samples_per_class: generated images of each class.
        sampling_steps: DDIM steps.
        guidance: classifier-free guidance scale; 1 is none.
        seed: of the initial noise and of the halves of the floor; no training uses it.
    """

    samples_per_class: int
    sampling_steps: int
    guidance: float
    seed: int


def main() -> None:
    parser = option_parser()
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    training = Training(**{field.name: getattr(options, field.name) for field in fields(Training)})
    judgement = Judgement(options.samples_per_class, options.sampling_steps, options.guidance, options.judgement_seed)
    output: Path = options.output
    output.mkdir(parents=True, exist_ok=True)

    card: dict[str, Any] = {"name": output.resolve().name}
    if (output / CARD_FILE).is_file():
        card |= json.loads((output / CARD_FILE).read_text(encoding="utf-8"))
    if options.name is not None:
        card["name"] = options.name
    if options.only in (None, "classifier"):
        card["classifier"] = train_classifier(output, training)
        write_card(output, card)
    if options.only in (None, "denoiser"):
        config = DiTConfig(
            input_size=IMAGE_SHAPE[1],
            patch_size=options.patch_size,
            channels=IMAGE_SHAPE[0],
            width=options.width,
            depth=options.depth,
            heads=options.heads,
            class_count=CLASS_COUNT,
            learn_sigma=False,
        )
        trained = train_denoiser(output, config, training)
        card |= {"config": asdict(config), "schedule": asdict(NoiseSchedule()), "training": trained}
        card["environment"] = environment(options.threads)
        write_card(output, card)
    if options.only in (None, "evaluate"):
        write_card(output, card)  # the evaluation loads the model with its card
        card["evaluation"] = evaluate(output, judgement, card, options.grid)
    if options.only in (None, "evaluate", "card"):
        write_card(output, card)
        (output / "CARD.md").write_text(render(read_card(output), vars(parser.parse_args([]))), encoding="utf-8")
    print(json.dumps({key: card[key] for key in ("classifier", "evaluation") if key in card}, indent=2))


def option_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, default=DIGITS_FOLDER)
    parser.add_argument("--name", help="how the model is called; by default as its card says, else as the folder")
    parser.add_argument("--only", choices=("classifier", "denoiser", "evaluate", "card"), help="this stage alone")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--grid", type=Path, help="also write a PNG of ten samples of each class")

    geometry = parser.add_argument_group("geometry")
    geometry.add_argument("--patch-size", type=int, default=2)
    geometry.add_argument("--width", type=int, default=128)
    geometry.add_argument("--depth", type=int, default=6)
    geometry.add_argument("--heads", type=int, default=4)

    training = parser.add_argument_group("training")
    training.add_argument("--steps", type=int, default=6000)
    training.add_argument("--batch-size", type=int, default=128)
    training.add_argument("--learning-rate", type=float, default=1e-3)
    training.add_argument("--warmup-steps", type=int, default=200)
    training.add_argument("--weight-decay", type=float, default=0.01)
    training.add_argument("--ema-decay", type=float, default=0.999)
    training.add_argument("--label-dropout", type=float, default=0.1)
    training.add_argument("--seed", type=int, default=0)
    training.add_argument("--train-fraction", type=float, default=0.8)
    training.add_argument("--split-seed", type=int, default=0)

    judgement = parser.add_argument_group("evaluation")
    judgement.add_argument("--samples-per-class", type=int, default=100)
    judgement.add_argument("--sampling-steps", type=int, default=50)
    judgement.add_argument("--guidance", type=float, default=1.5)
    judgement.add_argument("--judgement-seed", type=int, default=20_000)
    return parser


def digits(part: str, training: Training) -> tuple[Tensor, Tensor]:
    """Images [N, 1, 8, 8] in [-1, 1] and labels [N] of the ``train`` or ``held_out`` part, or of ``all``."""
    images, labels = (torch.from_numpy(array) for array in load_digits())
    if part == "all":
        return images, labels
    train, held_out = split_indices(training.train_fraction, training.split_seed)
    indices = torch.from_numpy(train if part == "train" else held_out)
    return images[indices], labels[indices]


def train_classifier(output: Path, training: Training, *, epochs: int = 60) -> dict[str, Any]:
    """Trains the classifier on the training part only and writes its weights as float16.

    Returns:
        Its settings and its accuracy, measured on the weights as stored.
    """
    torch.manual_seed(training.seed)  # dropout and the default initialisation draw from the global generator
    images, labels = digits("train", training)
    classifier = DigitsClassifier()
    batch_size, peak = 64, 2e-3
    batches = len(images) // batch_size
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=peak, weight_decay=0.02)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * batches)
    for _ in range(epochs):
        for indices in torch.randperm(len(images))[: batches * batch_size].view(batches, batch_size):
            loss = F.cross_entropy(classifier(shift(images[indices])), labels[indices], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            cosine.step()
    save_half(classifier.state_dict(), output / CLASSIFIER_FILE)

    stored = load_classifier(output / CLASSIFIER_FILE)
    return {
        "epochs": epochs,
        "batch_size": batch_size,
        "learning_rate": peak,
        "seed": training.seed,
        "train_fraction": training.train_fraction,
        "split_seed": training.split_seed,
        "train_images": len(images),
        "train_accuracy": stored.accuracy(images, labels),
        "held_out_images": len(digits("held_out", training)[0]),
        "held_out_accuracy": stored.accuracy(*digits("held_out", training)),
    }


def shift(images: Tensor) -> Tensor:
    """Moves each image by -1, 0 or 1 pixels along both axes; the digits themselves are not centred exactly."""
    padded = F.pad(images, (1, 1, 1, 1), value=-1.0)  # -1 is the background
    rows, columns = torch.randint(0, 3, (2, len(images)))
    size = torch.arange(IMAGE_SHAPE[1])
    picked = torch.arange(len(images))[:, None, None]
    return padded[picked, 0, (rows[:, None] + size)[:, :, None], (columns[:, None] + size)[:, None, :]].unsqueeze(1)


def train_denoiser(output: Path, config: DiTConfig, training: Training) -> dict[str, Any]:
    """Trains the denoiser on the training part (DDPM, epsilon loss) and writes its weight average as float16.

    Returns:
        The settings, the loss curve and the wall time in seconds.
    """
    images, labels = digits("train", training)
    generator = torch.Generator().manual_seed(training.seed)
    model = DiT(config)
    initialize_zero(model, generator)
    average = DiT(config).requires_grad_(False)
    average.load_state_dict(model.state_dict())
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(
        trainable, lr=training.learning_rate, weight_decay=training.weight_decay, betas=(0.9, 0.99)
    )
    rate = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_factor(step, training))

    checkpoint = output / "training.pt"
    settings = {"config": asdict(config), "training": asdict(training)}
    state: dict[str, Any] = {"step": 0, "losses": [], "seconds": 0.0}
    parts: dict[str, Any] = {"model": model, "average": average, "optimizer": optimizer, "rate": rate}
    if checkpoint.is_file():
        state = torch.load(checkpoint, weights_only=True)
        if state["settings"] != settings:
            raise SystemExit(f"{checkpoint} belongs to a training with other options: finish that one, or delete it")
        for name, part in parts.items():
            part.load_state_dict(state[name])
        generator.set_state(state["generator"])
        print(f"resuming at step {state['step']}", flush=True)
    first, losses = state["step"], list(state["losses"])
    started = time.perf_counter() - state["seconds"]

    signal, noise_level = noise_levels(NoiseSchedule())
    for step in range(first, training.steps):
        loss = denoising_loss(model, images, labels, signal, noise_level, training, generator)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        rate.step()
        update_average(average, model, training.ema_decay, step)
        losses.append(loss.item())
        done = step + 1
        if done % 100 == 0:
            seconds = time.perf_counter() - started
            print(f"step {done}/{training.steps}  loss {np.mean(losses[-100:]):.4f}  {seconds:.0f} s", flush=True)
        if done % 500 == 0 and done < training.steps:
            progress = {"settings": settings, "step": done, "losses": losses, "seconds": time.perf_counter() - started}
            saved = {name: part.state_dict() for name, part in parts.items()}
            torch.save(progress | saved | {"generator": generator.get_state()}, checkpoint)
    seconds = time.perf_counter() - started

    save_half(average.state_dict(), output / WEIGHTS_FILE)
    checkpoint.unlink(missing_ok=True)
    window = max(1, training.steps // 20)
    ends = range(window, len(losses) + 1, window)
    curve = [[end, round(float(np.mean(losses[end - window : end])), 5)] for end in ends]
    return asdict(training) | {
        "train_images": len(images),
        "optimizer": "AdamW, betas 0.9 and 0.99, gradient norm clipped at 1, cosine after a linear warm-up",
        "parameters": config.parameter_count,
        "final_loss": curve[-1][1],
        "loss_curve": curve,
        "seconds": round(seconds),
    }


def learning_rate_factor(step: int, training: Training) -> float:
    """Share of the peak learning rate at a step: linear warm-up, then a cosine to zero."""
    if step < training.warmup_steps:
        return (step + 1) / training.warmup_steps
    progress = (step - training.warmup_steps) / max(1, training.steps - training.warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * progress))


def noise_levels(schedule: NoiseSchedule) -> tuple[Tensor, Tensor]:
    """sqrt(alpha_bar) and sqrt(1 - alpha_bar) of every training timestep (Ho et al. 2020, equation 4)."""
    betas = torch.linspace(schedule.beta_start, schedule.beta_end, schedule.train_steps, dtype=torch.float64)
    alpha_bar = torch.cumprod(1 - betas, dim=0)
    return alpha_bar.sqrt().float(), (1 - alpha_bar).sqrt().float()


def denoising_loss(
    model: DiT,
    images: Tensor,
    labels: Tensor,
    signal: Tensor,
    noise_level: Tensor,
    training: Training,
    generator: torch.Generator,
) -> Tensor:
    """The epsilon loss of one random batch (Ho et al. 2020, equation 14), with labels dropped for guidance."""
    count = training.batch_size
    picked = torch.randint(len(images), (count,), generator=generator)
    # One timestep per stratum instead of independent ones: the same expectation, a much quieter loss.
    strata = (torch.arange(count) + torch.rand(count, generator=generator)) / count
    timesteps = (strata * len(signal)).long().clamp(max=len(signal) - 1)
    noise = torch.randn(count, *IMAGE_SHAPE, generator=generator)
    dropped = torch.rand(count, generator=generator) < training.label_dropout
    classes = torch.where(dropped, model.config.null_class, labels[picked])
    noisy = signal[timesteps].view(-1, 1, 1, 1) * images[picked] + noise_level[timesteps].view(-1, 1, 1, 1) * noise
    return F.mse_loss(model(noisy, timesteps, classes), noise)


@torch.no_grad()
def update_average(average: DiT, model: DiT, decay: float, step: int) -> None:
    """Moves the weight average; early on it forgets faster, so that it does not remember the start."""
    effective = min(decay, (1 + step) / (10 + step))
    for kept, current in zip(average.parameters(), model.parameters(), strict=True):
        kept.lerp_(current, 1 - effective)


def save_half(state: dict[str, Tensor], path: Path) -> None:
    """Writes weights as float16, which halves the package; they are loaded as float32."""
    path.write_bytes(save({name: tensor.half().contiguous() for name, tensor in state.items()}))


def evaluate(output: Path, judgement: Judgement, card: dict[str, Any], grid: Path | None) -> dict[str, Any]:
    """Samples from the stored weights and compares with the real digits.

    Returns:
        The settings, class accuracy, FID-small with the floor of two disjoint real halves, and how close samples come
        to training images compared with how close held-out images come.
    """
    model, classifier = load_trained_folder(output).module, load_classifier(output / CLASSIFIER_FILE)
    real = torch.from_numpy(load_digits()[0])
    train, held_out = split_indices(card["training"]["train_fraction"], card["training"]["split_seed"])

    labels = torch.arange(CLASS_COUNT).repeat_interleave(judgement.samples_per_class)
    started = time.perf_counter()
    samples = sample(model, labels, judgement)
    seconds = time.perf_counter() - started
    if grid is not None:
        write_grid(samples.view(CLASS_COUNT, judgement.samples_per_class, *IMAGE_SHAPE)[:, :10], grid)

    halves = torch.randperm(len(real), generator=torch.Generator().manual_seed(judgement.seed)).chunk(2)
    return asdict(judgement) | {
        "samples": len(samples),
        "sampling_seconds": round(seconds, 1),
        "class_accuracy": classifier.accuracy(samples, labels),
        "value_range": [round(float(samples.min()), 3), round(float(samples.max()), 3)],
        "fid_small": frechet_distance(classifier, real, samples),
        "fid_small_real_floor": frechet_distance(classifier, real[halves[0]], real[halves[1]]),
        "nearest_training_image": nearest_distance(samples, real[train]),
        "nearest_training_image_of_held_out": nearest_distance(real[held_out], real[train]),
    }


@torch.no_grad()
def sample(model: nn.Module, labels: Tensor, judgement: Judgement) -> Tensor:
    """Plain DDIM with classifier-free guidance: images [N, 1, 8, 8] of labels [N]."""
    from diffusers import DDIMScheduler

    schedule = NoiseSchedule()
    scheduler: Any = DDIMScheduler(  # its annotations hide the methods
        num_train_timesteps=schedule.train_steps,
        beta_start=schedule.beta_start,
        beta_end=schedule.beta_end,
        beta_schedule=schedule.beta_schedule,
        clip_sample=False,
    )
    scheduler.set_timesteps(judgement.sampling_steps)
    latent = torch.randn(len(labels), *IMAGE_SHAPE, generator=torch.Generator().manual_seed(judgement.seed))
    classes = torch.cat([labels, torch.full_like(labels, CLASS_COUNT)])
    for timestep in scheduler.timesteps:
        conditional, unconditional = model(latent.repeat(2, 1, 1, 1), timestep.repeat(len(classes)), classes).chunk(2)
        noise = unconditional + judgement.guidance * (conditional - unconditional)
        latent = scheduler.step(noise, timestep, latent).prev_sample
    return latent


class ClassifierFeatures(nn.Module):
    """The classifier's features in the form that torchmetrics asks for."""

    num_features = DigitsClassifier.feature_count

    def __init__(self, classifier: DigitsClassifier) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier.features(images)


@torch.no_grad()
def frechet_distance(classifier: DigitsClassifier, real: Tensor, generated: Tensor) -> float:
    """FID-small: the Frechet distance of classifier features of two sets of images [N, 1, 8, 8]."""
    from torchmetrics.image.fid import FrechetInceptionDistance

    metric = FrechetInceptionDistance(feature=ClassifierFeatures(classifier), input_img_size=IMAGE_SHAPE)
    metric.update(real, real=True)
    metric.update(generated, real=False)
    return float(metric.compute())


def nearest_distance(images: Tensor, references: Tensor) -> float:
    """Mean over images of the distance (root mean square per pixel) to the nearest reference."""
    distances = torch.cdist(images.flatten(1), references.flatten(1))
    return float(distances.amin(dim=1).mean()) / math.sqrt(math.prod(IMAGE_SHAPE))


def write_grid(images: Tensor, path: Path) -> None:
    """Writes images [rows, columns, 1, 8, 8] in [-1, 1] as one enlarged grey PNG."""
    from PIL import Image

    framed = F.pad(images.clamp(-1, 1), (1, 1, 1, 1), value=0.0)[:, :, 0]  # [rows, columns, 10, 10]
    rows, columns, height, width = framed.shape
    pixels = ((framed.permute(0, 2, 1, 3).reshape(rows * height, columns * width) + 1) * 127.5).byte().numpy()
    Image.fromarray(pixels).resize((columns * width * 6, rows * height * 6), Image.Resampling.NEAREST).save(path)


def environment(threads: int) -> dict[str, Any]:
    """What the weights depend on besides the options."""
    return {"torch": torch.__version__, "threads": threads, "machine": platform.machine()}


def write_card(output: Path, card: dict[str, Any]) -> None:
    (output / CARD_FILE).write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
