"""The frozen parts of the embedded world: a small timm backbone and a small causal language model.

The backbone is a narrow ResNet that names the attributes of objects: where they are, from `layer2` on, and for the
whole picture after mean pooling. Shape is asked for from `layer3` on only, so that it emerges with depth as in large
networks. Pairs and triples of attributes are asked for too: without them a pooled feature tells that red and stripes
are there, but not that the red thing is striped. Deep cells see most of the picture and, left alone, tell of objects
that are not there; activity on cells without any object has a price, so that a map of a layer means its places.

The language model reads text alone. A model of bare captions learns to ignore a prefix, so it learns documents `<bos>
keywords <sep> caption <eos>` with the loss on the caption. Keywords stand in groups, one group per object, in shuffled
order, sometimes incomplete, and sometimes a group is packed into a single position as the mean of its embeddings, which
is nearer to what a prefix vector is. In some documents a group holds one attribute of all the objects instead: which
colours there are, but not of what. They teach that every word has to be said once, whatever it belongs to; without
them, a description names one object twice where a pooled feature does not tell what belongs together. Documents without
keywords define what a caption is when nothing is known.
"""

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from itertools import combinations
from math import prod
from typing import Any, cast

import numpy as np
import timm
import torch
import torch.nn.functional as F
from timm.models.resnet import ResNet
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast, get_cosine_schedule_with_warmup
from transformers.utils import logging

from devil_hf.data.rendering import SCENE_SIZE, SceneObject
from devil_hf.data.shapes import ATTRIBUTE_WORDS, VOCABULARY, Scene, sample_scene
from devil_hf.training.caption_language_model import Document, caption_loss, collate

logger = logging.get_logger(f"transformers.{__name__}")

BACKBONE_ARCHITECTURE = "resnet10t"
BACKBONE_ARGUMENTS: dict[str, Any] = {
    "stem_width": 12,
    "channels": [32, 64, 128, 256],
    "layers": [1, 1, 2, 1],
    "num_classes": 0,
}
PIXEL_MEAN, PIXEL_STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
BACKBONE_DATA_CONFIG: dict[str, Any] = {
    "input_size": (3, SCENE_SIZE, SCENE_SIZE),
    "interpolation": "bilinear",
    "crop_pct": 1.0,
    "crop_mode": "center",
    "mean": PIXEL_MEAN,
    "std": PIXEL_STD,
    "num_classes": 0,
    "pool_size": (4, 4),
    "first_conv": "conv1.0",
    "classifier": "fc",
    "license": "apache-2.0",
}
DENSE_GRID = 16  # cells per side of layer2; deeper layers have halves of it


@dataclass
class EmbeddedBackboneArguments:
    """How the backbone of the embedded world is trained."""

    max_steps: int = field(default=2500, metadata={"help": "Optimiser steps."})
    batch_size: int = field(default=64, metadata={"help": "Scenes per step, each seen once."})
    learning_rate: float = field(default=3e-3, metadata={"help": "Peak learning rate of AdamW, cosine decay to zero."})
    warmup_steps: int = field(default=200, metadata={"help": "Steps of linear warm-up."})
    weight_decay: float = field(default=0.05, metadata={"help": "Weight decay of matrices; none on biases and norms."})
    quiet_weight: float = field(
        default=0.1, metadata={"help": "Price of activity on cells of layer3 and layer4 that no object touches."}
    )
    bf16: bool = field(default=True, metadata={"help": "Compute in bfloat16 by autocast; the weights stay in float32."})
    seed: int = field(default=0, metadata={"help": "Seed of initialisation and of the scenes."})
    logging_steps: int = field(default=100, metadata={"help": "Steps between two rows of the history."})


@dataclass
class EmbeddedLanguageModelArguments:
    """How the language model of the embedded world is built and trained."""

    width: int = field(default=128, metadata={"help": "Width of the embeddings and layers."})
    layers: int = field(default=4, metadata={"help": "Number of transformer layers."})
    heads: int = field(default=4, metadata={"help": "Number of attention heads."})
    context_length: int = field(
        default=96, metadata={"help": "Longest document, and so prefix plus caption, in tokens."}
    )
    bare_share: float = field(default=0.12, metadata={"help": "Share of documents without keywords."})
    partial_share: float = field(
        default=0.3, metadata={"help": "Share of documents from whose keywords some are missing."}
    )
    packed_share: float = field(
        default=0.5, metadata={"help": "Share of documents whose groups of keywords take one position each."}
    )
    unbound_share: float = field(
        default=0.1, metadata={"help": "Share of documents whose groups are attributes of all objects, not objects."}
    )
    single_steps: int = field(default=400, metadata={"help": "First steps, on scenes with one object only."})
    max_steps: int = field(default=6000, metadata={"help": "Optimiser steps."})
    batch_size: int = field(default=64, metadata={"help": "Documents per step."})
    learning_rate: float = field(default=2e-3, metadata={"help": "Peak learning rate of AdamW, cosine decay to zero."})
    warmup_steps: int = field(default=200, metadata={"help": "Steps of linear warm-up."})
    weight_decay: float = field(
        default=0.05, metadata={"help": "Weight decay of matrices; none on biases, norms and embeddings."}
    )
    seed: int = field(default=0, metadata={"help": "Seed of initialisation and of the documents."})
    logging_steps: int = field(default=100, metadata={"help": "Steps between two rows of the history."})

    def __post_init__(self):
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not divisible by heads {self.heads}; choose a multiple")


