"""Publishing the demo as a Space of the Hub, in one commit.

A Space gets this very package beside its `app.py`, so that it runs the code that was tried here, whether or not that is on a
package index; the index brings only what the package depends on.
"""

import re
import shutil
import tempfile
from importlib.metadata import requires
from os import PathLike
from pathlib import Path

from huggingface_hub import HfApi, SpaceCard
from packaging.requirements import Requirement

from devil_hf.hub.checks import check_repo_id
from devil_hf.hub.drafts import Draft, commit, new_folder, reaching_the_hub

PACKAGE = Path(__file__).parents[1]
THIS_PACKAGE = "devil-hf[demo]"  # in the requirements; what a Space is pushed with is a copy beside its app
CHECKPOINT_VARIABLE = "DEVIL_CHECKPOINT"
LEFT_OUT = ("__pycache__", "*.pyc", "space", "hub_cards", ".*")


def prepare_space(space_id: str, folder: str | PathLike, checkpoint: str | None = None) -> Draft:
    """Write everything that a Space needs into `folder`.

    Args:
        space_id: USER/SPACE.
        folder: an empty or new one.
        checkpoint: Hub id of the checkpoint that answers; None for those that the package brings.

    Raises:
        ValueError: for a name that the Hub does not allow, a checkpoint that is a directory, or a folder that is not empty.
    """
    check_repo_id(space_id)
    if checkpoint is not None:
        if Path(checkpoint).exists():
            raise ValueError(f"{checkpoint} is a directory, which a Space cannot read: `devil push` it, and give its Hub id")
        check_repo_id(checkpoint)
    folder = new_folder(folder)
    shutil.copytree(_template_folder(), folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns(*LEFT_OUT[:2]))
    shutil.copytree(PACKAGE, folder / "devil_hf", ignore=shutil.ignore_patterns(*LEFT_OUT))
    needed = folder / "requirements.txt"
    lines = [line for line in needed.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    needed.write_text(
        "\n".join(line for one in lines for line in (_dependencies() if one == THIS_PACKAGE else [one])) + "\n", encoding="utf-8"
    )
    card = SpaceCard.load(folder / "README.md")
    card.text = card.text.replace("USER/SPACE", space_id)
    if checkpoint is not None:
        card.data.models = [checkpoint]
        default = re.compile(r"\*\*Two models answer by default\*\*.*?\n\n", re.DOTALL)
        answer = f"The checkpoint [{checkpoint}](https://huggingface.co/{checkpoint}) answers; its card says what it knows.\n\n"
        card.text, replaced = default.subn(answer, card.text)
        if not replaced:
            raise ValueError(f"{_template_folder() / 'README.md'} has no paragraph on its default model to replace")
    card.save(folder / "README.md")
    return Draft(folder, card, [])


def push_space(
    space_id: str,
    checkpoint: str | None = None,
    *,
    private: bool | None = None,
    commit_message: str | None = None,
    token: str | None = None,
) -> str:
    """Publish the demo as a Space: files in one commit, then the variable that names its checkpoint.

    Args:
        space_id: USER/SPACE; it is created if need be.
        checkpoint: Hub id of the checkpoint that answers; None for those that the package brings. A private one needs an access
            token that reads it as the Space's secret `HF_TOKEN`.
        private: whether only its owner can see a new Space.
        commit_message: default: "Upload DeViL demo".
        token: access token; None uses the one that `hf auth login` stored.

    Returns:
        The Space's URL.

    Raises:
        ValueError: for what `prepare_space` refuses; nothing was sent then.
        OSError: when the Hub cannot be reached or refuses.
    """
    api = HfApi(token=token, library_name="devil-hf")
    with tempfile.TemporaryDirectory() as folder:
        draft = prepare_space(space_id, folder, checkpoint)
        with reaching_the_hub(f"{space_id} was not published completely"):
            url = api.create_repo(space_id, repo_type="space", space_sdk="gradio", private=private, exist_ok=True)
            message = commit_message or "Upload DeViL demo"
            commit(api, draft, space_id, lambda path: path.startswith("devil_hf/"), message, repo_type="space")
            if checkpoint is not None:
                api.add_space_variable(space_id, CHECKPOINT_VARIABLE, checkpoint)
            elif CHECKPOINT_VARIABLE in api.get_space_variables(space_id):
                api.delete_space_variable(space_id, CHECKPOINT_VARIABLE)
    return str(url)


def _template_folder() -> Path:
    """`space/`: within an installed package, else at the top of the source tree."""
    installed = PACKAGE / "space"
    return installed if installed.is_dir() else PACKAGE.parents[1] / "space"


def _dependencies() -> list[str]:
    """What the package and its extra `demo` need, but for gradio, which the Space's `sdk_version` brings."""
    needed = [Requirement(one) for one in requires("devil-hf") or []]
    return [
        f"{one.name}{f'[{extras}]' if (extras := ','.join(sorted(one.extras))) else ''}{one.specifier}"
        for one in needed
        if one.name != "gradio" and (one.marker is None or one.marker.evaluate({"extra": "demo"}))
    ]


__all__ = ["prepare_space", "push_space"]
