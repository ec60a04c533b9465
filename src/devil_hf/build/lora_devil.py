"""LoRA adapters in the language model. This file travels only with checkpoints that have some."""

import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn
from transformers.utils import is_peft_available

from devil_hf.model.checkpoint_devil import COMPANIONS
from devil_hf.model.modeling_devil import DevilModel

COMPANIONS["lora"] = sys.modules[__name__]
LORA_DEFAULTS: dict[str, Any] = {"rank": 8, "alpha": 16, "dropout": 0.0, "target_modules": None}


def add_lora(language_model: nn.Module, lora: Mapping[str, Any]) -> None:
    """Inject adapters into a language model, in place; one that has them already is left as it is.

    Not by `add_adapter` of transformers, after which the language model saves its adapters alone.

    Args:
        lora: `rank`, `alpha`, `dropout` and `target_modules` (names of linear layers, or peft's `"all-linear"`); what is
            left out is 8, 16, 0 and the attention projections that peft names for this family of language models, or every
            linear layer but the head for a family that it does not know.

    Raises:
        ImportError: when peft is not installed.
        ValueError: see `check_lora`; for a rank beyond the language model's width, and for targets whose weights are tied to
            those of another layer.
    """
    check_lora(lora)
    if not is_peft_available():
        raise ImportError("this model has LoRA adapters, which need peft: pip install peft")
    if next(lora_layers(language_model), None) is not None:
        return
    from peft import LoraConfig, inject_adapter_in_model  # half a second, for which models without adapters need not wait
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    full = LORA_DEFAULTS | dict(lora)
    model_config: Any = language_model.config
    width = getattr(model_config.get_text_config(), "hidden_size", None)
    if width is not None and full["rank"] > width:
        raise ValueError(f"lora rank={full['rank']} is more than the width {width} of the language model: choose a smaller one.")
    family = getattr(model_config, "model_type", "")
    targets = full["target_modules"] or TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(family, "all-linear")
    config = LoraConfig(
        r=full["rank"],
        lora_alpha=full["alpha"],
        lora_dropout=full["dropout"],
        target_modules=targets if isinstance(targets, str) else list(targets),
        # Transposed linear layers, as in GPT-2, would otherwise be met with a warning.
        fan_in_fan_out=any(type(module).__name__ == "Conv1D" for module in language_model.modules()),
    )
    if tied := _tied_targets(language_model, config):
        raise ValueError(
            f"lora target_modules={full['target_modules']!r} take in {tied}, whose weights another layer reads, too, as tied "
            "embeddings and head do: adapters of the one would change the other; name other layers."
        )
    inject_adapter_in_model(config, language_model)


def _tied_targets(language_model: nn.Module, config: Any) -> list[str]:
    """Names of the targets of a `LoraConfig` whose weight is the weight of another module as well."""
    from peft.tuners.tuners_utils import check_target_module_exists

    weights = [(name, module._parameters.get("weight")) for name, module in language_model.named_modules()]
    owners = Counter(id(weight) for _, weight in weights)
    tied = [name for name, weight in weights if weight is not None and owners[id(weight)] > 1]
    return [name for name in tied if check_target_module_exists(config, name)]


def lora_layers(language_model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Name and module of every layer with an adapter."""
    lora: Any = sys.modules.get("peft.tuners.lora")
    if lora is not None:  # before anybody has imported it, nothing can have one
        yield from ((name, part) for name, part in language_model.named_modules() if isinstance(part, lora.LoraLayer))


def check_lora(lora: Mapping[str, Any]) -> None:
    """Raise a ValueError for settings that are unknown or out of range."""
    if unknown := sorted(set(lora) - set(LORA_DEFAULTS)):
        raise ValueError(f"lora has settings {unknown}; there are {sorted(LORA_DEFAULTS)}.")
    full = LORA_DEFAULTS | dict(lora)
    if type(full["rank"]) is not int or full["rank"] < 1:
        raise ValueError(f"lora rank={full['rank']!r:.80} must be a whole number of at least 1.")
    for name, most in (("alpha", 2**20), ("dropout", 1)):
        if type(full[name]) not in (int, float) or not 0 <= full[name] < most:
            raise ValueError(f"lora {name}={full[name]!r:.80} must be a number of at least 0 and below {most}.")
    # peft reads a text as a regular expression, some of which take forever.
    names = full["target_modules"]
    if names not in (None, "all-linear") and not (isinstance(names, list | tuple) and all(isinstance(one, str) for one in names)):
        raise ValueError(f"lora target_modules={names!r:.80} must be a list of names of layers, or 'all-linear'.")


__all__ = ["LORA_DEFAULTS", "DevilModel", "add_lora", "check_lora", "lora_layers"]
