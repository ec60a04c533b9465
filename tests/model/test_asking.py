"""What is asked wrongly is an error that names value and remedy; what is asked in another form is the same question."""

import copy

import numpy as np
import pytest
import torch
from PIL import Image

from devil_hf.model.outputs_devil import AttributionOutput, word_evidence
from tests.conftest import SMALL_TRANSLATOR

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("guidance", [NAN, INF, -1, "much", None, [1.5]])
def test_guidance_is_a_number_that_makes_sense(model, pixel_values, guidance):
    for call in (model.generate, model.describe):
        with pytest.raises(ValueError, match="guidance="):
            call(pixel_values, guidance=guidance, max_new_tokens=3)


def test_huge_guidance_still_says_words(model, processor, pixel_values):
    ids = model.generate(pixel_values, guidance=1e38, max_new_tokens=4)
    assert ids.shape == (3, 4) or (ids == model.config.eos_token_id).any()


@pytest.mark.parametrize(
    "part", ["translator.output.weight", "language_model.lm_head.weight", "language_model.transformer.ln_f.bias"]
)
def test_weights_that_are_no_numbers_are_never_words_or_scores(model, pixel_values, phrases, part):
    broken = copy.deepcopy(model)
    weight = broken.get_parameter(part) if "lm_head" not in part else broken.get_output_embeddings().weight
    with torch.no_grad():
        weight.view(-1)[0] = NAN
    for verb in (
        lambda: broken.generate(pixel_values, max_new_tokens=3),
        lambda: broken.generate(pixel_values, max_new_tokens=3, guidance=2.0),
        lambda: broken.describe(pixel_values, max_new_tokens=3),
        lambda: broken.score(pixel_values, **phrases),
        lambda: broken.attribute(pixel_values, phrases),
    ):
        with pytest.raises(ValueError, match=r"not finite: check .*(translator|language model)|language model's scores are not"):
            verb()


def test_features_are_checked_where_they_leave_the_backbone_and_where_they_come_in(model, pixel_values):
    broken = pixel_values.clone()
    broken[1, :, 3, 3] = NAN
    with pytest.raises(ValueError, match="features of layer 'layer1' are not finite"):
        model.extract_features(broken)
    pooled = [torch.zeros(2, channels) for channels in model.backbone.channels]
    pooled[2][1, 0] = INF
    with pytest.raises(ValueError, match="features of layer 'layer3' are not finite"):
        model(pooled_features=pooled)
    with pytest.raises(ValueError, match="features of layer 'layer3' are not finite"):
        model.describe_directions(pooled[2], "layer3")
    with pytest.raises(ValueError, match="layer 'layer3' have the shape"):
        model.describe_directions(pooled[2][:, 1:], "layer3")


@pytest.mark.parametrize("mask", [[[0, 1, 1]], [[1, 0, 1]], [[0.5, 1, 1]], [[1, 1]], [[1, 1, 1], [1, 1, 1]]], ids=str)
def test_padding_in_front_or_between_is_refused_wherever_tokens_come_in(model, pixel_values, mask):
    ids, mask = torch.tensor([[5, 6, 7]]), torch.tensor(mask)
    for call in (
        lambda: model.score(pixel_values, ids, mask),
        lambda: model.attribute(pixel_values, {"input_ids": ids, "attention_mask": mask}),
        lambda: model(pixel_values[:1], ids, mask),
        lambda: model.score_prefix(model.null_prefix(), {"input_ids": ids, "attention_mask": mask}),
    ):
        with pytest.raises(ValueError, match="attention_mask"):
            call()


@pytest.mark.parametrize("ids", [[[5, -1]], [[5, 99999]], [[0.5, 1.0]], [5, 6], [[]]], ids=str)
def test_tokens_of_no_vocabulary_are_refused_wherever_they_come_in(model, pixel_values, ids):
    ids = torch.tensor(ids)
    for call in (lambda: model.score(pixel_values, ids), lambda: model(pixel_values[:1], ids)):
        with pytest.raises(ValueError, match="input_ids"):
            call()


def test_captions_are_one_per_image(model, pixel_values, phrases):
    with pytest.raises(ValueError, match="4 captions for 3 images"):
        model(pixel_values, phrases["input_ids"], phrases["attention_mask"])


BAD_REGIONS = [
    (torch.ones(3, 96, 128), "over the pixel values"),  # the photograph's size
    (torch.ones(3, 0, 160, 160), "over the pixel values"),
    (torch.full((3, 160, 160), 1e38), r"\[0, 1\].*1e\+38"),
    (torch.full((3, 160, 160), -1.0), r"\[0, 1\].*-1"),
    (torch.full((3, 160, 160), NAN), r"\[0, 1\].*nan"),
    (torch.full((3, 160, 160), 255, dtype=torch.uint8), r"\[0, 1\].*255"),
    (["a", "b"], "regions must be"),
]


@pytest.mark.parametrize(("regions", "text"), BAD_REGIONS)
def test_regions_that_are_none_are_refused(model, pixel_values, regions, text):
    with pytest.raises((ValueError, TypeError), match=text):
        model.ask(pixel_values, regions=regions)


