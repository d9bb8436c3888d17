"""The inputs that all runs on one cache share: its splits, and the frozen parts of its base."""

from __future__ import annotations

import torch

from embedcache.base.head import Head
from embedcache.cache.cache import Cache
from embedcache.cache.format.layout import LIKELY
from embedcache.carryon.config import CarryOnConfig
from embedcache.carryon.protocol import InputStats
from embedcache.data.frozen import FrozenInputs
from embedcache.data.loader import BatchLoader
from embedcache.data.sample import sample_embeddings
from embedcache.data.subset import Documents, Subset
from embedcache.device import fast_dtype, resolve_dtype
from embedcache.evaluation.scores import EVAL_TOKENS
from embedcache.loss import ShortlistSampler, tail_proposal
from embedcache.loss.shortlist.sampler import DRAWS, DRAWS_BESIDE_TOP_IDS
from embedcache.training.config import TrainConfig
from embedcache.training.distributed import Ranks
from embedcache.training.step.settings import StepSettings

Patterns = tuple[str, ...]

PROPOSAL_POSITIONS = 4096
"""Number of positions whose probabilities give the distribution that shortlists sample from."""
HOST_PROPOSAL_POSITIONS = 1024
"""The same number if a CPU computes the probabilities for a GPU, within a memory budget."""


