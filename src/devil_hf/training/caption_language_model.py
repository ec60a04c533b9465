"""A small causal language model of captions, from text alone, that listens to what stands before the caption.

A model of bare captions learns to ignore a prefix, and a translator in front of it stays on the plateau of the
unconditional loss. So it learns documents `<bos> shuffled content words <sep> caption <eos>`: the words come from
other captions of the same image, which makes them a noisy picture of the scene as a prefix is, and the loss is taken
on the caption only. In some documents several words share a position, as the mean of their embeddings: a prefix vector,
too, stands for more than one word. Others have no words at all: they define what a caption is when nothing is known.
"""

import math
import random
import re
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    get_cosine_schedule_with_warmup,
)
from transformers.utils import logging

logger = logging.get_logger(f"transformers.{__name__}")

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
IGNORED_INDEX = -100
# The tokens of each position of a document (the mean of their embeddings is read), and where its caption begins.
Document = tuple[list[list[int]], int]


@dataclass
class CaptionLanguageModelArguments:
    """How a caption language model is built and trained."""

    vocab_size: int = field(
        default=6000, metadata={"help": "Size of the byte-level BPE vocabulary, special tokens included."}
    )
    width: int = field(default=256, metadata={"help": "Width of the embeddings and layers."})
    layers: int = field(default=6, metadata={"help": "Number of transformer layers."})
    heads: int = field(default=4, metadata={"help": "Number of attention heads."})
    dropout: float = field(
        default=0.0, metadata={"help": "Dropout in training; useless as long as documents hardly repeat."}
    )
    context_length: int = field(
        default=128, metadata={"help": "Longest document, and so prefix plus caption, in tokens."}
    )
    max_words: int = field(
        default=12, metadata={"help": "Most content words in front of a caption; the number is drawn from 1 to this."}
    )
    null_probability: float = field(default=0.12, metadata={"help": "Share of documents without any content word."})
    own_words_probability: float = field(
        default=0.25, metadata={"help": "Share of documents whose words may also come from the caption itself."}
    )
    packed_share: float = field(
        default=0.3, metadata={"help": "Share of documents whose words share a few positions, as means of embeddings."}
    )
    max_steps: int = field(default=4000, metadata={"help": "Optimiser steps."})
    batch_size: int = field(default=64, metadata={"help": "Documents per step."})
    learning_rate: float = field(default=2e-3, metadata={"help": "Peak learning rate of AdamW, cosine decay to zero."})
    warmup_steps: int = field(default=300, metadata={"help": "Steps of linear warm-up."})
    weight_decay: float = field(
        default=0.05, metadata={"help": "Weight decay of matrices; none on biases, norms and embeddings."}
    )
    bf16: bool = field(
        default=False, metadata={"help": "Compute in bfloat16 by autocast; the weights stay in float32."}
    )
    seed: int = field(default=0, metadata={"help": "Seed of initialisation and of the drawn documents."})
    eval_steps: int = field(default=500, metadata={"help": "Steps between two measurements of the held-out loss."})

    def __post_init__(self):
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not divisible by heads {self.heads}; choose a multiple")
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
        arguments (`CaptionLanguageModelArguments`): The shares and bounds of the documents.
    """

    def __init__(
        self,
        groups: Sequence[Sequence[str]],
        tokenizer: PreTrainedTokenizerFast,
        arguments: CaptionLanguageModelArguments,
    ):
        self.arguments, self.tokenizer = arguments, tokenizer
        self.words = [[content_words(caption) for caption in group] for group in groups]
        flat = [caption for group in groups for caption in group]
        tokens = iter(tokenizer(flat, add_special_tokens=False)["input_ids"])
        self.captions = [[next(tokens) for _ in group] for group in groups]
        vocabulary = sorted({word for group in self.words for words in group for word in words})
        self.word_tokens = (
            dict(zip(vocabulary, tokenizer(vocabulary, add_special_tokens=False)["input_ids"], strict=True))
            if vocabulary
            else {}
        )
        self.places = [(image, index) for image, group in enumerate(groups) for index in range(len(group))]

    def draw_words(self, image: int, index: int, generator: random.Random) -> list[str]:
        """Draw the words before caption `index` of `image`; a word that several captions name is drawn more often."""
        others = [words for other, words in enumerate(self.words[image]) if other != index]
        sources = generator.sample(others, generator.randint(1, len(others))) if others else []
        if not others or generator.random() < self.arguments.own_words_probability:
            sources.append(self.words[image][index])
        counts = Counter(word for words in sources for word in words)
        # Exponential races: sorting by them samples without replacement in proportion to the counts, in random order.
        ranked = sorted(counts, key=lambda word: generator.expovariate(counts[word]))
        chosen = ranked[: generator.randint(1, self.arguments.max_words)]
        generator.shuffle(chosen)
        return chosen

    def document(self, image: int, index: int, groups: Sequence[Sequence[str]]) -> Document:
        """One document; words of one of the `groups` share a position, words in groups of their own take one per token."""
        tokenizer = self.tokenizer
        context: list[list[int]] = []
        for group in groups:
            tokens = [token for word in group for token in self.word_tokens[word]]
            context += [tokens] if len(group) > 1 else [[token] for token in tokens]
        room = self.arguments.context_length - 3
        caption = self.captions[image][index][:room]
        start = [[tokenizer.bos_token_id], *context[: room - len(caption)], [tokenizer.sep_token_id]]
        return [*start, *([token] for token in [*caption, tokenizer.eos_token_id])], len(start)

    def batches(
        self, generator: random.Random, size: int, pool: int = 8
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
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
        if generator.random() < self.arguments.null_probability:
            return self.document(*place, [])
        words = self.draw_words(*place, generator)
        positions = len(words)
        if words and generator.random() < self.arguments.packed_share:
            positions = generator.randint(1, positions)
        return self.document(*place, [words[first::positions] for first in range(positions)])


def collate(documents: Sequence[Document], pad_token_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Pad documents on the right.

    Returns:
        `input_ids` (B, T, W), the tokens of each position, and `labels` (B, T), on captions and EOS only.
    """
    length = max(len(positions) for positions, _ in documents)
    width = max(len(tokens) for positions, _ in documents for tokens in positions)
    input_ids = np.full((len(documents), length, width), pad_token_id, dtype=np.int64)
    labels = np.full((len(documents), length), IGNORED_INDEX, dtype=np.int64)
    for row, (positions, start) in enumerate(documents):
        for place, tokens in enumerate(positions):
            input_ids[row, place, : len(tokens)] = tokens
        labels[row, start : len(positions)] = input_ids[row, start : len(positions), 0]
    return torch.from_numpy(input_ids), torch.from_numpy(labels)


