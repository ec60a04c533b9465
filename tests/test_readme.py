"""The README's example runs as it stands, and so do the tables of calls."""

import re
from dataclasses import fields
from pathlib import Path

from PIL import Image

from devil_hf.checkpoints import locate
from devil_hf.cli.attribute import AttributeSettings
from devil_hf.data.shapes import make_scene

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_example_and_the_calls_of_the_table_run():
    example = re.search(r"```python\n(from transformers.*?)```", README, flags=re.DOTALL)[1]
    scene = make_scene(1, 0)
    names = {"image": Image.fromarray(scene.image)}
    exec(example.replace('"devil-quickstart/checkpoint"', repr(str(locate("shapes")))), names)
    assert len(names["ids"]) == 2  # one row per place
    assert names["maps"].maps["layer1"].shape == (1, 2, 32, 32)
    import devil_hf

    model = names["model"]
    vectors = model.extract_features(names["inputs"]["pixel_values"])[-1].mean(dim=(2, 3))
    names |= {"devil_hf": devil_hf, "mask": scene.masks[0], "vectors": vectors}
    calls = re.findall(r"\| `((?:model|devil_hf)\.\w+\(.*?\))`", README)
    assert len(calls) >= 8
    for call in calls:
        result = eval(call.replace("phrases=...", "phrases=phrases"), names)
        assert len(result) > 0, call


def test_the_combination_that_points_best_in_the_shapes_world_is_not_said_to_do_so_on_photographs():
    names = ("docs/use.md", "docs/evaluate.md", "docs/results/shapes.md")
    texts = [(ROOT / name).read_text(encoding="utf-8") for name in names]
    texts.append(next(one for one in fields(AttributeSettings) if one.name == "combine").metadata["help"])
    for text in texts:
        paragraphs = [part for part in text.split("\n\n") if "informed" in part]
        assert any("photographs" in part for part in paragraphs)