def test_regions_over_another_aspect_are_refused_where_only_features_are_given(model, pixel_values):
    features = model.extract_features(pixel_values)
    with pytest.raises(ValueError, match="over the pixel values"):
        model.ask(feature_maps=features, regions=torch.ones(3, 40, 160))
    whole = model.ask(feature_maps=features, regions=torch.ones(3, 32, 32))
    torch.testing.assert_close(whole, model.ask(pixel_values), atol=1e-4, rtol=1e-4)


def test_arrays_lists_and_other_types_ask_the_same(model, pixel_values):
    features = model.extract_features(pixel_values)
    mask = np.zeros((3, 160, 160), bool)
    mask[:, 20:90, 30:140] = True
    region = torch.from_numpy(mask).float()
    weight = torch.zeros(1, *features[-1].shape[-2:])
    weight[0, 1, 2] = 1
    hidden = [True, False, False, False]
    same = [
        (
            dict(regions=region),
            [dict(regions=form) for form in (mask, mask[:, ::-1][:, ::-1], region.bfloat16(), mask.astype(int))],
        ),
        (dict(layer_mask=torch.tensor(hidden)), [dict(layer_mask=hidden), dict(layer_mask=np.array(hidden))]),
        (
            dict(layers=-1, location_weights=[None, None, None, weight]),
            [
                dict(layers=-1, location_weights=[None, None, None, form])
                for form in (weight.numpy(), weight.tolist(), weight.double())
            ],
        ),
        (
            dict(layers=-1, locations=[(1, 2)], window=3),
            [
                dict(layers=np.int64(-1), locations=np.array([[1, 2]]), window=np.int64(3)),
                dict(layers=-1, locations=torch.tensor([[1, 2]]), window=torch.tensor(3)),
            ],
        ),
    ]
    for asked, others in same:
        expected = model.ask(pixel_values, **asked)
        for other in others:
            torch.testing.assert_close(model.ask(pixel_values, **other), expected)
    torch.testing.assert_close(model.ask(pixel_values.numpy()), model.ask(pixel_values))
    torch.testing.assert_close(model.ask(feature_maps=tuple(maps.numpy() for maps in features)), model.ask(pixel_values))


BAD_FORMS = [
    (dict(location_weights=[None]), "location_weights must hold one for each"),
    (dict(layers=-1, location_weights=[None] * 3 + [torch.zeros(0, 5, 5)]), "have the shape"),
    (dict(layers=-1, location_weights=[None] * 3 + [torch.full((1, 5, 5), NAN)]), "sum to one"),
    (dict(window=3), "give locations, too"),
    (dict(num_beams=0), "num_beams=0"),
    (dict(max_new_tokens=0), "max_new_tokens=0"),
    (dict(max_new_tokens=-1), "max_new_tokens=-1"),
    (dict(max_length=-1), "max_length=-1"),
    (dict(num_return_sequences=0), "num_return_sequences=0"),
    (dict(max_new_tokens=2.5), "max_new_tokens=2.5"),
    (dict(input_ids=torch.ones(1, 1)), "input_ids"),
    (dict(max_new_tokns=5), "max_new_tokns"),
]


@pytest.mark.parametrize(("question", "text"), BAD_FORMS)
def test_what_would_be_ignored_or_mean_something_else_is_refused(model, pixel_values, question, text):
    with pytest.raises((ValueError, TypeError), match=text):
        model.generate(pixel_values, **question)


def test_describe_and_attribute_refuse_what_they_would_ignore(model, pixel_values, phrases):
    with pytest.raises(ValueError, match="descriptions are of images alone"):
        model.describe(pixel_values, input_ids=phrases["input_ids"])
    with pytest.raises(ValueError, match="give locations, too"):
        model.describe(pixel_values, window=3)
    with pytest.raises(ValueError, match=r"'layer1'.*not asked for"):
        model.attribute(pixel_values, phrases, layers="layer2", window={"layer1": 3})
    with pytest.raises(ValueError, match="chunk_size=0"):
        model.attribute(pixel_values, phrases, chunk_size=0)
    with pytest.raises(TypeError, match="phrases must come from"):
        model.attribute(pixel_values, phrases["input_ids"])
    with pytest.raises(ValueError, match="floating-point"):
        model.extract_features(torch.zeros(1, 3, 160, 160, dtype=torch.uint8))


def test_words_of_tokens_that_hold_several_add_up():
    class Pieces:
        pieces = (" ", "in the ", "snow. A ", "do", "g ", "runs")

        def decode(self, tokens, skip_special_tokens=True):
            return "".join(self.pieces[token] for token in tokens)

    words = word_evidence(Pieces(), [(token, 1.0) for token in range(6)])
    assert [word for word, _ in words] == ["in", "the", "snow.", "A", "dog", "runs"]
    assert [nats for _, nats in words] == [1.5, 0.5, 0.5, 0.5, 2.0, 1.0]


def test_what_spells_a_special_token_is_text(processor):
    tokenizer = processor.tokenizer
    for special in tokenizer.all_special_tokens:
        ids = processor(text=[f"red {special}"])["input_ids"][0]
        assert not set(ids.tolist()) & set(tokenizer.all_special_ids)
        assert tokenizer.decode(ids) == f"red {special}"


