"""Training resumes where it stopped, what it writes is a model, and the cards in the repository are what it writes."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from qcgraph.errors import UsageError
from qcgraph.models import load_model
from qcgraph.models.files import DIGITS_FOLDER, WEIGHTS_FILE
from qcgraph.models.geometry import DiTConfig
from qcgraph.models.trained_folder import read_card

TOOLS = Path(__file__).resolve().parents[2] / "tools"
SMALL = DiTConfig(input_size=8, patch_size=4, channels=1, width=16, depth=1, heads=2, class_count=10, learn_sigma=False)


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(TOOLS))
    import train_digits

    return train_digits


def short_training(tool: Any) -> Any:
    options = vars(tool.option_parser().parse_args(["--steps", "40", "--batch-size", "4", "--warmup-steps", "5"]))
    return tool.Training(**{name: options[name] for name in tool.Training.__dataclass_fields__})


def test_interrupted_training_resumes_to_the_same_weights(
    tool: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    whole.mkdir()
    halves.mkdir()
    training = short_training(tool)
    expected = tool.train_denoiser(whole, SMALL, training)

    update_average = tool.training.update_average

    def interrupt(average: Any, model: Any, decay: float, step: int) -> None:
        if step == 20:
            raise KeyboardInterrupt
        update_average(average, model, decay, step)

    with monkeypatch.context() as patched:
        patched.setattr(tool.training, "update_average", interrupt)
        with pytest.raises(KeyboardInterrupt):
            tool.train_denoiser(halves, SMALL, training, save_seconds=0)
    assert (halves / "training.pt").is_file()
    with pytest.raises(UsageError, match="other options"):
        tool.train_denoiser(halves, SMALL, replace(training, seed=1))
    resumed = tool.train_denoiser(halves, SMALL, training)

    assert resumed | {"seconds": 0} == expected | {"seconds": 0}
    assert (halves / WEIGHTS_FILE).read_bytes() == (whole / WEIGHTS_FILE).read_bytes()
    assert [path.name for path in halves.iterdir()] == [WEIGHTS_FILE]


@pytest.mark.parametrize("folder", [DIGITS_FOLDER, TOOLS / "models" / "digits-b"], ids=["digits", "digits-b"])
def test_card_for_people_is_what_the_tool_writes(folder: Path, tool: Any) -> None:
    defaults = vars(tool.option_parser().parse_args([]))
    assert (folder / "CARD.md").read_text(encoding="utf-8") == tool.render(read_card(folder), defaults)


@pytest.mark.parametrize("folder", [DIGITS_FOLDER, TOOLS / "models" / "digits-b"], ids=["digits", "digits-b"])
def test_commands_of_the_card_say_what_the_card_says(folder: Path, tool: Any) -> None:
    """The first command of CARD.md, parsed by the tool itself, gives the settings in card.json."""
    card = read_card(folder)
    lines = (folder / "CARD.md").read_text(encoding="utf-8").splitlines()
    train, evaluate = (shlex.split(line)[2:] for line in lines if line.startswith("python "))
    options = tool.option_parser().parse_args(train)
    assert options.output.name == card.name
    assert options.threads == card.environment["threads"]
    for name in ("patch_size", "width", "depth", "heads"):
        assert getattr(options, name) == getattr(card.config, name)
    for name in tool.Training.__dataclass_fields__:
        assert getattr(options, name) == card.training[name]
    for given in (options, tool.option_parser().parse_args(evaluate)):
        for name in ("samples_per_class", "sampling_steps", "guidance"):
            assert getattr(given, name) == card.evaluation[name]
        assert given.judgement_seed == card.evaluation["seed"]


@pytest.mark.slow
def test_what_the_tool_writes_is_a_model(
    run_tool: Any, tool: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(tool, "train_classifier", partial(tool.train_classifier, epochs=2))
    sizes = "--patch-size 4 --width 16 --depth 1 --heads 2 --steps 20 --samples-per-class 2 --sampling-steps 3"
    done = run_tool("train_digits.py", "-o", "tiny", "--threads", "1", *sizes.split(), folder=tmp_path)
    assert done.returncode == 0, done.stderr
    model = load_model(str(tmp_path / "tiny"))
    assert model.spec.name == "tiny"
    assert model.judge is not None
    card = json.loads((tmp_path / "tiny" / "card.json").read_text())
    assert card["evaluation"]["samples"] == 20
    text = (tmp_path / "tiny" / "CARD.md").read_text()
    assert text.startswith("# tiny\n")
    assert f"\npython tools/train_digits.py -o tiny --threads 1 {sizes}\n" in text
    assert "\npython tools/train_digits.py -o tiny --only evaluate --samples-per-class 2 --sampling-steps 3\n" in text
