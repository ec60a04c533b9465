"""What is made sure of before the first byte is sent: nothing is published that others could not load.

Weights must be there, complete and finite; the code must import without devil_hf; frozen parts must not be of this machine alone.
"""

import os
import subprocess
import sys
import tempfile
from os import PathLike
from pathlib import Path

import torch
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError, safe_open

from devil_hf.model.modeling_devil import DevilModel
from devil_hf.text_files import read_json

CODE = "*_devil.py"


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
        files |= set(read_json(index)["weight_map"].values())
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
config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
names = [*config["auto_map"].values(), *(p["impl"] for p in config.get("custom_pipelines", {}).values())]
processor = folder / "processor_config.json"
names += json.loads(processor.read_text(encoding="utf-8"))["auto_map"].values() if processor.exists() else []
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
        run = subprocess.run(command, env=environment, cwd=home, capture_output=True, text=True, encoding="utf-8")
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


__all__ = ["CODE", "check_code", "check_parts", "check_repo_id", "check_weights"]
