"""Frozen features on disk: computed once, as sharded safetensors in fp16; training from them never touches pixels.

A folder holds shards of images, each `NAME.safetensors` (per layer (images, views x draws, C_l)) with `NAME.json` (keys and
captions of its images), and `cache.json`: what the features depend on. A cache of anything else than what is asked for is
refused; a complete one of more layers serves models that read some of them. An interrupted computation goes on where it
stopped: shards appear whole or not at all.
"""

import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from datasets import Dataset, IterableDataset
from datasets.distributed import split_dataset_by_node
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm.auto import tqdm

from devil_hf.checkpoints.identity import network_identity, preprocessing_of
from devil_hf.data.decoding import PairDecoder
from devil_hf.folders import claimed, need_room, write_json, written
from devil_hf.model.modeling_devil import DevilModel
from devil_hf.model.processing_devil import DevilProcessor
from devil_hf.text_files import read_json
from devil_hf.training.features import pool_draws
from devil_hf.training.feed import batch_regions, seed_of, sees_with, view_of

CACHE_FILE = "cache.json"
CLAIMED = "a computation of cached features"
SHARDS = "features-*.safetensors"
SHARD_IMAGES = 1024
BATCH_IMAGES = 32


class StaleCache(ValueError):
    """A feature cache belongs to something else than the run that asks for it."""


def cache_key(
    model: DevilModel, processor: DevilProcessor, data: str, views: int, draws: int, smallest_crop: float, seed: int
) -> dict[str, Any]:
    """Everything that cached features depend on."""
    config = model.config
    return {
        "backbone_sha256": config.backbone_config["sha256"],
        "backbone_built": network_identity(config.backbone_config, layers=()),
        "layers": model.layer_names,
        "image_transform": image_transform(processor),
        "data": data,
        "location_dropout": [
            config.location_schedule,
            config.region_schedule,
            config.location_dropout,
            config.whole_probability,
        ],
        "views": views,
        "draws": draws,
        "smallest_crop": smallest_crop if views > 1 else None,
        "seed": seed,
    }


def image_transform(processor: DevilProcessor) -> str:
    """The preprocessing as text."""
    return json.dumps(preprocessing_of(processor.image_processor), indent=2, sort_keys=True) + "\n"


def cached_features(
    folder: Path,
    key: dict[str, Any],
    model: DevilModel,
    processor: DevilProcessor,
    dataset: Dataset | IterableDataset,
    decoder: PairDecoder,
    sample_seed: int = 0,
) -> "CachedFeatures":
    """Open the cache in `folder`, after computing what it still lacks; all processes of a run call this together.

    Args:
        sample_seed: of which draw and which caption an epoch takes; the key's seed is that of the draws themselves.

    Raises:
        StaleCache, DiskFull, FolderInUse: see `open_cache`.
    """
    state = PartialState()
    if not open_cache(folder, key, model, dataset):
        with claimed(folder, CLAIMED, state.is_main_process):
            found = _content(folder)
            # An unfinished cache is finished by as many parts as it was begun with, whatever the number of processes now.
            for part in range(state.process_index, 0 if found["complete"] else found["processes"], state.num_processes):
                _compute_part(folder, part, found["processes"], key, model, processor, dataset, decoder)
            decoder.bad_samples.judge()
            state.wait_for_everyone()
            if state.is_main_process:
                shards = len(list(folder.glob(SHARDS)))
                write_json(folder / CACHE_FILE, found | {"complete": True, "shards": shards})
            state.wait_for_everyone()
    return CachedFeatures(folder, sample_seed, key["layers"])


def open_cache(folder: Path, key: dict[str, Any], model: DevilModel, dataset: Dataset | IterableDataset) -> bool:
    """Make sure that a cache can be computed or gone on with, before any work; all processes of a run call this together.

    Returns:
        Whether it is complete. Then it is only read, by several runs at once, and may lie where nothing can be written.

    Raises:
        StaleCache: when the folder holds features of something else.
        DiskFull: when the features of a data set of known length cannot fit on the disk.
        FolderInUse: when another run computes them at this moment.
    """
    state, file = PartialState(), folder / CACHE_FILE
    found = _content(folder)
    if not found["complete"]:
        with claimed(folder, CLAIMED, state.is_main_process):
            if state.is_main_process and not file.is_file():
                write_json(file, {"key": key, "processes": state.num_processes, "complete": False})
            found = _content(folder)
    _check_key(folder, found, key)
    if found["complete"]:
        if found.get("shards") != len(list(folder.glob(SHARDS))):
            raise StaleCache(f"the feature cache {folder} lacks some of its {found.get('shards')} shards: delete it.")
        return True
    what = f"the feature cache of {len(dataset)} images" if isinstance(dataset, Dataset) else "the feature cache"
    need_room(folder, cache_bytes(folder, key, model, dataset), what, "name another folder, or lower views or draws")
    return False


