"""Train a model of digits and its classifier, judge both, and write a folder of weights and card.

    python tools/train_digits.py                                      reproduces qcgraph/models/digits
    python tools/train_digits.py --only evaluate                      repeats the evaluation
    python tools/train_digits.py --width 256 --patch-size 1 -o FOLDER another geometry

``load_model`` and every command accept such a folder; its card states the command that reproduces it.

The training is seeded; the same options on the same machine and thread count give the same weights. An interrupted
training resumes from its ``training.pt`` (kept beside the output until the training is complete).
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import sys
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import training
from model_card import render
from torch import Tensor

from qcgraph.models.classifier import DigitsClassifier, load_classifier
from qcgraph.models.digits_data import CLASS_COUNT, IMAGE_SHAPE, load_digits, split_indices
from qcgraph.models.dit import DiT, DiTConfig
from qcgraph.models.files import CARD_FILE, CLASSIFIER_FILE, DIGITS_FOLDER, WEIGHTS_FILE
from qcgraph.models.trained_folder import load_trained_folder, read_card
from qcgraph.plan.spec import NoiseSchedule


@dataclass(frozen=True)
class Training(training.Training):
    """The settings of a training on digits.

    Attributes:
        train_fraction: share of the digits for training.
        split_seed: seed of the split.
    """

    train_fraction: float
    split_seed: int


@dataclass(frozen=True)
class Judgement:
    """The settings of the evaluation.

    Attributes:
        samples_per_class: generated images of each class.
        sampling_steps: DDIM steps.
        guidance: classifier-free guidance scale; 1 means none.
        seed: seed of the initial noise and of the halves of the floor; no training uses it.
    """

    samples_per_class: int
    sampling_steps: int
    guidance: float
    seed: int


def main() -> int:
    return training.exit_code_of(train, option_parser().parse_args())


def train(options: argparse.Namespace) -> None:
    """Run the requested stages."""
    torch.set_num_threads(options.threads)
    settings = Training(**{field.name: getattr(options, field.name) for field in fields(Training)})
    judgement = Judgement(options.samples_per_class, options.sampling_steps, options.guidance, options.judgement_seed)
    output: Path = options.output
    output.mkdir(parents=True, exist_ok=True)

    card: dict[str, Any] = {"name": output.resolve().name}
    if (output / CARD_FILE).is_file():
        card |= json.loads((output / CARD_FILE).read_text(encoding="utf-8"))
    if options.name is not None:
        card["name"] = options.name
    if options.only in (None, "classifier"):
        card["classifier"] = train_classifier(output, settings)
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
        trained = train_denoiser(output, config, settings)
        card |= {"config": asdict(config), "schedule": asdict(NoiseSchedule()), "training": trained}
        card["environment"] = environment(options.threads)
        write_card(output, card)
    if options.only in (None, "evaluate"):
        write_card(output, card)  # the evaluation loads the model with its card
        card["evaluation"] = evaluate(output, judgement, card, options.grid)
    if options.only in (None, "evaluate", "card"):
        write_card(output, card)
        (output / "CARD.md").write_text(
            render(read_card(output), vars(option_parser().parse_args([]))), encoding="utf-8"
        )
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


def digits(part: str, settings: Training) -> tuple[Tensor, Tensor]:
    """Return images [N, 1, 8, 8] in [-1, 1] and labels [N] of the ``train`` or ``held_out`` part, or of ``all``."""
    images, labels = (torch.from_numpy(array) for array in load_digits())
    if part == "all":
        return images, labels
    train, held_out = split_indices(settings.train_fraction, settings.split_seed)
    indices = torch.from_numpy(train if part == "train" else held_out)
    return images[indices], labels[indices]


def train_classifier(output: Path, settings: Training, *, epochs: int = 60) -> dict[str, Any]:
    """Train the classifier on the training part only, and write its weights as float16.

    Returns:
        The settings and the accuracy of the classifier, measured on the stored weights.
    """
    torch.manual_seed(settings.seed)  # dropout and the default initialisation draw from the global generator
    images, labels = digits("train", settings)
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
    training.save_weights(classifier.state_dict(), output / CLASSIFIER_FILE, torch.float16)

    stored = load_classifier(output / CLASSIFIER_FILE)
    return {
        "epochs": epochs,
        "batch_size": batch_size,
        "learning_rate": peak,
        "seed": settings.seed,
        "train_fraction": settings.train_fraction,
        "split_seed": settings.split_seed,
        "train_images": len(images),
        "train_accuracy": stored.accuracy(images, labels),
        "held_out_images": len(digits("held_out", settings)[0]),
        "held_out_accuracy": stored.accuracy(*digits("held_out", settings)),
    }


def shift(images: Tensor) -> Tensor:
    """Move each image by -1, 0 or 1 pixels along both axes; the digits themselves are not centred exactly."""
    padded = F.pad(images, (1, 1, 1, 1), value=-1.0)  # -1 is the background
    rows, columns = torch.randint(0, 3, (2, len(images)))
    size = torch.arange(IMAGE_SHAPE[1])
    picked = torch.arange(len(images))[:, None, None]
    return padded[picked, 0, (rows[:, None] + size)[:, :, None], (columns[:, None] + size)[:, None, :]].unsqueeze(1)


def train_denoiser(
    output: Path, config: DiTConfig, settings: Training, *, save_seconds: float = training.SAVE_SECONDS
) -> dict[str, Any]:
    """Train the denoiser on the training part, and write its weight average as float16.

    Returns:
        The settings, the loss curve and the wall time in seconds.
    """
    denoising = training.Denoising(config, settings, training.Data(*digits("train", settings)), output / "training.pt")
    denoising.run(save_seconds=save_seconds)
    training.save_weights(denoising.average.state_dict(), output / WEIGHTS_FILE, torch.float16)
    denoising.finish()
    return denoising.summary()


def evaluate(output: Path, judgement: Judgement, card: dict[str, Any], grid: Path | None) -> dict[str, Any]:
    """Sample from the stored weights, and compare the samples with the real digits.

    Returns:
        The settings, class accuracy, FID-small with the floor of two disjoint real halves, and the distance of samples
        to training images, beside the distance of held-out images.
    """
    model, classifier = load_trained_folder(output).module, load_classifier(output / CLASSIFIER_FILE)
    assert isinstance(model, DiT)
    real = torch.from_numpy(load_digits()[0])
    train, held_out = split_indices(card["training"]["train_fraction"], card["training"]["split_seed"])

    labels = torch.arange(CLASS_COUNT).repeat_interleave(judgement.samples_per_class)
    started = time.perf_counter()
    samples = training.sample(model, labels, judgement.sampling_steps, judgement.guidance, judgement.seed)
    seconds = time.perf_counter() - started
    if grid is not None:
        grouped = samples.view(CLASS_COUNT, judgement.samples_per_class, *IMAGE_SHAPE)
        training.write_grid(grouped[:, :10], grid, enlarged=6)

    halves = torch.randperm(len(real), generator=torch.Generator().manual_seed(judgement.seed)).chunk(2)
    return asdict(judgement) | {
        "samples": len(samples),
        "sampling_seconds": round(seconds, 1),
        "class_accuracy": classifier.accuracy(samples, labels),
        "value_range": [round(float(samples.min()), 3), round(float(samples.max()), 3)],
        "fid_small": training.frechet_distance(classifier.features, real, samples),
        "fid_small_real_floor": training.frechet_distance(classifier.features, real[halves[0]], real[halves[1]]),
        "nearest_training_image": nearest_distance(samples, real[train]),
        "nearest_training_image_of_held_out": nearest_distance(real[held_out], real[train]),
    }


def nearest_distance(images: Tensor, references: Tensor) -> float:
    """Return the mean over images of the distance (root mean square per pixel) to the nearest reference."""
    distances = torch.cdist(images.flatten(1), references.flatten(1))
    return float(distances.amin(dim=1).mean()) / math.sqrt(math.prod(IMAGE_SHAPE))


def environment(threads: int) -> dict[str, Any]:
    """Return the conditions that the weights depend on besides the options."""
    return {"torch": torch.__version__, "threads": threads, "machine": platform.machine()}


def write_card(output: Path, card: dict[str, Any]) -> None:
    (output / CARD_FILE).write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
