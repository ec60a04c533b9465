"""Reading prefixes: log-probabilities of given phrases, and guidance of the words that `generate` chooses.

Phrases are read as a tree: behind every prefix each of their beginnings is read once, whatever shares it, in one pass and without
padding, and sees the prefix and its own words alone. Logits are computed only where a label is read. Language models that see
what the tree would hide (recurrent and hybrid ones, ALiBi, flash attention) read one phrase after another behind every prefix.
"""

import inspect
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from .outputs_devil import ScoreOutput
from .pooling_devil import read_number, read_tensor

# Memory of a chunk beside the weights; phrases take a quarter on CPUs, which map anew what is larger each time.
CHUNK_BYTES = 1 << 30
BEGINNINGS = 256  # of phrases, read behind a prefix at once: each looks at all the others, and sees few of them


class ScoreMixin:
    """`score` and what it is made of, for `DevilModel`."""

    @torch.no_grad()
    def score(
        self,
        pixel_values: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        scored_mask: Tensor | None = None,
        **question,
    ) -> ScoreOutput:
        """Log-probability of given phrases: multiple choice, evidence, and one place of an attribution map.

        Args:
            pixel_values: (B, 3, H, W).
            input_ids, attention_mask, scored_mask: (K, T), as the processor makes them of phrases; tokens outside of
                `scored_mask` (a carrier such as "the") are read but not counted.
            question: `layers`, `locations`, `window`, `regions`, `location_weights`, `layer_mask`, `feature_maps` of `ask`.
        """
        phrases = self.check_phrases({"input_ids": input_ids, "attention_mask": attention_mask, "scored_mask": scored_mask})
        each = self.score_checked(torch.cat([self.ask(pixel_values, **question), self.null_prefix()]), phrases)
        log_probs, null_log_probs = each[:-1].sum(dim=-1), each[-1].sum(dim=-1)
        evidence = (log_probs - null_log_probs) / phrases["scored_mask"].sum(dim=-1).to(log_probs.device)
        return ScoreOutput(log_probs=log_probs, null_log_probs=null_log_probs, evidence=evidence, token_log_probs=each[:-1])

    def check_phrases(self, phrases: Mapping[str, Tensor | None]) -> dict[str, Any]:
        """Phrase tensors `input_ids`, `attention_mask`, `scored_mask` (K, T), checked, on the language model's device; `texts`.

        Masks that are missing are those of phrases without padding and a carrier. A TypeError for what is no
        mapping; a ValueError as `read_tokens`, for phrases without a token to score, and where they do not fit behind the prefix.
        """
        if not isinstance(phrases, Mapping):
            raise TypeError(f"phrases must come from processor(text=[...], return_tensors='pt'), got {phrases!r:.80}")
        ids, read = self.read_tokens(phrases.get("input_ids"), phrases.get("attention_mask"))
        scored = read.bool()
        if phrases.get("scored_mask") is not None:
            scored = scored & self._token_mask(phrases["scored_mask"], "scored_mask", ids)
        if empty := torch.nonzero(~scored.any(dim=1)).flatten().tolist():
            raise ValueError(f"phrases {empty} have no token to score: leave empty phrases out.")
        length = self.config.prefix_length + 1 + ids.shape[1]
        self.check_context(length, "the prefix and the longest phrase", "shorten that phrase")
        texts = [tuple(row[:end]) for row, end in zip(ids.tolist(), read.sum(dim=1).tolist(), strict=True)]
        return {"input_ids": ids, "attention_mask": read, "scored_mask": scored, "texts": texts}

    def read_tokens(self, input_ids: Any, attention_mask: Any = None) -> tuple[Tensor, Tensor]:
        """Token ids and their attention mask (K, T), checked, on the language model's device.

        A ValueError for ids of a wrong shape or of another vocabulary, and for a mask with padding elsewhere than behind.
        """
        table = self.get_input_embeddings().weight
        ids = torch.empty(0) if input_ids is None else read_tensor(input_ids, "input_ids").to(table.device)
        if ids.ndim != 2 or 0 in ids.shape or ids.is_floating_point():
            raise ValueError(
                f"input_ids must be whole numbers of shape (phrases, tokens), got {tuple(ids.shape)} of type {ids.dtype}: "
                "make them with processor(text=[...])."
            )
        low, high = torch.stack(ids.aminmax()).tolist()
        if low < 0 or high >= table.shape[0]:
            raise ValueError(
                f"input_ids hold token {low if low < 0 else high}, but the language model knows {table.shape[0]}: "
                "make them with the processor of this checkpoint."
            )
        read = torch.ones_like(ids, dtype=torch.bool)
        if attention_mask is not None:
            read = self._token_mask(attention_mask, "attention_mask", ids)
            if (read[:, 1:] & ~read[:, :-1]).any():
                raise ValueError(
                    "attention_mask has padding in front of words, or between them: pad on the right, as the processor."
                )
        return ids.long(), read.long()

    @staticmethod
    def _token_mask(mask: Any, name: str, ids: Tensor) -> Tensor:
        mask = read_tensor(mask, name).to(ids.device)
        if mask.shape != ids.shape or not ((mask == 0) | (mask == 1)).all():
            raise ValueError(f"{name} of shape {tuple(mask.shape)}: expected zeros and ones of the shape {tuple(ids.shape)}.")
        return mask.bool()

    def score_prefix(self, prefix: Tensor, phrases: Mapping[str, Tensor | None], chunk_size: int | None = None) -> Tensor:
        """Log-probability of K phrases, see `check_phrases`, under prefixes (N, k, D_lm), what `score` and `attribute` add up.

        Returns:
            (N, K, T) in nats, fp32, token by token; 0 on padding and on tokens outside of `scored_mask`. So many prefixes as
            `chunk_size` says are read at once; None chooses from the shapes.
        """
        return self.score_checked(prefix, self.check_phrases(phrases), chunk_size)

    def score_checked(self, prefix: Tensor, phrases: Mapping[str, Any], chunk_size: int | None = None) -> Tensor:
        """`score_prefix` for what `check_phrases` returned: a map asks it for every chunk, and checks wait for the device."""
        embeds, ids, texts = self.embed_prefix(prefix), phrases["input_ids"], phrases["texts"]
        most = max(1, min(BEGINNINGS, room_for_trees(self.language_model) - embeds.shape[1]))
        groups = split_phrases(texts, most)
        each = [_score_tree(self.language_model, embeds, ids[one], texts[one], starts, chunk_size) for one, starts in groups]
        return finite_log_probs(torch.cat(each, dim=1), phrases["scored_mask"], "phrases")

    @torch.no_grad()
    def sequence_log_probs(self, prefix: Tensor, sequences: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probabilities of generated tokens (N, T) under their prefixes (N, k, D_lm), and under the null prefix.

        Two tensors (N, T) in nats, the first EOS of a row included, 0 on the padding after it.
        """
        length, words, null = sequences.shape[1], self.get_input_embeddings(), self.null_prefix()
        chunk = rows_per_chunk(self.language_model, self.config.prefix_length + 1, 1, length, logits=length)
        pieces: list[list[Tensor]] = [[], []]
        for rows, tokens in zip(prefix.split(chunk), sequences.split(chunk), strict=True):
            for prefixes, found in zip((rows, null.expand_as(rows)), pieces, strict=True):
                start = self.embed_prefix(prefixes)
                embeds = torch.cat([start, words(tokens[:, :-1]).to(start.dtype)], dim=1)
                log_probs = run_language_model(self.language_model, embeds, length).logits.float().log_softmax(dim=-1)
                found.append(log_probs.gather(-1, tokens[..., None].to(log_probs.device))[..., 0])
                del log_probs  # as large as the logits of the next rows, which are counted
        both = [finite_log_probs(torch.cat(found)[None], self.word_mask(sequences), "descriptions")[0] for found in pieces]
        return both[0], both[1]

    def word_mask(self, sequences: Tensor) -> Tensor:
        """True on generated tokens (N, T) up to and including the first EOS."""
        if self.config.eos_token_id is None:
            return torch.ones_like(sequences, dtype=torch.bool)
        ends = (sequences == self.config.eos_token_id).long()
        return ends.cumsum(dim=1) - ends == 0


def split_phrases(phrases: Sequence[tuple[int, ...]], most: int) -> Iterator[tuple[slice, dict[tuple[int, ...], int]]]:
    """Neighbouring phrases that have at most `most` beginnings, or one alone; and its beginnings, numbered from () on."""
    first, starts = 0, dict[tuple[int, ...], int]()
    for index, phrase in enumerate(phrases):
        own = [phrase[:end] for end in range(len(phrase))]
        if starts and len(starts.keys() | own) > most:
            yield slice(first, index), starts
            first, starts = index, {}
        for start in own:
            starts.setdefault(start, len(starts))
    yield slice(first, len(phrases)), starts


def room_for_trees(language_model: PreTrainedModel) -> float:
    """How many positions see exactly what a mask shows them: as far as the shortest window; 1 where a state or ALiBi sees all."""
    config, known = language_model.config, inspect.signature(language_model.forward).parameters
    layers = DynamicCache(config=config).layers
    plain = all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers) and not language_model._is_stateful
    placed = "position_ids" in known and ("cache" in known or "past_key_values" in known) and not getattr(config, "alibi", False)
    # RoBERTa and its kin count positions from behind the padding's, XLM reads no such mask.
    own = any(getattr(one, "padding_idx", None) is not None for name, one in language_model.named_modules() if "position" in name)
    if own or config.model_type == "xlm" or not (plain and placed and config._attn_implementation in ("eager", "sdpa")):
        return 1
    windows = [getattr(config, "window_size", None), *(getattr(layer, "sliding_window", None) for layer in layers)]
    return min((window for window in windows if window), default=math.inf)


def _score_tree(language_model, embeds: Tensor, ids: Tensor, texts: Sequence[tuple], starts: dict, chunk_size: Any) -> Tensor:
    """Log-probabilities (N, K, T) of the tokens `ids` (K, T) of K texts behind `embeds` (N, P, D_lm), see `split_phrases`."""
    P, count, longest = embeds.shape[1], len(starts), max(map(len, starts))
    options: dict[str, Tensor] = {}
    if count > longest + 1:  # what has no branch needs no mask, and every language model reads it
        sees = torch.ones(2 * [P - 1 + count], dtype=torch.bool).tril()
        for row, start in enumerate(list(starts)[1:], P):
            sees[row, P:row] = sees[P - 1 + starts[start[:-1]], P:row]
        hidden = torch.zeros(sees.shape, dtype=embeds.dtype).masked_fill(~sees, torch.finfo(embeds.dtype).min)
        places = torch.tensor([*range(P - 1), *(P - 1 + len(start) for start in starts)])
        options = {"attention_mask": hidden[None, None].to(embeds.device), "position_ids": places[None].to(embeds.device)}
    last = torch.tensor([start[-1] for start in starts if start], dtype=torch.long, device=embeds.device)
    words = language_model.get_input_embeddings()(last).to(embeds.dtype)
    before = torch.tensor([[starts.get(text[:end], 0) for end in range(ids.shape[1])] for text in texts])
    chunk, pieces = rows_per_chunk(language_model, P, 1, count, count, ids.numel(), chunk_size), []
    for rows in embeds.tensor_split(-(-len(embeds) // chunk) or 1):
        given = {name: one.expand(len(rows), *one.shape[1:]) for name, one in options.items()}
        sequence = torch.cat([rows, words.expand(len(rows), -1, -1)], dim=1)
        logits = run_language_model(language_model, sequence, count, **given).logits.float()
        step, token = before.to(logits.device), ids.to(logits.device)
        total = torch.cat([few.logsumexp(dim=-1) for few in logits.split(16)])  # few at once: it makes a copy of them
        pieces.append(logits[:, step, token] - total[:, step])
        del logits
    return torch.cat(pieces)


def finite_log_probs(log_probs: Tensor, mask: Tensor, texts: str) -> Tensor:
    """Log-probabilities (N, K, T) of K texts, 0 outside of `mask` (K, T); a ValueError where they are not finite inside of it."""
    log_probs = log_probs.masked_fill(~mask.to(log_probs.device), 0.0)
    if not (finite := torch.isfinite(log_probs)).all():
        if (log_probs[~finite] == -float("inf")).all():
            never = torch.nonzero(~finite.all(dim=2).all(dim=0)).flatten().tolist()
            raise ValueError(f"{texts} {never} hold tokens that the language model never says: choose other words.")
        raise ValueError(f"log-probabilities of the {texts} are not finite: check the language model's weights and dtype.")
    return log_probs


def run_language_model(language_model, embeds: Tensor, keep: int, attention_mask: Tensor | None = None, **options):
    """Run on input embeddings (N, S, D_lm) and return logits of the last `keep` positions only, (N, keep, V)."""
    if attention_mask is None:
        attention_mask = torch.ones(embeds.shape[:2], dtype=torch.long, device=embeds.device)
    known = "logits_to_keep" in inspect.signature(language_model.forward).parameters
    options |= {"logits_to_keep": keep} if known else {}
    output = language_model(inputs_embeds=embeds, attention_mask=attention_mask, use_cache=False, **options)
    output.logits = output.logits[:, -keep:]
    return output


def rows_per_chunk(
    language_model, prefix_length: int, phrases: int, phrase_length: int, logits: int = 1, answers: int = 0, given: Any = None
) -> int:
    """How many prefixes can be scored or decoded at once, by the shapes and `CHUNK_BYTES`; `given` if not None.

    A prefix is followed by so many phrases (or beams) of so many tokens; `logits` positions of each hold some, and so many
    `answers` stay of the prefix.
    """
    if given is not None:
        return read_number(given, "chunk_size", 1)
    config, words = language_model.config, language_model.get_input_embeddings().weight
    width, depth = getattr(config, "hidden_size", words.shape[1]), getattr(config, "num_hidden_layers", 12)
    # Keys and values of every phrase (copied once when they grow), activations of one layer, logits and their fp32 copy.
    numbers = phrases * ((4 * depth + 16) * width * (prefix_length + phrase_length) + 2 * len(words) * logits)
    room = CHUNK_BYTES // 4 if (answers or logits > 1) and words.device.type == "cpu" else CHUNK_BYTES
    # An answer is read, has a normaliser taken away, is masked and joined with those of other phrases.
    return max(1, room // (4 * (numbers + 4 * answers)))


class EvidenceGuidance(LogitsProcessor):
    """Guidance at decoding: push words towards what the feature adds over the null prefix (beyond the paper).

    The next-token distribution becomes log p(w | null) + g (log p(w | feature) - log p(w | null)), normalised; g = `strength`:
    1 is decoding as in the paper, 0 is the null prefix alone. `null_embeds` (1, P, D_lm) are BOS and null prefix.
    """

    def __init__(self, language_model: PreTrainedModel, null_embeds: Tensor, strength: float):
        self.language_model, self.null_embeds = language_model, null_embeds
        self.strength = read_number(strength, "guidance", 0, whole=False)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        # Beam search reorders rows between steps, so the null continuation is read afresh instead of from a cache.
        words = self.language_model.get_input_embeddings()(input_ids).to(self.null_embeds.dtype)
        embeds = torch.cat([self.null_embeds.expand(input_ids.shape[0], -1, -1), words], dim=1)
        null = run_language_model(self.language_model, embeds, keep=1).logits[:, -1].float().log_softmax(dim=-1)
        gain = self.strength * (scores.float().log_softmax(dim=-1) - null)
        guided = null + gain.clamp(-1e30, 1e30)
        # What other processors have ruled out stays ruled out.
        guided = guided.masked_fill(scores == -float("inf"), -float("inf"))
        return guided.log_softmax(dim=-1).to(scores.dtype)