# ----------------------------------------------------------------------------------------------------------------
# backbone


class AttributeLabels:
    """Numbers attribute words, their pairs, their triples: 18 + 104 + 192 labels of which an object has 3 + 3 + 1."""

    def __init__(self):
        self.words = list(ATTRIBUTE_WORDS.values())
        self.subsets = [subset for size in (1, 2, 3) for subset in combinations(range(len(self.words)), size)]
        sizes = [prod(len(self.words[axis]) for axis in subset) for subset in self.subsets]
        self.starts = np.concatenate([[0], np.cumsum(sizes)])
        self.singles, self.pairs, self.count = int(self.starts[3]), int(self.starts[6]), int(self.starts[-1])

    def of(self, item: SceneObject) -> list[int]:
        """The labels of one object."""
        places = [words.index(value) for words, value in zip(self.words, item.attributes.values(), strict=True)]
        return [
            int(start) + self._rank(subset, places)
            for start, subset in zip(self.starts[:-1], self.subsets, strict=True)
        ]

    def _rank(self, subset: tuple[int, ...], places: Sequence[int]) -> int:
        rank = 0
        for axis in subset:
            rank = rank * len(self.words[axis]) + places[axis]
        return rank


def build_embedded_backbone() -> ResNet:
    """Build the untrained backbone; its preprocessing is in `pretrained_cfg`."""
    backbone: Any = timm.create_model(BACKBONE_ARCHITECTURE, pretrained_cfg=BACKBONE_DATA_CONFIG, **BACKBONE_ARGUMENTS)
    return backbone


def scene_pixels(scenes: Sequence[Scene]) -> torch.Tensor:
    """The normalised pictures (B, 3, 128, 128) in float32, as the backbone's evaluation preprocessing gives them."""
    pixels = torch.from_numpy(np.stack([scene.image for scene in scenes])).permute(0, 3, 1, 2).float() / 255
    mean, std = torch.tensor(PIXEL_MEAN).view(3, 1, 1), torch.tensor(PIXEL_STD).view(3, 1, 1)
    return (pixels - mean) / std


def scene_targets(scenes: Sequence[Scene], labels: AttributeLabels) -> torch.Tensor:
    """How much of each cell of the finest grid shows an object with each label: (B, labels, 16, 16), 0 to 1."""
    step = SCENE_SIZE // DENSE_GRID
    shares = np.zeros((len(scenes), labels.count, DENSE_GRID, DENSE_GRID), dtype=np.float32)
    for row, scene in enumerate(scenes):
        cells = scene.masks.reshape(-1, DENSE_GRID, step, DENSE_GRID, step).mean((2, 4))
        for item, share in zip(scene.objects, cells, strict=True):
            shares[row, labels.of(item)] += share
    return torch.from_numpy(shares)


class AttributeHeads(nn.Module):
    """Linear readers of the feature maps of layer2, layer3 and layer4, and of layer4's mean; only used in training."""

    def __init__(self, channels: Sequence[int], labels: AttributeLabels):
        super().__init__()
        early = labels.singles - len(ATTRIBUTE_WORDS["shape"])
        self.dense = nn.ModuleList(
            nn.Conv2d(width, size, 1) for width, size in zip(channels, (early, labels.pairs, labels.count), strict=True)
        )
        self.whole = nn.Linear(channels[-1], labels.count)
        for head in (*self.dense, self.whole):
            nn.init.constant_(head.bias, -4.0)  # labels are rare: from 0 the first hundred steps would only learn that

    def forward(self, features: Sequence[torch.Tensor], shares: torch.Tensor) -> torch.Tensor:
        """Cross-entropy, summed over labels, for three maps (B, C_l, H_l, W_l) and `shares` (B, 314, 16, 16)."""
        loss = features[0].new_zeros(())
        for head, feature, full in zip(self.dense, features, (0.5, 0.4, 0.25), strict=True):
            target = F.adaptive_avg_pool2d(shares[:, : head.out_channels], (feature.shape[-2], feature.shape[-1]))
            # A cell counts in full once an object fills the share `full` of it: objects are smaller than deep cells.
            target = (target / full).clamp(max=1.0)
            cells = F.binary_cross_entropy_with_logits(head(feature).float(), target, reduction="none")
            loss = loss + cells.sum(1).mean()
        present = (shares.amax((2, 3)) > 0).float()
        whole = self.whole(features[-1].mean((2, 3))).float()
        return loss + F.binary_cross_entropy_with_logits(whole, present, reduction="none").sum(1).mean()


