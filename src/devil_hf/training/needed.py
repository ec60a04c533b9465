"""What a recipe needs of the Hub, seen to before anything is loaded: without network a run ends at once, and says what it lacks.

Only what is not in the cache is asked for, once each and without retries. Whether all files of a part are there, its loading
finds out.
"""

from huggingface_hub import constants

from devil_hf.build.repositories import hub_id
from devil_hf.checkpoints import locate
from devil_hf.data.pairs.repositories import UNREACHABLE, kept_folder, refusal
from devil_hf.training.recipe import Recipe


def check_sources(recipe: Recipe) -> None:
    """Raise an OSError that lists every repository of the Hub that a recipe needs and that is neither cached nor to be had."""
    missing: dict[str, str] = {}
    remedies = []
    silent = ""  # once the Hub did not answer, it is not asked again
    for fields, repo, kind, revision in repositories(recipe):
        if kept_folder(repo, kind, revision) is None and (reason := silent or refusal(repo, kind, revision)):
            silent = reason if reason.startswith(UNREACHABLE) else ""
            missing[f"{repo}{f' at {revision}' if revision else ''} ({fields})"] = reason
            remedies.append(f"hf download {'--repo-type dataset ' * (kind == 'dataset')}{repo}")
    if missing:
        reasons = list(dict.fromkeys(missing.values()))
        told = [f"{name}: {why}" for name, why in missing.items()] if len(reasons) > 1 else list(missing)
        why = "" if len(reasons) > 1 else f": {reasons[0]}"
        raise OSError(
            f"the recipe needs {'; '.join(told)}, which {'is' if len(told) == 1 else 'are'} not in the cache "
            f"({constants.HF_HUB_CACHE}){why}. Connect this machine, name local copies instead, or fetch into the cache: "
            + " && ".join(dict.fromkeys(remedies))
        )


def repositories(recipe: Recipe) -> list[tuple[str, str, str, str | None]]:
    """Fields, id, kind (`model` or `dataset`) and revision of every repository of the Hub that a recipe names."""
    found: dict[tuple[str, str, str | None], list[str]] = {}
    for field in ("backbone", "language_model", "checkpoint"):
        named = getattr(recipe, field)
        repo = hub_id(str(locate(named))) if named else None
        if repo:
            found.setdefault((repo, "model", getattr(recipe, f"{field}_revision", "") or None), []).append(field)
    for field in ("train_data", "validation_data"):
        for source in getattr(recipe, field):
            if isinstance(source, dict) and source.get("kind") == "webdataset" and isinstance(source.get("repo"), str):
                found.setdefault((source["repo"], "dataset", source.get("revision")), []).append(field)
    return [(", ".join(fields), *repository) for repository, fields in found.items()]


__all__ = ["check_sources", "repositories"]
