"""Directions of feature space: from files and networks, described with signs and strengths, and mapped."""

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file

from devil_hf.data.directions import (
    classifier_directions,
    difference_of_means,
    map_directions,
    principal_directions,
    read_directions,
    sweep,
    typical_length,
)


def test_decoder_rows_are_read_whatever_their_orientation(tmp_path):
    decoder = torch.randn(40, 16)
    save_file({"W_dec": decoder, "b_dec": torch.zeros(16)}, tmp_path / "sae.safetensors")
    torch.testing.assert_close(read_directions(tmp_path / "sae.safetensors", 16), decoder)
    save_file({"W_dec": decoder, "W_enc": decoder.T.contiguous()}, tmp_path / "both.safetensors")
    with pytest.raises(ValueError, match="name one of them"):
        read_directions(tmp_path / "both.safetensors", 16)
    turned = read_directions(tmp_path / "both.safetensors", 16, "W_enc")
    torch.testing.assert_close(turned, decoder)
    with pytest.raises(ValueError, match="holds no tensor 'W_out'"):
        read_directions(tmp_path / "both.safetensors", 16, "W_out")
    with pytest.raises(ValueError, match="choose the layer"):
        read_directions(tmp_path / "sae.safetensors", 17)
    np.save(tmp_path / "probe.npy", decoder[:3].numpy())
    torch.testing.assert_close(read_directions(tmp_path / "probe.npy", 16), decoder[:3])
    (tmp_path / "probe.pt").write_bytes(b"")
    with pytest.raises(ValueError, match="may hold code"):
        read_directions(tmp_path / "probe.pt", 16)


def test_directions_of_a_classifier_of_means_and_of_components():
    network = timm.create_model("test_resnet", pretrained=False, num_classes=7)
    assert torch.equal(classifier_directions(network), network.get_classifier().weight)
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(50, 6, generator=generator) * torch.tensor([5.0, 1, 1, 1, 1, 1]) + 2
    labels = features[:, 1] > 2
    expected = features[labels].mean(0) - features[~labels].mean(0)
    torch.testing.assert_close(difference_of_means(features, labels)[0], expected)
    components, mean = principal_directions(features, 2)
    torch.testing.assert_close(mean, features.mean(0))
    along = (features - mean) @ torch.nn.functional.normalize(components[0], dim=0)
    assert components[0].norm().item() == pytest.approx(along.std().item(), rel=1e-4)
    assert components[0, 0].abs() > 0.95 * components[0].norm()
    assert typical_length(torch.tensor([[3.0, 4.0], [0.0, 1.0], [6.0, 8.0]])) == 5


def test_a_sweep_is_one_description_per_sign_and_strength(model, pixel_values):
    layer, channels = model.layer_names[-1], model.backbone.channels[-1]
    base = model.extract_features(pixel_values)[-1].mean(dim=(0, 2, 3))
    vectors = torch.randn(2, channels, generator=torch.Generator().manual_seed(1))
    points, factors = sweep(vectors, (1.0, 3.0), base, both_signs=True, length=4.0)
    assert factors == [-3.0, -1.0, 1.0, 3.0]
    output = model.describe_directions(points, layer, evidence=True, max_new_tokens=4)
    assert output.image_index.tolist() == list(range(8))
    point = base + 3.0 * 4.0 * vectors[1] / vectors[1].norm()
    torch.testing.assert_close(points[7], point)
    alone = model.describe_directions(point[None], layer, evidence=True, max_new_tokens=4)
    assert output.sequences[7].tolist()[: alone.sequences.shape[1]] == alone.sequences[0].tolist()
    torch.testing.assert_close(output.token_evidence[7], alone.token_evidence[0], rtol=1e-3, atol=1e-3)
    with pytest.raises(ValueError, match="no direction"):
        sweep(torch.zeros(1, channels), length=1.0)
    with pytest.raises(ValueError, match="base of shape"):
        sweep(vectors, base=torch.zeros(3))
    with pytest.raises(ValueError, match="strengths"):
        sweep(vectors, [])


def test_a_direction_is_mapped_where_features_lie_along_it(model, pixel_values):
    feature_map = model.extract_features(pixel_values)[1]
    base = feature_map.mean(dim=(0, 2, 3))
    vector = feature_map[1, :, 2, 3] - base
    maps = map_directions(torch.stack([vector, -vector]), feature_map, base)
    assert maps.shape == (len(pixel_values), 2, *feature_map.shape[2:])
    assert maps[1, 0, 2, 3].item() == pytest.approx(vector.norm().item(), rel=1e-3)
    torch.testing.assert_close(maps[:, 0], -maps[:, 1], rtol=1e-3, atol=1e-4)
    loop = torch.stack([(feature_map[0, :, 0, 0] - base) @ (vector / vector.norm())])
    torch.testing.assert_close(maps[0, 0, 0, 0][None], loop, rtol=1e-3, atol=1e-3)
