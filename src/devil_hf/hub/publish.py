"""Publishing on the Hub: a checkpoint becomes a repository with weights, code, processor, pictures and a card.

Everything is prepared in a folder and checked there before the first byte is sent; then it goes up in one commit. A
checkpoint that holds its code is published as it stands, byte for byte; a model in memory, and one that changes between
slim and self-contained, is saved anew. What is checked stands in `checks`, which files go in `contents`.
"""

import tempfile
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi
from transformers.utils import logging

from devil_hf.checkpoints import license_of
from devil_hf.checkpoints.publishing import HUB, PUBLISHERS, Publisher
from devil_hf.evaluation.results import Evaluation, check_measured, read_evaluations
from devil_hf.hub.cards import model_card
from devil_hf.hub.checks import CODE, check_code, check_parts, check_repo_id, check_weights
from devil_hf.hub.contents import RECIPE_FILE, add_scores, copy_checkpoint, forget_this_machine, is_outdated, score_files
from devil_hf.hub.drafts import Draft, commit, new_folder, reaching_the_hub
from devil_hf.hub.examples import draw_examples, layer_table
from devil_hf.hub.facts import UNKNOWN_LICENSE, Facts
from devil_hf.model.configuration_devil import DevilConfig
from devil_hf.model.image_processing_devil import ImageSource, load_images
from devil_hf.model.modeling_devil import DevilModel
from devil_hf.model.processing_devil import DevilProcessor
from devil_hf.questions.choices import Calibration

logger = logging.get_logger(f"transformers.{__name__}")


def push(
    checkpoint: str | PathLike | DevilModel,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    token: str | None = None,
    **preparation: Any,
) -> str:
    """Publish a checkpoint on the Hub: `prepare`, then `upload`.

    Args:
        checkpoint: a directory, or a model.
        repo_id: USER/REPO; it is created if need be.
        preparation: further arguments of `prepare`; the others are those of `upload`.

    Returns:
        The commit's URL.

    Raises:
        ValueError: for what `prepare` refuses; nothing was sent then.
        OSError: when nobody is logged in, and for what `upload` raises.
    """
    check_repo_id(repo_id)
    with reaching_the_hub("the Hub does not know you"):  # before long work starts
        HfApi(token=token).whoami()
    with tempfile.TemporaryDirectory() as folder:
        draft = prepare(checkpoint, repo_id, folder, revision=revision, **preparation)
        for note in draft.notes:
            logger.warning(note)
        return upload(draft, repo_id, private=private, revision=revision, commit_message=commit_message, token=token)


def upload(
    draft: Draft,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    token: str | None = None,
) -> str:
    """Send a prepared repository to the Hub, in one commit.

    Args:
        repo_id: USER/REPO; it is created if need be.
        private: whether only its owner can see a new repository.
        revision: branch to push to, created if need be; None for the main one.
        commit_message: default: "Upload DeViL checkpoint".
        token: access token; None uses the one that `hf auth login` stored.

    Returns:
        The commit's URL.

    Raises:
        OSError: when the Hub cannot be reached or refuses; what was uploaded by then is not sent again next time.
    """
    api = HfApi(token=token, library_name="devil-hf")
    with reaching_the_hub(f"{repo_id} was not published completely"):
        api.create_repo(repo_id, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        message = commit_message or "Upload DeViL checkpoint"
        return commit(api, draft, repo_id, is_outdated, message, revision=revision).commit_url


def prepare(
    checkpoint: str | PathLike | DevilModel,
    repo_id: str,
    folder: str | PathLike,
    *,
    processor: DevilProcessor | None = None,
    slim: bool | None = None,
    images: ImageSource | None = None,
    phrases: Sequence[str] = (),
    scores: Sequence[str | PathLike] = (),
    license: str | None = None,
    **about: Any,
) -> Draft:
    """Write everything that will be published into `folder`, and check it.

    Args:
        checkpoint: a directory, or a model.
        repo_id: USER/REPO, for the card.
        folder: an empty or new one.
        processor: of a model; default: the one saved where the model came from.
        slim: True leaves the frozen parts out and names their sources, False holds them; None keeps the checkpoint's kind.
        images: example images for the card, which are published too; a checkpoint of the shapes world draws its own.
        phrases: words whose maps the card shows; default: what the model says of each image.
        scores: JSON files of evaluations (`devil_hf.evaluation.results`), beside those found in the checkpoint:
            `scores.json` and `evaluations/*.json`. A `calibration.json` of the checkpoint goes along.
        license: of the published weights, an identifier of the Hub.
        about: `datasets`, `data`, `language` and `revision` of the card, as `Facts` has them.

    Raises:
        ValueError: when something is missing, not finite, or would not load elsewhere, and for scores and a calibration of other
            weights.
    """
    check_repo_id(repo_id)
    folder = new_folder(folder)
    given = [evaluation for path in scores for evaluation in read_evaluations(path)]
    pictures = [] if images is None else [picture.copy() for picture in load_images(images)]
    model, processor = _stage(checkpoint, processor, folder, slim)
    evaluations = [evaluation for path in score_files(folder) for evaluation in read_evaluations(path)] + given
    _check_measured(evaluations, Calibration.beside(folder), checkpoint, processor)
    recipe = folder / RECIPE_FILE
    facts = Facts(
        repo_id=repo_id,
        config=DevilConfig.from_pretrained(folder),
        layers=layer_table(model),
        trained_parameters=sum(tensor.numel() for tensor in model.trainable_state_dict().values()),
        evaluations=evaluations,
        examples=draw_examples(model, processor, folder, pictures, phrases),
        recipe=recipe.read_text(encoding="utf-8").strip() if recipe.is_file() else None,
        license=license or license_of(model.config.scope) or UNKNOWN_LICENSE,
        **about,
    )
    add_scores(scores, folder)
    card = model_card(facts)
    (folder / "README.md").write_text(str(card), encoding="utf-8")
    return Draft(folder, card, _notes(facts))


def _check_measured(
    evaluations: Sequence[Evaluation],
    calibration: Calibration | None,
    checkpoint: str | PathLike | DevilModel,
    processor: DevilProcessor,
) -> None:
    """Raise a ValueError for scores of other weights, and a calibration of others or of another preprocessing."""
    if calibration or any(evaluation.weights for evaluation in evaluations):
        # As evaluations load it, in fp32: frozen parts of a slim checkpoint would be rounded to its own precision otherwise.
        if isinstance(checkpoint, str | PathLike):
            model = DevilModel.from_pretrained(checkpoint, dtype=torch.float32)
        else:
            model = checkpoint
        check_measured(evaluations, model)
        if calibration:
            calibration.check(model, processor)


def _stage(
    checkpoint: str | PathLike | DevilModel, processor: DevilProcessor | None, folder: Path, slim: bool | None
) -> tuple[DevilModel, DevilProcessor]:
    """Put weights, code and processor into `folder`, checked; returns them loaded, to draw with."""
    # A model that was loaded with the code of its repository is of another class than ours.
    given = not isinstance(checkpoint, str | PathLike)
    if isinstance(checkpoint, str | PathLike):
        check_weights(checkpoint)
        model = DevilModel.from_pretrained(checkpoint, dtype="auto")
    else:
        model = checkpoint
    processor = processor or _processor_of(model)
    kind = model.config.frozen_weights == "reference"
    slim = kind if slim is None else slim
    check_parts(model, slim)
    if isinstance(checkpoint, str | PathLike):
        copy_checkpoint(checkpoint, folder)
    if given or slim != kind or not any(folder.glob(CODE)):
        # Code, too: what fetches the frozen parts of a slim checkpoint has no place beside a self-contained one.
        for stale in (*folder.glob("*.safetensors*"), *folder.glob(CODE)):
            stale.unlink()
        model.save_pretrained(folder, slim=slim)
        processor.save_pretrained(folder)
    forget_this_machine(folder)
    check_weights(folder)
    check_code(folder)
    return (model if given else model.float()), processor


def _processor_of(model: DevilModel) -> DevilProcessor:
    try:
        return DevilProcessor.from_pretrained(str(model.name_or_path))
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(
            f"no processor is saved in {model.name_or_path or 'the place where the model came from'!r}: save it there, "
            "or pass processor=..."
        ) from error


def _notes(facts: Facts) -> list[str]:
    said = {
        "no license is given: the card says 'unknown' (--license)": facts.license == UNKNOWN_LICENSE,
        "no evaluation is given: the card says 'not measured' (--scores)": not facts.evaluations,
        "no example image is given: the card shows none (--images)": facts.examples is None,
    }
    return [note for note, holds in said.items() if holds]


PUBLISHERS.register(HUB, Publisher(check_repo_id, check_parts, push))

__all__ = ["prepare", "push", "upload"]
