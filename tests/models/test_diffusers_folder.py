"""A DiT that diffusers saved computes the same through qcgraph, and brings its noise schedule along."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qcgraph.errors import UsageError
from qcgraph.models import load_model
from qcgraph.plan.spec import FolderSampler, ModelSpec, NoiseSchedule

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
    assert model.spec == ModelSpec.class_conditional(
        name="tiny",
        latent_shape=(4, 8, 8),
        class_count=10,
        null_class=10,
        output_channels=8,
        noise_schedule=NoiseSchedule(1000, 1e-4, 0.012, "scaled_linear", "v_prediction", sampler=FolderSampler("ddim")),
    )
    assert model.input_names == ("hidden_states", "timestep", "class_labels")
    assert not model.module.training
    inputs = dict(zip(model.input_names, INPUTS, strict=True))
    expected = transformer(INPUTS[0], timestep=INPUTS[1], class_labels=INPUTS[2]).sample
    assert torch.equal(model.module(**inputs), expected)


@torch.no_grad()
def test_model_folder_has_the_default_schedule(pipeline: Path) -> None:
    model = load_model(str(pipeline / "transformer"))
    assert model.spec.noise_schedule == NoiseSchedule()
    assert model.spec.name == "transformer"
    assert "name the folder above it" in model.notes[0]


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
    (pipeline / "scheduler" / "scheduler_config.json").write_text(
        json.dumps({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0})
    )
    assert load_model(str(pipeline)).spec.noise_schedule == NoiseSchedule(
        prediction="flow_prediction", shift=3.0, sampler=FolderSampler("flow-euler")
    )


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"beta_schedule": "sigmoid"}, "beta_schedule 'sigmoid' is not supported"),
        ({"prediction_type": "sample"}, "prediction 'sample' is not supported"),
        ({"trained_betas": [0.1, 0.2]}, "trained_betas are not supported"),
    ],
)
def test_unsupported_schedule(change: dict[str, object], complaint: str, pipeline: Path) -> None:
    edit(pipeline / "scheduler" / "scheduler_config.json", **change)
    with pytest.raises(UsageError, match=complaint) as refusal:
        load_model(str(pipeline))
    assert refusal.value.hint


WEIGHTS = "diffusion_pytorch_model.safetensors"


def rewrite(pipeline: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Change the weights of a folder in place."""
    path = pipeline / "transformer" / WEIGHTS
    weights = load_file(path)
    changed = change(weights)
    save_file(changed if changed is not None else weights, path, metadata={"format": "pt"})


def refusal_of(folder: Path) -> UsageError:
    with pytest.raises(UsageError) as caught:
        load_model(str(folder))
    assert caught.value.hint
    return caught.value


def with_prefix(prefix: str) -> Callable[[dict[str, torch.Tensor]], Any]:
    return lambda weights: {f"{prefix}{name}": tensor for name, tensor in weights.items()}


def with_proj(convert: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[dict[str, torch.Tensor]], Any]:
    return lambda weights: weights | {"proj_out_1.bias": convert(weights["proj_out_1.bias"])}


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda weights: weights | {"extra.weight": torch.zeros(2)}, "1 tensors of the weight file are no parameters"),
        (with_proj(lambda tensor: tensor[:-1].clone()), "proj_out_1.bias"),
        (with_proj(lambda tensor: tensor.to(torch.int8)), "proj_out_1.bias is I8, and not floating point"),
        (with_proj(lambda tensor: tensor.to(torch.float8_e4m3fn)), "proj_out_1.bias is F8_E4M3, and not floating"),
        (with_proj(lambda tensor: tensor.to(torch.complex64)), "proj_out_1.bias is C64, and not floating point"),
        (with_proj(lambda tensor: tensor * float("nan")), "proj_out_1.bias is not finite"),
        (with_prefix("module._orig_mod."), "all names in the weights begin with 'module._orig_mod.'"),
        (with_prefix("net."), "the first is net."),
    ],
)
def test_weights_of_another_network_are_refused(change: Any, complaint: str, pipeline: Path) -> None:
    rewrite(pipeline, change)
    assert complaint in refusal_of(pipeline).message


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"num_layers": 1}, "tensors of the weight file are no parameters of it, the first is transformer_blocks.1."),
        ({"num_layers": 3}, "parameters are not in the weight file, the first is transformer_blocks.2."),
        ({"num_layers": 4000}, "num_layers = 4000, and the weights are"),
        ({"num_layers": 0}, "num_layers = 0 does not fit"),
        ({"num_attention_heads": 3}, "diffusers cannot load the model"),
        ({"num_attention_heads": "2"}, "num_attention_heads = '2' does not fit"),
        ({"attention_head_dim": 7}, "num_attention_heads * attention_head_dim = 14 is not a multiple of 4"),
        ({"patch_size": 0}, "patch_size = 0 does not fit"),
        ({"patch_size": 3}, "sample_size 8 is not a multiple of patch_size 3"),
        ({"sample_size": 0}, "sample_size = 0 does not fit"),
        ({"sample_size": None}, "sample_size = None does not fit"),
        ({"sample_size": [8, 8]}, "sample_size = [8, 8] is a list"),
        ({"sample_size": 1_000_000}, "makes more than 1024 patches"),
        ({"out_channels": 6}, "out_channels 6 is neither in_channels 4 nor"),
        ({"num_embeds_ada_norm": None}, "num_embeds_ada_norm = None does not fit"),
        ({"activation_fn": "relu6"}, "activation_fn = 'relu6' does not fit"),
        ({"norm_type": "layer_norm"}, "norm_type = 'layer_norm' does not fit"),
        ({"norm_eps": float("nan")}, "norm_eps = nan does not fit"),
        ({"dtype": "float16"}, "dtype = 'float16' is no setting of DiTTransformer2DModel"),
        ({"cross_attention_dim": 512}, "cross_attention_dim = 512 is not supported"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "quantized already (quantization_config, method"),
    ],
)
def test_configurations_that_do_not_fit_are_refused(change: dict[str, Any], complaint: str, pipeline: Path) -> None:
    edit(pipeline / "transformer" / "config.json", **change)
    assert complaint in refusal_of(pipeline).message


