"""MILANNOTATIONS: both layouts, splits without pickled code, and a table whose rows an independent computation confirms."""

import csv
import json
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from devil_hf.cli.main import main
from devil_hf.data.exemplar_set import Unit
from devil_hf.data.milan import BASE, SPLITS, MilanUnits, open_milan, read_annotations, read_split
from devil_hf.evaluation import milan as milannotations
from devil_hf.evaluation.evaluator import evaluate
from devil_hf.evaluation.milan import MilanSettings, label_scores
from devil_hf.evaluation.results import judge_controls, read_evaluations
from devil_hf.evaluation.text.bertscore import BertScore, BertScoreSettings
from devil_hf.evaluation.text.metrics import caption_scores
from devil_hf.training.units import unit_captions

KEYS = [("layer1", 0), ("layer1", 3), ("layer2", 1), ("layer2", 2), ("layer2", 7)]
SUMMARIES = ["a red dog", "Red things, mostly", "the dog"]


@pytest.fixture(scope="module")
def units():
    generator = torch.Generator().manual_seed(0)
    return [
        Unit(
            layer,
            unit,
            torch.randint(0, 256, (15, 3, 32, 32), generator=generator, dtype=torch.uint8),
            torch.rand(15, 32, 32, generator=generator) > 0.7,
            tuple(f"{text} {unit}" for text in SUMMARIES),
        )
        for layer, unit in KEYS
    ]


