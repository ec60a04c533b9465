"""The full quickstart, and real photographs: minutes long or in need of data, so only on request."""

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from devil_hf.build import image_processor_of
from devil_hf.cli.quickstart import QuickstartSettings, quickstart
from devil_hf.data.pairs import open_pairs
from devil_hf.data.pairs.folder import read_caption_folder


@pytest.mark.slow
def test_a_full_quickstart_reaches_its_scores(tmp_path):
    scores = quickstart(QuickstartSettings(output_dir=tmp_path))
    f1 = {name: score["f1"] for name, score in scores["described"]["all"].items() if name != "count"}
    assert f1["colour"] >= 0.97 and f1["texture"] >= 0.95 and f1["shape"] >= 0.90
    played = [row for name, row in scores["pointing"].items() if name != "chance"]
    best = {name: max(row[name] for row in played) for name in ("colour", "texture", "shape")}
    assert best["colour"] >= 0.90 and best["texture"] >= 0.75 and best["shape"] >= 0.50
    assert scores["described"]["layer1"]["shape"]["f1"] < f1["shape"] - 0.2


@pytest.fixture
def shared_data():
    folder = os.environ.get("DEVIL_SHARED_DATA")
    if not folder:
        pytest.skip("DEVIL_SHARED_DATA does not name the folder of photographs and weights")
    return Path(folder)


@pytest.mark.shared_data
def test_real_caption_folders_open_with_disjoint_splits(shared_data):
    folder = shared_data / "captions" / "flickr8k"
    splits = {split: {one.name for one in read_caption_folder(folder, split)} for split in ("train", "val", "test")}
    assert [len(splits[name]) for name in ("train", "val", "test")] == [896, 120, 132]
    assert not splits["train"] & splits["test"] and not splits["train"] & splits["val"]
    row = open_pairs([{"kind": "folder", "path": str(folder), "split": "val"}], 0, False)[0]
    assert row["image"]["path"] and len(row["captions"]) == 5


@pytest.mark.shared_data
def test_a_real_backbone_recognises_photographs_through_our_preprocessing(shared_data, tmp_path):
    import csv
    import subprocess
    import sys

    import timm
    import torch

    weights = shared_data / "weights"
    data_config = '{"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5], "interpolation": "bilinear", "crop_pct": 0.875}'
    command = [sys.executable, "scripts/prepare_backbone.py"]
    command += [str(weights / "mobilenetv2_100_tf2ptq_dequant_padsame.fp16.safetensors"), "mobilenetv2_100"]
    command += [str(tmp_path / "backbone"), "--model_args", '{"pad_type": "same"}', "--data_config", data_config]
    subprocess.run(command, check=True, cwd=Path(__file__).parents[2])
    model = timm.create_model(f"local-dir:{tmp_path / 'backbone'}", pretrained=True).eval()
    processor = image_processor_of(timm.data.resolve_model_data_config(model))
    with (weights / "imagenet_sample1000" / "labels.csv").open() as file:
        rows = list(csv.DictReader(file))[::20]
    images = [Image.open(weights / "imagenet_sample1000" / row["file"]) for row in rows]
    with torch.inference_mode():
        found = model(processor(images=images, return_tensors="pt")["pixel_values"]).argmax(dim=1)
    right = np.mean([int(index) == int(row["class_index"]) for index, row in zip(found, rows, strict=True)])
    assert right > 0.6  # 79 % on all thousand, by the data's own manifest
