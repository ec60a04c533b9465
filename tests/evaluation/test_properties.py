"""Statistics equal naive loops and scipy, metrics take any text, and files of strangers give results or one error."""

import json
import math

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from devil_hf.evaluation.results import Evaluation, judge_controls, read_evaluations
from devil_hf.evaluation.tables import table
from devil_hf.evaluation.text.metrics import caption_scores
from devil_hf.evaluation.text.tokens import ptb_tokens
from devil_hf.evaluation.text.words import WordCounts
from devil_hf.statistics import Ratio, bootstrap, bootstrap_draws, false_discovery, interval, rank_correlation, ratio
from tests.hostile import TEXTS

NUMBERS = st.floats(-100, 100, allow_nan=False).map(lambda value: round(value, 3))
COUNTS = st.integers(1, 12)


@given(st.lists(NUMBERS, min_size=1, max_size=12), st.data())
def test_a_ratio_and_its_draws_are_sums_over_images(values, data):
    weights = data.draw(st.lists(st.integers(0, 3), min_size=len(values), max_size=len(values)))
    draws, own = bootstrap_draws(len(values), 50), Ratio(np.array(values), np.array(weights, dtype=float))
    for draw, found in zip(draws, own.over(draws), strict=True):
        below = sum(times * weight for times, weight in zip(draw, weights, strict=True))
        above = sum(times * value for times, value in zip(draw, values, strict=True))
        assert found == pytest.approx(above / below, abs=1e-9) if below else math.isnan(found)
    assert (own.interval(draws) is None) == (sum(map(bool, weights)) < 2)
    assert (bootstrap(values, weights, 50) is None) == (sum(map(bool, weights)) < 2)


@given(st.lists(NUMBERS | st.just(math.nan), min_size=1, max_size=20))
def test_an_interval_is_of_the_draws_that_are_numbers(values):
    known = [value for value in values if not math.isnan(value)]
    found = interval(np.array(values))
    assert found is None if not known else found == pytest.approx(tuple(np.quantile(known, (0.025, 0.975))))


@given(arrays(float, (3, 4), elements=st.floats(0, 9)), arrays(float, (3, 4), elements=st.integers(0, 3).map(float)))
def test_a_ratio_of_parts_is_the_mean_of_those_that_there_are(values, weights):
    for row, found in enumerate(ratio(values, weights)):
        parts = [value / weight for value, weight in zip(values[row], weights[row], strict=True) if weight]
        assert found == pytest.approx(np.mean(parts)) if parts else math.isnan(found)


@given(st.lists(st.tuples(NUMBERS, NUMBERS), min_size=1, max_size=20))
def test_a_rank_correlation_is_scipys(pairs):
    one, other = zip(*pairs, strict=True)
    found = rank_correlation(one, other)
    if len(set(one)) < 2 or len(set(other)) < 2:
        assert math.isnan(found)
    else:
        assert found == pytest.approx(scipy.stats.spearmanr(one, other).statistic, abs=1e-9)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=20))
def test_false_discoveries_are_those_of_benjamini_and_hochberg(p):
    order = np.argsort(p)
    naive, least = np.empty(len(p)), 1.0
    for rank in range(len(p), 0, -1):
        least = min(least, p[order[rank - 1]] * len(p) / rank)
        naive[order[rank - 1]] = least
    assert false_discovery(p) == pytest.approx(naive)


ODD = TEXTS | st.sampled_from(
    ["", " ", "...", "🐶🐶", "一只狗 在草地上", "a\nb", "word " * 10_000, "x" * 10_000, "'" * 500, "a.b." * 200]
)


@given(st.lists(st.tuples(ODD, st.lists(ODD, min_size=1, max_size=3)), min_size=1, max_size=3))
def test_metrics_of_any_text_are_numbers_within_their_range(pairs):
    said, references = zip(*pairs, strict=True)
    scores = caption_scores(said, references, ["bleu", "rouge_l"] if any(len(text) > 9_000 for text in said) else None)
    reasons = scores.pop("missing", {})
    assert set(reasons) <= {"cider"}
    for name, value in scores.items():
        assert 0 <= value <= (10.0001 if name == "cider" else 1.0001), (name, value)


@given(ODD)
def test_tokens_of_any_text_hold_no_space_and_words_of_it_no_error(text):
    assert all(token and not any(c in " \n\t" for c in token) for token in ptb_tokens(text))
    counts = WordCounts({"word", "a"})
    counts.add(text, {"a"})
    assert counts.recall in (0.0, 1.0) and (counts.precision is None) == (counts.said == 0)


@given(st.dictionaries(TEXTS, st.dictionaries(st.sampled_from(["cider", "rouge_l"]), NUMBERS), min_size=1, max_size=4))
def test_a_table_has_a_line_for_each_row(rows):
    rows = {" ".join(name.split()): values for name, values in rows.items()}
    lines = table(rows, ["cider", "rouge_l"]).splitlines()
    shown = [value for values in rows.values() for value in values.values()]
    assert all(any(f"{value:.3f}" in line for line in lines) for value in shown)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXTS | st.just("\ud800"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=6,
)
ROWS = st.dictionaries(TEXTS, st.dictionaries(TEXTS, NUMBERS | st.none() | JSON, max_size=2) | JSON, max_size=2)
LAYOUT = st.fixed_dictionaries(
    {"scores": ROWS},
    optional={
        "title": JSON,
        "controls": ROWS,
        "dataset": st.fixed_dictionaries({"name": JSON}, optional={"id": JSON, "split": JSON, "size": JSON}) | JSON,
        "settings": JSON,
        "verdict": st.fixed_dictionaries({"passed": JSON, "reason": JSON}) | JSON,
        "missing": st.dictionaries(TEXTS, JSON, max_size=2) | JSON,
        "weights": JSON,
    },
)
OLD = st.fixed_dictionaries({"description_f1": ROWS}, optional={"pointing": ROWS, "chance_pointing": JSON, "weights": JSON})


@given(content=LAYOUT | OLD | JSON | st.lists(LAYOUT, max_size=2))
def test_a_file_of_a_stranger_gives_results_or_an_error_that_names_it(content, tmp_path_factory):
    file = tmp_path_factory.getbasetemp() / "strange-scores.json"
    file.write_text(json.dumps(content))
    try:
        found = read_evaluations(file)
    except ValueError as error:
        said = str(error)
        assert str(file) in said and len(said) < 500 + 2 * len(str(file))
        return
    for evaluation in found:
        record = json.loads(json.dumps(evaluation.as_record(), allow_nan=False))
        assert all(math.isfinite(value) for row in record["scores"].values() for value in row.values())
        json.dumps(evaluation.as_record(), ensure_ascii=False).encode()
        assert all(math.isfinite(result.metric_value) for result in evaluation.model_index())
    judge_controls(found)


def test_results_come_back_as_they_were_written(tmp_path):
    evaluation = Evaluation(
        "t", {"all": {"cider": 0.5}}, {"null": {"cider": 0.25}}, {"name": "photos", "size": 3}, missing={"spice": "no Java"}
    )
    evaluation.write(tmp_path / "scores.json")
    assert read_evaluations(tmp_path / "scores.json") == [evaluation]
