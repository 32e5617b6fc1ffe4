"""What a report says first: whether anything looks wrong, what is worst, and the command that mends it."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import yaml
from pydantic import ValidationError

from pear_data.config import WeightSettings
from pear_data.stages.page_text import NAME_CHARACTERS, shortened

if TYPE_CHECKING:
    from pear_data.stages.findings import Finding
    from pear_data.stages.remedies import Remedy
    from pear_data.stages.statistics import WeightingStatistics

_BLOCK = ("block_by", "block_size", "block_regex")
# What a suggested command leaves to its defaults: how fast weights are made, not which.
_NOT_SAID = ("name", "workers", "runner", "ray_address")


# What a command calls the file it is to be given.
SOURCES_FILE = "sources.yaml"


@dataclass(frozen=True, slots=True)
class Step:
    """One way to mend a fault: what it does, the command to copy and the file that this names, where there are any."""

    text: str
    command: str | None
    file: str | None


@dataclass(frozen=True, slots=True)
class Advice:
    """What looks wrong, with which weightings, and what to do about it."""

    weights: list[str]
    text: str
    severity: float
    steps: list[Step]


def advice(found: Sequence[WeightingStatistics], taken: Sequence[str]) -> list[Advice]:
    """The findings of all weightings, those furthest beyond their thresholds first; the same sentence is said once.

    Args:
        found: diagnostics, the weighting that matters most first.
        taken: names of the store's weightings, which a suggested command must not take again.
    """
    said: dict[str, Advice] = {}
    for one in found:
        for finding in one.findings:
            if finding.text in said:
                said[finding.text].weights.append(one.weights)
                continue
            steps = [
                _step(remedy, command(one.settings, one.weights, remedy, taken))
                for remedy in finding.remedies
            ]
            text = _said(finding)
            said[finding.text] = Advice([one.weights], text, _severity(finding), steps)
    first = found[0].weights if found else None
    return sorted(said.values(), key=lambda one: (first not in one.weights, -one.severity))


def _step(remedy: Remedy, to_copy: str | None) -> Step:
    """A remedy; words that its command says too are left out."""
    text = remedy.text
    if to_copy:
        text = text.removeprefix(" ".join(remedy.options)).strip()
        text = text.removeprefix("(").removesuffix(")")
    if remedy.file:
        text = text.replace("FILE", SOURCES_FILE)
    return Step(text, to_copy, remedy.file)


def _said(finding: Finding) -> str:
    """A finding's words without their last sentence, which lists the remedies; long names of sources are cut."""
    text = finding.text.rpartition(" Remedy: ")[0] or finding.text
    for source in finding.sources:
        text = text.replace(source, shortened(source, NAME_CHARACTERS))
    return text


def _severity(finding: Finding) -> float:
    """How many times a finding's value is beyond its threshold."""
    if finding.value <= 0 or finding.threshold <= 0:
        return float("inf")
    return max(finding.value / finding.threshold, finding.threshold / finding.value)


def command(settings: WeightSettings, name: str, remedy: Remedy, taken: Sequence[str]) -> str | None:
    """The `pear-data weight` command that makes a weighting again with a remedy, under a name of its own.

    None where the remedy is none of weight's options, or does not go with the weighting's other settings.
    """
    if not remedy.options or (settings.per_source and not remedy.file):
        return None
    values: dict[str, Any] = {
        key: value for key, value in settings.model_dump().items() if key not in _NOT_SAID
    }
    values |= _fields(remedy.options)
    if remedy.file:
        values["per_source"] = yaml.safe_load(remedy.file)
    if values["level"] != "block":
        values = {key: value for key, value in values.items() if key not in _BLOCK}
    try:
        mended = WeightSettings.model_validate(values)
    except ValidationError:
        return None
    return shlex.join(["pear-data", "weight", *_options(mended), "--name", _free_name(name, taken)])


def _fields(options: Sequence[str]) -> dict[str, Any]:
    """Settings of a list of options and their values."""
    fields: dict[str, list[str]] = {}
    name = ""
    for part in options:
        if part.startswith("--"):
            name = part.removeprefix("--").replace("-", "_")
            fields[name] = []
        else:
            fields[name].append(part)
    return {name: values[0] if len(values) == 1 else values for name, values in fields.items()}


def _options(settings: WeightSettings) -> list[str]:
    """The options that differ from their defaults, the level always."""
    options = ["--level", settings.level]
    for name, field in WeightSettings.model_fields.items():
        value = getattr(settings, name)
        if name in ("level", *_NOT_SAID) or value == field.get_default(call_default_factory=True):
            continue
        if name == "per_source":
            value = SOURCES_FILE
        values = value if isinstance(value, tuple) else (value,)
        options += [f"--{name.replace('_', '-')}", *(str(part).removesuffix(".0") for part in values)]
    return options


def _free_name(name: str, taken: Sequence[str]) -> str:
    """The weighting's name with the first number after it that no other has."""
    lowered = {other.lower() for other in taken}
    number = 2
    while f"{name[:60]}-{number}".lower() in lowered:
        number += 1
    return f"{name[:60]}-{number}"
