"""Training on images: every form of them, what is resumed and refused, and that the folder compiles."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import qcgraph
from qcgraph.errors import UsageError
from qcgraph.models import load_model
from qcgraph.models.checkout import checkout_folders
from qcgraph.models.files import IMAGES_WEIGHTS_FILE
from qcgraph.models.geometry import DiTConfig
from qcgraph.models.trained_folder import read_card
from qcgraph.recipe import Recipe

TOOLS = Path(__file__).resolve().parents[2] / "tools"
SMALL = (
    "--size tiny --patch-size 4 --steps 20 --batch-size 8 --warmup-steps 2 --epochs 1 --samples 6 --sampling-steps 3"
)
SIZE = 8


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(TOOLS))
    import train_dit

    return train_dit


def squares(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Noise u8[N,8,8,3] that is dark or bright by its class."""
    labels = np.arange(count) % 2
    noise = np.random.default_rng(count).integers(0, 64, (count, SIZE, SIZE, 3))
    return (noise + 150 * labels[:, None, None, None]).astype(np.uint8), labels.astype(np.uint8)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    arrays: dict[str, Any] = {"classes": np.array(["dark", "bright"])}
    for part, count in (("train", 64), ("test", 40)):
        arrays[f"{part}_images"], arrays[f"{part}_label"] = squares(count)
    path = tmp_path / "squares.npz"
    np.savez(path, **arrays)
    return path


