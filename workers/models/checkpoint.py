"""Find, check and fingerprint model directories. Needs no torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Iterator
from contextlib import suppress
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from workers.cache_directory import cache_directory
from workers.errors import ModelError
from workers.messages import ModelSource
from workers.text import did_you_mean, one_line

from .cache import Entry, remembered

BUNDLED_MODELS = Path(__file__).resolve().parents[2] / "configs" / "reference"
BUILT_MODELS = {"smollm2-30": "smollm2", "smollm2-30-scenes": "smollm2-scenes"}
"""Models by name that `skipplan reference build RECIPE` assembles in the cache directory."""

SAFETENSORS = ("model.safetensors", "model.safetensors.index.json")
PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json")
"""Names under which transformers looks for weights: a single file goes before an index of several."""

PICKLED_PATTERNS = ("*.bin", "*.pt", "*.pth", "*.ckpt")
SETTINGS_FILES = ("*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken", "*.bpe", "*.tokenizer", "*.vocab")
"""What transformers and tokenizers of its models read beside weights: configurations, vocabularies, templates."""

HUB_FILES = ("*.safetensors", *SETTINGS_FILES)
CHAT_TEMPLATES = "additional_chat_templates"
NOT_READ = ("*.index.json", "skipplan.json", "trainer_state.json", "*results.json", "LICENSE*", "README*")
"""Files of these endings that no answer depends on; of an index, what it names is hashed."""

VOLATILE_CONFIG_FIELDS = frozenset(("transformers_version", "_name_or_path", "_commit_hash"))

_HEADER_SIZE_BYTES = 8
_LARGEST_HEADER = 100_000_000
_READ_BYTES = 1 << 24


def bundled_models() -> tuple[str, ...]:
    """Return the names of the models that ship with the project."""
    return tuple(sorted(path.parent.name for path in BUNDLED_MODELS.glob("*/config.json")))


def built_directory(name: str) -> Path:
    """Return where a model of `BUILT_MODELS` is kept, in the cache directory."""
    return cache_directory() / "models" / name


def find_checkpoint(source: ModelSource) -> Path:
    """Return the directory of a model: a path, a bundled or built model, or the local copy of a hub repository.

    A hub repository is downloaded if it is not in the local cache yet, with no pickled weights but those allowed.

    Raises:
        ModelError: nothing is there, or the hub does not answer; the message names the bundled models.
    """
    name, path = source.path, Path(source.path).expanduser()
    if path.is_dir():
        return path
    if name in bundled_models():
        return BUNDLED_MODELS / name
    if name in BUILT_MODELS:
        built = built_directory(name)
        if not built.is_dir():
            raise ModelError(
                f"model {name}: not at {built}; `skipplan reference build {BUILT_MODELS[name]}` makes it (once)"
            )
        return built
    known = f"bundled models: {', '.join(bundled_models()) or 'none'}; to build: {', '.join(BUILT_MODELS)}"
    if path.exists():
        raise ModelError(f"model {name}: is a file; give the directory that holds config.json ({known})")
    if not _is_hub_id(name):
        raise ModelError(
            f"model {name}: no such directory, nor a bundled model ({known}); a hub id has the form owner/name"
            f"{did_you_mean(name, (*bundled_models(), *BUILT_MODELS))}"
        )
    return _download(source, known)


def find_here(source: ModelSource) -> Path | None:
    """Return the directory of a model if it is on this machine already; nothing is downloaded."""
    here = Path(source.path).expanduser().is_dir() or source.path in (*bundled_models(), *BUILT_MODELS)
    try:
        if here:
            return find_checkpoint(source)
        if _is_hub_id(source.path):
            from huggingface_hub import snapshot_download

            return Path(snapshot_download(source.path, revision=source.revision, local_files_only=True))
    except Exception:  # the hub client raises many kinds for what is not in its cache
        return None
    return None


def check_checkpoint(directory: Path, allow_pickle: Collection[str] = (), *, trust_remote_code: bool = False) -> None:
    """Check config, code and weight files without reading the weights.

    Raises:
        ModelError: no config, no safetensors (pickled weights not allowed by name are refused), a missing or a
            corrupt file, or code that would be run from another place.
    """
    read_config(directory)
    if trust_remote_code:
        _refuse_code_from_elsewhere(directory)
    for file in weight_files(directory, allow_pickle):
        if not is_pickled([file]):
            read_header(file)


def _refuse_code_from_elsewhere(directory: Path) -> None:
    """Refuse code that ``auto_map`` takes from another repository (``owner/name--module.Class``).

    It is fetched when the model is loaded, by its latest revision: nothing here tells whether it has changed.
    """
    names = ["config.json", *(name for name in settings_files(directory) if name.endswith("config.json"))]
    for name in names:
        with suppress(ValueError, OSError):  # what cannot be read is said by who needs it
            for reference in _auto_map(json.loads((directory / name).read_text(encoding="utf-8"))):
                hub_id, separator, code = reference.partition("--")
                if separator:
                    raise ModelError(
                        f"model {directory}: auto_map of {name} takes {code} from {hub_id}, which may change unseen; "
                        f"copy that code into the directory and write {code!r}"
                    )


def _auto_map(content: Any) -> Iterator[str]:
    """Find the references to code in a configuration: texts, and lists of a slow and a fast tokenizer's."""
    for key, value in content.items() if isinstance(content, dict) else ():
        if key == "auto_map" and isinstance(value, dict):
            for each in value.values():
                yield from (part for part in (each if isinstance(each, list) else [each]) if isinstance(part, str))
        yield from _auto_map(value)