def by_hand(units, folder, layout):
    """A miniature as it is handed out, written without our writer."""
    folder.mkdir(parents=True)
    with (folder / "annotations.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["layer", "unit", "summary"])
        for unit in units:
            table.writerows([unit.layer, unit.unit, text] for text in unit.summaries)
    for layer in ("layer1", "layer2"):
        (folder / layer).mkdir()
        own = [unit for unit in units if unit.layer == layer]
        images = np.stack([unit.images.numpy() for unit in own])
        masks = np.stack([unit.masks[:, None].numpy().astype(np.uint8) for unit in own])
        if layout == "per_layer":
            np.save(folder / layer / "images.npy", images)
            np.save(folder / layer / "masks.npy", masks)
            np.save(folder / layer / "units.npy", np.array([unit.unit for unit in own]))
        else:
            for unit, image, mask in zip(own, images, masks, strict=True):
                np.save(folder / layer / f"images_{unit.unit}.npy", image)
                np.save(folder / layer / f"masks_{unit.unit}.npy", mask)


def same(read, units):
    assert len(read) == len(units)
    for at, unit in enumerate(units):
        one = read[at]
        assert (one.layer, one.unit, one.summaries) == (unit.layer, unit.unit, unit.summaries)
        assert torch.equal(one.images, unit.images) and torch.equal(one.masks, unit.masks)


@pytest.mark.parametrize("layout", ["per_unit", "per_layer"])
def test_both_layouts_are_read(units, layout, tmp_path):
    by_hand(units, tmp_path / "given", layout)
    same(MilanUnits(tmp_path / "given"), units)


def test_every_split_of_the_paper_has_its_name():
    kinds = Counter(name.split("-")[0] for name in SPLITS)
    assert kinds["within"] == kinds["without"] == 6
    assert {"alexnet-to-resnet152", "resnet152-to-alexnet", "cnns-to-vit", "imagenet-to-places365"} <= set(SPLITS)
    assert {"places365-to-imagenet", "classifiers-to-generators", "generators-to-classifiers"} <= set(SPLITS)
    for name, split in SPLITS.items():
        assert split.within == name.startswith("within") and (split.within or not set(split.train) & set(split.test))
    assert set(SPLITS["without-biggan-imagenet"].train) == set(BASE) - {("biggan", "imagenet")}
    assert SPLITS["cnns-to-vit"].test == (("dino_vits8", "imagenet"),)


@pytest.mark.parametrize("form", ["pairs", "names", "positions", "json"])
def test_split_files_are_followed(units, form, tmp_path):
    by_hand(units, tmp_path / "alexnet" / "imagenet", "per_layer")
    forms = {
        "pairs": lambda at: KEYS[at],
        "names": lambda at: f"{KEYS[at][0]}-{KEYS[at][1]}",
        "positions": lambda at: at,
        "json": lambda at: list(KEYS[at]),
    }
    content = {"train": [forms[form](at) for at in (0, 2, 4)], "test": [forms[form](at) for at in (1, 3)]}
    stem = tmp_path / "alexnet_imagenet-splits"
    if form == "json":
        stem.with_suffix(".json").write_text(json.dumps(content))
    else:
        torch.save(content, stem.with_suffix(".pth"))
    train, test = open_milan(tmp_path, "within-alexnet-imagenet")
    same(train, [units[at] for at in (0, 2, 4)])
    same(test, [units[at] for at in (1, 3)])
    assert test.summaries == [units[at].summaries for at in (1, 3)]


class Harmful:
    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return (os.mkdir, (str(self.file),))


def test_a_split_file_with_code_is_refused_and_not_run(units, tmp_path):
    file = tmp_path / "alexnet_imagenet-splits.pth"
    torch.save({"train": Harmful(tmp_path / "owned"), "test": []}, file)
    with pytest.raises(ValueError, match="could run code"):
        read_split(file)
    assert not (tmp_path / "owned").exists()


def test_networks_apart_and_missing_files(units, tmp_path):
    for pair in BASE:
        by_hand(units, tmp_path / pair[0] / pair[1], "per_unit")
    train, test = open_milan(tmp_path, "generators-to-classifiers")
    assert (len(train), len(test)) == (10, 20)
    assert len(test.summaries) == 20 and test[19].unit == 7
    with pytest.raises(ValueError, match="cnns-to-vit"):
        open_milan(tmp_path, "unknown")
    with pytest.raises(FileNotFoundError, match="dino_vits8"):
        open_milan(tmp_path, "cnns-to-vit")
    (tmp_path / "alexnet" / "imagenet" / "layer1" / "images_3.npy").unlink()
    with pytest.raises(FileNotFoundError, match="images_3"):
        MilanUnits(tmp_path / "alexnet" / "imagenet")[1]


def test_pickled_arrays_are_refused(units, tmp_path):
    by_hand(units, tmp_path / "given", "per_unit")
    np.save(tmp_path / "given" / "layer1" / "images_0.npy", np.array([Harmful(tmp_path / "owned")], dtype=object))
    with pytest.raises(ValueError, match=r"numbers"):
        MilanUnits(tmp_path / "given")[0]
    assert not (tmp_path / "owned").exists()


def test_annotated_units_train_as_captions(model, processor, units):
    dataset = unit_captions(model, processor, units)
    assert len(dataset) == 5
    item = dataset.sample(2, 0)
    assert item["caption"] in units[2].summaries
    assert [len(vector) for vector in item["pooled_features"]] == model.backbone.channels
    assert len(dataset.every_caption()) == 15


# ------------------------------------------------------------------------------------------------------------ the table

LABELS = ["red dog", "a cat on grass", "red dog", "blue circles", "a green square on the left"]
REFERENCES = [
    ["a red dog", "the red animal", "dogs"],
    ["cats", "green grass", "a cat"],
    ["small blue things", "blue", "blue objects"],
    ["blue circles", "circles", "round shapes that are blue"],
    ["green squares", "a square", "left part of a square"],
]


def rouge(label, references):
    """ROUGE-L as the caption toolkit defines it: the best precision and recall over references, F with beta 1.2."""
    words, scores = label.split(), []
    for reference in references:
        other = reference.split()
        table = np.zeros((len(words) + 1, len(other) + 1), dtype=int)
        for i, a in enumerate(words):
            for j, b in enumerate(other):
                table[i + 1, j + 1] = table[i, j] + 1 if a == b else max(table[i, j + 1], table[i + 1, j])
        scores.append((table[-1, -1] / len(words), table[-1, -1] / len(other)))
    p, r = (max(column) for column in zip(*scores, strict=True))
    return (1 + 1.2**2) * p * r / (r + 1.2**2 * p) if p and r else 0.0


def bleu(labels, references):
    """BLEU-1 over the corpus: clipped unigrams, brevity against the reference closest in length."""
    hits, said, closest = 0, 0, 0
    for label, several in zip(labels, references, strict=True):
        words = label.split()
        allowed = Counter()
        for reference in several:
            allowed |= Counter(reference.split())
        hits += sum((Counter(words) & allowed).values())
        said += len(words)
        closest += min((abs(len(r.split()) - len(words)), len(r.split())) for r in several)[1]
    return hits / said * min(1, np.exp(1 - closest / said))


def test_every_row_of_the_table_is_what_a_few_lines_compute():
    found = label_scores(LABELS, REFERENCES, null="a red square", bert=None)
    rows, constant = found["scores"], found["texts"]["constant"]
    assert list(rows) == ["labels", "constant", "shuffled", "null", "one annotator"] and not found["missing"]
    candidates = {text for texts in REFERENCES for text in texts} | set(LABELS)
    means = {text: np.mean([rouge(text, several) for several in REFERENCES]) for text in candidates}
    assert means[constant] == pytest.approx(max(means.values()))
    for name, texts in (("labels", LABELS), ("constant", [constant] * 5), ("null", ["a red square"] * 5)):
        expected = np.mean([rouge(text, several) for text, several in zip(texts, REFERENCES, strict=True)])
        assert rows[name]["rouge_l"] == pytest.approx(expected)
        assert rows[name]["bleu_1"] == pytest.approx(bleu(texts, REFERENCES), rel=1e-6)
        assert "bertscore" not in rows[name]
    one = [rouge(several[0], several[1:]) for several in REFERENCES]
    assert rows["one annotator"]["rouge_l"] == pytest.approx(np.mean(one))
    assert rows["shuffled"]["rouge_l"] < rows["labels"]["rouge_l"]


@pytest.fixture(scope="module")
def tiny_bert(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bert")
    words = sorted({w for text in [*LABELS, *(t for several in REFERENCES for t in several)] for w in text.split()})
    vocabulary = {word: at for at, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *words])}
    wordlevel = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    wordlevel.pre_tokenizer = pre_tokenizers.Whitespace()
    from tokenizers.processors import TemplateProcessing

    wordlevel.post_processor = TemplateProcessing("[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    PreTrainedTokenizerFast(
        tokenizer_object=wordlevel,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=32,
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
    )
    BertModel(config).eval().save_pretrained(folder)
    return folder


