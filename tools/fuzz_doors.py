"""Define the doors of tools/fuzz.py: the entry points of qcgraph, with all heavy work behind them cut off."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NoReturn
from unittest import mock

from fuzz_inputs import (
    NUMBERS,
    WORDS,
    damage_text,
    damage_weights,
    draw_pipeline,
    draw_recipe,
    draw_schedule,
    json_bytes,
    text_bytes,
)

from qcgraph.errors import QcgraphError

PASSED, REFUSED, STOPPED = "passed", "refused", "stopped behind the door"


class LetInError(QcgraphError):
    """Stands for the heavy part behind a door; an input that reaches it was accepted."""

    def __init__(self, *_: object, **__: object) -> None:
        super().__init__("let in", hint="nothing: the fuzz stops here")


class NotInWordsError(Exception):
    """An outcome without an exception of its own: a wrong exit code, or an error without a hint."""


@dataclass(frozen=True)
class Door:
    """An entry point for inputs.

    Attributes:
        name: the name of the door.
        draw: makes an input, bytes or a list of arguments, from a source of random numbers.
        enter: passes the input to qcgraph, and raises any error of it.
        weight: the share of inputs for this door.
    """

    name: str
    draw: Callable[[random.Random], Any]
    enter: Callable[[Any], str]
    weight: float = 1


@dataclass(frozen=True)
class Samples:
    """Valid samples to damage, made once in a temporary folder.

    Attributes:
        folder: the folder of the samples, where inputs are written, too.
        bundle: a bundle for PyTorch.
        checkpoints: files of weights, by name.
        diffusers: a folder that diffusers wrote.
        trained: a folder that a training tool wrote.
    """

    folder: Path
    bundle: Path
    checkpoints: dict[str, bytes]
    diffusers: Path
    trained: Path

    @property
    def scratch(self) -> Path:
        """The path for inputs."""
        return self.folder / "input"

    def cloned(self, source: Path, changed: str, content: bytes) -> Path:
        """Return a copy of a folder whose files are links to the originals, except for one changed file."""
        place = self.scratch / source.name
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(source, place, copy_function=os.link)
        (place / changed).unlink(missing_ok=True)
        (place / changed).write_bytes(content)
        return place


def make_samples(folder: Path) -> Samples:
    """Make a tiny model, a bundle of it, checkpoints and folders."""
    import torch
    from diffusers import DDIMScheduler, DiTTransformer2DModel
    from safetensors.torch import save_file

    import qcgraph
    from qcgraph.models import LoadedModel
    from qcgraph.models.dit import DiT, initialize_random
    from qcgraph.models.files import CARD_FILE, DIGITS_FOLDER, WEIGHTS_FILE
    from qcgraph.models.geometry import DiTConfig
    from qcgraph.plan.spec import ModelSpec

    (folder / "input").mkdir()
    config = DiTConfig(input_size=4, patch_size=2, channels=1, width=16, depth=1, heads=2, class_count=3)
    module = DiT(config)
    initialize_random(module, torch.Generator().manual_seed(0))
    loaded = LoadedModel(
        module.eval(), ModelSpec.class_conditional("tiny", (1, 4, 4), 3, 3, output_channels=2), ("x", "t", "y")
    )
    recipe = {
        "sampling": {"steps": 6},
        "solver": {"mode": "fitted=4", "target": "run"},
        "quantization": {"groups": 2, "scales": "range", "rounding": "nearest", "equalize": False, "correction": "off"},
        "calibration": {"trajectories": 2, "samples": 8},
        "cache": {"schedule": "interval=2"},
        "gate": {"allow_unsafe": True},
        "target": {"name": "torch"},
    }
    bundle = qcgraph.compile(loaded, recipe, output=folder / "bundle").path
    weights = {name: value for name, value in module.state_dict().items() if value.numel() < 300}
    files = {}
    for name, content in (("plain.pt", weights), ("nested.pt", {"ema": weights, "opt": {}, "train_steps": 3})):
        torch.save(content, folder / name)
        torch.save(content, folder / f"old-{name}", _use_new_zipfile_serialization=False)
        files |= {which: (folder / which).read_bytes() for which in (name, f"old-{name}")}
    for name, odd in (("number.pt", {1: weights["pos_embed"]} if "pos_embed" in weights else {1: torch.ones(2)}),
                      ("list.pt", [1, "x"]), ("int8.pt", {"a": torch.ones(2, dtype=torch.int8)})):  # fmt: skip
        torch.save(odd, folder / name)
        files[name] = (folder / name).read_bytes()
    save_file({name: value.contiguous() for name, value in weights.items()}, folder / "f.safetensors")
    files["f.safetensors"] = (folder / "f.safetensors").read_bytes()
    transformer = DiTTransformer2DModel(
        num_attention_heads=1, attention_head_dim=4, in_channels=2, out_channels=2, num_layers=1, sample_size=4,
        num_embeds_ada_norm=3, norm_num_groups=1,
    )  # fmt: skip
    transformer.save_pretrained(folder / "pipe" / "transformer")
    DDIMScheduler(clip_sample=False).save_pretrained(folder / "pipe" / "scheduler")
    shutil.copytree(DIGITS_FOLDER, folder / "trained", ignore=lambda _, names: {*names} - {CARD_FILE, WEIGHTS_FILE})
    return Samples(folder, bundle, files, folder / "pipe", folder / "trained")


def make_doors(samples: Samples) -> dict[str, Door]:
    """Return all doors by name."""
    doors = (
        Door("recipe", draw_recipe, lambda data: _enter_recipe(samples, data), 80),
        Door("pipeline", draw_pipeline, _enter_pipeline, 80),
        Door("plan", lambda rng: _draw_plan(rng, samples), lambda data: _enter_plan(samples, data), 60),
        Door("schedule", lambda rng: _draw_schedule(rng), _enter_schedule, 80),
        Door("command", lambda rng: _draw_command(rng, samples), _enter_command, 40),
        Door(
            "checkpoint", lambda rng: _draw_checkpoint(rng, samples), lambda data: _enter_checkpoint(samples, data), 24
        ),
        Door("folder", lambda rng: _draw_folder(rng, samples), lambda data: _enter_folder(samples, data), 8),
        Door("bundle", lambda rng: _draw_bundle(rng, samples), lambda data: _enter_bundle(samples, data), 24),
        Door("program", lambda rng: _draw_program(rng, samples), lambda data: _enter_program(samples, data), 4),
    )
    return {door.name: door for door in doors}


def _enter_recipe(samples: Samples, data: bytes) -> str:
    from qcgraph.compiler.default_pipeline import default_pipeline, target_notes
    from qcgraph.export.targets import target_named
    from qcgraph.recipe import Recipe

    path = samples.scratch / "recipe.toml"
    path.write_bytes(data)
    recipe = Recipe.load(str(path))
    assert Recipe.from_toml(recipe.to_toml()) == recipe
    target = target_named(recipe.target.name)
    default_pipeline(recipe, target)
    target_notes(recipe, target)
    return PASSED


def _enter_pipeline(data: bytes) -> str:
    from qcgraph.pipeline import Pipeline

    pipeline = Pipeline.parse(data.decode("utf-8", "surrogateescape"))
    assert Pipeline.parse(pipeline.text) == pipeline
    return PASSED


def _draw_plan(rng: random.Random, samples: Samples) -> bytes:
    from qcgraph.bundle import Bundle
    from qcgraph.bundle.plan_file import plan_data, plan_toml

    if rng.random() < 0.4:
        return json_bytes(rng, json.loads((samples.bundle / "plan.json").read_text("utf-8")))
    data = plan_data(Bundle.open(samples.bundle, check=False).plan)
    if rng.random() < 0.3:
        return json_bytes(rng, data)
    return text_bytes(rng, damage_text(rng, plan_toml(data)))


def _enter_plan(samples: Samples, data: bytes) -> str:
    from qcgraph.bundle.plan_file import read_plan
    from qcgraph.plan.schedule import TimedSchedule

    path = samples.scratch / "plan.toml"
    path.write_bytes(data)
    plan = read_plan(path)
    plan.describe()
    assert TimedSchedule.parse(plan.schedule.text) == plan.schedule
    plan.schedule.at([900.0, 500.0, 1.0])
    return PASSED


def _draw_schedule(rng: random.Random) -> bytes:
    text = draw_schedule(rng)
    return json.dumps(
        [rng.choice(["cache", "bits", "gate", "blocks"]), damage_text(rng, text) if rng.random() < 0.4 else text]
    ).encode()


def _enter_schedule(data: bytes) -> str:
    from qcgraph.plan.schedule import TimedSchedule
    from qcgraph.recipe import Recipe

    key, text = json.loads(data)
    recipe = Recipe.of({"cache": {"blocks": text}}) if key == "blocks" else Recipe().override(**{key: text})
    _ = (recipe.bit_budget, recipe.cache_interval, recipe.cache_budget, recipe.conditions, recipe.weight_bits)
    if recipe.given_plan is not None:
        schedule = TimedSchedule.parse(recipe.given_plan)
        assert TimedSchedule.parse(schedule.text) == schedule
        schedule.at([900.0, 500.0, 1.0])
    return PASSED


COMMANDS = ("compile", "compile", "compile", "sample", "bench", "build", "export", "verify", "eval", "inspect", "diff")
COMMANDS += ("passes", "models", "targets")
# Values for some options; any other option gets arbitrary words.
KNOWN = {
    "steps": ["4", "20"], "seed": ["0", "7"], "guidance": ["1.5", "1"], "scheduler": ["ddim", "ddpm"], "bits": ["w8a8"],
    "solver": ["as-is", "fitted", "fitted=3"], "solver-target": ["converged", "run"],
    "groups": ["2"], "cache": ["off", "interval=2"], "target": ["torch", "onnxruntime-cpu"], "precision": ["float32"],
    "gate": ["psnr>=28"], "ablate": ["tgq"], "recipe": ["balanced", "fast"], "compensate": ["off", "vc"],
    "forecast": ["affine"], "format": ["onnx-single", "triton"], "metrics": ["psnr"], "baselines": ["torch"],
    "samples": ["1"], "count": ["1"], "seeds": ["1"], "threads": ["1"], "batches": ["1,2"], "rounds": ["1"],
    "class": ["1"], "after": ["0"], "show": ["plan", "schedule", "solver"], "batch": ["2,2,4"], "node": ["*"],
}  # fmt: skip


def _draw_command(rng: random.Random, samples: Samples) -> list[str]:
    command = rng.choice(COMMANDS)
    names = [max(parameter.opts, key=len) for parameter in command_line().commands[command].params]
    values = [*NUMBERS, *WORDS, str(samples.bundle), str(samples.bundle), "digits", "nothere/x", "3", "ddim", "w8a8"]
    values += ["balanced", "torch", "onnxruntime-cpu", str(samples.scratch / "x.png"), "insert-qdq", "psnr>=28", "0.5"]
    subject = "digits" if command == "compile" else str(samples.bundle)
    arguments = [command]
    if command not in {"models", "targets"} and rng.random() < 0.95:
        arguments.append(subject if rng.random() < 0.8 else rng.choice(values))
    for option in rng.choices(names, k=rng.choice([0, 1, 1, 2, 3, 5])):
        arguments.append(option if rng.random() < 0.95 else f"{option}x")
        known = KNOWN.get(option.removeprefix("--"))
        if rng.random() < 0.85:
            arguments.append(rng.choice(known if known and rng.random() < 0.6 else [*values, draw_schedule(rng)]))
    if rng.random() < 0.1:
        arguments.insert(rng.randrange(len(arguments)), rng.choice(values))
    return arguments


HEAVY = (  # the heavy functions behind the doors of the commands
    "qcgraph.compiler.compilation.load_model",
    "qcgraph.compiler.compilation.verify_bundle",
    "qcgraph.export.run.open.runner_of",
    "qcgraph.evaluation.settings.Subject.of_bundle",
    "qcgraph.benchmark.bench.find_model",
    "qcgraph.cli.inspect_model.load_model",
)


@cache
def command_line() -> Any:
    """Return the commands, read from their functions only once, because this takes ten times as long as most inputs."""
    from typer.main import get_command

    return get_command(importlib.import_module("qcgraph.cli.app").app)


@contextlib.contextmanager
def stopped_behind_doors() -> Iterator[None]:
    """Make functions that load models or run graphs refuse, while the context is active."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch("qcgraph.cli.app.app", command_line()))
        for name in HEAVY:
            owner, _, attribute = name.rpartition(".")
            try:
                found: Any = importlib.import_module(owner)
            except ImportError:
                module, _, kind = owner.rpartition(".")
                found = getattr(importlib.import_module(module), kind)
            if hasattr(found, attribute):
                stack.enter_context(mock.patch.object(found, attribute, _stop))
        yield


