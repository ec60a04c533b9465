"""Greedy descriptions whose finished rows leave the batch, and whose equal prefixes are decoded once.

The library decodes all rows of a batch until the last has ended, and descriptions of places are of three words or of twenty. So
its `generate` is asked for a few tokens at a time, and goes on with the rows that have not ended, from its own cache. Whatever
more is asked for (beams, sampling, processors of logits, a streamer) goes to the library as a whole, and so do language models
whose cache is another than that of attention. Registered with the model; checkpoints decode without it as well.
"""

import copy
import inspect
import sys
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from devil_hf.model.checkpoint_devil import COMPANIONS
from devil_hf.model.scoring_devil import room_for_trees

COMPANIONS["decoding"] = sys.modules[__name__]

STAGE = 4  # tokens between two looks at which rows have ended: a look costs less than a token of a few rows
# Settings that change nothing of a greedy description, beside those that say when it ends.
PLAIN = {"bos_token_id", "use_cache", "output_attentions", "output_hidden_states", "transformers_version", "_from_model_config"}
LENGTHS = {"max_new_tokens", "eos_token_id", "pad_token_id"}
ALONE = {"num_beams": 1, "do_sample": False, "num_return_sequences": 1}  # and these, so


def generate(language_model: Any, inputs_embeds: Tensor, attention_mask: Tensor, **options) -> Tensor:
    """What `language_model.generate` returns for rows without padding, (N, T) new tokens, padded on the right."""
    config, many = options["generation_config"], len(inputs_embeds) > 1
    if many and options.keys() == {"generation_config"} and _is_plain(language_model, config):
        return _in_stages(language_model, inputs_embeds, config)
    return language_model.generate(inputs_embeds=inputs_embeds, attention_mask=attention_mask, **options)


def _is_plain(language_model: PreTrainedModel, config: GenerationConfig) -> bool:
    """Whether rows are decoded greedily, each by itself, and may end."""
    own, usual = config.to_diff_dict(), language_model.generation_config.to_diff_dict()
    greedy = all(own.pop(name, value) == value for name, value in ALONE.items())
    ends = config.max_new_tokens and config.eos_token_id is not None and config.pad_token_id is not None
    known = own.keys() <= PLAIN | LENGTHS and usual.keys() <= PLAIN | LENGTHS
    return bool(greedy and ends and known) and room_for_trees(language_model) > 1


def _in_stages(language_model: Any, inputs_embeds: Tensor, config: GenerationConfig) -> Tensor:
    config = copy.deepcopy(config)
    config.return_dict_in_generate, most = True, config.max_new_tokens
    ends = torch.as_tensor(config.eos_token_id, device=inputs_embeds.device).flatten()
    name = "cache" if "cache" in inspect.signature(language_model.forward).parameters else "past_key_values"
    # Places of equal features, such as those of an even background, have equal descriptions.
    inputs_embeds, same = inputs_embeds.unique(dim=0, return_inverse=True)
    words, rows = language_model.get_input_embeddings(), torch.arange(len(inputs_embeds), device=inputs_embeds.device)
    tokens = rows.new_full((len(rows), most), config.pad_token_id)
    done, cache = 0, dict[str, object]()
    while len(rows) and done < most:
        config.max_new_tokens = min(STAGE, most - done)
        mask = torch.ones(inputs_embeds.shape[:2], dtype=torch.long, device=inputs_embeds.device)
        output = language_model.generate(inputs_embeds=inputs_embeds, attention_mask=mask, generation_config=config, **cache)
        said = output.sequences
        tokens[rows, done : done + said.shape[1]] = said
        done += said.shape[1]
        going = torch.nonzero(~torch.isin(said, ends).any(dim=1)).flatten()
        rows, cache = rows[going], {name: output[name]}
        output[name].batch_select_indices(going.cpu())  # its layers may lie on several devices
        inputs_embeds = torch.cat([inputs_embeds[going], words(said[going]).to(inputs_embeds.dtype)], dim=1)
    return tokens[same, :done]


__all__ = ["generate"]