def naive_bert_score(folder, label, several, every_reference):
    """F1 of the best reference: greedy matching of contextual embeddings, weighted by the idf of the references' tokens."""
    tokenizer, bert = PreTrainedTokenizerFast.from_pretrained(folder), BertModel.from_pretrained(folder).eval()
    seen = Counter(token for text in every_reference for token in set(tokenizer(text)["input_ids"]))

    def read(text):
        ids = tokenizer(text)["input_ids"]
        with torch.no_grad():
            vectors = bert(torch.tensor([ids])).last_hidden_state[0]
        weights = [np.log((len(every_reference) + 1) / (seen[token] + 1)) for token in ids]
        weights[0] = weights[-1] = 0.0  # [CLS] and [SEP]
        return torch.nn.functional.normalize(vectors, dim=1), torch.tensor(weights)

    best = -1.0
    for text in several:
        (a, a_weights), (b, b_weights) = read(label), read(text)
        similar = a @ b.T
        precision = (similar.max(dim=1).values * a_weights).sum() / a_weights.sum()
        recall = (similar.max(dim=0).values * b_weights).sum() / b_weights.sum()
        best = max(best, float(2 * precision * recall / (precision + recall)))
    return best


def test_bertscore_is_milans(tiny_bert):
    settings = BertScoreSettings(tiny_bert, layers=2)
    found = BertScore(REFERENCES, settings)(LABELS)
    every = [text for several in REFERENCES for text in several]
    for at in range(5):
        expected = naive_bert_score(tiny_bert, LABELS[at], REFERENCES[at], every)
        assert found[at].item() == pytest.approx(expected, abs=1e-3)
    upper = BertScore(REFERENCES, settings)([label.upper() for label in LABELS])
    torch.testing.assert_close(upper, found)
    with pytest.raises(ValueError, match="how many of its layers"):
        BertScoreSettings(tiny_bert)
    # That of captions, and of labels, is the same measure.
    scores = caption_scores(LABELS, REFERENCES, ["bertscore", "rouge_l"], settings)
    assert scores["bertscore"] == pytest.approx(float(found.mean())) and set(scores) == {"bertscore", "rouge_l"}
    assert label_scores(LABELS, REFERENCES, bert=settings)["scores"]["labels"]["bertscore"] == scores["bertscore"]


def test_without_weights_the_other_metrics_are_still_there(monkeypatch):
    said = []
    monkeypatch.setattr(milannotations.logger, "warning", said.append)
    found = label_scores(LABELS, REFERENCES)
    assert "bertscore" not in found["scores"]["labels"] and found["scores"]["labels"]["cider"] > 0
    assert "local directory" in said[0] and "local directory" in found["missing"]["bertscore"]


def test_evaluate_neurons_prints_the_table(units, tiny_bert, tmp_path, capsys):
    by_hand(units, tmp_path / "alexnet" / "imagenet", "per_unit")
    content = {"train": [0, 1, 2], "test": [3, 4]}
    torch.save(content, tmp_path / "alexnet_imagenet-splits.pth")
    command = ["evaluate", "neurons", "--milan", str(tmp_path), "--split", "within-alexnet-imagenet", "--json"]
    command += ["--train-steps", "2", "--output-dir", str(tmp_path / "run")]
    assert main([*command, "--bert-model", str(tiny_bert), "--bert-layers", "2"]) == 0
    scores = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert scores["settings"]["units"] == 2 and "bertscore" in scores["controls"]["constant"]
    assert (tmp_path / "run" / "checkpoint" / "config.json").is_file()
    assert json.loads((tmp_path / "run" / "scores.json").read_text()) == scores
    (evaluation,) = read_evaluations(tmp_path / "run" / "scores.json")
    # Controls are apart, and what people agree on is no result of the model.
    assert evaluation.title == "Labels of units" and list(evaluation.scores) == ["labels"]
    assert list(evaluation.controls) == ["shuffled", "null", "constant"] and "one annotator" in scores["baselines"]
    assert set(judge_controls([evaluation]).run) == {"constant", "shuffled", "null"}


