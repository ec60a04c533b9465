"""DeViL: a frozen vision backbone, a translator, a frozen language model (Dani et al., GCPR 2023, arXiv 2309.01617).

Everything that can be asked is a choice of location weights and a layer mask (`DevilModel.ask`); the answer is a prefix,
and two verbs read it: `generate` (words) and `score` (log-probability of given words). Questions about many layers and
places at once, `describe` and `attribute`, stand in `explaining_devil.py`. Deviations from the paper, each off by default:
feature norms, a learned null prefix, log-uniform location dropout, guidance. The language model stays in eval mode.
"""

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, GenerationConfig, LogitsProcessorList, PreTrainedModel

from .backbone_devil import FeatureBackbone
from .checkpoint_devil import COMPANIONS, DevilPreTrainedModel, OwnGenerationMixin, companion
from .configuration_devil import DevilConfig
from .explaining_devil import ExplainMixin
from .outputs_devil import DevilOutput
from .pooling_devil import Layers, one_per_layer, only_one, place_weights, pool, read_number, read_tensor, resolve_layers
from .scoring_devil import EvidenceGuidance, ScoreMixin, rows_per_chunk, run_language_model
from .translator_devil import translator_class

DEFAULT_NEW_TOKENS = 40
QUESTION = ("locations", "window", "regions", "location_weights", "layer_mask", "feature_maps")  # arguments of `ask`
COUNTS = ("max_new_tokens", "max_length", "num_beams", "num_return_sequences")  # arguments of `generate` that are at least 1


