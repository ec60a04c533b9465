"""Caption metrics are the COCO toolkit's, and what cannot be had is named."""

import json
import os
import random
import shutil
import sys
from pathlib import Path
from statistics import fmean

import evaluate
import pytest

import devil_hf
from devil_hf.evaluation.results import metric_name
from devil_hf.evaluation.text.metrics import CAPTION_METRICS, CaptionScorer, caption_metric, caption_scores
from devil_hf.evaluation.text.ngrams import CiderD, bleu, rouge_l
from devil_hf.evaluation.text.tokens import ptb_tokens

METRICS_FOLDER = Path(devil_hf.__file__).parent / "evaluation" / "text" / "hub_metrics"
PREDICTIONS = ["a black dog runs on the grass", "two children play in the water", "a man rides a bike"]
REFERENCES = [
    ["A black dog is running on grass .", "The dog's running over the grass ."],
    ["Two children are playing in the water .", "Kids play in the sea"],
    ["A man rides a bike .", "A cyclist on a dirt road\nin the hills ."],
]
# Kinds of writing that captions hold, each of which the tokeniser has a rule for.
ODD = """
A man doesn't see the dog's ball, it's gone; they're sure he'd've said "no".
It’s “quoted” and ‘half quoted’, don’t you think? Hawai'i, o'clock, rock'n'roll, '90s, y'all, 'tis ma'am.
A black-and-white t-shirt (size 10) costs $5.50 or £3 -- 20% off -- with 1,000 others at 10:30am, 5 p.m.
Mr. Smith of St. Louis, U.S.A. stands at No. 5 Main St. near a 12-foot-tall tree, e.g. an oak etc.
A sign [that reads] "STOP!!" and/or 'Go': AT&T, B&B, #1 @ the café… wow?!
He cannot, gonna, wanna go: www.example.com a@b.org 555-1234 1/2 cup of ½ milk 24/7
A dog.The cat sits , the dog runs . 3-4-year-old girls' 6' 2" x-ray—half – way 90's 1st 5x7 35mm f/2.8
<b>bold</b> {x} a*b ~ ^ | a_b = + 10° 50¢ €5 &amp; 日本 ñandú STRASSE ÉCOLE
""".strip().splitlines()


def _toolkit(predictions, references):
    """BLEU, ROUGE-L and CIDEr of tokens, by pycocoevalcap."""
    pytest.importorskip("pycocoevalcap.bleu")
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    results = {index: [" ".join(tokens)] for index, tokens in enumerate(predictions)}
    truths = {index: [" ".join(tokens) for tokens in texts] for index, texts in enumerate(references)}
    values, _ = Bleu(4).compute_score(truths, results, verbose=0)
    return [*values, Rouge().compute_score(truths, results)[0], Cider().compute_score(truths, results)[0]]


def _corpus(seed, images, captions, words=12, empty=False):
    rng = random.Random(seed)

    def text(least):
        return [f"w{min(int(rng.expovariate(0.3)), words)}" for _ in range(rng.randint(least, 14))]

    predictions = [text(0 if empty else 1) for _ in range(images)]
    return predictions, [[text(1) for _ in range(rng.randint(1, captions))] for _ in range(images)]


@pytest.mark.parametrize(
    ("predictions", "references"),
    [
        _corpus(0, 50, 5),
        _corpus(1, 20, 1),
        _corpus(2, 1, 3),
        _corpus(3, 40, 7, words=3, empty=True),
        ([[]], [[["a", "dog"]]]),
        ([[], ["a"]], [[["a"]], [["a"], ["b", "c"]]]),
        ([["a"]] * 3, [[["x", "y"]]] * 3),
        ([["a", "b", "a", "b"]], [[["a", "b"]]]),
    ],
)
def test_bleu_rouge_and_cider_are_the_toolkits_on_the_same_tokens(predictions, references):
    found = [
        *bleu(predictions, references),
        fmean(rouge_l(predictions, references)),
        fmean(CiderD(references)(predictions)),
    ]
    assert found == pytest.approx(_toolkit(predictions, references), abs=1e-6)


@pytest.fixture(scope="session")
def toolkit_tokens():
    if shutil.which("java") is None:
        pytest.skip("the toolkit's tokeniser needs Java")
    tokenizer = pytest.importorskip("pycocoevalcap.tokenizer.ptbtokenizer").PTBTokenizer

    def tokenize(texts):
        # The toolkit answers line by line, and cuts at ends of sentences, which must not reach into the next caption.
        rows = tokenizer().tokenize({index: [{"caption": " ".join(text.split())}] for index, text in enumerate(texts)})
        return [rows[index][0].split() for index in range(len(texts))]

    return tokenize


def test_tokens_of_odd_captions_are_the_toolkits(toolkit_tokens):
    assert [ptb_tokens(text) for text in ODD] == toolkit_tokens(ODD)


