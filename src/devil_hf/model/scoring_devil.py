"""Reading prefixes: log-probabilities of given phrases, and guidance of the words that `generate` chooses.

Every prefix is read by the language model once. Tokens that all phrases begin with (a carrier such as "the", or a common
first word) are read with it; the rest of each phrase continues from the shared key-value cache. Logits are computed only where a
label is read. Language models whose cache cannot be shared (recurrent and hybrid ones) get every phrase appended to every prefix.
"""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LogitsProcessor, PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from .outputs_devil import ScoreOutput

# Rows are scored in chunks that need about this much memory beside the weights.
CHUNK_BYTES = 1 << 30


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
        given = {"input_ids": input_ids, "attention_mask": attention_mask, "scored_mask": scored_mask}
        phrases = self.check_phrases(given)
        token_log_probs = self.score_prefix(self.ask(pixel_values, **question), phrases)
        log_probs = token_log_probs.sum(dim=-1)
        null_log_probs = self.score_prefix(self.null_prefix(), phrases).sum(dim=-1)[0]
        evidence = (log_probs - null_log_probs) / phrases["scored_mask"].sum(dim=-1).to(log_probs.device)
        return ScoreOutput(log_probs=log_probs, null_log_probs=null_log_probs, evidence=evidence, token_log_probs=token_log_probs)

    def check_phrases(self, phrases: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
        """Phrase tensors `input_ids`, `attention_mask`, `scored_mask` (K, T), checked, on the language model's device.

        Masks that are missing are those of phrases without padding and without a carrier.

        Raises:
            TypeError: for what is no mapping.
            ValueError: for token ids of a wrong shape or of another vocabulary, phrases without a token to score, and phrases
                that do not fit the context behind the prefix.
        """
        if not isinstance(phrases, Mapping):
            raise TypeError(f"phrases must come from processor(text=[...], return_tensors='pt'), got {phrases!r:.80}")
        ids = phrases.get("input_ids")
        if ids is None or ids.ndim != 2 or 0 in ids.shape:
            shape = None if ids is None else tuple(ids.shape)
            raise ValueError(
                f"phrases need input_ids of shape (phrases, tokens), got {shape}: make them with processor(text=[...])."
            )
        table = self.get_input_embeddings().weight
        if not 0 <= int(ids.min()) <= int(ids.max()) < table.shape[0]:
            raise ValueError(
                f"phrases hold token {int(ids.max())}, but the language model knows {table.shape[0]}: "
                "make them with the processor of this checkpoint."
            )
        ids = ids.to(table.device)
        given = [phrases.get(name) for name in ("attention_mask", "scored_mask")]
        read, scored = (torch.ones_like(ids) if mask is None else mask.to(ids.device) for mask in given)
        scored = scored.bool() & read.bool()
        if empty := torch.nonzero(~scored.any(dim=1)).flatten().tolist():
            raise ValueError(f"phrases {empty} have no token to score: leave empty phrases out.")
        length = self.config.prefix_length + 1 + ids.shape[1]
        self.check_context(length, "the prefix and the longest phrase", "shorten that phrase")
        return {"input_ids": ids, "attention_mask": read, "scored_mask": scored}

    def score_prefix(self, prefix: Tensor, phrases: Mapping[str, Tensor | None], chunk_size: int | None = None) -> Tensor:
        """Log-probability of given phrases under prefixes, token by token; what `score` and `attribute` add up.

        Args:
            prefix: (N, k, D_lm), as `ask`, `translate` and `null_prefix` give them.
            phrases: K phrases of up to T tokens, as `processor(text=[...])` makes them, see `check_phrases`.
            chunk_size: prefixes at once; chosen from the shapes when None.

        Returns:
            (N, K, T) in nats, fp32; 0 on padding and on tokens outside of `scored_mask`.
        """
        phrases = self.check_phrases(phrases)
        ids, mask = phrases["input_ids"], phrases["attention_mask"]
        chunk_size = chunk_size or rows_per_chunk(self.language_model, prefix.shape[1] + 1, *ids.shape)
        log_probs = [score_phrases(self.language_model, self.embed_prefix(rows), ids, mask) for rows in prefix.split(chunk_size)]
        return torch.cat(log_probs) * phrases["scored_mask"].to(log_probs[0].device)

    @torch.no_grad()
    def sequence_log_probs(self, prefix: Tensor, sequences: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probabilities of generated tokens under the prefixes that they belong to, and under the null prefix.

        Args:
            prefix: (N, k, D_lm), as `ask` and `translate` give them.
            sequences: (N, T) tokens, as `generate` gives them.

        Returns:
            Two tensors (N, T) in nats, the first EOS of a row included, 0 on the padding after it.
        """
        length = sequences.shape[1]
        null = self.embed_prefix(self.null_prefix())
        chunk = rows_per_chunk(self.language_model, self.config.prefix_length + 1, 1, length, logit_positions=length)
        pieces: list[list[Tensor]] = []
        for rows, tokens in zip(prefix.split(chunk), sequences.split(chunk), strict=True):
            words = self.get_input_embeddings()(tokens[:, :-1])
            starts = (self.embed_prefix(rows), null.expand(len(rows), -1, -1))
            embeds = [torch.cat([start, words.to(start.dtype)], dim=1) for start in starts]
            logits = [run_language_model(self.language_model, one, keep=length).logits for one in embeds]
            pieces.append([gather_log_probs(one, tokens) for one in logits])
        given, without = (torch.cat(column) for column in zip(*pieces, strict=True))
        mask = self.word_mask(sequences).to(given.device)
        return given * mask, without * mask

    def word_mask(self, sequences: Tensor) -> Tensor:
        """True on generated tokens (N, T) up to and including the first EOS."""
        if self.config.eos_token_id is None:
            return torch.ones_like(sequences, dtype=torch.bool)
        ends = (sequences == self.config.eos_token_id).long()
        return ends.cumsum(dim=1) - ends == 0


def score_phrases(language_model: PreTrainedModel, embeds: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Score K phrases under N prefixes.

    Args:
        embeds: (N, P, D_lm) input embeddings in front of every phrase: BOS and the prefix.
        input_ids: (K, T) phrase tokens, padded on the right.
        attention_mask: (K, T), 0 on padding.

    Returns:
        (N, K, T) log-probability of each token given its prefix and the tokens before it, in nats, fp32; 0 on padding.
    """
    mask, N = attention_mask.bool(), len(embeds)
    # Leading tokens that all phrases have in common, leaving every phrase one of its own.
    equal = (input_ids == input_ids[:1]).all(dim=0) & mask.all(dim=0)
    shared = min(int(equal.long().cumprod(dim=0).sum()), int(mask.sum(dim=1).min()) - 1)
    common = language_model.get_input_embeddings()(input_ids[:1, :shared])
    embeds = torch.cat([embeds, common.to(embeds.dtype).expand(N, -1, -1)], dim=1)  # (N, P + shared, D_lm)
    continued = mask.sum(dim=1) > shared + 1
    output = run_language_model(language_model, embeds, keep=shared + 1, use_cache=bool(continued.any()))
    log_probs = output.logits.new_zeros(N, *input_ids.shape, dtype=torch.float32)
    read = gather_log_probs(output.logits[:, :-1], input_ids[:1, :shared].expand(N, -1))
    log_probs[:, :, :shared] = read[:, None]
    # One distribution for all K phrases, of which each reads its own token.
    last = output.logits[:, -1].float()
    first = input_ids[:, shared].expand(N, -1).to(last.device)
    log_probs[:, :, shared] = last.gather(-1, first) - last.logsumexp(dim=-1, keepdim=True)
    if continued.any():
        cache = getattr(output, _cache_name(language_model), None)  # recurrent models name theirs otherwise
        rest, rest_mask = input_ids[continued, shared:], mask[continued, shared:]
        score_rest = _score_with_cache if is_cache_shareable(cache) else _score_without_cache
        log_probs[:, continued, shared + 1 :] = score_rest(language_model, embeds, cache, rest, rest_mask)
    return log_probs * mask.to(log_probs.device)


def is_cache_shareable(cache: object) -> bool:
    """Whether a prefix's cache can be repeated for several phrases: plain keys and values, no recurrent state."""
    plain = (DynamicLayer, DynamicSlidingWindowLayer)
    return isinstance(cache, DynamicCache) and all(type(layer) in plain for layer in cache.layers)


def _score_with_cache(language_model, embeds, cache, rest, rest_mask) -> Tensor:
    """Continue K phrases (K, R) from the cache of N prefixes -> (N, K, R - 1)."""
    N, P, _ = embeds.shape
    K, R = rest.shape
    cache.batch_repeat_interleave(K)  # rows by prefix, then by phrase
    seen = torch.ones(N * K, P, dtype=torch.long, device=embeds.device)
    tokens, token_mask = rest.repeat(N, 1), rest_mask.long().repeat(N, 1)
    output = language_model(
        input_ids=tokens[:, :-1],
        attention_mask=torch.cat([seen, token_mask[:, :-1]], dim=1),
        use_cache=True,
        **{_cache_name(language_model): cache},
    )
    return gather_log_probs(output.logits, tokens[:, 1:]).view(N, K, R - 1)


def _score_without_cache(language_model, embeds, cache, rest, rest_mask) -> Tensor:
    """The same as `_score_with_cache` by appending every phrase to every prefix."""
    N, P, _ = embeds.shape
    K, R = rest.shape
    words = language_model.get_input_embeddings()(rest[:, :-1]).to(embeds.dtype)
    sequence = torch.cat([embeds.repeat_interleave(K, dim=0), words.repeat(N, 1, 1)], dim=1)
    seen = torch.ones_like(sequence[:, :P, 0], dtype=torch.long)
    mask = torch.cat([seen, rest_mask[:, :-1].long().repeat(N, 1)], dim=1)
    output = run_language_model(language_model, sequence, keep=R - 1, attention_mask=mask)
    return gather_log_probs(output.logits, rest[:, 1:].repeat(N, 1)).view(N, K, R - 1)


def run_language_model(language_model, embeds: Tensor, keep: int, attention_mask: Tensor | None = None, use_cache=False):
    """Run on input embeddings (N, S, D_lm) and return logits of the last `keep` positions only, (N, keep, V)."""
    if attention_mask is None:
        attention_mask = torch.ones(embeds.shape[:2], dtype=torch.long, device=embeds.device)
    known = "logits_to_keep" in inspect.signature(language_model.forward).parameters
    options = {"logits_to_keep": keep} if known else {}
    output = language_model(inputs_embeds=embeds, attention_mask=attention_mask, use_cache=use_cache, **options)
    output.logits = output.logits[:, -keep:]
    return output


def _cache_name(language_model: nn.Module) -> str:
    """What the installed transformers calls the key-value cache: `cache` since 5.24, `past_key_values` before."""
    return "cache" if "cache" in inspect.signature(language_model.forward).parameters else "past_key_values"


def gather_log_probs(logits: Tensor, tokens: Tensor) -> Tensor:
    """Log-probability (N, S) of `tokens` (N, S) under `logits` (N, S, V)."""
    logits, tokens = logits.float(), tokens.to(logits.device)
    return logits.gather(-1, tokens[..., None])[..., 0] - logits.logsumexp(dim=-1)


def rows_per_chunk(
    language_model: Any, prefix_length: int, phrases: int, phrase_length: int, logit_positions: int | None = None
) -> int:
    """How many prefixes can be scored or decoded at once within `CHUNK_BYTES`, from the shapes alone.

    A prefix has `prefix_length` positions, and is followed by so many phrases (or beams) of so many tokens; logits are held for
    `logit_positions` of each at once, None for those that scoring needs.
    """
    config, (vocabulary, width) = language_model.config, language_model.get_input_embeddings().weight.shape
    width = getattr(config, "hidden_size", width)
    depth, length = getattr(config, "num_hidden_layers", 12), prefix_length + phrase_length
    positions = max(1, phrase_length - 1) if logit_positions is None else logit_positions
    # Keys and values of every phrase (copied once when they grow), activations of one layer, logits and their fp32 copy.
    numbers = phrases * (4 * depth * width * length + 16 * width * length + 2 * vocabulary * positions)
    return max(1, CHUNK_BYTES // (4 * numbers))


class EvidenceGuidance(LogitsProcessor):
    """Guidance at decoding: push words towards what the feature adds over the null prefix (beyond the paper).

    The next-token distribution becomes log p(w | null) + g (log p(w | feature) - log p(w | null)), normalised; g = 1 is ordinary
    decoding, as in the paper, more than 1 favours what the feature adds, 0 is the null prefix alone.

    Args:
        null_embeds: (1, P, D_lm) BOS and null prefix.
        strength: g.
    """

    def __init__(self, language_model: PreTrainedModel, null_embeds: Tensor, strength: float):
        self.language_model, self.null_embeds, self.strength = language_model, null_embeds, strength

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        # Beam search reorders rows between steps, so the null continuation is read afresh instead of from a cache.
        words = self.language_model.get_input_embeddings()(input_ids).to(self.null_embeds.dtype)
        embeds = torch.cat([self.null_embeds.expand(input_ids.shape[0], -1, -1), words], dim=1)
        null = run_language_model(self.language_model, embeds, keep=1).logits[:, -1].float().log_softmax(dim=-1)
        guided = null + self.strength * (scores.float().log_softmax(dim=-1) - null)
        # What other processors have ruled out stays ruled out.
        guided = guided.masked_fill(scores == -float("inf"), -float("inf"))
        return guided.log_softmax(dim=-1).to(scores.dtype)
