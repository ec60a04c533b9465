r"""Make a local timm checkpoint out of a bare safetensors file of weights.

    python scripts/prepare_backbone.py weights.safetensors mobilenetv2_100 backbone --model_args '{"pad_type": "same"}' \
        --data_config '{"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5], "interpolation": "bilinear", "crop_pct": 0.875}'

The directory then loads as a backbone: `backbone_from_source("backbone")` or
`timm.create_model("local-dir:backbone", pretrained=True)`.
"""

import argparse
import json

import timm
from safetensors.torch import load_file
from timm.models import save_for_hf


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", help="safetensors file with timm's parameter names, any float type")
    parser.add_argument("architecture", help="timm architecture that the weights belong to")
    parser.add_argument("output_dir", help="directory that is written")
    parser.add_argument(
        "--model_args", type=json.loads, default={}, help="JSON of further arguments of timm.create_model"
    )
    parser.add_argument(
        "--data_config",
        type=json.loads,
        default={},
        help="JSON of the preprocessing: mean, std, interpolation, crop_pct",
    )
    arguments = parser.parse_args()
    unknown = arguments.data_config.keys() - {"input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode"}
    if unknown:
        parser.error(
            f"--data_config has unknown keys {sorted(unknown)}; use timm's names, see timm.data.resolve_model_data_config"
        )
    model = timm.create_model(arguments.architecture, pretrained=False, **arguments.model_args)
    weights = load_file(arguments.weights)
    model.load_state_dict(
        {name: value.float() if value.is_floating_point() else value for name, value in weights.items()}
    )
    # The architecture's tag and address belong to other weights than these.
    own = {"tag": "", "hf_hub_id": None, "url": None, "license": None, **arguments.data_config}
    save_for_hf(
        model,
        arguments.output_dir,
        {"pretrained_cfg": own},
        model_args=arguments.model_args or None,
        safe_serialization=True,
    )


if __name__ == "__main__":
    main()
