"""The identity of a base: a fingerprint of weights, configuration, tokenizer and chat template.

It is computed from the files of a directory in transformers' layout; weights are never loaded.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from embedcache.base.home import weight_hash
from embedcache.base.pretrained import architecture, read_config, read_json
from embedcache.errors import BaseModelError, IdentityError, nearest
from embedcache.store.files import hash_file, hash_json

SOURCE_FILE = "embedcache_source.json"
"""File in a directory converted from GGUF: ``{"gguf_sha256": ..., "converter": ...}``."""

_PARTS = {
    "weights": "weights",
    "config": "config",
    "tokenizer": "tokenizer",
    "chat_template": "chat template",
}
# Settings about the library that saved the configuration, not about the model.
_CONFIG_NOISE = {"transformers_version", "_name_or_path", "dtype", "torch_dtype"}
_VOCABULARY_FILES = (
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "added_tokens.json",
    "special_tokens_map.json",
)
_SIZE_NAMES = {
    "hidden_size": ("hidden_size", "n_embd", "d_model"),
    "vocab_size": ("vocab_size",),
    "num_layers": ("num_hidden_layers", "n_layer", "n_layers", "num_layers"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseIdentity:
    """A base's name, fingerprint and sizes.

    ``weights``, ``config``, ``tokenizer`` and ``chat_template`` are SHA-256 in hex. ``fingerprint``
    is the SHA-256 of these four; two bases are the same if it is equal.
    """

    name: str
    fingerprint: str
    weights: str
    config: str
    tokenizer: str
    chat_template: str
    architecture: str
    hidden_size: int
    vocab_size: int
    num_layers: int

    def to_dict(self) -> dict[str, Any]:
        """Return the identity as JSON values, as `from_dict` takes them."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, d: Mapping[str, Any]) -> BaseIdentity:
        """Return the identity that `to_dict` wrote.

        Raises:
            IdentityError: a key is unknown or missing, or the fingerprint does not match its parts.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        for key in d:
            if key not in known:
                raise IdentityError(
                    f"a base identity has no '{key}'.{nearest(key, known)} If a newer embedcache "
                    "wrote it, run: pip install --upgrade embedcache"
                )
        if missing := [key for key in known if key not in d]:
            raise IdentityError(
                f"a base identity needs {', '.join(known)}; missing are {', '.join(missing)}. "
                "Create the artefact that holds it again."
            )
        identity = cls(**d)
        if identity.fingerprint != _fingerprint(d):
            raise IdentityError(
                f"the identity of base {identity.name} was changed by hand: its fingerprint is "
                f"{identity.fingerprint[:12]}, its parts give {_fingerprint(d)[:12]}. "
                "Create the artefact that holds it again."
            )
        return identity

    def require(self, other: BaseIdentity, *, this: str, that: str) -> None:
        """Raise ``IdentityError`` unless ``other`` is the same base.

        Args:
            other: the identity to compare with.
            this: the artefact of this identity for the message, such as "the carry-on runs/a".
            that: the artefact of the other identity.
        """
        if self.fingerprint == other.fingerprint:
            return
        differing = [
            words for part, words in _PARTS.items() if getattr(self, part) != getattr(other, part)
        ]
        way_out = (
            f"The files of {self.name} have changed since. Give an exact revision "
            f"(org/name@revision), restore the files, or create {that} again."
            if self.name == other.name
            else f"Set `base=` to {self.name} or to {other.name} for both, "
            "or create one of them again."
        )
        raise IdentityError(
            f"{this} and {that} need the same base: {this} has {self.name} "
            f"({self.fingerprint[:12]}), {that} has {other.name} ({other.fingerprint[:12]}). "
            f"They differ in: {', '.join(differing)}. {way_out}"
        )


def identify(directory: Path, *, name: str) -> BaseIdentity:
    """Return the identity of the base in a directory; its weights are hashed, never loaded.

    Args:
        directory: a directory in transformers' layout.
        name: the base as the user gave it.

    Raises:
        BaseModelError: a file is missing or damaged, or the weights are not safetensors.
    """
    config = read_json(directory / "config.json")
    weight_files = _weight_files(directory)
    source = directory / SOURCE_FILE
    if source.is_file():
        # The GGUF identifies the base; the converted files depend on the version of transformers.
        made_from = read_json(source)
        parts = {part: hash_json({"part": part, **made_from}) for part in _PARTS}
    else:
        parts = {
            "weights": hash_json({file.name: weight_hash(file) for file in weight_files}),
            "config": hash_json(_without_noise(config)),
            "tokenizer": hash_json(_tokenizer(directory)),
            "chat_template": hash_json(_chat_template(directory)),
        }
    sizes = _sizes(directory, config)
    return BaseIdentity(
        name=name,
        fingerprint=_fingerprint(parts),
        **parts,
        architecture=architecture(config),
        hidden_size=sizes["hidden_size"],
        vocab_size=sizes["vocab_size"],
        num_layers=sizes["num_layers"],
    )


def tokenizer_hash(directory: Path) -> str:
    """Return the ``tokenizer`` part of a base's identity, without hashing its weights.

    Raises:
        BaseModelError: a file is missing or damaged.
    """
    source = directory / SOURCE_FILE
    if source.is_file():
        return hash_json({"part": "tokenizer", **read_json(source)})
    return hash_json(_tokenizer(directory))


def _fingerprint(parts: Mapping[str, Any]) -> str:
    return hash_json({part: parts[part] for part in _PARTS})


def _weight_files(directory: Path) -> list[Path]:
    if (directory / "adapter_config.json").is_file():
        raise BaseModelError(
            f"a base is a complete model; found a PEFT adapter in {directory}. Merge it first: "
            "model.merge_and_unload().save_pretrained('merged')"
        )
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        pickles = sorted([*directory.glob("*.bin"), *directory.glob("*.pt*")])
        found = f"only {pickles[0].name}, a pickle," if pickles else "none"
        raise BaseModelError(
            f"a base's weights are *.safetensors files; found {found} in {directory}. embedcache "
            "never reads pickles, because they can run code. If you trust the file, convert it: "
            "AutoModelForCausalLM.from_pretrained(directory).save_pretrained('converted')"
        )
    return files


def _without_noise(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_noise(v) for k, v in value.items() if k not in _CONFIG_NOISE}
    if isinstance(value, list):
        return [_without_noise(item) for item in value]
    return value


def _tokenizer(directory: Path) -> dict[str, Any]:
    settings_path = directory / "tokenizer_config.json"
    settings = read_json(settings_path) if settings_path.is_file() else {}
    special = {
        key: value
        for key, value in settings.items()
        if key.endswith(("_token", "_tokens", "_tokens_decoder"))
    }
    tokenizer_json = directory / "tokenizer.json"
    if tokenizer_json.is_file():
        vocabulary = read_json(tokenizer_json)
        # transformers changes both at each call and saves those of the last call.
        vocabulary = {k: v for k, v in vocabulary.items() if k not in ("truncation", "padding")}
    else:
        files = [directory / name for name in _VOCABULARY_FILES]
        files = [file for file in files if file.is_file()] + sorted(directory.glob("*.model"))
        if not files:
            raise BaseModelError(
                f"a base needs its tokenizer; found no tokenizer.json and no vocabulary file in "
                f"{directory}. Save it there: AutoTokenizer.from_pretrained('org/name')"
                f".save_pretrained('{directory}')"
            )
        vocabulary = {file.name: hash_file(file) for file in files}
    return {"special": special, "vocabulary": vocabulary}


def _chat_template(directory: Path) -> Any:
    template = directory / "chat_template.jinja"
    if template.is_file():
        return template.read_text(encoding="utf-8")
    settings = directory / "tokenizer_config.json"
    return (read_json(settings).get("chat_template") if settings.is_file() else None) or ""


def _sizes(directory: Path, config: Mapping[str, Any]) -> dict[str, int]:
    nested = config.get("text_config")
    text = nested if isinstance(nested, dict) else config
    sizes = {
        size: next((text[name] for name in names if isinstance(text.get(name), int)), None)
        for size, names in _SIZE_NAMES.items()
    }
    if None in sizes.values():
        # The configuration leaves a size to the default of its class in transformers.
        whole = read_config(directory).get_text_config()
        return {
            "hidden_size": whole.hidden_size,
            "vocab_size": whole.vocab_size,
            "num_layers": whole.num_hidden_layers,
        }
    return {size: int(value) for size, value in sizes.items() if value is not None}
