"""Publishing on the Hub: a checkpoint becomes a repository with weights, code, processor, pictures and a card.

Everything is prepared in a folder and checked there before the first byte is sent; then it goes up in one commit. A
checkpoint that holds its code is published as it stands, byte for byte; a model in memory, and one that changes between
slim and self-contained, is saved anew. Nothing is published that others could not load: without weights, with NaN or
infinite weights, with code that needs devil_hf, or with frozen parts that only this machine has.
"""

import fnmatch
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, RepoCard
from huggingface_hub.utils import validate_repo_id
from PIL import Image
from safetensors import SafetensorError, safe_open
from transformers.utils import logging

from devil_hf.checkpoints import SCOPE
from devil_hf.data.shapes import make_scene
from devil_hf.evaluation.results import check_measured, read_evaluations
from devil_hf.hub.cards import UNKNOWN_LICENSE, Examples, Facts, Layer, model_card, readable_recipe, without_paths
from devil_hf.model.configuration_devil import DevilConfig
from devil_hf.model.image_processing_devil import ImageSource, load_images
from devil_hf.model.modeling_devil import DevilModel
from devil_hf.model.processing_devil import DevilProcessor
from devil_hf.report.figures import attribution_figure, layers_figure

logger = logging.get_logger(__name__)

RECIPE_FILE = "recipe.yaml"
CODE = "*_devil.py"
# What a checkpoint is made of; what else lies beside it (optimiser states, pickled arguments) stays at home.
PUBLISHED = (
    *("*.safetensors", "*.safetensors.index.json", "*.json", "*.py", "*.txt", "*.model", "*.tiktoken", "*.jinja"),
    *(RECIPE_FILE, "LICENSE*", "evaluations/*.json"),
)
PRIVATE = (".*", "evaluations/.*", "trainer_state.json", "*training_args*")
# Files of an earlier push that would contradict this one.
OUTDATED = (
    *("*.safetensors", "*.safetensors.index.json", CODE),
    *("pictures/*", "evaluations/*", "scores.json", RECIPE_FILE),
)
LARGEST_PICTURE = 768  # pixels of an example image's longer side
FIGURE: dict[str, Any] = {"quality": 90, "subsampling": 0}
EXAMPLE_WORLD = 1  # of the shapes world: held out, as in the quickstart
EXAMPLE_SCENES = 3


