"""Tracking: numbers of a run in, Weights & Biases out, by a process that the run never waits for."""

from __future__ import annotations

import contextlib
import inspect
import json
import logging
import netrc
import os
import queue
import re
import secrets
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlsplit

from utils import RunError, write_text

log = logging.getLogger(__name__)


class Tracker:
    """Numbers for Weights & Biases, sent by a process of its own.

    The run never waits for it, and what wandb does to a process (hooks of the interpreter, replaced streams, a wait at
    exit) does not reach the run: a missing package, no network, a failing init or a full disk cost a line in the log.
    When the run is killed, the process sends what it has got and ends.
    All segments of a run that was broken off and resumed are one wandb run; `tracking.json` remembers its id and the
    last step sent, so that steps which are trained again are not sent again.

    Args:
        mode: auto (WANDB_MODE, or online where credentials exist, else offline), online, offline or disabled.
        run_id: of an earlier segment; empty for a new run.
        settings: further arguments of `wandb.init`, as plain values.
    """

    patience = 60.0  # seconds that `finish` waits

    def __init__(self, mode: str, save_dir: Path, run_id: str = "", **settings):
        self.mode = os.environ.get("WANDB_MODE") or mode if mode == "auto" else mode
        self.folder, self.settings = save_dir, settings
        self.path = save_dir / "tracking.json"
        self.run_id, self.last_step = self._earlier_segment(run_id)
        self._queue: queue.SimpleQueue = queue.SimpleQueue()
        self._process: subprocess.Popen | None = None
        self._gave_up, self._thread = False, None
        if self.mode != "disabled":
            self._thread = threading.Thread(target=self._work, name="wandb", daemon=True)
            self._thread.start()

    def log(self, values: Mapping, step: int) -> None:
        """Numbers of one step; steps that do not rise are left out."""
        if self._thread and self._thread.is_alive() and step > self.last_step:
            self.last_step = step
            self._queue.put(("log", dict(values), step))

    def summarise(self, values: Mapping, pictures: Mapping[str, Path]) -> None:
        """The final numbers, and pictures by title; empty values are left out."""
        if self._thread:
            filled = {name: value for name, value in values.items() if value != ""}
            self._queue.put(("summary", filled, {title: str(path) for title, path in pictures.items()}))

    def finish(self) -> None:
        """Send what is left, for at most `patience` seconds."""
        thread, self._thread = self._thread, None
        if thread:
            self._queue.put(None)
            thread.join(self.patience)
            if thread.is_alive():
                log.warning("wandb: not done after %g s; the run's files are complete without it", self.patience)
                self._gave_up = True
                if self._process:
                    self._process.kill()

    def _earlier_segment(self, run_id: str) -> tuple[str, int]:
        """Id and last step sent; a tracking.json that is damaged or of another run counts as none."""
        try:
            found = json.loads(self.path.read_text(encoding="utf-8"))
            known, step = found["id"], found["step"]
            if re.fullmatch("[0-9a-z]+", known) and type(step) is int and run_id in ("", known):
                return known, step
        except (OSError, ValueError, TypeError, KeyError, RecursionError):
            pass
        return run_id or secrets.token_hex(4), -1

    def _work(self) -> None:
        """The thread: starts the process and hands it what is in the queue."""
        mode = self.mode
        if mode == "auto":
            mode = "online" if _wandb_credentials() else "offline"
        try:
            answer, text = self._start(mode)
            if answer == "not online":
                log.warning("wandb: cannot go online (%s); tracking offline", text)
                self._end()
                answer, text = self._start("offline")
            log.info("wandb: %s", text)
            while (item := self._queue.get()) is not None:
                if item[0] == "log":
                    # first the note: a step may get lost when the run is killed here, but none comes twice
                    write_text(self.path, json.dumps({"id": self.run_id, "step": item[2]}) + "\n")
                self._tell(item)
            self._tell(None)
            self._answer()
            self._process.wait()
        except Exception as error:  # whatever it is, the training matters more
            if not self._gave_up:
                reason = " ".join(str(error).split()) or type(error).__name__
                log.warning("wandb: %s; this run goes on without it", reason)
        finally:
            self._end()

    def _start(self, mode: str) -> tuple[str, str]:
        """Start the process and return what it answers to `wandb.init`."""
        # the empty WANDB_MODE that counts as none here is an error to wandb; it measures the process of this number
        environ = {**os.environ, "WANDB_MODE": mode, "WANDB__STATS_PID": str(os.getpid())}
        self._process = subprocess.Popen(
            [sys.executable, "-c", f"{inspect.getsource(_send_to_wandb)}\n{_send_to_wandb.__name__}()"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environ,
            start_new_session=True,  # ctrl-c is for the run, which says when tracking ends
        )  # fmt: skip
        # resume lets `wandb sync` append this segment to those before it
        self._tell({"id": self.run_id, "mode": mode, "dir": str(self.folder), "resume": "allow", **self.settings})
        return self._answer()

    def _end(self) -> None:
        if self._process:
            self._process.kill()
            self._process.stdout.close()
            with contextlib.suppress(OSError):  # a line that it never read
                self._process.stdin.close()
            self._process.wait()

    def _tell(self, message: object) -> None:
        try:
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            self._answer()  # raises with the reason
            raise

    def _answer(self) -> tuple[str, str]:
        """What the process says next, and a text for the log.

        Raises:
            RunError: it failed.
        """
        line = self._process.stdout.readline()
        answer, text = json.loads(line) if line else ("failed", f"its process ended with {self._process.wait()}")
        if answer == "failed":
            raise RunError(text)
        return answer, text


def _send_to_wandb() -> None:
    """The program of a Tracker's process, which has only this function.

    Reads a message a line: the arguments of `wandb.init`, what to log or to summarise, and null at the end. Answers
    after the first and the last one, or when it fails.
    """
    import json
    import os
    import shlex
    import sys
    from pathlib import Path

    sys.path[:] = [folder for folder in sys.path if folder]  # the current folder may hold a json.py
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever wandb prints is not for the log

    def answer(what: str, text: str = "") -> None:
        answers.write(json.dumps([what, " ".join(text.split())[:300]]) + "\n")

    try:
        import wandb

        options = json.loads(sys.stdin.readline())
        offline = options["mode"] != "online"
        settings = wandb.Settings(init_timeout=30, console="off", silent=True, save_code=False, disable_git=True)
        try:
            run = wandb.init(settings=settings, **options)
        except Exception as error:  # no network, no such project, an outdated key
            if offline:
                raise
            answer("not online", str(error) or type(error).__name__)
            return
        upload = f"offline; upload later with: wandb sync {shlex.quote(str(Path(run.dir).parent))}"
        answer("ready", upload if offline else run.url)
        for line in sys.stdin:
            message = json.loads(line)
            if message is None:
                break
            kind, values, more = message
            if kind == "log":
                run.log(values, step=more)
            else:
                pictures = {title: wandb.Image(path) for title, path in more.items()}
                run.summary.update({**values, **pictures})
        else:
            run.finish(exit_code=1)  # the input ended without the null: the run was killed
            return
        run.finish()
        answer("done")
    except Exception as error:  # whatever it is, the training matters more
        answer("failed", str(error) or type(error).__name__)


def _wandb_credentials() -> bool:
    """Whether the environment holds a key, or `wandb login` has been here."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai").netloc
    names = [os.environ["NETRC"]] if os.environ.get("NETRC") else ["~/.netrc", "~/_netrc"]
    for name in names:
        with contextlib.suppress(OSError, ValueError, netrc.NetrcParseError):
            *_, password = netrc.netrc(os.path.expanduser(name)).hosts.get(host, [""])
            if password:
                return True
    return False
