"""How a run's checkpoints are written, so that a whole one is there at any moment, and how it is found again."""

import contextlib
import difflib
import inspect
import os
import re
import zipfile
import zlib
from collections import deque
from logging import WARNING
from pathlib import Path, PurePath
from uuid import uuid4

from mmengine.dist import all_gather_object, broadcast_object_list, is_main_process
from mmengine.fileio import LocalBackend, register_backend
from mmengine.hooks import CheckpointHook as _CheckpointHook
from mmengine.logging import print_log
from mmengine.runner import IterBasedTrainLoop, Runner
from mmengine.runner import runner as mmengine_runner

from mmseg_resnest.checkpoints import check_sums, plain, read_meta, why_refused
from mmseg_resnest.registry import HOOKS
from mmseg_resnest.work_dir import claim, release

PARTIAL = '.partial'  # what the name of a file ends with until it is whole
LAST = 'last_checkpoint'  # the file of a work dir that names the newest one
BACKEND = 'mmseg_resnest.whole_files'
NAME = r'(iter|epoch)_\d+\.pth'


def write_whole(path: str | Path, content: bytes | memoryview) -> None:
    """Writes a file that is there as a whole or, killed at whatever moment, as it was before.

    Written aside, forced to the disk, renamed.

    Raises:
        OSError: It could not be written, as on a full disk; what was there before still is.
    """
    path = Path(path)
    partial = path.with_name(path.name + PARTIAL)
    try:
        with partial.open('wb') as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise OSError(
            f'{path}: {len(content)} bytes could not be written ({error.strerror}). What was saved before is whole: '
            'free some space and go on with --resume, or name another place with --work-dir and there the last '
            'checkpoint of this one with --resume PATH'
        ) from error
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """Forces a renaming to the disk, where the file system can."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


class WholeFiles(LocalBackend):
    """MMEngine's file backend of local disks, which writes as ``write_whole`` does."""

    def put(self, obj: bytes | memoryview, filepath: str | Path) -> None:
        """Writes ``obj`` to a file, whose folder is made if need be."""
        Path(filepath).parent.mkdir(parents=True, exist_ok=True)
        write_whole(filepath, obj)


register_backend(BACKEND, WholeFiles)


