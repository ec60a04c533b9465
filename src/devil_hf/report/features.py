"""Feature maps as colours: three principal directions of a layer as red, green and blue."""

import numpy as np
import torch
from PIL import Image
from torch import Tensor


def feature_picture(feature_map: Tensor) -> Image.Image:
    """One pixel per location; places of like features have like colours, within this map only.

    Args:
        feature_map: (C, H, W).

    Returns:
        RGB picture of size (W, H): the first three principal components, each from its 2nd to its 98th percentile.
    """
    height, width = feature_map.shape[1:]
    features = feature_map.detach().float().cpu().flatten(1).T  # (H * W, C)
    features = features - features.mean(dim=0)
    _, _, directions = torch.linalg.svd(features, full_matrices=False)
    components = min(3, len(directions))
    # The sign of a direction is arbitrary: its largest entry is made positive, so that colours repeat from run to run.
    signs = directions.gather(1, directions.abs().argmax(dim=1, keepdim=True)).sign()
    projected = features @ (directions * signs)[:components].T  # (H * W, components)
    low, high = (torch.quantile(projected, q, dim=0) for q in (0.02, 0.98))
    shares = ((projected - low) / (high - low).clamp_min(1e-12)).clamp(0, 1)
    colours = torch.full((height * width, 3), 0.5)
    colours[:, :components] = shares
    return Image.fromarray(np.round(colours.view(height, width, 3).numpy() * 255).astype(np.uint8))


__all__ = ["feature_picture"]
