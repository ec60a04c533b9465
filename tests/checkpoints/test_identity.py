"""What a model and its processor are known by: whatever changes an answer changes it, and nothing else does."""

import ast
import copy
import json

import pytest
import torch
from huggingface_hub.dataclasses import strict
from transformers import CONFIG_MAPPING, ByT5Tokenizer, Dinov2Config, Dinov2Model, GPT2Config

from devil_hf.build import backbone_from_source
from devil_hf.build.lora_devil import add_lora
from devil_hf.checkpoints.identity import (
    fingerprint,
    frozen_identity,
    known_by,
    network_identity,
    reading_of,
    settings_identity,
    tokenizer_identity,
)
from devil_hf.checkpoints.loading import load
from devil_hf.checkpoints.quantised import quantise
from devil_hf.data.unit_reader import UnitReader
from devil_hf.model.image_processing_devil import SETTINGS
from tests import test_house
from tests.test_house import FILES, SOURCE, all_imports

PIXELS = {
    "crop_size": {"height": 40, "width": 40},
    "crop_pct": 0.5,
    "crop_mode": "squash",
    "resample": 0,
    "image_mean": [0.4, 0.5, 0.5],
    "image_std": [0.2, 0.3, 0.25],
}


def test_every_setting_of_the_preprocessing_counts(model, processor):
    assert set(PIXELS) == set(SETTINGS)
    found = [reading_of(model, processor)]
    for name, value in PIXELS.items():
        changed = copy.deepcopy(processor)
        setattr(changed.image_processor, name, value)
        found.append(reading_of(model, changed))
        assert [part for part in found[0] if found[0][part] != found[-1][part]] == ["images"]
    assert len({json.dumps(one) for one in found}) == len(found)


def test_every_part_of_the_tokenizer_counts_but_for_the_last_call(model, processor):
    def changed(change):
        other = copy.deepcopy(processor)
        change(other.tokenizer)
        return reading_of(model, other)["texts"]

    before = changed(lambda tokenizer: None)
    assert before == changed(lambda tokenizer: tokenizer(["a", "a dog"], padding=True, truncation=True, max_length=1))
    differ = {
        changed(lambda tokenizer: tokenizer.add_tokens(["zebra"])),
        changed(lambda tokenizer: setattr(tokenizer, "pad_token", tokenizer.eos_token)),
        changed(lambda tokenizer: setattr(tokenizer, "model_max_length", 7)),
    }
    assert len(differ | {before}) == 4


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("settings", lambda model: setattr(model.config, "translator_heads", 1)),
        ("settings", lambda model: setattr(model.config, "normalize_features", True)),
        ("settings", lambda model: setattr(model.config, "lora", {"rank": 2, "alpha": 3})),
        ("settings", lambda model: setattr(model.config, "bos_token_id", 5)),
        ("settings", lambda model: setattr(model.config.text_config, "n_head", 1)),
        ("settings", lambda model: setattr(model.config.text_config, "layer_norm_epsilon", 0.1)),
        ("settings", lambda model: model.config.backbone_config["kwargs"].update(output_stride=8)),
        ("settings", lambda model: model.config.backbone_config["readers"][0].update(index=7)),
        ("settings", lambda model: model.config.backbone_config["layers"].reverse()),
        ("precision", lambda model: model.to(torch.bfloat16)),
    ],
)
def test_what_changes_an_answer_without_the_weights_counts(part, change, model, processor):
    other, before = copy.deepcopy(model), reading_of(model, processor)
    change(other)
    after = reading_of(other, processor)
    assert [name for name in before if before[name] != after[name]] == [part]


def test_what_changes_no_answer_does_not_count(model, processor, tmp_path):
    other, before = copy.deepcopy(model), known_by(model, processor)
    for name, value in {"scope": "only dogs", "layer_dropout": 0.1, "region_schedule": "constant", "dtype": None}.items():
        setattr(other.config, name, value)
    other.config.backbone_config.update(source="elsewhere", revision="other")
    other.config.text_config._name_or_path = "elsewhere"
    for name, value in {"resid_pdrop": 0.3, "use_cache": False, "initializer_range": 1.0, "summary_first_dropout": 0.2}.items():
        setattr(other.config.text_config, name, value)
    assert known_by(other, processor) == before
    for slim in (False, True):
        model.save_pretrained(tmp_path / str(slim), slim=slim)
        processor.save_pretrained(tmp_path / str(slim))
        assert known_by(*load(tmp_path / str(slim), "cpu")) == before


def test_rounded_and_adapted_models_are_others(model, processor):
    rounded, adapted = quantise(copy.deepcopy(model)), copy.deepcopy(model)
    before = known_by(model, processor)
    assert known_by(rounded, processor) != before and fingerprint(rounded) != before["weights"]
    add_lora(adapted, {"rank": 2, "alpha": 4})
    assert known_by(adapted, processor)["weights"] != before["weights"]


