"""A DiT that diffusers saved computes the same through qcgraph, and brings its noise schedule along."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qcgraph.errors import UsageError
from qcgraph.models import load_model
from qcgraph.spec import ModelSpec, NoiseSchedule

SIZES: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "in_channels": 4,
    "out_channels": 8,
    "num_layers": 2,
    "sample_size": 8,
    "num_embeds_ada_norm": 10,
    "norm_num_groups": 4,
}
INPUTS = (torch.ones(2, 4, 8, 8), torch.tensor([10, 900]), torch.tensor([3, 10]))


@pytest.fixture(scope="module")
def transformer() -> Any:
    from diffusers import DiTTransformer2DModel

    torch.manual_seed(0)
    model: Any = DiTTransformer2DModel(**SIZES)
    return model.eval()


@pytest.fixture
def pipeline(transformer: Any, tmp_path: Path) -> Path:
    """A pipeline folder as diffusers lays it out, named ``tiny``."""
    from diffusers import DDIMScheduler

    folder = tmp_path / "tiny"
    transformer.save_pretrained(folder / "transformer")
    scheduler: Any = DDIMScheduler(beta_schedule="scaled_linear", beta_end=0.012, prediction_type="v_prediction")
    scheduler.save_pretrained(folder / "scheduler")
    return folder


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@torch.no_grad()
def test_pipeline_folder(pipeline: Path, transformer: Any) -> None:
    model = load_model(str(pipeline))
    assert model.spec == ModelSpec(
        name="tiny",
        latent_shape=(4, 8, 8),
        class_count=10,
        null_class=10,
        output_channels=8,
        schedule=NoiseSchedule(1000, 1e-4, 0.012, "scaled_linear", "v_prediction"),
    )
    assert model.input_names == ("hidden_states", "timestep", "class_labels")
    assert not model.module.training
    inputs = dict(zip(model.input_names, INPUTS, strict=True))
    expected = transformer(INPUTS[0], timestep=INPUTS[1], class_labels=INPUTS[2]).sample
    assert torch.equal(model.module(**inputs), expected)


@torch.no_grad()
def test_model_folder_has_the_default_schedule(pipeline: Path) -> None:
    model = load_model(str(pipeline / "transformer"))
    assert model.spec.schedule == NoiseSchedule()
    assert model.spec.name == "transformer"


@torch.no_grad()
def test_folder_saved_under_the_older_class_name(pipeline: Path, transformer: Any) -> None:
    edit(pipeline / "transformer" / "config.json", _class_name="Transformer2DModel", norm_type="ada_norm_zero")
    expected = transformer(INPUTS[0], timestep=INPUTS[1], class_labels=INPUTS[2]).sample
    assert torch.equal(load_model(str(pipeline)).module(*INPUTS), expected)


def test_card_beside_it_changes_nothing(pipeline: Path) -> None:
    (pipeline / "card.json").write_text("{}")
    assert load_model(str(pipeline)).spec.name == "tiny"


def test_incomplete_weights_are_refused(pipeline: Path) -> None:
    path = pipeline / "transformer" / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    del weights["proj_out_1.bias"], weights["proj_out_2.bias"]
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(UsageError, match=r"2 parameters are not in the weight file, the first is proj_out_1\.bias"):
        load_model(str(pipeline))


def test_a_flow(pipeline: Path) -> None:
    edit(pipeline / "scheduler" / "scheduler_config.json", _class_name="FlowMatchEulerDiscreteScheduler", shift=1.0)
    assert load_model(str(pipeline)).spec.schedule == NoiseSchedule(prediction="flow_prediction")


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"beta_schedule": "sigmoid"}, "beta_schedule 'sigmoid' is not supported"),
        ({"prediction_type": "sample"}, "prediction 'sample' is not supported"),
        ({"trained_betas": [0.1, 0.2]}, "trained_betas are not supported"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}, "shifted timesteps are not supported"),
    ],
)
def test_unsupported_schedule(change: dict[str, object], complaint: str, pipeline: Path) -> None:
    edit(pipeline / "scheduler" / "scheduler_config.json", **change)
    with pytest.raises(UsageError, match=complaint) as refusal:
        load_model(str(pipeline))
    assert refusal.value.hint


def test_exports_with_a_symbolic_batch(pipeline: Path) -> None:
    model = load_model(str(pipeline))
    batch = torch.export.Dim("batch")
    exported = torch.export.export(
        model.module, INPUTS, dynamic_shapes=({0: batch}, {0: batch}, {0: batch}), strict=False
    )
    three = tuple(torch.cat([tensor, tensor[:1]]) for tensor in INPUTS)
    torch.testing.assert_close(exported.module()(*three), model.module(*three), rtol=1e-6, atol=1e-6)
