"""Cache a frozen language model's embeddings once, then train many small carry-ons from them.

    import embedcache

    embedcache.extract("docs/", base="builtin:smollm2-135m", out="cache")
    embedcache.train("cache", out="carryon")
    print(embedcache.evaluate("carryon", "cache"))

    model = embedcache.load("carryon")
    print(embedcache.generate(model, "def main", max_new_tokens=40))

Every name is imported when it is first used, so ``import embedcache`` takes no time.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_NAMES = {
    "BaseModelError": "errors",
    "BranchConfig": "carryon.branch.config",
    "Cache": "cache.cache",
    "CacheError": "errors",
    "CarryOn": "carryon.protocol",
    "CarryOnConfig": "carryon.config",
    "CarryOnError": "errors",
    "ComposedModel": "compose.model",
    "CorpusConfig": "corpus.config",
    "CorpusError": "errors",
    "DeviceMemoryError": "errors",
    "EmbedcacheError": "errors",
    "ExtractSettings": "cache.format.layout",
    "IdentityError": "errors",
    "NumericsError": "errors",
    "OutputError": "errors",
    "Sampling": "compose.generate",
    "TrainConfig": "training.config",
    "UsageError": "errors",
    "append": "editing.append",
    "delete": "editing.delete",
    "evaluate": "evaluation.evaluate",
    "extract": "extraction.extract",
    "generate": "compose.generate",
    "load": "compose.load",
    "merge": "editing.merge",
    "repair": "editing.repair",
    "sweep": "training.train",
    "train": "training.train",
    "verify": "cache.verify",
}
"""The module in which each public name is defined."""

__all__ = [*_NAMES, "__version__"]

if TYPE_CHECKING:
    from embedcache.cache.cache import Cache as Cache
    from embedcache.cache.format.layout import ExtractSettings as ExtractSettings
    from embedcache.cache.verify import verify as verify
    from embedcache.carryon.branch.config import BranchConfig as BranchConfig
    from embedcache.carryon.config import CarryOnConfig as CarryOnConfig
    from embedcache.carryon.protocol import CarryOn as CarryOn
    from embedcache.compose.generate import Sampling as Sampling
    from embedcache.compose.generate import generate as generate
    from embedcache.compose.load import load as load
    from embedcache.compose.model import ComposedModel as ComposedModel
    from embedcache.corpus.config import CorpusConfig as CorpusConfig
    from embedcache.editing.append import append as append
    from embedcache.editing.delete import delete as delete
    from embedcache.editing.merge import merge as merge
    from embedcache.errors import BaseModelError as BaseModelError
    from embedcache.errors import CacheError as CacheError
    from embedcache.errors import CarryOnError as CarryOnError
    from embedcache.errors import CorpusError as CorpusError
    from embedcache.errors import DeviceMemoryError as DeviceMemoryError
    from embedcache.errors import EmbedcacheError as EmbedcacheError
    from embedcache.errors import IdentityError as IdentityError
    from embedcache.errors import NumericsError as NumericsError
    from embedcache.errors import OutputError as OutputError
    from embedcache.errors import UsageError as UsageError
    from embedcache.evaluation.evaluate import evaluate as evaluate
    from embedcache.extraction.extract import extract as extract
    from embedcache.training.config import TrainConfig as TrainConfig
    from embedcache.training.train import sweep as sweep
    from embedcache.training.train import train as train


def __getattr__(name: str) -> Any:
    if name not in _NAMES:
        raise AttributeError(f"module 'embedcache' has no attribute '{name}'")
    value = getattr(import_module(f"embedcache.{_NAMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
