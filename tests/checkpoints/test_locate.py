"""A checkpoint is a name of a shipped one, a directory or a Hub id, told apart in one place."""

from pathlib import Path

from devil_hf.checkpoints import locate, shipped_checkpoints


def test_a_name_is_a_shipped_checkpoint_and_nothing_is_the_default():
    assert shipped_checkpoints() == ["photos", "shapes"]
    assert locate() == locate("photos") != locate("shapes") and (locate("shapes") / "config.json").is_file()


def test_directories_and_hub_ids_stay_what_they_are(tmp_path):
    for one in ("./shapes", "user/shapes", "gpt2", tmp_path, Path("checkpoints/shapes")):
        assert locate(one) == one
