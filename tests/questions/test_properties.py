"""Whatever questions are asked: an answer whose numbers are finite, or an error that names what is wrong with the question."""

import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from devil_hf.questions.choices import ask, fit_scale
from devil_hf.questions.emergence import evidence_by_layer
from devil_hf.questions.word_evidence import explain_words
from tests.model.test_properties import ANYTHING, LAYERS, answered

WORDS = st.one_of(st.sampled_from(["red", "dog", "a red dog", "", " ", "{}", "red <pad>", "\ud800"]), st.text(max_size=5))
TEXTS = st.one_of(st.lists(WORDS, max_size=3), ANYTHING)
GRIDS = st.one_of(st.none(), st.integers(-1, 3), ANYTHING)


@given(question=st.one_of(st.sampled_from(["the {} dog", "a"]), WORDS, ANYTHING), choices=TEXTS, layers=LAYERS, grid=GRIDS)
@torch.no_grad()
def test_any_choices(question, choices, layers, grid, model, processor, images):
    names = ["question", "choice", "layer", "grid"]
    answers = answered(lambda: ask(model, processor, images[0], question, choices, layers, grid), names)
    for one in answers or []:
        assert all(map(math.isfinite, one.evidence.values())) and abs(sum(one.habit.values()) - 1) < 1e-4
        assert (one.choice is None) == (one.probabilities is None) and one.choice in (None, *one.evidence)


@given(asked=st.lists(st.tuples(st.lists(st.floats(-50, 50), min_size=2, max_size=4), st.sampled_from([0, 1, None])), max_size=6))
def test_any_answers_give_a_scale_that_can_be_read_again(asked):
    scale = answered(lambda: fit_scale([one for one, _ in asked], [answer for _, answer in asked]), ["answer"])
    if scale is not None:
        shares = scale.probabilities(torch.tensor(asked[0][0], dtype=torch.float64))
        assert torch.isfinite(shares).all() and type(scale)(**vars(scale)) == scale


@given(phrases=TEXTS, layers=LAYERS, carrier=st.one_of(st.none(), WORDS))
@torch.no_grad()
def test_any_phrases_by_layer(phrases, layers, carrier, model, processor, pixel_values):
    names = ["phrase", "text", "layer", "carrier"]
    found = answered(lambda: evidence_by_layer(model, processor, pixel_values, phrases, layers, carrier), names)
    assert found is None or all(torch.isfinite(values).all() for values in found.values())


@given(sentences=TEXTS, layers=LAYERS)
@torch.no_grad()
def test_any_sentences_are_explained(sentences, layers, model, processor, pixel_values):
    names = ["sentence", "phrase", "text", "layer", "word"]
    found = answered(lambda: explain_words(model, processor, pixel_values[:1], sentences=sentences, layers=layers), names)
    for one in found or []:
        assert all(math.isfinite(word.evidence) for word in one.words)
