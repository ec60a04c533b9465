"""The head word is what a phrase calls its thing, by a rule that anybody can follow."""

import pytest

from devil_hf.evaluation.text.head_words import head_word, singular


@pytest.mark.parametrize(
    ("phrase", "head"),
    [
        ("A small girl", "girl"),
        ("two young girls in blue", "girl"),
        ("a man wearing sunglasses", "man"),
        ("a man dressed in black", "man"),
        ("a group of people", "group"),
        ("people", "person"),
        ("a black and white dog", "dog"),
        ("a black and a white dog", "dog"),
        ("a small, brown dog", "dog"),
        ("a red striped star", "star"),
        ("a large cross that is plain", "cross"),
        ("a dog runs through the grass .", "dog"),
        ("two dogs run on a beach", "dog"),
        ("a hot dog stand", "stand"),
        ("a white building", "building"),
        ("there is a cat on the mat", "cat"),
        ("a picture of a horse", "horse"),
        ("a boy's face", "face"),
        ("the man 's hat", "hat"),
        ("Children , women and men", "child"),
        ("the top of the hill", "hill"),
        ("red", "red"),
        ("two", "two"),
        ("", None),
        (" . ", None),
    ],
)
def test_the_head_word_of_a_phrase(phrase, head):
    assert head_word(phrase) == head


@pytest.mark.parametrize(
    ("several", "one"),
    [
        *(
            ("dogs", "dog"),
            ("horses", "horse"),
            ("benches", "bench"),
            ("dresses", "dress"),
            ("boxes", "box"),
            ("puppies", "puppy"),
        ),
        *(
            ("movies", "movie"),
            ("ties", "tie"),
            ("shoes", "shoe"),
            ("tomatoes", "tomato"),
            ("leaves", "leaf"),
            ("women", "woman"),
        ),
    ],
)
def test_one_and_several_of_a_thing_have_one_head_word(several, one):
    assert singular(several) == singular(one) == one


@pytest.mark.parametrize("word", ["grass", "bus", "tennis", "dog", "glass", "gas"])
def test_words_that_are_no_plural_stay_apart_from_others(word):
    assert singular(word) == word
