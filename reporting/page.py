"""HTML pages from Markdown and pictures, and writing a set of files into a folder, all or none."""

from __future__ import annotations

import base64
import contextlib
import html
import os
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import utils
from reporting import need
from utils import RunError, cause, disk_advice


def write_bytes(path: Path, content: bytes) -> None:
    utils.write_atomic(path, lambda file: file.write(content))


def publish(folder: Path, files: Mapping[str, Callable[[Path], None]], stale: Iterable[str] = ()) -> None:
    """Write all files into a staging folder, then move them into `folder`: after an error all old files are unchanged.

    `stale` files of an earlier report are removed.
    """
    made = not folder.exists()
    staging = folder / ".report.tmp"
    try:
        for name, write_file in files.items():
            (staging / name).parent.mkdir(parents=True, exist_ok=True)
            write_file(staging / name)
        for name in files:
            (folder / name).parent.mkdir(exist_ok=True)
            os.replace(staging / name, folder / name)
        for name in stale:
            (folder / name).unlink(missing_ok=True)
    except OSError as error:
        raise RunError(f"{folder}: cannot be written ({cause(error)}){disk_advice(error)}", 1) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        if made:
            with contextlib.suppress(OSError):
                folder.rmdir()  # only if empty


_STYLE = """\
:root { color-scheme: light dark; --text: #1d2329; --soft: #57606a; --page: #ffffff; --box: #f5f7f9; --line: #d5dae0;
  --link: #0b5cad; --note: #fff4d6; --mark: #d99a00; }
@media (prefers-color-scheme: dark) { :root { --text: #e4e8ec; --soft: #a3adb8; --page: #14181d; --box: #1e242b;
  --line: #39424d; --link: #7ab8ff; --note: #3a2f10; --mark: #e0b040; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 70rem; color: var(--text); background: var(--page);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif; overflow-wrap: break-word; }
h1 { font-size: 1.5rem; line-height: 1.25; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin-top: 2.2rem; padding-bottom: .25rem; border-bottom: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.6rem 0 .3rem; }
h3 + p { margin-top: 0; color: var(--soft); }
a { color: var(--link); }
img { display: block; max-width: 100%; height: auto; background: #ffffff; border: 1px solid var(--line);
  border-radius: 6px; padding: 6px; }
.table { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .6rem; border-bottom: 1px solid var(--line); white-space: nowrap; text-align: left; }
td.words { white-space: normal; min-width: 16rem; overflow-wrap: anywhere; }
th { background: var(--box); font-weight: 600; }
tbody tr:hover { background: var(--box); }
pre { overflow-x: auto; padding: .8rem 1rem; background: var(--box); border: 1px solid var(--line);
  border-radius: 6px; font-size: .85rem; line-height: 1.45; }
blockquote { margin: 1rem 0; padding: .1rem 1rem; background: var(--note); border-left: 4px solid var(--mark);
  border-radius: 4px; }
"""


def to_html(title: str, text: str, pictures: Mapping[str, bytes]) -> str:
    """Markdown as one page with its style and its pictures (by their paths) inside."""
    body = need("markdown").markdown(text, extensions=["tables", "fenced_code"])
    for name, png in pictures.items():
        data = base64.b64encode(png).decode()
        body = body.replace(f'src="{name}"', f'src="data:image/png;base64,{data}"')
    body = body.replace("<table>", '<div class="table" tabindex="0">\n<table>').replace("</table>", "</table>\n</div>")
    body = re.sub(r"<td>(?=[^<]{60})", '<td class="words">', body)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>\n{_STYLE}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )
