"""One trainer for every translator: the transformers Trainer, with checkpoints that hold what is trained."""

from pathlib import Path

import torch
from transformers import Trainer
from transformers import TrainingArguments

from devil_hf.modeling_devil import DevilModel
from devil_hf.processing_devil import DevilProcessor


class CaptionCollator:
    """Makes batches of images (or of their pooled features) and caption tokens.

    Args:
        processor: tokenises the captions and, for items with an "image", preprocesses the images.
        max_caption_tokens: captions are cut to this length (paper: 100).
    """

    def __init__(self, processor: DevilProcessor, max_caption_tokens: int = 100):
        self.processor = processor
        self.max_caption_tokens = max_caption_tokens

    def __call__(self, items: list[dict]) -> dict:
        captions = [item["caption"] for item in items]
        batch = dict(self.processor(text=captions, max_length=self.max_caption_tokens, return_tensors="pt"))
        if "pooled_features" in items[0]:
            layers = zip(*(item["pooled_features"] for item in items), strict=True)
            batch["pooled_features"] = [torch.stack(layer).float() for layer in layers]
        else:
            images = [item["image"] for item in items]
            batch["pixel_values"] = self.processor(images=images, return_tensors="pt")["pixel_values"]
        return batch


def longest_caption(model: DevilModel) -> int:
    """Tokens that a training caption may have: the configured number, or what the context has room for.

    Raises:
        ValueError: when the context has no room for a caption at all.
    """
    config = model.config
    if config.context_length is None:
        return config.max_caption_tokens
    room = config.context_length - config.prefix_length - 2  # BOS and EOS
    if room < 1:
        raise ValueError(
            f"a prefix of {config.prefix_length} leaves no room for captions in a context of {config.context_length}: "
            "choose a shorter prefix_length."
        )
    return min(config.max_caption_tokens, room)


class DevilTrainer(Trainer):
    """Trains the translator; the frozen parts stay in eval mode (`DevilModel.train`) and out of the optimiser.

    Every checkpoint is one that `AutoModel.from_pretrained` loads: slim where the frozen parts have sources, else whole.
    """

    def __init__(self, model: DevilModel, args: TrainingArguments, processing_class: DevilProcessor, **kwargs):
        args.remove_unused_columns = False
        args.label_names = args.label_names or ["input_ids"]  # without labels there would be no validation loss
        self.processor = processing_class
        collator = CaptionCollator(processing_class, longest_caption(model))
        super().__init__(model=model, args=args, processing_class=processing_class, data_collator=collator, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        folder = Path(output_dir or str(self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        model: DevilModel = self.accelerator.unwrap_model(self.model)
        if state_dict is not None and model.has_sources:
            state_dict = {name: tensor for name, tensor in state_dict.items() if name.startswith("translator.")}
        model.save_pretrained(folder, slim=model.has_sources, state_dict=state_dict)
        self.processor.save_pretrained(folder)
        torch.save(self.args, folder / "training_args.bin")
