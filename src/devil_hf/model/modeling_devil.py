"""DeViL: a frozen vision backbone, a translator, a frozen language model (Dani et al., GCPR 2023, arXiv 2309.01617).

Everything that can be asked is a choice of location weights and a layer mask (`DevilModel.ask`); the answer is a prefix,
and two verbs read it: `generate` (words) and `score` (log-probability of given words). Questions about many layers and
places at once, `describe` and `attribute`, stand in `explaining_devil.py`. Deviations from the paper, each off by default:
feature norms, a learned null prefix, log-uniform location dropout, guidance. Unlike the authors' training, the language
model stays in eval mode.
"""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, GenerationConfig, LogitsProcessorList, PreTrainedModel

from .backbone_devil import FeatureBackbone
from .checkpoint_devil import DevilPreTrainedModel, companion
from .explaining_devil import ExplainMixin
from .outputs_devil import DevilOutput
from .pooling_devil import Layers, check_weights, pool, read_locations, region_weights, resolve_layers, window_weights
from .scoring_devil import EvidenceGuidance, ScoreMixin, rows_per_chunk, run_language_model
from .translator_devil import translator_class

DEFAULT_NEW_TOKENS = 40


class DevilModel(ExplainMixin, ScoreMixin, DevilPreTrainedModel):
    """A vision backbone that speaks.

    Shapes: B images, L layers with feature maps (B, C_l, H_l, W_l), N questions, K phrases of up to T tokens,
    a prefix of k vectors of the language model's embedding width D_lm.
    """

    def __init__(self, config, backbone: nn.Module | None = None, language_model: PreTrainedModel | None = None):
        super().__init__(config)
        if isinstance(backbone, FeatureBackbone):
            self.backbone = backbone
        else:
            self.backbone = FeatureBackbone.from_config(config.backbone_config, module=backbone)
        self.language_model = language_model or AutoModelForCausalLM.from_config(config.text_config)
        self.language_model.get_output_embeddings().register_forward_pre_hook(_contiguous_input)
        # Descriptions follow the arguments of the call alone, not decoding habits that came with the language model.
        self.language_model.generation_config = GenerationConfig.from_model_config(self.language_model.config)
        embedding_width = int(self.get_input_embeddings().weight.shape[-1])
        translator = translator_class(config.translator_type)
        self.translator: Any = translator(self.backbone.channels, embedding_width, config)
        self._no_split_modules = ["FeatureBackbone", translator.__name__]
        built = [part for part in (backbone, language_model) if part is not None]
        if config.lora is not None:
            lora = companion("lora")
            lora.add_lora(self.language_model, config.lora)
            # The language model would initialise them as its own layers, and fresh adapters would say something.
            built += [part for _, layer in lora.lora_layers(self.language_model) for part in (layer.lora_A, layer.lora_B)]
        # What is already built is marked as initialised, so that `post_init` leaves it alone.
        for part in built:
            for one in (*part.modules(), *part.parameters(), *part.buffers()):
                one._is_hf_initialized = True
        self.post_init()
        self.freeze()

    def _init_weights(self, module: nn.Module) -> None:
        # Only our own parts: the base class would overwrite the weights of a timm backbone.
        if isinstance(module, translator_class(self.config.translator_type)):
            module.reset_parameters()
        elif hasattr(module, "init_non_persistent_buffers"):
            module.init_non_persistent_buffers()

    def get_input_embeddings(self) -> Any:
        return self.language_model.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        return self.language_model.get_output_embeddings()

    @property
    def layer_names(self) -> list[str]:
        """The layers that this model reads, shallowest first."""
        return list(self.backbone.layers)

    # ---------------------------------------------------------------------------------------------- features to prefix

    def extract_features(self, pixel_values: Tensor | None, layers: Layers = None) -> list[Tensor | None]:
        """Feature maps (B, C_l, H_l, W_l) of `pixel_values` (B, 3, H, W), one per layer; None for layers not asked for.

        Raises:
            ValueError: for pixel values of a wrong shape, and for layers that the model does not read.
        """
        if pixel_values is None:
            raise ValueError("there is nothing to look at: give pixel_values, or the feature_maps of an earlier call.")
        if pixel_values.ndim != 4 or 0 in pixel_values.shape:
            raise ValueError(
                f"pixel_values of shape {tuple(pixel_values.shape)}: expected (images, 3, height, width), none of them zero; "
                "make them with the model's processor."
            )
        visible = resolve_layers(layers, self.layer_names)
        parameter = next(self.backbone.parameters(), None)
        if parameter is not None:
            pixel_values = pixel_values.to(device=parameter.device, dtype=parameter.dtype)
        return self.backbone(pixel_values, visible)

    def read_features(
        self, pixel_values: Tensor | None, feature_maps: Sequence[Tensor | None] | None, visible: Sequence[int]
    ) -> list[Any]:
        """The given feature maps, checked, or those of `pixel_values`, at least for the layers at positions `visible`.

        Raises:
            ValueError: for maps that are not one per layer, or hold nothing of a visible layer.
        """
        if feature_maps is None:
            return self.extract_features(pixel_values, list(visible))
        names = self.layer_names
        if isinstance(feature_maps, Tensor) or len(feature_maps) != len(names):
            raise ValueError(f"feature_maps must be one map for each of {names}, as `extract_features` gives them.")
        for index in visible:
            found, channels = feature_maps[index], self.backbone.channels[index]
            if found is None:
                raise ValueError(f"feature_maps hold nothing of layer {names[index]!r}: extract it, or do not ask for it.")
            if found.ndim != 4 or found.shape[1] != channels:
                raise ValueError(
                    f"the feature map of layer {names[index]!r} has the shape {tuple(found.shape)}: expected (images, "
                    f"{channels}, rows, columns)."
                )
        return list(feature_maps)

    def translate(self, pooled: Sequence[Tensor | None], layer_mask: Tensor | None = None, rows: int = 1) -> Tensor:
        """Prefix (N, k, D_lm) for pooled features, one (N, C_l) per layer or None where hidden (paper, section 3.1)."""
        weight = next(self.translator.parameters())
        if weight.is_meta:
            raise ValueError("the translator's weights are offloaded: keep them on a device, by device_map for instance.")
        pooled = [None if vectors is None else vectors.to(weight) for vectors in pooled]
        if layer_mask is not None:
            layer_mask = layer_mask.to(weight.device)
            # A layer that no row may see is not computed at all.
            hidden = layer_mask.all(dim=0).tolist()
            rows = layer_mask.shape[0]
            pooled = [None if gone else vectors for vectors, gone in zip(pooled, hidden, strict=True)]
        return self.translator(pooled, layer_mask, rows)

    def null_prefix(self) -> Tensor:
        """The prefix (1, k, D_lm) when every layer is hidden: what the language model says of nothing."""
        return self.translate([None] * len(self.layer_names))

    def ask(
        self,
        pixel_values: Tensor | None = None,
        layers: Layers = None,
        locations: Sequence[tuple[int, int]] | None = None,
        window: int = 1,
        regions: Tensor | None = None,
        location_weights: Sequence[Tensor | None] | None = None,
        layer_mask: Tensor | None = None,
        feature_maps: Sequence[Tensor | None] | None = None,
    ) -> Tensor:
        """Turn questions about images into prefixes.

        Args:
            pixel_values: (B, 3, H, W); or `feature_maps`, what `extract_features` returned, to spare the backbone.
            layers: the layers that are visible together, by name or index; None for all.
            locations: R (row, column) places on the grid of the layers; None for the whole map.
            window: side of the square around each place, in locations (odd).
            regions: (B, H, W) or (B, R, H, W) soft masks over the pixel values; a layer where one vanishes is hidden from it.
            location_weights: per layer (B, R, H_l, W_l) or (R, H_l, W_l), non-negative, summing to one; None for uniform.
            layer_mask: (L,), (B, L) or (B * R, L) bool, True hides a layer, beside those that `layers` leaves out.

        Returns:
            (N, k, D_lm) with N = B * R, rows by image, then by question.
        """
        visible = resolve_layers(layers, self.layer_names)
        feature_maps = self.read_features(pixel_values, feature_maps, visible)
        seen = {index: feature_maps[index] for index in visible}
        _only_one(locations=locations, regions=regions, location_weights=location_weights)
        weights: Mapping[int, Any] = dict.fromkeys(visible)
        vanished = None
        if location_weights is not None:
            weights = {index: location_weights[index] for index in visible}
            for index, maps in seen.items():
                check_weights(weights[index], len(maps), tuple(maps.shape[-2:]), self.layer_names[index])
        elif regions is not None:
            weights, vanished = self._region_weights(regions, seen)
        elif locations is not None:
            weights = dict.fromkeys(visible, self._window_weights(locations, window, seen))
        pooled: list[Tensor | None] = [None] * len(self.layer_names)
        for index, maps in seen.items():
            pooled[index] = vectors = self.check_finite(pool(maps, weights[index]), index)
        if layer_mask is not None:
            layer_mask = self._rows_of_mask(layer_mask, len(vectors), len(maps))
        return self.translate(pooled, _hidden(layer_mask, vanished))

    def _window_weights(self, locations, window: int, feature_maps: Mapping[int, Tensor]) -> Tensor:
        """Weights (R, H, W) of windows around places on the one grid of the feature maps."""
        grids = {self.layer_names[i]: (maps.shape[-2], maps.shape[-1]) for i, maps in feature_maps.items()}
        name, grid = next(iter(grids.items()))
        if len(set(grids.values())) > 1:
            raise ValueError(f"locations need one grid, but the visible layers have {grids}: name one layer, or use regions.")
        return window_weights(read_locations(locations, grid, name), grid, window)

    def _region_weights(self, regions: Tensor, feature_maps: Mapping[int, Tensor]) -> tuple[dict[int, Tensor], Tensor]:
        """Weights (B, R, H_l, W_l) of regions by layer index, and where they vanish and are hidden, (B * R, L) bool."""
        like = next(iter(feature_maps.values()))
        if regions.ndim not in (3, 4) or len(regions) != len(like):
            raise ValueError(
                f"regions of shape {tuple(regions.shape)} for {len(like)} images: expected ({len(like)}, height, width) or "
                f"({len(like)}, regions, height, width), over the pixel values."
            )
        regions = (regions[:, None] if regions.ndim == 3 else regions).to(like.device)
        vanished = torch.zeros(regions[:, :, 0, 0].numel(), len(self.layer_names), dtype=torch.bool, device=like.device)
        weights = {}
        for index, maps in feature_maps.items():
            weights[index], empty = region_weights(regions, (maps.shape[-2], maps.shape[-1]))
            vanished[:, index] = empty.flatten()
        return weights, vanished

    def _rows_of_mask(self, layer_mask: Tensor, rows: int, images: int) -> Tensor:
        """A layer mask of (L,), (B, L) or (rows, L) as (rows, L)."""
        layers = len(self.layer_names)
        if layer_mask.shape == (layers,):
            return layer_mask.bool().expand(rows, -1)
        if layer_mask.shape == (images, layers):
            return layer_mask.bool().repeat_interleave(rows // images, dim=0)
        if layer_mask.shape == (rows, layers):
            return layer_mask.bool()
        raise ValueError(
            f"layer_mask of shape {tuple(layer_mask.shape)}: expected ({layers},), ({images}, {layers}) or ({rows}, {layers})."
        )

    def check_finite(self, vectors: Tensor, index: int) -> Tensor:
        """Pooled features (N, C_l) of the layer at position `index`, as they are; a ValueError if one is not finite."""
        if not torch.isfinite(vectors).all():
            bad = int((~torch.isfinite(vectors)).any(dim=-1).sum())
            raise ValueError(
                f"features of layer {self.layer_names[index]!r} are not finite in {bad} of {len(vectors)} questions: check the "
                "pixel values, and the backbone's dtype (half precision overflows in some backbones)."
            )
        return vectors

    # ------------------------------------------------------------------------------------------------------- training

    def forward(
        self,
        pixel_values: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        feature_maps: Sequence[Tensor] | None = None,
        pooled_features: Sequence[Tensor] | None = None,
        location_weights: Sequence[Tensor | None] | None = None,
        layer_mask: Tensor | None = None,
        regions: Tensor | None = None,
    ) -> DevilOutput:
        """Caption loss of image-text pairs (paper, equation 3).

        In training mode, location and layer dropout are drawn as configured unless `location_weights` or `layer_mask` say
        otherwise (by the package devil-hf alone); in eval mode every location and layer is visible.

        Args:
            pixel_values: (B, 3, H, W); or `feature_maps`, one (B, C_l, H_l, W_l) per layer; or `pooled_features`, (B, C_l).
            input_ids: (B, T) caption tokens without BOS and EOS, padded on the right; both are added here.
            attention_mask: (B, T), 0 on padding; None when there is none.
            location_weights: per layer (B, 1, H_l, W_l), or None for uniform.
            layer_mask: (B, L) bool, True = hidden.
            regions: (B, H, W) masks, as `processor.masks_to_regions` makes them, of what each caption speaks of; ones for a
                whole image (beyond the paper). Location dropout then draws places inside of them. As in `ask`, a layer where
                one vanishes is hidden from it.

        Raises:
            ValueError: for more than one of regions, weights and pooled features, which all say where to look.
        """
        _only_one(regions=regions, location_weights=location_weights, pooled_features=pooled_features)
        layers, vanished = range(len(self.layer_names)), None
        if pooled_features is None:
            feature_maps = self.read_features(pixel_values, feature_maps, layers)
            weights: Any = location_weights or [None] * len(layers)
            if regions is not None:
                weights, vanished = self._region_weights(regions, dict(enumerate(feature_maps)))
            if self.training and location_weights is None:
                drawn = companion("training").draw_location_weights(self.config, len(feature_maps[0]), feature_maps, regions)
                weights = [one[:, None] for one in drawn]
            pooled_features = [self.check_finite(pool(feature_maps[i], weights[i]), i) for i in layers]
        if layer_mask is None and self.training:
            rows, device = len(pooled_features[0]), pooled_features[0].device
            layer_mask = companion("training").draw_layer_mask(self.config, rows, len(layers), device)
        if vanished is not None and vanished.any():
            layer_mask = _hidden(layer_mask, vanished)
        prefix = self.translate(pooled_features, layer_mask)
        if input_ids is None:
            return DevilOutput(prefix=prefix)
        labels, embeds, mask = self.caption_inputs(prefix, input_ids, attention_mask)
        # What would follow the last token is nobody's label.
        logits = run_language_model(self.language_model, embeds[:, :-1], labels.shape[1], mask[:, :-1]).logits
        loss = F.cross_entropy(logits.float().flatten(0, 1), labels.to(logits.device).flatten())
        return DevilOutput(loss=loss, logits=logits, prefix=prefix)

    def caption_inputs(self, prefix: Tensor, input_ids: Tensor, attention_mask: Tensor | None):
        """Labels (B, T + 1), -100 on padding; input embeddings of BOS, prefix, caption, EOS; their attention mask."""
        input_ids = input_ids.to(prefix.device)
        attention_mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask.to(prefix.device)
        tokens, labels = input_ids, input_ids.masked_fill(attention_mask == 0, -100)
        if self.config.eos_token_id is not None:
            # EOS stands right after the last caption token, in front of the padding.
            ends = attention_mask.sum(dim=1, keepdim=True)
            attention_mask = F.pad(attention_mask, (1, 0), value=1)
            tokens = F.pad(tokens, (0, 1)).scatter(1, ends, self.config.eos_token_id)
            labels = F.pad(labels, (0, 1), value=-100).scatter(1, ends, self.config.eos_token_id)
        start = self.embed_prefix(prefix)
        words = self.get_input_embeddings()(tokens).to(start.dtype)
        self.check_context(start.shape[1] + tokens.shape[1], "the prefix and the caption", "shorten the captions")
        mask = torch.cat([attention_mask.new_ones(start.shape[:2]), attention_mask], dim=1)
        return labels, torch.cat([start, words], dim=1), mask

    # ------------------------------------------------------------------------------------------------ reading a prefix

    def embed_prefix(self, prefix: Tensor) -> Tensor:
        """Input embeddings in front of every text: BOS where the language model has one, and the prefix."""
        embedding = self.get_input_embeddings()
        prefix = prefix.to(device=embedding.weight.device, dtype=embedding.weight.dtype)
        if self.config.bos_token_id is None:
            return prefix
        bos = embedding(torch.full((1, 1), self.config.bos_token_id, device=prefix.device))
        return torch.cat([bos.to(prefix).expand(prefix.shape[0], -1, -1), prefix], dim=1)

    def check_context(self, length: int, what: str, remedy: str) -> None:
        """A ValueError where the language model cannot read that many tokens."""
        limit = self.config.context_length
        if limit is not None and length > limit:
            raise ValueError(f"{what} take {length} tokens, but the language model reads {limit}: {remedy}.")

    @torch.no_grad()
    def generate(
        self,
        pixel_values: Tensor | None = None,
        layers: Layers = None,
        locations: Sequence[tuple[int, int]] | None = None,
        window: int = 1,
        regions: Tensor | None = None,
        location_weights: Sequence[Tensor | None] | None = None,
        layer_mask: Tensor | None = None,
        feature_maps: Sequence[Tensor | None] | None = None,
        guidance: float = 1.0,
        **generation_kwargs,
    ) -> Tensor:
        """Describe what is asked for, by the language model's own `generate`.

        The arguments up to `feature_maps` are those of `ask`; `guidance` above 1 favours what the features add (beyond the
        paper); everything else (`max_new_tokens`, `num_beams`, `do_sample`, `streamer`, ...) goes to the library's `generate`.

        Returns:
            (N, T) new tokens, greedy unless told otherwise (paper, section 4.1).
        """
        if "input_ids" in generation_kwargs or "attention_mask" in generation_kwargs:
            raise ValueError("generate reads images only: phrases go to `score` or `attribute`.")
        prefix = self.ask(pixel_values, layers, locations, window, regions, location_weights, layer_mask, feature_maps)
        return self.decode(prefix, guidance, **generation_kwargs)

    @torch.no_grad()
    def decode(self, prefix: Tensor, guidance: float = 1.0, **generation_kwargs) -> Tensor:
        """The words behind prefixes (N, k, D_lm): (N, T) new tokens, padded on the right; `generate` says the rest."""
        start = self.embed_prefix(prefix)
        options, config = self._generation_options(start.shape[1], generation_kwargs)
        if guidance != 1.0:
            processor = EvidenceGuidance(self.language_model, self.embed_prefix(self.null_prefix()), guidance)
            processors = list(options.pop("logits_processor", None) or [])
            options["logits_processor"] = LogitsProcessorList([processor, *processors])
        rows = (config.num_beams or 1) * (config.num_return_sequences or 1)
        new_tokens = config.max_new_tokens or config.max_length or DEFAULT_NEW_TOKENS
        chunk = rows_per_chunk(self.language_model, start.shape[1], rows, new_tokens, logit_positions=1)
        if len(start) > chunk and config.return_dict_in_generate:
            raise ValueError(f"return_dict_in_generate works for {chunk} questions at once, not for {len(start)}: ask fewer.")
        outputs = []
        for part in start.split(chunk):
            mask = torch.ones(part.shape[:2], dtype=torch.long, device=part.device)
            outputs.append(self.language_model.generate(inputs_embeds=part, attention_mask=mask, **options))
        if len(outputs) == 1:
            return outputs[0]
        longest = max(part.shape[1] for part in outputs)
        return torch.cat([F.pad(part, (0, longest - part.shape[1]), value=self.padding_token_id) for part in outputs])

    def _generation_options(self, start_length: int, given: dict) -> tuple[dict, GenerationConfig]:
        """Arguments for the library's `generate`, our defaults under the caller's, and the configuration they amount to."""
        options = dict(given)
        config = copy.deepcopy(options.get("generation_config") or GenerationConfig())
        known = config.to_dict()
        config.update(**{name: value for name, value in given.items() if name in known})
        if config.max_new_tokens is None and config.max_length is None:
            limit = self.config.context_length
            room = DEFAULT_NEW_TOKENS if limit is None else min(DEFAULT_NEW_TOKENS, limit - start_length)
            options["max_new_tokens"] = config.max_new_tokens = max(room, 1)
        # A given length counts the prefix in the library's `max_length`, and not in `max_new_tokens`.
        length = start_length + config.max_new_tokens if config.max_new_tokens else config.max_length
        self.check_context(length, "the prefix and the new tokens", "lower max_new_tokens")
        if config.pad_token_id is None:
            options["pad_token_id"] = self.padding_token_id
        if config.eos_token_id is None:
            options["eos_token_id"] = self.config.eos_token_id
        return options, config

    @property
    def padding_token_id(self) -> int:
        """The token that fills finished rows of a generation."""
        tokens = (self.config.pad_token_id, self.config.eos_token_id, 0)
        return next(token for token in tokens if token is not None)


def _only_one(**given: Any) -> None:
    names = [name for name, value in given.items() if value is not None]
    if len(names) > 1:
        raise ValueError(f"{' and '.join(names)} both say where to look: give one of them.")


def _hidden(layer_mask: Tensor | None, vanished: Tensor | None) -> Tensor | None:
    if layer_mask is None or vanished is None:
        return vanished if layer_mask is None else layer_mask
    return layer_mask.to(vanished.device) | vanished


def _contiguous_input(head: nn.Module, arguments: tuple) -> tuple:
    # Logits of the last positions are asked of a slice, on which bf16 kernels of the CPU are hundreds of times slower.
    return (arguments[0].contiguous(), *arguments[1:])


DevilModel.register_for_auto_class("AutoModel")

__all__ = ["DevilModel"]
