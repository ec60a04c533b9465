"""Score what each layer says against people's captions.

    python scripts/evaluate.py CHECKPOINT FOLDER --split test [--output results.json]

FOLDER holds images and a captions.jsonl. The table names every layer, all layers together, and two controls without any image.
Needs pycocoevalcap (pip install "devil-hf[metrics]").
"""

import argparse
import json
from pathlib import Path

from devil_hf.data.captions import load_caption_folder
from devil_hf.evaluation.descriptions import caption_table
from devil_hf.evaluation.descriptions import describe_dataset
from devil_hf.evaluation.descriptions import score_descriptions
from devil_hf.loading import load


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="directory or Hub id")
    parser.add_argument("folder", type=Path, help="caption folder")
    parser.add_argument("--split", default="val", help="default: %(default)s; look at a test split once")
    parser.add_argument("--limit", type=int, help="only the first images")
    parser.add_argument("--guidance", type=float, default=1.0, help="default: %(default)s")
    parser.add_argument("--num-beams", type=int, default=1, help="default: greedy")
    parser.add_argument("--max-new-tokens", type=int, default=30, help="default: %(default)s")
    parser.add_argument("--output", type=Path, help="JSON file for scores and descriptions")
    arguments = parser.parse_args()
    dataset = load_caption_folder(arguments.folder, arguments.split)
    if arguments.limit:
        dataset = dataset.select(range(min(arguments.limit, len(dataset))))
    model, processor = load(arguments.checkpoint)
    texts = describe_dataset(
        model,
        processor,
        dataset,
        guidance=arguments.guidance,
        num_beams=arguments.num_beams,
        max_new_tokens=arguments.max_new_tokens,
    )
    scores = score_descriptions(texts, dataset["captions"][:])
    print(caption_table(scores))
    if arguments.output:
        rows = [
            {"image": key, **{name: rows[i] for name, rows in texts.items()}} for i, key in enumerate(dataset["key"])
        ]
        arguments.output.write_text(json.dumps({"scores": scores, "descriptions": rows}, indent=1))


if __name__ == "__main__":
    main()