def test_the_frozen_parts_are_known_apart_from_what_is_trained(model, processor):
    other, before = copy.deepcopy(model), frozen_identity(model, processor)
    with torch.no_grad():
        next(other.translator.parameters()).add_(1)
    assert frozen_identity(other, processor) == before
    other.config.backbone_config["sha256"] = "other"
    assert frozen_identity(other, processor) != before
    for name in ("backbone", "language_model"):
        other = copy.deepcopy(model)
        other.config.backbone_config["sha256"] = other.config.language_model_source = None  # nobody took their hashes
        unknown = frozen_identity(other, processor)
        with torch.no_grad():
            next(getattr(other, name).parameters()).add_(1)
        assert frozen_identity(other, processor) != unknown
    other = copy.deepcopy(model)
    other.config.text_config.n_head = 1
    assert frozen_identity(other, processor) != before
    changed = copy.deepcopy(processor)
    changed.image_processor.image_std = [0.2, 0.3, 0.25]
    assert frozen_identity(model, changed) != before


def test_a_setting_that_a_library_adds_is_no_difference(model, monkeypatch):
    @strict
    class Newer(GPT2Config):
        added: int = 3

    before, config = settings_identity(model.config), copy.deepcopy(model.config)
    monkeypatch.setitem(CONFIG_MAPPING._extra_content, "gpt2", Newer)
    config.text_config = Newer(**model.config.text_config.to_dict())
    assert settings_identity(config) == before
    config.text_config.added = 4
    assert settings_identity(config) != before

    class Demanding(Newer):
        def __init__(self, **fields):
            if not fields:
                raise ValueError("it cannot be without arguments")
            super().__init__(**fields)

    monkeypatch.setitem(CONFIG_MAPPING._extra_content, "gpt2", Demanding)
    assert settings_identity(config) == settings_identity(copy.deepcopy(config))


def test_stages_of_a_network_are_known_as_layers(tmp_path):
    sizes = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    Dinov2Model(Dinov2Config(**sizes)).save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text('{"crop_size": {"height": 28, "width": 28}}')
    one, two = (backbone_from_source(str(tmp_path), layers).config for layers in (["stage3"], ["stage1", "stage3"]))
    assert one["model_config"]["out_features"] != two["model_config"]["out_features"]
    assert network_identity(one) == network_identity(two, ["stage3"]) != network_identity(two)
    other = copy.deepcopy(one)
    other["model_config"]["layer_norm_eps"] = 0.1
    assert network_identity(other, ()) != network_identity(one, ()) == network_identity(two, ())


def test_a_slow_tokenizer_is_known_wherever_it_lies(tmp_path):
    found = set()
    for name in ("here", "there"):
        ByT5Tokenizer().save_pretrained(tmp_path / name)
        found.add(tokenizer_identity(ByT5Tokenizer.from_pretrained(tmp_path / name)))
    assert len(found) == 1
    assert tokenizer_identity(ByT5Tokenizer(extra_ids=7)) not in found


def test_units_are_known_by_the_layers_that_are_read(model, processor):
    config, first = model.backbone.config, model.layer_names[:1]
    fewer = config | {name: config[name][:1] for name in ("layers", "channels", "readers")}
    assert network_identity(config, first) == network_identity(fewer) != network_identity(config)
    reader, changed = UnitReader(model.backbone), copy.deepcopy(processor.image_processor)
    changed.resample = 0
    before, after = reader.known(processor.image_processor), reader.known(changed)
    assert [name for name in before if before[name] != after[name]] == ["preprocessing"]


def records_are_imported(file):
    """Whether a file imports the records of an evaluation, or their module, by whatever name."""
    return any(name.rpartition(".")[2] in ("records", "Records") for name in all_imports(file))


def test_rows_are_recorded_by_the_driver_alone():
    """So that every evaluation, and every report, knows its model and processor."""
    assert [file.name for file in FILES if records_are_imported(file)] == ["evaluator.py"]


@pytest.mark.parametrize(
    "text",
    [
        "from devil_hf.evaluation.records import Records as Rows",
        "from devil_hf.evaluation import records as rows",
        "import devil_hf.evaluation.records as rows",
        "from .records import Records",
        "from devil_hf.evaluation.evaluator import Records as Rows",
        "def run():\n    from devil_hf.evaluation.records import Records as Rows",
    ],
)
def test_records_are_found_by_any_name(text, monkeypatch):
    monkeypatch.setattr(test_house, "tree", lambda file: ast.parse(text))
    assert records_are_imported(SOURCE / "evaluation" / "some.py")
