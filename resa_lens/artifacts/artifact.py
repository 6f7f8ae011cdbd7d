"""An artifact of a workspace: a folder with a manifest, and what its kind says of both."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import pyarrow as pa
from pydantic import BaseModel, ValidationError

from resa_lens.artifacts.manifest import MANIFEST, Manifest
from resa_lens.errors import BadInputError, DamagedError
from resa_lens.files import open_regular, parse_json, read_regular
from resa_lens.hashes import file_hash

Values = TypeVar("Values", bound=BaseModel)
Schema = type[BaseModel] | pa.Schema | None
"""What a file holds: JSON of a model, a parquet table of a schema, or anything."""


class AnyResults(BaseModel):
    """Results of which a reader asks nothing."""


class Kind:
    """A kind of artifact: everything that is the same for all artifacts of it.

    A new kind is a subclass in a module of `artifacts.kinds`; to subclass is to register.
    """

    name: ClassVar[str]
    """In manifests, in `resa-lens runs` and in addresses."""
    folder: ClassVar[str]
    """Below the workspace."""
    by_model: ClassVar[bool] = True
    """Whether a folder of the model's name stands between the kind's folder and the run's."""
    title: ClassVar[str]
    """One artifact of it, as a reader calls it."""
    titles: ClassVar[str]
    """Several of them."""
    column: ClassVar[str]
    """Its column in the lineage: one of `COLUMNS`."""
    command: ClassVar[tuple[str, ...]] = ()
    """The command that makes one, without model and workspace."""
    lighter: ClassVar[str] = "Fewer --layers, or --dtype bfloat16, take less memory."
    """The options of its command that take less memory, as a sentence for messages."""
    recipe: ClassVar[int] = 1
    """Raised when the stage's algorithm changes its results: a part of the identity."""
    Results: ClassVar[type[BaseModel]] = AnyResults
    """Schema of the manifest's results, for writer and reader."""
    Settings: ClassVar[type[BaseModel]] = AnyResults
    """Schema of what readers need of the manifest's configuration."""
    files: ClassVar[Mapping[str, Schema]] = {}
    """Schema by file name, for writer and reader."""
    beside: ClassVar[tuple[str, ...]] = ()
    """Files that may be written into a finished artifact: no part of what it is."""

    def __init_subclass__(cls) -> None:
        """Register the kind by its name."""
        KINDS[cls.name] = cls

    @classmethod
    def sentence(cls, artifact: Artifact) -> str:
        """Say in a sentence what an artifact is.

        Raises:
            DamagedError: its results are not as the kind's schema says.
        """
        return f"{cls.title[:1].upper()}{cls.title[1:]}."

    @classmethod
    def detail(cls, artifact: Artifact, *, one_based: bool = False) -> str:
        """Say in a few words what tells an artifact from its like.

        Raises:
            DamagedError: its results are not as the kind's schema says.
        """
        return ""


KINDS: dict[str, type[Kind]] = {}
"""By name; filled as the modules of `artifacts.kinds` are imported."""
COLUMNS = ("Model", "SAEs", "Measured", "Judged", "Tuned", "Evaluated", "Swept")
"""Of the lineage, from left to right: a parent stands to the left of what was made from it."""


@dataclass(frozen=True)
class Parent:
    """What an artifact is made from, as its manifest names it."""

    identity: str
    """SHA-256 of the contents."""
    path: str
    """Workspace-relative where it lies inside: a help for people, no part of the identity."""


