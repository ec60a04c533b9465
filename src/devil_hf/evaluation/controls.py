"""Controls: is it the features that speak, or the language model?

Each control takes the features away in another way, and everything is measured again, on the same images, greedily, with all
layers together:

* `backbone_randomised`: random weights in the backbone, from the deepest stage down to all of them (`randomise.py`); only the
  last step has to fail, since shallower features that are left may still speak;
* `shuffled`: the features of another image;
* `null`: the null prefix, every layer hidden; its evidence is 0 by definition, its maps are flat;
* `constant`: one text for every image, of the 20 most frequent descriptions and captions the one with the best CIDEr (ROUGE-L
  where CIDEr is not defined), chosen with the captions in hand; its evidence is that of this text under each image's features;
* `untrained`: a translator of the same shape with random weights, measured against its own null prefix.

Metrics, all with 95 % intervals of a bootstrap over images: CIDEr-D and ROUGE-L of descriptions, in
the shapes world the F1 of colour, texture and shape words; the evidence of the true captions in nats per token over the null
prefix; and the rank correlation (Spearman) of attribution maps with those of the intact model, per image, layer and phrase that
is true of the image. BLEU is a ratio of the whole corpus and comes without interval.

The explainer may be trusted if, for every control, the paired difference of intact and control in CIDEr (in the shapes world of
word F1, too) and in evidence lies above the margin with its whole interval (`MARGINS`), and the maps' correlation with the
intact ones lies below `MAP_CORRELATION_LIMIT` with its whole interval. A description that does not owe its words to the
features cannot pass; one that does, passes whatever its quality.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm

from devil_hf.data.captioned import longest_caption, open_captioned
from devil_hf.data.identity import combined
from devil_hf.evaluation.evaluator import EVALUATORS, EvaluationSettings, Evaluator
from devil_hf.evaluation.judgement import INTACT, WORDS, CaptionTable, Measured, control_text, judge
from devil_hf.evaluation.randomise import randomised_backbone, untrained_translator, weight_stages
from devil_hf.evaluation.results import Evaluation
from devil_hf.evaluation.text.metrics import best_constant
from devil_hf.evaluation.text.words import CARRIER, words_of
from devil_hf.evaluation.units.labels import null_label
from devil_hf.folders import written
from devil_hf.model.pooling_devil import resolve_layers
from devil_hf.settings import option, read_layers
from devil_hf.statistics import Ratio, rank_correlation

FLAT = 1e-3  # nats per token: a map that differs by less from place to place says nothing
STATISTICS_BATCH = 32  # images at once when the statistics of random batch norms are estimated
MAP_PLACES = 256  # layers with more locations are left out of the maps unless asked for
UNTRUSTED = 3  # exit code; 1 is an error, 2 a wrong command line
# Too frequent in English captions to point at anything.
STOP_WORDS = words_of(
    "a an the and or of in on at to with from by for is are was be been being it its his her their he she they this that there "
    "as into onto over up down out off through while who which one two three some other another each near next front"
)


@dataclass(kw_only=True)
class ControlsSettings(EvaluationSettings):
    """Captioned images, and what is asked of them."""

    data: str = option(
        "its held-out scenes, shapes:COUNT[:SEED], caption folder, YAML file of sources, or a source "
        'such as "{kind: hub, path: user/data, image_column: image, caption_column: caption}"',
        "shapes",
    )
    split: str | None = option("of a caption folder", None)
    limit: int | None = option("only the first images", 200)
    phrases: list[str] | None = option("words to map (default: frequent words of the captions)", None)
    layers: list[str] | None = option("layers to map (default: those with at most 256 places)", None)
    map_images: int = option("images to map; more can then not be added to the same folder", 50, least=0)
    max_new_tokens: int = option("at most so many tokens", 30, least=1)
    seed: int = option("of the random weights, the shuffling and the bootstrap", 0)
    output_dir: Path = option("scores, descriptions and maps; a stopped run goes on from there", Path("devil-controls"))

    def validate(self) -> None:
        """See `EvaluationSettings.validate`."""
        super().validate()
        if self.map_images < 2:
            raise ValueError(f"map_images {self.map_images}: at least 2 images are needed")


@dataclass(frozen=True)
class Task:
    """What one row is: "describe" and score, or "evidence" of `captions`, of image `at` under the features of `image`; the "maps"
    of a condition; or the "text" of the null prefix."""

    kind: str
    condition: str
    at: int = 0
    image: int = 0
    captions: tuple[str, ...] = ()


@EVALUATORS.register("controls")
class ControlsEvaluator(Evaluator):
    """The intact model and every control, and the verdict."""

    name = "controls"
    summary = "test whether it is the features that speak; exit code 0: trusted, 3: not trusted, 1: error"
    example = "devil evaluate controls CHECKPOINT --data flickr8k --split val --limit 100"
    Settings = ControlsSettings
    records_file = "controls.jsonl"
    parallel = False  # conditions change the weights
    unit = "row"

    def open(self) -> Iterator[str]:
        """The keys of all conditions; those of the constant text are known when the intact model has described."""
        settings = self.settings
        self.data = open_captioned(settings.data, settings.split, settings.limit)
        self.mapped = min(settings.map_images, len(self.data))
        if self.mapped < 2:
            raise ValueError(f"map_images {settings.map_images}: at least 2 images are needed")
        self.phrases = list(settings.phrases or ())
        if not self.phrases:
            self.phrases = sorted(WORDS) if self.data.scenes else frequent_words(self.data.captions[: self.mapped])
        self.true_phrases = [self._true_phrases(at) for at in range(self.mapped)]
        if not any(self.true_phrases):
            raise ValueError(
                f"none of the phrases {self.phrases} is true of one of the {self.mapped} mapped images: name others (--phrases)"
            )
        self.partner = _derangement(len(self.data), settings.seed)
        self.tasks: dict[str, Task] = {}
        self._changed, self._condition = ExitStack(), INTACT
        return self._keys()

    def _true_phrases(self, at: int) -> list[int]:
        """Positions of the phrases that are true of an image."""
        if self.data.scenes:
            said = {word for words in self.data.scenes[at].words.values() for word in words}
        else:
            said = {word for text in self.data.captions[at] for word in words_of(text)}
        return [at for at, phrase in enumerate(self.phrases) if words_of(phrase) - STOP_WORDS <= said]

    def prepare(self) -> None:
        """Layers to map, and the conditions, which are the backbone's."""
        model, settings = self.model, self.settings
        longest_caption(model)  # raises where there is no room for one
        model.check_phrases(self.processor(text=self.phrases, carrier=CARRIER, return_tensors="pt"))
        first = self._pixel_values([0])
        with torch.no_grad():
            grids = [cast(Tensor, maps).shape[-2:] for maps in model.extract_features(first)]
        places = [rows * columns for rows, columns in grids]
        asked = read_layers(settings.layers, model.layer_names)
        chosen = resolve_layers(asked, model.layer_names) if asked else []
        chosen = chosen or [at for at, count in enumerate(places) if 1 < count <= MAP_PLACES]
        self.layers = sorted(chosen or [places.index(min(places))])
        self.layer_names = [model.layer_names[at] for at in self.layers]
        self.stages = weight_stages(model.backbone, first.to(next(model.backbone.parameters())))
        self.reached = {INTACT: 0}  # the shallowest layer that a condition changes
        self.changes: dict[str, Any] = {INTACT: nullcontext}
        for at in reversed(range(len(self.stages))):
            layer = self.stages[at][0]
            name = f"backbone randomised from {model.layer_names[layer]} up" if at else "backbone_randomised"
            self.changes[name] = lambda at=at: self._randomised(at)
            self.reached[name] = layer
        self.changes["untrained"] = lambda: untrained_translator(model, settings.seed)
        self.reached["untrained"] = 0
        self.total = (len(self.changes) + 2) * len(self.data) + len(self.changes) + 2

    def decides(self) -> dict[str, Any]:
        """Data, maps and decoding."""
        return {
            "data": [self.data.source, self.data.split],
            "phrases": self.phrases,
            "layers": self.layer_names,
            "map_images": self.mapped,
            "max_new_tokens": self.settings.max_new_tokens,
            "seed": self.settings.seed,
        }

    def _keys(self) -> Iterator[str]:
        images = self.data.keys
        for name in self.changes:
            for at, key in enumerate(images):
                yield self._task(f"{name} {key}", Task("describe", name, at, at))
            yield self._task(f"maps {name}", Task("maps", name))
        for at, image in enumerate(self.partner):
            task = Task("evidence", "shuffled", at, image, tuple(self.data.captions[at]))
            yield self._task(f"shuffled {images[at]} {images[image]}", task)
        yield self._task("maps shuffled", Task("maps", "shuffled"))
        yield self._task("null", Task("text", "null"))
        said = [self.records[f"{INTACT} {key}"]["text"] for key in images]  # recorded by now: other groups lie between
        text = self._best_constant(said)
        for at, key in enumerate(images):
            yield self._task(f"constant {text} {key}", Task("evidence", "constant", at, at, (text,)))

    def _task(self, key: str, task: Task) -> str:
        self.tasks[key] = task
        return key

    def _best_constant(self, said: Sequence[str]) -> str:
        scores, count = CaptionTable(self.data.captions), len(self.data)
        captions = [text for several in self.data.captions for text in several]
        # The first that is defined: CIDEr, else ROUGE-L.
        return best_constant([said, captions], lambda text: float(next(iter(scores.of_images([text] * count).values())).mean()))

    def identity(self, key: str) -> str | None:
        """Of the images that a row is about."""
        task = self.tasks[key]
        if not self.data.identities or task.kind == "text":
            return None
        of = range(self.mapped) if task.kind == "maps" else (task.at, task.image)
        return combined(self.data.identities[at] for at in of)

    def group(self, key: str) -> str:
        """Rows of one condition and kind are made together."""
        return f"{self.tasks[key].kind} {self.tasks[key].condition}"

    @torch.no_grad()
    def rows(self, keys: Sequence[str]) -> list[dict[str, Any]]:
        """Texts and evidence of images, correlations of a condition's maps, or the text of the null prefix."""
        tasks = [self.tasks[key] for key in keys]
        kind, condition = tasks[0].kind, tasks[0].condition
        if kind == "maps" and not self._map_file(INTACT).exists():
            self._change(INTACT)  # records are there of maps that were removed
            self._maps(INTACT)
        self._change(condition if condition in self.changes else INTACT)
        if kind == "maps":
            return [self._correlations(condition)]
        if kind == "text":
            return [{"text": null_label(self.model, self.processor, self.settings.max_new_tokens)}]
        prefix = self.model.ask(self._pixel_values([task.image for task in tasks]))
        if kind == "evidence":
            return [{"evidence": values} for values in self._score(prefix, [task.captions for task in tasks])]
        ids = self.model.decode(prefix, max_new_tokens=self.settings.max_new_tokens)
        texts = self.processor.batch_decode(ids, skip_special_tokens=True)
        scored = self._score(prefix, [self.data.captions[task.at] for task in tasks])
        return [{"text": text.strip(), "evidence": values} for text, values in zip(texts, scored, strict=True)]

    def _change(self, condition: str) -> None:
        """Bring the model into a condition, out of the one before."""
        if condition != self._condition:
            self.close()
            self._changed.enter_context(self.changes[condition]())
            self._condition = condition

    def close(self) -> None:
        """The model as it was."""
        self._changed.close()
        self._condition = INTACT

    @contextmanager
    def _randomised(self, stage: int) -> Iterator[None]:
        begins = range(0, self.mapped, STATISTICS_BATCH)
        batches = [range(begin, min(begin + STATISTICS_BATCH, self.mapped)) for begin in begins]
        if len(batches) > 1 and len(batches[-1]) == 1:  # one image alone may have no variance to normalise by
            batches.pop()
        like = next(self.model.backbone.parameters())
        pixel_values = [self._pixel_values(batch).to(like) for batch in batches]
        with randomised_backbone(self.model, self.stages[stage:], pixel_values, self.settings.seed):
            yield

    def _pixel_values(self, positions: Sequence[int]) -> Tensor:
        return self.processor(images=[self.data.load(at) for at in positions], return_tensors="pt")["pixel_values"]

    def _score(self, prefix: Tensor, captions: Sequence[Sequence[str]]) -> list[list[float]]:
        """Evidence of each caption of each row in nats per token, EOS included; captions are cut as those of training are."""
        counts = [len(texts) for texts in captions]
        config = self.model.config
        texts = [text for several in captions for text in several]
        tokens = self.processor(text=texts, max_length=longest_caption(self.model))
        ids, mask = tokens["input_ids"], tokens["attention_mask"]
        if config.eos_token_id is not None:
            ends = mask.sum(dim=1, keepdim=True)
            ids = F.pad(ids, (0, 1), value=self.model.padding_token_id).scatter(1, ends, config.eos_token_id)
            mask = F.pad(mask, (1, 0), value=1)
        rows = prefix.repeat_interleave(torch.tensor(counts, device=prefix.device), dim=0)
        given, null = self.model.sequence_log_probs(rows, ids.to(prefix.device))
        mask = mask.to(given)
        values = ((given - null) * mask).sum(dim=1) / mask.sum(dim=1)
        return [part.tolist() for part in values.split(counts)]

    def _correlations(self, condition: str) -> dict[str, Any]:
        """Mean rank correlation of a condition's maps with the intact ones, per image (None without any), and by layer."""
        if condition == "shuffled":  # only mapped images have maps to deal out
            maps, images = self._maps(INTACT), _derangement(self.mapped, self.settings.seed)
        else:
            maps, images = self._maps(condition), list(range(self.mapped))
        intact = self._maps(INTACT)
        found = np.full((self.mapped, len(intact)), np.nan)
        for at, image in enumerate(images):
            for column, (layer, values) in enumerate(intact.items()):
                pairs = [
                    map_correlation(values[at, k], maps[layer][image, k])
                    for k in self.true_phrases[at]
                    if float(values[at, k].max() - values[at, k].min()) >= FLAT
                ]
                if pairs:
                    found[at, column] = np.mean(pairs)
        means = [Ratio.mean(row).value if np.isfinite(row).any() else None for row in found]
        by_layer = {
            layer: float(np.nanmean(found[:, column]))
            for column, layer in enumerate(intact)
            if np.isfinite(found[:, column]).any()
        }
        return {"correlation": means, "by_layer": by_layer}

    def _map_file(self, condition: str) -> Path:
        # Maps of other settings, whose records were removed, must not be taken for these.
        decided = json.dumps(self.known | {"images": self.data.identities[: self.mapped]} | self.decides(), sort_keys=True)
        folder = Path(self.settings.output_dir) / "maps" / hashlib.sha256(decided.encode()).hexdigest()[:12]
        return folder / f"{condition}.safetensors"

    def _maps(self, condition: str) -> dict[str, Tensor]:
        """Maps of the first images by layer, (images, K, H, W), from disk if they are there."""
        path = self._map_file(condition)
        if path.exists():
            return load_file(path)
        # What lies below the change has not changed.
        kept = {} if condition == INTACT else self._maps(INTACT)
        below = [name for at, name in zip(self.layers, self.layer_names, strict=True) if at < self.reached[condition]]
        maps = {name: kept[name] for name in below}
        asked = [name for name in self.layer_names if name not in maps]
        phrases = self.processor(text=self.phrases, carrier=CARRIER, return_tensors="pt")
        parts: dict[str, list[Tensor]] = {layer: [] for layer in asked}
        size = self.settings.batch_size
        for begin in tqdm(range(0, self.mapped if asked else 0, size), desc=f"maps, {condition}", leave=False):
            pixel_values = self._pixel_values(range(begin, min(begin + size, self.mapped)))
            for layer, values in self.model.attribute(pixel_values, phrases, asked).maps.items():
                parts[layer].append(values.float().cpu())
        maps |= {layer: torch.cat(values) for layer, values in parts.items()}
        with written(path) as unfinished:
            save_file({layer: maps[layer].contiguous() for layer in self.layer_names}, unfinished)
        return maps

    def score(self, rows: Mapping[str, Any]) -> Evaluation:
        """See `judge`."""
        result = judge(self._measured(rows), self.data, self.settings.seed)
        details = {name: result[name] for name in ("intervals", "map_correlation_by_layer", "texts")}
        return Evaluation(
            title="Controls",
            scores=result["scores"],
            controls=result["controls"],
            dataset={"name": self.data.name, "size": len(self.data)} | ({"split": self.data.split} if self.data.split else {}),
            settings={
                "decoding": "greedy",
                "mapped images": self.mapped,
                "mapped layers": ", ".join(self.layer_names),
                "seed": self.settings.seed,
            },
            verdict=result["verdict"],
            missing=result["missing"],
            details=details,
        )

    def _measured(self, rows: Mapping[str, Any]) -> dict[str, Measured]:
        """What every condition gave, the intact one first."""
        count, found = len(self.data), dict[str, Measured]()
        by_condition: dict[str, list[tuple[Task, Any]]] = {}
        for key, row in rows.items():
            by_condition.setdefault(self.tasks[key].condition, []).append((self.tasks[key], row))
        for condition, own in by_condition.items():
            maps: dict[str, Any] = next((row for task, row in own if task.kind == "maps"), {"correlation": [], "by_layer": {}})
            correlation = np.full(count, np.nan)
            correlation[: len(maps["correlation"])] = [np.nan if value is None else value for value in maps["correlation"]]
            images = [(task, row) for task, row in own if task.kind in ("describe", "evidence")]
            texts = [row.get("text", *task.captions[:1]) for task, row in images]
            evidence = np.array([np.mean(row["evidence"]) for _, row in images])
            found[condition] = Measured(texts, evidence, correlation, maps["by_layer"])
        intact = found[INTACT]
        found["shuffled"].texts = [intact.texts[at] for at in self.partner]
        flat = np.where(np.isnan(intact.correlation), np.nan, 0.0)
        found["null"] = Measured([rows["null"]["text"]] * count, np.zeros(count), flat)
        return found

    def text(self, evaluation: Evaluation) -> str:
        """A row per condition, the rules, and the verdict."""
        return control_text(evaluation)

    def exit_code(self, evaluation: Evaluation) -> int:
        """0 where the explainer is trusted."""
        return 0 if evaluation.verdict and evaluation.verdict["passed"] else UNTRUSTED


def _derangement(count: int, seed: int) -> list[int]:
    """Another position for every position, drawn by the seed."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    return order.roll(1)[order.argsort()].tolist()


def map_correlation(one: Tensor, other: Tensor) -> float:
    """Rank correlation of two maps (H, W); 0 where either is flat."""
    if min(float(values.max() - values.min()) for values in (one, other)) < FLAT:
        return 0.0
    return rank_correlation(one.flatten().numpy(), other.flatten().numpy())


def frequent_words(captions: Sequence[Sequence[str]], count: int = 12) -> list[str]:
    """The words that most images' captions have, without those of more than half the images and the commonest of English."""
    images = Counter(word for texts in captions for word in {word for text in texts for word in words_of(text)})
    known = [
        (word, n) for word, n in images.items() if n <= max(len(captions) / 2, 1) and word not in STOP_WORDS and len(word) > 2
    ]
    return [word for word, _ in sorted(known, key=lambda item: (-item[1], item[0]))[:count]]