def test_settings_that_diffusers_ignores_are_noted(pipeline: Path) -> None:
    edit(pipeline / "transformer" / "config.json", window_size=4)
    assert "window_size is no setting of DiTTransformer2DModel" in " ".join(load_model(str(pipeline)).notes)


def test_the_older_class_has_other_defaults(pipeline: Path) -> None:
    path = pipeline / "transformer" / "config.json"
    config = json.loads(path.read_text()) | {"_class_name": "Transformer2DModel", "norm_type": "ada_norm_zero"}
    del config["attention_bias"]
    path.write_text(json.dumps(config))
    assert "leaves out attention_bias" in refusal_of(pipeline).message


def test_half_precision_variants(pipeline: Path, transformer: Any) -> None:
    folder = pipeline / "transformer"
    rewrite(pipeline, lambda weights: {name: tensor.half() for name, tensor in weights.items()})
    (folder / WEIGHTS).rename(folder / "diffusion_pytorch_model.fp16.safetensors")
    model = load_model(str(pipeline))
    assert "variant fp16 only" in " ".join(model.notes)
    weights = transformer.state_dict()
    for name, tensor in model.module.state_dict().items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, weights[name.removeprefix("transformer.")].half().float())
    (folder / "diffusion_pytorch_model.fp16.safetensors").rename(folder / "diffusion_pytorch_model.ema.safetensors")
    assert "only variants of the weights: ema" in refusal_of(pipeline).message


def test_shards(pipeline: Path, transformer: Any) -> None:
    folder = pipeline / "transformer"
    (folder / WEIGHTS).unlink()
    transformer.save_pretrained(folder, max_shard_size="10KB")
    index = folder / f"{WEIGHTS}.index.json"
    content = json.loads(index.read_text())
    shards = sorted(set(content["weight_map"].values()))
    assert len(shards) > 1
    weights = load_model(str(pipeline)).module.state_dict()
    assert all(torch.equal(weights[f"transformer.{name}"], value) for name, value in transformer.state_dict().items())
    del content["weight_map"]["proj_out_1.bias"]
    index.write_text(json.dumps(content))
    assert "it also has proj_out_1.bias" in refusal_of(pipeline).message
    index.write_text(json.dumps({"weight_map": {"a": "../elsewhere.safetensors"}}))
    assert "which is not in the folder" in refusal_of(pipeline).message
    index.write_text(json.dumps({"weight_map": [1]}))
    assert "has no weight_map" in refusal_of(pipeline).message


@pytest.mark.parametrize("content", [b"", b"\xff" * 64, b"\x10\0\0\0\0\0\0\0{}", b"\xff\xff\xff\x7f\0\0\0\0{"])
def test_damaged_weights(content: bytes, pipeline: Path) -> None:
    (pipeline / "transformer" / WEIGHTS).write_bytes(content)
    assert "cannot read safetensors" in refusal_of(pipeline).message


def test_weights_of_torch_save(pipeline: Path, transformer: Any) -> None:
    folder = pipeline / "transformer"
    (folder / WEIGHTS).unlink()
    torch.save(transformer.state_dict(), folder / "diffusion_pytorch_model.bin")
    assert load_model(str(pipeline)).spec.name == "tiny"
    torch.save(
        transformer.state_dict() | {"proj_out_1.bias": torch.zeros(32).int()}, folder / "diffusion_pytorch_model.bin"
    )
    assert "proj_out_1.bias is int32" in refusal_of(pipeline).message


@pytest.mark.slow
def test_exports_with_a_symbolic_batch(pipeline: Path) -> None:
    model = load_model(str(pipeline))
    batch = torch.export.Dim("batch")
    exported = torch.export.export(
        model.module, INPUTS, dynamic_shapes=({0: batch}, {0: batch}, {0: batch}), strict=False
    )
    three = tuple(torch.cat([tensor, tensor[:1]]) for tensor in INPUTS)
    torch.testing.assert_close(exported.module()(*three), model.module(*three), rtol=1e-6, atol=1e-6)


def test_diffusers_prints_no_warnings(pipeline: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It warns where accelerate is not installed, and of tensors that it does not use, which are refused here."""
    logger = logging.getLogger("diffusers")
    logger.addHandler(caplog.handler)
    try:
        load_model(str(pipeline))
        rewrite(pipeline, lambda weights: weights.__setitem__("stray", torch.ones(2)))
        assert "stray" in refusal_of(pipeline).message
    finally:
        logger.removeHandler(caplog.handler)
    assert caplog.messages == []
    assert logger.level != logging.ERROR
