"""Train translators of several types beside each other, with several seeds, and score what they say about held-out images.

    python scripts/compare_translators.py scripts/comparisons/shapes.yaml --seeds 0 1 2 --output results.json
    python scripts/compare_translators.py scripts/comparisons/flickr8k_small.yaml --types devil limber --steps 100

The comparison file names the recipe that all share and what each type changes in it; any field of the recipe can be given here as
well, for all of them. Started again, finished runs are kept, and a stopped one goes on.
"""

import argparse
import json
import sys
from pathlib import Path

from devil_hf.cli.main import bounded
from devil_hf.settings import add_options, given, understood
from devil_hf.training.comparison import compare, comparison_table, read_comparison, summarise
from devil_hf.training.recipe import Recipe


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("comparison", type=Path, help="YAML file, see scripts/comparisons")
    parser.add_argument("--types", nargs="+", help="only these translators of the file")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="default: 0 1 2")
    parser.add_argument("--steps", type=int, dest="max_steps", default=argparse.SUPPRESS, help="the same as --max-steps")
    parser.add_argument("--evaluation-data", type=json.loads, metavar="JSON", help="score these sources instead of the file's")
    parser.add_argument("--output", type=Path, help="JSON file for the summary and every run's scores")
    add_options(parser, Recipe)
    arguments = parser.parse_args(understood(Recipe, sys.argv[1:]))
    fields = given(Recipe, arguments)
    output_dir = Path(fields.pop("output_dir", f"runs/compare_{arguments.comparison.stem}"))
    comparison = read_comparison(arguments.comparison, arguments.config, fields)
    if arguments.types:
        if unknown := [name for name in arguments.types if name not in comparison.recipes]:
            parser.error(f"{arguments.comparison} has no {unknown}; it has {list(comparison.recipes)}")
        comparison.recipes = {name: comparison.recipes[name] for name in arguments.types}
    if arguments.evaluation_data:
        comparison.evaluation_data = arguments.evaluation_data
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
    results = compare(comparison, arguments.seeds, output_dir)
    summary = summarise(results, evaluations=comparison.evaluations)
    print(comparison_table(summary))
    if arguments.output:
        runs = [{name: value for name, value in run.items() if name != "descriptions"} for run in results]
        arguments.output.write_text(json.dumps({"summary": summary, "runs": runs}, indent=1), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(bounded("compare_translators.py", main))
