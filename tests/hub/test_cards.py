"""Cards say what was measured, and as plainly what was not."""

import ast
import json
import re
from html import escape
from html.parser import HTMLParser

import pytest
import torch
import yaml
from huggingface_hub import DatasetCard, ModelCard
from transformers import GPT2Config

from devil_hf import DevilConfig
from devil_hf.build.repositories import hub_id
from devil_hf.evaluation.results import Evaluation, judge_controls, read_evaluations
from devil_hf.hub.cards import model_card
from devil_hf.hub.facts import Examples, Facts, Layer, readable_recipe
from devil_hf.report.templates import card_folder, fenced, markdown

CAPTIONS = {
    "title": "Captions of features",
    "dataset": {"name": "Flickr8k", "id": "jxie/flickr8k", "split": "test", "size": 132},
    "settings": {"num_beams": 1},
    "scores": {"all": {"bleu_4": 0.125, "cider": 0.273}, "layer4": {"bleu_4": 0.131, "cider": 0.29}},
    "controls": {"shuffled": {"bleu_4": 0.063, "cider": 0.094}, "constant": {"bleu_4": 0.057, "cider": 0.158}},
}
QUICKSTART = {
    "description_f1": {"all": {"colour": 0.94, "shape": 0.99}, "layer1": {"colour": 0.87, "shape": 0.51}},
    "pointing": {"layer1": {"colour": 0.97, "shape": 0.3}, "mean": {"colour": 1.0, "shape": 0.75}},
    "chance_pointing": 0.134,
    "pointing_phrases": {"colour": 900, "shape": 700},
    "seconds": 333.0,
}
BEATEN = {
    "title": "Captions of features",
    "scores": {"all": {"bleu_4": 0.125, "cider": 0.1}},
    "controls": {"shuffled": {"bleu_4": 0.063, "cider": 0.2}},
}
HEADINGS = [
    "# devil",
    "## Is it the features that speak?",
    "## Layers",
    "## What it says",
    "## Use",
    "## Evaluation",
    "## Training",
    "## Limits, and how not to read an explanation",
    "## Citation",
]


def read(tmp_path, content):
    path = tmp_path / "results.json"
    path.write_text(json.dumps(content))
    return read_evaluations(path)


def some_facts():
    """The facts of a checkpoint between two parts of the Hub."""
    vision = {
        "kind": "timm",
        "architecture": "resnet50",
        "source": "resnet50.a1_in1k",
        "revision": "abc",
        "sha256": "f00",
    }
    vision |= {"layers": ["layer3", "layer4"], "input_size": [3, 224, 224]}
    config = DevilConfig(
        backbone_config=vision,
        text_config=GPT2Config(n_embd=32, n_layer=1, n_head=2),
        language_model_source={"source": "facebook/opt-125m", "revision": None, "sha256": None},
    )
    layers = [Layer("layer3", 1024, 14, 14, [3, 224, 224]), Layer("layer4", 2048, 7, 7, [3, 224, 224])]
    return Facts("user/devil", config, layers, trained_parameters=88_600_000)


@pytest.fixture
def facts():
    return some_facts()


def test_every_score_reaches_the_model_index(facts, tmp_path):
    facts.evaluations = read(tmp_path, [CAPTIONS, QUICKSTART])
    card = ModelCard(str(model_card(facts)))  # as the Hub reads it
    found = {(r.dataset_name, r.metric_type, r.metric_args["layers"]): r.metric_value for r in card.data.eval_results}
    assert found["Flickr8k", "cider", "layer4"] == 0.29 and found["Flickr8k", "bleu_4", "all"] == 0.125
    assert len(found) == 4 + 4 + 4
    assert {r.dataset_split for r in card.data.eval_results if r.dataset_type == "jxie/flickr8k"} == {"test"}
    assert card.data.model_name == "devil"
    for cell in (
        "| layer4 | 0.131 | 0.29 |",
        "*one constant description* | 0.057 | 0.158",
        "| *chance* | 0.134 | 0.134 |",
    ):
        assert cell in card.text


def test_metadata_and_layers(facts):
    facts.license, facts.datasets = "mit", ["pixparse/cc3m-wds"]
    card = ModelCard(str(model_card(facts)))
    data = card.data
    assert (data.license, data.library_name, data.pipeline_tag) == ("mit", "transformers", "image-to-text")
    assert data.base_model == ["timm/resnet50.a1_in1k", "facebook/opt-125m"] and data.datasets == ["pixparse/cc3m-wds"]
    assert "interpretability" in data.tags
    assert "| 0 | `layer3` | 1024 | 14 x 14 | 16 x 16 |" in card.text
    assert "88,600,000 parameters" in card.text and "revision `abc`" in card.text