@dataclass
class Draft:
    """A repository that is ready to be pushed.

    Args:
        folder: where its files lie.
        card: its card, also in `folder/README.md`.
        notes: what its publisher should know: what the card could not say.
    """

    folder: Path
    card: RepoCard
    notes: list[str]

    def tree(self) -> dict[str, int]:
        """Path -> bytes of every file."""
        files = sorted(path for path in self.folder.rglob("*") if path.is_file())
        return {path.relative_to(self.folder).as_posix(): path.stat().st_size for path in files}


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
    tree = draft.tree()
    with reaching_the_hub(f"{repo_id} was not published completely"):
        api.create_repo(repo_id, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        outdated = [
            path
            for path in api.list_repo_files(repo_id, revision=revision)
            if path not in tree and _matches(path, OUTDATED)
        ]
        # One commit, so that nobody ever loads the weights of one push with the code of another.
        commit = api.create_commit(
            repo_id,
            [
                *(CommitOperationDelete(path) for path in outdated),
                *(CommitOperationAdd(path, draft.folder / path) for path in tree),
            ],
            commit_message=commit_message or "Upload DeViL checkpoint",
            revision=revision,
        )
    return commit.commit_url


@contextmanager
def reaching_the_hub(what: str) -> Iterator[None]:
    """Whatever the Hub's client raises (its transport errors are no OSError) comes as an OSError with a remedy."""
    try:
        yield
    except Exception as error:
        raise OSError(
            f"{what} ({type(error).__name__}: {error}). Check the network and `hf auth login`, and run the same command "
            "again: files that arrived are not sent twice."
        ) from error


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
    datasets: Sequence[str] = (),
    data: str | None = None,
    language: str = "en",
    revision: str | None = None,
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
            `scores.json` and `evaluations/*.json`.
        license: of the published weights, an identifier of the Hub.
        datasets: Hub ids of the training data.
        data: the training data in words.
        revision: the branch that it will be pushed to, for the card's snippet.

    Raises:
        ValueError: when something is missing, not finite, or would not load elsewhere, and for scores of other weights.
    """
    check_repo_id(repo_id)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty: everything in it would be published; name a new folder")
    given = [evaluation for path in scores for evaluation in read_evaluations(path)]
    pictures = [] if images is None else [picture.copy() for picture in load_images(images)]
    model, processor = _stage(checkpoint, processor, folder, slim)
    evaluations = [evaluation for path in _score_files(folder) for evaluation in read_evaluations(path)] + given
    if any(evaluation.weights for evaluation in evaluations):
        # As evaluations load it, in fp32: frozen parts of a slim checkpoint would be rounded to its own precision otherwise.
        given_model = isinstance(checkpoint, DevilModel)
        check_measured(
            evaluations, model if given_model else DevilModel.from_pretrained(checkpoint, dtype=torch.float32)
        )
    recipe = folder / RECIPE_FILE
    facts = Facts(
        repo_id=repo_id,
        config=DevilConfig.from_pretrained(folder),
        layers=layer_table(model),
        trained_parameters=sum(tensor.numel() for tensor in model.trainable_state_dict().values()),
        evaluations=evaluations,
        examples=draw_examples(model, processor, folder, pictures, phrases),
        recipe=recipe.read_text().strip() if recipe.is_file() else None,
        license=license or ("apache-2.0" if model.config.scope == SCOPE else UNKNOWN_LICENSE),
        datasets=list(datasets),
        data=data,
        language=language,
        revision=revision,
    )
    _copy_scores(scores, folder)
    card = model_card(facts)
    (folder / "README.md").write_text(str(card), encoding="utf-8")
    return Draft(folder, card, _notes(facts))


def _stage(
    checkpoint: str | PathLike | DevilModel, processor: DevilProcessor | None, folder: Path, slim: bool | None
) -> tuple[DevilModel, DevilProcessor]:
    """Put weights, code and processor into `folder`, checked; returns them loaded, to draw with."""
    given = isinstance(checkpoint, DevilModel)
    if isinstance(checkpoint, DevilModel):
        model = checkpoint
    else:
        check_weights(checkpoint)
        model = DevilModel.from_pretrained(checkpoint, dtype="auto")
    processor = processor or _processor_of(model)
    kind = model.config.frozen_weights == "reference"
    slim = kind if slim is None else slim
    check_parts(model, slim)
    if not isinstance(checkpoint, DevilModel):
        _copy(Path(checkpoint), folder)
    if given or slim != kind or not any(folder.glob(CODE)):
        for stale in folder.glob("*.safetensors*"):
            stale.unlink()
        model.save_pretrained(folder, slim=slim)
        processor.save_pretrained(folder)
    _forget_this_machine(folder)
    check_weights(folder)
    check_code(folder)
    return (model if given else model.float()), processor


def _notes(facts: Facts) -> list[str]:
    said = {
        "no license is given: the card says 'unknown' (--license)": facts.license == UNKNOWN_LICENSE,
        "no evaluation is given: the card says 'not measured' (--scores)": not facts.evaluations,
        "no example image is given: the card shows none (--images)": facts.examples is None,
    }
    return [note for note, holds in said.items() if holds]


# --------------------------------------------------------------------------------------------------------------- checks


def check_repo_id(repo_id: str) -> None:
    """Raise a ValueError unless `repo_id` is USER/REPO in the Hub's spelling."""
    validate_repo_id(repo_id)
    if "/" not in repo_id:
        raise ValueError(f"{repo_id!r} is no USER/REPO: name the user or organisation as well, as in 'user/{repo_id}'")


def check_weights(folder: str | PathLike) -> None:
    """Make sure that a folder holds safetensors weights, all of them, and finite.

    Raises:
        ValueError: if not, naming the file and the tensor.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} is no checkpoint: it has no config.json")
    files = {path.name for path in folder.glob("*.safetensors")}
    for index in folder.glob("*.safetensors.index.json"):
        files |= set(json.loads(index.read_text())["weight_map"].values())
    if not files:
        raise ValueError(f"{folder} holds no weights (*.safetensors): save the model there first, with save_pretrained")
    for name in sorted(files):
        try:
            with safe_open(folder / name, "pt") as file:
                for key in file.keys():  # noqa: SIM118 (no mapping)
                    tensor = file.get_tensor(key)
                    if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                        bad = int((~torch.isfinite(tensor)).sum())
                        raise ValueError(
                            f"{folder / name}: {key} holds {bad} NaN or infinite values; such a checkpoint is not published"
                        )
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{folder / name} cannot be read ({error}): the checkpoint is incomplete") from error


ALONE = """
import json, sys
from pathlib import Path
sys.modules["devil_hf"] = None  # from here on, importing it fails
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.dynamic_module_utils import get_relative_import_files
folder = Path(sys.argv[1])
config = json.loads((folder / "config.json").read_text())
names = [*config["auto_map"].values(), *(p["impl"] for p in config.get("custom_pipelines", {}).values())]
processor = folder / "processor_config.json"
names += json.loads(processor.read_text())["auto_map"].values() if processor.exists() else []
# Those that import nothing come first, so that the file named last is the one at fault.
files = sorted(folder.glob("*.py"), key=lambda path: len(get_relative_import_files(path)))
for name in [*(f"{path.stem}.__name__" for path in files), *names]:
    print(name, flush=True)
    get_class_from_dynamic_module(name, str(folder))
"""


def check_code(folder: str | PathLike) -> None:
    """Import every code file of a checkpoint in a fresh process in which devil_hf cannot be imported.

    Raises:
        ValueError: naming the file that does not import alone, and why.
    """
    folder = Path(folder)
    if not any(folder.glob(CODE)):
        raise ValueError(f"{folder} holds no code: nobody without devil_hf could load it; save it with save_pretrained")
    with tempfile.TemporaryDirectory() as home:
        environment = os.environ | {"HF_HOME": home, "HF_MODULES_CACHE": home, "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, "-c", ALONE, str(folder.resolve())]
        run = subprocess.run(command, env=environment, cwd=home, capture_output=True, text=True)
    if run.returncode:
        module = (run.stdout.split() or ["config.json"])[-1].split(".")[0]
        reason = (run.stderr.strip().splitlines() or ["no reason was given"])[-1]
        raise ValueError(f"{module}.py of the checkpoint does not import alone, without devil_hf: {reason}")


def check_parts(model: DevilModel, slim: bool) -> None:
    """Refuse what only this machine, or only this process, could load."""
    vision, text = model.config.backbone_config, model.config.language_model_source or {}
    if vision["kind"] == "custom":
        raise ValueError(
            "the backbone is a module of your own, which nobody else can build from the configuration: "
            "publish a timm or transformers backbone"
        )
    for part, source in (("backbone", vision["source"]), ("language model", text.get("source"))):
        if slim and (source is None or os.path.isabs(source)):
            where = "came as a module" if source is None else f"comes from {source}, a directory of this machine"
            raise ValueError(
                f"the {part} {where}: a slim checkpoint could not be loaded elsewhere. Publish it self-contained "
                "(slim=False, --self-contained), or build the model from Hub ids"
            )


# ---------------------------------------------------------------------------------------------------------------- files


def _processor_of(model: DevilModel) -> DevilProcessor:
    try:
        return DevilProcessor.from_pretrained(str(model.name_or_path))
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(
            f"no processor is saved in {model.name_or_path or 'the place where the model came from'!r}: save it there, "
            "or pass processor=..."
        ) from error


def _matches(path: str, patterns: Sequence[str]) -> bool:
    """Whether a path is named by a pattern of its own depth: no folder's files are swept up by `*.json`."""
    return any(fnmatch.fnmatch(path, pattern) and path.count("/") == pattern.count("/") for pattern in patterns)


def _copy(source: Path, folder: Path) -> None:
    for path in sorted(path for path in source.rglob("*") if path.is_file()):
        name = path.relative_to(source).as_posix()
        if _matches(name, PUBLISHED) and not _matches(name, PRIVATE):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, folder / name)


