"""At which depth a thing becomes readable: the evidence of phrases for whole images, layer by layer.

A translator with layer dropout is asked one layer at a time for this, as a tuned lens is; all layers together stand beside it.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from devil_hf.model.explaining_devil import ALL_LAYERS, PhraseScorer
from devil_hf.model.modeling_devil import DevilModel
from devil_hf.model.pooling_devil import Layers, resolve_layers
from devil_hf.model.processing_devil import DevilProcessor


@torch.no_grad()
def evidence_by_layer(
    model: DevilModel,
    processor: DevilProcessor,
    pixel_values: Tensor | None = None,
    phrases: Sequence[str] = (),
    layers: Layers = None,
    carrier: str | None = None,
    feature_maps: Sequence[Tensor | None] | None = None,
) -> dict[str, Tensor]:
    """Evidence of phrases for whole images, in nats per token over the null prefix.

    Args:
        pixel_values, feature_maps: B images, as in `model.ask`.
        phrases: K texts.
        layers: those that are asked; None for every one.
        carrier: a neutral word that is read before each phrase, and not scored.

    Returns:
        layer -> (B, K), each layer alone, shallowest first; under "all" these layers together, where they are several.

    Raises:
        ValueError: for no phrases, and for one with words that the language model does not know.
    """
    tokens = known_phrases(model, processor, phrases, carrier)
    visible = resolve_layers(layers, model.layer_names)
    features = model.read_features(pixel_values, feature_maps, visible)
    scorer = PhraseScorer(model, tokens)
    found = dict(zip((model.layer_names[index] for index in visible), scorer.layer_evidence(features, visible), strict=True))
    if len(visible) > 1:
        together = model.score_checked(model.ask(layers=visible, feature_maps=features), tokens).sum(dim=-1)
        found[ALL_LAYERS] = scorer.measured(together, "evidence")
    return {name: values.cpu() for name, values in found.items()}


def known_phrases(
    model: DevilModel, processor: DevilProcessor, phrases: Sequence[str], carrier: str | None = None
) -> dict[str, Tensor]:
    """Phrases as checked tokens, see `model.check_phrases`, all of whose words the language model knows.

    Raises:
        ValueError: for no phrases, and for one with words that the language model does not know.
    """
    if not phrases:
        raise ValueError("there are no phrases: name at least one")
    tokens = model.check_phrases(processor(text=list(phrases), carrier=carrier, return_tensors="pt"))
    unknown = (tokens["input_ids"] == processor.tokenizer.unk_token_id) & tokens["scored_mask"]
    if strange := [phrase for phrase, row in zip(phrases, unknown.tolist(), strict=True) if any(row)]:
        raise ValueError(f"phrases {strange} hold words that this checkpoint's language model does not know: use others")
    return tokens


__all__ = ["evidence_by_layer", "known_phrases"]
