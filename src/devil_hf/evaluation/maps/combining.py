"""One map from recorded maps of several layers, by the rules that `attribute(combine=...)` knows."""

from collections.abc import Mapping

from torch import Tensor

from devil_hf.model.explaining_devil import COMBINATIONS


def map_combinations() -> list[str]:
    """The rules that need no more than the layers' maps and evidence; the first one points best."""
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


__all__ = ["combine_maps", "map_combinations"]