class Split(list):
    """Units as a split of MILANNOTATIONS has them."""

    names = property(lambda self: [f"{unit.layer} {unit.unit}" for unit in self])
    summaries = property(lambda self: [unit.summaries for unit in self])


def test_labelling_goes_on_where_it_was_stopped(model, processor, units, tmp_path, monkeypatch):
    def label(own, folder, strategy="greedy"):
        monkeypatch.setattr(milannotations, "open_milan", lambda root, split: (None, Split(own)))
        settings = MilanSettings(
            milan=tmp_path,
            split="any",
            strategy=strategy,
            bert_model="none",
            batch_size=2,
            output_dir=tmp_path / folder,
        )
        evaluate("milan", settings, model, processor)
        lines = [json.loads(line) for line in (tmp_path / folder / "labels.jsonl").read_text().splitlines()[1:]]
        return {line["key"]: line["row"] for line in lines}

    whole = label(units, "whole")
    assert [(row["layer"], row["unit"]) for row in whole.values()] == [(unit.layer, unit.unit) for unit in units]
    label(units[:2], "stopped")
    read = []
    features = milannotations.encoded_features

    def counted(model, processor, units):
        units = list(units)
        read.extend(unit.unit for unit in units)
        return features(model, processor, units)

    monkeypatch.setattr(milannotations, "encoded_features", counted)
    # In another order, as of another split, each unit keeps its own label.
    again = label(units[::-1], "stopped")
    assert {key: row["label"] for key, row in again.items()} == {key: row["label"] for key, row in whole.items()}
    assert read == [unit.unit for unit in units[:1:-1]]
    with pytest.raises(ValueError, match="strategy"):
        label(units, "stopped", "beam")


# ---------------------------------------------------------------------------------------------------------- real labels


@pytest.fixture
def milan():
    folder = os.environ.get("DEVIL_SHARED_DATA")
    if not folder:
        pytest.skip("DEVIL_SHARED_DATA does not name the folder of annotations")
    return Path(folder) / "milan"


def read_labels(path: Path, layer: str | None = None) -> dict[tuple[str, int], str]:
    """Labels by (layer, unit) as MILAN, CLIP-Dissect, NetDissect (which counts from 1) and Describe-and-Dissect publish them."""
    labels = {}
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            unit = int(next(row[name] for name in ("unit", "Neuron ID") if name in row))
            label = next(row[name] for name in ("description", "label", "Label 1", "summary") if name in row)
            labels[row.get("layer", layer), unit - ("category" in row and "score" in row)] = label.strip()
    return labels


@pytest.mark.shared_data
def test_real_annotations_and_real_labels_of_four_methods(milan):
    annotations = read_annotations(milan / "MILANNOTATIONS_resnet152_imagenet.csv")
    assert len(annotations) == 3904 and all(len(texts) == 3 for texts in annotations.values())
    labels = read_labels(milan / "MILAN_results" / "m_places365_resnet152_imagenet.csv")
    shared = [key for key in annotations if key in labels]
    assert len(shared) == 3904
    dissect = read_labels(milan / "NetDissect_results" / "resnet50_imagenet_layer1.csv", layer="layer1")
    assert sorted(unit for _, unit in dissect) == list(range(256)) and dissect["layer1", 0] == "purple-c"
    described = read_labels(milan / "DnD_results" / "rn152_results" / "resnet152_imagenet_layer4.csv", layer="layer4")
    assert len(described) == 50 and set(described) <= set(annotations)
    clip = read_labels(milan / "CLIP_Dissect_results" / "resnet152_imagenet.csv")
    assert len(clip) == 200 and set(clip) <= set(annotations)
    few = shared[::40]
    texts, references = [labels[key] for key in few], [annotations[key] for key in few]
    rows = label_scores(texts, references, bert=None)["scores"]
    import re

    lowered = [" ".join(re.findall(r"[a-z]+", text.lower())) for text in texts]
    truths = [[" ".join(re.findall(r"[a-z]+", text.lower())) for text in several] for several in references]
    expected = np.mean([rouge(text, several) for text, several in zip(lowered, truths, strict=True)])
    assert rows["labels"]["rouge_l"] == pytest.approx(expected, abs=0.01)  # the toolkit's tokeniser differs a little
    # What makes the controls worth their place: one constant label scores above a published method's labels.
    assert rows["shuffled"]["rouge_l"] < rows["labels"]["rouge_l"] < rows["constant"]["rouge_l"]
