import contextlib
import threading
from collections.abc import Callable

import numpy as np
import pytest
import torch

from emotion.errors import Interrupted
from emotion.training.step_records import ALIGNMENT, SLOTS, Layout, Numbers, sent_records, step_records
from tests.emotion.trainings import CPU

STEPS = range(3, 40)


def numbers_of(step: int) -> Numbers:
    rng = np.random.default_rng(step)
    return {
        "flags": rng.random((3, 5)) < 0.5,
        "places": rng.integers(0, 1 << 30, (3, 2)).astype(np.int32),
        "partners": rng.integers(0, 9, 7),
        "stored": rng.standard_normal((2, 3, 5)).astype(np.float16),
        "noise": rng.standard_normal((2, 3)).astype(np.float32).T,
        "scalar": np.array(step, np.float32),
    }


def equal(record: dict[str, torch.Tensor], step: int) -> bool:
    expected = numbers_of(step)
    assert list(record) == list(expected)
    return all(
        record[name].dtype == torch.from_numpy(array).dtype and np.array_equal(record[name].numpy(), array)
        for name, array in expected.items()
    )


def threads() -> int:
    return threading.active_count()


@pytest.mark.parametrize("ahead", [False, True])
def test_each_step_gets_its_numbers_and_keeps_them(ahead: bool) -> None:
    """Also after its block on the host was filled again."""
    records = list(sent_records(numbers_of, STEPS, CPU, ahead=ahead))
    assert len(records) == len(STEPS)
    assert all(equal(record, step) for step, record in zip(STEPS, records, strict=True))
    assert all(view.storage_offset() * view.element_size() % ALIGNMENT == 0 for view in records[0].values())


@pytest.mark.parametrize("ahead", [False, True])
def test_a_resumed_training_gets_the_same(ahead: bool) -> None:
    with contextlib.closing(sent_records(numbers_of, range(20, 40), CPU, ahead=ahead)) as records:
        assert equal(next(records), 20)
    assert list(sent_records(numbers_of, range(40, 40), CPU, ahead=ahead)) == []


def test_a_cpu_computes_with_the_numbers_themselves_and_asks_for_no_more_than_the_step_in_hand() -> None:
    given: list[Numbers] = []

    def numbers(step: int) -> Numbers:
        given.append(numbers_of(step))
        return given[-1]

    before = threads()
    with contextlib.closing(step_records(numbers, STEPS, CPU, ahead=True)) as records:
        record = next(records)
        assert (len(given), threads()) == (1, before)
        assert record["stored"].data_ptr() == given[0]["stored"].ctypes.data


def test_a_thread_prepares_the_next_two_steps_and_no_more() -> None:
    asked: list[int] = []
    is_ready = threading.Semaphore(0)

    def numbers(step: int) -> Numbers:
        asked.append(step)
        is_ready.release()
        return numbers_of(step)

    with contextlib.closing(sent_records(numbers, STEPS, CPU, ahead=True)) as records:
        for step in range(3, 8):
            assert equal(next(records), step)
        # Both are prepared while the main thread does something else; once more, at the start, to learn the sizes.
        for _ in range(1 + 5 + SLOTS - 2):
            assert is_ready.acquire(timeout=10)
    assert asked == [3, *range(3, asked[-1] + 1)]
    assert asked[-1] <= 7 + SLOTS - 1


def stopped(step: int) -> None:
    if step == 6:
        raise Interrupted("enough")


def ended(step: int) -> None:
    if step == 6:
        raise StopIteration


@pytest.mark.parametrize("stop", [stopped, ended])
def test_no_thread_is_left_after_an_interruption(stop: Callable[[int], None]) -> None:
    before = threads()
    with contextlib.suppress(Interrupted, StopIteration):  # noqa: SIM117
        with contextlib.closing(sent_records(numbers_of, STEPS, CPU, ahead=True)) as records:
            for step in STEPS:
                next(records)
                assert threads() == before + 1
                stop(step)
    assert threads() == before


def test_an_error_of_the_thread_comes_through_at_its_step() -> None:
    def numbers(step: int) -> Numbers:
        if step == 7:
            raise OSError("the file is gone")
        return numbers_of(step)

    before = threads()
    records = sent_records(numbers, STEPS, CPU, ahead=True)
    assert all(equal(next(records), step) for step in range(3, 7))
    with pytest.raises(OSError, match="the file is gone"):
        next(records)
    assert threads() == before


def test_a_step_of_another_shape_is_refused() -> None:
    """A captured graph reads and writes where the first step did."""
    layout = Layout(numbers_of(0))
    block = np.zeros(layout.nbytes, np.uint8)
    for name, other in (("noise", np.zeros((3, 3), np.float32)), ("places", np.zeros((3, 2), np.int64))):
        with pytest.raises(AssertionError, match=name):
            layout.write(numbers_of(1) | {name: other}, block)
