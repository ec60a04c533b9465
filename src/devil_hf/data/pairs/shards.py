"""Pairs from tar shards in the webdataset layout of img2dataset, local or remote, read from front to end.

`datasets` has a reader of such shards too, but it ends the run at the first truncated one. Here the whole samples in
front of the damage are used, and the shard itself then gives one row with its name and a `problem`, so that it is counted
and logged as a bad sample.
"""

import json
import tarfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from glob import glob, has_magic
from itertools import islice

from datasets import IterableDataset
from datasets.utils.file_utils import is_local_path, xexists, xopen

from devil_hf.data.pairs import PAIR_FEATURES, PAIR_SOURCES
from devil_hf.data.pairs.folder import texts_of
from devil_hf.data.pairs.repositories import repository_shards
from devil_hf.extras import needs

IMAGE_FIELDS = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")
MAX_MEMBER_SIZE = 2**28  # bytes; a damaged header may claim anything
PEEK = 100  # samples that are read to see whether a source has images and captions


@PAIR_SOURCES.register("webdataset")
def open_webdataset(
    urls: str | list | None = None,
    repo: str | None = None,
    split: str | None = None,
    revision: str | None = None,
    caption_field: str = "txt",
) -> IterableDataset:
    """Tar shards in the layout of img2dataset, streamed: by their URLs, or by the id of a repository of the Hub.

    Args:
        urls: paths or URLs, with `{00000..00331}` for numbered shards.
        repo: instead of them, id of a data set on the Hub that consists of such shards, such as `pixparse/cc3m-wds`. Shards
            that `hf download` has fetched are read from its cache.
        split: of the repository; by default `train`.
        revision: commit, branch or tag of the repository; by default its newest commit.
        caption_field: file ending of the caption, or `json.NAME` for a field of the json member.
    """
    shards = find_shards(urls, repo, split, revision)
    if repo is None:
        check_there(list(shards))
    check_pairs(list(shards.values()), caption_field)
    arguments = {"urls": list(shards.values()), "caption_field": caption_field}
    return IterableDataset.from_generator(shard_rows, features=PAIR_FEATURES, gen_kwargs=arguments)


def find_shards(
    urls: str | Sequence[str] | None = None, repo: str | None = None, split: str | None = None, revision: str | None = None
) -> dict[str, str]:
    """Where the shards of a source are read, by their names; for the arguments see `open_webdataset`.

    The name of a repository's shard has its commit, so that it stands for one content wherever that is read.

    Raises:
        OSError: if no local file matches a pattern, or a repository is neither within reach nor in the cache.
        ValueError: for a source that names no shards, or a split that a repository does not have.
    """
    if (urls is None) == (repo is None):
        raise ValueError("the shards are named by `urls` (paths or URLs) or by `repo` (a data set of the Hub): give one of them")
    if repo is not None:
        return repository_shards(repo, split or "train", revision)
    for name, value in (("split", split), ("revision", revision)):
        if value is not None:
            raise ValueError(f"{name}={value!r} is of a repository of the Hub (`repo`), not of urls: leave it out")
    return {url: url for url in expand_urls(urls or [])}


class _TarInfo(tarfile.TarInfo):
    """Tells the archive that its end mark was reached: tarfile itself passes over a cut between two members."""

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> "_TarInfo":
        try:
            return super().fromtarfile(archive)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            archive.end_seen = True  # type: ignore[attr-defined]
            raise


def expand_urls(urls: str | Sequence[str]) -> list[str]:
    """Expand `{00000..00331}`, `{a,b}` and, in local paths, `*` and `?`.

    Raises:
        FileNotFoundError: if no local file matches a pattern.
    """
    needs("braceexpand", "train")
    from braceexpand import braceexpand

    expanded = []
    for pattern in [urls] if isinstance(urls, str) else urls:
        for url in braceexpand(pattern):
            if is_local_path(url) and has_magic(url):
                found = sorted(glob(url))
                if not found:
                    raise FileNotFoundError(f"no file matches {url}")
                expanded += found
            else:
                expanded.append(url)
    return expanded


