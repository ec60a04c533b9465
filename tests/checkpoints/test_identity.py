"""What a model and its processor are known by: whatever changes an answer changes it, and nothing else does."""

import copy
import json
from pathlib import Path

import pytest
import torch

import devil_hf
from devil_hf.build.lora_devil import add_lora
from devil_hf.checkpoints.identity import fingerprint, frozen_identity, known_by, network_identity, reading_of
from devil_hf.checkpoints.loading import load
from devil_hf.checkpoints.quantised import quantise
from devil_hf.data.unit_reader import UnitReader
from devil_hf.model.image_processing_devil import SETTINGS

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
    with torch.no_grad():
        next(other.backbone.parameters()).add_(1)
    assert frozen_identity(other, processor) != before
    changed = copy.deepcopy(processor)
    changed.image_processor.image_std = [0.2, 0.3, 0.25]
    assert frozen_identity(model, changed) != before


def test_units_are_known_by_the_layers_that_are_read(model, processor):
    config, first = model.backbone.config, model.layer_names[:1]
    fewer = config | {name: config[name][:1] for name in ("layers", "channels", "readers")}
    assert network_identity(config, first) == network_identity(fewer) != network_identity(config)
    reader, changed = UnitReader(model.backbone), copy.deepcopy(processor.image_processor)
    changed.resample = 0
    before, after = reader.known(processor.image_processor), reader.known(changed)
    assert [name for name in before if before[name] != after[name]] == ["preprocessing"]


def test_rows_are_recorded_by_the_driver_alone():
    """So that every evaluation, and every report, knows its model and processor."""
    package = Path(devil_hf.__file__).parent
    using = [file.name for file in package.rglob("*.py") if " Records(" in file.read_text()]
    assert using == ["evaluator.py"]
