import pytest
import rank_cases
import torch


@pytest.fixture(scope="session")
def ranks_folder(tmp_path_factory):
    """Run directories of the two processes of `ranks`."""
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="session")
def ranks(ranks_folder):
    """The results of each of two processes (rank_cases.on_two_ranks)."""
    port = rank_cases.free_port()
    processes = [rank_cases.start(r, port, [rank_cases.__file__, str(ranks_folder)]) for r in range(rank_cases.RANKS)]
    try:
        assert [process.wait(timeout=300) for process in processes] == [0] * rank_cases.RANKS
    finally:
        for process in processes:
            process.kill()
    return [torch.load(ranks_folder / f"rank{r}.pt") for r in range(rank_cases.RANKS)]
