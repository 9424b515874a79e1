"""qcgraph sample: what is refused, what is drawn, and what it imports."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from qcgraph.cli.sample import _print_result, choose_conditions, columns_for
from qcgraph.errors import UsageError
from qcgraph.plan.spec import ModelSpec, class_label
from qcgraph.sampling.conditions import in_turn

Command = Callable[..., Any]


@pytest.fixture
def backend(use_backend: Callable[..., None]) -> None:
    use_backend()


@pytest.mark.parametrize(
    ("options", "what"),
    [
        (["-n", "0"], "nothing to sample"),
        (["-n", "-3"], "nothing to sample"),
        (["--class", "10"], "class 10 is out of range"),
        (["--class", "1", "--class", "-1"], "class -1 is out of range"),
        (["--seed", "-1"], "seed -1 is negative"),
        (["--seed", str(2**64)], "less than or equal to 9223372036854775807"),
        (["-n", str(10**12)], "less than or equal to 1000000"),
        (["--steps", "4"], "the plan was made for steps = 3, not 4"),
        (["--scheduler", "ddpm"], "the plan was made for scheduler = ddim, not ddpm"),
        (["--guidance", "2"], "the plan was made for guidance = 1.5, not 2.0"),
    ],
)
@pytest.mark.usefixtures("backend")
def test_refused(qcgraph: Command, bundle: Path, tmp_path: Path, options: list[str], what: str) -> None:
    done = qcgraph("sample", bundle, "-o", tmp_path / "grid.png", *options)
    assert (done.code, done.out) == (2, "")
    assert what in done.err
    assert "\n\nhint: " in done.err
    assert not (tmp_path / "grid.png").exists()


@pytest.mark.parametrize(
    ("output", "what"),
    [
        ("grid.jpg", "is not a .png file"),
        ("file/grid.png", "cannot be made, because"),
        ("absent/grid.png", "the folder around it does not exist"),
        ("folder.png", "is a folder"),
    ],
)
def test_place_of_the_picture_is_checked_first(qcgraph: Command, tmp_path: Path, output: str, what: str) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder.png").mkdir()
    done = qcgraph("sample", tmp_path / "no-bundle", "-o", tmp_path / output)
    assert done.code == 2
    assert what in done.err


def test_no_bundle(qcgraph: Command, tmp_path: Path) -> None:
    done = qcgraph("sample", tmp_path / "absent", "-o", tmp_path / "grid.png")
    assert done.code == 2
    assert "there is no such bundle" in done.err


def test_damaged_bundle(qcgraph: Command, bundle: Path, tmp_path: Path) -> None:
    (bundle / "ir" / "000_capture.txt").write_text("")
    done = qcgraph("sample", bundle, "-o", tmp_path / "grid.png")
    assert done.code == 2
    assert "000_capture.txt: the file is truncated: 0 of" in done.err


def test_unknown_backend(qcgraph: Command, bundle: Path, tmp_path: Path) -> None:
    done = qcgraph("sample", bundle, "-o", tmp_path / "grid.png", "--backend", "onnxruntim")
    assert done.code == 2
    assert "did you mean 'onnxruntime'?" in done.err


@pytest.mark.usefixtures("backend")
def test_picture_and_labels(qcgraph: Command, bundle: Path, tmp_path: Path) -> None:
    done = qcgraph("sample", bundle, "-n", 12, "-o", tmp_path / "grid.png")
    assert done.code == 0
    assert done.out == f"{tmp_path / 'grid.png'}\nclasses 0 1 2 3 4 5 6 7 8 9\n        0 1\n"
    assert "toy: ddim, 3 steps, guidance 1.5, seed 0" in done.err
    with Image.open(tmp_path / "grid.png") as picture:
        assert (picture.mode, picture.size) == ("L", (10 * 66 - 2, 2 * 66 - 2))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["grid.png", "toy"]


@pytest.mark.usefixtures("backend")
def test_saved_latents_are_reproducible(qcgraph: Command, bundle: Path, tmp_path: Path) -> None:
    saved = []
    for name in ("a.npz", "b.npz"):
        place = tmp_path / name
        done = qcgraph("sample", bundle, "--class", 3, "--seed", 7, "-o", tmp_path / "g.png", "--save-latents", place)
        assert done.code == 0
        assert done.out.endswith(f"{place}\n")
        with np.load(place) as data:
            saved.append({key: data[key] for key in data})
    assert saved[0]["labels"].tolist() == [3]
    assert saved[0]["seed"] == 7
    assert np.array_equal(saved[0]["latents"], saved[1]["latents"])


@pytest.mark.usefixtures("backend")
def test_latents_of_an_autoencoder_are_announced(
    qcgraph: Command, make_bundle: Callable[..., Path], tmp_path: Path
) -> None:
    done = qcgraph("sample", make_bundle(tmp_path / "toy", is_image=False), "-o", tmp_path / "grid.png")
    assert done.code == 0
    assert "latents of an autoencoder, not images" in done.err


def test_broken_samples_fail(qcgraph: Command, bundle: Path, tmp_path: Path, use_backend: Callable[..., None]) -> None:
    use_backend(gain=float("nan"))
    done = qcgraph("sample", bundle, "-n", 2, "-o", tmp_path / "grid.png")
    assert done.code == 1
    assert "2 of 2 samples hold NaN or infinity" in done.err
    assert not (tmp_path / "grid.png").exists()


@pytest.mark.parametrize(
    ("count", "classes", "expected"),
    [
        (None, [], [0, 1, 2]),
        (None, [2, 2], [2, 2]),
        (5, [], [0, 1, 2, 0, 1]),
        (3, [1], [1, 1, 1]),
        (1, [2, 0], [2]),
    ],
)
def test_labels(count: int | None, classes: list[int], expected: list[int]) -> None:
    spec = ModelSpec.class_conditional("toy", (1, 8, 8), 3, 3, 1)
    assert choose_conditions(count, classes, spec).labels(spec).tolist() == expected


def test_at_most_sixteen_by_default() -> None:
    spec = ModelSpec.class_conditional("toy", (1, 8, 8), 1000, 1000, 1)
    assert choose_conditions(None, [], spec).labels(spec).tolist() == list(range(16))


def test_a_model_without_classes_takes_none() -> None:
    spec = ModelSpec("free", (1, 8, 8), 1, ())
    assert len(choose_conditions(3, [], spec)) == 3
    assert choose_conditions(3, [], spec).values == {}
    with pytest.raises(UsageError, match="free takes no class alone"):
        choose_conditions(3, [1], spec)


def test_the_values_of_every_condition_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    conditions = (class_label(3, name="shape"), class_label(2, name="background"))
    spec = ModelSpec("both", (1, 8, 8), 1, conditions)
    _print_result(Path("grid.png"), in_turn(4, spec), spec, columns=3)
    assert capsys.readouterr().out.splitlines() == [
        "grid.png",
        "shape   0 1 2",
        "        0",
        "background 0 1 0",
        "           1",
    ]
    with pytest.raises(UsageError, match="both takes no class alone") as caught:
        choose_conditions(None, [1], spec)
    assert (
        caught.value.hint
        == "its conditions are shape and background; without classes, all of their values are taken in turn"
    )


@pytest.mark.parametrize(
    ("count", "cycle", "columns"), [(10, 10, 10), (20, 10, 10), (4, 10, 4), (16, 1000, 4), (5, 1, 3)]
)
def test_columns(count: int, cycle: int, columns: int) -> None:
    assert columns_for(count, cycle) == columns


def test_imports_neither_torch_nor_diffusers(tmp_path: Path) -> None:
    names = ("bundle", "cli.sample", "evaluation.images", "export.run.open", "progress", "sampling.loop")
    code = f"import sys, {', '.join(f'qcgraph.{name}' for name in names)}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert not {"torch", "diffusers", "onnx", "qcgraph.compiler", "qcgraph.pipeline"} & set(done.stdout.split())
