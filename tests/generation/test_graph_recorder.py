from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch

from ragkit.generation import graph_recorder
from ragkit.generation.graph_recorder import GraphRecorder


def test_a_thread_records_on_one_stream_a_device_that_no_other_thread_has(monkeypatch):
    made = []
    monkeypatch.setattr(torch.cuda, "Stream", lambda index, priority: made.append((index, priority)) or object())
    streams, together = graph_recorder._RecordingStreams(), Barrier(2)

    def asked(_):
        together.wait(10)
        first, second = (streams.of(torch.device("cuda", 0)) for _ in range(2))
        return first, second, streams.of(torch.device("cuda", 1))

    with ThreadPoolExecutor(2) as threads:
        found = list(threads.map(asked, range(2)))
    assert all(first is second for first, second, _ in found)
    assert len({id(stream) for first, _, other in found for stream in (first, other)}) == 4
    assert sorted(made) == [(0, -1), (0, -1), (1, -1), (1, -1)]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_threads_record_while_others_launch_on_every_stream_that_torch_hands_out(caplog):
    device = torch.device("cuda")

    def sums(number):
        with torch.cuda.stream(torch.cuda.Stream(device)):
            rows, out = torch.full((64,), float(number), device=device), torch.zeros(64, device=device)
            for _ in range(40):
                out.zero_()
                recorder = GraphRecorder(device)
                recorder.begin()
                replay = recorder.record(lambda: out.add_(rows))
                replay()
                recorder.end()
                recorder.wait()
            return out.tolist()

    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(sums, range(4)))
    assert found == [[2.0 * number] * 64 for number in range(4)]
    assert "could not be recorded" not in caplog.text
