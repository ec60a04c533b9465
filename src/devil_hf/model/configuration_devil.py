"""Configuration of a DeViL model.

The defaults are the paper's (GCPR 2023, arXiv 2309.01617, section 3 and the supplement): a 12-layer, 768-wide translator,
a prefix of 10, layer and location dropout of one half. Everything beyond the paper is a field whose default switches it off.
"""

import copy
import dataclasses
import re
from collections.abc import Mapping
from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

FORMAT_VERSION = 1
# What a checkpoint may say of its parts: words without the separators of paths, URLs and repositories, and numbers that networks
# have, fewer of what is counted: a list of a billion layers fills the memory before one is made.
WORD = re.compile(r"[\w.,+ -]{0,200}")
REFUSED = re.compile(".*_implementation|model_args|use_pretrained_backbone")  # kernels of repositories; what timm opens
COUNTED = re.compile("layer|depth|block|stage|expert|head|group|label")
MOST, MOST_PARTS = 2**31, 2**19
DTYPES = (None, "float16", "bfloat16", "float32", "float64")
TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
UNDECLARED = "out_features out_indices partial_rotary_factor rope_scaling rope_theta tie_word_embeddings".split()  # noqa: SIM905
KEPT = ("auto_map", "custom_pipelines", "model_type")  # beside the fields: what Auto classes and `pipeline` read


def check_setting(name: str, value: Any) -> Any:
    """A value of a part's description, as it is; a ValueError for what may lead out of the checkpoint, or no network has."""
    if isinstance(value, Mapping) and len(value) <= MOST_PARTS and not (value and REFUSED.fullmatch(name)):
        kind = str(value.get("model_type"))
        if kind in CONFIG_MAPPING or "timm" in kind:
            return {"model_type": kind} | settings_of(config_class_of(kind), value)
        labels = name in ("id2label", "label2id")  # any text, of which only the number matters
        return dict(value) if labels else {key: check_setting(str(key), one) for key, one in value.items()}
    if isinstance(value, list | tuple) and len(value) <= MOST_PARTS:
        return [check_setting(name, one) for one in value]
    most = MOST_PARTS if COUNTED.search(name) else MOST
    fits = value is None or isinstance(value, float) or (isinstance(value, int) and abs(value) <= most)
    fits = fits or (isinstance(value, str) and WORD.fullmatch(value) is not None)
    if not fits or (name == "dtype" and value not in DTYPES) or (value and REFUSED.fullmatch(name)):
        raise ValueError(f"{name}={value!r:.80} in the description of a checkpoint's part is refused: no network needs it.")
    return value


def config_class_of(model_type: Any) -> type[PreTrainedConfig]:
    """The configuration class of a model type; a ValueError for what transformers does not know, and for its wraps of timm."""
    if "timm" in str(model_type):
        raise ValueError(f"model_type {model_type!r:.80} wraps a network of timm's, which is not built: name timm's own network.")
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        raise ValueError(f"model_type {model_type!r:.80} is not one that this transformers builds: upgrade it, or name another.")
    return CONFIG_MAPPING[model_type]


