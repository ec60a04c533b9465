"""What is removed is what a naive loop finds, the network runs without it, and a planted class falls with its channel."""

import pytest
import timm
import torch

from devil_hf import DevilModel, DevilProcessor
from devil_hf.build import image_processor_of
from devil_hf.questions.knock_out import LinearProbe, check_probe, fit_probe, knock_out, own_head
from tests.conftest import SMALL_TRANSLATOR

PHRASE = "a dog"


@pytest.fixture(scope="module")
def maps(model, pixel_values):
    return model.extract_features(pixel_values)


def last_channels(model, pixels):
    """A classifier with a channel a class."""
    return model.extract_features(pixels)[-1].mean(dim=(2, 3))


def ask(model, processor, pixels, classifier=last_channels, layer=-1, **options):
    options = {"number": 2, "draws": 9, "others": pixels} | options
    return knock_out(model, processor, pixels, [PHRASE], [0], classifier, layer, **options)[0]


def test_drops_of_channels_are_those_of_a_naive_loop(model, processor, pixel_values, maps):
    found = ask(model, processor, pixel_values)
    phrase = processor(text=PHRASE, return_tensors="pt")
    own, mean = maps[-1], maps[-1].mean(dim=(0, 2, 3))

    def score(features):
        return model.score(**phrase, layers=-1, feature_maps=[*maps[:-1], features]).log_probs[:, 0]

    for channel in (0, 3, own.shape[1] - 1):
        without = own.clone()
        without[:, channel] = mean[channel]
        assert float(found.drops[channel]) == pytest.approx(float((score(own) - score(without)).mean()), abs=1e-4)
    assert set(found.removed.tolist()) == set(found.drops.argsort(descending=True)[:2].tolist())


def test_drops_of_places_are_those_of_a_naive_loop(model, processor, pixel_values, maps):
    found = ask(model, processor, pixel_values, what="places")
    phrase = processor(text=PHRASE, return_tensors="pt")
    own, mean = maps[-1], maps[-1].mean(dim=(0, 2, 3))
    whole = model.score(**phrase, layers=-1, feature_maps=maps).log_probs[:, 0]
    without = own.clone()
    without[:, :, 0, 1] = mean
    gone = model.score(**phrase, layers=-1, feature_maps=[*maps[:-1], without]).log_probs[:, 0]
    torch.testing.assert_close(found.drops[:, 1], whole - gone, atol=1e-4, rtol=1e-4)
    assert found.removed.shape == (len(pixel_values), 2)


def test_the_network_itself_runs_without_what_is_removed_and_is_whole_again(model, processor, pixel_values, maps):
    """The logits of the channels that are removed are their means, all others are as they were, and deeper layers hear of it."""
    pixels, mean = pixel_values, maps[-1].mean(dim=(0, 2, 3))
    width = maps[-1].shape[1]
    seen = []

    def watched(model, part):
        seen.append(model.extract_features(part))
        return seen[-1][-1].mean(dim=(2, 3))

    found = knock_out(model, processor, pixels, [PHRASE], [0], watched, -1, pixels, number=2, draws=1)[0]
    removed = found.removed.tolist()
    whole, _, changed, _ = (one[-1].mean(dim=(2, 3)) for one in seen)
    torch.testing.assert_close(changed[:, removed], mean[removed].expand(len(pixels), -1))
    rest = [channel for channel in range(width) if channel not in removed]
    torch.testing.assert_close(changed[:, rest], whole[:, rest])
    live = int(whole.std(dim=0).argmax())
    (earlier,) = knock_out(model, processor, pixels, [PHRASE], [live], last_channels, 0, pixels, number=8, draws=4)
    assert earlier.random.abs().max() > 1e-5, "what is removed early changes what is late"
    for before, after in zip(maps, model.extract_features(pixels), strict=True):
        torch.testing.assert_close(before, after)


