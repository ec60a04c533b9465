"""Cards of any text have the elements and the tables of any other, and the metadata that were given."""

import ast
import json
import re

import yaml
from huggingface_hub import ModelCard
from hypothesis import assume, given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from devil_hf.build.repositories import hub_id
from devil_hf.evaluation.results import Evaluation
from devil_hf.hub.cards import model_card
from devil_hf.hub.facts import Examples, Layer, readable_recipe, without_paths
from devil_hf.report.templates import one_line
from tests.hostile import TEXTS, Page
from tests.hub.test_cards import some_facts

RENDER = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])
PLAIN = "plain text"


def filled(text):
    """A card with a text in every field that one can fill."""
    facts = some_facts()
    facts.evaluations = [
        Evaluation(
            title=text,
            scores={text: {text: 0.5, "cider": 0.25}},
            controls={text: {text: 0.25}, "shuffled": {"cider": 0.125}},
            dataset={"name": text, "split": text, "id": text, "size": 3},
            settings={text: text, "sources": [text]},
            verdict={"passed": True, "reason": text},
            missing={text: text},
        )
    ]
    facts.config.scope = facts.data = text
    facts.config.backbone_config |= {"source": text, "architecture": text, "revision": text, "sha256": text}
    facts.config.language_model_source = {"source": text, "revision": text, "sha256": text}
    facts.layers = [Layer(text, 8, 4, 4, [3, 64, 64])]
    facts.revision = text
    facts.examples = Examples(["pictures/example_1.png"], "pictures/layers.jpg", ["pictures/m.png"], [text], world=text)
    facts.recipe = readable_recipe(yaml.safe_dump({"backbone": text, "train_data": [text]}))
    return str(model_card(facts))


def shown(page):
    """A card's text as a page, without its code blocks, and the cells of each row of its tables."""
    html = RENDER.render(ModelCard(page).text)
    rows = [part.count("<td") + part.count("<th") for part in html.split("<tr>")[1:]]
    return Page(re.sub(r"<pre>.*?</pre>", "", html, flags=re.DOTALL)), rows


ELEMENTS, ROWS = (lambda page, rows: (page.elements, rows))(*shown(filled(PLAIN)))


@given(TEXTS)
def test_a_card_of_any_text_has_the_same_elements_tables_and_metadata(text):
    assume(hub_id(text) is None)
    card = filled(text)
    page, rows = shown(card)
    assert page.elements == ELEMENTS and rows == ROWS
    assert not [link for link in page.links if not link.startswith(("https://", "pictures/"))]
    assert " ".join(page.text.split()).count(one_line(text)) >= 18
    if "\x85" in text:  # to YAML the end of a line, and read again as another one
        return
    results = ModelCard(card).data.eval_results
    found = {(one.dataset_name, one.dataset_type, one.metric_type) for one in results}
    assert found == {(text, text, text), (text, text, "cider")}
    blocks = re.findall(r"^(`{3,})(python|yaml)\n(.*?)\n\1$", ModelCard(card).text, re.DOTALL | re.MULTILINE)
    assert [language for _, language, _ in blocks] == ["python", "yaml"]
    assert text in [node.value for node in ast.walk(ast.parse(blocks[0][2])) if isinstance(node, ast.Constant)]
    assert yaml.safe_load(blocks[1][2]) == without_paths({"backbone": text, "train_data": [text]})


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=8,
)


@given(JSON)
def test_paths_are_cut_and_everything_else_is_kept(value):
    cut = without_paths(value)
    assert without_paths(cut) == cut or value != value
    if "/" not in json.dumps(value, ensure_ascii=False):
        assert json.dumps(cut) == json.dumps(value)