@dataclass(frozen=True)
class Artifact:
    """A complete artifact: its manifest was read, and agrees with itself."""

    path: Path
    relative: str
    """To the workspace."""
    manifest: Manifest

    @property
    def kind(self) -> type[Kind]:
        """The class of its kind.

        Raises:
            DamagedError: this version has no such kind.
        """
        if self.manifest.kind not in KINDS:
            raise DamagedError(f"{self.path} is of the unknown kind {self.manifest.kind!r:.80}")
        return KINDS[self.manifest.kind]

    @property
    def verifiable(self) -> bool:
        """Whether it says by contents what it was made from; an older one does not."""
        return self.manifest.verifiable

    @property
    def parent(self) -> Parent:
        """This artifact as the parent of another."""
        return Parent(self.manifest.identity, self.relative)

    @property
    def weights(self) -> str:
        """Hash of the model's weights; of the base model's for an adapter."""
        return self.manifest.hashes.get("weights", "")

    @property
    def slug(self) -> str:
        """The model's folder below the kind's."""
        return self.path.parent.name

    @cached_property
    def results(self) -> Any:
        """The manifest's results as the kind's `Results`.

        Raises:
            DamagedError: they are not as the schema says.
        """
        return checked(self.kind.Results, self.manifest.results, self.path / MANIFEST)

    @cached_property
    def settings(self) -> Any:
        """The manifest's configuration as the kind's `Settings`.

        Raises:
            DamagedError: it is not as the schema says.
        """
        return checked(self.kind.Settings, self.manifest.config, self.path / MANIFEST)

    def ingredient(self, *keys: str) -> Any:
        """Return a part of what it was made from.

        Raises:
            DamagedError: its manifest does not name that.
        """
        value: Any = self.manifest.ingredients
        for key in keys:
            if not isinstance(value, Mapping) or key not in value:
                raise DamagedError(
                    f"{self.path / MANIFEST} does not say by which {'.'.join(keys)} it was made; "
                    "the command that made it makes it again"
                )
            value = value[key]
        return value

    def file(self, name: str, *, cached: bool = True) -> Path:
        """Return the path of a file that is as it was written.

        Args:
            name: below the artifact's folder.
            cached: as of `hashes.file_hash`.

        Raises:
            DamagedError: it is missing, changed, or not a part of the artifact.
        """
        path = self.path / name
        if not self.verifiable:
            with open_regular(path):
                return path
        known = self.manifest.files.get(name)
        if known is None:
            raise DamagedError(f"{path} is not a part of its artifact")
        if file_hash(path, cached=cached) != known:
            raise DamagedError(
                f"{path} was changed since it was written; the command that made it makes it again"
            )
        return path

    def read(self, name: str, schema: type[Values]) -> Values:
        """Read a JSON file of the artifact, checked by its hash and its schema.

        Raises:
            DamagedError: missing, changed, or not as the schema says.
        """
        path = self.file(name)
        return checked(schema, parse_json(read_regular(path), path), path)

    def value(self, name: str) -> Any:
        """Return a JSON file's value, checked as by `read` with the kind's schema of that file.

        Raises:
            DamagedError: missing, changed, or not as the schema says.
        """
        path = self.file(name)
        value = parse_json(read_regular(path), path)
        schema = self.kind.files.get(name)
        if isinstance(schema, type):
            checked(schema, value, path)
        return value

    def damage(self, *, cached: bool = True) -> Iterator[str]:
        """Yield a sentence for each file that is missing or changed, or may not be read.

        Args:
            cached: as of `hashes.file_hash`; False reads every byte.
        """
        for name in self.manifest.files:
            try:
                self.file(name, cached=cached)
            except BadInputError as error:
                yield str(error)

    def foreign(self) -> list[str]:
        """Return the files in the folder that are no part of the artifact."""
        known = {MANIFEST, *self.manifest.files, *self.kind.beside}
        names = (str(p.relative_to(self.path)) for p in self.path.rglob("*") if not p.is_dir())
        return sorted(name for name in names if name not in known)


def checked(schema: type[Values], value: Any, where: Path) -> Values:
    """Return a stored value as its model.

    Raises:
        DamagedError: it is not what this version writes.
    """
    try:
        return schema.model_validate(value)
    except (ValidationError, RecursionError) as error:
        place = ""
        if isinstance(error, ValidationError):
            place = ".".join(str(part) for part in error.errors()[0]["loc"])
        raise DamagedError(
            f"{where} is damaged or of another version, at {place or 'its top'}; the command that "
            "made it makes it again"
        ) from error
