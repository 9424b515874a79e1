"""The training loop: what a time limit and a compiled model change, and what they leave as it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from qcgraph.errors import UsageError
from qcgraph.models.dit import DiT
from qcgraph.models.geometry import DiTConfig

TOOLS = Path(__file__).resolve().parents[2] / "tools"
CONFIG = DiTConfig(input_size=8, patch_size=4, channels=1, width=16, depth=1, heads=2, class_count=2, learn_sigma=False)
SECONDS = 10.0  # of one step, by the clock of these tests


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(TOOLS))
    import training

    return training


@pytest.fixture
def settings(tool: Any) -> Any:
    return tool.Training(
        steps=40,
        batch_size=4,
        learning_rate=1e-3,
        warmup_steps=6,
        weight_decay=0.01,
        ema_decay=0.9,
        label_dropout=0.1,
        seed=0,
    )


@pytest.fixture
def clock(tool: Any, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The steps that were taken, which the clock counts."""
    taken: list[int] = []
    update_average = tool.update_average

    def counted(average: DiT, model: DiT, decay: float, step: int) -> None:
        update_average(average, model, decay, step)
        taken.append(step)

    monkeypatch.setattr(tool, "update_average", counted)
    monkeypatch.setattr(tool.time, "perf_counter", lambda: SECONDS * len(taken))
    return taken


@pytest.fixture
def denoising(tool: Any, tmp_path: Path) -> Callable[..., Any]:
    """Make a training on random images."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (16, 1, 8, 8), generator=generator, dtype=torch.uint8)
    data = tool.Data(images, torch.arange(16) % 2, mirrors=True)
    return lambda settings, **options: tool.Denoising(CONFIG, settings, data, tmp_path / "training.pt", **options)


def assert_same_weights(one: Any, other: Any) -> None:
    expected = other.average.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in one.average.state_dict().items())


def test_a_time_limit_gives_the_training_of_as_many_steps_as_fit(
    settings: Any, denoising: Callable[..., Any], clock: list[int]
) -> None:
    limited, whole = denoising(settings, time_limit=25 * SECONDS), denoising(replace(settings, steps=25))
    limited.run()
    limited.finish()
    assert clock == list(range(25))
    whole.run()
    assert limited.summary() == whole.summary()
    assert limited.summary()["steps"] == 25
    assert_same_weights(limited, whole)


def test_a_time_limit_that_is_long_enough_changes_nothing(
    settings: Any, denoising: Callable[..., Any], clock: list[int]
) -> None:
    denoising(settings, time_limit=100 * SECONDS).run()
    assert clock == list(range(40))


def test_a_time_limit_that_is_over_ends_the_training_once_the_speed_is_known(
    settings: Any, denoising: Callable[..., Any], clock: list[int]
) -> None:
    short = denoising(settings, time_limit=SECONDS)
    short.run()
    assert (clock, short.summary()["steps"]) == (list(range(6)), 6)


@pytest.mark.parametrize("interrupted_at", [2, 4, 15])
def test_an_interrupted_training_keeps_its_limit(
    interrupted_at: int,
    tool: Any,
    settings: Any,
    denoising: Callable[..., Any],
    clock: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    counted = tool.update_average

    def interrupt(average: DiT, model: DiT, decay: float, step: int) -> None:
        if step == interrupted_at:
            raise KeyboardInterrupt
        counted(average, model, decay, step)

    limit = 25 * SECONDS
    with monkeypatch.context() as patched:
        patched.setattr(tool, "update_average", interrupt)
        with pytest.raises(KeyboardInterrupt):
            denoising(settings, time_limit=limit).run(save_seconds=0)
    with pytest.raises(UsageError, match="other options"):
        denoising(settings, time_limit=2 * limit).run()
    resumed = denoising(settings, time_limit=limit)
    resumed.run()
    resumed.finish()
    assert clock == list(range(25))
    whole = denoising(replace(settings, steps=25))
    whole.run()
    assert_same_weights(resumed, whole)


def test_the_average_moves_every_parameter(tool: Any) -> None:
    average, model = DiT(CONFIG), DiT(CONFIG)
    for generator, each in enumerate((average, model)):
        tool.initialize_zero(each, torch.Generator().manual_seed(generator))
    before = [value.clone() for value in average.parameters()]
    tool.update_average(average, model, 0.75, 10**6)
    for kept, was, current in zip(average.parameters(), before, model.parameters(), strict=True):
        torch.testing.assert_close(kept, 0.75 * was + 0.25 * current)


@pytest.mark.slow
def test_a_compiled_model_is_trained_as_it_is(
    settings: Any, denoising: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))  # which makes no kernels
    few = replace(settings, steps=5)
    plain, compiled = denoising(few), denoising(few, compiled=True)
    plain.run()
    compiled.run()
    expected = plain.average.state_dict()
    for name, value in compiled.average.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-5)


def test_titles_stand_to_the_left_of_their_rows(tool: Any, tmp_path: Path) -> None:
    from PIL import Image

    images = torch.linspace(-1, 1, 2 * 3 * 3 * 8 * 8).view(2, 3, 3, 8, 8)
    tool.write_grid(images, tmp_path / "plain.png", enlarged=2)
    tool.write_grid(images, tmp_path / "titled.png", enlarged=2, titles=["cat", "a long title"])
    plain, titled = Image.open(tmp_path / "plain.png"), Image.open(tmp_path / "titled.png")
    assert plain.size == (3 * 10 * 2, 2 * 10 * 2)
    margin = titled.width - plain.width
    assert titled.crop((margin, 0, titled.width, titled.height)).tobytes() == plain.tobytes()
    for top in (0, 20):
        assert titled.crop((0, top, margin, top + 20)).getextrema() == ((0, 255),) * 3  # black on white