class TrainingInputs:
    """Reads each part of a cache once, when it is first needed."""

    def __init__(self, cache: Cache, device: torch.device, ranks: Ranks):
        self.cache, self.device, self.ranks = cache, device, ranks
        self.hidden: int = cache.attributes.base["hidden_size"]
        self.train = cache.split("train")
        self._splits = {"train": self.train}
        if cache.has("dev"):
            self._splits["dev"] = cache.split("dev")
        self._documents: dict[str, Documents] = {}
        self._subsets: dict[tuple[str, Patterns], Subset] = {}
        self._samples: dict[tuple[str, ...], dict[str, torch.Tensor]] = {}
        self._input_stats: dict[tuple[str, ...], dict[str, InputStats]] = {}
        self._frozen: dict[tuple[frozenset[str], torch.dtype, bool], FrozenInputs] = {}
        self._proposal_V: torch.Tensor | None = None

    def subset(self, split: str, patterns: Patterns) -> Subset | None:
        """Return the documents of a split that match the patterns; None means all documents.

        Raises ``UsageError`` if no document of train matches. For dev, the result may be empty.
        """
        if not patterns:
            return None
        if split not in self._documents:
            self._documents[split] = Documents(self._splits[split])
        if (split, patterns) not in self._subsets:
            documents = self._documents[split]
            find = documents.require if split == "train" else documents.matching
            self._subsets[split, patterns] = find(patterns)
        return self._subsets[split, patterns]

    def tokens(self, split: str, patterns: Patterns) -> int:
        """Return the number of tokens in the matching documents of a split; 0 without the split.

        Raises ``UsageError`` if no document of train matches.
        """
        if split not in self._splits:
            return 0
        subset = self.subset(split, patterns)
        return self._splits[split].manifest.tokens if subset is None else subset.tokens

    def batch_tokens(self, config: TrainConfig) -> int:
        """Return the number of tokens of a step that this process computes."""
        step = config.steps_tokens(self.tokens("train", config.documents))
        return -(-step // self.ranks.count)

    def order(self, config: TrainConfig) -> tuple[object, ...]:
        """Return the settings that determine the order of batches."""
        return config.documents, config.order, self.batch_tokens(config)

    def sample(self, taps: tuple[str, ...]) -> dict[str, torch.Tensor]:
        """Return embeddings to calibrate on; raises ``NumericsError`` if some are not finite."""
        if taps not in self._samples:
            self._samples[taps] = sample_embeddings(self.train, taps)
        return self._samples[taps]

    def input_stats(self, taps: tuple[str, ...]) -> dict[str, InputStats]:
        """Return the mean and deviation of each tap's components, from a sample."""
        if taps not in self._input_stats:
            sample = self.sample(taps)
            self._input_stats[taps] = {tap: InputStats.of(sample[tap]) for tap in taps}
        return self._input_stats[taps]

    def frozen(
        self, carryon: CarryOnConfig, settings: StepSettings, *, training: bool = False
    ) -> FrozenInputs:
        """Return the frozen parts of the base, in the dtype of scoring or of ``training``."""
        dtype = fast_dtype(self.device) if training else resolve_dtype("auto", self.device)
        key = (carryon.base_arrays, dtype, settings.host_head)
        if key not in self._frozen:
            arrays, dtype, host_head = key
            # Drop arrays of earlier settings, which ran out of memory, and of other carry-ons.
            self._frozen = {
                k: v for k, v in self._frozen.items() if (k[0], k[2]) == (arrays, host_head)
            }
            self._frozen[key] = FrozenInputs(
                self.cache, self.device, arrays=arrays, dtype=dtype, host_head=host_head
            )
        return self._frozen[key]

    def shortlist(self, config: TrainConfig, settings: StepSettings) -> ShortlistSampler:
        """Return the sampler of the shortlists that a carry-on is trained with."""
        if self._proposal_V is None:
            frozen = self.frozen(config.carryon, settings)
            x_NH, home = self.sample(config.carryon.taps)["final"], frozen.head.weight_VH.device
            head, most = frozen.head, PROPOSAL_POSITIONS
            if settings.logit_bytes is not None and self.device.type == "cuda":
                # Probabilities over the whole vocabulary take much memory: the CPU computes fewer.
                home, most = torch.device("cpu"), HOST_PROPOSAL_POSITIONS
                head = Head.from_parts(
                    head.weight_VH.cpu(),
                    None if head.bias_V is None else head.bias_V.cpu(),
                    head.settings,
                )
            some = torch.linspace(0, len(x_NH) - 1, min(len(x_NH), most)).long()
            self._proposal_V = tail_proposal(
                x_NH[some].to(home, frozen.dtype), head, held=LIKELY if self.train.top_ids else None
            )
        head = self.frozen(config.carryon, settings, training=True).head
        proposal_V = self._proposal_V.to(self.device)
        return ShortlistSampler(head, proposal_V, samples=self.draws(config), seed=config.order)

    def draws(self, config: TrainConfig) -> int:
        """Return the approximate number of tokens that a shortlist samples."""
        return config.samples or (DRAWS_BESIDE_TOP_IDS if self.train.top_ids else DRAWS)

    def train_loader(
        self, config: TrainConfig, settings: StepSettings, *, kept_bytes: int = 0
    ) -> BatchLoader:
        """Return the batches that a carry-on is trained on, in the order of its seed."""
        return BatchLoader(
            self.train,
            batch_tokens=self.batch_tokens(config),
            taps=config.carryon.taps,
            seed=config.order,
            device=self.device,
            subset=self.subset("train", config.documents),
            rank=self.ranks.rank,
            ranks=self.ranks.count,
            one_row=settings.one_row,
            part_tokens=settings.part_tokens,
            ahead=settings.ahead,
            kept_bytes=kept_bytes,
            top_ids=self.train.top_ids > 0,
        )

    def dev_loader(
        self, patterns: Patterns, taps: tuple[str, ...], settings: StepSettings
    ) -> BatchLoader:
        """Return the batches of dev, for scoring."""
        return BatchLoader(
            self._splits["dev"],
            batch_tokens=min(EVAL_TOKENS, settings.part_tokens or EVAL_TOKENS),
            taps=taps,
            shuffle=False,
            device=self.device,
            subset=self.subset("dev", patterns),
            rank=self.ranks.rank,
            ranks=self.ranks.count,
            one_row=settings.one_row,
            ahead=settings.ahead,
            top_ids=self._splits["dev"].top_ids > 0,
        )