def read_config(directory: Path) -> dict[str, Any]:
    """Read ``config.json``. Raises ModelError if it is missing or no JSON object."""
    path = directory / "config.json"
    if not path.is_file() and (directory / "adapter_config.json").is_file():
        raise ModelError(
            f"model {directory}: holds an adapter (adapter_config.json), not a model; merge it into its base model "
            "(peft: merge_and_unload, then save_pretrained, and the base model's processor) and give that directory"
        )
    if not path.is_file():
        raise ModelError(f"model {directory}: has no config.json, so it is not a Hugging Face checkpoint")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"model {directory}: config.json cannot be read: {error}") from None
    if not isinstance(config, dict):
        raise ModelError(f"model {directory}: config.json is not a JSON object")
    return config


def quantisation_method(directory: Path) -> str:
    """Name the method that the weights are quantised by; empty where they are not. Raises ModelError as read_config."""
    config = read_config(directory)
    for section in (config, config.get("text_config")):
        settings = section.get("quantization_config") if isinstance(section, dict) else None
        if isinstance(settings, dict) and settings:
            return str(settings.get("quant_method", "unknown"))
    return ""


def weight_files(directory: Path, allow_pickle: Collection[str] = ()) -> tuple[Path, ...]:
    """Return the weight files that transformers loads: safetensors, or else pickled ones.

    In the order of ``_get_resolved_checkpoint_files`` of transformers: what ``transformers_weights`` of the config
    names, else a single file, else all that an index names. Pickled files are only taken when each is named in
    ``allow_pickle``.

    Raises:
        ModelError: there are none, one is missing, or they are pickled and not all allowed.
    """
    there = (directory / "config.json").is_file()  # the parts that a model is built from have weights alone
    named = read_config(directory).get("transformers_weights") if there else None
    if isinstance(named, str):
        files = _indexed_files(directory, named) if named.endswith(".index.json") else _named_files(directory, [named])
        if not files or is_pickled(files):
            raise ModelError(f"model {directory}: transformers_weights of config.json is no safetensors file: {named}")
        return files
    for single_name, index_name in (SAFETENSORS, PICKLED):
        single = directory / single_name
        files = (single,) if single.is_file() else _indexed_files(directory, index_name)
        refused = [file.name for file in files if file.suffix != ".safetensors" and file.name not in allow_pickle]
        if files and not refused:
            return files
    pickled = sorted(path.name for pattern in PICKLED_PATTERNS for path in directory.glob(pattern))
    if pickled:
        raise ModelError(
            f"model {directory}: has only pickled weights ({pickled[0]}), which can run code when loaded; "
            "convert them to safetensors, or name each file in model.allow_pickle"
        )
    raise ModelError(f"model {directory}: has no model.safetensors, nor an index of several")


