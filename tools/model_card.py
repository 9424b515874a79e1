"""Write the card of a trained model for people: the text of CARD.md, with every figure from card.json."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from qcgraph.models.trained_folder import Card

PICTURE = "samples.png"


def render(card: Card, defaults: Mapping[str, Any]) -> str:
    """Return the text of CARD.md.

    Args:
        card: the card, with all its sections.
        defaults: the defaults of the training tool's options, by name; commands on the card state other values only.
    """
    judged = {"judgement_seed" if name == "seed" else name: value for name, value in card.evaluation.items()}
    trained = asdict(card.config) | card.training | {"threads": card.environment["threads"]}
    return TEXT.format(
        name=card.name,
        train=command(card.name, judged | trained, defaults),
        evaluate=command(card.name, judged, defaults, "--only evaluate"),
        model=table(model_rows(card)),
        conditions="{samples} samples, DDIM with {sampling_steps} steps, guidance {guidance}, noise seed {seed}".format(
            **card.evaluation
        ),
        measured=table(measured_rows(card)),
        reading=textwrap.fill(READING, 120),
    )


def command(name: str, settings: Mapping[str, Any], defaults: Mapping[str, Any], *words: str) -> str:
    """Return the command line of the training tool with the options that differ from their defaults."""
    output: Path = defaults["output"]
    place = [] if name == output.name else [f"-o {name}"]
    options = [
        f"--{option.replace('_', '-')} {settings[option]}"
        for option, default in defaults.items()
        if option in settings and settings[option] != default
    ]
    return " ".join(["python tools/train_digits.py", *place, *words, *options])


def render_images(card: Card, train: str) -> str:
    """Return the text of CARD.md for a model of images.

    Args:
        card: the card, with all its sections.
        train: the command that trained and judged it.
    """
    classes = card.classifier["classes"]
    few = ", ".join(classes[:20]) + (f" and {len(classes) - 20} more" if len(classes) > 20 else "")
    return IMAGES_TEXT.format(
        name=card.name,
        data=card.training["data"],
        train=train,
        model=table(images_rows(card)),
        classes=textwrap.fill(f"Classes, in the order of their labels: {few}.", 120),
        curve=table(
            [("step", "mean loss until there"), *((f"{step}", f"{loss:.4f}") for step, loss in curve_of(card))]
        ),
        conditions="{samples} samples, DDIM with {sampling_steps} steps, guidance {guidance}, noise seed {seed}".format(
            **card.evaluation
        ),
        measured=table(images_measured_rows(card)),
        picture=PICTURE,
        reading=textwrap.fill(IMAGES_READING, 120),
    )


def curve_of(card: Card) -> list[tuple[int, float]]:
    """Return at most ten points of the loss curve, including the last one."""
    curve = card.training["loss_curve"]
    return list(curve[::-1][:: -(-len(curve) // 10)][::-1])


def model_rows(card: Card) -> list[tuple[str, str]]:
    """Return the rows on the model and its training."""
    config, training, schedule = card.config, card.training, card.schedule
    shape = f"patch {config.patch_size}, width {config.width}, depth {config.depth}, {config.heads} heads"
    optimizer = f"AdamW at {training['learning_rate']:g}, average decay {training['ema_decay']}"
    data = f"{training['train_images']} digits ({training['train_fraction']:.0%} of each class"
    betas = f"{schedule.beta_schedule} betas {schedule.beta_start:g} to {schedule.beta_end:g}"
    return [
        ("architecture", f"DiT, {config.input_size}x{config.input_size} images, {shape}, no learned sigma"),
        ("parameters", f"{training['parameters']:,}, stored as float16, loaded as float32"),
        ("classes", f"{config.class_count}; the null class is {config.null_class}"),
        ("noise schedule", f"DDPM, {betas}, {schedule.train_steps} timesteps; the network predicts the noise"),
        ("data", f"{data}, split seed {training['split_seed']}), scaled to [-1, 1]"),
        (
            "training",
            f"{training['steps']} steps, batch {training['batch_size']}, {optimizer}, seed {training['seed']}",
        ),
        ("label dropout", f"{training['label_dropout']:.0%}"),
        ("final loss", f"{training['final_loss']:.4f}"),
        ("training time", f"{training['seconds'] / 60:.0f} minutes, threads: {card.environment['threads']}"),
    ]


def measured_rows(card: Card) -> list[tuple[str, str]]:
    """Return the rows on the quality of the samples and their judge."""
    judged, judge = card.evaluation, card.classifier
    return [
        ("class accuracy of samples", f"{judged['class_accuracy']:.1%}"),
        ("FID-small to all real digits", f"{judged['fid_small']:.3f}"),
        ("FID-small between two disjoint halves of the real digits", f"{judged['fid_small_real_floor']:.3f}"),
        ("distance of samples to the nearest training image", f"{judged['nearest_training_image']:.3f}"),
        ("the same of held-out digits", f"{judged['nearest_training_image_of_held_out']:.3f}"),
        (f"classifier accuracy, {judge['held_out_images']} held-out digits", f"{judge['held_out_accuracy']:.1%}"),
    ]


def images_rows(card: Card) -> list[tuple[str, str]]:
    """Return the rows on a model of images and its training."""
    config, trained, schedule = card.config, card.training, card.schedule
    shape = f"patch {config.patch_size}, width {config.width}, depth {config.depth}, {config.heads} heads"
    kind = "RGB" if config.channels == 3 else "grey"
    optimizer = f"AdamW at {trained['learning_rate']:g}, average decay {trained['ema_decay']}"
    betas = f"{schedule.beta_schedule} betas {schedule.beta_start:g} to {schedule.beta_end:g}"
    mirrors = ", every second one mirrored" if trained["mirrors"] else ""
    limit = f", as many as fitted into {trained['time_limit']:g} minutes" if trained.get("time_limit") else ""
    compiled = ", compiled" if card.environment.get("compiled") else ""
    return [
        ("architecture", f"DiT, {config.input_size}x{config.input_size} {kind} images, {shape}, no learned sigma"),
        ("parameters", f"{trained['parameters']:,}, stored as bfloat16, loaded as float32"),
        ("classes", f"{config.class_count}; the null class is {config.null_class}"),
        ("noise schedule", f"DDPM, {betas}, {schedule.train_steps} timesteps; the network predicts the noise"),
        ("data", f"{trained['train_images']} images of `{trained['data']}`, scaled to [-1, 1]{mirrors}"),
        ("steps", f"{trained['steps']}{limit}"),
        ("training", f"batch {trained['batch_size']}, {optimizer}, seed {trained['seed']}"),
        ("label dropout", f"{trained['label_dropout']:.0%}"),
        ("final loss", f"{trained['final_loss']:.4f}"),
        ("training time", f"{trained['seconds'] / 60:.0f} minutes, {card.environment['machine']}{compiled}"),
    ]


def images_measured_rows(card: Card) -> list[tuple[str, str]]:
    """Return the rows on the quality of the samples and their judge, for a model of images."""
    judged, judge = card.evaluation, card.classifier
    floor = f"FID-small between two disjoint halves of the held-out images, {judged['floor_images']} each"
    return [
        ("class accuracy of samples", f"{judged['class_accuracy']:.1%}"),
        (f"FID-small to the {judge['held_out_images']} held-out images", f"{judged['fid_small']:.3f}"),
        (floor, f"{judged['fid_small_real_floor']:.3f}"),
        (f"classifier accuracy, {judge['held_out_images']} held-out images", f"{judge['held_out_accuracy']:.1%}"),
    ]


def table(rows: list[tuple[str, str]]) -> str:
    """Return a Markdown table of two columns without a heading."""
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)])


TEXT = """# {name}

