"""The frozen parts of the embedded world: labels and documents are what they promise, and training repeats."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from devil_hf.data.shapes import ATTRIBUTE_WORDS, make_scene
from devil_hf.training.divergence import Diverged
from devil_hf.training.small_models.documents import IGNORED_INDEX
from devil_hf.training.small_models.optimisation import OptimisationSettings, minimise, state_of
from devil_hf.training.small_models.shapes_backbone import (
    AttributeLabels,
    ShapesBackboneSettings,
    pooled_features,
    scene_targets,
    train_shapes_backbone,
)
from devil_hf.training.small_models.shapes_language_model import (
    KeywordDocuments,
    ShapesLanguageModelSettings,
    build_shapes_tokenizer,
    held_out_document_losses,
    train_shapes_language_model,
)


def test_labels_tell_all_objects_apart_and_targets_lie_on_them():
    labels = AttributeLabels()
    assert (labels.singles, labels.pairs, labels.count) == (18, 122, 314)
    scene = make_scene(0, 9)
    rows = [labels.of(item) for item in scene.objects]
    assert all(len(set(row)) == 7 and max(row) < 314 for row in rows) and len({row[-1] for row in rows}) == len(rows)
    targets = scene_targets([scene], labels)[0]
    for row, mask in zip(rows, scene.masks, strict=True):
        assert targets[row[-1]].mean().item() == pytest.approx(mask.mean(), abs=1e-6)


def test_the_tokenizer_knows_every_word_and_marks_others():
    tokenizer = build_shapes_tokenizer()
    text = "a striped red circle left of an orange star that is plain"
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.unk_token_id not in ids and tokenizer.decode(ids) == text
    assert tokenizer("a dog")["input_ids"][-1] == tokenizer.unk_token_id


def test_documents_are_labelled_on_the_caption_only():
    tokenizer = build_shapes_tokenizer()
    documents = KeywordDocuments(tokenizer, ShapesLanguageModelSettings(bare_share=0.0, partial_share=0.0, packed_share=1.0))
    input_ids, labels = documents.batch(40, np.random.default_rng(0))
    assert input_ids.shape[:2] == labels.shape
    for ids, wanted in zip(input_ids, labels, strict=True):
        separator = int((ids[:, 0] == tokenizer.sep_token_id).nonzero()[0])
        end = int((ids[:, 0] == tokenizer.eos_token_id).nonzero()[0])
        assert (wanted[: separator + 1] == IGNORED_INDEX).all() and (wanted[end + 1 :] == IGNORED_INDEX).all()
        assert torch.equal(wanted[separator + 1 : end + 1], ids[separator + 1 : end + 1, 0])


def test_unbound_documents_group_words_by_attribute():
    tokenizer = build_shapes_tokenizer()
    settings = ShapesLanguageModelSettings(unbound_share=1.0, partial_share=0.0)
    documents, rng = KeywordDocuments(tokenizer, settings), np.random.default_rng(0)
    for index in range(10):
        scene = make_scene(0, index)
        groups = documents.keywords(scene, rng)
        expected = [sorted(item.attributes[name] for item in scene.objects) for name in ATTRIBUTE_WORDS]
        assert sorted(map(sorted, groups)) == sorted(expected)


def test_frozen_parts_train_reproducibly(tmp_path):
    settings = ShapesBackboneSettings(max_steps=2, batch_size=4, warmup_steps=1)
    backbone, history = train_shapes_backbone(settings)
    again, _ = train_shapes_backbone(settings)
    assert all(torch.equal(a, b) for a, b in zip(backbone.state_dict().values(), again.state_dict().values(), strict=True))
    assert history[-1]["step"] == 2 and not backbone.training
    scenes = [make_scene(0, index) for index in range(3)]
    assert [feature.shape for feature in pooled_features(backbone, scenes).values()] == [
        (3, 32),
        (3, 64),
        (3, 128),
        (3, 256),
    ]
    settings = ShapesLanguageModelSettings(max_steps=2, batch_size=4, warmup_steps=1, single_steps=1, width=32, layers=1, heads=2)
    model, tokenizer, _ = train_shapes_language_model(settings)
    again, _, _ = train_shapes_language_model(settings)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))
    assert set(held_out_document_losses(model, tokenizer, documents=8)) == {
        "with_keywords",
        "with_packed_keywords",
        "without_keywords",
    }
    with pytest.raises(ValueError, match="not divisible"):
        ShapesLanguageModelSettings(width=33)


def test_a_loss_that_is_not_finite_ends_the_training():
    layer = torch.nn.Linear(2, 1)
    with pytest.raises(FloatingPointError, match="step 2"):
        minimise(layer, lambda step: layer.weight.sum() / (2 - step), OptimisationSettings(max_steps=3))


class Killed(Exception):
    pass


@given(stop=st.integers(1, 7), every=st.sampled_from([0.0, 1e9]), dropout=st.sampled_from([0.0, 0.3]))
def test_a_small_models_training_goes_on_exactly_wherever_it_was_stopped(stop, every, dropout, tmp_path_factory):
    settings, file = OptimisationSettings(max_steps=6, warmup_steps=2, logging_steps=2), tmp_path_factory.mktemp("small") / "a.pt"

    def run(stop: int = 0) -> tuple[torch.Tensor, list]:
        torch.manual_seed(0)
        rng = np.random.default_rng(5)
        network = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Dropout(dropout), torch.nn.Linear(4, 1))

        def loss_of_step(step):
            if step == stop:
                raise Killed
            return network(torch.tensor(rng.normal(size=(2, 3)), dtype=torch.float32)).square().sum()

        history = minimise(network, loss_of_step, settings, unfinished=state_of(file, settings, rng))
        return torch.nn.utils.parameters_to_vector(network.parameters()), [(row["step"], row["loss"]) for row in history]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("devil_hf.training.small_models.optimisation.SAVE_SECONDS", every)
        whole = run()
        file.unlink()
        if stop <= 6:
            with pytest.raises(Killed):
                run(stop)
        again = run()
    assert torch.equal(again[0], whole[0]) and again[1] == whole[1]
    with pytest.raises(ValueError, match=r"other values of \['batch_size'\]"):
        minimise(torch.nn.Linear(1, 1), None, settings, unfinished=state_of(file, replace(settings, batch_size=1), None))


def test_weights_that_are_not_finite_are_no_end_of_a_training():
    layer, settings = torch.nn.Linear(2, 1), OptimisationSettings(max_steps=1, learning_rate=float("inf"), warmup_steps=0)
    with pytest.raises(Diverged, match="weights are not finite at step 1"):
        minimise(layer, lambda step: layer.weight.sum(), settings)
