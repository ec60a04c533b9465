"""Tiny models, built once a session; nothing is downloaded."""

import os
from pathlib import Path

from .sparing import sitecustomize

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Processes that tests start import it by themselves.
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(Path(sitecustomize.__file__).parent), os.environ.get("PYTHONPATH")]))

import hypothesis
import pytest
import timm
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast
from transformers.utils import logging

# Models and folders of the session are read, not written, and loading takes its time.
CALM = {"deadline": None, "suppress_health_check": [*hypothesis.HealthCheck]}
hypothesis.settings.register_profile("default", max_examples=15, derandomize=True, database=None, **CALM)
hypothesis.settings.register_profile("fuzz", max_examples=1000, print_blob=True, **CALM)


def pytest_configure(config):
    """`pytest -m fuzz` asks the property tests for many inputs, every other run for a few, always the same."""
    hypothesis.settings.load_profile("fuzz" if config.option.markexpr == "fuzz" else "default")


def pytest_collection_modifyitems(items):
    for item in items:
        if hypothesis.is_hypothesis_test(getattr(item, "obj", None)):
            item.add_marker("fuzz")


torch.set_num_threads(1)  # tiny matrices: threads that wait for each other cost more than they do
logging.enable_propagation()  # pytest listens at the root of all loggers

WORDS = [
    "a",
    "the",
    "red",
    "blue",
    "green",
    "dog",
    "cat",
    "circle",
    "square",
    "on",
    "grass",
    "left",
    "of",
    "right",
    "small",
    "large",
    "striped",
    "dotted",
]
SMALL_TRANSLATOR = {
    "translator_width": 32,
    "translator_depth": 2,
    "translator_heads": 2,
    "translator_feed_forward": 64,
    "prefix_length": 4,
    "max_caption_tokens": 20,
}


@pytest.fixture(scope="session")
def tokenizer():
    """A byte-level BPE trained on a handful of words."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<pad>", "<bos>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([" ".join(WORDS)] * 4, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>")


@pytest.fixture(scope="session")
def language_model(tokenizer):
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_embd=32,
        n_layer=2,
        n_head=2,
        n_positions=64,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    # Wide initial weights: descriptions then depend visibly on the prefix.
    config.initializer_range = 0.3
    return GPT2LMHeadModel(config).eval()


@pytest.fixture(scope="session")
def sources(tmp_path_factory, tokenizer, language_model):
    """Local directories of the frozen parts, as a Hub snapshot would have them."""
    root = tmp_path_factory.mktemp("sources")
    torch.manual_seed(1)
    backbone = timm.create_model("test_resnet.r160_in1k", pretrained=False, num_classes=0)
    timm.models.save_for_hf(backbone, root / "backbone", safe_serialization=True)
    language_model.save_pretrained(root / "language_model")
    tokenizer.save_pretrained(root / "language_model")
    return {"backbone": str(root / "backbone"), "language_model": str(root / "language_model")}


@pytest.fixture(scope="session")
def model(sources, tokenizer):
    """A DeViL between the tiny parts, with random but fixed weights."""
    from devil_hf import DevilModel

    torch.manual_seed(2)
    model = DevilModel.from_backbone_and_language_model(
        sources["backbone"], sources["language_model"], tokenizer=tokenizer, **SMALL_TRANSLATOR
    )
    with torch.no_grad():  # prefixes of about the scale of word embeddings, so that features change the words
        model.translator.output.weight.mul_(5)
    return model.eval()


@pytest.fixture(scope="session")
def processor(model, tokenizer):
    from devil_hf import DevilProcessor
    from devil_hf.build import image_processor_of

    return DevilProcessor(image_processor_of(model.config.backbone_config["data_config"]), tokenizer)


@pytest.fixture(scope="session")
def images():
    generator = torch.Generator().manual_seed(3)
    arrays = torch.randint(0, 256, (3, 96, 128, 3), generator=generator, dtype=torch.uint8).numpy()
    return [Image.fromarray(array) for array in arrays]


@pytest.fixture(scope="session")
def pixel_values(processor, images):
    return processor(images=images, return_tensors="pt")["pixel_values"]


@pytest.fixture(scope="session")
def phrases(processor):
    return processor(text=["a dog", "the green grass", "a", "red"], return_tensors="pt")
