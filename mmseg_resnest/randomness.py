"""All that is random in training, as a function of the seed and of how far the run is: a resumed run is the same run.

Nothing has to be saved or replayed for it, the number of workers does not matter, and a sample is augmented as it would
be with any number of processes that see as many images together.
"""

import random
from collections.abc import Iterator
from functools import partial
from itertools import islice
from logging import WARNING
from typing import Any

import numpy as np
import torch
from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.runner import Runner
from torch.utils.data import BatchSampler, Dataset, Sampler

from mmseg_resnest.registry import HOOKS
from mmseg_resnest.steps import random_state, set_random_state

SAMPLE, STEP = 0, 1  # what is random: two streams that share no numbers


def seed_generators(*key: int, gpu: bool = False) -> None:
    """Seeds the generators of Python, numpy and torch with a hash of ``key``, non-negative; the GPU's if asked to."""
    first, second, *pair = map(int, np.random.SeedSequence(key).generate_state(4))
    random.seed(first)
    np.random.seed(second)
    seed = pair[0] << 32 | pair[1]
    torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed the GPU's from a worker's process too
    if gpu:
        torch.cuda.manual_seed(seed)


@HOOKS.register_module()
class RandomnessHook(Hook):
    """Seeds each training step by (seed, rank, iteration), and each sample by (seed, its number in the run).

    A resumed run has the seed of its checkpoint, and goes on in the order of the sampler; an epoch that was broken off
    goes on with its next batch. It costs 40 us a step, and as much a sample, in the loader's workers.
    """

    priority = 'VERY_HIGH'  # before the hook that keeps a step's random state

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Gives the sampler, which is already built, the seed that the Runner is about to take from a checkpoint."""
        seed = checkpoint.get('meta', {}).get('seed')
        sampler = runner.train_dataloader.sampler
        if runner._resume and seed is not None and getattr(sampler, 'seed', None) == runner.seed:
            sampler.seed = seed

    def before_train(self, runner: Runner) -> None:
        """Numbers the samples of the data loader, before it starts its workers."""
        loader = runner.train_dataloader
        self._numbered = None
        # Whether the first epoch is one that the run goes on with.
        self._broken_off = _by_epoch(runner) and _has_epochs_as_before(runner)
        if type(loader.batch_sampler) is not BatchSampler:
            print_log('A sampler of whole batches: augmentation will not go on exactly after a resume', 'current')
            return
        sampler = loader.batch_sampler.sampler
        if not isinstance(sampler, _Numbered):
            sampler = loader.batch_sampler.sampler = _Numbered(loader.batch_sampler, runner.rank, runner.world_size)
        self._numbered = sampler
        # In an iteration-based run MMEngine is about to skip what was seen: by the sampler itself where it can skip,
        # whose numbers begin here, and else by the numbered one.
        sampler.next = runner.iter * loader.batch_size if hasattr(sampler.sampler, 'skip') else 0
        loader.dataset.__getitems__ = partial(_seeded_items, loader.dataset, runner.seed)

    def before_train_epoch(self, runner: Runner) -> None:
        """Lets the first epoch of an epoch-based run begin where it was broken off."""
        if self._numbered is None or hasattr(self._numbered.sampler, 'skip') or not _by_epoch(runner):
            return
        loader, numbered = runner.train_dataloader, self._numbered
        numbered.epoch, numbered.next = runner.epoch, runner.epoch * len(numbered.sampler)
        done = runner.iter - runner.epoch * len(loader) if self._broken_off else 0
        self._broken_off = False
        if not 0 <= done <= len(loader):  # of MMEngine's own, which does not tell how many batches an epoch had
            done = 0
        numbered.skip(min(done * loader.batch_size, len(numbered.sampler)))  # the last batch may be smaller

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        """Seeds what the step draws: dropout."""
        seed_generators(runner.seed, STEP, runner.rank, runner.iter, gpu=torch.cuda.is_available())


def _by_epoch(runner: Runner) -> bool:
    return hasattr(runner.train_loop, 'run_epoch')


def _has_epochs_as_before(runner: Runner) -> bool:
    """Whether epochs have as many batches as before the resume, by which their beginnings are known; says it if not."""
    batches, before = len(runner.train_dataloader), runner.message_hub.runtime_info.get('batches')
    runner.message_hub.update_info('batches', batches)
    if before not in (None, batches):
        print_log(f'Epochs have {batches} batches and had {before}: the next one is a whole one', 'current', WARNING)
        return False
    return True


class _Numbered(Sampler):
    """A sampler's indices, each with its number in the run, which no other process or epoch has.

    Attributes:
        epoch: Which pass over the sampler begins next; the sampler is told, if it wants to know.
        next: How many samples this process has drawn since the run began.
    """

    def __init__(self, batches: BatchSampler, rank: int, world_size: int) -> None:
        self.sampler, self.batch_size, self.drop_last = batches.sampler, batches.batch_size, batches.drop_last
        self.rank, self.world_size = rank, world_size
        self.epoch = self.next = 0
        self._begun: Iterator[tuple[int, Any]] | None = None

    def __iter__(self) -> Iterator[tuple[int, Any]]:
        begun, self._begun = self._begun, None
        return begun or self._pass()

    def _pass(self) -> Iterator[tuple[int, Any]]:
        if hasattr(self.sampler, 'set_epoch'):  # MMEngine, after a resume, would count from 0
            self.sampler.set_epoch(self.epoch)
        self.epoch += 1
        for index in self.sampler:
            number, self.next = self.next, self.next + 1
            yield number * self.world_size + self.rank, index

    def skip(self, num_samples: int) -> None:
        """Draws what the first ``num_samples / batch_size`` batches had, pass by pass, and loads none of it.

        Args:
            num_samples: As if each batch were full; the last one of a pass may be smaller, or dropped.
        """
        self._begun = self._pass()
        while num_samples > 0:
            drawn = sum(1 for _ in islice(self._begun, num_samples))
            if drawn == num_samples:
                return
            batches = drawn // self.batch_size if self.drop_last else -(-drawn // self.batch_size)
            if not batches:
                raise ValueError(f'{type(self.sampler).__name__}: a pass gives {drawn} samples, less than one batch')
            num_samples -= batches * self.batch_size
            self._begun = self._pass()

    def __len__(self) -> int:
        return len(self.sampler)


def _seeded_items(dataset: Dataset, seed: int, numbered: list[tuple[int, Any]]) -> list:
    """What torch's loader calls for a batch: its samples, each made with generators seeded by its number."""
    state = random_state()  # without workers the generators are those of the training process
    samples = []
    try:
        for number, index in numbered:
            seed_generators(seed, SAMPLE, number)
            samples.append(dataset[index])
    finally:
        set_random_state(state)
    return samples