def _copy_scores(scores: Sequence[str | PathLike], folder: Path) -> None:
    for path in map(Path, scores):
        target, number = folder / "evaluations" / path.name, 1
        while target.exists():
            number += 1
            target = target.with_name(f"{path.stem}_{number}{path.suffix}")
        target.parent.mkdir(exist_ok=True)
        target.write_text(json.dumps(without_paths(json.loads(path.read_text())), indent=1) + "\n")


def _score_files(folder: Path) -> list[Path]:
    return [path for path in (folder / "scores.json", *sorted(folder.glob("evaluations/*.json"))) if path.is_file()]


def _forget_this_machine(folder: Path) -> None:
    """Take local paths, and the tokenizer's memory of having been a local directory, out of the files."""
    for name in ("config.json", "processor_config.json", "tokenizer_config.json"):
        path = folder / name
        if not path.is_file():
            continue
        settings = json.loads(path.read_text())
        for part in ("backbone_config", "language_model_source"):
            if os.path.isabs((settings.get(part) or {}).get("source") or ""):
                settings[part]["source"] = None
        if name == "tokenizer_config.json":
            settings = {key: value for key, value in settings.items() if key not in ("is_local", "local_files_only")}
        path.write_text(json.dumps(without_paths(settings), indent=2) + "\n")
    for path in _score_files(folder):
        read_evaluations(path)  # names a file that holds none
        path.write_text(json.dumps(without_paths(json.loads(path.read_text())), indent=1) + "\n")
    recipe = folder / RECIPE_FILE
    if recipe.is_file():
        recipe.write_text(readable_recipe(recipe.read_text()) + "\n")


