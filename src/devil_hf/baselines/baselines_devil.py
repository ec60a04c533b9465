"""Earlier ways to turn a feature into a prefix, as fair baselines: ClipCap, ClipCap with an MLP, LiMBeR.

Each reads the pooled feature of the one configured layer and is otherwise used like the translation transformer: chosen by
`config.translator_type`, trained by the same trainer on the same features. What their papers do not have is a prefix of nothing:
where the layer is hidden, a learned feature stands in for it, trained by `null_probability` and zero where that is 0.
Sizes follow the papers: ClipCap (Mokady et al. 2021, arXiv 2111.09734, section 3.2), LiMBeR (Merullo et al. 2022, arXiv
2209.15162, section 3.1). LiMBeR maps every location of a grid by one matrix to one prefix vector; here it maps the pooled feature
by one matrix to the whole prefix, so that all translators read the same.

This file travels with the checkpoints of baselines only, see `COMPANIONS`.
"""

import sys
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import initialization as init

from devil_hf.model.checkpoint_devil import COMPANIONS
from devil_hf.model.modeling_devil import DevilModel
from devil_hf.model.translator_devil import TranslatorBlock, register_translator, reset_layers

COMPANIONS.update(dict.fromkeys(("clipcap", "clipcap_mlp", "limber"), sys.modules[__name__]))


class PooledFeatureTranslator(nn.Module):
    """Turns the pooled feature of one layer into a prefix; subclasses say how, in `to_prefix`.

    Args:
        channels: the feature width C of the one layer.
        embedding_width: D_lm, width of the language model's embeddings.
        config: a `DevilConfig`; its `prefix_length` and `normalize_features` are read.
    """

    def __init__(self, channels: Sequence[int], embedding_width: int, config):
        super().__init__()
        if len(channels) != 1:
            raise ValueError(
                f"translator_type={config.translator_type!r} reads the pooled feature of one layer, but {len(channels)} are "
                f"chosen: set layers to one of {config.layers} (in its paper the deepest), or use translator_type='transformer'."
            )
        (self.channels,) = channels
        self.embedding_width, self.prefix_length = embedding_width, config.prefix_length
        self.feature_norm = nn.LayerNorm(self.channels, eps=1e-5) if config.normalize_features else nn.Identity()
        self.null_feature = nn.Parameter(torch.empty(self.channels))

    def forward(self, pooled: Sequence[Tensor | None], layer_mask: Tensor | None = None, rows: int = 1) -> Tensor:
        """Translate pooled features.

        Args:
            pooled: a single (N, C) tensor, or None where the layer is hidden in every row.
            layer_mask: (N, 1) bool, True hides the feature of that row; None hides nothing.
            rows: N, needed only when the layer is hidden.

        Returns:
            The prefix, (N, k, D_lm).
        """
        (features,) = pooled
        if features is None:
            features = self.null_feature.expand(rows, -1)
        else:
            features = self.feature_norm(features)
            if layer_mask is not None:
                features = torch.where(layer_mask, self.null_feature, features)
        return self.to_prefix(features)

    def to_prefix(self, features: Tensor) -> Tensor:
        """Prefix (N, k, D_lm) of features (N, C)."""
        raise NotImplementedError

    def _split(self, flat: Tensor) -> Tensor:
        return flat.view(len(flat), self.prefix_length, self.embedding_width)

    def reset_parameters(self) -> None:
        """Initialise linear layers as torch does; a prefix of nothing begins at their biases."""
        reset_layers(self)
        init.zeros_(self.null_feature)


@register_translator("clipcap")
class ClipCapTranslator(PooledFeatureTranslator):
    """ClipCap's transformer mapper, at the language model's width.

    The feature becomes `prefix_length` tokens by one linear layer; they and as many learned constants go through
    `translator_depth` transformer blocks, and the outputs at the constants are the prefix. `translator_width` is not read.
    """

    def __init__(self, channels: Sequence[int], embedding_width: int, config):
        super().__init__(channels, embedding_width, config)
        if embedding_width % config.translator_heads:
            raise ValueError(
                f"translator_type='clipcap' works at the language model's width of {embedding_width}, which is not a multiple "
                f"of translator_heads={config.translator_heads}."
            )
        self.projection = nn.Linear(self.channels, self.prefix_length * embedding_width)
        self.constants = nn.Parameter(torch.empty(self.prefix_length, embedding_width))
        self.blocks = nn.ModuleList(
            TranslatorBlock(embedding_width, config.translator_heads, config.translator_feed_forward)
            for _ in range(config.translator_depth)
        )

    def to_prefix(self, features: Tensor) -> Tensor:
        tokens = self._split(self.projection(features))
        sequence = torch.cat([tokens, self.constants.expand(len(tokens), -1, -1)], dim=1)  # (N, 2 k, D_lm)
        for block in self.blocks[:-1]:
            sequence = block(sequence)
        return self.blocks[-1](sequence, last=self.prefix_length)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        init.normal_(self.constants, std=0.1)


@register_translator("clipcap_mlp")
class ClipCapMLPTranslator(PooledFeatureTranslator):
    """ClipCap's MLP mapper: two linear layers with a tanh between them, half as wide there as the whole prefix."""

    def __init__(self, channels: Sequence[int], embedding_width: int, config):
        super().__init__(channels, embedding_width, config)
        total = self.prefix_length * embedding_width
        self.hidden = nn.Linear(self.channels, total // 2)
        self.output = nn.Linear(total // 2, total)

    def to_prefix(self, features: Tensor) -> Tensor:
        return self._split(self.output(torch.tanh(self.hidden(features))))


@register_translator("limber")
class LimberTranslator(PooledFeatureTranslator):
    """LiMBeR's mapper: one linear layer."""

    def __init__(self, channels: Sequence[int], embedding_width: int, config):
        super().__init__(channels, embedding_width, config)
        self.output = nn.Linear(self.channels, self.prefix_length * embedding_width)

    def to_prefix(self, features: Tensor) -> Tensor:
        return self._split(self.output(features))


__all__ = ["ClipCapMLPTranslator", "ClipCapTranslator", "DevilModel", "LimberTranslator", "PooledFeatureTranslator"]