A small Diffusion Transformer of scikit-learn's handwritten digits, so that quality can be measured on a trained model.
`card.json` holds the same figures, and the loss curve, for programs. This trains and judges it again:

```sh
{train}
```

{model}

## Measured

On {conditions}:

```sh
{evaluate}
```

{measured}

{reading}
"""

READING = """FID-small is the Frechet distance of features of `classifier.safetensors`, not of Inception. It falls as
samples grow, and every model has a classifier of its own, so compare it only with figures of the same model and sample
count. Distances are root mean squares per pixel; where samples are closer to the training images than held-out digits
are, guidance made them typical or the model remembers some. It is a test bed for transformations, not a generator to
learn about digits from."""

IMAGES_TEXT = """# {name}

A Diffusion Transformer of the images in `{data}`, so that quality can be measured on a trained model. `card.json` holds
the same figures for programs. This trains and judges it again:

```sh
{train}
```

{model}

{classes}

## Loss

{curve}

## Measured

On {conditions}:

{measured}

{reading}

![Samples of each class]({picture})
"""

IMAGES_READING = """FID-small is the Frechet distance of features of `classifier.safetensors`, not of Inception. It
falls as samples grow, and every model has a classifier of its own, so compare it only with figures of the same model
and sample count. It is a test bed for transformations, not a generator to show."""