def settings_of(config_class: Any, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Those of a description's fields that the configuration class declares, checked; the others are left out."""
    names = {field.name for field in dataclasses.fields(config_class)} | {*config_class.attribute_map, *UNDECLARED}
    return {name: check_setting(name, value) for name, value in fields.items() if name in names}


@strict
class DevilConfig(PreTrainedConfig):
    """What a [`DevilModel`] is made of, each field with its meaning and the paper's choice beside it."""

    model_type = "devil"
    sub_configs = {"text_config": AutoConfig}
    has_no_defaults_at_init = True

    backbone_config: dict[str, Any] | None = None  # of the frozen vision backbone, as `FeatureBackbone.config` has it
    text_config: Any = None  # configuration of the frozen causal language model
    language_model_source: dict[str, Any] | None = None  # `source`, `revision` and `sha256` of its pretrained weights

    prefix_length: int = 10  # k, the number of prefix vectors that the language model reads (paper: 10)
    # "transformer" is DeViL's; others are registered (`register_translator`) and use those of the sizes below that they have.
    translator_type: str = "transformer"
    translator_width: int = 768  # D (paper: 768)
    translator_depth: int = 12  # layers (paper: 12)
    translator_heads: int = 12  # attention heads (paper: 12)
    translator_feed_forward: int = 3072  # width of the feed-forward layers (paper: 3072)
    translator_shortcut: bool = False  # also add a linear map of each visible layer's feature to the prefix (paper: no)
    normalize_features: bool = False  # layer norm of each pooled feature before its projection (paper: no)

    layer_dropout: float = 0.5  # probability that training hides a layer (paper: 0.5); one always stays visible
    location_dropout: float = 0.5  # probability that training drops a location (paper: 0.5); one always stays
    # "constant" drops every location with `location_dropout` (paper); "log_uniform" draws how many are kept log-uniformly
    # between one and all of them, which makes single places point better, and with `whole_probability` shows the whole image.
    location_schedule: Literal["constant", "log_uniform"] = "constant"
    whole_probability: float = 0.25
    region_schedule: Literal["constant", "log_uniform"] | None = None  # of rows that have a region; None: as the others
    all_layers_probability: float = 0.0  # how often training hides no layer, beyond what `layer_dropout` gives (paper: 0)
    null_probability: float = 0.0  # how often training hides every layer, so that the null prefix is learned (paper: 0)
    max_caption_tokens: int = 100  # training captions are cut to this many (paper: 100)
    lora: dict[str, Any] | None = None  # settings of LoRA adapters in the language model, see `add_lora` (paper: none)

    bos_token_id: int | None = None  # in front of the prefix; None for a language model without one
    eos_token_id: int | None = None  # ends a caption; None for a language model without one
    pad_token_id: int | None = None  # fills finished rows of a generation
    tie_word_embeddings: bool = False
    scope: str | None = None  # what the training data covered, in a sentence that the tools print beside their answers
    scope_statistics: dict[str, Any] | None = None  # of features of training images, for the tools to tell others from them
    frozen_weights: Literal["embedded", "reference"] = "embedded"  # "reference" when the checkpoint is slim
    weights_sha256: dict[str, str] | None = None  # of the weights beside it, by the variant of the files ("" for none)
    format_version: int = FORMAT_VERSION  # layout of the checkpoint; newer ones than this code knows are refused

    def __post_init__(self, **kwargs):
        if isinstance(self.text_config, dict):
            config_class = config_class_of(self.text_config.get("model_type"))
            self.text_config = config_class(**settings_of(config_class, self.text_config))
        elif self.text_config is not None:
            # The base class resets the attention implementation of its sub-configurations: not that of a living model.
            self.text_config = copy.deepcopy(self.text_config)
            # Where it was loaded from is written in language_model_source, if anywhere.
            self.text_config._name_or_path = ""
        for name in TOKENS:  # some language models say -1 of a token that they do not have
            setattr(self, name, None if (getattr(self, name) or 0) < 0 else getattr(self, name))
        super().__post_init__(**kwargs)

    @property
    def layers(self) -> list[str]:
        """Names of the chosen layers, shallowest first."""
        return self.backbone_config["layers"] if self.backbone_config else []

    @property
    def context_length(self) -> int | None:
        """Longest sequence, in tokens, that the language model can read; None where it has no limit of its own."""
        names = ("max_position_embeddings", "n_positions", "max_seq_len", "max_seq_length")
        lengths = (getattr(self.text_config, name, None) for name in names)
        return next((length for length in lengths if isinstance(length, int) and length > 0), None)

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs):
        try:
            settings, unused = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
            return {**settings}, unused
        except (AttributeError, TypeError, RecursionError) as error:
            raise ValueError(f"the config.json of {pretrained_model_name_or_path} holds no settings: copy it again.") from error

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        # Before the fields are read: those of a newer format may well be wrong for this one.
        version = config_dict.get("format_version", FORMAT_VERSION)
        if version not in range(FORMAT_VERSION + 1):
            raise ValueError(f"this checkpoint has format_version {version}, this code reads {FORMAT_VERSION}: upgrade devil-hf.")
        names = {*KEPT, *(field.name for field in dataclasses.fields(cls))}
        config_dict = {name: value for name, value in config_dict.items() if name in names}  # no others, whatever they do
        check_setting("", {key: one for key, one in config_dict.items() if isinstance(one, int | float) or key == "dtype"})
        try:
            return super().from_dict(config_dict, **kwargs)
        except (StrictDataclassError, AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"this is no configuration of DeViL ({error!s:.500}): correct it, or copy it again.") from error

    def validate_probabilities(self):
        for name in ("layer_dropout", "location_dropout", *(name for name in vars(self) if name.endswith("_probability"))):
            if not 0.0 <= (value := getattr(self, name)) <= 1.0:
                raise ValueError(f"{name}={value} is not a probability: give a number between 0 and 1.")

    def validate_sizes(self):
        for name in ("prefix_length", *(f"translator_{part}" for part in ("width", "depth", "heads", "feed_forward"))):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"{name}={value} must be at least 1.")
        if self.translator_width % (heads := self.translator_heads):
            raise ValueError(f"translator_width={self.translator_width} is no multiple of translator_heads={heads}.")
        size = getattr(self.text_config, "vocab_size", None)
        for name in TOKENS:
            if size is not None and ((token := getattr(self, name)) or 0) >= size:
                raise ValueError(f"{name}={token} is none of the {size} tokens of the language model: name one, or None.")

    def validate_prefix_fits_the_context(self):
        # BOS, the prefix and at least one word have to fit.
        k, context = self.prefix_length, self.context_length
        if context is not None and context < k + 2:
            raise ValueError(f"prefix_length={k} needs a context of at least {k + 2} tokens, the language model's is {context}.")


__all__ = ["DevilConfig"]