@HOOKS.register_module()
class CheckpointHook(_CheckpointHook):
    """MMEngine's CheckpointHook, whose files are whole, and which deletes an old one only when the next one is there.

    ``last_checkpoint`` names the newest one relative to the work dir, which may move. The file's checksums, which
    torch writes, are verified by whatever loads it here.

    Args:
        **kwargs: MMEngine's. ``backend_args`` for another place than a local disk writes as that backend does.

    Raises:
        ValueError: MMEngine has no such option; its own hook fails at the first save.
    """

    def __init__(self, **kwargs) -> None:
        super().__init__(**kwargs)
        for name in self.args:
            close = difflib.get_close_matches(name, inspect.signature(_CheckpointHook).parameters, n=1)
            hint = f'did you mean {close[0]}?' if close else 'drop it'
            raise ValueError(f'default_hooks.checkpoint: the hook has no option {name}; {hint}')
        if self.backend_args is None and self.file_client_args is None and '://' not in str(self.out_dir):
            self.backend_args = dict(backend=BACKEND)
        self._noted: int | None = None  # what the newest file says is evaluated
        self._save: dict = {}  # which of the run's saves it is; of one iteration all are one
        self._sources: list[str] = []  # what the run has gone on from, one after the other

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Notes which save the run goes on from, and which that one's run did."""
        meta = checkpoint.get('meta') or {}
        self._save = dict(id=_save_of(meta).get('id'))
        self._sources = _sources_of(meta)

    def before_train(self, runner: Runner) -> None:
        """Clears away what a killed run was writing, and finds the best one where the work dir is now.

        Raises:
            ValueError: Another run has the work dir, or what would be saved could not be read again.
        """
        claim(runner.work_dir)
        self._check_readable(runner)
        if self._goes_on_from_elsewhere(runner):  # whose numbers name other files here
            for name in list(runner.message_hub.runtime_info):
                if name in ('keep_ckpt_ids', 'outdated_best') or name.startswith(('best_ckpt', 'best_score')):
                    runner.message_hub.runtime_info.pop(name)
        super().before_train(runner)
        if '://' not in str(self.out_dir):
            claim(self.out_dir)
        keys = self.key_indicators if self.save_best else []
        suffixes = {key: '' if len(keys) == 1 else f'_{key}' for key in keys}
        best = {key: self._here(runner, f'best_ckpt{suffix}') for key, suffix in suffixes.items()}
        for key in keys:
            if best[key] is None:  # or nothing would be saved until the score of a file that is gone is beaten
                runner.message_hub.runtime_info.pop(f'best_score{suffixes[key]}', None)
        if len(keys) == 1:
            self.best_ckpt_path = best[keys[0]]
        elif keys:
            self.best_ckpt_path_dict = best
        for name in runner.message_hub.runtime_info.get('outdated_best', ()):
            if (old := self.file_backend.join_path(self.out_dir, name)) not in best.values():
                self._remove(old)
        if is_main_process():
            for partial in Path(self.out_dir).glob(f'*.pth{PARTIAL}'):
                partial.unlink(missing_ok=True)
        if self.max_keep_ckpts > 0:
            self.keep_ckpt_ids = deque(self.keep_ckpt_ids)  # without a limit, which would drop the oldest unseen
        resumed = self.file_backend.join_path(self.out_dir, self.filename_tmpl.format(runner.iter))
        if self._by_iteration(runner) and self.file_backend.isfile(resumed):
            self.last_ckpt = resumed
        named = _last_saved(Path(runner.work_dir))
        if runner._resume and runner._load_from and named not in (None, _in_its_folder(Path(runner._load_from))):
            self._save_again(runner)  # as its newest: killed before the next save, it goes on from there again
            self._sources = [*self._sources, self._save['id']]

    def after_run(self, runner: Runner) -> None:
        """Gives the work dir up, and the folder of the checkpoints."""
        release(runner.work_dir)
        release(self.out_dir or runner.work_dir)

    def _check_readable(self, runner: Runner) -> None:
        """Tries what is known before the first save, so that no run is lost that could not be resumed."""
        schedulers = runner.param_schedulers or []
        lists = schedulers.values() if isinstance(schedulers, dict) else [schedulers]
        checkpoint = dict(
            message_hub=runner.message_hub.state_dict(),
            meta=dict(dataset_meta=getattr(runner.train_dataloader.dataset, 'metainfo', None)),
            param_schedulers=[scheduler.state_dict() for each in lists for scheduler in each],
        )
        if reason := why_refused(_plain_parts(checkpoint)):
            raise ValueError(
                f'what is beside the weights in a checkpoint could not be read again: {reason}. Expected plain values '
                "in the data set's metainfo, in what hooks put into the message hub, and in the schedules' states"
            )
        if not (self.save_optimizer and self.save_param_scheduler):
            runner.logger.warning(
                'default_hooks.checkpoint leaves the optimizer or its schedules out (save_optimizer, '
                'save_param_scheduler): --resume cannot go on from what this run saves'
            )

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Makes plain values of what is beside the tensors: files are read without running code in them."""
        parts = _plain_parts(checkpoint)
        if is_main_process() and (reason := why_refused(parts)):
            runner.logger.warning(f'this checkpoint can only be read with --allow-pickle: {reason}')
        checkpoint['message_hub'] = checkpoint['message_hub'] | parts.pop('message_hub')
        checkpoint.update(parts)

    def before_train_epoch(self, runner: Runner) -> None:
        """Evaluates first where the checkpoint was to be evaluated and was not: the run ended in between."""
        loop = runner.train_loop
        if not self._by_iteration(runner) or runner.val_loop is None or _evaluated(runner) == runner.iter:
            return
        loop._decide_current_val_interval()  # as MMEngine does after each iteration
        due = runner.iter % loop.val_interval == 0 or runner.iter == runner.max_iters
        if due and runner.iter >= max(loop.val_begin, 1):
            runner.logger.info(f'Iteration {runner.iter} was saved and is not known to be evaluated: first that')
            runner.val_loop.run()

    def after_val_epoch(self, runner: Runner, metrics: dict) -> None:
        """Saves the best one, and notes in the checkpoint of this iteration that it is evaluated."""
        runner.message_hub.update_info('evaluated', runner.iter)
        super().after_val_epoch(runner, metrics)
        saved = Path(self.last_ckpt or '').name == self.filename_tmpl.format(runner.iter)
        if saved and self._by_iteration(runner) and self._noted != runner.iter:
            self._save_again(runner)

    def _save_again(self, runner: Runner) -> None:
        """Saves the run where it is, between two iterations."""
        meta = dict(epoch=runner.epoch, iter=runner.iter)
        if self._by_iteration(runner):
            self._save_checkpoint_with_step(runner, runner.iter, meta)
        else:
            self._write_between(runner, meta)

    def _write_between(self, runner: Runner, meta: dict) -> None:
        """Writes a checkpoint within an epoch: beside those of the epochs, and not one of those to keep."""
        name = f'iter_{meta["iter"]}.pth'
        self.last_ckpt = self.file_backend.join_path(self.out_dir, name)
        self._write(runner, name, meta)

    def _goes_on_from_elsewhere(self, runner: Runner) -> bool:
        own = _folder_of(runner.work_dir, self.out_dir)
        return bool(runner._load_from) and Path(runner._load_from).parent.resolve() != own

    def _by_iteration(self, runner: Runner) -> bool:
        return not self.by_epoch and isinstance(runner.train_loop, IterBasedTrainLoop)

    def _here(self, runner: Runner, name: str) -> str | None:
        """Returns a file of the run's by its name; its path is as the run had it, before it was moved or copied."""
        old = runner.message_hub.runtime_info.get(name)
        path = old and self.file_backend.join_path(self.out_dir, PurePath(old).name)
        if not path or not self.file_backend.isfile(path):
            return None
        runner.message_hub.update_info(name, path)
        return path

    def save_between(self, runner: Runner) -> str:
        """Saves after the current iteration, unless that has been done; returns the file."""
        saved = Path(self.last_ckpt or '').name == f'iter_{runner.iter + 1}.pth'
        if not saved and self.by_epoch:
            self._write_between(runner, dict(epoch=runner.epoch, iter=runner.iter + 1))
        elif not saved:
            self._save_checkpoint(runner)
        return self.last_ckpt

    def _save_checkpoint_with_step(self, runner: Runner, step: int, meta: dict) -> None:
        outdated = []
        if self.max_keep_ckpts > 0:
            if step not in self.keep_ckpt_ids:
                self.keep_ckpt_ids.append(step)
            # Also those that go once this one is there: if the run is killed in between, the resumed one deletes them.
            runner.message_hub.update_info('keep_ckpt_ids', list(self.keep_ckpt_ids))
            while len(self.keep_ckpt_ids) > self.max_keep_ckpts:
                outdated.append(self.filename_tmpl.format(self.keep_ckpt_ids.popleft()))
        name = self.filename_tmpl.format(step)
        self.last_ckpt = self.file_backend.join_path(self.out_dir, name)
        runner.message_hub.update_info('last_ckpt', self.last_ckpt)
        self._write(runner, name, meta)
        for old in outdated:
            self._remove(self.file_backend.join_path(self.out_dir, old))

    def _write(self, runner: Runner, name: str, meta: dict) -> None:
        self._noted = _evaluated(runner)
        counts = getattr(runner.optim_wrapper, '_accumulative_counts', 1)
        if meta['iter'] % counts and meta['iter'] < runner.max_iters:
            runner.logger.warning(
                f'{name} is saved between two steps, without the gradients that have accumulated: a resume from it is '
                f'not exact. Save and evaluate at multiples of accumulative_counts={counts}'
            )
        if self._save.get('iter') != meta['iter']:
            after = self._save.get('id')
            self._save = dict(id=uuid4().hex, after=after, iter=meta['iter'], sources=self._sources)
        runner.save_checkpoint(
            self.out_dir,
            name,
            self.file_client_args,
            save_optimizer=self.save_optimizer,
            save_param_scheduler=self.save_param_scheduler,
            meta=dict(meta, save=self._save),
            by_epoch=self.by_epoch,
            backend_args=self.backend_args,
            **self.args,
        )
        if is_main_process():
            last = self.last_ckpt
            if '://' not in last:  # real paths, since .. leads out of what a link leads to
                last = os.path.relpath(os.path.realpath(last), os.path.realpath(runner.work_dir))
            write_whole(Path(runner.work_dir) / LAST, last.encode())

    def _save_best_checkpoint(self, runner: Runner, metrics: dict) -> None:
        """Saves the best one, and deletes the one before only then: MMEngine's own, told of none, deletes nothing."""
        if not self.save_best:
            return
        single = len(self.key_indicators) == 1
        before = dict(single=self.best_ckpt_path) if single else dict(self.best_ckpt_path_dict)
        if single:
            self.best_ckpt_path = None
        else:
            self.best_ckpt_path_dict = dict.fromkeys(before)
        # Written with the new best one, since MMEngine saves the newest once more: a run that is killed before the old
        # best one is removed finds its name there.
        outdated = [PurePath(old).name for old in before.values() if old]
        runner.message_hub.update_info('outdated_best', outdated)
        super()._save_best_checkpoint(runner, metrics)
        runner.message_hub.update_info('outdated_best', [])
        for key, old in before.items():
            new = self.best_ckpt_path if single else self.best_ckpt_path_dict[key]
            if new is None and single:
                self.best_ckpt_path = old
            elif new is None:
                self.best_ckpt_path_dict[key] = old
            elif old and old != new:
                self._remove(old)

    def _remove(self, path: str) -> None:
        if is_main_process() and self.file_backend.isfile(path):
            self.file_backend.remove(path)