@pytest.mark.slow
def test_what_it_writes_is_a_model_that_compiles(
    run_tool: Any,
    tool: Any,
    images: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = [images.name, "-o", "made", *SMALL.split()]
    here = ["--device", "cpu", "--threads", "1"]
    done = run_tool("train_dit.py", *asked, *here, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    weights = (tmp_path / "made" / IMAGES_WEIGHTS_FILE).read_bytes()
    assert {tensor.dtype for tensor in load_file(tmp_path / "made" / IMAGES_WEIGHTS_FILE).values()} == {torch.bfloat16}
    width, height = Image.open(tmp_path / "made" / "samples.png").size
    assert height == 2 * (SIZE + 2) * 8
    assert width > 3 * (SIZE + 2) * 8  # titles stand to the left of three samples
    card = json.loads((tmp_path / "made" / "card.json").read_text())
    assert (card["data"], card["training"]["data"]) == ("images", images.name)
    assert [step for step, _ in card["training"]["loss_curve"]] == list(range(1, 21))
    text = (tmp_path / "made" / "CARD.md").read_text()
    assert f"\npython tools/train_dit.py squares.npz -o made {SMALL}\n" in text
    assert "Classes, in the order of their labels: dark, bright." in text
    assert "![Samples of each class](samples.png)" in text
    assert str(tmp_path) not in text

    monkeypatch.chdir(tmp_path)
    parse = tool.option_parser().parse_args
    tool.train(parse([*asked, *here]))  # judges what is there
    assert capsys.readouterr().out.startswith("{")
    assert (tmp_path / "made" / IMAGES_WEIGHTS_FILE).read_bytes() == weights
    with pytest.raises(UsageError, match="made: holds a model of other options"):
        tool.train(parse([*asked, *here, "--seed", "1"]))

    model = load_model(str(tmp_path / "made"))
    assert model.judge is not None
    judge = model.judge()
    assert (judge.real.shape, judge.real.min() >= -1, judge.real.max() <= 1) == ((40, 3, SIZE, SIZE), True, True)
    assert judge.features(judge.real[:3]).shape == (3, judge.feature_count)
    assert set(judge.classify(judge.real)) <= {0, 1}
    recipe = Recipe().override(bits="off", steps=3, target="torch", cache="interval=3")
    bundle = qcgraph.compile(str(tmp_path / "made"), recipe, output=tmp_path / "bundle")
    assert bundle.spec.latent_shape == (3, SIZE, SIZE)


@pytest.mark.slow
def test_a_card_of_a_time_limit_has_the_steps_that_fitted(
    tool: Any, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    here = ["--device", "cpu", "--threads", "1"]
    asked = [images.name, "-o", "made", *SMALL.replace("--steps 20 ", "").split(), *here, "--time-limit", "0.01"]
    tool.train(tool.option_parser().parse_args(asked))
    card = json.loads((tmp_path / "made" / "card.json").read_text())
    steps = card["training"]["steps"]
    assert 2 <= steps < tool.option_parser().get_default("steps")
    text = (tmp_path / "made" / "CARD.md").read_text()
    assert f"| steps | {steps}, as many as fitted into 0.01 minutes |" in text
    assert f" --steps {steps} --batch-size 8 " in text
    assert "--time-limit" not in text
    tool.train(tool.option_parser().parse_args(asked))  # judges what is there
    assert json.loads((tmp_path / "made" / "card.json").read_text()) == card


def test_the_card_in_the_repository_is_what_the_tool_writes(tool: Any) -> None:
    """The command of CARD.md, parsed by the tool itself, gives the settings in card.json."""
    folder = checkout_folders()["cifar10"]
    text = (folder / "CARD.md").read_text(encoding="utf-8")
    card = json.loads((folder / "card.json").read_text(encoding="utf-8"))
    line = next(line for line in text.splitlines() if line.startswith("python "))
    options = tool.option_parser().parse_args(shlex.split(line)[2:])
    assert text == tool.render_images(read_card(folder), tool.command(options, card))
    for name in tool.training.Training.__dataclass_fields__:
        assert getattr(options, name) == card["training"][name]
    for name in ("samples", "sampling_steps", "guidance"):
        assert getattr(options, name) == card["evaluation"][name]
    assert (options.output.name, options.epochs) == (card["name"], card["classifier"]["epochs"])
    assert (folder / "samples.png").is_file()


@pytest.mark.parametrize("text", ["0", "-1", "nan", "inf", "soon"])
def test_minutes_are_above_zero(tool: Any, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        tool.option_parser().parse_args(["images.npz", "-o", "made", "--time-limit", text])
    assert "invalid minutes value" in capsys.readouterr().err


def test_models_are_compiled_on_a_gpu(tool: Any) -> None:
    def compiled(*options: str) -> bool:
        return bool(tool.is_compiled(tool.option_parser().parse_args(["images.npz", "-o", "made", *options])))

    assert [compiled("--device", "cuda"), compiled("--device", "cpu")] == [True, False]
    assert [compiled("--device", "cuda", "--no-compile"), compiled("--device", "cpu", "--compile")] == [False, True]


def as_pixels(path: Path) -> Path:
    """As the fixture wrote it."""
    return path


def as_files(path: Path) -> Path:
    """A folder of each class, of pictures that are twice as large and wider than high."""
    arrays, folder = np.load(path), path.parent / "folder"
    for index, (pixels, label) in enumerate(zip(arrays["train_images"], arrays["train_label"], strict=True)):
        (folder / str(arrays["classes"][label])).mkdir(parents=True, exist_ok=True)
        picture = Image.fromarray(pixels).resize((2 * SIZE + 4, 2 * SIZE))
        picture.save(folder / str(arrays["classes"][label]) / f"{index:03d}.png")
    return folder


def as_jpeg(path: Path) -> Path:
    arrays = dict(np.load(path))
    for part in ("train", "test"):
        contents = []
        for index, pixels in enumerate(arrays.pop(f"{part}_images")):
            file = path.parent / f"{part}{index}.jpg"
            Image.fromarray(pixels).save(file, quality=95)
            contents.append(file.read_bytes())
        arrays[f"{part}_jpeg"] = np.frombuffer(b"".join(contents), np.uint8)
        arrays[f"{part}_size"] = np.array([len(content) for content in contents], np.uint32)
    np.savez(path.parent / "jpeg.npz", **arrays)
    return path.parent / "jpeg.npz"


@pytest.mark.parametrize("form", [as_pixels, as_files, as_jpeg])
def test_forms_of_images(tool: Any, images: Path, form: Callable[[Path], Path]) -> None:
    data = tool.load_images(form(images), SIZE)
    assert data.shape == (3, SIZE, SIZE)
    assert data.images.dtype == data.test_images.dtype == torch.uint8
    assert set(data.classes) == {"dark", "bright"}
    for pixels, labels in ((data.images, data.labels), (data.test_images, data.test_labels)):
        bright = pixels.float().mean((1, 2, 3)) > 100
        assert torch.equal(bright, labels == data.classes.index("bright"))
    assert len(data.images) + len(data.test_images) == (64 if form is as_files else 104)
    few = data.limited(2)
    assert (len(few.images), len(few.labels), len(few.test_images)) == (2, 2, 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"test_label": None}, "it has no test_label"),
        ({"train_images": np.zeros((64, 8, 8, 3))}, r"train_images is float64\[64, 8, 8, 3\]"),
        ({"train_images": np.zeros((64, 8, 6, 3), np.uint8)}, r"images are \[3, 8, 6\]"),
        ({"train_label": np.zeros(3, np.uint8)}, "64 images and 3 labels"),
        ({"train_label": np.full(64, 2, np.uint8)}, r"labels 2 \.\. 2 of 2 classes"),
    ],
)
def test_files_that_are_refused(tool: Any, images: Path, changes: dict[str, Any], message: str) -> None:
    arrays = {name: value for name, value in (dict(np.load(images)) | changes).items() if value is not None}
    np.savez(images, **arrays)
    with pytest.raises(UsageError, match=message) as caught:
        tool.load_images(images, SIZE)
    assert caught.value.hint
    assert str(images) in str(caught.value.where)


def test_refusals_are_printed(run_tool: Any, tmp_path: Path) -> None:
    done = run_tool("train_dit.py", "none.npz", "-o", "made", "--device", "cpu", folder=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert "none.npz: no such file or folder of images" in done.stderr
    assert "hint: " in done.stderr


def test_what_is_no_data_and_no_place(tool: Any, images: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such file or folder of images"):
        tool.load_images(tmp_path / "none.npz", SIZE)
    for name, content in (("empty.npz", b""), ("cut.npz", images.read_bytes()[:-40])):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UsageError, match="cannot be read"):
            tool.load_images(tmp_path / name, SIZE)
    np.save(tmp_path / "one.npy", np.zeros(3))
    with pytest.raises(UsageError, match="it holds one array"):
        tool.load_images(tmp_path / "one.npy", SIZE)
    (tmp_path / "text.npz").write_text("text")
    with pytest.raises(UsageError, match="cannot be read"):
        tool.load_images(tmp_path / "text.npz", SIZE)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="it has no images"):
        tool.load_images(tmp_path / "empty", SIZE)
    with pytest.raises(UsageError, match="is not empty"):
        tool.begun(tmp_path)
    options = tool.option_parser().parse_args([str(images), "-o", "x", "--patch-size", "3"])
    with pytest.raises(UsageError, match="input_size 8 is not a multiple of patch_size 3"):
        tool.config_of(options, tool.load_images(images, SIZE))


def test_the_default_is_small_enough_to_store(tool: Any) -> None:
    width, depth, heads = tool.SIZES["base"]
    config = DiTConfig(32, 2, 3, width, depth, heads, 10, learn_sigma=False)
    assert 2 * config.parameter_count < 30e6  # bytes in bfloat16


def test_frechet_distance_is_that_of_torchmetrics(tool: Any) -> None:
    from torchmetrics.image.fid import FrechetInceptionDistance

    class Flat(torch.nn.Module):
        num_features = 12

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return images.flatten(1)

    one, other = (torch.from_numpy(squares(count)[0][:, :2, :2].copy()).float() / 64 for count in (64, 40))
    metric = FrechetInceptionDistance(feature=Flat(), input_img_size=(2, 2, 3))
    metric.update(one, real=True)
    metric.update(other, real=False)
    assert tool.training.frechet_distance(Flat(), one, other) == pytest.approx(float(metric.compute()), rel=1e-4)


def test_sampling_is_that_of_diffusers(tool: Any, tiny_model: Any) -> None:
    """Of a model that predicts a sigma as well, which is cut off."""
    from qcgraph.evaluation.solvers import sample_with

    class Noise(torch.nn.Module):
        config = tiny_model.module.config
        parameters = tiny_model.module.parameters

        def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
            return tiny_model.module(*inputs)[:, :2]

    labels = [0, 1, 2, 3]
    ours = tool.training.sample(Noise(), torch.tensor(labels), 7, 1.5, 3)
    shape = tiny_model.spec.latent_shape
    noise = torch.randn(4, *shape, generator=torch.Generator().manual_seed(3))
    assert ours.shape == noise.shape
    from qcgraph.models.eager import EagerRunner
    from qcgraph.sampling.conditions import of_labels

    conditions = of_labels(labels, tiny_model.spec)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("qcgraph.sampling.noise.Noise.initial", lambda _: noise.numpy())
        theirs = sample_with("ddim", 7, 1.5, EagerRunner(tiny_model), tiny_model.spec, conditions, 3)
    np.testing.assert_allclose(ours.numpy(), theirs, rtol=1e-4, atol=1e-4)
