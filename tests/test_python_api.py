"""The functions of ``import qcgraph``: whatever they are given, and whatever PyTorch was told to do around them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import qcgraph
from qcgraph.errors import UsageError
from qcgraph.models import LoadedModel
from qcgraph.pipeline import Pipeline

RECIPE: Any = {"sampling": {"steps": 2}, "quantization": {"bits": "off"}, "target": {"name": "torch"}}
ODD: tuple[Any, ...] = (
    3,
    2.5,
    b"x",
    [],
    object(),
    torch.nn.Linear(1, 1),
    torch.ones(2),
    Pipeline(()),
    "",
    "\0",
    "\udcff",
    "x" * 5000,
    10**5000,
    print,
)


def refused(call: Callable[[], object]) -> UsageError:
    with pytest.raises(UsageError) as caught:
        call()
    assert caught.value.hint
    assert len(str(caught.value)) < 1000 or "x" * 4000 in str(caught.value)
    return caught.value


@pytest.mark.parametrize("odd", [*ODD, None, True, {}], ids=lambda odd: type(odd).__name__)
def test_arguments_of_the_wrong_type_are_refused(odd: Any, tmp_path: Path) -> None:
    place = tmp_path / "out"
    if odd != "":
        refused(lambda: qcgraph.compile(odd, RECIPE, output=place))
    assert refused(lambda: qcgraph.compile("digits", RECIPE, output=odd)).where == "output"
    if odd is not None:
        assert refused(lambda: qcgraph.compile("digits", RECIPE, output=place, plan=odd)).where == "plan"
    if odd is not True:
        assert refused(lambda: qcgraph.compile("digits", RECIPE, output=place, force=odd)).where == "force"
    if odd not in (None, {}):
        refused(lambda: qcgraph.compile("digits", odd, output=place))
    assert not place.exists()


def test_a_diffusers_pipeline_is_told_what_to_give_instead(tmp_path: Path) -> None:
    error = refused(lambda: qcgraph.compile(torch.nn.Linear(1, 1), output=tmp_path / "out"))  # type: ignore[arg-type]
    assert "LoadedModel" in str(error.hint)
    assert "the folder that it was loaded from" in str(error.hint)


@pytest.mark.slow
def test_what_pytorch_was_told_to_do_changes_nothing(tiny_model: LoadedModel, tmp_path: Path) -> None:
    def compiled(name: str) -> dict[str, str]:
        files = qcgraph.compile(tiny_model, RECIPE, output=tmp_path / name).manifest.files
        return {name: entry.sha256 for name, entry in files.items() if name != "report.json"}

    expected = compiled("plain")
    with torch.inference_mode():
        assert compiled("inference") == expected
    torch.set_default_dtype(torch.float64)
    try:
        with torch.no_grad(), torch.device("meta"), torch.autocast("cpu"):
            assert compiled("odd") == expected
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