def _plain_parts(checkpoint: dict) -> dict:
    """Returns as plain values what a checkpoint has beside the tensors; not the log's buffers, which are long."""
    parts = {key: plain(checkpoint[key]) for key in ('meta', 'param_schedulers') if key in checkpoint}
    return parts | dict(message_hub=dict(runtime_info=plain(checkpoint['message_hub']['runtime_info'])))


def _evaluated(runner: Runner) -> int | None:
    """The iteration that was evaluated last."""
    return runner.message_hub.runtime_info.get('evaluated')


def _save_of(meta: dict) -> dict:
    """Returns a save's ``id``, and that of the one ``after`` which the run made it; MMEngine's own have none."""
    save = meta.get('save')
    return save if isinstance(save, dict) else {}


def _sources_of(meta: dict) -> list[str]:
    """Returns what a checkpoint's run had gone on from, and itself: the id of its save, or when MMEngine made it."""
    save = _save_of(meta)
    return [*save.get('sources', ()), save.get('id') or f'{meta.get("iter")} {meta.get("time")}']


def goes_on_from(newest: Path, source: str | Path) -> bool:
    """Whether a checkpoint is of a run that has gone on from another one, as far as that can be read, or that one."""
    try:
        wanted = _sources_of(read_meta(source))[-1]
    except (ValueError, OSError):
        return True
    return wanted in _sources_of(read_meta(newest))


def newest_checkpoint(work_dir: str | Path) -> tuple[Path | None, list[str]]:
    """Finds the checkpoint that was saved last among those of a work dir that are whole.

    That is the one that ``last_checkpoint`` names, or the next save, if the run was killed before it was named. Others
    of later iterations, as of a run that has gone back to an earlier one, are told. Where it is not whole, it is the
    one of the highest iteration among those that are not later by their names, else of all. Looked at are
    ``iter_N.pth``, ``epoch_N.pth`` and names that are the one in ``last_checkpoint`` but for the numbers, in the work
    dir and in that one's folder.

    Args:
        work_dir: The folder; ``last_checkpoint`` in it may be MMEngine's own, with the path as the run had it.

    Returns:
        The file, None if the run has not saved yet; and for each one that was skipped its name and why.

    Raises:
        ValueError: There are checkpoints, and none is whole; or there have been, and none is there.
    """
    work_dir = Path(work_dir)
    last = _last_saved(work_dir)
    skipped, metas = [], {}
    for path in _candidates(work_dir, last):
        try:
            metas[path] = read_meta(path, may_run_code=True) | dict(mtime=path.stat().st_mtime)
        except (ValueError, OSError) as error:
            skipped.append(str(error))
    # Not by the clock, which may go back. By last_checkpoint, since a run may have gone back to an earlier one.
    save = _save_of(metas.get(last, {})).get('id')
    named = {last, *(path for path, meta in metas.items() if save and _save_of(meta).get('after') == save)}
    # Of one that is damaged or gone the name is left: what is later may be of what the run has gone back from.
    beyond = {path for path in metas if last and last not in metas and _is_later_by_name(path, last)}

    def order(path: Path) -> tuple:
        return path in named, path not in beyond, metas[path]['iter'], metas[path]['mtime']

    while metas:
        path = max(metas, key=order)
        meta = metas.pop(path)
        try:
            check_sums(path)
        except (ValueError, OSError) as error:
            skipped.append(str(error))
            continue
        if path in named:
            later = [other for other in metas if metas[other]['iter'] > meta['iter']]
        else:
            later = [other for other in metas if other in beyond]
        saved = path if path in named else last
        return path, skipped + [f'{other}: later than {saved.name}, which the run saved last' for other in later]
    advice = 'Name another one with --resume PATH, or move'
    if skipped:
        listed = ''.join(f'\n  {reason}' for reason in skipped)
        raise ValueError(
            f'{work_dir}: no checkpoint to go on from is whole:{listed}\n{advice} these away to start anew'
        )
    if (work_dir / LAST).exists():
        raise ValueError(
            f'{work_dir / LAST}: the run has saved {last or "a checkpoint"}, and neither that file nor another one to '
            f'go on from is there. {advice} {LAST} away to start anew'
        )
    return None, []


