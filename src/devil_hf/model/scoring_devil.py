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
from .pooling_devil import read_number, read_tensor

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
        phrases = self.check_phrases({"input_ids": input_ids, "attention_mask": attention_mask, "scored_mask": scored_mask})
        token_log_probs = self.score_checked(self.ask(pixel_values, **question), phrases)
        log_probs = token_log_probs.sum(dim=-1)
        null_log_probs = self.score_checked(self.null_prefix(), phrases).sum(dim=-1)[0]
        evidence = (log_probs - null_log_probs) / phrases["scored_mask"].sum(dim=-1).to(log_probs.device)
        return ScoreOutput(log_probs=log_probs, null_log_probs=null_log_probs, evidence=evidence, token_log_probs=token_log_probs)

    def check_phrases(self, phrases: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
        """Phrase tensors `input_ids`, `attention_mask`, `scored_mask` (K, T), checked, on the language model's device.

        Masks that are missing are those of phrases without padding and a carrier.

        Raises:
            TypeError: for what is no mapping.
            ValueError: as `read_tokens`; for phrases without a token to score, and those that do not fit behind the prefix.
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
        return {"input_ids": ids, "attention_mask": read, "scored_mask": scored}

    def read_tokens(self, input_ids: Any, attention_mask: Any = None) -> tuple[Tensor, Tensor]:
        """Token ids and their attention mask (K, T), checked, on the language model's device.

        Raises:
            ValueError: for ids of a wrong shape or of another vocabulary, and for a mask with padding elsewhere than behind.
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

    def score_checked(self, prefix: Tensor, phrases: Mapping[str, Tensor], chunk_size: int | None = None) -> Tensor:
        """`score_prefix` for what `check_phrases` returned: a map asks it for every chunk, and checks wait for the device."""
        ids, mask = phrases["input_ids"], phrases["attention_mask"]
        chunk_size = rows_per_chunk(self.language_model, prefix.shape[1] + 1, len(ids), ids.shape[1], given=chunk_size)
        chunks = [score_phrases(self.language_model, self.embed_prefix(rows), ids, mask) for rows in prefix.split(chunk_size)]
        return finite_log_probs(torch.cat(chunks), phrases["scored_mask"], "phrases")

    @torch.no_grad()
    def sequence_log_probs(self, prefix: Tensor, sequences: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probabilities of generated tokens (N, T) under their prefixes (N, k, D_lm), and under the null prefix.

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
        mask, both = self.word_mask(sequences), (torch.cat(column)[None] for column in zip(*pieces, strict=True))
        given, without = (finite_log_probs(one, mask, "descriptions")[0] for one in both)
        return given, without

    def word_mask(self, sequences: Tensor) -> Tensor:
        """True on generated tokens (N, T) up to and including the first EOS."""
        if self.config.eos_token_id is None:
            return torch.ones_like(sequences, dtype=torch.bool)
        ends = (sequences == self.config.eos_token_id).long()
        return ends.cumsum(dim=1) - ends == 0


def score_phrases(language_model: PreTrainedModel, embeds: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Score K phrases, `input_ids` (K, T) padded on the right, behind N starts: `embeds` (N, P, D_lm) of BOS and prefix.

    Returns:
        (N, K, T) log-probability of each token given its start and the tokens before it, in nats, fp32; 0 on padding.
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
        log_probs[:, continued, shared + 1 :] = _score_rest(language_model, embeds, cache, rest, rest_mask)
    return log_probs.masked_fill(~mask.to(log_probs.device), 0.0)


def finite_log_probs(log_probs: Tensor, mask: Tensor, texts: str) -> Tensor:
    """Log-probabilities (N, K, T) of K texts, 0 outside of `mask` (K, T); a ValueError where they are not finite inside of it."""
    log_probs = log_probs.masked_fill(~mask.to(log_probs.device), 0.0)
    if not (finite := torch.isfinite(log_probs)).all():
        if (log_probs[~finite] == -float("inf")).all():
            never = torch.nonzero(~finite.all(dim=2).all(dim=0)).flatten().tolist()
            raise ValueError(f"{texts} {never} hold tokens that the language model never says: choose other words.")
        raise ValueError(f"log-probabilities of the {texts} are not finite: check the language model's weights and dtype.")
    return log_probs


def is_cache_shareable(cache: object) -> bool:
    """Whether a prefix's cache can be repeated for several phrases: plain keys and values, no recurrent state."""
    plain = (DynamicLayer, DynamicSlidingWindowLayer)
    return isinstance(cache, DynamicCache) and all(type(layer) in plain for layer in cache.layers)


def _score_rest(language_model, embeds, cache, rest, rest_mask) -> Tensor:
    """Continue K phrases (K, R) behind N prefixes (N, P, D_lm) -> (N, K, R - 1), from their cache where it can be shared."""
    (N, P, _), (K, R) = embeds.shape, rest.shape
    tokens = rest.repeat(N, 1)  # rows by prefix, then by phrase
    seen = torch.ones(N * K, P, dtype=torch.long, device=embeds.device)
    mask = torch.cat([seen, rest_mask[:, :-1].long().repeat(N, 1)], dim=1)
    if is_cache_shareable(cache):
        cache.batch_repeat_interleave(K)
        options = {_cache_name(language_model): cache, "use_cache": True, "attention_mask": mask}
        logits = language_model(input_ids=tokens[:, :-1], **options).logits
    else:
        words = language_model.get_input_embeddings()(tokens[:, :-1]).to(embeds.dtype)
        sequence = torch.cat([embeds.repeat_interleave(K, dim=0), words], dim=1)
        logits = run_language_model(language_model, sequence, keep=R - 1, attention_mask=mask).logits
    return gather_log_probs(logits, tokens[:, 1:]).view(N, K, R - 1)


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
    language_model, prefix_length: int, phrases: int, phrase_length: int, logit_positions: int | None = None, given: Any = None
) -> int:
    """How many prefixes can be scored or decoded at once within `CHUNK_BYTES`, by the shapes alone; `given` if not None.

    A prefix is followed by so many phrases (or beams) of so many tokens; logits are held for `logit_positions` of each.
    """
    if given is not None:
        return read_number(given, "chunk_size", 1)
    config, (vocabulary, width) = language_model.config, language_model.get_input_embeddings().weight.shape
    width = getattr(config, "hidden_size", width)
    depth, length = getattr(config, "num_hidden_layers", 12), prefix_length + phrase_length
    positions = max(1, phrase_length - 1) if logit_positions is None else logit_positions
    # Keys and values of every phrase (copied once when they grow), activations of one layer, logits and their fp32 copy.
    numbers = phrases * (4 * depth * width * length + 16 * width * length + 2 * vocabulary * positions)
    return max(1, CHUNK_BYTES // (4 * numbers))


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
