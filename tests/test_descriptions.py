"""Scoring descriptions of a data set: every image by every layer in order, controls without any image."""

import pytest
from datasets import Dataset
from datasets import Image

from devil_hf.evaluation.descriptions import caption_table
from devil_hf.evaluation.descriptions import describe_dataset
from devil_hf.evaluation.descriptions import score_descriptions

REFERENCES = [
    ["a red dog on grass"],
    ["two cats sit on a wall"],
    ["a blue circle left of a square"],
    ["the sea at night"],
]


def test_every_image_is_described_by_every_layer_in_order(model, processor, images, tmp_path):
    paths = []
    for index, image in enumerate(images):
        image.save(tmp_path / f"{index}.png")
        paths.append(str(tmp_path / f"{index}.png"))
    dataset = Dataset.from_dict({"image": paths}).cast_column("image", Image())
    texts = describe_dataset(model, processor, dataset, batch_size=2, max_new_tokens=4)
    assert set(texts) == {"all", *model.layer_names}
    inputs = processor(images=images, return_tensors="pt")
    expected = processor.batch_decode(model.generate(**inputs, layers=-1, max_new_tokens=4), skip_special_tokens=True)
    assert texts[model.layer_names[-1]] == [text.strip() for text in expected]


def test_right_descriptions_beat_their_own_shuffle_and_any_constant():
    pytest.importorskip("pycocoevalcap")
    scores = score_descriptions({"all": [texts[0] for texts in REFERENCES]}, REFERENCES)
    assert scores["all"]["bleu_4"] == pytest.approx(1.0)
    assert scores["shuffled"]["cider"] < 0.5 * scores["all"]["cider"]
    assert scores["constant"]["cider"] < 0.5 * scores["all"]["cider"]
    table = caption_table(scores).splitlines()
    assert len(table) == 4 and table[1].split()[0] == "all"