# ------------------------------------------------------------------------------------------------------------- pictures


def layer_table(model: DevilModel) -> list[Layer]:
    """The layers of a model with the grids that they have at its own input size."""
    size = model.config.backbone_config["input_size"]
    with torch.no_grad():
        maps = model.extract_features(torch.zeros(1, *size))
    return [
        Layer(name, values.shape[1], values.shape[2], values.shape[3], size)
        for name, values in zip(model.layer_names, maps, strict=True)
        if values is not None
    ]


def draw_examples(
    model: DevilModel,
    processor: DevilProcessor,
    folder: Path,
    images: Sequence[Image.Image] = (),
    phrases: Sequence[str] = (),
) -> Examples | None:
    """Let the checkpoint describe and map images, into `folder/pictures`; None where there is no image."""
    held_out = not images and model.config.scope == SCOPE
    wanted = [list(phrases)] * len(images)
    if held_out:
        scenes = [
            scene for scene in (make_scene(EXAMPLE_WORLD, index) for index in range(20)) if len(scene.objects) > 1
        ]
        images = [Image.fromarray(scene.image) for scene in scenes[:EXAMPLE_SCENES]]
        words = [list(dict.fromkeys(w for item in scene.objects for w in item.attributes.values())) for scene in scenes]
        wanted = [list(phrases) or one for one in words[:EXAMPLE_SCENES]]
    if not images:
        return None
    images = [image.convert("RGB") for image in images]
    for image in images:
        image.thumbnail((LARGEST_PICTURE, LARGEST_PICTURE))
    output = model.describe(**processor(images=images, return_tensors="pt"), max_new_tokens=30)
    rows: list[list[tuple[str, str]]] = [[] for _ in images]
    for row, text in enumerate(processor.batch_decode(output.sequences, skip_special_tokens=True)):
        rows[int(output.image_index[row])].append((output.layer_of(row), text.strip()))
    # Without phrases of the publisher's: what the model itself says of the image.
    wanted = [one or [dict(said)["all"] or "a"] for one, said in zip(wanted, rows, strict=True)]
    pictures = folder / "pictures"
    pictures.mkdir(exist_ok=True)
    examples = Examples([], "pictures/layers.jpg", [], wanted[0], held_out)
    layers_figure(images, rows).save(folder / examples.layers, **FIGURE)
    for number, (image, asked) in enumerate(zip(images, wanted, strict=True), 1):
        examples.images.append(f"pictures/example_{number}.png")
        examples.maps.append(f"pictures/maps_{number}.jpg")
        image.save(folder / examples.images[-1])
        maps = model.attribute(**processor(images=image), phrases=processor(text=asked))
        maps.maps = {name: values.cpu() for name, values in maps.maps.items()}
        attribution_figure(processor, image, maps, asked).save(folder / examples.maps[-1], **FIGURE)
    return examples


__all__ = ["Draft", "check_code", "check_weights", "draw_examples", "layer_table", "prepare", "push", "upload"]