def test_settings_of_a_call_that_would_move_the_crop_and_unknown_ones_are_refused(processor, images):
    for wrong in (dict(crop_mode="squash"), dict(crop_pct=1.0), dict(crop_size=32), dict(carier="the")):
        with pytest.raises(TypeError, match=next(iter(wrong))):
            processor(images=images, text=["red"], **wrong)
        with pytest.raises(TypeError, match=next(iter(wrong))):
            processor(text=["red"], **wrong)
    with pytest.raises(ValueError, match="padding=False"):
        processor(text=["red"], padding=False)
    for length in (-1, 0, 2.5):
        with pytest.raises(ValueError, match="max_length="):
            processor(text=["red dog"], max_length=length)
    plain = processor(images=images, text=["red", "a red circle"])
    usual = processor(images=images, text=["red", "a red circle"], padding=True, truncation=True, return_tensors="pt")
    assert all(torch.equal(plain[name], usual[name]) for name in plain)


def test_maps_lie_where_the_processors_own_settings_put_the_crop(processor, images):
    moved = copy.deepcopy(processor)
    moved.image_processor.crop_size, moved.image_processor.crop_pct, moved.image_processor.crop_mode = 64, 1.0, "squash"
    assert moved(images=images)["pixel_values"].shape[-2:] == (64, 64)
    maps = AttributionOutput(maps={"a": torch.rand(1, 1, 4, 4)}, measure="sum")
    placed = moved.post_process_attribution(maps, images=images[0])["a"][0]
    assert placed.shape == (1, 96, 128) and not placed.isnan().any()  # squashed: nothing lies outside of the crop


def test_masks_of_any_type_are_regions_and_others_are_refused(processor):
    mask = np.zeros((96, 128), bool)
    mask[10:50, 20:60] = True
    expected = processor.masks_to_regions([mask])
    for form in (torch.from_numpy(mask).bfloat16(), mask[::-1][::-1], mask.astype(np.uint8), mask.tolist()):
        torch.testing.assert_close(processor.masks_to_regions([form]), expected)
    for wrong in (mask * 255, mask - 2.0, np.full((4, 4), NAN)):
        with pytest.raises(ValueError, match=r"masks must lie in \[0, 1\]"):
            processor.masks_to_regions([wrong])
    with pytest.raises(TypeError, match="masks must be"):
        processor.masks_to_regions([Image, "mask"])


@torch.no_grad()
@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 0.5), (torch.float16, 0.1)])
def test_half_precision_scores_stay_within_bounds(model, pixel_values, phrases, dtype, bound):
    half = copy.deepcopy(model).to(dtype)
    exact, rough = (m.score(pixel_values, **phrases).log_probs.float() for m in (model, half))
    assert (exact - rough).abs().max() < bound * phrases["attention_mask"].sum(dim=1).max()
    exact, rough = (m.attribute(pixel_values, phrases, measure="per_token").maps["layer4"].float() for m in (model, half))
    assert (exact - rough).abs().max() < 4 * bound
    assert (
        half.describe(pixel_values, max_new_tokens=3).sequences.shape
        == model.describe(pixel_values, max_new_tokens=3).sequences.shape
    )


@torch.no_grad()
def test_a_batch_says_what_its_images_say_alone(model, pixel_values, phrases):
    batch = model.score(pixel_values, **phrases).log_probs
    alone = torch.cat([model.score(one[None], **phrases).log_probs for one in pixel_values])
    torch.testing.assert_close(batch, alone, atol=1e-4, rtol=1e-5)
    maps = model.attribute(pixel_values, phrases, layers=-1).maps["layer4"]
    singly = torch.cat([model.attribute(one[None], phrases, layers=-1).maps["layer4"] for one in pixel_values])
    torch.testing.assert_close(maps, singly, atol=1e-4, rtol=1e-5)
    words = model.generate(pixel_values, max_new_tokens=5)
    for row, one in zip(words, pixel_values, strict=True):
        said = model.generate(one[None], max_new_tokens=5)[0]
        assert row[: len(said)].tolist() == said.tolist()
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        torch.testing.assert_close(model.score(pixel_values, **phrases).log_probs, batch, atol=1e-4, rtol=1e-5)
    finally:
        torch.set_num_threads(threads)


def test_a_long_description_is_decoded_without_a_foreign_warning(model, tokenizer, pixel_values, capfd):
    from devil_hf import DevilModel

    language_model = copy.deepcopy(model.language_model)
    language_model.config.pad_token_id = tokenizer.pad_token_id  # finished rows are filled with it
    padded = DevilModel.from_backbone_and_language_model(model.backbone, language_model, tokenizer=tokenizer, **SMALL_TRANSLATOR)
    padded.language_model.transformer.warn_if_padding_and_no_attention_mask(torch.zeros(1, 1, dtype=torch.long), None)
    padded.generate(pixel_values, max_new_tokens=30)
    assert "attention_mask" not in capfd.readouterr().err
