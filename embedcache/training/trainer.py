"""Training carry-ons on one cache: those of one shape stacked, each as if it were alone."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby

import torch

from embedcache.cache.loader import BatchLoader
from embedcache.cache.reader import Cache
from embedcache.cache.sample import sample_embeddings
from embedcache.cache.subset import Documents, Subset
from embedcache.carryon.model import CarryOn
from embedcache.device import free_memory, resolve_dtype, training_dtype
from embedcache.disk import writing
from embedcache.errors import EmbedcacheError
from embedcache.evaluate import EVAL_TOKENS, FrozenInputs
from embedcache.loss import Shortlist, tail_proposal
from embedcache.progress import Bar, Progress
from embedcache.training.feed import Feed
from embedcache.training.member import Member
from embedcache.training.ranks import ALONE, Ranks
from embedcache.training.scoring import DevLoss, dev_losses
from embedcache.training.stack import Stack, Work

Patterns = tuple[str, ...]

CPU_STACK_BYTES = 400 << 20
"""Of what a stack works on, at most, on a CPU."""

PROPOSAL_POSITIONS = 4096
"""Positions whose probabilities say what a shortlist's tail is drawn from."""


class Trainer:
    """What all that is trained on one cache shares: its splits, the head, the base's own scores."""

    def __init__(
        self, cache: Cache, device: torch.device, progress: Progress, ranks: Ranks = ALONE
    ):
        self.cache, self.device, self.progress, self.ranks = cache, device, progress, ranks
        self.train = cache.split("train")
        self._splits = {"train": self.train}
        if cache.has("dev"):
            self._splits["dev"] = cache.split("dev")
        self._documents: dict[str, Documents] = {}
        self._subsets: dict[tuple[str, Patterns], Subset] = {}
        self._base_dev: dict[Patterns, float | None] = {}
        self._samples: dict[tuple[str, ...], dict[str, torch.Tensor]] = {}
        self._frozen: dict[tuple[bool, torch.dtype], FrozenInputs] = {}
        self._proposal_V: torch.Tensor | None = None

    def subset(self, split: str, patterns: Patterns) -> Subset | None:
        """Return the documents of a split that match, None for all.

        Raises ``UsageError`` where none of train does; dev may be empty.
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

    def epoch_tokens(self, patterns: Patterns) -> int:
        """Return the train tokens of the documents that match; raises ``UsageError`` for none."""
        subset = self.subset("train", patterns)
        return self.train.manifest.tokens if subset is None else subset.tokens

    def sample(self, taps: tuple[str, ...]) -> dict[str, torch.Tensor]:
        """Return embeddings to calibrate on; raises ``NumericsError`` if some are not finite."""
        if taps not in self._samples:
            self._samples[taps] = sample_embeddings(self.train, taps)
        return self._samples[taps]

    def stacks(self, members: Sequence[Member]) -> Iterator[list[Member]]:
        """Yield the members in lists that one `run` can train: of one shape, and few enough."""

        def kind(member: Member) -> str:
            config = member.config
            return repr((config.carryon, member.loss, config.samples))

        for _, group in groupby(sorted(members, key=kind), key=kind):
            stack = list(group)
            size = self._most(stack)
            for start in range(0, len(stack), size):
                yield stack[start : start + size]

    def _most(self, members: Sequence[Member]) -> int:
        """Return how many of one shape to train at once, by a rough estimate of what each takes.

        On a GPU what half of its free memory holds; a CPU is slower where that leaves its caches.
        """
        config, hidden = members[0].config.carryon, self.cache.attributes.base["hidden_size"]
        tokens = max(self._batch_tokens(member) for member in members)
        values = 12 * hidden + 40 * config.width * config.blocks
        size = 2 if self.device.type == "cuda" else 4
        weights = 24 * CarryOn(config, hidden).parameter_count()
        room = free_memory(self.device) // 2
        if self.device.type == "cpu":
            room = min(room, CPU_STACK_BYTES)
        return max(1, room // (tokens * values * size + weights))

    def run(self, members: Sequence[Member]) -> None:
        """Train members of one shape and one loss until each is finished or has failed."""
        config = members[0].config
        taps, hidden = config.carryon.taps, self.cache.attributes.base["hidden_size"]
        inputs = self._inputs(config.carryon.token_input)
        sample = self.sample(taps)
        begun: list[tuple[Member, CarryOn]] = []
        for member in members:
            with failing(member):
                begun.append((member, member.begin(hidden, sample)))
        for member, _ in begun:
            with failing(member):
                member.take_base(self._base(member, inputs))
        begun = sorted((one for one in begun if one[0].failure is None), key=self._place)
        if not begun:
            return
        proposal_V = None
        if members[0].loss == "shortlist":
            proposal_V = self._proposal(sample["final"], inputs)
        stack = Stack(
            [model for _, model in begun],
            [member.config for member, _ in begun],
            self._inputs(config.carryon.token_input, training_dtype(self.device)),
            proposal_V,
            self.ranks,
        )
        for index, (member, _) in enumerate(begun):
            member.enter(stack, index)
        feeds = [
            Feed(self._train_loader(group[0][0]), [member for member, _ in group])
            for group in (list(group) for _, group in groupby(begun, key=self._place))
        ]
        total = sum(member.total for member, _ in begun)
        with self.progress.bar("training", total, "tok") as bar:
            bar.advance(sum(member.state.tokens for member, _ in begun))
            _Run(self, inputs, stack, feeds, bar).train()

    def _inputs(self, tokens: bool, dtype: torch.dtype | None = None) -> FrozenInputs:
        """Return what is used of the base, read once for a dtype; by default that of scoring."""
        dtype = dtype or resolve_dtype("auto", self.device)
        if (tokens, dtype) not in self._frozen:
            found = FrozenInputs(self.cache, self.device, tokens=tokens, dtype=dtype)
            self._frozen[tokens, dtype] = found
        return self._frozen[tokens, dtype]

    def _proposal(self, x_NH: torch.Tensor, inputs: FrozenInputs) -> torch.Tensor:
        """Return what shortlists are drawn by, from some positions, computed once."""
        if self._proposal_V is None:
            some = torch.linspace(0, len(x_NH) - 1, min(len(x_NH), PROPOSAL_POSITIONS)).long()
            x_NH = x_NH[some].to(self.device, inputs.dtype)
            self._proposal_V = tail_proposal(x_NH, inputs.head)
        return self._proposal_V

    def score(
        self,
        patterns: Patterns,
        taps: tuple[str, ...],
        inputs: FrozenInputs,
        stack: CarryOn | None,
        shortlist: Shortlist | None = None,
    ) -> list[DevLoss] | None:
        """Return the dev loss of each carry-on of a stack (of the base alone); None without dev."""
        subset = self.subset("dev", patterns) if "dev" in self._splits else None
        if "dev" not in self._splits or (subset is not None and not subset.tokens):
            return None
        split = self._splits["dev"]
        loader = BatchLoader(
            split,
            batch_tokens=EVAL_TOKENS,
            taps=taps,
            shuffle=False,
            device=self.device,
            subset=subset,
            rank=self.ranks.rank,
            ranks=self.ranks.count,
        )
        title = "scoring the base on dev" if stack is None else "scoring dev"
        tokens = split.manifest.tokens if subset is None else subset.tokens
        with self.progress.bar(title, tokens, "tok") as bar:
            return dev_losses(loader.epoch(0), inputs, stack, shortlist, bar.advance, self.ranks)

    def _base(self, member: Member, inputs: FrozenInputs) -> float | None:
        """Return the base's dev loss on a member's documents; it is computed once."""
        patterns = member.config.documents
        if patterns not in self._base_dev:
            found = member.state.base_dev
            if found is None and (scores := self.score(patterns, ("final",), inputs, None)):
                found = scores[0].exact
            if found is None:
                which = f" of {', '.join(patterns)}" if patterns else ""
                self.progress.say(f"this cache has no dev split{which}: the last epoch is kept")
            self._base_dev[patterns] = found
        return self._base_dev[patterns]

    def _batch_tokens(self, member: Member) -> int:
        """Return the tokens of a step that this process gives."""
        step = member.config.steps_tokens(self.epoch_tokens(member.config.documents))
        return -(-step // self.ranks.count)

    def _place(self, begun: tuple[Member, CarryOn]) -> tuple[object, ...]:
        """Return where a member is in which order of batches: those at one place go in step."""
        config, state = begun[0].config, begun[0].state
        order = (config.documents, config.order, self._batch_tokens(begun[0]))
        return (*order, state.epoch, state.position)

    def _train_loader(self, member: Member) -> BatchLoader:
        return BatchLoader(
            self.train,
            batch_tokens=self._batch_tokens(member),
            taps=member.config.carryon.taps,
            seed=member.config.order,
            device=self.device,
            subset=self.subset("train", member.config.documents),
            rank=self.ranks.rank,
            ranks=self.ranks.count,
        )


class _Run:
    """The loop over a stack. Its rows are the feeds' members, in order."""

    def __init__(
        self, trainer: Trainer, inputs: FrozenInputs, stack: Stack, feeds: list[Feed], bar: Bar
    ):
        self._trainer, self._inputs, self._stack = trainer, inputs, stack
        self._feeds, self._bar = feeds, bar

    def train(self) -> None:
        """Step until no member is left."""
        self._let_go()
        while self._feeds:
            started = time.perf_counter()
            ended = [feed for feed in self._feeds if not feed.advance()]
            if ended:
                for feed in ended:
                    self._end_epoch(feed)
            else:
                self._step(started)
            self._let_go()

    def _rows(self) -> list[tuple[int, Member]]:
        return list(enumerate(member for feed in self._feeds for member in feed.members))

    def _step(self, started: float) -> None:
        batches = [feed.batch for feed in self._feeds if feed.batch is not None]
        here = [(batch.tokens, len(batch.targets_N)) for batch in batches]
        everywhere = self._trainer.ranks.totals(here, self._trainer.device)
        work = [
            Work(
                batch=batch,
                tokens=tokens,
                targets=targets,
                rate=member.rate(tokens),
                step=member.state.step,
                samples=member.config.samples,
                order=member.config.order,
            )
            for feed, batch, (tokens, targets) in zip(self._feeds, batches, everywhere, strict=True)
            for member in feed.members
        ]
        losses, norms = self._stack.gradients(work)
        for (index, member), loss, norm in zip(self._rows(), losses, norms, strict=True):
            with failing(member):
                try:
                    member.require_finite(loss, norm)
                except EmbedcacheError:
                    member.save(self._stack, index)
                    raise
        self._stack.step(work)
        seconds = time.perf_counter() - started
        for (index, member), one, loss, norm in zip(self._rows(), work, losses, norms, strict=True):
            if member.failure is not None:
                continue
            with failing(member):
                member.count(
                    loss=loss,
                    norm=norm,
                    rate=one.rate,
                    tokens=one.tokens,
                    targets=one.targets,
                    batches=self._trainer.ranks.count,
                    seconds=seconds,
                )
                member.save_if_due(self._stack, index)
            self._bar.advance(one.tokens, f"loss {member.train_loss:.4f}")
        for feed in self._feeds:
            feed.batch = None

    def _end_epoch(self, feed: Feed) -> None:
        """Score dev and save."""
        rows = [(index, member) for index, member in self._rows() if member in feed.members]
        config = rows[0][1].config
        stack = self._stack.model
        if len(self._feeds) > 1:
            stack = CarryOn.stack([self._stack.alone(index) for index, _ in rows])
        scores = self._trainer.score(
            config.documents,
            config.carryon.taps,
            self._inputs,
            stack.to(self._trainer.device),
            self._stack.shortlist(config.samples, config.order),
        )
        for number, (index, member) in enumerate(rows):
            with failing(member):
                dev = None if scores is None else scores[number]
                member.end_epoch(dev, self._stack.model.member(index))
                member.save(self._stack, index)

    def _let_go(self) -> None:
        """Let those leave the stack that are finished or have failed."""
        cache, left = self._trainer.cache, []
        for index, member in self._rows():
            if member.failure is None and member.done:
                with failing(member):
                    member.finish(cache.attributes, cache.manifest)
            elif member.failure is None:
                left.append((index, member))
        staying = [member for _, member in left]
        if len(left) < len(self._rows()):
            for feed in self._feeds:
                feed.members = [member for member in feed.members if member in staying]
            self._feeds = [feed for feed in self._feeds if feed.members]
            if left:
                self._stack = self._stack.keep([index for index, _ in left])


@contextmanager
def failing(member: Member) -> Iterator[None]:
    """Take an error as the end of one member, not of those beside it."""
    try:
        with writing(member.out):
            yield
    except (EmbedcacheError, OSError) as error:
        member.failure = error
