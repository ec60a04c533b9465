"""What a DeViL model promises: every fast path equals a naive loop, frozen parts stay frozen, bad input gets a clear error."""

import pytest
import torch
from torch.nn import functional as F
from transformers import GenerationConfig, TextIteratorStreamer

from devil_hf import DevilConfig
from devil_hf.build.models import _special_tokens
from devil_hf.model.pooling_devil import pool, pool_every_location, region_weights, window_weights
from devil_hf.model.translator_devil import Translator
from devil_hf.training.draws import layer_dropout, location_dropout
from tests.conftest import SMALL_TRANSLATOR


def naive_log_probs(model, prefix, tokens):
    """Per-token log-probabilities of one phrase under one prefix (1, k, D), by one plain forward pass."""
    embedding = model.language_model.get_input_embeddings()
    bos = embedding(torch.tensor([[model.config.bos_token_id]]))
    embeds = torch.cat([bos, prefix, embedding(tokens[None])], dim=1)
    logits = model.language_model(inputs_embeds=embeds).logits[0].log_softmax(dim=-1)
    first = 1 + prefix.shape[1] - 1
    return torch.stack([logits[first + i, token] for i, token in enumerate(tokens)])


def naive_prefix(model, feature_maps, layer, weights):
    """Prefix of one question with every layer's token computed and the others masked."""
    pooled = [
        torch.einsum("chw,hw->c", maps[0], weights if i == layer else torch.ones_like(maps[0, 0]))[None]
        for i, maps in enumerate(feature_maps)
    ]
    mask = torch.tensor([[i != layer for i in range(len(feature_maps))]])
    return model.translator(pooled, mask)


def rows(phrases):
    return [ids[mask.bool()] for ids, mask in zip(phrases["input_ids"], phrases["attention_mask"], strict=True)]


