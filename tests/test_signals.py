from __future__ import annotations

import os
import signal

import pytest

from bayeslora.signals import Stopped, acted_on, noted


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_raises_what_says_its_number(number: int) -> None:
    before = signal.getsignal(number)
    with pytest.raises(Stopped) as found, acted_on():
        os.kill(os.getpid(), number)
    assert found.value.number == number
    assert signal.getsignal(number) is before


def test_ctrl_c_stays_what_it_is() -> None:
    with pytest.raises(KeyboardInterrupt) as found, acted_on():
        os.kill(os.getpid(), signal.SIGINT)
    assert type(found.value) is KeyboardInterrupt


def test_the_first_signal_is_noted_and_the_second_acts_at_once() -> None:
    with pytest.raises(Stopped) as found, noted() as asked:
        assert asked() is None
        os.kill(os.getpid(), signal.SIGINT)
        assert asked() == signal.SIGINT
        os.kill(os.getpid(), signal.SIGTERM)
        pytest.fail("it went on")
    assert found.value.number == signal.SIGTERM


def test_what_is_handled_without_python_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(signal, "getsignal", lambda number: None)
    with acted_on():
        monkeypatch.undo()
        assert signal.getsignal(signal.SIGTERM) is before


def test_who_ignores_the_end_of_its_session_goes_on_to() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with acted_on(), noted() as asked:
            os.kill(os.getpid(), signal.SIGHUP)
            assert asked() is None
    finally:
        signal.signal(signal.SIGHUP, before)
