"""An audit on paper: JUnit XML for a CI server, and a page that opens from disk, with all evidence and the worst images."""

from collections.abc import Sequence
from typing import Any
from xml.etree import ElementTree

from PIL import Image

from devil_hf.model.image_processing_devil import load_images
from devil_hf.questions.audit import UNDECIDED, Audit, Finding, figures
from devil_hf.report.html import TEMPLATES, data_uri
from devil_hf.report.templates import one_line, render
from devil_hf.statistics import Separation

THUMBNAIL = 192  # pixels to a side
BINS = 36


def junit_xml(title: str, found: Sequence[Finding]) -> str:
    """The verdicts as JUnit XML: a claim that does not hold is a failure, of the type of its verdict.

    Args:
        title: of the suite, such as the file of the audit.
    """
    failures = sum(not one.passed for one in found)
    suite = ElementTree.Element("testsuite", name=one_line(title), tests=str(len(found)), failures=str(failures), errors="0")
    for number, one in enumerate(found, 1):
        name = f"{number}. {one.phrase} is {one.claim} ({', '.join(one.layers)})"
        case = ElementTree.SubElement(suite, "testcase", classname=one_line(title), name=one_line(name))
        if one.passed:
            told = ElementTree.SubElement(case, "system-out")
        else:
            told = ElementTree.SubElement(case, "failure", type=one.verdict, message=f"{one.verdict}: AUROC {figures(one.words)}")
        told.text = one_line(one.message)
    ElementTree.indent(suite)
    return '<?xml version="1.0" encoding="utf-8"?>\n' + ElementTree.tostring(suite, encoding="unicode") + "\n"


def audit_page(title: str, found: Sequence[Finding], asked: Sequence[Audit]) -> str:
    """The verdicts as one page that needs no other file.

    Args:
        title: of the page, such as the file of the audit.
        found, asked: what came out, and what was asked, in the same order.
    """
    checks = [_check(one, question) for one, question in zip(found, asked, strict=True)]
    failed = sum(not one.passed for one in found)
    return render(f"{TEMPLATES}/audit.html", title=title, checks=checks, failed=failed)


def _check(found: Finding, asked: Audit) -> dict[str, Any]:
    bars = [("words", found.words)]
    if found.probe is not None:
        bars.append(("linear probe", found.probe))
    if found.control is not None:
        bars.append((f"control: {found.control.phrase}", found.control.words))
    return {
        "phrase": found.phrase,
        "claim": found.claim,
        "verdict": found.verdict,
        "state": "passed" if found.passed else "undecided" if found.verdict == UNDECIDED else "failed",
        "layers": ", ".join(found.layers),
        "message": found.message,
        "bound": 100 * found.bound,
        "bars": [_bar(name, one) for name, one in bars],
        "histogram": _histogram(found),
        "images": [
            {"name": name, "evidence": f"{value:+.2f}", "source": _thumbnail(asked, found.names.index(name))}
            for name, value in found.worst
        ],
    }


def _bar(name: str, one: Separation) -> dict[str, Any]:
    return {
        "name": name,
        "figures": figures(one),
        "low": 100 * one.low,
        "area": 100 * one.area,
        "width": 100 * (one.high - one.low),
    }


def _histogram(found: Finding) -> dict[str, Any]:
    """Counts of both groups over one scale, each as a share of the highest."""
    values = (*found.present, *found.absent)
    low, high = min(values), max(values)
    step = (high - low) / BINS or 1.0
    groups = []
    for group in (found.present, found.absent):
        counts = [0] * BINS
        for value in group:
            counts[min(int((value - low) / step), BINS - 1)] += 1
        groups.append(counts)
    highest = max(map(max, groups))
    columns = [{"present": 100 * one / highest, "absent": 100 * other / highest} for one, other in zip(*groups, strict=True)]
    return {"columns": columns, "low": f"{low:+.1f}", "high": f"{high:+.1f}"}


def _thumbnail(asked: Audit, at: int) -> str:
    images = asked.present
    image: Image.Image = load_images(list(images.values())[at] if hasattr(images, "values") else images[at])[0]
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    return data_uri(image)


__all__ = ["audit_page", "junit_xml"]