class DevilModel(OwnGenerationMixin, ExplainMixin, ScoreMixin, DevilPreTrainedModel):
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
        self.language_model.get_output_embeddings().register_forward_hook(_check_logits)
        # Nothing that we decode is padded, and the library drops a mask of ones before it looks for padding.
        self.language_model.base_model.warn_if_padding_and_no_attention_mask = _nothing_is_padded
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

        A ValueError for pixel values of a wrong shape, layers that the model does not read, and features that are not finite.
        """
        if pixel_values is None:
            raise ValueError("there is nothing to look at: give pixel_values, or the feature_maps of an earlier call.")
        pixel_values = read_tensor(pixel_values, "pixel_values")
        if pixel_values.ndim != 4 or 0 in pixel_values.shape or not pixel_values.is_floating_point():
            raise ValueError(
                f"pixel_values of shape {tuple(pixel_values.shape)} and type {pixel_values.dtype}: expected floating-point "
                "(images, 3, height, width), none of them zero; make them with the model's processor."
            )
        visible = resolve_layers(layers, self.layer_names)
        parameter = next(self.backbone.parameters(), None)
        if parameter is not None:
            pixel_values = pixel_values.to(device=parameter.device, dtype=parameter.dtype)
        try:
            maps = self.backbone(pixel_values, visible)
        except (AssertionError, RuntimeError) as error:
            if list(pixel_values.shape[1:]) == list(self.config.backbone_config["input_size"]):
                raise
            raise ValueError(f"the backbone cannot read images of {tuple(pixel_values.shape[1:])}: {error}") from error
        self.check_finite(maps)
        return maps

    def read_features(
        self, pixel_values: Tensor | None, feature_maps: Sequence[Tensor | None] | None, visible: Sequence[int]
    ) -> list[Any]:
        """The given feature maps, checked, or those of `pixel_values`, at least for the layers at positions `visible`."""
        if feature_maps is None:
            return self.extract_features(pixel_values, list(visible))
        maps = self._read_layers(feature_maps, "feature_maps", visible, ("rows", "columns"))
        self.check_finite([maps[index] if index in visible else None for index in range(len(maps))])
        return maps

    def _read_layers(self, given: Any, name: str, visible: Sequence[int], grid: tuple[str, ...] = ()) -> list[Any]:
        """Features as a user gave them, one per layer; those at positions `visible` must be there, and of as many images."""
        features = one_per_layer(given, name, self.layer_names)
        images: int | str = "images"
        for index in visible:
            if features[index] is None:
                raise ValueError(f"{name} hold nothing of layer {self.layer_names[index]!r}: extract it, or do not ask for it.")
            self.check_shape(features[index], index, (images, self.backbone.channels[index], *grid))
            images = len(features[index])
        return features

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
        for index, vectors in enumerate(pooled):
            if vectors is not None:
                self.check_shape(vectors, index, ("rows", self.backbone.channels[index]))
        self.check_finite(pooled)
        prefix = self.translator(pooled, layer_mask, rows)
        if not (torch.is_grad_enabled() or torch.isfinite(prefix).all()):
            raise ValueError("the prefix is not finite: check the weights of the translator, and its dtype.")
        return prefix

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
        weights, vanished = place_weights(self.layer_names, seen, pixel_values, locations, window, regions, location_weights)
        pooled: list[Tensor | None] = [None] * len(self.layer_names)
        for index, maps in seen.items():
            pooled[index] = vectors = pool(maps, weights[index])
        return self.translate(pooled, self._hidden(layer_mask, vanished, len(vectors), len(maps)))

    def _hidden(self, layer_mask: Any, vanished: Tensor | None, rows: int, images: int) -> Tensor | None:
        """A layer mask of (L,), (B, L) or (rows, L), and the layers where regions vanish, as (rows, L); None hides nothing."""
        if layer_mask is None:
            return vanished
        mask, layers = read_tensor(layer_mask, "layer_mask").bool(), len(self.layer_names)
        if mask.shape not in ((layers,), (images, layers), (rows, layers)):
            raise ValueError(
                f"layer_mask of shape {tuple(mask.shape)}: expected ({layers},), ({images}, {layers}) or ({rows}, {layers})."
            )
        mask = mask.expand(rows, -1) if mask.ndim == 1 else mask.repeat_interleave(rows // len(mask), dim=0)
        return mask if vanished is None else mask.to(vanished.device) | vanished

    def check_shape(self, features: Tensor, index: int, expected: tuple[int | str, ...]) -> None:
        """A ValueError for features of the layer at position `index` that are not of the shape `expected`."""
        shape, name = tuple(features.shape), self.layer_names[index]
        fits = [found and (found == wanted or isinstance(wanted, str)) for found, wanted in zip(shape, expected, strict=False)]
        if len(shape) != len(expected) or not all(fits):
            raise ValueError(f"features of layer {name!r} have the shape {shape}: expected ({', '.join(map(str, expected))}).")

    def check_finite(self, features: Sequence[Tensor | None]) -> None:
        """A ValueError that names the first layer whose features, one tensor per layer or None, are not finite."""
        sums = [one.detach().sum(dtype=torch.float32) for one in features if one is not None]
        # Sums cost a fraction of a look at every number, and the device is waited for once.
        if math.isfinite(sum(one.to(sums[0].device) for one in sums)):
            return
        for name, one in zip(self.layer_names, features, strict=True):
            if one is not None and not torch.isfinite(one).all():
                raise ValueError(
                    f"features of layer {name!r} are not finite: check the pixel values, and the backbone's weights and dtype "
                    "(half precision overflows in some backbones)."
                )

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

        In training mode (by the package devil-hf alone) locations and layers are dropped unless given, and no logits come back.

        Args:
            pixel_values: (B, 3, H, W); or `feature_maps`, one (B, C_l, H_l, W_l) per layer; or `pooled_features`, (B, C_l).
            input_ids: (B, T) caption tokens without BOS and EOS, padded on the right; both are added here.
            attention_mask: (B, T), 0 on padding; None when there is none.
            location_weights: per layer (B, 1, H_l, W_l), or None for uniform.
            layer_mask: (B, L) bool, True = hidden.
            regions: (B, H, W) soft masks of what each caption speaks of, ones for a whole image; places are drawn inside (beyond
                the paper), and layers hidden as in `ask`. Of regions, weights and pooled features, one may be given.
        """
        only_one(regions=regions, location_weights=location_weights, pooled_features=pooled_features)
        layers, vanished = range(len(self.layer_names)), None
        if pooled_features is None:
            maps = dict(enumerate(self.read_features(pixel_values, feature_maps, layers)))
            weights, vanished = place_weights(self.layer_names, maps, pixel_values, None, 1, regions, location_weights)
            if self.training and location_weights is None:
                drawn = companion("training").draw_location_weights(self.config, len(maps[0]), list(maps.values()), regions)
                weights = {index: one[:, None] for index, one in enumerate(drawn)}
            pooled_features = [pool(maps[index], weights[index]) for index in layers]
        pooled_features = self._read_layers(pooled_features, "pooled_features", layers)
        rows = len(pooled_features[0])
        if layer_mask is None and self.training:
            layer_mask = companion("training").draw_layer_mask(self.config, rows, len(layers), pooled_features[0].device)
        prefix = self.translate(pooled_features, self._hidden(layer_mask, vanished, rows, rows))
        if input_ids is None:
            return DevilOutput(prefix=prefix)
        captions = labels, embeds, mask = self.caption_inputs(prefix, input_ids, attention_mask)
        if self.training:
            return DevilOutput(loss=companion("training").caption_loss(self.language_model, *captions), prefix=prefix)
        # What would follow the last token is nobody's label.
        logits = run_language_model(self.language_model, embeds[:, :-1], labels.shape[1], mask[:, :-1]).logits
        loss = F.cross_entropy(logits.float().flatten(0, 1), labels.to(logits.device).flatten())
        return DevilOutput(loss=loss, logits=logits, prefix=prefix)

    def caption_inputs(self, prefix: Tensor, input_ids: Tensor, attention_mask: Tensor | None):
        """Labels (B, T + 1), -100 on padding; input embeddings of BOS, prefix, caption, EOS; their attention mask."""
        input_ids, attention_mask = (one.to(prefix.device) for one in self.read_tokens(input_ids, attention_mask))
        if len(input_ids) != len(prefix):
            raise ValueError(f"{len(input_ids)} captions for {len(prefix)} images: give one of each.")
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
    def generate(self, pixel_values: Tensor | None = None, layers: Layers = None, guidance: float = 1.0, **arguments) -> Tensor:
        """Describe what is asked for, by the language model's own `generate`.

        The arguments are those of `ask`; `guidance`, which above 1 favours what the features add (beyond the paper); everything
        else (`max_new_tokens`, `num_beams`, `do_sample`, `streamer`, ...) goes to the library's `generate`.

        Returns:
            (N, T) new tokens, greedy unless told otherwise (paper, section 4.1).
        """
        question = {name: arguments.pop(name) for name in QUESTION if name in arguments}
        return self.decode(self.ask(pixel_values, layers, **question), guidance, **arguments)

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
        chunk = rows_per_chunk(self.language_model, start.shape[1], rows, new_tokens, logits=1)
        if len(start) > chunk and config.return_dict_in_generate:
            raise ValueError(f"return_dict_in_generate works for {chunk} questions at once, not for {len(start)}: ask fewer.")
        generate, outputs = getattr(COMPANIONS.get("decoding"), "generate", type(self.language_model).generate), []
        for part in start.split(chunk):
            mask = torch.ones(part.shape[:2], dtype=torch.long, device=part.device)
            outputs.append(generate(self.language_model, inputs_embeds=part, attention_mask=mask, **options))
        if len(outputs) == 1:
            return outputs[0]
        longest = max(part.shape[1] for part in outputs)
        return torch.cat([F.pad(part, (0, longest - part.shape[1]), value=self.padding_token_id) for part in outputs])

    def _generation_options(self, start_length: int, given: dict) -> tuple[dict, GenerationConfig]:
        """Arguments for the library's `generate`, our defaults under the caller's, and the configuration they amount to."""
        if text := given.keys() & {"input_ids", "attention_mask", "inputs_embeds", "scored_mask"}:
            raise ValueError(f"{sorted(text)}: descriptions are of images alone; phrases go to `score` or `attribute`.")
        given = {name: value for name, value in given.items() if value is not None}  # None: as the library does by default
        config = copy.deepcopy(given.pop("generation_config", GenerationConfig()))
        if not isinstance(config, GenerationConfig):
            raise TypeError(f"generation_config={config!r:.100} must be a GenerationConfig of transformers.")
        counts = {name: given.get(name, getattr(config, name)) for name in COUNTS}
        given |= {name: read_number(count, name, 1) for name, count in counts.items() if count is not None}
        options = config.update(**given) | {"generation_config": config}
        if config.max_new_tokens is None and config.max_length is None:
            limit = self.config.context_length
            room = DEFAULT_NEW_TOKENS if limit is None else min(DEFAULT_NEW_TOKENS, limit - start_length)
            config.max_new_tokens = max(room, 1)
        # A given length counts the prefix in the library's `max_length`, and not in `max_new_tokens`.
        length = start_length + config.max_new_tokens if config.max_new_tokens else config.max_length
        self.check_context(length, "the prefix and the new tokens", "lower max_new_tokens")
        if config.pad_token_id is None:
            config.pad_token_id = self.padding_token_id
        if config.eos_token_id is None:
            config.eos_token_id = self.config.eos_token_id
        return options, config

    @property
    def padding_token_id(self) -> int:
        """The token that fills finished rows of a generation."""
        tokens = (self.config.pad_token_id, self.config.eos_token_id, 0)
        return next(token for token in tokens if token is not None)


def _contiguous_input(head: nn.Module, arguments: tuple) -> tuple:
    # Logits of the last positions are asked of a slice, on which bf16 kernels of the CPU are hundreds of times slower.
    return (arguments[0].contiguous(), *arguments[1:])


def _check_logits(head: nn.Module, arguments: tuple, logits: Tensor) -> None:
    # Minus infinity is what some language models give to tokens that they never say. Training sees its own loss.
    if not (torch.is_grad_enabled() or torch.compiler.is_compiling() or (logits < float("inf")).all()):
        raise ValueError("the language model's scores are not finite: check its weights, and its dtype.")


def _nothing_is_padded(*arguments: Any) -> None:
    pass


DevilModel.register_for_auto_class("AutoModel")

__all__ = ["DevilConfig", "DevilModel"]