def check_there(urls: Sequence[str]) -> None:
    """Raise a FileNotFoundError when a shard is missing."""
    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(xexists, urls))
    missing = [url for url, there in zip(urls, found, strict=True) if not there]
    if missing:
        raise FileNotFoundError(f"{len(missing)} of {len(urls)} shards are missing, the first is {missing[0]}")


def check_pairs(urls: Sequence[str], caption_field: str) -> None:
    """See that the first readable shard holds pairs.

    Raises:
        ValueError: if there is no shard, or no pair in the first `PEEK` samples of any.
    """
    if not urls:
        raise ValueError("the list of shards is empty")
    problems: list[str] = []
    for url in urls:
        rows = list(islice(shard_rows([url], caption_field), PEEK))
        if any(row["image"] and row["captions"] for row in rows):
            return
        problems += [f"{row['key']}: {row['problem'] or 'empty caption'}" for row in rows[:1]]
    raise ValueError(f"no shard holds an image with a caption; {problems[0] if problems else 'all are empty'}")


def shard_rows(urls: Sequence[str], caption_field: str) -> Iterator[dict]:
    """Yield the rows of the shards in `urls`, in order; a damaged shard ends with a row that has only a `problem`.

    Args:
        urls: paths or URLs.
        caption_field: file ending of the caption, such as `txt`, or `json.NAME` for a field of the json member.
    """
    for url in urls:
        samples = 0
        try:
            for key, fields in _samples(url, caption_field.partition(".")[0]):
                yield _row(key, fields, caption_field)
                samples += 1
        except (tarfile.TarError, EOFError) as error:
            problem = f"the shard is damaged behind {samples} whole samples ({error})"
            yield {"key": url, "image": None, "captions": [], "region": None, "problem": problem}


def _samples(url: str, caption_ending: str) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Neighbouring members that share their name up to the first dot of the file name, by the rest of it."""
    name = ""
    fields: dict[str, bytes] = {}
    # A network that fails is tried again by xopen and then ends the run: it must not look like a short shard.
    with xopen(url, "rb") as file, tarfile.open(fileobj=file, mode="r|*", tarinfo=_TarInfo) as archive:
        try:
            for member in archive:
                folder, slash, base = member.name.rpartition("/")
                stem, dot, ending = base.partition(".")
                if not (member.isfile() and stem and dot):
                    continue
                if folder + slash + stem != name:
                    if fields:
                        yield name, fields
                    name, fields = folder + slash + stem, {}
                if ending.lower() in (*IMAGE_FIELDS, caption_ending):
                    fields[ending.lower()] = _read(archive, member)
            if not getattr(archive, "end_seen", False):
                raise tarfile.ReadError("its end mark is missing")
        except (tarfile.TarError, EOFError):
            if caption_ending in fields and len(fields) > 1:  # the last sample before the cut is whole
                yield name, fields
            raise
        if fields:
            yield name, fields


def _read(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    if member.size > MAX_MEMBER_SIZE:
        raise tarfile.ReadError(f"{member.name} claims {member.size} bytes, more than {MAX_MEMBER_SIZE}")
    file = archive.extractfile(member)
    content = file.read() if file else b""
    if len(content) < member.size:
        raise tarfile.ReadError(f"{member.name} is cut off")
    return content


def _row(name: str, fields: dict[str, bytes], caption_field: str) -> dict:
    key = name.encode("utf-8", "replace").decode()  # tarfile keeps odd bytes as surrogates, which Arrow refuses
    image = next((ending for ending in IMAGE_FIELDS if ending in fields), None)
    problem = None if image else f"no member with one of the endings {', '.join(IMAGE_FIELDS)}"
    captions: list[str] = []
    ending, _, field = caption_field.partition(".")
    if ending not in fields:
        problem = problem or f"no member with the ending {ending}"
    elif not field:
        captions = [fields[ending].decode("utf-8", "replace")]
    else:
        try:
            value = json.loads(fields[ending])[field]
            captions = texts_of(value)
        except (ValueError, KeyError, TypeError, RecursionError) as error:  # whose text may hold what the member holds
            problem = problem or f"no field {field!r} in its {ending} member ({type(error).__name__})"
    picture = {"bytes": fields[image], "path": f"{key}.{image}"} if image else None
    return {"key": key, "image": picture, "captions": captions, "region": None, "problem": problem}
