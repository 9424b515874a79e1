"""Train a Diffusion Transformer on images and a classifier that judges it, and write a folder that qcgraph compiles.

    python tools/train_dit.py images.npz -o FOLDER
    python tools/train_dit.py images.npz -o FOLDER --time-limit 60
    python tools/train_dit.py FOLDER_OF_CLASSES -o FOLDER --image-size 32 --size small
    python tools/train_dit.py images.npz -o FOLDER --limit 500 --size tiny --steps 20 --epochs 1 --samples 100

The last command is a quick trial on a CPU. The forms of images are described in image_data.py. The tool trains on a GPU
if there is one, with a compiled model and products in bfloat16, and takes snapshots: the same command resumes an
interrupted training. If the training is complete, it only repeats the evaluation.

With a time limit, the number of steps is reduced to what fits into it, once the speed of the machine is known. The card
states that number, and a command that repeats the training with as many steps.

The folder has the weight average in bfloat16, the classifier, held-out images for FID-small, the loss curve in
card.json, a card for people, and a picture of samples. `qcgraph compile FOLDER -o out` and every other command accept
it.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import sys
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import training
from image_data import ImageData, load_images
from model_card import PICTURE, render_images
from safetensors.torch import save
from torch import Tensor

from qcgraph.errors import UsageError
from qcgraph.files.atomic import writing_file
from qcgraph.models.dit import DiT
from qcgraph.models.files import CARD_FILE, CLASSIFIER_FILE, IMAGES_WEIGHTS_FILE, REAL_FILE
from qcgraph.models.geometry import DiTConfig
from qcgraph.models.image_classifier import (
    REAL_IMAGES,
    ImageClassifier,
    in_batches,
    load_image_classifier,
    scaled,
)
from qcgraph.models.trained_folder import load_trained_folder, read_card
from qcgraph.plan.spec import NoiseSchedule

SIZES = {"tiny": (32, 2, 2), "small": (128, 6, 4), "base": (256, 12, 4)}
"""Width, depth and heads. ``base`` with patches of 2 has 14.5 M parameters for 32x32 images: 29 MB in bfloat16."""

REAL_COUNT = 2000  # held-out images that are stored in the folder
GRID_COLUMNS = 10
GRID_ROWS = 20  # classes that the picture of samples shows at most
CLASSIFIER_BATCH = 512
CLASSIFIER_BATCHES = 64  # batches of an epoch at least: few images are trained on in smaller batches
CLASSIFIER_RATE = 4e-3  # of the largest batch


def main() -> int:
    return training.exit_code_of(train, option_parser().parse_args())


def train(options: argparse.Namespace) -> None:
    """Run the stages that remain: classifier, denoiser, evaluation, card."""
    torch.set_num_threads(options.threads)
    output: Path = options.output
    card = begun(output)
    device = torch.device(options.device)
    data = load_images(options.images, options.image_size)
    if options.limit is not None:
        data = data.limited(options.limit)
    config = config_of(options, data)
    settings = training.Training(**{field.name: getattr(options, field.name) for field in fields(training.Training)})
    card |= {"name": output.resolve().name, "data": "images", "schedule": asdict(NoiseSchedule())}

    part = {"data": data.name, "limit": options.limit}
    denoiser = asdict(settings) | part | {"mirrors": not options.no_mirrors, "time_limit": options.time_limit}
    if options.time_limit is not None:
        del denoiser["steps"]  # the card has the number that fitted
    if "training" in card and not (is_done(card, "training", denoiser) and card["config"] == asdict(config)):
        raise UsageError("holds a model of other options", where=str(output), hint="choose another folder")
    asked = part | {"epochs": options.epochs, "seed": options.seed, "classes": list(data.classes)}
    if not is_done(card, "classifier", asked):
        card["classifier"] = asked | train_classifier(output, data, options.epochs, options.seed, device)
        write_card(output, card)
    if "training" not in card:
        trained = train_denoiser(output, config, settings, data, options, device)
        card |= {"config": asdict(config), "training": denoiser | trained, "environment": environment(options)}
        write_card(output, card)
    card["evaluation"] = evaluate(output, data, options, device)
    write_card(output, card)
    with writing_file(output / "CARD.md") as path:
        path.write_text(render_images(read_card(output), command(options, card)), encoding="utf-8")
    print(json.dumps({"classifier": card["classifier"], "evaluation": card["evaluation"]}, indent=2))


def begun(output: Path) -> dict[str, Any]:
    """Return the card of a folder that this tool began, or an empty card after making an empty folder.

    Raises:
        UsageError: the folder has other contents.
    """
    if (output / CARD_FILE).is_file():
        card: dict[str, Any] = json.loads((output / CARD_FILE).read_text(encoding="utf-8"))
        if card.get("data") != "images":
            raise UsageError("holds another model", where=str(output), hint="choose another folder")
        return card
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise UsageError("is not empty, and no training began it", where=str(output), hint="choose another folder")
    output.mkdir(parents=True, exist_ok=True)
    return {}


def config_of(options: argparse.Namespace, data: ImageData) -> DiTConfig:
    """Return the sizes of the network.

    Raises:
        UsageError: the sizes do not fit the images.
    """
    width, depth, heads = SIZES[options.size]
    channels, size, _ = data.shape
    try:
        return DiTConfig(
            input_size=size,
            patch_size=options.patch_size,
            channels=channels,
            width=options.width or width,
            depth=options.depth or depth,
            heads=options.heads or heads,
            class_count=len(data.classes),
            learn_sigma=False,
        )
    except ValueError as error:
        raise UsageError(
            str(error), where=data.name, hint="choose --patch-size, --width and --heads that fit"
        ) from error


def is_done(card: dict[str, Any], stage: str, asked: dict[str, Any]) -> bool:
    """Return whether the card has a stage with these settings."""
    done = card.get(stage, {})
    return bool(done) and all(done.get(name) == value for name, value in asked.items())


def train_classifier(output: Path, data: ImageData, epochs: int, seed: int, device: torch.device) -> dict[str, Any]:
    """Train the classifier on the training part; write its weights as bfloat16, and held-out images beside them.

    Returns:
        The accuracy of the classifier, measured on the stored weights.
    """
    torch.manual_seed(seed)  # dropout and the default initialisation draw from the global generator
    channels, size, _ = data.shape
    classifier = ImageClassifier(channels, len(data.classes)).to(device)
    images, labels = data.images.to(device), data.labels.to(device)
    batch_size = max(1, min(CLASSIFIER_BATCH, len(images) // CLASSIFIER_BATCHES))
    batches = len(images) // batch_size
    peak = CLASSIFIER_RATE * math.sqrt(batch_size / CLASSIFIER_BATCH)  # the noise of gradients falls with the root
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=peak, weight_decay=0.02, fused=device.type == "cuda")
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, peak, total_steps=max(2, epochs * batches))
    for epoch in range(epochs):
        for indices in torch.randperm(len(images))[: batches * batch_size].view(batches, batch_size).to(device):
            moved = shifted(scaled(images[indices]), margin=size // 8)
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                loss = F.cross_entropy(classifier(moved), labels[indices], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            rate.step()
        print(f"classifier: epoch {epoch + 1}/{epochs}  loss {loss.item():.4f}", flush=True)
    training.save_weights(classifier.state_dict(), output / CLASSIFIER_FILE, torch.bfloat16)
    shuffled = torch.randperm(len(data.test_images), generator=torch.Generator().manual_seed(seed))
    real = data.test_images[shuffled[:REAL_COUNT]].contiguous()
    with writing_file(output / REAL_FILE) as path:
        path.write_bytes(save({REAL_IMAGES: real}))

    stored = load_image_classifier(output / CLASSIFIER_FILE, channels, len(data.classes)).to(device)
    found = in_batches(stored, scaled(data.test_images).to(device)).argmax(dim=1).cpu()
    return {
        "batch_size": batch_size,
        "learning_rate": peak,
        "train_images": len(images),
        "held_out_images": len(data.test_images),
        "held_out_accuracy": float((found == data.test_labels).double().mean()),
        "real_images": len(real),
    }


def shifted(images: Tensor, *, margin: int) -> Tensor:
    """Move a batch by up to a margin of pixels, with its edges repeated, and mirror it every second time."""
    row, column, mirrored = (int(torch.randint(bound, ())) for bound in (2 * margin + 1, 2 * margin + 1, 2))
    size = images.shape[2]
    padded = F.pad(images, (margin,) * 4, mode="replicate")
    cropped = padded[:, :, row : row + size, column : column + size]
    return cropped.flip(3) if mirrored else cropped


def train_denoiser(
    output: Path,
    config: DiTConfig,
    settings: training.Training,
    data: ImageData,
    options: argparse.Namespace,
    device: torch.device,
) -> dict[str, Any]:
    """Train the denoiser, and write its weight average as bfloat16.

    Returns:
        The settings, the loss curve, and the wall time in seconds.
    """
    on_device = training.Data(data.images.to(device), data.labels.to(device), mirrors=not options.no_mirrors)
    denoising = training.Denoising(
        config,
        settings,
        on_device,
        output / "training.pt",
        compiled=is_compiled(options),
        time_limit=None if options.time_limit is None else 60 * options.time_limit,
    )
    denoising.run()
    training.save_weights(denoising.average.state_dict(), output / IMAGES_WEIGHTS_FILE, torch.bfloat16)
    denoising.finish()
    return denoising.summary()


def is_compiled(options: argparse.Namespace) -> bool:
    """Return whether the model is compiled for the training, by default on a GPU only."""
    return torch.device(options.device).type == "cuda" if options.compile is None else bool(options.compile)


def evaluate(output: Path, data: ImageData, options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Sample from the stored weights, and compare the samples with held-out images.

    Returns:
        The settings, class accuracy, and FID-small with the floor of two disjoint halves of the held-out images.
    """
    model = load_trained_folder(output).module.to(device)
    assert isinstance(model, DiT)
    classifier = load_image_classifier(output / CLASSIFIER_FILE, model.config.channels, model.config.class_count)
    rows = -(-options.samples // len(data.classes))
    labels = torch.arange(len(data.classes)).repeat(rows)
    samples = training.sample(model, labels, options.sampling_steps, options.guidance, options.judgement_seed)
    grouped = samples.unflatten(0, (rows, len(data.classes))).transpose(0, 1)[:GRID_ROWS, :GRID_COLUMNS]
    enlarged = max(1, 64 // data.shape[1])
    training.write_grid(grouped, output / PICTURE, enlarged=enlarged, titles=data.classes[:GRID_ROWS])

    def features(images: Tensor) -> Tensor:
        return in_batches(classifier.features, images)

    real = scaled(data.test_images)
    halves = torch.randperm(len(real), generator=torch.Generator().manual_seed(options.judgement_seed)).chunk(2)
    found = in_batches(classifier, samples.clamp(-1, 1)).argmax(dim=1)
    return {
        "samples": len(samples),
        "sampling_steps": options.sampling_steps,
        "guidance": options.guidance,
        "seed": options.judgement_seed,
        "class_accuracy": float((found == labels).double().mean()),
        "fid_small": training.frechet_distance(features, real, samples.clamp(-1, 1)),
        "fid_small_real_floor": training.frechet_distance(features, real[halves[0]], real[halves[1]]),
        "floor_images": len(halves[1]),
    }


def environment(options: argparse.Namespace) -> dict[str, Any]:
    """Return the conditions that the weights depend on besides the options."""
    device = torch.device(options.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {
        "torch": torch.__version__,
        "threads": options.threads,
        "machine": name,
        "compiled": is_compiled(options),
    }


def write_card(output: Path, card: dict[str, Any]) -> None:
    with writing_file(output / CARD_FILE) as path:
        path.write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")


def command(options: argparse.Namespace, card: dict[str, Any]) -> str:
    """Return the command line with the options that differ from their defaults; paths are reduced to names.

    Where a time limit reduced the number of steps, the command has that number instead of the limit.
    """
    parser = option_parser()
    left_out = ("images", "output", "device", "threads", "compile", "time_limit")
    words = ["python tools/train_dit.py", options.images.name, f"-o {options.output.resolve().name}"]
    for name, value in (vars(options) | {"steps": card["training"]["steps"]}).items():
        if name not in left_out and value != parser.get_default(name):
            words.append(f"--{name.replace('_', '-')}" if value is True else f"--{name.replace('_', '-')} {value}")
    return " ".join(words)


def positive(text: str) -> int:
    """Parse a whole number of at least 1."""
    value = int(text)
    if value < 1:
        raise ValueError(text)
    return value


def minutes(text: str) -> float:
    """Parse a finite number of minutes above 0."""
    value = float(text)
    if not 0 < value < math.inf:
        raise ValueError(text)
    return value


def option_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", type=Path, help="an .npz file, or a folder with a subfolder for each class")
    parser.add_argument("-o", "--output", type=Path, required=True, help="the folder of the model")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=positive, default=torch.get_num_threads())
    parser.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, help="torch.compile the model; by default on a GPU"
    )
    parser.add_argument("--image-size", type=positive, default=32, help="of images from a folder")
    parser.add_argument("--limit", type=positive, metavar="N", help="take N images to train on and N held out, at most")

    geometry = parser.add_argument_group("geometry")
    geometry.add_argument("--size", choices=tuple(SIZES), default="base")
    geometry.add_argument("--patch-size", type=positive, default=2)
    for name in ("width", "depth", "heads"):
        geometry.add_argument(f"--{name}", type=positive, help="instead of that of the size")

    denoiser = parser.add_argument_group("training")
    denoiser.add_argument("--steps", type=positive, default=150_000)
    denoiser.add_argument(
        "--time-limit",
        type=minutes,
        metavar="MINUTES",
        help="reduce the steps to what fits; the classifier and the evaluation take their own time",
    )
    denoiser.add_argument("--batch-size", type=positive, default=256)
    denoiser.add_argument("--learning-rate", type=float, default=5e-4)
    denoiser.add_argument("--warmup-steps", type=positive, default=1000)
    denoiser.add_argument("--weight-decay", type=float, default=0.01)
    denoiser.add_argument("--ema-decay", type=float, default=0.9999)
    denoiser.add_argument("--label-dropout", type=float, default=0.1)
    denoiser.add_argument("--no-mirrors", action="store_true", help="for images that have a left and a right")
    denoiser.add_argument("--seed", type=int, default=0)

    judge = parser.add_argument_group("classifier and evaluation")
    judge.add_argument("--epochs", type=positive, default=30, help="of the classifier")
    judge.add_argument("--samples", type=positive, default=2000)
    judge.add_argument("--sampling-steps", type=positive, default=50)
    judge.add_argument("--guidance", type=float, default=1.5)
    judge.add_argument("--judgement-seed", type=int, default=20_000)
    return parser


if __name__ == "__main__":
    sys.exit(main())
