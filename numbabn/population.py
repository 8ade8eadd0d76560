"""Statistics of a whole data set, batch by batch."""

from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any, Literal

import numpy as np

from . import checks
from .functional import batch_stats
from .libraries import is_dask, kind_of, library_of, namespace
from .stats import BatchStats


def population_stats(
    batches: Iterable[Any], *, axis: int = 1, method: Literal["exact", "paper"] = "exact"
) -> BatchStats:
    """Statistics of all batches together, holding one at a time.

    Parameters
    ----------
    batches : iterable of arrays, one array or memmap, or a Dask array
        One array is a data set in one piece; a memmap is read from disk as it is summed. Of a Dask
        array, what lies between its chunks' borders on all axes but the channel's is a batch; one
        chunk at a time is computed, by Dask's scheduler, and held.
    axis : int
        Which dimension is the channel.
    method : {"exact", "paper"}
        "exact" merges counts, means and M2: the statistics of all values as if in one batch.
        "paper" is Ioffe & Szegedy's Algorithm 2: the mean of the batch means, and the mean of the
        batches' unbiased variances, ``m / (m - 1)`` times the biased ones, every batch counting
        alike. Empty batches are left out.

    Returns
    -------
    BatchStats
        ``count`` is that of all values, ``var`` the population variance by the method. That of
        "paper" is unbiased already: give ``correction=0`` beside it.

    Raises
    ------
    TypeError
        If ``batches`` is not iterable or a batch is no such array.
    ValueError
        If the method is unknown, the batches differ in channels, or, for "paper", a batch has one
        value per channel.

    Examples
    --------
    >>> import numpy as np, numbabn
    >>> x = np.arange(12.0).reshape(6, 2)
    >>> numbabn.population_stats([x[:4], x[4:]]).mean
    array([5., 6.])
    >>> numbabn.population_stats([x[:4], x[4:]], method="paper").mean
    array([6., 7.])
    """
    if method not in ("exact", "paper"):
        raise ValueError(f"method: expected 'exact' or 'paper', got {method!r}")
    each: Iterable[BatchStats]
    if is_dask(batches):
        each = _of_chunks(batches, axis)
    else:
        if library_of(batches) is not None:
            batches = [batches]
        elif hasattr(batches, "shape") and hasattr(batches, "dtype"):
            # Such as one of h5py's; to iterate over it would take each row for a batch.
            raise TypeError(
                "batches: expected an array, or an iterable of arrays such as slices of it, "
                f"got {kind_of(batches)}"
            )
        if not isinstance(batches, Iterable):
            raise TypeError(f"batches: expected an iterable, got {kind_of(batches)}")
        # A generator's variable would keep each batch until the next is there; map lets go of it.
        each = map(partial(batch_stats, axis=axis), batches)
    return _paper(each) if method == "paper" else sum(each, BatchStats())


def _of_chunks(array: Any, axis: Any) -> Iterator[BatchStats]:
    """Statistics of each batch of a Dask array, one chunk in memory at a time."""
    checks.data("batches", array)
    axis = checks.channel_axis(axis, array)
    chunks = array.to_delayed()  # of one graph, which compute would look through for each of them
    graph = dict(chunks.flat[0].dask)
    for batch in np.moveaxis(chunks, axis, -1).reshape(-1, chunks.shape[axis]):
        # Each has some of the channels, or none, of as many values.
        parts = [part for chunk in batch if (part := _of_chunk(_alone(chunk, graph), axis))]
        mean = np.concatenate([part.mean for part in parts])
        yield BatchStats(parts[0].count, mean, np.concatenate([part.m2 for part in parts]))


def _of_chunk(chunk: Any, axis: int) -> BatchStats | None:
    """Statistics of a chunk, which is let go of; none if it has no channels."""
    x = chunk.compute()
    return batch_stats(x, axis=axis) if x.shape[axis] else None


def _alone(chunk: Any, graph: Any) -> Any:
    """Give a chunk with what it needs of a graph."""
    from dask.optimization import cull

    needed, _ = cull(graph, chunk.key)  # type: ignore[no-untyped-call]
    return type(chunk)(chunk.key, needed)


def _paper(each: Iterable[BatchStats]) -> BatchStats:
    """Ioffe & Szegedy (2015), Algorithm 2, steps 8 to 10."""
    means, variances = BatchStats(), BatchStats()
    count = 0
    for stats in each:
        if stats.count == 0:  # adds nothing but its channels
            means, variances = means + stats, variances + stats
            continue
        if stats.count == 1:
            raise ValueError("batches: expected more than one value per channel in each, got 1")
        count += stats.count
        # Chan's formula with a count of 1 each is a running mean.
        zeros = namespace("batches", stats.mean).zeros_like(stats.mean)
        means += BatchStats(1, stats.mean, zeros)
        variances += BatchStats(1, stats.unbiased_var, zeros)
    return BatchStats(count, means.mean, count * variances.mean)