def _stop(*_: object, **__: object) -> NoReturn:
    raise LetInError


def _enter_command(arguments: list[str]) -> str:
    from qcgraph.cli import run

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = run(arguments)
    said = err.getvalue()
    if code == 2 and "let in" in said:
        return STOPPED
    if code not in (0, 1, 2) or "Traceback" in said:
        raise NotInWordsError(f"exit code {code}: {said[-300:]}")
    if code == 2 and "\n\nhint: " not in said:
        raise NotInWordsError(f"no hint: {said[-300:]}")
    return PASSED if code == 0 else REFUSED


def _draw_checkpoint(rng: random.Random, samples: Samples) -> bytes:
    name = rng.choice(sorted(samples.checkpoints))
    content = samples.checkpoints[name]
    return name.encode() + b"\n" + (damage_weights(rng, content) if rng.random() < 0.98 else content)


def _enter_checkpoint(samples: Samples, data: bytes) -> str:
    from qcgraph.models.checkpoint import read_weights

    name, _, content = data.partition(b"\n")
    path = samples.scratch / name.decode("ascii", "replace").replace("/", "_").replace("\0", "_")
    path.write_bytes(content)
    for tensor in read_weights(path).values():
        tensor.float()
    return PASSED


def _draw_member(rng: random.Random, folder: Path, names: Sequence[str]) -> bytes:
    """Draw a changed file of a folder: its name, a line end, and its content."""
    name = rng.choice(names)
    content = (folder / name).read_bytes()
    if name.endswith(".json") and rng.random() < 0.8:
        content = json_bytes(rng, json.loads(content))
    elif name.endswith((".toml", ".txt", ".json")):
        content = text_bytes(rng, damage_text(rng, content.decode()))
    else:
        content = damage_weights(rng, content)
    return name.encode() + b"\n" + content


