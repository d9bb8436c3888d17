"""Which base this is: a fingerprint of its weights, configuration, tokenizer and chat template.

Read from the files of a directory in transformers' layout, without loading any weights.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from embedcache.base.weight_hash import weight_hash
from embedcache.errors import BaseModelError, IdentityError, nearest
from embedcache.store.files import hash_file, hash_json

SOURCE_FILE = "embedcache_source.json"
"""Left by a converter beside the files it wrote: ``{"gguf_sha256": ..., "converter": ...}``."""

_PARTS = {
    "weights": "weights",
    "config": "config",
    "tokenizer": "tokenizer",
    "chat_template": "chat template",
}
# What the saving library writes down about itself, not about the model.
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
    """A base's name and fingerprint, and the sizes that its embeddings and head have.

    ``fingerprint`` is the SHA-256 of the four parts ``weights``, ``config``, ``tokenizer`` and
    ``chat_template``, themselves SHA-256 in hex; two bases are the same where it is.
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
        """Return the identity as JSON values, as ``from_dict`` takes it."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, d: Mapping[str, Any]) -> BaseIdentity:
        """Return the identity that ``to_dict`` wrote.

        Raises ``IdentityError`` if a key is unknown or missing, or the fingerprint is not that
        of its parts.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        for key in d:
            if key not in known:
                raise IdentityError(
                    f"a base identity has no '{key}'.{nearest(key, known)} Was it written by a "
                    "newer embedcache? Type: pip install --upgrade embedcache"
                )
        if missing := [key for key in known if key not in d]:
            raise IdentityError(
                f"a base identity needs {', '.join(known)}; found none of: {', '.join(missing)}. "
                "Make the artefact that holds it again."
            )
        identity = cls(**d)
        if identity.fingerprint != _fingerprint(d):
            raise IdentityError(
                f"the identity of base {identity.name} was changed by hand: its fingerprint is "
                f"{identity.fingerprint[:12]}, its parts give {_fingerprint(d)[:12]}. "
                "Make the artefact that holds it again."
            )
        return identity

    def require(self, other: BaseIdentity, *, this: str, that: str) -> None:
        """Raise ``IdentityError`` unless both are the same base.

        ``this`` and ``that`` say what the two identities belong to, such as "the carry-on runs/a".
        """
        if self.fingerprint == other.fingerprint:
            return
        differing = [
            words for part, words in _PARTS.items() if getattr(self, part) != getattr(other, part)
        ]
        way_out = (
            f"The files behind {self.name} have changed since: name an exact revision "
            f"(org/name@revision) or restore the files, or make {that} again."
            if self.name == other.name
            else f"Use {self.name} for both, or {other.name} for both (--base {self.name}), "
            "or make one of them again."
        )
        raise IdentityError(
            f"{this} and {that} need the same base: {this} has {self.name} "
            f"({self.fingerprint[:12]}), {that} has {other.name} ({other.fingerprint[:12]}). "
            f"They differ in: {', '.join(differing)}. {way_out}"
        )


def identify(directory: Path, *, name: str) -> BaseIdentity:
    """Return the identity of the base in ``directory``; its weights are hashed, never loaded.

    ``name`` is what the user typed. Raises ``BaseModelError`` if a file is missing or damaged,
    or the weights are not safetensors.
    """
    config = read_json(directory / "config.json")
    weight_files = _weight_files(directory)
    source = directory / SOURCE_FILE
    if source.is_file():
        # The GGUF is the base; what another version of transformers makes of it is not.
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
    """Return the ``tokenizer`` part of the identity of the base in ``directory``, and no other.

    Weights are not hashed for it. Raises ``BaseModelError`` as `identify` does.
    """
    source = directory / SOURCE_FILE
    if source.is_file():
        return hash_json({"part": "tokenizer", **read_json(source)})
    return hash_json(_tokenizer(directory))


def architecture(config: Mapping[str, Any]) -> str:
    """Return the class that a parsed config.json names, else its model type.

    >>> architecture({"architectures": ["LlamaForCausalLM"], "model_type": "llama"})
    'LlamaForCausalLM'
    """
    declared = config.get("architectures") or [config.get("model_type", "unknown")]
    return str(declared[0])


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in ``path``; raise ``BaseModelError`` if there is none."""
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise BaseModelError(
            f"a base is a directory with config.json, *.safetensors and tokenizer files; "
            f"found no {path}. Check the path, or download the model again."
        ) from error
    except ValueError as error:
        raise BaseModelError(
            f"{path} should hold JSON; found: {error}. Download the model again."
        ) from error
    if not isinstance(value, dict):
        raise BaseModelError(
            f"{path} should hold a JSON object; found a {type(value).__name__}. "
            "Download the model again."
        )
    return value


def _fingerprint(parts: Mapping[str, Any]) -> str:
    return hash_json({part: parts[part] for part in _PARTS})


def _weight_files(directory: Path) -> list[Path]:
    if (directory / "adapter_config.json").is_file():
        raise BaseModelError(
            f"a base is a whole model; found a PEFT adapter in {directory}. Merge it first: "
            "model.merge_and_unload().save_pretrained('merged')"
        )
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        pickles = sorted([*directory.glob("*.bin"), *directory.glob("*.pt*")])
        found = f"only {pickles[0].name}, a pickle," if pickles else "none"
        raise BaseModelError(
            f"a base's weights are *.safetensors files; found {found} in {directory}. embedcache "
            "never reads pickles, which can run code. Convert them where you trust them: "
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
    whole = directory / "tokenizer.json"
    if whole.is_file():
        vocabulary = read_json(whole)
        # transformers sets both anew at each call, and saves the last call's.
        vocabulary = {k: v for k, v in vocabulary.items() if k not in ("truncation", "padding")}
    else:
        files = [directory / name for name in _VOCABULARY_FILES]
        files = [file for file in files if file.is_file()] + sorted(directory.glob("*.model"))
        if not files:
            raise BaseModelError(
                f"a base needs its tokenizer; found no tokenizer.json and no vocabulary in "
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
        # Some configurations leave a size to the class's default, which transformers knows.
        from embedcache.base.quiet import read_config

        whole = read_config(directory).get_text_config()
        return {
            "hidden_size": whole.hidden_size,
            "vocab_size": whole.vocab_size,
            "num_layers": whole.num_hidden_layers,
        }
    return {size: int(value) for size, value in sizes.items() if value is not None}