@torch.no_grad()
def test_attribution_equals_one_location_at_a_time(model, pixel_values, phrases):
    maps = model.attribute(pixel_values[:1], phrases, measure="sum").maps
    features = model.extract_features(pixel_values[:1])
    for layer, name in enumerate(model.layer_names[-2:], start=len(model.layer_names) - 2):
        H, W = features[layer].shape[-2:]
        for row, column in [(0, 0), (H - 1, W // 2), (H // 2, W - 1)]:
            weights = torch.zeros(H, W)
            weights[row, column] = 1
            prefix = naive_prefix(model, features, layer, weights)
            for k, tokens in enumerate(rows(phrases)):
                expected = naive_log_probs(model, prefix, tokens).sum()
                torch.testing.assert_close(maps[name][0, k, row, column], expected, atol=1e-4, rtol=1e-5)


@torch.no_grad()
def test_measures_are_the_sum_its_mean_and_its_gain_over_the_null_prefix(model, pixel_values, phrases):
    ask = {"layers": -1, "feature_maps": model.extract_features(pixel_values)}
    total, mean, evidence = (
        model.attribute(phrases=phrases, measure=measure, **ask).maps[model.layer_names[-1]]
        for measure in ("sum", "per_token", "evidence")
    )
    lengths = phrases["attention_mask"].sum(dim=1)[None, :, None, None]
    null = torch.stack([naive_log_probs(model, model.null_prefix(), tokens).sum() for tokens in rows(phrases)])
    torch.testing.assert_close(mean, total / lengths)
    torch.testing.assert_close(evidence, (total - null[None, :, None, None]) / lengths, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_chunks_do_not_change_a_map(model, pixel_values, phrases):
    whole = model.attribute(pixel_values, phrases, layers=-2).maps
    chunked = model.attribute(pixel_values, phrases, layers=-2, chunk_size=3).maps
    torch.testing.assert_close(whole, chunked, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_carrier_is_read_but_not_scored(model, processor, pixel_values):
    phrases = processor(text=["dog", "green grass"], carrier="the", return_tensors="pt")
    scores = model.score(pixel_values, **phrases, layers=-1)
    prefix = model.ask(pixel_values[:1], layers=-1)
    for k, tokens in enumerate(rows(phrases)):
        scored = phrases["scored_mask"][k][: len(tokens)].bool()
        assert not scored.all()
        expected = naive_log_probs(model, prefix, tokens)[scored].sum()
        torch.testing.assert_close(scores.log_probs[0, k], expected, atol=1e-4, rtol=1e-5)


@torch.no_grad()
def test_all_layers_combined(model, pixel_values, phrases):
    features = model.extract_features(pixel_values[:1])
    joint = model.attribute(phrases=phrases, feature_maps=features, combine="joint", measure="sum").maps["joint"]
    finest = max((tuple(maps.shape[-2:]) for maps in features), key=lambda grid: grid[0] * grid[1])
    assert tuple(joint.shape) == (1, 4, *finest)
    pooled = [F.interpolate(maps, finest, mode="bilinear")[:, :, 1, 2] for maps in features]
    expected = naive_log_probs(model, model.translator(pooled), rows(phrases)[0]).sum()
    torch.testing.assert_close(joint[0, 0, 1, 2], expected, atol=1e-4, rtol=1e-5)

    alone = model.attribute(phrases=phrases, feature_maps=features).maps
    mean = model.attribute(phrases=phrases, feature_maps=features, combine="mean").maps["mean"]
    expected = torch.stack([F.interpolate(one, finest, mode="bilinear") for one in alone.values()]).mean(dim=0)
    torch.testing.assert_close(mean, expected)


def test_dense_pooling_equals_location_weights():
    maps = torch.randn(2, 5, 4, 6)
    places = [(row, column) for row in range(4) for column in range(6)]
    for window in (1, 3, 7):
        expected = pool(maps, window_weights(places, (4, 6), window))
        torch.testing.assert_close(pool_every_location(maps, window), expected)


def test_region_weights_sum_to_one_and_flag_what_vanishes():
    masks = torch.zeros(1, 2, 32, 32)
    masks[0, 0, 8:16, 8:24] = 1
    weights, empty = region_weights(masks, (4, 4))
    assert empty.tolist() == [[False, True]]
    torch.testing.assert_close(weights.sum(dim=(2, 3)), torch.ones(1, 2))
    assert weights[0, 0, 1, 1] > 0.2 and weights[0, 0, 3, 3] == 0


@pytest.mark.parametrize("schedule", ["constant", "log_uniform"])
def test_location_dropout_is_uniform_over_a_subset_that_is_never_empty(schedule):
    torch.manual_seed(0)
    weights = location_dropout(4000, [(3, 4)], 0.5, schedule, 0.25)[0].flatten(1)
    kept = (weights > 0).sum(dim=1)
    assert kept.min() >= 1 and kept.max() == 12
    torch.testing.assert_close(weights.sum(dim=1), torch.ones(4000))
    torch.testing.assert_close(weights.max(dim=1).values, 1 / kept.float())
    few, whole = (kept == 1).float().mean().item(), (kept == 12).float().mean().item()
    if schedule == "constant":
        assert abs(kept.float().mean().item() - 6.0) < 0.3 and few < 0.01
    else:
        assert 0.08 < few < 0.16 and 0.2 < whole < 0.33
    assert location_dropout(5, [(3, 4)], 1.0, "constant", 0.25)[0].gt(0).flatten(1).sum(dim=1).tolist() == [1] * 5
    assert location_dropout(5, [(1, 1)], 0.5, schedule, 0.25)[0].flatten().tolist() == [1.0] * 5


def test_an_image_shown_whole_is_whole_in_every_layer():
    torch.manual_seed(0)
    first, second = location_dropout(2000, [(8, 8), (6, 6)], 0.5, "log_uniform", 0.25)
    whole = (first > 0).flatten(1).all(dim=1)
    assert 0.2 < whole.float().mean() < 0.3
    assert (second > 0).flatten(1).all(dim=1)[whole].float().mean() > 0.9


def test_layers_are_all_hidden_only_where_the_null_prefix_is_drawn():
    torch.manual_seed(0)
    hidden = layer_dropout(4000, 3, 0.5, null_probability=0.0)
    assert not hidden.all(dim=1).any()
    assert abs(hidden.float().mean().item() - (0.5 - 0.125 / 3)) < 0.02
    assert not layer_dropout(50, 3, 1.0, 0.0).all(dim=1).any()
    drawn = layer_dropout(4000, 3, 0.5, null_probability=0.2).all(dim=1).float().mean().item()
    assert abs(drawn - 0.2) < 0.03


def test_all_layers_are_shown_as_often_as_asked():
    torch.manual_seed(0)
    hidden = layer_dropout(4000, 3, 0.9, null_probability=0.1, all_layers_probability=0.6)
    shown = (~hidden).all(dim=1).float().mean().item()
    assert abs(shown - 0.9 * (0.6 + 0.4 * 0.1**2)) < 0.03  # the last layer always stays, the other two seldom
    assert abs(hidden.all(dim=1).float().mean().item() - 0.1) < 0.02
    whole = location_dropout(4000, [(5, 5)], 0.5, "log_uniform", 0.7)[0].flatten(1).gt(0).all(dim=1)
    assert abs(whole.float().mean().item() - (0.7 + 0.3 * 0.006)) < 0.03


@torch.no_grad()
def test_leaving_hidden_layers_out_equals_masking_them(model, pixel_values):
    features = model.extract_features(pixel_values)
    pooled = [maps.mean(dim=(2, 3)) for maps in features]
    mask = torch.zeros(3, len(pooled), dtype=torch.bool)
    mask[:, [0, 2]] = True
    masked = model.translate(pooled, mask)
    left_out = model.translate([None if i in (0, 2) else vectors for i, vectors in enumerate(pooled)])
    torch.testing.assert_close(masked, left_out, atol=1e-5, rtol=1e-5)
    every_layer_hidden = model.translate(pooled, torch.ones_like(mask))
    torch.testing.assert_close(every_layer_hidden, model.null_prefix().expand(3, -1, -1), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_loss_is_the_mean_over_caption_tokens_and_eos(model, processor, pixel_values):
    captions = processor(text=["a red dog", "the cat on grass", "a"], return_tensors="pt")
    output = model(pixel_values, **captions)
    losses = []
    for index, tokens in enumerate(rows(captions)):
        prefix = model.ask(pixel_values[index : index + 1])
        tokens = torch.cat([tokens, torch.tensor([model.config.eos_token_id])])
        losses.append(-naive_log_probs(model, prefix, tokens))
    torch.testing.assert_close(output.loss, torch.cat(losses).mean(), atol=1e-5, rtol=1e-5)
    padded = F.pad(captions["input_ids"], (0, 3)), F.pad(captions["attention_mask"], (0, 3))
    torch.testing.assert_close(model(pixel_values, *padded).loss, output.loss, atol=1e-5, rtol=1e-5)


def test_captions_read_in_groups_of_like_length_have_the_loss_and_gradients_of_one_padded_batch(model, processor, pixel_values):
    import copy

    words = ["a", "red dog", "the cat on grass", "a red dog and the cat on the grass"]
    captions = processor(text=[words[i % 4] for i in range(70)], return_tensors="pt")  # three groups
    pixel_values = pixel_values.repeat(24, 1, 1, 1)[:70]
    gradients, losses = [], []
    for training in (False, True):
        one = copy.deepcopy(model).train(training)
        given = {
            "location_weights": [None] * len(model.layer_names),
            "layer_mask": torch.zeros(len(model.layer_names), dtype=bool),
        }
        output = one(pixel_values, **captions, **given)
        assert (output.logits is None) == training
        output.loss.backward()
        losses.append(output.loss.detach())
        gradients.append([parameter.grad for parameter in one.translator.parameters()])
    torch.testing.assert_close(losses[1], losses[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(gradients[1], gradients[0], atol=1e-6, rtol=1e-4)


def test_training_changes_the_translator_and_nothing_else(model, processor, pixel_values):
    import copy

    trained = copy.deepcopy(model).train()
    assert not trained.backbone.training and not trained.language_model.training
    before = {name: tensor.clone() for name, tensor in trained.state_dict().items()}
    captions = processor(text=["a red dog", "the cat", "grass"], return_tensors="pt")
    optimizer = torch.optim.SGD([p for p in trained.parameters() if p.requires_grad], lr=0.1)
    trained(pixel_values, **captions).loss.backward()
    assert {name.split(".")[0] for name, p in trained.named_parameters() if p.grad is not None} == {"translator"}
    optimizer.step()
    changed = {name for name, tensor in trained.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed and all(name.startswith("translator.") for name in changed)


@torch.no_grad()
def test_greedy_generation_equals_an_argmax_loop(model, pixel_values):
    generated = model.generate(pixel_values[:1], layers=-1, max_new_tokens=6)
    embedding = model.language_model.get_input_embeddings()
    prefix = model.ask(pixel_values[:1], layers=-1)
    sequence = torch.cat([embedding(torch.tensor([[model.config.bos_token_id]])), prefix], dim=1)
    expected = []
    for _ in range(generated.shape[1]):
        token = model.language_model(inputs_embeds=sequence).logits[:, -1].argmax(dim=-1)
        expected.append(token.item())
        sequence = torch.cat([sequence, embedding(token)[None]], dim=1)
    assert generated[0].tolist() == expected


def test_beams_sampling_and_streaming_are_the_librarys(model, processor, pixel_values):
    assert model.generate(pixel_values, num_beams=3, max_new_tokens=4).shape[0] == 3
    torch.manual_seed(0)
    sampled = model.generate(pixel_values[:1], do_sample=True, num_return_sequences=4, max_new_tokens=4)
    assert sampled.shape[0] == 4
    streamer = TextIteratorStreamer(processor.tokenizer, skip_special_tokens=True)
    ids = model.generate(pixel_values[:1], max_new_tokens=5, streamer=streamer)
    assert "".join(streamer).strip() == processor.batch_decode(ids, skip_special_tokens=True)[0].strip()


def test_guidance_of_one_is_plain_decoding_and_of_zero_ignores_the_image(model, pixel_values):
    plain = model.generate(pixel_values, layers=-1, max_new_tokens=6)
    torch.testing.assert_close(model.generate(pixel_values, layers=-1, max_new_tokens=6, guidance=1.0), plain)
    nothing = model.generate(pixel_values, layers=-1, max_new_tokens=6, guidance=0.0)
    null = model.decode(model.null_prefix(), max_new_tokens=6)
    assert all(row.tolist()[: null.shape[1]] == null[0].tolist() for row in nothing)
    assert not torch.equal(plain, model.generate(pixel_values, layers=-1, max_new_tokens=6, guidance=5.0))


@torch.no_grad()
def test_describe_equals_asking_one_by_one(model, pixel_values):
    places = [(0, 0), (1, 2)]
    output = model.describe(pixel_values, layers=[-1, -2], locations=places, max_new_tokens=5, evidence=True)
    assert len(output.sequences) == 2 * 3 * 2 and output.layer_of(0) == model.layer_names[-1]
    for row in range(len(output.sequences)):
        image, place = int(output.image_index[row]), tuple(output.locations[row].tolist())
        alone = model.generate(pixel_values[image : image + 1], layers=output.layer_of(row), locations=[place], max_new_tokens=5)[
            0
        ]
        assert output.sequences[row].tolist()[: len(alone)] == alone.tolist()
        prefix = model.ask(pixel_values[image : image + 1], layers=output.layer_of(row), locations=[place])
        tokens = output.sequences[row][model.word_mask(output.sequences)[row]]
        expected = naive_log_probs(model, prefix, tokens) - naive_log_probs(model, model.null_prefix(), tokens)
        torch.testing.assert_close(output.token_evidence[row][: len(tokens)], expected, atol=1e-4, rtol=1e-4)


def test_describe_covers_layers_and_every_location(model, pixel_values):
    whole = model.describe(pixel_values, max_new_tokens=3)
    assert [whole.layer_of(i) for i in range(0, len(whole.sequences), 3)] == ["all", *model.layer_names]
    dense = model.describe(pixel_values[:1], layers=-1, locations="all", max_new_tokens=3)
    H, W = model.extract_features(pixel_values[:1])[-1].shape[-2:]
    assert dense.locations.tolist() == [[row, column] for row in range(H) for column in range(W)]


def test_several_sequences_per_question_keep_their_question(model, pixel_values):
    torch.manual_seed(0)
    sampled = {"do_sample": True, "num_return_sequences": 2, "max_new_tokens": 3}
    output = model.describe(pixel_values, layers=[-1, "all"], **sampled)
    assert output.image_index.tolist() == [0, 0, 1, 1, 2, 2] * 2
    assert len(output.sequences) == len(output.layer_index) == len(output.locations) == 12
    with pytest.raises(ValueError, match="num_return_sequences"):
        model.describe(pixel_values, layers=-1, evidence=True, **sampled)


@torch.no_grad()
def test_a_direction_is_described_as_a_pooled_feature(model, pixel_values):
    feature = model.extract_features(pixel_values)[-1].mean(dim=(2, 3))
    expected = model.generate(pixel_values, layers=-1, max_new_tokens=4)
    output = model.describe_directions(feature, layer=-1, max_new_tokens=4)
    assert output.sequences.tolist() == expected.tolist()


@torch.no_grad()
def test_a_region_of_the_whole_image_is_the_whole_image_and_an_empty_one_is_nothing(model, pixel_values):
    H, W = pixel_values.shape[-2:]
    full, empty = torch.ones(3, H, W), torch.zeros(3, H, W)
    torch.testing.assert_close(model.ask(pixel_values, regions=full), model.ask(pixel_values), atol=1e-4, rtol=1e-4)
    nothing = model.ask(pixel_values, regions=empty)
    torch.testing.assert_close(nothing, model.null_prefix().expand(3, -1, -1), atol=1e-5, rtol=1e-5)


def test_the_same_seed_trains_the_same(model, processor, pixel_values):
    import copy

    captions = processor(text=["a red dog", "the cat", "grass"], return_tensors="pt")

    def losses():
        torch.manual_seed(7)
        trained = copy.deepcopy(model).train()
        optimizer = torch.optim.AdamW(trained.translator.parameters(), lr=1e-3)
        result = []
        for _ in range(3):
            loss = trained(pixel_values, **captions).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            result.append(loss.item())
        return result

    assert losses() == losses()


BAD_QUESTIONS = [
    (dict(layers="layer9"), ValueError, "layer9"),
    (dict(layers=17), (ValueError, IndexError), "17"),
    (dict(layers=-1, locations=[(99, 0)]), ValueError, r"\(99, 0\) is outside"),
    (dict(layers=-1, locations=[(0, 0)], window=2), ValueError, "window=2"),
    (dict(locations=[(0, 0)]), ValueError, "one grid"),
    (dict(max_new_tokens=4000), ValueError, "max_new_tokens"),
    (dict(max_length=4000), ValueError, "max_new_tokens"),
    (dict(layers=-1, locations=[]), ValueError, "empty"),
    (dict(layers=-1, locations=(0, 0)), ValueError, "pairs"),
    (dict(layers=-1, locations=[(0.5, 0)]), ValueError, "pairs"),
    (dict(layers=-1, locations=[(0, 0)], regions=torch.ones(3, 8, 8)), ValueError, "one of them"),
    (dict(regions=torch.ones(2, 8, 8)), ValueError, "for 3 images"),
    (dict(layer_mask=torch.zeros(7, 9)), ValueError, "layer_mask"),
    (dict(attention_mask=torch.ones(1, 1)), ValueError, "attribute"),
]


@pytest.mark.parametrize(("question", "error", "text"), BAD_QUESTIONS)
def test_bad_questions_get_a_clear_error(model, pixel_values, question, error, text):
    with pytest.raises(error, match=text):
        model.generate(pixel_values, **question)


def test_bad_phrases_and_pixels_get_a_clear_error(model, pixel_values, phrases):
    with pytest.raises(ValueError, match="input_ids"):
        model.attribute(pixel_values)
    with pytest.raises(ValueError, match="shorten that phrase"):
        model.attribute(pixel_values, {"input_ids": torch.ones(1, 200, dtype=torch.long)})
    with pytest.raises(ValueError, match="no token to score"):
        model.score(pixel_values, torch.ones(1, 2, dtype=torch.long), torch.zeros(1, 2, dtype=torch.long))
    with pytest.raises(ValueError, match="measure='loud'"):
        model.attribute(pixel_values, phrases, measure="loud")
    with pytest.raises(ValueError, match="expected"):
        model.generate(torch.zeros(1, 3, 0, 64))


def test_location_weights_must_be_a_distribution(model, pixel_values):
    features = model.extract_features(pixel_values)
    weights = [torch.ones(1, *maps.shape[-2:]) for maps in features]
    with pytest.raises(ValueError, match="sum to one"):
        model.generate(feature_maps=features, location_weights=weights)
    with pytest.raises(ValueError, match="shape"):
        model.generate(feature_maps=features, location_weights=[maps[:, :1] for maps in weights])
    even = [one / one.sum() for one in weights]
    torch.testing.assert_close(
        model.ask(feature_maps=features, location_weights=even), model.ask(pixel_values), atol=1e-4, rtol=1e-4
    )


def test_a_generation_config_is_followed(model, pixel_values):
    asked = GenerationConfig(max_new_tokens=3, do_sample=False)
    assert model.generate(pixel_values, generation_config=asked).shape[1] <= 3
    assert model.generate(pixel_values).shape[1] <= 64 - 5


def test_a_layer_mask_per_image_covers_its_questions(model, pixel_values):
    mask = torch.zeros(3, len(model.layer_names), dtype=torch.bool)
    mask[1, :-1] = True
    regions = torch.ones(3, 2, *pixel_values.shape[-2:])
    found = model.ask(pixel_values, regions=regions, layer_mask=mask)
    alone = model.ask(pixel_values[1:2], layers=-1)
    torch.testing.assert_close(found[2:4], alone.expand(2, -1, -1), atol=1e-4, rtol=1e-4)


def test_features_that_are_not_finite_are_reported_not_decoded(model, pixel_values, phrases):
    broken = pixel_values.clone()
    broken[1, :, 3, 3] = float("nan")
    for verb in (
        lambda: model.generate(broken),
        lambda: model.attribute(broken, phrases),
        lambda: model.describe(broken),
    ):
        with pytest.raises(ValueError, match="not finite"):
            verb()


def test_the_shortcut_adds_linear_maps_of_the_visible_layers():
    torch.manual_seed(0)
    channels, width = [5, 7, 3], 16
    config = DevilConfig(**SMALL_TRANSLATOR, translator_shortcut=True, normalize_features=True)
    translator = Translator(channels, width, config)
    translator.reset_parameters()
    pooled = [torch.randn(4, c) for c in channels]
    mask = torch.tensor([[False, False, False], [True, False, True], [False, True, False], [True, True, True]])
    plain = translator(pooled, mask)  # shortcuts begin at zero
    for shortcut in translator.shortcuts:
        torch.nn.init.normal_(shortcut.weight)
    expected = plain.clone()
    for row in range(4):
        visible = [at for at in range(3) if not mask[row, at]]
        for at in visible:
            feature = translator.feature_norms[at](pooled[at][row])
            expected[row] += (translator.shortcuts[at].weight @ feature).view(-1, width)
    torch.testing.assert_close(translator(pooled, mask), expected)
    # A layer that is hidden everywhere is as good as one that was never computed.
    alone = translator([None, pooled[1], None])
    torch.testing.assert_close(alone[1], translator(pooled, mask)[1])
    assert translator([None] * 3, rows=2).shape == (2, config.prefix_length, width)


def test_a_combination_rule_registered_from_outside_is_one_everywhere(model, pixel_values, phrases, monkeypatch):
    from devil_hf.evaluation.maps.combining import combine_maps, map_combinations
    from devil_hf.model.explaining_devil import COMBINATIONS, register_combination, resize_to_finest

    monkeypatch.setitem(COMBINATIONS, "highest", None)  # taken out again afterwards

    @register_combination("highest")
    def highest(maps, evidence):
        return torch.stack(resize_to_finest(maps)).amax(dim=0)

    assert map_combinations() == ["informed", "mean", "highest"]
    layers = model.attribute(pixel_values, phrases).maps
    found = model.attribute(pixel_values, phrases, combine="highest").maps["highest"]
    assert torch.equal(found, combine_maps(layers, "highest"))
    assert (found >= combine_maps(layers, "mean") - 1e-6).all()


@pytest.mark.parametrize("name", ["bos_token_id", "eos_token_id", "pad_token_id"])
def test_a_special_token_that_the_language_model_does_not_have_is_refused_before_it_is_looked_up(model, name):
    settings = model.config.to_dict()
    size = model.config.text_config.vocab_size
    for token in (size, 10**9):
        with pytest.raises(ValueError, match=rf"{name}={token} is none of the {size} tokens of the language model"):
            type(model.config).from_dict(settings | {name: token})
    assert getattr(type(model.config).from_dict(settings | {name: size - 1}), name) == size - 1
    assert getattr(type(model.config).from_dict(settings | {name: -1}), name) is None, "some say so of what they do not have"
    assert getattr(type(model.config)(**{name: 10**9}), name) == 10**9, "there is no vocabulary to compare it with"


def test_minus_one_stands_for_no_token(model):
    text_config = type(model.config.text_config)(bos_token_id=1, eos_token_id=[2, 3], pad_token_id=-1)
    assert _special_tokens(None, text_config) == {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None}
