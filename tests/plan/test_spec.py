"""Interfaces by the roles of their tensors, and what a model is told."""

from __future__ import annotations

import pytest

from qcgraph.plan.roles import TensorRole
from qcgraph.plan.spec import (
    GROUP,
    ROW,
    TIMESTEP,
    Condition,
    Interface,
    ModelSpec,
    TensorSpec,
    class_label,
)

LATENT = TensorSpec("latent", "f32", ("B", 2, 8, 8), TensorRole.STATE)
CACHE = TensorSpec("anything", "f32", ("B", 4), TensorRole.CACHE, "cache_0")
OLDER = TensorSpec("else", "f32", ("B", 4), TensorRole.CACHE, "cache_0", 1)
PREDICTION = TensorSpec("noise_prediction", "f32", ("B", 2, 8, 8), TensorRole.PREDICTION)
MODULATION = TensorSpec("modulation", "f32", ("B", 7), TensorRole.MODULATION)


def test_tensors_are_found_by_their_roles() -> None:
    interface = Interface((LATENT, GROUP, CACHE, ROW, OLDER), (CACHE, PREDICTION))
    assert interface.taken(TensorRole.CACHE) == (CACHE, OLDER)
    assert interface.taken(TensorRole.GROUP, TensorRole.ROW) == (GROUP, ROW)
    assert interface.taken(TensorRole.STEP) == ()
    assert interface.given(TensorRole.CACHE) == interface.caches == (CACHE,)
    assert interface.result is PREDICTION  # wherever it stands
    assert Interface((TIMESTEP,), (MODULATION,)).result is MODULATION


@pytest.mark.parametrize(
    ("inputs", "outputs", "message"),
    [
        ((LATENT, TensorSpec("x", "f32", ())), (PREDICTION,), "x has no role"),
        ((LATENT,), (TensorSpec("x", "f32", ()),), "x has no role"),
        ((LATENT, LATENT), (PREDICTION,), "share a name"),
        ((LATENT,), (CACHE, CACHE), "share a name"),
    ],
)
def test_interfaces_are_checked(inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Interface(inputs, outputs)


@pytest.mark.parametrize("outputs", [(), (CACHE,), (PREDICTION, MODULATION)])
def test_a_variant_has_one_result(outputs: tuple[TensorSpec, ...]) -> None:
    with pytest.raises(ValueError, match="unpack"):
        _ = Interface((LATENT,), outputs).result


def told(*conditions: Condition) -> ModelSpec:
    return ModelSpec("m", (2, 8, 8), 2, conditions)


def test_the_inputs_of_a_model_are_latent_timestep_and_conditions() -> None:
    pose = Condition("pose", "f32", (3, 2))
    spec = told(class_label(10), pose)
    assert spec.inputs == (LATENT, TIMESTEP, class_label(10).tensor, pose.tensor)
    assert (str(class_label(10).tensor), str(pose.tensor)) == ("i64[B]", "f32[B,3,2]")
    assert {tensor.role for tensor in spec.inputs[2:]} == {TensorRole.REQUEST}


@pytest.mark.parametrize(
    ("conditions", "label", "guided", "text"),
    [
        ((), None, False, "no conditions"),
        ((class_label(10),), "class_label", True, "10 classes"),
        ((class_label(10, name="kind"),), "kind", True, "10 classes"),
        ((Condition("y", "i64", (), 10),), "y", False, "10 classes"),
        ((class_label(10), class_label(3, name="style")), None, True, "conditions class_label i64[B], style i64[B]"),
        (
            (class_label(10), Condition("p", "f32", (3,))),
            "class_label",
            True,
            "conditions class_label i64[B], p f32[B,3]",
        ),
        ((Condition("p", "f32", (3,), null=0.0),), None, True, "conditions p f32[B,3]"),
    ],
)
def test_what_a_model_is_told(conditions: tuple[Condition, ...], label: str | None, guided: bool, text: str) -> None:
    spec = told(*conditions)
    assert (spec.label.name if spec.label else None) == label
    assert spec.is_guided == guided
    assert spec.conditions_text == text


def test_a_class_conditional_model_is_told_a_label() -> None:
    spec = ModelSpec.class_conditional("m", (2, 8, 8), 10, 12, 2)
    assert spec.conditions == (Condition("class_label", "i64", (), 10, 12),)
    assert class_label(10).null == 10