def share_as_its_directory(directory: Path) -> None:
    """Give files the permissions that their new directory got from the umask; safetensors makes its own files 0600."""
    allowed = directory.stat().st_mode
    for path in directory.rglob("*"):
        executable = path.is_dir() or path.stat().st_mode & 0o100
        path.chmod(allowed & (0o777 if executable else 0o666))


def is_pickled(files: Iterable[Path]) -> bool:
    """Whether weight files are pickled ones."""
    return any(file.suffix != ".safetensors" for file in files)


def _indexed_files(directory: Path, index_name: str) -> tuple[Path, ...]:
    index = directory / index_name
    if not index.is_file():
        return ()
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise ModelError(f"model {directory}: {index.name} is not a readable index of weights") from None
    return _named_files(directory, names, index.name)


def _named_files(directory: Path, names: Iterable[str], where: str = "config.json") -> tuple[Path, ...]:
    for name in names:
        if Path(name).name != name:
            raise ModelError(f"model {directory}: {where} names a file outside the directory: {name}")
        if not (directory / name).is_file():
            raise ModelError(f"model {directory}: weight file {name} is missing (named in {where})")
    return tuple(directory / name for name in names)


def fingerprint_checkpoint(
    directory: Path, allow_pickle: Collection[str] = (), *, trust_remote_code: bool = False
) -> str:
    """Identify a model by everything in its directory that its answers depend on.

    SHA-256 over the config as canonical JSON; over every tensor in the order of names: name, dtype, shape, and the
    SHA-256 of its bytes; and over the other files that transformers reads (:func:`settings_files`), by name. Those
    that end in ``config.json`` count as JSON, without the fields that change with the program that saved them
    (``transformers_version``, ``_name_or_path``, ``_commit_hash``), the others by their bytes. How tensors are spread
    over files does not matter. Pickled files are not opened: each counts as a whole, by its name and bytes. Hashes of
    weights are remembered by the files' identity (:mod:`workers.models.cache`).

    Raises:
        ModelError: as :func:`check_checkpoint`.
    """
    config = read_config(directory)
    if trust_remote_code:
        _refuse_code_from_elsewhere(directory)
    digest = hashlib.sha256(canonical_config(config).encode())
    entries = [(name, _hash_settings(path)) for name, path in settings_files(directory, trust_remote_code).items()]
    entries.append(("saved before transformers 5", str(_is_saved_before_5(config))))
    digest.update(_joined(entries))
    digest.update(_joined(entry for file in weight_files(directory, allow_pickle) for entry in _hash_weights(file)))
    return digest.hexdigest()


def settings_files(directory: Path, trust_remote_code: bool = False) -> dict[str, Path]:
    """Return the files beside weights and ``config.json`` that an answer may depend on, by their relative names.

    They lie in the directory, or in a folder of it with templates or with a configuration of its own, such as that of
    a second tokenizer. Code counts where it is run, at any depth.
    """
    folders = [directory, directory / CHAT_TEMPLATES, *{path.parent for path in directory.glob("*/*config.json")}]
    found = [path for folder in folders for pattern in SETTINGS_FILES for path in folder.glob(pattern)]
    if trust_remote_code:
        found += directory.rglob("*.py")
    names = {path.relative_to(directory).as_posix(): path for path in found if path.is_file()}
    names = {name: path for name, path in names.items() if not name.startswith(".") and "/." not in name}
    return {
        name: names[name]
        for name in sorted(names)
        if name != "config.json" and not any(fnmatch(names[name].name, pattern) for pattern in NOT_READ)
    }


def _hash_settings(path: Path) -> str:
    if path.name.endswith("config.json"):
        with suppress(ValueError, OSError):  # what is no JSON counts by its bytes
            text = canonical_config(json.loads(path.read_text(encoding="utf-8")), sort_keys=False)
            return hashlib.sha256(text.encode()).hexdigest()
    return _hash_file(path)


def _is_saved_before_5(config: dict[str, Any]) -> bool:
    """Whether transformers takes a tokenizer beside this config for one saved before 5.0 (``_patch_mistral_regex``)."""
    major = str(config.get("transformers_version") or "0").partition(".")[0]
    return not major.isdigit() or int(major) < 5


