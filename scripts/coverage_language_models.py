"""Which language models can DeViL speak through? Every causal language model of transformers, tiny and random.

    python scripts/coverage_language_models.py [--family gpt2 opt ...] [--json PATH]

Each family is built from its own configuration class with small sizes, put behind a tiny backbone, and goes through a training
step, describe, score against a plain forward pass, save and load. A family that fails is listed with its cause.
"""

import argparse
import json
import signal
import tempfile
import warnings
from pathlib import Path

import timm
import torch
import transformers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from devil_hf import DevilModel

# Small values for the names that configurations give to their sizes; a family takes those that it knows.
SMALL = (
    dict.fromkeys(("hidden_size", "n_embd", "d_model", "dim", "word_embed_proj_dim"), 32)
    | dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers"), 2)
    | dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"), 2)
    | dict.fromkeys(("num_key_value_heads", "num_experts", "num_local_experts", "n_routed_experts"), 2)
    | dict.fromkeys(("intermediate_size", "n_inner", "ffn_dim", "decoder_ffn_dim", "d_ff"), 64)
    | dict.fromkeys(("max_position_embeddings", "n_positions"), 64)
    | {"vocab_size": 128, "head_dim": 16, "rotary_dim": 8, "moe_intermediate_size": 32, "num_experts_per_tok": 1}
    | {"sliding_window": 32, "is_decoder": True, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
)
# Families whose sizes depend on each other in ways of their own.
OWN = {
    "codegen": {"n_head": 4, "num_attention_heads": 4, "rotary_dim": 4},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "mamba2": {"num_heads": 4, "head_dim": 16, "state_size": 16, "n_groups": 1},
    "bamba": {"mamba_n_heads": 4, "mamba_d_head": 16, "attn_layer_indices": [1]},
    "granitemoehybrid": {"mamba_n_heads": 4, "mamba_d_head": 16, "layer_types": ["attention", "attention"]},
    "deepseek_v3": {"qk_rope_head_dim": 8, "head_dim": 8},
    "youtu": {"qk_rope_head_dim": 8, "head_dim": 8},
    "lfm3": {"num_hidden_layers": 4},  # every fourth layer of it has a key-value cache
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "qwen3_next": {"layer_types": ["linear_attention", "full_attention"]},
    "qwen3_5_text": {"layer_types": ["linear_attention", "full_attention"]},
    "qwen3_5_moe_text": {"layer_types": ["linear_attention", "full_attention"]},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "reformer": {"axial_pos_embds_dim": [16, 16], "axial_pos_shape": [8, 8]},
    "gemma4_text": {"vocab_size_per_layer_input": 128},
}
LARGEST = 30_000_000
SECONDS = 120


def tiny_config(family: str) -> PreTrainedConfig:
    config_class = CONFIG_MAPPING[family]
    known = set(vars(config_class())) | set(getattr(config_class, "attribute_map", {}))
    return config_class(**{name: value for name, value in SMALL.items() if name in known} | OWN.get(family, {}))


def check(family: str) -> str:
    """Take one family through everything; returns a remark for the table."""
    torch.manual_seed(0)
    config = tiny_config(family)
    with torch.device("meta"):
        size = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    if size > LARGEST:
        raise RuntimeError(f"its configuration nests others and stays at {size / 1e6:.0f} M parameters")
    language_model = AutoModelForCausalLM.from_config(config).eval()
    backbone = timm.create_model("test_resnet", num_classes=0)
    model = DevilModel.from_backbone_and_language_model(
        backbone,
        language_model,
        layers=[-2, -1],
        prefix_length=4,
        max_caption_tokens=16,
        translator_width=32,
        translator_depth=1,
        translator_heads=2,
        translator_feed_forward=32,
    )
    pixels = torch.randn(2, 3, 64, 64)
    tokens = torch.tensor([[5, 6, 7], [5, 9, 0]])
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    model.train()
    loss = model(pixels, tokens, mask).loss
    loss.backward()
    assert torch.isfinite(loss) and model.translator.queries.grad.abs().sum() > 0, "no gradient reaches the translator"
    model.eval()
    described = model.describe(pixels, layers=-1, max_new_tokens=3)
    assert described.sequences.shape[0] == 2
    scores = model.score(pixels, tokens, mask, layers=-1)
    difference = (scores.log_probs - plain_scores(model, pixels, tokens, mask)).abs().max().item()
    assert difference < 1e-3, f"scores differ from a plain forward pass by {difference:.1e}"
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        loaded = DevilModel.from_pretrained(folder)
    again = loaded.score(pixels, tokens, mask, layers=-1).log_probs
    difference_loaded = (again - scores.log_probs).abs().max().item()
    assert difference_loaded < 1e-5, f"scores after save and load differ by {difference_loaded:.1e}"
    return f"{size / 1e3:.0f} k parameters, scores within {difference:.0e}"


@torch.no_grad()
def plain_scores(model: DevilModel, pixels, tokens, mask) -> torch.Tensor:
    """The same scores by one forward pass per image and phrase."""
    prefix = model.ask(pixels, layers=-1)
    embedding = model.language_model.get_input_embeddings()
    rows = []
    for one in prefix:
        row = []
        for phrase, length in zip(tokens, mask.sum(dim=1).tolist(), strict=True):
            start = model.embed_prefix(one[None])
            embeds = torch.cat([start, embedding(phrase[None, :length])], dim=1)
            output = model.language_model(inputs_embeds=embeds, attention_mask=torch.ones(embeds.shape[:2], dtype=torch.long))
            log_probs = output.logits[0, start.shape[1] - 1 : -1].float().log_softmax(dim=-1)
            row.append(log_probs.gather(-1, phrase[:length, None]).sum())
        rows.append(torch.stack(row))
    return torch.stack(rows)


def give_up(*_):
    raise TimeoutError(f"not done within {SECONDS} s")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", nargs="*", help="only these (default: every causal language model of transformers)")
    parser.add_argument("--json", type=Path, help="also write the table to this file")
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    warnings.filterwarnings("ignore")
    signal.signal(signal.SIGALRM, give_up)
    table = []
    for family in arguments.family or sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        signal.alarm(SECONDS)
        try:
            row = {"family": family, "passed": True, "remark": check(family)}
        except Exception as error:
            row = {"family": family, "passed": False, "remark": f"{type(error).__name__}: {str(error).splitlines()[0][:160]}"}
        signal.alarm(0)
        table.append(row)
        print(f"{'pass' if row['passed'] else 'FAIL'}  {family:28} {row['remark']}", flush=True)
    passed = sum(row["passed"] for row in table)
    print(f"{passed} of {len(table)} language-model families pass")
    if arguments.json:
        arguments.json.write_text(json.dumps(table, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
