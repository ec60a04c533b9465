r"""Make a local timm checkpoint out of a bare safetensors file of weights.

    python scripts/prepare_backbone.py weights.safetensors mobilenetv2_100 backbone --model-args '{"pad_type": "same"}' \
        --data-config '{"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5], "interpolation": "bilinear", "crop_pct": 0.875}'

The directory then loads as a backbone: it is the `backbone` of a recipe, or
`timm.create_model("local-dir:backbone", pretrained=True)`.
"""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

import timm
from safetensors.torch import load_file
from timm.models import save_for_hf

from devil_hf.cli.main import bounded
from devil_hf.settings import option, parse

KEYS = {"input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode"}


@dataclass
class BackboneSettings:
    """Which weights, of what, and where the directory goes."""

    weights: Path = option("safetensors file with timm's parameter names, any float type", positional=True)
    architecture: str = option("timm architecture that the weights belong to", positional=True)
    output_dir: Path = option("directory that is written", positional=True)
    model_args: dict = option("further arguments of timm.create_model", {})
    data_config: dict = option("the preprocessing: mean, std, interpolation, crop_pct", {})

    def validate(self) -> None:
        """Raise a ValueError for preprocessing that timm would not understand."""
        if unknown := self.data_config.keys() - KEYS:
            raise ValueError(
                f"data_config has unknown keys {sorted(unknown)}; use timm's names, see timm.data.resolve_model_data_config"
            )


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    settings = parse(BackboneSettings, sys.argv[1:], description=__doc__, formatter_class=raw)
    model = timm.create_model(settings.architecture, pretrained=False, **settings.model_args)
    weights = load_file(settings.weights)
    model.load_state_dict({name: one.float() if one.is_floating_point() else one for name, one in weights.items()})
    # The architecture's tag and address belong to other weights than these.
    own = {"tag": "", "hf_hub_id": None, "url": None, "license": None, **settings.data_config}
    model_args = settings.model_args or None
    save_for_hf(model, settings.output_dir, {"pretrained_cfg": own}, model_args=model_args, safe_serialization=True)


if __name__ == "__main__":
    sys.exit(bounded("prepare_backbone.py", main))