def test_what_was_not_measured_is_said(facts):
    text = model_card(facts).text
    assert "**No control was run on this checkpoint.**" in text
    assert "**Not measured.**" in text and "The recipe was not recorded" in text
    facts.published = False
    assert "**Not trained yet.**" in model_card(facts).text


def test_controls_are_judged(facts, tmp_path):
    facts.evaluations = read(tmp_path, CAPTIONS)
    verdict = judge_controls(facts.evaluations)
    assert verdict.status == "passed" and verdict.run == ["constant", "shuffled"]
    assert verdict.missing == ["backbone_randomised", "null", "untrained"]
    text = model_card(facts).text
    assert "**Every control that was run is beaten.**" in text
    assert "CIDEr: 0.273 with the features (all), 0.158 for the best control (one constant description)" in text
    assert "Not run: backbone weights randomised; no features (null prefix); untrained translator." in text
    facts.evaluations = read(tmp_path, BEATEN)
    assert judge_controls(facts.evaluations).status == "failed"  # in CIDEr the shuffled descriptions are better
    assert "do not trust the descriptions" in model_card(facts).text
    # Pointing at random is a level to compare with, and no test of where the words come from.
    assert judge_controls(read(tmp_path, QUICKSTART)).status == "none"
    judged = CAPTIONS | {"controls": {}, "verdict": {"passed": False, "reason": "maps do not change"}}
    verdict = judge_controls(read(tmp_path, judged))
    assert verdict.status == "failed" and "maps do not change" in verdict.findings[0]


def test_a_card_says_what_is_missing(facts, tmp_path):
    Evaluation("Captions", {"all": {"rouge_l": 0.5}}, missing={"cider": "of *one* image"}).write(tmp_path / "scores.json")
    facts.evaluations = read_evaluations(tmp_path / "scores.json")
    card = ModelCard(str(model_card(facts)))
    assert "CIDEr is missing: of \\*one\\* image" in card.text and len(card.data.eval_results) == 1


def test_tables_of_unit_labels_keep_their_controls_apart(facts, tmp_path):
    content = {
        "title": "Labels of units",
        "dataset": {"name": "MILANNOTATIONS", "split": "within-alexnet-imagenet"},
        "scores": {"labels": {"cider": 0.3}},
        "controls": {"constant": {"cider": 0.1}, "shuffled": {"cider": 0.3}, "null": {"cider": 0.3}},
        "baselines": {"one annotator": {"cider": 0.9}},
        "texts": {"constant": "a dog", "null": "the"},
    }
    facts.evaluations = read(tmp_path, content)
    (evaluation,) = facts.evaluations
    assert evaluation.headline == "labels" and evaluation.controls == content["controls"]
    assert judge_controls(facts.evaluations).status == "failed"  # dealt to other units, the labels score the same
    (result,) = ModelCard(str(model_card(facts))).data.eval_results
    assert (result.dataset_name, result.dataset_split) == ("MILANNOTATIONS", "within-alexnet-imagenet")


def test_lora_adapters_are_said_to_be_trained(facts):
    assert "LoRA" not in model_card(facts).text
    facts.config.lora = {"rank": 3}
    text = model_card(facts).text
    assert "LoRA adapters of rank 3" in text and "with its LoRA adapters" in text
    facts.config.frozen_weights = "reference"
    assert "slim: the translator and the LoRA adapters" in model_card(facts).text


def test_files_that_hold_no_results_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"results\.json.*finite"):
        read(tmp_path, {"title": "t", "scores": {"all": {"cider": float("nan")}}})
    with pytest.raises(ValueError, match="holds no results"):
        read(tmp_path, {"loss": 3.0})
    (tmp_path / "text.json").write_text("loss: 3")
    with pytest.raises(ValueError, match="not JSON"):
        read_evaluations(tmp_path / "text.json")


def test_sources_become_hub_ids_where_they_are_on_the_hub(tmp_path):
    assert hub_id("resnet50.a1_in1k") == "timm/resnet50.a1_in1k"
    assert hub_id("hf-hub:user/eye@main") == "user/eye"
    assert hub_id("facebook/dinov2-small") == "facebook/dinov2-small"
    assert hub_id(str(tmp_path)) is None and hub_id(None) is None


def test_a_recipe_tells_no_paths():
    text = "backbone: /home/someone/backbone\nfolders: [/data/flickr8k, coco]\nmax_steps: 7\n"
    assert readable_recipe(text) == "backbone: backbone\nfolders:\n- flickr8k\n- coco\nmax_steps: 7"


def test_half_precision_weights_are_read_as_fp32(facts):
    assert "dtype=" not in model_card(facts).text
    facts.config.dtype = torch.float16
    assert 'from_pretrained(repo, dtype="float32", trust_remote_code=True)' in model_card(facts).text


