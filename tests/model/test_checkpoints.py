"""Slim and self-contained checkpoints: the same model, with and without the package, and refused when they are not."""

import json
import os
import shutil
import subprocess
import sys
import textwrap

import pytest
import timm
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModel, AutoProcessor

from devil_hf import DevilConfig, DevilModel
from tests.conftest import SMALL_TRANSLATOR


@pytest.fixture(scope="module")
def checkpoints(model, processor, tmp_path_factory):
    root = tmp_path_factory.mktemp("checkpoints")
    for name, slim in (("slim", True), ("full", False)):
        model.save_pretrained(root / name, slim=slim)
        processor.save_pretrained(root / name)
    return root


def change_config(folder, **fields):
    """Change fields of the configuration of a checkpoint."""
    config = json.loads((folder / "config.json").read_text()) | fields
    (folder / "config.json").write_text(json.dumps(config))


def test_slim_and_self_contained_checkpoints_load_the_same_model(model, checkpoints, pixel_values):
    for name in ("slim", "full"):
        loaded = AutoModel.from_pretrained(checkpoints / name)
        expected, found = model.state_dict(), loaded.state_dict()
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[key], found[key]) for key in expected)
        assert torch.equal(model.ask(pixel_values), loaded.ask(pixel_values))
        assert loaded.name_or_path == str(checkpoints / name) and not loaded.training


def test_a_slim_checkpoint_holds_the_translator_only(checkpoints, model):
    weights = load_file(checkpoints / "slim" / "model.safetensors")
    assert {name.split(".")[0] for name in weights} == {"translator"}
    size = os.path.getsize(checkpoints / "slim" / "model.safetensors")
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    assert trained < size < 1.05 * trained + 20_000
    # Neither the model's own state nor the other checkpoint is touched by saving slim.
    assert model.config.frozen_weights == "embedded"
    assert json.loads((checkpoints / "slim" / "config.json").read_text())["frozen_weights"] == "reference"


FRESH_PROCESS = """
    import json, sys
    sys.modules["devil_hf"] = None  # importing it now fails
    import torch
    from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor, pipeline
    from PIL import Image
    path, image, out = sys.argv[1:]
    torch.set_num_threads(1)
    config = AutoConfig.from_pretrained(path, trust_remote_code=True)
    model = AutoModel.from_pretrained(path, trust_remote_code=True)
    assert type(AutoModelForImageTextToText.from_pretrained(path, trust_remote_code=True)).__name__ == "DevilModel"
    processor = AutoProcessor.from_pretrained(path, trust_remote_code=True)
    inputs = processor(images=Image.open(image), return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=6)
    scores = model.score(**inputs, **processor(text=["a dog"], return_tensors="pt"))
    describe = pipeline("vision-feature-description", model=path, trust_remote_code=True)
    piped = describe(Image.open(image), layers=model.layer_names[-1])
    model.save_pretrained(out)  # the code travels on
    json.dump({"ids": ids.tolist(), "score": scores.log_probs.item(), "layers": config.layers,
               "piped": str(piped)}, open(out + ".json", "w"))
"""


