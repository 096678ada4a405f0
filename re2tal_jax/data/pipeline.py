"""From a data set to batches on the devices: shuffled, decoded in the background, in an order that repeats exactly.

Decoding is grain's: threads in this process, or worker processes that hand arrays over in shared memory. The order is
ours (see `elements`): the state of a run is the number of batches it has had, and holds for any number of workers.
"""

import gc
import logging
import multiprocessing
import os
import queue
import signal
import threading
import zlib
from collections.abc import Callable, Generator, Iterator, Mapping
from pathlib import Path
from typing import Any

import grain
import jax
import numpy as np
from absl import flags

from re2tal_jax.data.container import probe
from re2tal_jax.data.dataset import Dataset
from re2tal_jax.data.elements import Cache, ElementLoader, LoaderConfig, ThreadVideos, WindowRef
from re2tal_jax.data.sampling import Policy, RandomTrunc, SlidingWindow, StridedPolicy, annotated_frames
from re2tal_jax.data.video_source import VideoSource
from re2tal_jax.errors import CheckpointError, ConfigError, DataError
from re2tal_jax.types import Batch, SnippetGrid, VideoRecord

logger = logging.getLogger(__name__)

NumpyBatch = dict[str, np.ndarray]
"""The fields of `Batch`."""

_ENDLESS = 1 << 40


class Loader:
    """Batches of a data set's windows; iterate it for numpy dictionaries with the fields of `Batch`.

    Training is one endless stream of shuffled epochs, each without its incomplete last batch. Evaluation is one pass in
    order, its last batch filled with empty rows (window -1, mask False); iterating again is another pass.

    Attributes:
        windows: what `Batch.window` counts.
        steps_per_epoch: batches in an epoch, or in the pass of an evaluation.
        skipped: id and reason of every video that could not be read so far.
    """

    def __init__(
        self,
        dataset: Dataset,
        policy: Policy,
        config: LoaderConfig,
        *,
        seed: int,
        train: bool,
        batch_size: int,
        process_index: int = 0,
        process_count: int = 1,
    ):
        """Count the windows; `batch_size` is that of a whole batch, of which each process loads an equal share of rows.

        Raises:
            ConfigError: a batch that the processes cannot share, or larger than an epoch; random windows in an
                evaluation or with a cache; windows that the features' strides do not tell.
            DataError: a video without a file, or not a single window.
        """
        if batch_size < 1 or batch_size % process_count or not 0 <= process_index < process_count:
            raise ConfigError(f"batch_size = {batch_size} must be a multiple of the {process_count} processes.")
        if isinstance(policy, RandomTrunc) and (not train or config.cache_mib):
            raise ConfigError(
                "random_trunc draws a new window each time: evaluate with sliding_window, and set cache_mib to 0."
            )
        if dataset.features is not None:
            dataset.features.check_policy(policy, path=f"config.{'train' if train else 'eval'}")
        self.skipped: dict[str, str] = {}
        self.windows = tuple(_windows(dataset, policy, config, train, self.skipped))
        if not self.windows:
            raise DataError(f"None of {len(dataset.records)} videos gives a window ({len(self.skipped)} unreadable).")
        full, rest = divmod(len(self.windows), batch_size)
        self.steps_per_epoch = full if train or not rest else full + 1
        if not self.steps_per_epoch:
            raise ConfigError(f"batch_size = {batch_size} is more than the {len(self.windows)} windows of an epoch.")
        self._rows, self._workers, self._batches = batch_size // process_count, config.workers, 0
        self._elements = ElementLoader(
            windows=self.windows,
            policy=policy,
            config=config,
            seed=seed,
            train=train,
            max_segments=max([1, *(len(ref.record.labels) for ref in self.windows)]),
            batch_size=batch_size,
            first_row=process_index * self._rows,
            num_rows=self._rows,
            steps=self.steps_per_epoch,
            cache=Cache(config.cache_mib),
            videos=ThreadVideos(),
            features=dataset.features,
        )

    def __len__(self) -> int:
        return self.steps_per_epoch

    def __iter__(self) -> Generator[NumpyBatch, None, None]:
        """Yield batches from the current place on.

        Raises:
            DataError: a video that cannot be read, with file and id, where `on_error` is "error".
        """
        train = self._elements.train
        elements = iter(self._stream())
        try:
            while train or self._batches < self.steps_per_epoch:
                rows = [self._accept(next(elements)) for _ in range(self._rows)]
                self._batches += 1
                yield {name: np.stack([row[name] for row in rows]) for name in rows[0]}
            self._batches = 0
        finally:
            elements.close()
            if self._workers:
                gc.collect()  # the last element's shared memory, which the end of grain's stream holds in a cycle

    def grid(self, window: int) -> SnippetGrid:
        """Return the line of snippets of a window of the evaluation, which turns its detections into seconds."""
        ref = self.windows[window]
        return self._elements.policy.window(ref.record, ref.total_frames or 1, ref.index).grid

    def get_state(self) -> dict[str, int]:
        """Return the place after the last batch handed out, as numbers for json."""
        return {"batches": self._batches, **self._identity()}

    def set_state(self, state: Mapping[str, int]) -> None:
        """Go to the place that `get_state` told; the next `iter` starts there.

        Raises:
            CheckpointError: the state is that of another data set, sampling policy, seed or batch size.
        """
        for name, mine in self._identity().items():
            if state.get(name) != mine:
                raise CheckpointError(
                    f"The order of the data to resume has {name} = {state.get(name)}, this run has {mine}: resume with "
                    "the same data set, policy, seed and batch size, or start a new run from the parameters."
                )
        self._batches = int(state["batches"])

    def _identity(self) -> dict[str, int]:
        loader = self._elements
        names = "\n".join(f"{ref.record.video_id} {ref.index}" for ref in self.windows)
        return {
            "seed": loader.seed,
            "windows": len(self.windows),
            "batch_size": loader.batch_size,
            "checksum": zlib.crc32(f"{loader.policy}\n{names}".encode()),  # of the same windows in the same order
        }

    def _stream(self) -> grain.IterDataset:
        """Return this process's rows from the current place on."""
        config = self._elements.config
        end = _ENDLESS if self._elements.train else self.steps_per_epoch * self._rows
        rows = grain.MapDataset.range(self._batches * self._rows, end).map(self._elements)
        ahead = max(config.ahead, config.threads)
        stream = rows.to_iter_dataset(grain.ReadOptions(num_threads=config.threads, prefetch_buffer_size=ahead))
        if not config.workers:
            return stream
        if not flags.FLAGS.is_parsed():  # grain hands its flags to the workers
            flags.FLAGS.mark_as_parsed()
        options = grain.MultiprocessingOptions(num_workers=config.workers, per_worker_buffer_size=1)
        return stream.mp_prefetch(options, worker_init_fn=_start_worker)

    def _accept(self, element: dict[str, Any]) -> NumpyBatch:
        """Return the element without its failures, which are raised, or named once in the log and counted."""
        for video_id, reason in element.pop("failures"):
            if self._elements.config.on_error == "error":
                split = "train" if self._elements.train else "eval"
                way_out = f"To go on without it add --config.{split}.loader.on_error=skip."
                raise DataError(f"Video {video_id!r}: {reason} {way_out}")
            _note_skipped(self.skipped, video_id, reason)
        return element