def stray_activity(features: Sequence[torch.Tensor], shares: torch.Tensor) -> torch.Tensor:
    """Activity on cells that no object touches: summed over channels and maps (B, C_l, H_l, W_l), mean over such cells."""
    covered = shares.amax(1, keepdim=True)  # (B, 1, 16, 16)
    total = features[0].new_zeros((), dtype=torch.float32)
    for feature in features:
        empty = (F.adaptive_max_pool2d(covered, (feature.shape[-2], feature.shape[-1])) == 0).float()
        total = total + (feature.float().abs() * empty).sum() / empty.sum().clamp(min=1)
    return total


def train_embedded_backbone(
    arguments: EmbeddedBackboneArguments, device: str | torch.device = "cpu"
) -> tuple[ResNet, list[dict[str, float]]]:
    """Train the backbone on scenes that are made as they are needed.

    Args:
        arguments (`EmbeddedBackboneArguments`): The training.
        device (`str` or `torch.device`): Where to train.

    Returns:
        The backbone in eval mode, and the history: `step`, running `loss` in nats per scene, `seconds`, once per
        `logging_steps`.

    Raises:
        FloatingPointError: if the loss is no longer finite.
    """
    torch.manual_seed(arguments.seed)
    labels = AttributeLabels()
    backbone = build_embedded_backbone().to(torch.device(device)).to(memory_format=torch.channels_last).train()
    heads = AttributeHeads(BACKBONE_ARGUMENTS["channels"][1:], labels).to(device)
    rng = np.random.default_rng((arguments.seed, 1))

    def loss_of_step(step: int) -> torch.Tensor:
        scenes = [sample_scene(rng) for _ in range(arguments.batch_size)]
        pixels = scene_pixels(scenes).to(device, memory_format=torch.channels_last)
        with _autocast(device, arguments.bf16):
            features: Any = backbone.forward_intermediates(pixels, indices=[2, 3, 4], intermediates_only=True)
            shares = scene_targets(scenes, labels).to(device)
            return heads(features, shares) + arguments.quiet_weight * stray_activity(features[1:], shares)

    history = _optimise(nn.ModuleList([backbone, heads]), loss_of_step, arguments)
    return backbone.to(memory_format=torch.contiguous_format).eval(), history


@torch.inference_mode()
def pooled_features(backbone: ResNet, scenes: Sequence[Scene], batch_size: int = 64) -> dict[str, torch.Tensor]:
    """Mean-pooled features (scenes, C_l) of `layer1` to `layer4`, by layer."""
    parts = []
    for start in range(0, len(scenes), batch_size):
        pixels = scene_pixels(scenes[start : start + batch_size])
        maps: Any = backbone.forward_intermediates(pixels, indices=[1, 2, 3, 4], intermediates_only=True)
        parts.append([feature.mean((2, 3)) for feature in maps])
    return {f"layer{depth}": torch.cat(part) for depth, part in enumerate(zip(*parts, strict=True), 1)}


def probe_embedded_backbone(
    backbone: ResNet, train_scenes: int = 4000, test_scenes: int = 1000, seed: int = 99
) -> dict[str, dict[str, float]]:
    """Ask linear probes which attribute words a scene's mean-pooled features tell.

    Returns:
        Micro F1 on held-out scenes, by layer and attribute.
    """
    rng = np.random.default_rng(seed)
    labels = AttributeLabels()
    scenes = [sample_scene(rng) for _ in range(train_scenes + test_scenes)]
    present = torch.zeros(len(scenes), labels.singles, dtype=torch.bool)
    for row, scene in enumerate(scenes):
        present[row, [label for item in scene.objects for label in labels.of(item)[: len(ATTRIBUTE_WORDS)]]] = True
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        features = pooled_features(backbone, scenes)
        return {layer: _probe(feature, present, train_scenes, labels) for layer, feature in features.items()}


