"""A small causal language model of captions, from text alone.

The content of its documents (see `documents`) are words of other captions of the same image, which makes them a noisy picture of
the scene as a prefix is. Some documents have no words at all: they define what a caption is when nothing is known.
"""

import hashlib
import json
import random
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import GPT2LMHeadModel, PreTrainedModel, PreTrainedTokenizerFast

from devil_hf.settings import option
from devil_hf.training.small_models.documents import (
    IGNORED_INDEX,
    Document,
    LanguageModelSettings,
    build_language_model,
    caption_loss,
    collate,
)
from devil_hf.training.small_models.optimisation import Unfinished, minimise

_FUNCTION_WORDS = """
    a about above across after against all along also am among an and another any are around as at away back be been
    before behind being below beneath beside besides between both but by can could did do does doing down during
    each either etc every few for from front further had has have having he her here hers him his how i if in inside
    into is it its itself just like made many more most much near next no nor not of off on once one only onto or
    other others out outside over own past several she so some something such that the their them themselves then
    there these they this those through to together top toward towards under until up upon very was we were what
    when where which while who whose will with within without would you your
"""
FUNCTION_WORDS = frozenset(_FUNCTION_WORDS.split())


@dataclass
class CaptionLanguageModelSettings(LanguageModelSettings):
    """How a caption language model is built and trained."""

    vocab_size: int = option("size of the byte-level BPE vocabulary, special tokens included", 6_000)
    width: int = option("width of the embeddings and layers", 256)
    layers: int = option("number of transformer layers", 6)
    context_length: int = option("longest document, and so prefix plus caption, in tokens", 128)
    max_words: int = option("most content words before a caption; the number is drawn from 1 to this", 12)
    null_probability: float = option("share of documents without any content word", 0.12)
    own_words_probability: float = option("share of documents whose words may also come from the caption itself", 0.25)
    packed_share: float = option("share of documents whose words share a few positions, as means of embeddings", 0.3)
    max_steps: int = option("optimiser steps", 4_000)
    warmup_steps: int = option("steps of linear warm-up", 300)
    logging_steps: int = option("steps between two measurements of the held-out loss", 500)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.null_probability < 1:
            raise ValueError(
                f"null_probability {self.null_probability} is outside [0, 1); with 1 the model would never see a word"
            )


def content_words(caption: str) -> list[str]:
    """Give the lower-cased words of a caption that carry its content, in order, repeated ones once."""
    words = re.findall(r"[^\W_]+(?:[-'][^\W_]+)*", caption.lower())
    return [word for word in dict.fromkeys(words) if word not in FUNCTION_WORDS and len(word) > 1]


