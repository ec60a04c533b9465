"""A data repository of the Hub in the layout of pixparse/cc3m-wds, read by its id: streamed, cached, split, resumed, damaged."""

import io
import json
import tarfile
from collections import Counter

import datasets
import pytest
import torch
from datasets.distributed import split_dataset_by_node
from huggingface_hub import constants, snapshot_download

from devil_hf.data.decoding import BadSamples, PairDecoder, PairStream
from devil_hf.data.identity import PairIdentities
from devil_hf.data.pairs import open_pairs
from devil_hf.training.recipe import Recipe
from devil_hf.training.run import train
from tests.conftest import SMALL_TRANSLATOR
from tests.data.test_pairs import decoded, keys, read, sample, told, write_shard
from tests.training.runs import Killed, kill_at, weights

REPO = "tester/cc3m-wds"
SOURCE = {"kind": "webdataset", "repo": REPO}
TRAIN = [[f"{shard:05d}{number:04d}" for number in range(10)] for shard in range(4)]
VALIDATION = [[f"9{shard:04d}{number:04d}" for number in range(5)] for shard in range(2)]
ALL = [key for shard in TRAIN for key in shard]
README = (
    b"---\nlicense: other\nlicense_name: conceptual-captions\ntask_categories:\n- image-to-text\n---\n# Conceptual Captions\n"
)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """What lies in the repository: shards of both splits, a card, a description of the shards."""
    folder = tmp_path_factory.mktemp("cc3m-wds")
    for split, shards in (("train", TRAIN), ("validation", VALIDATION)):
        for number, names in enumerate(shards):
            write_shard(folder / f"cc3m-{split}-{number:04d}.tar", map(sample, names))
    found = {file.name: file.read_bytes() for file in folder.iterdir()}
    described = {"splits": {"train": {"name": "train", "num_samples": 40, "filenames": sorted(found)[:4]}}}
    return found | {"README.md": README, "_info.json": json.dumps(described).encode(), ".gitattributes": b"*.tar filter=lfs\n"}