def _content(folder: Path) -> dict[str, Any]:
    """What a cache says of itself, on all processes what the main one reads; of none that it is not complete."""
    found: list[dict[str, Any] | None] = [None]
    if PartialState().is_main_process:
        found[0] = _read_content(folder)
    if PartialState().num_processes > 1:
        broadcast_object_list(found)
    return cast(dict[str, Any], found[0])


def _read_content(folder: Path) -> dict[str, Any]:
    file = folder / CACHE_FILE
    if not file.is_file():
        return {"complete": False}
    found = read_json(file)
    if not isinstance(found, dict) or not {"key", "processes", "complete"} <= set(found):
        raise StaleCache(f"{file} does not say what the feature cache {folder} depends on: delete it, or name another folder.")
    return found


def cache_bytes(folder: Path, key: dict[str, Any], model: DevilModel, dataset: Dataset | IterableDataset) -> int:
    """Bytes that a cache still needs on the disk; 0 for a stream, of which nobody knows it."""
    if not isinstance(dataset, Dataset) or _read_content(folder)["complete"]:
        return 0
    there = sum(shard.stat().st_size for shard in folder.glob(SHARDS))
    return 2 * len(dataset) * key["views"] * key["draws"] * sum(model.backbone.channels) - there


def _check_key(folder: Path, content: dict[str, Any], wanted: dict[str, Any]) -> None:
    found = content["key"]
    found = {"backbone_built": wanted["backbone_built"]} | found  # caches of before do not say it
    wrong = [name for name in wanted if found.get(name) != wanted[name]]
    if content["complete"] and set(wanted["layers"]) <= set(found.get("layers", ())):
        wrong = [name for name in wrong if name != "layers"]
    if wrong == ["layers"] and set(wanted["layers"]) <= set(found.get("layers", ())):
        raise StaleCache(
            f"the feature cache {folder} is not complete, and of more layers ({found['layers']!r:.200}): a training of these "
            "goes on with it, and then it serves this one as well; or name another folder with --cache_features."
        )
    if wrong:
        shown = "; ".join(f"{name}: {found.get(name)!r:.80} there, {wanted[name]!r:.80} here" for name in wrong)
        raise StaleCache(
            f"the feature cache {folder} is stale ({shown}): name another folder with --cache_features, or delete this one."
        )


