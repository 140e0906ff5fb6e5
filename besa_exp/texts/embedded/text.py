"""The text every install carries: docstrings of installed packages and Python's own help topics.

A document is one module (its docstrings in source order, joined by blank lines) or one `pydoc_data` topic. Sources are
read with `ast`; no package is imported. A paragraph that an earlier document of its package, or one of the packages a
run reads, has already is dropped: what is copied between modules is met once, and not on both sides of the split.

The split hashes the document's name, not its wording: when a package is upgraded, a module the model was trained on
stays on the training side although its text has changed. The model's held-out share is 5 % over all five packages; the
two packages a run reads give a larger part of it (11 %), the three that only training reads a smaller one (3 %).
"""

import ast
import hashlib
import importlib.metadata
import importlib.util
import inspect
import os
import platform
import sysconfig
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

Split = Literal["train", "held_out"]

RUN_PACKAGES = ("stdlib", "numpy")
TRAINING_PACKAGES = ("stdlib", "numpy", "pandas", "torch", "transformers")
MODEL_DIR = Path(__file__).parent / "model"
TASKS_DIR = Path(__file__).parent / "tasks"
TASK_NAME = "embedded_continuations"

# Chosen by size, before any training: under this salt no module is more than a tenth of what a run holds out.
SPLIT_SALT = "split 228"
HELD_OUT_PERCENT = {"stdlib": 15, "numpy": 15, "pandas": 3, "torch": 3, "transformers": 3}
CALIBRATION_CHARACTERS = 1_500_000
PERPLEXITY_CHARACTERS = 300_000
SHORTEST_DOCUMENT = 400  # characters; less is no context for a window
SHORTEST_DEDUPLICATED = 40  # characters; "Returns" and the like may repeat
STATEMENTS = ("body", "orelse", "finalbody")  # fields of a statement that hold statements, in source order
SKIPPED_FOLDERS = frozenset(
    {"site-packages", "dist-packages", "lib-dynload", "__pycache__"}  # not the package's own sources
    | {"test", "tests", "idle_test", "idlelib", "turtledemo", "encodings", "pydoc_data"}  # hardly any prose
    | {"distutils", "ensurepip", "lib2to3"}  # not in every Python
)


@dataclass(frozen=True)
class EmbeddedText:
    """Documents with what identifies them: the sha256 of their joined text and the version of every package read."""

    documents: tuple[str, ...]
    sha256: str
    versions: dict[str, str]


def embedded_text(split: Split, packages: tuple[str, ...] = RUN_PACKAGES) -> EmbeddedText:
    """All documents of one side of the split, in a fixed order (by package, then by name).

    Raises ValueError for an unknown split or package, FileNotFoundError for a package that is not installed.
    """
    if split not in ("train", "held_out"):
        raise ValueError(f"split must be 'train' or 'held_out', not {split!r}")
    if unknown := set(packages) - set(TRAINING_PACKAGES):
        raise ValueError(f"no embedded text for {sorted(unknown)}; known packages: {', '.join(TRAINING_PACKAGES)}")
    wanted = split == "held_out"
    chosen = [
        text
        for package in packages
        for name, text in _unrepeated_documents(package)
        if is_held_out(package, name) == wanted
    ]
    return _as_text(chosen, packages)


def calibration_documents() -> EmbeddedText:
    """The fixed part of the training side that calibrates: about 1.5 million characters in hash order."""
    return _part(embedded_text("train"), CALIBRATION_CHARACTERS)


def perplexity_documents() -> EmbeddedText:
    """The fixed part of the held-out side that measures perplexity: about 100 thousand tokens in hash order."""
    return _part(embedded_text("held_out"), PERPLEXITY_CHARACTERS)


def is_held_out(package: str, name: str) -> bool:
    """Whether the sha256 of the document's name falls into its package's held-out share."""
    bucket = int.from_bytes(hashlib.sha256(f"{SPLIT_SALT}: {package}/{name}".encode()).digest()[:8], "big") % 10_000
    return bucket < 100 * HELD_OUT_PERCENT[package]


def _part(text: EmbeddedText, characters: int) -> EmbeddedText:
    """Documents in the order of their sha256 until `characters` are reached: a mixture of the packages."""
    chosen, total = [], 0
    for document in sorted(text.documents, key=lambda document: hashlib.sha256(document.encode()).digest()):
        if total >= characters:
            break
        chosen.append(document)
        total += len(document)
    return _as_text(chosen, tuple(text.versions))


def _as_text(documents: list[str], packages: tuple[str, ...]) -> EmbeddedText:
    digest = hashlib.sha256("\0".join(documents).encode()).hexdigest()
    versions = {
        package: platform.python_version() if package == "stdlib" else importlib.metadata.version(package)
        for package in packages
    }
    return EmbeddedText(tuple(documents), digest, versions)


@cache
def _unrepeated_documents(package: str) -> tuple[tuple[str, str], ...]:
    """(name, text) of a package, without repeated paragraphs, its own and those of the RUN_PACKAGES before it."""
    earlier = RUN_PACKAGES[: RUN_PACKAGES.index(package)] if package in RUN_PACKAGES else RUN_PACKAGES
    seen = {
        paragraph for other in earlier for _, text in _unrepeated_documents(other) for paragraph in text.split("\n\n")
    }
    documents = []
    for name, text in _raw_documents(package):
        kept = []
        for paragraph in text.split("\n\n"):
            if len(paragraph) >= SHORTEST_DEDUPLICATED:
                if paragraph in seen:
                    continue
                seen.add(paragraph)
            kept.append(paragraph)
        unrepeated = "\n\n".join(kept).strip()
        if len(unrepeated) >= SHORTEST_DOCUMENT:
            documents.append((name, unrepeated))
    return tuple(documents)


def _raw_documents(package: str) -> Iterator[tuple[str, str]]:
    """(name, text) of each module, and of each help topic for the standard library, sorted by name."""
    root = _package_folder(package)
    for path in _module_paths(root):
        text = "\n\n".join(_docstrings(path))
        if text:
            yield path.relative_to(root).as_posix(), text
    if package == "stdlib":
        from pydoc_data.topics import topics

        for name in sorted(topics):
            yield f"pydoc_data/topics/{name}", inspect.cleandoc(topics[name])


def _package_folder(package: str) -> Path:
    if package == "stdlib":
        return Path(sysconfig.get_paths()["stdlib"])
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(f"the embedded text needs the package {package!r}, which is not installed")
    return Path(spec.submodule_search_locations[0])


def _module_paths(root: Path) -> list[Path]:
    paths = []
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in SKIPPED_FOLDERS]
        paths += [Path(folder, name) for name in files if name.endswith(".py")]
    return sorted(paths, key=lambda path: path.relative_to(root).as_posix())


def _docstrings(path: Path) -> Iterator[str]:
    """Docstrings of the module, its classes and functions in source order; nothing for a file Python cannot parse."""
    source = path.read_bytes()
    if b'"""' not in source and b"'''" not in source:
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in other people's sources
        try:
            tree = ast.parse(source)
        except SyntaxError:  # a template, or syntax newer than this Python
            return
    pending: list[ast.AST] = [tree]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(node)
            if docstring:
                yield docstring.strip()
        pending += reversed([child for name in STATEMENTS for child in getattr(node, name, ())])
