"""`CudaCapture` with a stand-in for torch.cuda: whose graphs live how long."""

import contextlib
import gc
import weakref

import pytest
import torch

from bacon_fast.engine.graph import CudaCapture


class Graph:
    """What is known of a CUDA graph here: that it is there."""

    replayed = 0

    def replay(self) -> None:
        self.replayed += 1


class Stream:
    def synchronize(self) -> None:
        """Nothing runs."""


@pytest.fixture
def graphs(monkeypatch):
    """Weak references to all graphs that were made."""
    made: list[weakref.ref] = []

    def make() -> Graph:
        graph = Graph()
        made.append(weakref.ref(graph))
        return graph

    monkeypatch.setattr(torch.cuda, "CUDAGraph", make)
    monkeypatch.setattr(torch.cuda, "graph", lambda *_, **__: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 0))
    return made


def broken() -> None:
    raise RuntimeError("operation not permitted when stream is capturing")


def test_a_broken_captures_graph_lives_as_long_as_the_capture(graphs):
    capture = CudaCapture()
    with pytest.raises(RuntimeError, match="not permitted"):
        capture(broken)
    capture.reset()
    gc.collect()
    assert graphs[0]() is not None
    del capture
    gc.collect()
    assert graphs[0]() is None


def test_a_graph_lives_as_long_as_what_replays_it(graphs):
    capture = CudaCapture()
    replay, result = capture(lambda: ({}, {}))
    gc.collect()
    replay()
    assert result == ({}, {}) and graphs[0]().replayed == 1
    del replay
    gc.collect()
    assert graphs[0]() is None
