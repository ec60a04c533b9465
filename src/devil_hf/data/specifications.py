"""What a text on the command line stands for, read in one place for every verb."""

import os
from os import PathLike
from pathlib import Path
from typing import Any

from devil_hf.data.worlds import SHAPES, USUAL_COUNT, World, parse_world, world_label
from devil_hf.text_files import parse_yaml, read_yaml

Sources = list[dict[str, Any]]


def read_specification(text: str | PathLike, count: int = USUAL_COUNT) -> World | Sources | Path | str:
    """What a text names.

    Args:
        text: `shapes`, `shapes:COUNT` or `shapes:COUNT:SEED`; sources of a recipe as YAML in braces or brackets, such as
            `{kind: hub, path: user/data, image_column: image, caption_column: caption}`; a YAML file of them; a file or folder.
        count: scenes of `shapes` without a number.

    Returns:
        The world; the sources; the path of a file or folder; or the text itself where it is none of these, such as a Hub id.

    Raises:
        ValueError: for a malformed world, or YAML that holds no sources.
    """
    world = parse_world(str(text), count)
    if world is not None:
        return world
    path = Path(text)
    if str(text).lstrip().startswith(("{", "[")):
        return _sources(parse_yaml(str(text), str(text)), str(text))
    if path.suffix in (".yaml", ".yml") and path.is_file():
        return _sources(read_yaml(path), str(path))
    return path if os.path.exists(path) else str(text)


def caption_sources(text: str, split: str | None = None, count: int = USUAL_COUNT) -> Sources:
    """The captioned images that a text names, as sources of a recipe.

    Args:
        text: scenes, a caption folder, or sources; see `read_specification`.
        split: of a caption folder.
        count: scenes of "shapes" without a number.

    Raises:
        ValueError: for a text that is none of these, or a split of anything but a folder.
    """
    named = read_specification(text, count)
    if isinstance(named, Path) and named.is_dir():
        return [{"kind": "folder", "path": text} | ({"split": split} if split else {})]
    if isinstance(named, str | Path):
        raise ValueError(
            f"{text!r} is neither a caption folder, nor shapes:COUNT, nor a YAML file of sources; a data set of the Hub is "
            "{kind: hub, path: USER/NAME, image_column: image, caption_column: caption}, here or in a YAML file"
        )
    if split:
        raise ValueError(f"split={split!r} is of a caption folder; write it into the source {text}")
    return [{"kind": SHAPES, "size": named.count, "seed": named.seed}] if isinstance(named, World) else named


def named_sources(sources: Sources) -> dict[str, Any]:
    """What was read, as results name it: `name` of all sources, their `split` where it is one, `id` of a Hub data set."""
    dataset: dict[str, Any] = {"name": " + ".join(map(_source_name, sources))}
    splits = {source["split"] for source in sources if "split" in source}
    if len(splits) == 1:
        (dataset["split"],) = splits
    if len(sources) == 1 and sources[0]["kind"] == "hub":
        dataset["id"] = sources[0]["path"]
    return dataset


def _source_name(source: dict[str, Any]) -> str:
    if source["kind"] == SHAPES:
        return world_label(source["seed"])
    place = next((source[name] for name in ("path", "annotations", "captions", "urls") if source.get(name)), source["kind"])
    return place if source["kind"] == "hub" else Path(place if isinstance(place, str) else place[0]).name


def _sources(found: Any, where: str) -> Sources:
    sources = found if isinstance(found, list) else [found]
    if not sources or not all(isinstance(source, dict) for source in sources):
        raise ValueError(f"{where} holds no sources, each a mapping with a `kind`")
    return sources


__all__ = ["Sources", "caption_sources", "named_sources", "read_specification"]