def _joined(entries: Iterable[tuple[str, ...]]) -> bytes:
    return b"".join(b"\0" + "\0".join(entry).encode() for entry in sorted(entries))


def hash_weights(directory: Path) -> str:
    """Return the SHA-256 over every tensor's name, dtype, shape and bytes, in the order of names, and nothing else.

    Raises:
        ModelError: as :func:`weight_files`.
    """
    entries = sorted(entry for file in weight_files(directory) for entry in _hash_weights(file))
    return hashlib.sha256(b"\0".join("\0".join(entry).encode() for entry in entries)).hexdigest()


def canonical_config(config: Any, *, sort_keys: bool = True) -> str:
    """Return a config as JSON without volatile fields, at any depth."""

    def clean(value: Any) -> Any:
        if isinstance(value, dict):
            return {str(key): clean(item) for key, item in value.items() if key not in VOLATILE_CONFIG_FIELDS}
        return [clean(item) for item in value] if isinstance(value, list | tuple) else value

    return json.dumps(clean(config), sort_keys=sort_keys, separators=(",", ":"), default=str)


def read_header(file: Path) -> tuple[int, dict[str, Any], dict[str, str] | None]:
    """Read a safetensors header: where the data start, each tensor's dtype, shape and offsets, and the metadata.

    Raises:
        ModelError: the file is corrupt.
    """
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(_HEADER_SIZE_BYTES), "little")
            if not 2 <= length <= _LARGEST_HEADER:
                raise ValueError("its header has an impossible length")
            header = json.loads(stream.read(length))
        metadata = header.pop("__metadata__", None)
        start = _HEADER_SIZE_BYTES + length
        end = start + max((entry["data_offsets"][1] for entry in header.values()), default=0)
        if file.stat().st_size != end:
            raise ValueError(f"it has {file.stat().st_size} bytes where its header says {end}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise ModelError(f"model file {file} is corrupt: {one_line(error)}") from None
    return start, header, metadata


def _hash_weights(file: Path) -> list[Entry]:
    """Entries of a weight file: of every tensor its name, dtype, shape and hash; of a pickled file name and hash."""
    if is_pickled([file]):
        return [(file.name, *entry) for entry in remembered(file, lambda: [(_hash_file(file),)])]
    read_header(file)  # what is corrupt is said whatever is remembered
    return remembered(file, lambda: list(_hash_tensors(file)))


def _hash_tensors(file: Path) -> Iterator[Entry]:
    start, header, _ = read_header(file)
    with file.open("rb") as stream:
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            stream.seek(start + begin)
            digest, left = hashlib.sha256(), end - begin
            while left > 0:
                block = stream.read(min(left, _READ_BYTES))
                if not block:
                    raise ModelError(f"model file {file} ended early while it was read")
                digest.update(block)
                left -= len(block)
            yield name, entry["dtype"], str(entry["shape"]), digest.hexdigest()


def _hash_file(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _is_hub_id(name: str) -> bool:
    owner, _, repository = name.partition("/")
    return bool(owner and repository) and "/" not in repository and owner not in (".", "..", "~")


def _download(source: ModelSource, known: str) -> Path:
    from huggingface_hub import errors, snapshot_download

    patterns = [*HUB_FILES, *(["*.py"] if source.trust_remote_code else []), *source.allow_pickle]
    nowhere = f"model {source.path}: no such directory, nor a bundled model ({known})"
    try:
        return Path(snapshot_download(source.path, revision=source.revision, allow_patterns=patterns))
    except errors.RevisionNotFoundError:
        raise ModelError(f"model {source.path}: the hub repository has no revision {source.revision!r}") from None
    except errors.GatedRepoError:
        raise ModelError(f"model {source.path}: the hub repository is gated; log in with access to it") from None
    except errors.RepositoryNotFoundError:
        raise ModelError(f"{nowhere}, nor a public hub repository") from None
    except errors.HFValidationError:
        raise ModelError(f"{nowhere}, nor a valid hub id") from None
    except Exception as error:  # the hub client, its HTTP library and the file system raise many kinds here
        raise ModelError(f"{nowhere}, and the hub cannot be reached ({type(error).__name__})") from None