@pytest.mark.parametrize("kind", ["slim", "full"])
def test_a_process_without_the_package_loads_it(kind, checkpoints, images, model, processor, tmp_path):
    images[0].save(tmp_path / "image.png")
    environment = os.environ | {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", textwrap.dedent(FRESH_PROCESS), str(checkpoints / kind)]
    run = subprocess.run(
        [*command, str(tmp_path / "image.png"), str(tmp_path / "again")],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    found = json.loads((tmp_path / "again.json").read_text())
    inputs = processor(images=images[0], return_tensors="pt")
    assert found["ids"] == model.generate(**inputs, max_new_tokens=6).tolist()
    expected = model.score(**inputs, **processor(text=["a dog"], return_tensors="pt")).log_probs.item()
    assert abs(found["score"] - expected) < 1e-5
    assert found["layers"] == model.layer_names and model.layer_names[-1] in found["piped"]
    assert (tmp_path / "again" / "modeling_devil.py").exists()


def test_every_weight_and_buffer_is_loaded_into_garbage_memory(model, checkpoints):
    """Uninitialised memory is filled with NaN; whatever loading forgets shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        loaded = DevilModel.from_pretrained(checkpoints / "full")
    finally:
        torch.use_deterministic_algorithms(False)
    tensors = [*loaded.named_parameters(), *loaded.named_buffers()]
    expected = dict([*model.named_parameters(), *model.named_buffers()])
    for name, tensor in tensors:
        assert torch.equal(tensor, expected[name]), name


def test_building_keeps_pretrained_weights(sources):
    model = DevilModel.from_backbone_and_language_model(**sources, **SMALL_TRANSLATOR)
    stored = load_file(f"{sources['backbone']}/model.safetensors")
    weights = model.backbone.module.state_dict()
    assert all(torch.equal(weights[name], stored[name]) for name in weights)
    stored = load_file(f"{sources['language_model']}/model.safetensors")
    weights = model.language_model.state_dict()
    assert all(torch.equal(weights[name], tensor) for name, tensor in stored.items())


@pytest.mark.parametrize("kind", ["slim", "full"])
def test_loaded_models_are_frozen_too(kind, checkpoints):
    loaded = AutoModel.from_pretrained(checkpoints / kind)
    assert {name.split(".")[0] for name, p in loaded.named_parameters() if p.requires_grad} == {"translator"}


def test_fields_can_be_overridden_and_misspelt_ones_are_refused(checkpoints, sources):
    assert DevilModel.from_pretrained(checkpoints / "full", null_probability=0.5).config.null_probability == 0.5
    with pytest.raises(TypeError, match="translator_widht"):
        DevilModel.from_backbone_and_language_model(**sources, translator_widht=3)


def test_descriptions_do_not_follow_decoding_habits_of_the_language_model(sources, language_model, tmp_path):
    import copy

    habitual = copy.deepcopy(language_model)
    habitual.generation_config.repetition_penalty = 9.0
    habitual.save_pretrained(tmp_path / "lm")
    torch.manual_seed(2)
    built = DevilModel.from_backbone_and_language_model(sources["backbone"], str(tmp_path / "lm"), **SMALL_TRANSLATOR)
    built.save_pretrained(tmp_path / "model")
    loaded = DevilModel.from_pretrained(tmp_path / "model")
    pixels = torch.randn(2, 3, 96, 96)
    assert built.generate(pixels, max_new_tokens=8).tolist() == loaded.generate(pixels, max_new_tokens=8).tolist()


def test_a_module_for_a_slim_checkpoint_is_verified_too(checkpoints):
    other = timm.create_model("test_resnet.r160_in1k", pretrained=False, num_classes=0)
    with pytest.raises(ValueError, match=r"(?i)sha-?256"):
        DevilModel.from_pretrained(checkpoints / "slim", backbone=other)


def test_half_precision_and_device_map_are_respected(checkpoints, pixel_values):
    for kind in ("slim", "full"):
        model = AutoModel.from_pretrained(checkpoints / kind, dtype=torch.bfloat16, device_map="cpu")
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
        assert model.generate(pixel_values, max_new_tokens=2).shape[0] == 3
    eager = AutoModel.from_pretrained(checkpoints / "full", attn_implementation="eager")
    assert eager.language_model.config._attn_implementation == "eager"


def test_moved_sources_can_be_named(checkpoints, sources, model, tmp_path):
    moved = {part: str(shutil.copytree(path, tmp_path / part)) for part, path in sources.items()}
    loaded = DevilModel.from_pretrained(checkpoints / "slim", **moved)
    assert torch.equal(loaded.language_model.lm_head.weight, model.language_model.lm_head.weight)


@pytest.mark.parametrize("part", ["backbone", "language_model"])
def test_other_weights_than_the_trained_ones_are_refused(part, checkpoints, sources, tmp_path):
    moved = {name: str(shutil.copytree(path, tmp_path / name)) for name, path in sources.items()}
    file = f"{moved[part]}/model.safetensors"
    weights = load_file(file)
    name = next(key for key in sorted(weights) if weights[key].is_floating_point())
    weights[name] = weights[name] + 1e-3
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"(?i)sha-?256"):
        DevilModel.from_pretrained(checkpoints / "slim", **moved)


@pytest.mark.parametrize("part", ["backbone", "language_model"])
def test_a_missing_source_is_named(part, checkpoints, tmp_path):
    with pytest.raises(OSError, match=f"{part}="):
        DevilModel.from_pretrained(checkpoints / "slim", **{part: str(tmp_path / "nowhere")})


def test_incomplete_and_future_checkpoints_are_refused(checkpoints, tmp_path):
    broken = shutil.copytree(checkpoints / "slim", tmp_path / "broken")
    change_config(broken, weights_sha256=None)
    weights = load_file(broken / "model.safetensors")
    save_file(
        {k: v for k, v in weights.items() if "queries" not in k},
        broken / "model.safetensors",
        metadata={"format": "pt"},
    )
    with pytest.raises(ValueError, match=r"translator\.queries"):
        DevilModel.from_pretrained(broken)
    (broken / "model.safetensors").unlink()
    with pytest.raises(OSError, match=r"model\.safetensors"):
        DevilModel.from_pretrained(broken)
    config = json.loads((broken / "config.json").read_text()) | {"format_version": 99}
    (broken / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="99"):
        DevilConfig.from_pretrained(broken)


def test_modules_are_accepted_and_saved_whole(language_model, tokenizer, tmp_path):
    class Eye(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Conv2d(3, 8, 4, stride=4)
            self.body = nn.Conv2d(8, 16, 2, stride=2)

        def forward(self, x):
            return self.body(self.stem(x).relu())

    eye = Eye()
    model = DevilModel.from_backbone_and_language_model(
        eye, language_model, layers=["stem", "body"], tokenizer=tokenizer, **SMALL_TRANSLATOR
    )
    pixels = torch.randn(2, 3, 32, 32)
    assert [tuple(maps.shape) for maps in model.extract_features(pixels)] == [(2, 8, 8, 8), (2, 16, 4, 4)]
    with pytest.raises(ValueError, match="slim=False"):
        model.save_pretrained(tmp_path / "slim", slim=True)
    model.save_pretrained(tmp_path / "full")
    loaded = DevilModel.from_pretrained(tmp_path / "full", backbone=Eye())
    assert torch.equal(loaded.ask(pixels), model.ask(pixels))
    with pytest.raises((ValueError, TypeError), match="module"):
        DevilModel.from_pretrained(tmp_path / "full")


def test_a_built_timm_model_needs_no_source(language_model, tmp_path):
    backbone = timm.create_model("test_vit", num_classes=0)
    model = DevilModel.from_backbone_and_language_model(
        backbone, language_model, layers=[-1], class_tokens=True, **SMALL_TRANSLATOR
    )
    assert any(name.endswith(":class") for name in model.layer_names)
    model.save_pretrained(tmp_path)
    loaded = DevilModel.from_pretrained(tmp_path)
    size = model.config.backbone_config["input_size"]
    pixels = torch.randn(1, *size)
    assert torch.equal(loaded.ask(pixels), model.ask(pixels))


def test_language_models_without_needed_parts_are_refused(sources):
    from transformers import GPT2Config, GPT2Model, T5Config, T5ForConditionalGeneration

    headless = GPT2Model(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=50))
    with pytest.raises(ValueError, match="AutoModelForCausalLM"):
        DevilModel.from_backbone_and_language_model(sources["backbone"], headless, **SMALL_TRANSLATOR)
    encoder_decoder = T5ForConditionalGeneration(T5Config(d_model=32, d_kv=16, d_ff=32, num_layers=1, num_heads=2, vocab_size=50))
    with pytest.raises(ValueError, match="encoder-decoder"):
        DevilModel.from_backbone_and_language_model(sources["backbone"], encoder_decoder, **SMALL_TRANSLATOR)
    with pytest.raises(StrictDataclassClassValidationError, match="context"):
        DevilModel.from_backbone_and_language_model(**sources, **(SMALL_TRANSLATOR | {"prefix_length": 63}))


def test_a_processor_loads_beside_the_model(checkpoints, images, pixel_values):
    processor = AutoProcessor.from_pretrained(checkpoints / "full")
    assert torch.equal(processor(images=images, return_tensors="pt")["pixel_values"], pixel_values)


def test_a_configuration_of_the_former_layout_is_read_and_saved_without_its_dead_option(
    model, checkpoints, pixel_values, tmp_path
):
    former = shutil.copytree(checkpoints / "full", tmp_path / "former")
    config = json.loads((former / "config.json").read_text())
    (former / "config.json").write_text(json.dumps(config | {"translator_norm_eps": 1e-12}))
    loaded = AutoModel.from_pretrained(former)
    assert torch.equal(loaded.ask(pixel_values), model.ask(pixel_values))
    loaded.save_pretrained(tmp_path / "again")
    assert "translator_norm_eps" not in json.loads((tmp_path / "again" / "config.json").read_text())


def test_a_repository_with_code_of_its_own_keeps_loading_by_that_code(checkpoints, pixel_values, tmp_path):
    """Whatever this package becomes: what a repository carries is what runs without it."""
    former = shutil.copytree(checkpoints / "full", tmp_path / "former")
    code = (former / "modeling_devil.py").read_text()
    marked = code.replace("class DevilModel(", "FORMER = True\n\n\nclass DevilModel(", 1)
    (former / "modeling_devil.py").write_text(marked.replace("DEFAULT_NEW_TOKENS = 40", "DEFAULT_NEW_TOKENS = 3"))
    script = (
        "import sys\nsys.modules['devil_hf'] = None\nimport torch\nfrom transformers import AutoModel\n"
        "model = AutoModel.from_pretrained('former', trust_remote_code=True)\n"
        "assert sys.modules[type(model).__module__].FORMER\n"
        "print(model.generate(torch.zeros(1, 3, 160, 160)).shape[1])\n"
    )
    environment = os.environ | {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", script]
    run = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    assert int(run.stdout.split()[-1]) <= 3
