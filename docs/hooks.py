"""Hooks of mkdocs: files outside of docs/ that the site shows.

Pages link to files of the repository by relative path, such as `../ARCHITECTURE.md`, so that the links work on GitHub. The
site gets the README as its first page, a copy of each linked file under `repository/`, and a page with the help texts of
the command line. Links are rewritten to these places.
"""

import contextlib
import io
import posixpath
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#)([^)#\s]+)(?=[)#])")
"""Target of a relative link, without its anchor."""
COMMANDS = (
    "generate", "compare", "eval generate", "eval score", "eval report", "eval run", "precompute", "finetune", "merge",
    "convert", "env", "demo make-data", "demo train", "demo judge", "llm generate", "llm verify", "llm bench",
    "llm bench-kv", "llm search", "llm learn-mask", "llm calibrate", "llm demo",
)  # fmt: skip
sources: dict[str, str] = {}
"""Path in the repository of each page, by its path in the site."""


def place(path):
    """Return the path in the site of a file of the repository."""
    if path == "README.md":
        return "index.md"
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    if (ROOT / path).is_dir():
        return f"repository/{path}/index.md"
    # mkdocs would take a README for the first page of its folder.
    return "repository/" + re.sub(r"README\.md$", "about.md", path)


def targets(path, text):
    """Yield the target of each relative link of a page, and its path in the repository if it is a file or folder there."""
    for target in LINK.findall(text):
        inside = posixpath.normpath(posixpath.join(posixpath.dirname(path), target))
        if not inside.startswith("..") and (ROOT / inside).exists():
            yield target, inside


def on_files(files, config):
    """Add the README, the files that pages link to, and the help texts."""
    from mkdocs.structure.files import File

    sources.clear()
    sources.update({x.src_uri: f"docs/{x.src_uri}" for x in files.documentation_pages()})
    todo = ["README.md", *sources.values()]
    while todo:
        path = todo.pop()
        uri = place(path)
        if files.get_file_from_path(uri) is None:
            files.append(_added(config, path))
        if not uri.endswith(".md"):
            continue
        sources[uri] = path
        for _, linked in targets(path, _text(path)):
            if place(linked) not in sources and linked not in todo:
                todo.append(linked)
    files.append(File.generated(config, "command-line.md", content=command_line()))
    return files


def on_page_markdown(markdown, page, **_):
    """Rewrite links to files of the repository to their places in the site."""
    path = sources.get(page.file.src_uri)
    if path is None:
        return markdown
    places = {target: place(linked) for target, linked in targets(path, markdown)}
    start = posixpath.dirname(page.file.src_uri) or "."

    def rewritten(match):
        uri = places.get(match[0])
        return match[0] if uri is None else posixpath.relpath(uri, start)

    return LINK.sub(rewritten, markdown)


def command_line():
    """Return a page with the help text of each command."""
    from dit_accel.cli import main

    lines = ["# Command line", ""]
    for command in ("", *COMMANDS):
        with contextlib.redirect_stdout(io.StringIO()) as text, contextlib.suppress(SystemExit):
            main([*command.split(), "--help"])
        lines += [
            f"## dit-accel {command}".rstrip(),
            "",
            "```text",
            text.getvalue().strip(),
            "```",
            "",
        ]
    return "\n".join(lines)


def _added(config, path):
    """Return a file of the repository as a file of the site; a folder becomes a list of its files."""
    from mkdocs.structure.files import File

    if (ROOT / path).is_dir():
        return File.generated(config, place(path), content=_text(path))
    return File.generated(config, place(path), abs_src_path=str(ROOT / path))


def _text(path):
    """Return the text of a page; that of a folder lists its files."""
    if not (ROOT / path).is_dir():
        return (ROOT / path).read_text(encoding="utf-8")
    names = sorted(x.name for x in (ROOT / path).iterdir() if x.is_file())
    name = path.rsplit("/", 1)[-1]
    return "\n".join([f"# {path}", "", *(f"- [{x}]({name}/{x})" for x in names)])
