"""The file of an audit: which claims are to hold for a network, read and checked before any network is loaded.

```yaml
checkpoint: user/devil-chest      # a directory relative to this file, or a Hub id
level: 0.05                       # of all checks that say nothing else, as bound is
checks:
  - phrase: a hospital tag
    claim: not encoded
    present: images/tagged        # a folder relative to this file, or shapes:COUNT:SEED
    absent: images/untagged
    layers: [layer4]
    probe: true
    control: {phrase: a lung, present: images/chests, absent: images/hands}
```

What is wrong is an error that names file and line.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from devil_hf import text_files
from devil_hf.checkpoints import locate
from devil_hf.model.image_processing_devil import load_images
from devil_hf.model.modeling_devil import DevilModel
from devil_hf.model.processing_devil import DevilProcessor
from devil_hf.questions.audit import BOUND, CLAIMS, ENCODED, LEVEL, Audit, Finding, audit
from devil_hf.settings import make, option

SHARED = ("level", "bound")  # what a file says for all of its checks
HUB_NAME = re.compile(r"\w[\w.-]*(/[\w.-]+)?")  # such as owner/name
OF_IMAGES = ("present", "absent", "masks", "paired")


@dataclass(kw_only=True)
class Asked:
    """What a check and its control both have."""

    phrase: str = option("what is asked for")
    present: str = option("images with the thing")
    absent: str = option("images without it")
    masks: str | None = option("pictures of where it is, light on dark, of the names of the images: only there is asked", None)
    paired: bool = option("whether both hold the same scenes, under the same names", False)
    layers: list | None = option("those that are asked together; all by default", None)
    level: float = option("error rate of each bound", LEVEL)
    bound: float = option("the smallest area that counts as encoded", BOUND)


@dataclass(kw_only=True)
class Control(Asked):
    """What this translator must be able to say; what it does not give is that of its check."""

    checkpoint: str | None = option("of another network", None)


@dataclass(kw_only=True)
class Check(Asked):
    """One claim."""

    claim: str = option("encoded, or not encoded", choices=lambda: CLAIMS)
    probe: bool = option("whether a linear probe has to agree with an absence", False)
    control: dict | None = option("what the translator must be able to say", None)


@dataclass(kw_only=True)
class AuditFile:
    """A file of checks."""

    checks: list = option("the claims, each a mapping")
    checkpoint: str | None = option("directory or Hub id", None)
    level: float = option("error rate of each bound", LEVEL)
    bound: float = option("the smallest area that counts as encoded", BOUND)


@dataclass(frozen=True)
class Planned:
    """A check whose images are found and counted.

    Args:
        where: `file:line` of it.
        asked, control: the questions.
        checkpoint: of the control, where it is not that of the check.
    """

    where: str
    asked: Audit
    control: Audit | None
    checkpoint: str | None

    def check(self, own: tuple[DevilModel, DevilProcessor], other: tuple[DevilModel, DevilProcessor]) -> None:
        """Raise a ValueError for phrases and layers that the check's network, or the control's, does not have."""
        try:
            self.asked.check(*own)
            if self.control is not None:
                self.control.check(*other)
        except ValueError as error:
            raise ValueError(f"{self.where}: {error}") from error

    def answer(self, own: tuple[DevilModel, DevilProcessor], other: tuple[DevilModel, DevilProcessor]) -> Finding:
        """The control first, then the check."""
        return audit(*own, self.asked, None if self.control is None else audit(*other, self.control))


def read_audits(file: Path) -> tuple[str | None, list[Planned]]:
    """The checkpoint that a file names, and its checks; folders are relative to the file.

    Raises:
        OSError: for a file or folder that is not there.
        ValueError: for unknown keys, values of a wrong type, and too few images, by `file:line`.
    """
    reader = _Reader(file)
    planned = [reader.planned(number, values) for number, values in enumerate(reader.top.checks)]
    return reader.network(reader.top.checkpoint, ("checkpoint",)), planned


class _Reader:
    """Reads an audit file, whose errors name file and line."""

    def __init__(self, file: Path):
        self.file, self.values = file, text_files.read_yaml(file)
        self.lines = text_files.key_lines(file)
        self.opened: dict[str, Mapping[str, Any]] = {}
        if not isinstance(self.values, dict):
            raise ValueError(f"{file} holds no mapping: write `checks:`, and under it a list of claims")
        self.top = self.make(AuditFile, self.values, ())
        if not self.top.checks:
            raise ValueError(f"{self.at(('checks',))}: there are no checks, so nothing would be audited")

    def at(self, path: tuple) -> str:
        """`file:line` of a path, or of the nearest one above it."""
        while path and path not in self.lines:
            path = path[:-1]
        return f"{self.file}:{self.lines.get(path, 1)}"

    def make(self, cls: type, values: Mapping[str, Any], path: tuple) -> Any:
        """Checked settings of the mapping at a path."""
        known = {name for one in cls.__mro__ for name in vars(one).get("__annotations__", {})}
        wrong = next((name for name in values if name not in known), None)
        try:
            return make(cls, values)
        except ValueError as error:
            named = next((name for name in values if wrong is None and str(error).startswith(f"{name}=")), wrong)
            raise ValueError(f"{self.at((*path, *([] if named is None else [str(named)])))}: {error}") from error

    def planned(self, number: int, values: Any) -> Planned:
        """A check of the file."""
        path = ("checks", number)
        if not isinstance(values, dict):
            raise ValueError(f"{self.at(path)}: a check is a mapping with a phrase, a claim and images, not {values!r:.80}")
        check = self.make(Check, {name: getattr(self.top, name) for name in SHARED} | values, path)
        asked, control, checkpoint = self.audit(check, path, check.claim, check.probe), None, None
        if check.control is not None:
            taken = ("phrase", "layers", *SHARED, *(() if set(OF_IMAGES) & set(check.control) else OF_IMAGES))
            own = {name: getattr(check, name) for name in taken}
            given = self.make(Control, own | check.control, (*path, "control"))
            control = self.audit(given, (*path, "control"), ENCODED, False)
            checkpoint = self.network(given.checkpoint, (*path, "control", "checkpoint"))
        return Planned(self.at(path), asked, control, checkpoint)

    def audit(self, asked: Asked, path: tuple, claim: str, probe: bool) -> Audit:
        """The question of a check, or of its control."""
        try:
            present = self.images(asked.present)
            absent = self.images(asked.absent)
            if asked.present == asked.absent:
                raise ValueError(f"present and absent are both {asked.absent}: name images without the thing")
            masks = None if asked.masks is None else _Masks(_matching(self.images(asked.masks), present, asked.masks, stems=True))
            if asked.paired:
                absent = dict(zip(present, _matching(absent, present, asked.absent), strict=True))
            return Audit(
                phrase=asked.phrase,
                claim=claim,
                present=present,
                absent=absent,
                masks=masks,
                paired=asked.paired,
                layers=asked.layers,
                level=asked.level,
                bound=asked.bound,
                probe=probe,
            )
        except (ValueError, OSError) as error:
            kind = next(one for one in (FileNotFoundError, OSError, ValueError) if isinstance(error, one))
            raise kind(f"{self.at(path)}: {error}") from error

    def network(self, named: str | None, path: tuple) -> str | None:
        """A checkpoint that lies beside the file, or what else is named: a shipped one, a Hub id; none of where one stands."""
        if named is None or locate(named) != named:
            return named
        beside, (first, *others) = self.file.parent / named, Path(named).parts or (".",)
        if beside.is_dir():
            return str(beside)
        owned = len(others) <= 1 and HUB_NAME.fullmatch(named) and not (others and (self.file.parent / first).is_dir())
        if not owned or Path(named).is_dir():
            raise FileNotFoundError(
                f"{self.at(path)}: there is no checkpoint {beside}: a folder is relative to the file, and a Hub id is OWNER/NAME"
            )
        return named

    def images(self, source: str) -> Mapping[str, Any]:
        """Images by name; files by their paths, which are read when they are asked."""
        from devil_hf.data.images import NumberedImages, open_images
        from devil_hf.data.worlds import parse_world

        if source not in self.opened:
            named = parse_world(source) is None and not source.lstrip().startswith(("{", "["))
            place = self.file.parent / source if named else source
            if named and not Path(place).exists():
                raise FileNotFoundError(f"there is no folder {place}: folders are relative to the file, scenes shapes:COUNT")
            images = open_images(place)
            if not isinstance(images, NumberedImages):
                raise ValueError(f"{source} is a stream, whose images nobody can count before: save it to a folder")
            self.opened[source] = {images.key(number): images.load(number) for number in images.numbers}
        return self.opened[source]


class _Masks(Sequence):
    """Masks of files, each read when it is asked for."""

    def __init__(self, files: Sequence[Any]):
        self.files = files

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, at: Any) -> Any:
        if isinstance(at, slice):
            return [self[one] for one in range(*at.indices(len(self)))]
        return np.asarray(load_images(self.files[at])[0].convert("L")) > 127


def _matching(images: Mapping[str, Any], wanted: Mapping[str, Any], source: str, stems: bool = False) -> list[Any]:
    """Of images by name those of the wanted names, in that order; of masks, endings may differ."""

    def key(name: str) -> str:
        return str(Path(name).with_suffix("")) if stems else name

    by_key = {key(name): image for name, image in images.items()}
    if missing := [name for name in wanted if key(name) not in by_key]:
        raise ValueError(f"{source} has nothing of the name of {missing[0]} ({len(missing)} of {len(wanted)} are missing)")
    return [by_key[key(name)] for name in wanted]


__all__ = ["AuditFile", "Check", "Control", "Planned", "read_audits"]
