"""The translation transformer: pooled features of any layers in, a prefix for a language model out.

Paper, section 3.1: each layer's pooled feature becomes one token (a projection plus a learned embedding of that layer);
the layer tokens and k learned query tokens go through a pre-norm transformer encoder; the k query outputs are the prefix.
Two things differ from a textbook encoder, neither changes the result: tokens of layers that are hidden for a whole batch are
never made, and the last block computes the query positions only, because nothing reads the others.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init

NORM_EPS = 1e-12  # of the layer norms (paper)


class TranslatorBlock(nn.Module):
    """Pre-norm transformer encoder block without dropout: attention, then a GELU feed-forward."""

    def __init__(self, width: int, heads: int, feed_forward: int):
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(width, eps=NORM_EPS)
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.attention_out = nn.Linear(width, width)
        self.feed_forward_norm = nn.LayerNorm(width, eps=NORM_EPS)
        self.feed_forward_in = nn.Linear(width, feed_forward)
        self.feed_forward_out = nn.Linear(feed_forward, width)

    def forward(self, tokens: Tensor, attention_mask: Tensor | None = None, last: int | None = None) -> Tensor:
        """Update `tokens` (N, T, D); with `last`, only the last `last` positions are computed and returned."""
        normed = self.attention_norm(tokens)
        key, value = self._split_heads(self.key_value(normed), 2)  # (N, heads, T, D / heads) each
        if last is not None:
            tokens, normed = tokens[:, -last:], normed[:, -last:]
        (query,) = self._split_heads(self.query(normed), 1)
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=attention_mask)
        tokens = tokens + self.attention_out(attended.transpose(1, 2).flatten(2))
        hidden = F.gelu(self.feed_forward_in(self.feed_forward_norm(tokens)))
        return tokens + self.feed_forward_out(hidden)

    def _split_heads(self, projected: Tensor, parts: int) -> tuple[Tensor, ...]:
        N, T, width = projected.shape
        split = projected.view(N, T, parts, self.heads, width // (parts * self.heads))
        return split.permute(2, 0, 3, 1, 4).unbind(0)


class Translator(nn.Module):
    """Turns one pooled feature per layer into a prefix.

    Args:
        channels: C_l, feature width of each layer.
        embedding_width: D_lm, width of the language model's embeddings.
        config: a `DevilConfig`; its `prefix_length`, `translator_*` and `normalize_features` are read.

    With `translator_shortcut` (beyond the paper) the prefix also gets the sum over the visible layers of a linear map of each
    feature. All positions of the prefix see a layer through one token, which they must tell apart by the transformer alone;
    the shortcut gives each a view of its own, as LiMBeR has it.
    """

    def __init__(self, channels: Sequence[int], embedding_width: int, config):
        super().__init__()
        width = config.translator_width
        self.feature_norms = nn.ModuleList(
            nn.LayerNorm(c, eps=1e-5) if config.normalize_features else nn.Identity() for c in channels
        )
        self.projections = nn.ModuleList(nn.Linear(c, width) for c in channels)
        self.layer_embedding = nn.Parameter(torch.empty(len(channels), width))
        self.queries = nn.Parameter(torch.empty(config.prefix_length, width))
        self.blocks = nn.ModuleList(
            TranslatorBlock(width, config.translator_heads, config.translator_feed_forward)
            for _ in range(config.translator_depth)
        )
        self.norm = nn.LayerNorm(width, eps=NORM_EPS)
        self.output = nn.Linear(width, embedding_width)
        self.shortcuts = (
            nn.ModuleList(nn.Linear(c, config.prefix_length * embedding_width, bias=False) for c in channels)
            if config.translator_shortcut
            else None
        )

    def forward(self, pooled: Sequence[Tensor | None], layer_mask: Tensor | None = None, rows: int = 1) -> Tensor:
        """The prefix (N, k, D_lm) of pooled features.

        Args:
            pooled: one (N, C_l) tensor per layer, or None for a layer that is hidden in every row.
            layer_mask: (N, L) bool, True hides that layer from that row; None hides nothing further.
            rows: N, needed only when every entry of `pooled` is None (the null prefix).
        """
        visible = [index for index, vectors in enumerate(pooled) if vectors is not None]
        features = [self.feature_norms[index](pooled[index]) for index in visible]
        tokens = [self.projections[i](values) + self.layer_embedding[i] for i, values in zip(visible, features, strict=True)]
        rows = tokens[0].shape[0] if tokens else rows
        queries = self.queries.expand(rows, -1, -1)
        sequence = torch.cat([torch.stack(tokens, dim=1), queries], dim=1) if tokens else queries  # (N, L_visible + k, D)
        attention_mask = None
        if layer_mask is not None and visible:
            shown = F.pad(~layer_mask[:, visible], (0, queries.shape[1]), value=True)
            attention_mask = shown[:, None, None, :]  # (N, 1, 1, T): over the keys, the same for every head and query
        for block in self.blocks[:-1]:
            sequence = block(sequence, attention_mask)
        sequence = self.blocks[-1](sequence, attention_mask, last=queries.shape[1])
        prefix = self.output(self.norm(sequence))
        if self.shortcuts is not None and visible:
            views = torch.stack([self.shortcuts[i](values) for i, values in zip(visible, features, strict=True)], dim=1)
            if layer_mask is not None:
                views = views.masked_fill(layer_mask[:, visible, None], 0.0)
            prefix = prefix + views.sum(dim=1).view(prefix.shape)
        return prefix

    def reset_parameters(self) -> None:
        """Initialise as in the paper: embeddings and queries 0.1 N(0, 1), linear layers as torch does."""
        init.normal_(self.layer_embedding, std=0.1)
        init.normal_(self.queries, std=0.1)
        reset_layers(self)
        if self.shortcuts is not None:
            for weight in self.shortcuts.parameters():
                init.zeros_(weight)  # begins as the transformer alone


def reset_layers(translator: nn.Module) -> None:
    """Initialise the linear layers of a translator as torch does, and its norms to do nothing."""
    for module in translator.modules():
        if isinstance(module, nn.Linear):
            bound = module.in_features**-0.5
            init.uniform_(module.weight, -bound, bound)
            if module.bias is not None:
                init.uniform_(module.bias, -bound, bound)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)


# By the name in `config.translator_type`.
TRANSLATORS: dict[str, type[nn.Module]] = {"transformer": Translator}


def register_translator(name: str) -> Callable[[type[nn.Module]], type[nn.Module]]:
    """Decorator of another way to turn pooled features into a prefix, chosen by `config.translator_type=name`.

    The class is made, called and initialised like `Translator`. Where its checkpoints should load without the package that
    defines it, its module is one file that imports `DevilModel`, enters itself in `COMPANIONS` by the same name, and travels.
    """

    def register(translator: type[nn.Module]) -> type[nn.Module]:
        TRANSLATORS[name] = translator
        return translator

    return register


def translator_class(name: str) -> type[nn.Module]:
    """The translator of this name; a ValueError when none is registered."""
    if name not in TRANSLATORS:
        raise ValueError(f"translator_type={name!r} is not one of {sorted(TRANSLATORS)}: import the code that registers it.")
    return TRANSLATORS[name]