def agreed_checkpoint(work_dir: str | Path) -> tuple[Path | None, list[str]]:
    """Returns what ``newest_checkpoint`` finds on rank 0, which all processes go on from.

    Raises:
        ValueError: As ``newest_checkpoint``, on all processes; or one of them does not find the same file there.
    """
    work_dir = Path(work_dir).resolve()
    chosen: list = [None]
    if is_main_process():
        try:
            newest, skipped = newest_checkpoint(work_dir)
            chosen = [(newest and os.path.relpath(newest, work_dir), skipped)]
        except (ValueError, OSError) as error:
            chosen = [str(error)]  # or the others would wait
    broadcast_object_list(chosen)
    if isinstance(chosen[0], str):
        raise ValueError(chosen[0])
    name, skipped = chosen[0]
    newest = _in_its_folder(work_dir / name) if name else None
    check_agreement(newest or work_dir / LAST)
    return newest, skipped


def earlier_checkpoint(work_dir: str | Path, out_dir: str | Path | None) -> Path | None:
    """Returns a checkpoint that a new run might replace, if there is one: the one that rank 0 finds.

    Args:
        work_dir: The run's.
        out_dir: ``default_hooks.checkpoint.out_dir``.
    """
    found: list = [None]
    if is_main_process():
        folders = Path(work_dir).resolve(), _folder_of(work_dir, out_dir)
        files = (path for folder in folders if folder.is_dir() for path in sorted(folder.iterdir()))
        with contextlib.suppress(OSError):
            found = [next((path for path in files if re.fullmatch(rf'{NAME}|best_.+\.pth', path.name)), None)]
    broadcast_object_list(found)
    return found[0]