def train_caption_tokenizer(captions: Iterable[str], vocab_size: int = 6000) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE on captions: lower-cased and without punctuation, because caption metrics ignore both.

    Args:
        captions (`Iterable[str]`): The texts.
        vocab_size (`int`): Upper bound of the vocabulary, special tokens included.

    Returns:
        `PreTrainedTokenizerFast` with `<pad>`, `<bos>`, `<eos>` and the separator `<sep>`; it adds no special token by itself.
    """
    tokenizer = Tokenizer(models.BPE())
    punctuation = Regex(r"[.,!?;:\"`()\[\]{}]+|(?<!\w)'|'(?!\w)")
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.Lowercase(),
            normalizers.Replace(punctuation, " "),
            normalizers.Replace(Regex(r"\s+"), " "),
            normalizers.Strip(),
        ]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<pad>", "<bos>", "<eos>", "<sep>"]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(captions, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        sep_token="<sep>",
        clean_up_tokenization_spaces=False,
    )


class KeywordCaptions:
    """Documents `<bos> words <sep> caption <eos>` drawn from captions that are grouped by image.

    Args:
        groups (`Sequence[Sequence[str]]`): The captions of each image.
        tokenizer (`PreTrainedTokenizerFast`): With BOS, EOS and separator.
        settings (`CaptionLanguageModelSettings`): The shares and bounds of the documents.
    """

    def __init__(
        self, groups: Sequence[Sequence[str]], tokenizer: PreTrainedTokenizerFast, settings: CaptionLanguageModelSettings
    ):
        self.settings, self.tokenizer = settings, tokenizer
        self.words = [[content_words(caption) for caption in group] for group in groups]
        flat = [caption for group in groups for caption in group]
        tokens = iter(tokenizer(flat, add_special_tokens=False)["input_ids"])
        self.captions = [[next(tokens) for _ in group] for group in groups]
        vocabulary = sorted({word for group in self.words for words in group for word in words})
        self.word_tokens = (
            dict(zip(vocabulary, tokenizer(vocabulary, add_special_tokens=False)["input_ids"], strict=True)) if vocabulary else {}
        )
        self.places = [(image, index) for image, group in enumerate(groups) for index in range(len(group))]

    def draw_words(self, image: int, index: int, generator: random.Random) -> list[str]:
        """Draw the words before caption `index` of `image`; a word that several captions name is drawn more often."""
        others = [words for other, words in enumerate(self.words[image]) if other != index]
        sources = generator.sample(others, generator.randint(1, len(others))) if others else []
        if not others or generator.random() < self.settings.own_words_probability:
            sources.append(self.words[image][index])
        counts = Counter(word for words in sources for word in words)
        # Exponential races: sorting by them samples without replacement in proportion to the counts, in random order.
        ranked = sorted(counts, key=lambda word: generator.expovariate(counts[word]))
        chosen = ranked[: generator.randint(1, self.settings.max_words)]
        generator.shuffle(chosen)
        return chosen

    def document(self, image: int, index: int, groups: Sequence[Sequence[str]]) -> Document:
        """One document; words of one of the `groups` share a position, words in groups of their own take one per token."""
        tokenizer = self.tokenizer
        context: list[list[int]] = []
        for group in groups:
            tokens = [token for word in group for token in self.word_tokens[word]]
            context += [tokens] if len(group) > 1 else [[token] for token in tokens]
        room = self.settings.context_length - 3
        caption = self.captions[image][index][:room]
        start = [[tokenizer.bos_token_id], *context[: room - len(caption)], [tokenizer.sep_token_id]]
        return [*start, *([token] for token in [*caption, tokenizer.eos_token_id])], len(start)

    def batches(self, generator: random.Random, size: int, pool: int = 8) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield `input_ids` (B, T, W) and `labels` (B, T) without end; documents of similar length share a batch."""
        places: list[tuple[int, int]] = []
        while True:
            while len(places) < pool * size:
                places += generator.sample(self.places, len(self.places))
            documents = sorted(
                (self._draw(place, generator) for place in places[: pool * size]), key=lambda document: len(document[0])
            )
            places = places[pool * size :]
            batches = [documents[begin : begin + size] for begin in range(0, len(documents), size)]
            generator.shuffle(batches)
            yield from (collate(batch, self.tokenizer.pad_token_id) for batch in batches)

    def held_out(self, with_words: bool, seed: int = 0, size: int = 64) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield one fixed document per caption: all content words of one other caption of its image, or none."""
        generator = random.Random(seed)
        documents = []
        for image, index in self.places:
            others = [words for other, words in enumerate(self.words[image]) if other != index]
            words = generator.sample(chosen := generator.choice(others), len(chosen)) if with_words and others else []
            documents.append(self.document(image, index, [[word] for word in words]))
        documents.sort(key=lambda document: len(document[0]))
        for begin in range(0, len(documents), size):
            yield collate(documents[begin : begin + size], self.tokenizer.pad_token_id)

    def _draw(self, place: tuple[int, int], generator: random.Random) -> Document:
        if generator.random() < self.settings.null_probability:
            return self.document(*place, [])
        words = self.draw_words(*place, generator)
        positions = len(words)
        if words and generator.random() < self.settings.packed_share:
            positions = generator.randint(1, positions)
        return self.document(*place, [words[first::positions] for first in range(positions)])


@torch.inference_mode()
def held_out_loss(model: PreTrainedModel, documents: KeywordCaptions, with_words: bool) -> float:
    """Mean loss in nats per token over fixed documents of held-out captions, with the words of another caption or without any."""
    training = model.training
    model.eval()
    total, tokens = 0.0, 0
    for input_ids, labels in documents.held_out(with_words):
        total += float(caption_loss(model, input_ids.to(model.device), labels.to(model.device), reduction="sum"))
        tokens += int((labels != IGNORED_INDEX).sum())
    model.train(training)
    return total / tokens


def train_caption_language_model(
    groups: Sequence[Sequence[str]],
    settings: CaptionLanguageModelSettings,
    held_out_groups: Sequence[Sequence[str]] | None = None,
    device: str | torch.device = "cpu",
    unfinished: Path | None = None,
) -> tuple[GPT2LMHeadModel, PreTrainedTokenizerFast, list[dict[str, float]]]:
    """Train tokenizer and language model on captions grouped by image.

    Args:
        groups: the captions of each training image.
        held_out_groups: captions of other images, only measured.
        unfinished: file in which a stopped training goes on; the caller removes it in the end.

    Returns:
        The model in eval mode, its tokenizer, and the history of `minimise`, in nats per token; with held-out captions its
        rows have `loss_with_words` and `loss_without_words`, too.
    """
    tokenizer = train_caption_tokenizer((caption for group in groups for caption in group), settings.vocab_size)
    documents = KeywordCaptions(groups, tokenizer, settings)
    held_out = KeywordCaptions(held_out_groups, tokenizer, settings) if held_out_groups else None
    torch.manual_seed(settings.seed)
    model = build_language_model(tokenizer, settings)
    torch.nn.Module.to(model, device)
    batches = documents.batches(random.Random(settings.seed), settings.batch_size)
    drawn = 0

    def loss_of_step(step: int) -> torch.Tensor:
        nonlocal drawn
        drawn += 1
        input_ids, labels = next(batches)
        return caption_loss(model, input_ids.to(device), labels.to(device))

    def measure() -> dict[str, float]:
        if held_out is None:
            return {}
        shares = {"loss_with_words": True, "loss_without_words": False}
        return {name: held_out_loss(model, held_out, with_words) for name, with_words in shares.items()}

    def redraw(count: int) -> None:
        nonlocal drawn
        drawn = count
        for _ in range(count):
            next(batches)

    state = None
    if unfinished:
        own = {field.name: getattr(settings, field.name) for field in fields(CaptionLanguageModelSettings)}
        texts = hashlib.sha256(json.dumps([groups, held_out_groups]).encode()).hexdigest()
        state = Unfinished(unfinished, own | {"captions": texts}, lambda: drawn, redraw)
    return model, tokenizer, minimise(model, loss_of_step, settings, measure, state)


__all__ = [
    "CaptionLanguageModelSettings",
    "KeywordCaptions",
    "content_words",
    "held_out_loss",
    "train_caption_language_model",
    "train_caption_tokenizer",
]