def _draw_folder(rng: random.Random, samples: Samples) -> bytes:
    if rng.random() < 0.7:
        config, weights = "transformer/config.json", "transformer/diffusion_pytorch_model.safetensors"
        return b"pipe/" + _draw_member(
            rng, samples.diffusers, [config, config, "scheduler/scheduler_config.json", weights]
        )
    return b"trained/" + _draw_member(rng, samples.trained, ["card.json", "card.json", "digits.safetensors"])


def _enter_folder(samples: Samples, data: bytes) -> str:
    from qcgraph.models import load_model

    name, _, content = data.partition(b"\n")
    which, _, member = name.decode("ascii", "replace").partition("/")
    source = samples.diffusers if which == "pipe" else samples.trained
    if not (source / member).is_file():  # the member may be missing while an input is shortened
        return PASSED
    load_model(str(samples.cloned(source, member, content)))
    return PASSED


def _draw_bundle(rng: random.Random, samples: Samples) -> bytes:
    names = [path.relative_to(samples.bundle).as_posix() for path in samples.bundle.rglob("*") if path.is_file()]
    small = [name for name in names if name.endswith((".json", ".toml"))] * 4
    honest = b"!" if rng.random() < 0.9 else b"?"  # whether the manifest is updated with the change
    return honest + _draw_member(rng, samples.bundle, sorted([*names, *small]))


