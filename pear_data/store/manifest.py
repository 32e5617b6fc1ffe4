"""The manifest: what a store holds, what each artefact was made from, and what was decided on the way."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_serializer

from pear_data.config import first_fault
from pear_data.errors import MismatchError, PearError
from pear_data.redaction import redacted_values
from pear_data.schema import FORMAT_VERSION

MANIFEST_NAME = "manifest.json"
CORPUS = "corpus"


def _inside(path: str) -> str:
    """A manifest may come from anywhere: what it names is read, hashed and, by `migrate`, replaced."""
    parts = path.split("/")
    if not all(parts) or {".", ".."} & set(parts) or "\0" in path:
        raise ValueError(f"{path!r} is no path inside a store")
    return path


Inside = Annotated[str, AfterValidator(_inside)]
# These become parts of paths.
ShardName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
StageKey = Annotated[str, Field(pattern=r"^(corpus|(scores|weights)/[A-Za-z0-9][A-Za-z0-9._-]*)$")]


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid")


class FileEntry(_Entry):
    """One committed file: its path inside the store, size and checksum."""

    path: Inside
    bytes: int
    sha256: str


class Cursor(_Entry):
    """Where in the inputs a shard of the corpus ends: so many rows of input number `input` are consumed."""

    input: int
    row: int


class Shard(_Entry):
    """One committed shard of a stage. `inputs` are the checksums of the shards it was made from."""

    name: ShardName
    file: FileEntry
    summary: FileEntry | None = Field(
        default=None, description="A row per sample, without its tokens (corpus, weights)."
    )
    totals: FileEntry | None = Field(
        default=None, description="A row per source, sums and histograms (weights)."
    )
    rows: int
    num_tokens: int = Field(description="Tokens, prompt included (corpus), or scored tokens (other stages).")
    num_scored: int
    counts: dict[str, int] = Field(
        default_factory=dict,
        description="Rows by status; in the corpus, what was read, passed over and decided on the way.",
    )
    inputs: dict[str, str] = Field(default_factory=dict)
    cursor: Cursor | None = None
    quarantine: FileEntry | None = None
    quarantined: int = 0
    mended: FileEntry | None = Field(
        default=None,
        exclude_if=lambda entry: entry is None,
        description="Rows of earlier shards' quarantine that are, mended, in this shard (corpus).",
    )
    mended_rows: int = Field(default=0, exclude_if=lambda count: count == 0)

    @property
    def files(self) -> list[FileEntry]:
        """Every file of the shard."""
        files = (self.file, self.summary, self.totals, self.quarantine, self.mended)
        return [file for file in files if file is not None]


class Stage(_Entry):
    """One artefact. `settings` determine its content; `fingerprint` is their hash."""

    settings: dict[str, Any]
    fingerprint: str
    complete: bool = False
    shards: list[Shard] = Field(default_factory=list)
    decisions: dict[str, Any] = Field(
        default_factory=dict, description="What was recognised or chosen along the way, for people to read."
    )

    @field_serializer("decisions")
    def _without_secrets(self, decisions: dict[str, Any]) -> dict[str, Any]:
        """They quote what people named and what engines said."""
        return redacted_values(decisions)

    @property
    def files(self) -> list[FileEntry]:
        """Every file of the stage."""
        return [entry for shard in self.shards for entry in shard.files]

    @property
    def num_scored(self) -> int:
        return sum(shard.num_scored for shard in self.shards)

    @property
    def rows(self) -> int:
        return sum(shard.rows for shard in self.shards)

    @property
    def quarantined(self) -> int:
        """Rows in quarantine that were not mended since."""
        return sum(shard.quarantined - shard.mended_rows for shard in self.shards)

    def shard(self, name: str) -> Shard | None:
        return next((shard for shard in self.shards if shard.name == name), None)


class TokenizerEntry(_Entry):
    """The tokenizer that made `input_ids`; its files lie in the store."""

    name: str
    fingerprint: str
    template_fingerprint: str
    files: list[FileEntry]
    vocabulary: FileEntry


class Manifest(_Entry):
    """`STORE/manifest.json`."""

    format_version: int = Field(default=FORMAT_VERSION, ge=1)
    created_by: str
    tokenizer: TokenizerEntry | None = None
    stages: dict[StageKey, Stage] = Field(
        default_factory=dict, description="Keys: corpus, scores/<policy>, weights/<name>."
    )
    sha256: str | None = Field(
        default=None, description="Of the text before this line, the last; earlier stores have none."
    )

    @property
    def files(self) -> list[FileEntry]:
        """Every committed file of the store."""
        made = [entry for stage in self.stages.values() for entry in stage.files]
        return made if self.tokenizer is None else [*made, *self.tokenizer.files, self.tokenizer.vocabulary]

    def names(self, kind: str) -> list[str]:
        """Names of the stages of a kind ("scores" or "weights"), in the order they were made."""
        return [key.partition("/")[2] for key in self.stages if key.startswith(f"{kind}/")]

    def begun(self, kind: str) -> list[str]:
        """Those of `names` that have a shard: a job may have died before its first."""
        return [name for name in self.names(kind) if self.stages[f"{kind}/{name}"].shards]


def fingerprint(settings: dict[str, Any]) -> str:
    """sha256 of the canonical JSON of `settings`."""
    canonical = json.dumps(settings, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


def differing_fields(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """One "field: was A, now B" for each setting that differs, nested ones with dotted names."""
    lines: list[str] = []
    for key in sorted(old.keys() | new.keys()):
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            lines += differing_fields(before, after, f"{prefix}{key}.")
        elif before != after:
            lines.append(f"{prefix}{key}: was {_short(before)}, now {_short(after)}")
    return lines


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 80 else f"{text[:77]}..."


def sealed(manifest: Manifest) -> str:
    """The text of `manifest.json`: its own checksum ends it, so that a change of any bit is found."""
    text = manifest.model_dump_json(indent=1, exclude={"sha256"}).removesuffix("\n}")
    return f"{text}{_seal(text)}"


def _seal(text: str) -> str:
    return f',\n "sha256": "{hashlib.sha256(text.encode()).hexdigest()}"\n}}\n'


def read_manifest(folder: Path) -> Manifest:
    """Read `folder/manifest.json`.

    Raises:
        PearError: there is none, or it was written by a newer pear-data.
        MismatchError: it does not parse as a manifest, or was changed.
    """
    path = folder / MANIFEST_NAME
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise PearError(f"no store at {folder}: make one with `pear-data score CORPUS --model M`") from None
    except OSError as error:
        raise PearError(
            f"cannot read {path} ({error.strerror}): name the folder of a store with --store"
        ) from None
    try:
        text = raw.decode()
        version = json.loads(text)["format_version"]
        if isinstance(version, int) and version > FORMAT_VERSION:
            raise PearError(
                f"{path} has format version {version}, this pear-data reads up to {FORMAT_VERSION}: upgrade it"
            )
        manifest = Manifest.model_validate_json(text)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        reason = str(error).splitlines()[0]
        if isinstance(error, ValidationError):
            place, message = first_fault(error)
            reason = f"{'.'.join(place)}: {message}"
        raise MismatchError(f"{path} is not a readable manifest ({reason}): restore it from a copy") from None
    for key, stage in manifest.stages.items():
        if stage.fingerprint != fingerprint(stage.settings):
            raise MismatchError(
                f"{path} is damaged: the settings of {key} are not those of its fingerprint; restore it from a copy"
            )
    sealed_text = text.rpartition(',\n "sha256": "')[0]
    if manifest.sha256 is not None and text != f"{sealed_text}{_seal(sealed_text)}":
        raise MismatchError(f"{path} is damaged: it does not match its own sha256; restore it from a copy")
    return manifest
