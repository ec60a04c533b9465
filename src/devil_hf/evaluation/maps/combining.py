"""One map from recorded maps of several layers, by the rules that `attribute(combine=...)` knows."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from devil_hf.model.explaining_devil import COMBINATIONS, PhraseScorer
from devil_hf.model.modeling_devil import DevilModel
from devil_hf.model.pooling_devil import Layers, resolve_layers


def map_combinations() -> list[str]:
    """The rules that need no more than the layers' maps and evidence.

    The first is the one that results are named after: it points better than "mean" in the shapes world, and on photographs
    the two are not told apart.
    """
    return [name for name, combine in COMBINATIONS.items() if combine is not None]


def combine_maps(maps: Mapping[str, Tensor], rule: str, whole: Tensor | None = None) -> Tensor:
    """Combine attribution maps (B, K, H_l, W_l) of several layers into one (B, K, H, W) on the finest of their grids.

    Args:
        maps: layer -> map, all of one measure.
        rule: one of `map_combinations()`.
        whole: (L, B, K), evidence of each phrase for each layer's whole map in nats per token, for rules that need it.
    """
    combine = COMBINATIONS[rule]
    if combine is None:
        raise ValueError(f"the combination {rule!r} asks the layers together: it cannot be made from their maps.")

    def evidence() -> Tensor:
        if whole is None:
            raise ValueError(f"the combination {rule!r} needs the evidence of the whole layers: give `whole`.")
        return whole

    return combine(maps, evidence)


def layer_evidence(
    model: DevilModel, feature_maps: Sequence[Tensor | None], phrases: Mapping[str, Tensor], layers: Layers = None
) -> Tensor:
    """(L, B, K) evidence of K phrases for the whole map of each layer alone, in nats per token over the null prefix."""
    scorer = PhraseScorer(model, model.check_phrases(phrases))
    return scorer.layer_evidence(feature_maps, resolve_layers(layers, model.layer_names))


__all__ = ["combine_maps", "layer_evidence", "map_combinations"]