def _draw_program(rng: random.Random, samples: Samples) -> bytes:
    return b"!" + _draw_member(
        rng, samples.bundle, ["program.json", "program.json", "program.json", "weights.safetensors"]
    )


def _enter_bundle(samples: Samples, data: bytes) -> str:
    from qcgraph.bundle import Bundle

    place = _changed_bundle(samples, data)
    bundle = Bundle.open(place)
    _ = (bundle.spec, bundle.plan, bundle.interfaces, bundle.recipe, bundle.facts, bundle.history, bundle.ir_texts)
    _enter_command(["inspect", str(place)])
    _enter_command(["inspect", str(place), "--show", "plan"])
    return PASSED


def _enter_program(samples: Samples, data: bytes) -> str:
    from qcgraph.ir.serialize import load_program

    load_program(_changed_bundle(samples, data))
    return PASSED


def _changed_bundle(samples: Samples, data: bytes) -> Path:
    """Return a bundle with one changed file; the manifest is updated if the input begins with ``!``."""
    from qcgraph.bundle.manifest import MANIFEST, entry_of

    name, _, content = data.partition(b"\n")
    member = name[1:].decode("ascii", "replace")
    if not (samples.bundle / member).is_file():  # the member may be missing while an input is shortened
        return samples.bundle
    place = samples.cloned(samples.bundle, member, content)
    if name.startswith(b"!") and member != MANIFEST:
        manifest = json.loads((place / MANIFEST).read_text("utf-8"))
        manifest["files"][member] = entry_of(place / member).model_dump()
        (place / MANIFEST).unlink()
        (place / MANIFEST).write_text(json.dumps(manifest), "utf-8")
    return place
