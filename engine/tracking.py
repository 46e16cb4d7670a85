"""Weights & Biases: what a run sends there, and nothing that wandb does can stop the run."""

from __future__ import annotations

import contextlib
import logging
import netrc
import os
import secrets
import shlex
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from urllib.parse import urlsplit

log = logging.getLogger(__name__)


class Tracker:
    """Sends the numbers of a run to Weights & Biases.

    A wandb that is missing, cannot start, or fails later costs one line in the log, and the run goes on without it. All
    segments of a run that was stopped and resumed are one wandb run, whose id the checkpoint holds. After a kill, steps
    that are trained again are sent again; wandb keeps one value of each step.

    Args:
        mode: auto (WANDB_MODE, or online where credentials exist, else offline), online, offline or disabled.
        run_id: of an earlier segment; empty for a new run.
        settings: further arguments of `wandb.init`, as plain values.
    """

    patience = 60.0  # seconds that `finish` waits

    def __init__(self, mode: str, save_dir: Path, run_id: str = "", **settings):
        mode = os.environ.get("WANDB_MODE") or mode if mode == "auto" else mode
        if mode == "auto":
            mode = "online" if _wandb_credentials() else "offline"
        self.run_id = run_id or secrets.token_hex(4)
        self.last_step, self._run = -1, None
        if mode != "disabled":
            settings |= {"id": self.run_id, "dir": str(save_dir), "resume": "allow"}
            self._run = self._guarded(lambda: self._start(mode, settings))

    def log(self, values: Mapping, step: int) -> None:
        """Numbers of one step; steps that do not rise are left out."""
        if self._run and step > self.last_step:
            self.last_step = step
            self._guarded(lambda: self._run.log(dict(values), step=step))

    def summarise(self, values: Mapping, pictures: Mapping[str, Path]) -> None:
        """The final numbers, and pictures by title; empty values are left out."""
        filled = {name: value for name, value in values.items() if value != ""}
        if self._run:
            self._guarded(lambda: self._run.summary.update({**filled, **_images(pictures)}))

    def finish(self) -> None:
        """Send what is left, for at most `patience` seconds."""
        run, self._run = self._run, None
        if run is None:
            return
        thread = threading.Thread(target=lambda: self._guarded(run.finish), name="wandb", daemon=True)
        thread.start()
        thread.join(self.patience)
        if thread.is_alive():
            log.warning("wandb: not done after %g s; the run's files are complete without it", self.patience)

    def _guarded(self, act: Callable):
        """What `act` returns; None, and no tracking from then on, where it fails."""
        try:
            return act()
        except Exception as error:  # wandb raises errors of many kinds, and training matters more than any of them
            self._run = None
            reason = " ".join(str(error).split()) or type(error).__name__
            log.warning("wandb: %s; this run goes on without it", reason[:300])

    def _start(self, mode: str, settings: dict):
        import wandb

        if os.environ.get("WANDB_MODE") == "":
            del os.environ["WANDB_MODE"]  # an empty one means none here, and is an error to wandb
        logging.getLogger("wandb").propagate = False  # it logs the errors that are told in one line here
        quiet = wandb.Settings(init_timeout=30, console="off", silent=True, save_code=False, disable_git=True)
        if mode == "online":
            try:
                run = wandb.init(mode=mode, settings=quiet, **settings)
                log.info("wandb: %s", run.url)
                return run
            except Exception as error:  # no network, no such project, an outdated key
                log.warning("wandb: cannot go online (%s); tracking offline", " ".join(str(error).split())[:300])
                wandb.teardown()  # or its service takes the id of the run as in use
        run = wandb.init(mode="offline", settings=quiet, **settings)
        log.info("wandb: offline; upload later with: wandb sync %s", shlex.quote(str(Path(run.dir).parent)))
        return run


def _images(pictures: Mapping[str, Path]) -> dict:
    import wandb

    return {title: wandb.Image(str(path)) for title, path in pictures.items()}


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
