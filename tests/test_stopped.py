"""Ctrl-C and SIGTERM: answered at once, ended with the exit code that is documented."""

import hashlib
import os
import signal
import sys
import threading
import time

import pytest

from hybrid_jax.commands import main as command_line
from hybrid_jax.progress import progress_bar
from hybrid_jax.stopped import EXIT_CODE, StopRequest, Terminable


class Heard:
    """A stderr that remembers whether the main thread was within one call when it was written to."""

    def __init__(self):
        self.busy, self.texts = False, []

    def write(self, text):
        self.texts.append((self.busy, text))

    def flush(self):
        pass

    def isatty(self):
        return False


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_is_answered_while_the_main_thread_compiles(monkeypatch, number):
    """Hashing stands for XLA: one long call that releases Python's lock and runs no handlers."""
    heard, answered, before = Heard(), threading.Event(), signal.getsignal(number)
    monkeypatch.setattr(sys, "stderr", heard)
    monkeypatch.setattr(heard, "flush", answered.set)
    with StopRequest("align") as stop:
        threading.Timer(0.05, os.kill, (os.getpid(), number)).start()
        heard.busy = True
        hashlib.pbkdf2_hmac("sha256", b"password", b"salt", 600_000)
        heard.busy = False
        assert stop.asked
    assert answered.is_set()
    (first, *_) = [(busy, text) for busy, text in heard.texts if "stopping after the step" in text]
    assert first[0] and first[1].startswith("align: stopping")
    assert signal.getsignal(number) == before


def test_a_second_ctrl_c_ends_at_once_and_a_second_sigterm_does_not(monkeypatch):
    codes = []
    monkeypatch.setattr(os, "_exit", codes.append)
    with StopRequest("align") as stop:
        for number in (signal.SIGTERM, signal.SIGTERM):
            os.kill(os.getpid(), number)
            time.sleep(0.05)
        assert stop.asked and codes == []
        os.kill(os.getpid(), signal.SIGINT)
        for _ in range(200):
            if codes:
                break
            time.sleep(0.01)
        assert codes == [EXIT_CODE]


def test_outside_of_a_loop_a_stop_waits_aloud_for_the_computation_and_a_second_one_does_not_wait(monkeypatch):
    heard, codes = Heard(), []
    monkeypatch.setattr(sys, "stderr", heard)
    monkeypatch.setattr(os, "_exit", codes.append)
    with pytest.raises(KeyboardInterrupt), Terminable("hybrid-jax select"):
        threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGTERM)).start()
        threading.Timer(0.5, lambda: heard.busy and os.kill(os.getpid(), signal.SIGTERM)).start()
        heard.busy = True
        hashlib.pbkdf2_hmac("sha256", b"password", b"salt", 4_000_000)
        heard.busy = False
    assert [busy for busy, text in heard.texts if "stopping when the computation" in text] == [True]
    assert codes == [EXIT_CODE]


def test_a_second_sigterm_does_not_disturb_what_the_first_one_cleans_up():
    cleaned = []
    with pytest.raises(KeyboardInterrupt), Terminable("hybrid-jax prepare"):
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.01)
            cleaned.append("all of it")
    assert cleaned == ["all of it"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_command_that_is_stopped_anywhere_ends_with_the_documented_code(monkeypatch, capsys, number):
    class Slow:
        def add_arguments(self, parser):
            pass

        def run(self, args):
            os.kill(os.getpid(), number)
            time.sleep(5)
            raise AssertionError("the signal came to nothing")

    monkeypatch.setattr(command_line, "COMMANDS", {"prepare": command_line.Command("slow", "", "", resumable=True)})
    monkeypatch.setattr(command_line, "_module", lambda name: Slow())
    assert command_line.main(["prepare"]) == EXIT_CODE == 3
    assert "hybrid-jax prepare: stopped; the same command continues" in capsys.readouterr().err


def test_a_bar_in_a_file_writes_a_line_now_and_then_and_not_each_step(capsys):
    with progress_bar(name="train", unit="step", total=1000) as bar:
        for _ in range(1000):
            bar.set_postfix_str("loss 1.0")
            bar.update()
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and "0/1000" in lines[0] and "1000/1000" in lines[1] and "loss 1.0" in lines[1]
    with progress_bar(name="train", unit="step", total=1000):
        pass  # nothing was done: it failed
    assert len(capsys.readouterr().err.splitlines()) == 1
    with progress_bar(range(3), name="e", unit="model", shown=False) as bar:
        bar.set_postfix_str("loss 1.0")
        assert list(bar) == [0, 1, 2]
    assert capsys.readouterr().err == ""