def _compute_part(folder, part, parts, key, model, processor, dataset, decoder) -> None:
    """Write the shards of one of several equal parts of the data."""
    rows = _rows_of_part(dataset, part, parts)
    total = -(-len(dataset) // parts) if isinstance(dataset, Dataset) else None
    with tqdm(total=total, desc="features", unit="image", disable=not PartialState().is_local_main_process) as bar:
        for number in itertools.count():
            name = folder / f"features-{part:05d}-{number:05d}"
            sidecar = name.with_suffix(".json")
            if name.with_suffix(".safetensors").is_file():
                read = read_json(sidecar)["rows"]
                bar.update(sum(1 for _ in itertools.islice(rows, read)))
                continue
            drawn: list[dict[str, torch.Tensor]] = []
            keys: list[str] = []
            captions: list[list[str]] = []
            rows_read = 0
            while len(keys) < SHARD_IMAGES:
                samples, read = _good_samples(rows, decoder, min(BATCH_IMAGES, SHARD_IMAGES - len(keys)))
                rows_read += read
                if not samples:
                    break
                seed = seed_of(key["seed"], part, number, len(keys))
                drawn.append(_draw(model, processor, samples, key, seed))
                keys += [sample["key"] for sample in samples]
                captions += [sample["captions"] for sample in samples]
                bar.update(read)
            if drawn:
                features = {layer: torch.cat([batch[layer] for batch in drawn]) for layer in drawn[0]}
                write_json(sidecar, {"rows": rows_read, "keys": keys, "captions": captions}, indent=None)
                with written(name.with_suffix(".safetensors"), "The shards before are kept") as unfinished:
                    save_file(features, unfinished)
            if len(keys) < SHARD_IMAGES:
                return


def _good_samples(rows: Iterator[dict], decoder: PairDecoder, most: int) -> tuple[list[dict], int]:
    """Up to `most` usable samples, and how many rows were read for them."""
    samples: list[dict] = []
    read = 0
    for row in rows:
        read += 1
        sample = decoder(row)
        if sample is not None:
            samples.append(sample)
            if len(samples) == most:
                break
    return samples, read


def _rows_of_part(dataset: Dataset | IterableDataset, part: int, parts: int) -> Iterator[dict]:
    if isinstance(dataset, Dataset):
        return iter(dataset.shard(parts, part, contiguous=True))
    return iter(split_dataset_by_node(dataset, part, parts) if parts > 1 else dataset)


def _draw(model, processor, samples: Sequence[dict], key: dict, seed: int) -> dict[str, torch.Tensor]:
    """Per layer (rows, views x draws, C_l): the whole image first, then random views of it.

    Rows of one image (its regions) share its views, and each view goes through the backbone once.
    """
    sees = sees_with(processor)
    _, image_of = _distinct([sample["image"] for sample in samples])

    def draws_of(view: int) -> list[torch.Tensor]:
        seen = [(sample["image"], sample["region"]) for sample in samples]
        if view:
            seeds = [seed_of(seed, view, image) for image in image_of]
            seen = [view_of(*each, sees) for each in zip(samples, itertools.repeat(key["smallest_crop"]), seeds)]
        pictures, picture_of = _distinct([image for image, _ in seen])
        pixel_values = processor(images=pictures, return_tensors="pt")["pixel_values"]
        regions = batch_regions(processor, [mask for _, mask in seen])
        return pool_draws(model, pixel_values, key["draws"], regions, picture_of)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        views = [draws_of(view) for view in range(key["views"])]
    layers = [torch.cat(layer, dim=1).contiguous() for layer in zip(*views, strict=True)]
    return {f"layer.{index}": layer for index, layer in enumerate(layers)}


def _distinct(images: Sequence[Image.Image]) -> tuple[list[Image.Image], list[int]]:
    """The images without those that repeat the content of one before, and where among them each one's content is."""
    places: dict[Any, int] = {}
    image_of = [places.setdefault((image.mode, image.size, image.tobytes()), len(places)) for image in images]
    return [images[image_of.index(place)] for place in range(len(places))], image_of


class CachedFeatures:
    """The images of a complete cache as training data: one of their draws and one of their captions each time.

    Args:
        folder: the cache.
        seed: of which draw and which caption an epoch takes.
        layers: names of those that are read; None for all that the cache has.
    """

    def __init__(self, folder: Path, seed: int, layers: Sequence[str] | None = None):
        self.seed = seed
        there = read_json(folder / CACHE_FILE)["key"]["layers"]
        self.layers = [there.index(name) for name in layers or there]
        self.shards = sorted(folder.glob(SHARDS))
        contents = [read_json(shard.with_suffix(".json")) for shard in self.shards]
        self.captions: list[list[str]] = [texts for content in contents for texts in content["captions"]]
        self.starts = np.cumsum([0, *(len(content["captions"]) for content in contents)])
        self._open: dict[int, list[torch.Tensor]] = {}

    def __len__(self) -> int:
        return len(self.captions)

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_open": {}}  # a worker opens the files anew

    def sample(self, index: int, epoch: int) -> dict[str, Any]:
        """An image with one of its draws and one of its captions, both drawn by (seed, epoch, index)."""
        shard = int(np.searchsorted(self.starts, index, side="right")) - 1
        if shard not in self._open:
            file = safe_open(self.shards[shard], framework="pt")
            self._open[shard] = [file.get_tensor(f"layer.{layer}") for layer in self.layers]  # mapped, not read
        layers, row = self._open[shard], index - int(self.starts[shard])
        rng = np.random.default_rng((self.seed, epoch, index))
        draw, text = int(rng.integers(layers[0].shape[1])), rng.integers(len(self.captions[index]))
        features = [layer[row, draw] for layer in layers]
        return {"pooled_features": features, "caption": self.captions[index][text]}


__all__ = ["CachedFeatures", "StaleCache", "cache_bytes", "cache_key", "cached_features", "image_transform", "open_cache"]