def _probe(features: torch.Tensor, present: torch.Tensor, train: int, labels: AttributeLabels) -> dict[str, float]:
    mean, std = features[:train].mean(0), features[:train].std(0) + 1e-6
    inputs = ((features - mean) / std).clone()
    probe = nn.Linear(inputs.shape[1], present.shape[1])
    optimizer = torch.optim.LBFGS(probe.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        penalty = 1e-5 * probe.weight.square().sum()
        loss = F.binary_cross_entropy_with_logits(probe(inputs[:train]), present[:train].float()) + penalty
        loss.backward()
        return loss

    optimizer.step(closure)
    guess, truth = probe(inputs[train:]) > 0, present[train:]
    scores = {}
    for attribute, start, stop in zip(ATTRIBUTE_WORDS, labels.starts[:3], labels.starts[1:4], strict=True):
        hits = (guess & truth)[:, start:stop].sum()
        scores[attribute] = float(2 * hits / (guess[:, start:stop].sum() + truth[:, start:stop].sum()))
    return scores


# ----------------------------------------------------------------------------------------------------------------
# language model


def build_embedded_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word of the shapes world; a word from outside is `<unk>`. It adds no special token by itself."""
    special = ("<pad>", "<bos>", "<eos>", "<unk>", "<sep>")
    tokenizer = Tokenizer(
        models.WordLevel({word: index for index, word in enumerate((*special, *VOCABULARY))}, unk_token="<unk>")
    )
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        sep_token="<sep>",
        clean_up_tokenization_spaces=False,
    )


class KeywordDocuments:
    """Documents of the shapes world, made as they are needed.

    Args:
        tokenizer (`PreTrainedTokenizerFast`): From [`build_embedded_tokenizer`].
        arguments (`EmbeddedLanguageModelArguments`): The shares of the kinds of documents.
    """

    group_width = 8  # most words in one position of a packed document

    def __init__(self, tokenizer: PreTrainedTokenizerFast, arguments: EmbeddedLanguageModelArguments):
        self.arguments, self.tokenizer = arguments, tokenizer
        self.index = tokenizer.get_vocab()

    def keywords(self, scene: Scene, rng: np.random.Generator) -> list[list[str]]:
        """Groups of keywords of a scene, one per object (or attribute) and sometimes one for the background, shuffled."""
        missing = rng.uniform(0.0, 0.7) if rng.random() < self.arguments.partial_share else 0.0
        with_size, with_zone = rng.random(2) < 0.3
        groups = []
        if rng.random() < self.arguments.unbound_share:
            for kind in zip(*(item.attributes.values() for item in scene.objects), strict=True):
                groups.append([word for word in kind if rng.random() >= missing])
            return [_shuffled(group, rng) for group in _shuffled(groups, rng) if group]
        for item in scene.objects:
            words = [
                *item.attributes.values(),
                *([item.size] if with_size else []),
                *(item.zone.split() if with_zone else []),
            ]
            groups.append([word for word in words if rng.random() >= missing])
        if rng.random() < 0.3:
            groups.append([scene.background, "background"])
        return [_shuffled(group, rng) for group in _shuffled(groups, rng) if group]

    def document(self, scene: Scene, rng: np.random.Generator) -> Document:
        """One document about `scene`."""
        groups = [] if rng.random() < self.arguments.bare_share else self.keywords(scene, rng)
        if rng.random() >= self.arguments.packed_share:
            groups = [[word] for group in groups for word in group]
        context = [[self.index[word] for word in group[: self.group_width]] for group in groups]
        # Half of the bare captions lack the separator too: a prefix need not end in anything that resembles it.
        separator = [[self.tokenizer.sep_token_id]] if groups or rng.random() < 0.5 else []
        start = [[self.tokenizer.bos_token_id], *context, *separator]
        caption = [[self.index[word]] for word in scene.caption(rng).split()]
        return [*start, *caption, [self.tokenizer.eos_token_id]], len(start)

    def batch(self, size: int, rng: np.random.Generator, count: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Make documents about scenes of `count` objects (any number by default).

        Returns:
            `input_ids` (B, T, W), the words of each position, padded on the right with the pad token; `labels` (B, T),
                on captions and EOS only.
        """
        documents = [self.document(sample_scene(rng, count), rng) for _ in range(size)]
        return collate(documents, cast(int, self.tokenizer.pad_token_id))


def build_embedded_language_model(
    tokenizer: PreTrainedTokenizerFast, arguments: EmbeddedLanguageModelArguments
) -> GPT2LMHeadModel:
    """Build the untrained language model, a GPT-2 with tied embeddings and without dropout: documents never repeat."""
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=arguments.context_length,
        n_embd=arguments.width,
        n_layer=arguments.layers,
        n_head=arguments.heads,
        activation_function="gelu_pytorch_tanh",  # GPT-2's own, by one kernel instead of eight
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = GPT2LMHeadModel(config)
    # Learned embeddings of words put colours into opposite pairs, and then the mean of red and yellow is that of cyan and
    # purple. Fixed orthogonal ones let any set of words be told from its sum.
    embedding: Any = model.get_input_embeddings()
    nn.init.orthogonal_(embedding.weight)
    embedding.weight.requires_grad_(False)
    return model


def train_embedded_language_model(
    arguments: EmbeddedLanguageModelArguments, device: str | torch.device = "cpu"
) -> tuple[GPT2LMHeadModel, PreTrainedTokenizerFast, list[dict[str, float]]]:
    """Train the language model on text alone.

    Args:
        arguments (`EmbeddedLanguageModelArguments`): The model and its training.
        device (`str` or `torch.device`): Where to train.

    Returns:
        The model in eval mode, its tokenizer, and the history: `step`, running `loss` in nats per token, `seconds`,
        once per `logging_steps`.

    Raises:
        FloatingPointError: if the loss is no longer finite.
    """
    torch.manual_seed(arguments.seed)
    tokenizer = build_embedded_tokenizer()
    documents = KeywordDocuments(tokenizer, arguments)
    model = build_embedded_language_model(tokenizer, arguments)
    model.to(device).train()  # type: ignore[arg-type]
    rng = np.random.default_rng((arguments.seed, 2))

    def loss_of_step(step: int) -> torch.Tensor:
        input_ids, labels = documents.batch(
            arguments.batch_size, rng, count=1 if step <= arguments.single_steps else None
        )
        return caption_loss(model, input_ids.to(device), labels.to(device))

    history = _optimise(model, loss_of_step, arguments)
    return model.eval(), tokenizer, history


@torch.inference_mode()
def held_out_document_losses(
    model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, documents: int = 512, seed: int = 77
) -> dict[str, float]:
    """Loss in nats per token on fresh documents with keywords, one per position or packed, and without."""
    losses = {}
    for name, bare, packed in (
        ("with_keywords", 0.0, 0.0),
        ("with_packed_keywords", 0.0, 1.0),
        ("without_keywords", 1.0, 0.0),
    ):
        arguments = EmbeddedLanguageModelArguments(bare_share=bare, packed_share=packed, partial_share=0.0)
        batch = KeywordDocuments(tokenizer, arguments).batch(documents, np.random.default_rng(seed))
        losses[name] = float(caption_loss(model, *batch))
    return losses


# ----------------------------------------------------------------------------------------------------------------
# optimisation


def _shuffled(items: Sequence, rng: np.random.Generator) -> list:
    return [items[index] for index in rng.permutation(len(items))]


def _autocast(device: str | torch.device, bf16: bool) -> AbstractContextManager:
    return torch.autocast(torch.device(device).type, torch.bfloat16) if bf16 else nullcontext()


def _optimise(
    module: nn.Module,
    loss_of_step: Callable[[int], torch.Tensor],
    arguments: EmbeddedBackboneArguments | EmbeddedLanguageModelArguments,
) -> list[dict[str, float]]:
    """Minimise `loss_of_step(step)` for `step` from 1 to `max_steps` by AdamW with warm-up and cosine decay."""
    embeddings = {id(child.weight) for child in module.modules() if isinstance(child, nn.Embedding)}
    plain = [p for p in module.parameters() if p.ndim < 2 or id(p) in embeddings]
    decayed = [p for p in module.parameters() if p.ndim >= 2 and id(p) not in embeddings]
    groups = [{"params": decayed, "weight_decay": arguments.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=arguments.learning_rate, betas=(0.9, 0.98))
    schedule = get_cosine_schedule_with_warmup(optimizer, arguments.warmup_steps, arguments.max_steps)
    history: list[dict[str, float]] = []
    running, start = None, time.perf_counter()
    for step in range(1, arguments.max_steps + 1):
        loss = loss_of_step(step)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        value = float(loss.detach())
        if not np.isfinite(value):
            raise FloatingPointError(
                f"the loss is {value} at step {step}; lower learning_rate {arguments.learning_rate}"
            )
        running = value if running is None else 0.95 * running + 0.05 * value
        if step % arguments.logging_steps == 0 or step == arguments.max_steps:
            history.append({"step": step, "loss": running, "seconds": time.perf_counter() - start})
            logger.info(f"step {step}/{arguments.max_steps}, loss {running:.4f}, {history[-1]['seconds']:.0f} s")
    return history
