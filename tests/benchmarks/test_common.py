"""What benchmarks/common.py promises of a captured call, with a capture that holds addresses only, as CUDA's does."""

import gc
import weakref

import torch

from benchmarks.common import Replay


class Addresses:
    """Captures by keeping the address of what the call returned, and nothing alive."""

    def __call__(self, run):
        result = run()
        self.returned = weakref.ref(result)
        return lambda: None, result


def test_a_replay_keeps_what_the_graph_reads_and_writes():
    def build():
        x = torch.arange(3.0)

        def call():
            return 2 * x

        capture = Addresses()
        return Replay(call, capture), weakref.ref(x), capture.returned

    replay, read, written = build()
    gc.collect()
    assert read() is not None and written() is not None
    assert replay().tolist() == [0, 2, 4]
    del replay
    gc.collect()
    assert read() is None and written() is None