def build_caption_language_model(
    tokenizer: PreTrainedTokenizerFast, arguments: CaptionLanguageModelArguments
) -> GPT2LMHeadModel:
    """Build the untrained model, a small GPT-2 with tied embeddings."""
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=arguments.context_length,
        n_embd=arguments.width,
        n_layer=arguments.layers,
        n_head=arguments.heads,
        activation_function="gelu_pytorch_tanh",  # GPT-2's own, by one kernel instead of eight
        resid_pdrop=arguments.dropout,
        embd_pdrop=arguments.dropout,
        attn_pdrop=arguments.dropout,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(arguments.seed)
    return GPT2LMHeadModel(config)


def caption_loss(
    model: PreTrainedModel, input_ids: torch.Tensor, labels: torch.Tensor, reduction: str = "mean"
) -> torch.Tensor:
    """Cross-entropy in nats per labelled token, with logits at labelled positions only.

    `input_ids` is (B, T, W): a position's embedding is the mean over its tokens, padding aside; `labels` is (B, T).
    """
    real = input_ids.ne(cast(int, model.config.pad_token_id)).unsqueeze(-1)  # (B, T, W, 1)
    embeddings = model.get_input_embeddings()(input_ids)
    embeddings = (embeddings * real).sum(2) / real.sum(2).clamp(min=1)  # (B, T, D)
    # Padding is on the right, where causal attention never looks: no mask, and so the fast causal kernels.
    hidden = model.base_model(inputs_embeds=embeddings).last_hidden_state[:, :-1]
    targets = labels[:, 1:]
    wanted = targets != IGNORED_INDEX
    logits = model.get_output_embeddings()(hidden[wanted])  # (tokens, vocabulary)
    return F.cross_entropy(logits.float(), targets[wanted], reduction=reduction)


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
    arguments: CaptionLanguageModelArguments,
    held_out_groups: Sequence[Sequence[str]] | None = None,
    device: str | torch.device = "cpu",
) -> tuple[GPT2LMHeadModel, PreTrainedTokenizerFast, list[dict[str, float]]]:
    """Train tokenizer and language model on captions grouped by image.

    Args:
        groups (`Sequence[Sequence[str]]`): The captions of each training image.
        arguments (`CaptionLanguageModelArguments`): Model and training.
        held_out_groups (`Sequence[Sequence[str]]`, *optional*): Captions of other images, only measured.
        device (`str` or `torch.device`): Where to train.

    Returns:
        The model in eval mode, its tokenizer, and the history: one dict per `eval_steps` with `step`, `loss`, `seconds`
        and, with held-out captions, `loss_with_words` and `loss_without_words`, in nats per token.
    """
    tokenizer = train_caption_tokenizer((caption for group in groups for caption in group), arguments.vocab_size)
    documents = KeywordCaptions(groups, tokenizer, arguments)
    held_out = KeywordCaptions(held_out_groups, tokenizer, arguments) if held_out_groups else None
    model = build_caption_language_model(tokenizer, arguments)
    torch.nn.Module.to(model, device).train()
    optimizer = _optimizer(model, arguments)
    schedule = get_cosine_schedule_with_warmup(optimizer, arguments.warmup_steps, arguments.max_steps)
    batches = documents.batches(random.Random(arguments.seed), arguments.batch_size)
    history, running, start = [], 0.0, time.perf_counter()
    for step in range(1, arguments.max_steps + 1):
        input_ids, labels = next(batches)
        with _autocast(model.device, arguments.bf16):
            loss = caption_loss(model, input_ids.to(device), labels.to(device))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        running = float(loss.detach()) if step == 1 else 0.98 * running + 0.02 * float(loss.detach())
        if not math.isfinite(running):
            raise FloatingPointError(
                f"the loss is {running} at step {step}; lower learning_rate {arguments.learning_rate}"
            )
        if step % arguments.eval_steps == 0 or step == arguments.max_steps:
            history.append(_measure(model, held_out, step, running, time.perf_counter() - start))
            logger.info(f"{history[-1]}")
    return model.eval(), tokenizer, history


def _measure(
    model: PreTrainedModel, held_out: KeywordCaptions | None, step: int, loss: float, seconds: float
) -> dict[str, float]:
    row = {"step": step, "loss": loss, "seconds": seconds}
    if held_out is not None:
        row |= {
            "loss_with_words": held_out_loss(model, held_out, True),
            "loss_without_words": held_out_loss(model, held_out, False),
        }
    return row


def _optimizer(model: PreTrainedModel, arguments: CaptionLanguageModelArguments) -> torch.optim.AdamW:
    embeddings = {id(model.get_input_embeddings().weight), id(model.get_output_embeddings().weight)}
    decayed = [p for p in model.parameters() if p.ndim > 1 and id(p) not in embeddings]
    plain = [p for p in model.parameters() if p.ndim <= 1 or id(p) in embeddings]
    groups = [{"params": decayed, "weight_decay": arguments.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=arguments.learning_rate, betas=(0.9, 0.98), fused=True)


def _autocast(device: torch.device, bf16: bool) -> AbstractContextManager:
    return torch.autocast(device.type, torch.bfloat16) if bf16 else nullcontext()