@pytest.mark.shared_data
def test_tokens_and_scores_of_real_captions_are_the_toolkits(toolkit_tokens):
    root = Path(os.environ["DEVIL_SHARED_DATA"]) / "captions"
    rows = [
        json.loads(line)["captions"]
        for name in ("flickr8k", "coco")
        for line in (root / name / "captions.jsonl").read_text().splitlines()
    ]
    texts = [text for captions in rows for text in captions]
    found = [ptb_tokens(text) for text in texts]
    agreed = sum(one == other for one, other in zip(found, toolkit_tokens(texts), strict=True))
    assert agreed >= 0.999 * len(texts)
    tokens = [[ptb_tokens(text) for text in captions] for captions in rows]
    predictions, references = [captions[0] for captions in tokens], [captions[1:] for captions in tokens]
    scores = [
        *bleu(predictions, references),
        fmean(rouge_l(predictions, references)),
        fmean(CiderD(references)(predictions)),
    ]
    assert scores == pytest.approx(_toolkit(predictions, references), abs=1e-6)


def test_scores_end_to_end_are_within_half_a_point_of_the_toolkits(toolkit_tokens):
    predictions, references = (
        [*PREDICTIONS, *ODD],
        [*REFERENCES, *([odd, REFERENCES[0][0]] for odd in ODD[1:] + ODD[:1])],
    )
    flat = toolkit_tokens([text for texts in references for text in texts])
    truths = [[flat.pop(0) for _ in texts] for texts in references]
    expected = _toolkit(toolkit_tokens(predictions), truths)
    scores = caption_scores(predictions, references)
    assert list(scores) == ["bleu_1", "bleu_2", "bleu_3", "bleu_4", "rouge_l", "cider"]
    assert list(scores.values()) == pytest.approx(expected, abs=0.005)


@pytest.mark.slow
def test_meteor_is_the_toolkits_where_there_is_java(toolkit_tokens):
    scorer = CaptionScorer(REFERENCES, ["meteor"])  # one program for both
    right, wrong = scorer(PREDICTIONS)["meteor"], scorer(PREDICTIONS[1:] + PREDICTIONS[:1])["meteor"]
    assert wrong < 0.5 * right and 0.2 < right < 1


def test_what_is_missing_is_named_with_its_remedy_and_the_rest_is_computed(monkeypatch):
    monkeypatch.setattr("devil_hf.evaluation.text.java.shutil.which", lambda name: None)
    monkeypatch.setitem(sys.modules, "bert_score", None)
    scores = caption_scores(PREDICTIONS, REFERENCES, list(CAPTION_METRICS))
    missing = scores.pop("missing")
    assert set(missing) == {"meteor", "spice", "bertscore"}
    assert all("install" in reason for reason in missing.values())
    assert scores == caption_scores(PREDICTIONS, REFERENCES)
    assert scores["cider"] > 1 and caption_scores(PREDICTIONS, REFERENCES, ["bleu_4"]).keys() == {"bleu_4"}


def test_bertscore_of_an_unreachable_model_is_named():
    pytest.importorskip("bert_score")
    scores = caption_scores(PREDICTIONS, REFERENCES, ["bertscore", "bleu_1"])
    assert "bleu_1" in scores and "local directory" in scores["missing"]["bertscore"]


def test_a_metric_is_added_by_one_function(monkeypatch):
    monkeypatch.setattr(CAPTION_METRICS, "_entries", dict(CAPTION_METRICS))

    @caption_metric("words", {"words": "mean number of words"})
    def count_words(references):
        return lambda predictions: [fmean(len(tokens) for tokens in predictions.tokens)]

    assert caption_scores(PREDICTIONS, REFERENCES)["words"] == fmean(len(text.split()) for text in PREDICTIONS)
    assert metric_name("words") == "mean number of words" and metric_name("bleu_4") == "BLEU-4"


@pytest.mark.parametrize(
    ("predictions", "references", "metrics", "message"),
    [
        (["a"], [["a"]], ["blue"], r"unknown metrics \['blue'\].*meteor"),
        (["a"], [["a"]], [], "choose from"),
        (["a"], [], ["bleu"], "1 predictions for 0"),
        (["a", "b"], [["a"]], ["cider"], "2 predictions for 1"),
        ([], [], ["bleu"], "at least one"),
        (["a"], [[]], ["bleu"], r"references\[0\]"),
        (["a"], ["a"], ["bleu"], r"references\[0\] is 'a'"),
    ],
)
def test_bad_score_requests_are_refused(predictions, references, metrics, message):
    with pytest.raises(ValueError, match=message):
        caption_scores(predictions, references, metrics)


def test_a_scorer_of_fixed_references_says_the_same_again_and_again():
    scorer = CaptionScorer(REFERENCES)
    assert scorer(PREDICTIONS) == scorer(PREDICTIONS) == caption_scores(PREDICTIONS, REFERENCES)
    with pytest.raises(ValueError, match="1 predictions for 3"):
        scorer(["a dog"])


def test_evaluate_loads_the_metrics_offline_from_their_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate.config, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("socket.socket.connect", None)
    loaded = {name: evaluate.load(str(METRICS_FOLDER / name), cache_dir=str(tmp_path)) for name in CAPTION_METRICS}
    found = {}
    for name in ("bleu", "rouge_l", "cider"):
        found |= loaded[name].compute(predictions=PREDICTIONS, references=REFERENCES)
    assert found == pytest.approx(caption_scores(PREDICTIONS, REFERENCES))
    monkeypatch.setattr("devil_hf.evaluation.text.java.shutil.which", lambda name: None)
    with pytest.raises(RuntimeError, match="install a Java"):
        loaded["meteor"].compute(predictions=PREDICTIONS, references=REFERENCES)
