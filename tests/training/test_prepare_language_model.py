"""The text that a caption language model learns from."""

import runpy
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "scripts" / "prepare_language_model.py"


def test_captions_of_held_out_images_are_no_text_whatever_their_names(tmp_path):
    names = ["first.jpg", "my photo.jpg", "café.jpg", "kept.jpg"]
    (tmp_path / "tokens.txt").write_text("".join(f"{name}#0\tcaption of {name}\n" for name in names), encoding="utf-8")
    held = tmp_path / "held.txt"
    held.write_text("".join(f"{name}\r\n" for name in names[:3]), encoding="utf-8-sig")
    script = runpy.run_path(str(SCRIPT))
    settings = script["TextSettings"](flickr_tokens=[tmp_path / "tokens.txt"], held_out_images=[held])
    groups, measured = script["read_text"](settings)
    assert groups == [["caption of kept.jpg"]]
    assert measured == [[f"caption of {name}"] for name in names[:3]]