def test_a_planted_class_falls_with_the_channels_of_its_phrase_and_no_other_does(model, processor, pixel_values):
    """Classes that read exactly the channels of the highest, and of the lowest, drops."""
    drops = ask(model, processor, pixel_values[:1], others=pixel_values).drops
    pooled = last_channels(model, pixel_values)
    top, low, idle = drops.argsort(descending=True)[:2], drops.argsort()[:2], drops.abs().argsort()[:2]
    assert not set(low.tolist()) & set(idle.tolist()), "some channels speak against the phrase"
    weight = torch.zeros(3, pooled.shape[1])
    toward = (pooled[0] - pooled.mean(dim=0)).sign()
    weight[0, top], weight[1, low], weight[2, idle] = toward[top], toward[low], 1.0
    probe = LinearProbe(weight, torch.zeros(3))
    found = ask(model, processor, pixel_values[:1], probe, others=pixel_values, draws=199)
    assert found.fall > 0 and found.others == pytest.approx(0, abs=1e-5) and found.least == pytest.approx(0, abs=1e-5)
    assert found.ratio >= 3 and found.p_value <= 0.05
    of_low, of_idle = (
        knock_out(model, processor, pixel_values[:1], [PHRASE], [at], probe, -1, pixel_values, number=2, draws=1)[0]
        for at in (1, 2)
    )
    assert of_low.least == pytest.approx(0, abs=1e-5), "what speaks against the phrase is not what it owes nothing to"
    lost = float((pooled[0] - pooled.mean(dim=0))[idle].sum())
    assert of_idle.least == pytest.approx(lost, abs=1e-5)
    assert set(found.as_record()) >= {"phrase", "drops", "removed", "fall", "random", "ratio", "p_value"}


def test_channels_are_chosen_on_some_images_and_judged_on_others(model, processor, pixel_values):
    others = pixel_values.flip(3) + 0.1
    both = torch.cat([pixel_values, others])
    choosing = torch.arange(6) < 3
    choice = ask(model, processor, pixel_values, others=both)
    found = ask(model, processor, both, others=both, choosing=choosing)
    torch.testing.assert_close(found.drops, choice.drops)
    assert found.removed.tolist() == choice.removed.tolist()
    # Judged by images that had no part in it: the mean fall of their logit, by hand.
    mean, at = last_channels(model, both).mean(dim=0)[0], 0 in found.removed.tolist()
    fall = float((last_channels(model, others)[:, 0] - mean).mean()) if at else 0.0
    assert found.fall == pytest.approx(fall, abs=1e-5)
    own = int(found.removed[0])  # a class of a channel that is removed
    (told,) = knock_out(model, processor, both, [PHRASE], [own], last_channels, -1, both, number=2, draws=1, choosing=choosing)
    pooled = last_channels(model, both)[:, own]
    assert told.fall == pytest.approx(float(pooled[3:].mean() - pooled.mean()), abs=1e-5)
    assert told.fall != pytest.approx(float(pooled[:3].mean() - pooled.mean()), abs=1e-5)