@pytest.fixture
def cc3m(hub, files, tmp_path, monkeypatch):
    """The commit of the repository, and a cache without it."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return hub.plant(REPO, files, kind="dataset")


def offline(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


def shards_fetched(hub, since: int) -> int:
    return len({path for done, path in hub.requests[since:] if done == "GET" and path.startswith("/store/")})


def rows(**fields):
    return list(open_pairs([SOURCE | fields], 0, False))


def test_a_repository_is_streamed_by_its_id(hub, cc3m):
    since = len(hub.requests)
    pairs = open_pairs([SOURCE], 0, False)
    assert shards_fetched(hub, since) == 1  # to see that it holds pairs
    found = list(pairs)
    assert keys(found) == ALL and found[7]["captions"] == [f"caption of {TRAIN[0][7]}"]
    assert len(decoded(found, PairDecoder(BadSamples()))) == 40
    assert keys(rows(split="validation")) == [key for shard in VALIDATION for key in shard]
    assert rows(caption_field="json.caption")[0]["captions"] == [f"json {TRAIN[0][0]}"]


def test_datasets_itself_reads_the_miniature_as_it_reads_the_original(cc3m):
    stream = datasets.load_dataset(REPO, streaming=True)
    assert set(stream) == {"train", "validation"}
    assert stream["train"].column_names == ["jpg", "json", "txt", "__key__", "__url__"]
    hub_kind = {"kind": "hub", "path": REPO, "image_column": "jpg", "caption_column": "txt", "key_column": "__key__"}
    assert keys(open_pairs([hub_kind | {"streaming": True}], 0, False)) == ALL


@pytest.mark.parametrize(("nodes", "workers"), [(2, 2), (3, 0)])  # four shards are dealt out to two, and read by each of three
def test_processes_and_workers_see_every_pair_once(cc3m, nodes, workers):
    pairs = open_pairs([SOURCE], 3, True, 8)
    seen = Counter()
    for node in range(nodes):
        part = split_dataset_by_node(pairs, node, nodes)
        part.set_epoch(1)
        seen.update(key for batch in read(part, workers) for key in keys(batch))
    assert seen == Counter(ALL)


def test_a_stream_of_the_hub_goes_on_exactly_from_its_places(cc3m):
    pairs = open_pairs([SOURCE], 0, True, 8)

    def batches(count: int, places=()) -> list:
        return read(PairStream(pairs, PairDecoder(BadSamples(limit=1)), places), 2, count)

    whole = batches(20)
    places = {item["place"][0]: item["place"][1:] for batch in whole[:12] for item in batch}
    assert told(batches(8, [places[worker] for worker in range(2)])) == told(whole[12:])


def test_a_run_on_the_hub_that_was_stopped_goes_on_to_the_same_weights(cc3m, sources, tmp_path, monkeypatch):
    fields = {
        "backbone": sources["backbone"],
        "language_model": sources["language_model"],
        "train_data": [SOURCE],
        "validation_data": [SOURCE | {"split": "validation"}],
        "model": SMALL_TRANSLATOR,
        "batch_size": 4,
        "max_steps": 4,
        "evaluation_steps": 2,
        "logging_steps": 2,
        "warmup_steps": 1,
        "workers": 1,
        "report_to": "none",
    }
    whole = weights(train(Recipe(**fields, output_dir=str(tmp_path / "whole"))))
    stopped = fields | {"output_dir": str(tmp_path / "stopped")}
    kill_at(monkeypatch, 4)
    with pytest.raises(Killed):
        train(Recipe(**stopped))
    torch.testing.assert_close(weights(train(Recipe(**stopped, resume=True))), whole, rtol=0, atol=0)


def test_a_damaged_shard_is_one_bad_sample(hub, cc3m, files, caplog):
    shard = files["cc3m-train-0001.tar"]
    with tarfile.open(fileobj=io.BytesIO(shard)) as archive:
        cut = archive.getmember(f"{TRAIN[1][6]}.txt").offset_data + 3
    hub.plant(REPO, files | {"cc3m-train-0001.tar": shard[:cut]}, kind="dataset")
    bad = BadSamples(limit=0.2)
    found = decoded(open_pairs([SOURCE], 0, False), PairDecoder(bad))
    assert keys(found) == TRAIN[0] + TRAIN[1][:6] + TRAIN[2] + TRAIN[3] and (bad.read, bad.bad) == (37, 1)
    assert "cc3m-train-0001.tar: the shard is damaged behind 6 whole samples" in caplog.text


def test_a_connection_that_breaks_is_tried_again(hub, cc3m, monkeypatch):
    monkeypatch.setitem(hub.cut_downloads, "cc3m-train-0002.tar", 1)
    assert keys(rows()) == ALL and not hub.cut_downloads["cc3m-train-0002.tar"]


def test_a_private_repository_needs_a_token_and_gets_it(hub, cc3m, files, monkeypatch):
    hub.plant("tester/private", files, private=True, kind="dataset")
    since = len(hub.requests)
    assert keys(rows(repo="tester/private")) == ALL
    asked = zip(hub.requests[since:], hub.authorizations[since:], strict=True)
    assert all((header is None) == path.startswith("/store/") for (_, path), header in asked)  # which is another host
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(OSError, match=r"tester/private is not in the cache, and the Hub refuses it: .*401"):
        rows(repo="tester/private")


def test_a_pinned_revision_stays_what_it_was(hub, cc3m, files):
    identity = PairIdentities([SOURCE], open_pairs([SOURCE], 0, False)).all()
    pinned = SOURCE | {"revision": cc3m}
    kept = PairIdentities([pinned], open_pairs([pinned], 0, False)).all()
    repository = hub.repositories["dataset", REPO]
    tree = {path: entry for path, entry in repository.commits[cc3m].items() if path != "cc3m-train-0003.tar"}
    repository.commit("main", tree, "a shard less")
    assert keys(rows()) == ALL[:30] and keys(rows(revision=cc3m)) == ALL
    assert PairIdentities([SOURCE], open_pairs([SOURCE], 0, False)).all() != identity  # a run that goes on notices
    assert PairIdentities([pinned], open_pairs([pinned], 0, False)).all() == kept


def test_downloaded_shards_are_read_from_the_cache(hub, cc3m, monkeypatch):
    pinned = SOURCE | {"revision": cc3m}
    streamed = rows(revision=cc3m)
    identity = PairIdentities([pinned], open_pairs([pinned], 0, False)).all()
    snapshot_download(REPO, repo_type="dataset", allow_patterns=["cc3m-train-000[01].tar"])
    since = len(hub.requests)
    assert rows(revision=cc3m) == streamed and shards_fetched(hub, since) == 2
    snapshot_download(REPO, repo_type="dataset")
    since = len(hub.requests)
    assert rows(revision=cc3m) == streamed and shards_fetched(hub, since) == 0
    offline(monkeypatch)
    since = len(hub.requests)
    assert rows() == rows(revision=cc3m) == streamed and len(hub.requests) == since
    assert PairIdentities([pinned], open_pairs([pinned], 0, False)).all() == identity


def test_offline_the_number_of_cached_shards_is_told(cc3m, monkeypatch, caplog):
    snapshot_download(REPO, repo_type="dataset", allow_patterns=["cc3m-train-000[01].tar"])
    offline(monkeypatch)
    assert keys(rows()) == TRAIN[0] + TRAIN[1]
    assert f"{REPO}: 2 shards of train are in the cache" in caplog.text
    with pytest.raises(ValueError, match="has no split 'validation'"):
        rows(split="validation")


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"split": "val"}, ValueError, r"no split 'val'; its splits are \['train', 'validation'\]"),
        (
            {"revision": "v2"},
            OSError,
            r"tester/cc3m-wds at v2 is not in the cache, and the Hub refuses it: RevisionNotFound.*404",
        ),
        ({"repo": "tester/nothing"}, OSError, r"tester/nothing is not in the cache, and the Hub refuses it: .*404"),
        ({"repo": "not a name"}, OSError, "not a name is not in the cache"),
        ({"repo": "tester/empty"}, ValueError, "tester/empty has no shards"),
        ({"repo": "tester/table"}, ValueError, r"train.csv, which is no tar shard: use kind `hub`"),
        ({"urls": "x.tar"}, ValueError, "give one of them"),
        ({"caption_field": "alt"}, ValueError, "no member with the ending alt"),
    ],
)
def test_a_wrong_repository_is_named_with_the_remedy(hub, cc3m, fields, error, message):
    hub.plant("tester/empty", {"README.md": b"# nothing"}, kind="dataset")
    hub.plant("tester/table", {"train.csv": b"image,caption\nx.jpg,a dog\n"}, kind="dataset")
    with pytest.raises(error, match=rf"sources\[0\] \(webdataset\): .*{message}"):
        rows(**fields)


def test_fields_of_a_repository_do_not_go_with_urls(tmp_path):
    for fields, message in (({}, "give one of them"), ({"urls": "x.tar", "split": "train"}, "split='train' is of a repository")):
        with pytest.raises(ValueError, match=message):
            open_pairs([{"kind": "webdataset"} | fields], 0, False)
