"""Captions as a measure of what each layer tells: describe a split, layer by layer, and score it against people's captions."""

from collections.abc import Iterator
from collections.abc import Sequence

import torch
from datasets import Dataset
from tqdm.auto import tqdm

from devil_hf.evaluation.captions import caption_scores
from devil_hf.modeling_devil import DevilModel
from devil_hf.processing_devil import DevilProcessor


def describe_dataset(
    model: DevilModel, processor: DevilProcessor, dataset: Dataset, batch_size: int = 32, **generation_kwargs
) -> dict[str, list[str]]:
    """Descriptions of every image, by layer and by "all" layers together, in the order of the data set.

    Args:
        dataset: with a column `image`.
        generation_kwargs: for `DevilModel.describe`: `guidance`, `num_beams`, `max_new_tokens`, ...
    """
    texts: dict[str, list[str]] = {name: [] for name in ("all", *model.layer_names)}
    for images in tqdm(
        _batches(dataset, batch_size), total=-(-len(dataset) // batch_size), desc="describe", unit="batch"
    ):
        output = model.describe(**processor(images=images, return_tensors="pt"), **generation_kwargs)
        decoded = processor.batch_decode(output.sequences, skip_special_tokens=True)
        for row, text in enumerate(decoded):
            texts[output.layer_of(row)].append(text.strip())
    return texts


def score_descriptions(
    texts: dict[str, list[str]], references: Sequence[Sequence[str]], seed: int = 0
) -> dict[str, dict]:
    """Caption scores by layer, with two controls that use no image.

    "shuffled" gives each image the all-layers description of another one; "constant" gives every image the same description:
    of the twenty that the model says most often, the one with the best CIDEr, chosen with the references in hand.
    """
    scores = {name: caption_scores(rows, references) for name, rows in texts.items()}
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(references), generator=generator)
    shuffled = [texts["all"][int(index)] for index in order.roll(1)[order.argsort()]]
    scores["shuffled"] = caption_scores(shuffled, references)
    candidates = sorted(set(texts["all"]), key=texts["all"].count, reverse=True)[:20]
    constants = [caption_scores([candidate] * len(references), references) for candidate in candidates]
    scores["constant"] = max(constants, key=lambda row: row["cider"])
    return scores


def caption_table(scores: dict[str, dict]) -> str:
    """Scores as text, in the papers' units (times 100)."""
    columns = ("bleu_1", "bleu_4", "rouge_l", "cider")
    lines = [f"{'':12}" + "".join(f"{column:>10}" for column in columns)]
    lines += [f"{name:12}" + "".join(f"{100 * row[c]:10.1f}" for c in columns) for name, row in scores.items()]
    return "\n".join(lines)


def _batches(dataset: Dataset, batch_size: int) -> Iterator[list]:
    for start in range(0, len(dataset), batch_size):
        yield dataset[start : start + batch_size]["image"]