def test_a_probe_tells_what_its_labels_tell(model, pixel_values):
    images = torch.cat([pixel_values, pixel_values + 1.0])
    labels = torch.tensor([[False], [False], [False], [True], [True], [True]])
    probe = fit_probe(model, images, labels)
    assert ((probe(model, images) > 0) == labels).all()
    with pytest.raises(ValueError, match=r"classes \[0\] need images with and without"):
        fit_probe(model, images, labels | True)
    assert check_probe(probe, model, images[3:], images[:3]) == 1
    with pytest.raises(ValueError, match=r"the probe is right in 50% of 3 and 3 other images, which chance explains"):
        check_probe(probe, model, images[:3], images[:3])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"number": 10_000}, "remove at most half"),
        ({"number": 0}, "number"),
        ({"draws": 0}, "draws"),
        ({"layer": "layer9"}, "layer9"),
        ({"present": torch.zeros(1, 3)}, r"must name an image .* not for \['a dog'\]"),
        ({"present": torch.ones(2, 3)}, r"expected \(1, 3\)"),
        (
            {"present": torch.tensor([[1, 1, 0]]), "choosing": torch.tensor([1, 1, 0])},
            "among those that choose and among those that are judged",
        ),
        ({"choosing": torch.ones(3)}, "some to judge"),
        ({"choosing": torch.tensor([1, 0])}, "some to judge"),
        ({"choosing": torch.tensor([1, 0, 0]), "what": "places"}, "leave choosing out"),
        ({"classifier": own_head}, "no head of its own"),
    ],
)
def test_what_cannot_be_removed_is_said(model, processor, pixel_values, options, message):
    with pytest.raises(ValueError, match=message):
        ask(model, processor, pixel_values, **options)


def test_images_are_chosen_by_lists_as_by_tensors(model, processor, pixel_values):
    lists = ask(model, processor, pixel_values, choosing=[True, False, True], present=[[True, True, False]])
    tensors = {"choosing": torch.tensor([True, False, True]), "present": torch.tensor([[True, True, False]])}
    assert lists.fall == ask(model, processor, pixel_values, **tensors).fall
    for name in ("choosing", "present"):
        with pytest.raises(TypeError, match=f"{name} must be a tensor, an array or nested lists"):
            ask(model, processor, pixel_values, **{name: [[True], [True, False]]})


def test_a_word_that_the_language_model_does_not_know_is_refused(pixel_values):
    from devil_hf.checkpoints.loading import load

    own, its = load("shapes", "cpu")
    with pytest.raises(ValueError, match=r"phrases \['a red hospital'\] hold words that this checkpoint's language model"):
        knock_out(own, its, pixel_values, ["a red hospital"], [0], last_channels, -1, pixel_values)


def test_a_class_and_a_phrase_each(model, processor, pixel_values):
    with pytest.raises(ValueError, match="2 classes for 1 phrases"):
        knock_out(model, processor, pixel_values, [PHRASE], [0, 1], last_channels, -1, pixel_values)
    with pytest.raises(ValueError, match=r"classes \[9999\]: the classifier has"):
        knock_out(model, processor, pixel_values, [PHRASE], [9999], last_channels, -1, pixel_values)


@pytest.mark.parametrize("what", ["channels", "places"])
def test_tokens_of_a_transformer_are_removed_and_its_own_head_is_read(sources, tokenizer, images, what):
    torch.manual_seed(4)
    network = timm.create_model("test_vit", num_classes=5).eval()
    layers = ["blocks.0", "blocks.3"]
    model = DevilModel.from_backbone_and_language_model(
        network, sources["language_model"], layers, tokenizer=tokenizer, **SMALL_TRANSLATOR
    ).eval()
    processor = DevilProcessor(image_processor_of(model.config.backbone_config["data_config"]), tokenizer)
    pixels = processor(images=images, return_tensors="pt")["pixel_values"]
    seen = []

    def watched(model, part):
        seen.append(model.extract_features(part)[0])
        return own_head(model, part)

    found = knock_out(model, processor, pixels, [PHRASE], [2], watched, "blocks.0", pixels, what=what, number=3, draws=2)[0]
    whole, mean = seen[0].flatten(2), seen[0].mean(dim=(0, 2, 3))
    gone = torch.zeros(whole.shape, dtype=torch.bool)
    for row, units in enumerate(found.removed.expand(len(pixels), -1)):
        gone[(row, units) if what == "channels" else (row, slice(None), units)] = True
    torch.testing.assert_close(seen[3].flatten(2), torch.where(gone, mean[:, None], whole), atol=1e-5, rtol=1e-4)
    with torch.no_grad():
        assert own_head(model, pixels).shape == (3, 5)
    assert found.random.abs().max() > 0