def check_agreement(path: str | Path) -> None:
    """Checks that all processes find the same checkpoint, or none, under a path that each may see differently.

    Raises:
        ValueError: They do not, on all processes.
    """
    found = all_gather_object(_describe(Path(path)))
    others = [f'\n  rank {rank}: {text}' for rank, text in enumerate(found) if text != found[0]]
    if others:
        raise ValueError(
            f'{path}: the processes do not go on from the same checkpoint. Expected, on rank 0: {found[0]}; found:'
            f'{"".join(others)}\nThe work dir must be one that all machines see; name it with --work-dir DIR'
        )


def _describe(path: Path) -> str:
    if not path.is_file():
        return 'there is no such file'
    try:
        iteration = f'iteration {read_meta(path)["iter"]}'
    except (ValueError, OSError):
        iteration = 'no checkpoint of a training run'
    sums = 0
    with contextlib.suppress(Exception), zipfile.ZipFile(path) as file:  # a damaged one raises almost anything
        sums = zlib.crc32(repr([member.CRC for member in file.infolist()]).encode())
    return f'{iteration}, {path.stat().st_size} bytes, checksum {sums:08x}'


def _find_latest(work_dir: str) -> str | None:
    newest, skipped = agreed_checkpoint(work_dir)
    for reason in skipped:
        print_log(f'Not resumed from: {reason}', 'current', WARNING)
    return str(newest) if newest else None


# What MMEngine's Runner goes on from where a config has resume=True and no load_from: its own takes what
# last_checkpoint holds, here the name relative to the work dir, as a path relative to the current folder.
mmengine_runner.find_latest_checkpoint = _find_latest


def _last_saved(work_dir: Path) -> Path | None:
    """The file that ``last_checkpoint`` names, be it there or not; None: it names none."""
    with contextlib.suppress(OSError, UnicodeDecodeError):
        name = Path((work_dir / LAST).read_text().strip())
        path, here = work_dir / name, work_dir / name.name
        # MMEngine's own is absolute, or relative to where the run was started; the work dir may be a copy, or moved.
        if not path.parent.is_dir() or (name.is_absolute() and here.is_file()):
            path = here
        return _in_its_folder(path) if name.name else None
    return None


def _folder_of(work_dir: str | Path, out_dir: str | Path | None) -> Path:
    """Returns where a run's checkpoints are, as MMEngine has it."""
    own = Path(work_dir).resolve()
    return own if out_dir in (None, work_dir) else Path(out_dir).resolve() / own.name


def _in_its_folder(path: Path) -> Path:
    """Returns the real path of where a file lies, be it a link to another place."""
    return path.parent.resolve() / path.name


def _is_later_by_name(path: Path, last: Path) -> bool:
    numbers = [[int(number) for number in re.findall(r'\d+', file.name)] for file in (path, last)]
    return re.sub(r'\d+', '', path.name) == re.sub(r'\d+', '', last.name) and numbers[0] > numbers[1]


def _candidates(work_dir: Path, last: Path | None) -> list[Path]:
    folders = {work_dir.resolve(), *([last.parent] if last else [])}
    name = NAME
    if last:
        name += '|' + re.sub(r'\d+', r'\\d+', re.escape(last.name))
    files = [path for folder in folders if folder.is_dir() for path in folder.iterdir()]
    return sorted(path for path in files if re.fullmatch(name, path.name))