class Prefetch:
    """Batches placed on the devices ahead of the step, by a background thread.

    Its state is the loader's after the last batch that was *taken*, so a checkpoint between two steps is exact. Use it
    as a context, or `close` it.
    """

    def __init__(self, loader: Loader, place: Callable[[NumpyBatch], Batch], *, depth: int = 2):
        """Start at the loader's place; `place` puts a batch on the devices, `depth` of them wait there."""
        self._state = loader.get_state()
        self._ready: queue.Queue[tuple[Batch | None, dict[str, int] | BaseException]] = queue.Queue(depth)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(loader, place), name="prefetch", daemon=True)
        self._thread.start()

    def __iter__(self) -> "Prefetch":
        return self

    def __next__(self) -> Batch:
        """Return the next batch; what the loader raises is raised here."""
        if self._stopped.is_set():
            raise StopIteration
        batch, state = self._ready.get()
        if batch is None:
            self.close()
            assert isinstance(state, BaseException)
            raise state
        assert isinstance(state, dict)
        self._state = state
        return batch

    def get_state(self) -> dict[str, int]:
        """Return the state with which a loader goes on after the last batch taken."""
        return self._state

    def close(self) -> None:
        """Stop the thread and the loader's workers; batches that wait are dropped."""
        self._stopped.set()
        if self._thread is not threading.current_thread():
            self._thread.join()

    def __enter__(self) -> "Prefetch":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(self, loader: Loader, place: Callable[[NumpyBatch], Batch]) -> None:
        batches = iter(loader)
        try:
            for batch in batches:
                if not self._put((place(batch), loader.get_state())):
                    return
            self._put((None, StopIteration()))
        except BaseException as error:
            self._put((None, error))
        finally:
            batches.close()

    def _put(self, item: tuple[Batch | None, Any]) -> bool:
        while not self._stopped.is_set():
            try:
                self._ready.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False


def _start_worker(index: int, count: int) -> None:
    """Prepare a decoding process: no accelerator, Ctrl-C left to the main process, an end when that is killed."""
    del index, count
    jax.config.update("jax_platforms", "cpu")
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _windows(
    dataset: Dataset, policy: Policy, config: LoaderConfig, train: bool, skipped: dict[str, str]
) -> Iterator[WindowRef]:
    """Yield the windows of all videos; files are opened only where the annotation does not tell how long they are."""
    lengths_matter = isinstance(policy, SlidingWindow) or (isinstance(policy, StridedPolicy) and not train)
    for record in dataset.records:
        path, total = _file(dataset, record), annotated_frames(record)
        if lengths_matter and total is None:
            try:
                total = dataset.features.total_frames(record) if dataset.features else probe(path).num_frames
            except DataError as error:
                if config.on_error == "error":
                    raise DataError(f"Video {record.video_id!r}: {error}") from error
                _note_skipped(skipped, record.video_id, str(error))
                continue
        for index in range(policy.num_windows(record, total)):
            yield WindowRef(record=record, path=path, index=index, total_frames=total)


def _file(dataset: Dataset, record: VideoRecord) -> Path | VideoSource:
    if dataset.features is not None:
        return dataset.features.places[record.video_id][0].path
    path = dataset.video_paths.get(record.video_id) or dataset.video_sources.get(record.video_id)
    if path is None:
        raise DataError(f"Video {record.video_id!r} has no file: open the data set with its video folder (videos).")
    return path


def _note_skipped(skipped: dict[str, str], video_id: str, reason: str) -> None:
    if video_id not in skipped:
        skipped[video_id] = reason
        logger.warning("skipping video %r (number %d): %s", video_id, len(skipped), reason)