HOSTILE = [
    "{% endraw %}{{ cycler.__init__.__globals__.os.system('touch ran') }}{% raw %}",
    "{{ 7 * 7 }} {% if %} {# note #}",
    "<script>alert(1)</script> <img src=x onerror=alert(1)> &lt;",
    "a\n---\n# b: [c, *d]\n```\n| e | `f` ``g`` [h](javascript:i) **j** ~~k~~ $l$ \\",
    "# m",
    "1. n",
    "'\"\\: {o: !!python/object/apply:os.system ['touch ran']}",
]


class Text(HTMLParser):
    """What a reader of a page sees, and every tag."""

    def __init__(self):
        super().__init__()
        self.text, self.tags = "", []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)

    def handle_data(self, data):
        self.text += data


def seen(markdown):
    """The text of a card without the marks of Markdown that show it, and the tags of its HTML."""
    page = Text()
    for number, part in enumerate(re.split(r"(?<!\\)`", markdown)):
        literal = escape(part) if number % 2 else re.sub(r"\\([^\w\s]|_)", lambda mark: f"&#{ord(mark[1])};", part)
        page.feed(literal)
    return page.text, [tag for tag in page.tags if tag != "code"]


@pytest.mark.parametrize("text", HOSTILE)
def test_text_of_files_and_names_is_shown_letter_by_letter_and_never_run(facts, tmp_path, monkeypatch, text):
    monkeypatch.chdir(tmp_path)
    once = " ".join(text.split())
    scores = CAPTIONS | {"title": text, "settings": {text: text}, "dataset": {"name": text, "split": text, "id": text}}
    scores |= {"scores": {text: {"cider": 0.5}}, "controls": {"shuffled": {"cider": 0.4}}}
    scores |= {"verdict": {"passed": True, "reason": text}}
    facts.evaluations = read(tmp_path, scores)
    facts.config.scope = facts.data = text
    facts.config.backbone_config |= {"source": text, "architecture": text, "revision": text, "sha256": text}
    facts.config.language_model_source = {"source": text, "revision": text, "sha256": text}
    facts.layers = [Layer(text, 8, 4, 4, [3, 64, 64])]
    facts.revision = text
    facts.examples = Examples(["pictures/example_1.png"], "pictures/layers.jpg", [], [text], world=text)
    facts.recipe = yaml.safe_dump({"backbone": text, "train_data": [text]})
    page = str(model_card(facts))
    card = ModelCard(page)  # the metadata end where they should, and hold what they were given
    assert card.data.base_model is None and card.data.license == "unknown"
    assert {result.dataset_type for result in card.data.eval_results} == {text}
    blocks = re.findall(r"^(`{3,})(python|yaml)\n(.*?)\n\1$", card.text, re.DOTALL | re.MULTILINE)
    assert [language for _, language, _ in blocks] == ["python", "yaml"]
    names = [node.value for node in ast.walk(ast.parse(blocks[0][2])) if isinstance(node, ast.Constant)]
    assert {text, "user/devil"} <= set(names)
    assert yaml.safe_load(blocks[1][2]) == {"backbone": text, "train_data": [text]}
    prose = re.sub(r"^(`{3,})(python|yaml)\n.*?\n\1$", "", card.text, flags=re.DOTALL | re.MULTILINE)
    shown, tags = seen(prose)
    assert shown.count(once) == 18 and not tags  # scope, layer, title, settings, reason, names of rows and of sources, ...
    assert len({line.count("|") - line.count("\\|") for line in prose.splitlines() if line.startswith("| 0 |")}) == 1
    assert [line for line in prose.splitlines() if line.startswith("#")] == HEADINGS
    assert not (tmp_path / "ran").exists()


def test_a_recipe_of_any_text_stays_in_its_block():
    block = fenced("a: |\n  ```\n  ````\n# not a heading", "yaml")
    assert block.startswith("`````yaml\n") and block.endswith("\n`````")


@pytest.mark.parametrize("text", ["a 2 * 3 b", "snake_case.name", "-0.25", "all layers together", "1.5 nats", "C# and C++"])
def test_plain_text_stays_as_it_is_written(text):
    assert markdown(text) == text


def test_the_filled_cards_are_valid_and_claim_nothing():
    cards = sorted(card_folder().glob("*.md"))
    assert {"shapes_world.md", "embedded.md", "cc3m_resnet50_opt125m.md"} <= {path.name for path in cards}
    for path in cards:
        text = path.read_text()
        card = (DatasetCard if path.name == "shapes_world.md" else ModelCard)(text)
        assert card.data.to_dict() and "{{" not in text and "{%" not in text
        if path.name.startswith("cc3m"):
            assert "**Not measured.**" in text and "**No control was run" in text and not card.data.eval_results
            assert card.data.base_model[1] == "facebook/opt-125m"
