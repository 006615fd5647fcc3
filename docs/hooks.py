"""What MkDocs does beside rendering: the READMEs become pages, and no public name may be missing.

The READMEs keep their paths, so that links between them, and to their pictures, hold as they are. A
source file that they link to becomes a page that shows it.
"""

import logging
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import griffe
from mkdocs.structure.files import File, Files, InclusionLevel
from pygments.formatters import HtmlFormatter

ROOT = Path(__file__).parents[1]
PICTURES = (".png", ".svg")
BASES = ("models.stack.RecurrentStack", "models.cell.RecurrentCell")
"""Classes to derive from."""

LINK = re.compile(r"(\]\(|<img src=\")([^)\s\"#:]+)(?=[)\"#])")
# Names in code, but for those in a link, a heading or a block of code.
CODE = re.compile(r"<(a|h\d|pre|autoref)\b.*?</\1>|<code>([\w.]+)</code>", re.DOTALL)
SHARED = ("GRUCell", "LSTMCell", "pad_sequences")
"""Public names that elsewhere than on the first pages may mean those of flax, Keras or Equinox."""

log = logging.getLogger("mkdocs.hooks.lstm_flax")  # a warning here fails the build
anchors: set[str] = set()


def on_files(files: Files, config: Any) -> Files:
    """Add the READMEs, the pictures that they show, and the sources that they link to."""
    anchors.clear()
    public_members.cache_clear()
    names.cache_clear()
    colours = HtmlFormatter(style="default").get_style_defs(".highlight")
    files.append(File.generated(config, "pygments.css", content=colours))
    for page in guide():
        files.append(File.generated(config, name(page), abs_src_path=str(page)))
        for target in targets(page):
            if name(target) in files.src_uris or shown(target) in files.src_uris:
                continue
            if not target.exists():
                log.warning("%s links to %s, which is not there", name(page), name(target))
            elif target.suffix in PICTURES:
                files.append(File.generated(config, name(target), abs_src_path=str(target)))
            elif target.suffix != ".md":
                text = f"# {name(target)}\n\n```{target.suffix[1:]}\n{target.read_text()}```\n"
                place = InclusionLevel.NOT_IN_NAV
                files.append(File.generated(config, shown(target), content=text, inclusion=place))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Point links to source files at the pages that show them."""
    folder = (ROOT / page.file.src_uri).parent

    def point(found: re.Match[str]) -> str:
        link = (folder / found[2]).resolve()
        is_shown = link.is_relative_to(ROOT) and shown(link) in files.src_uris
        return f"{found[0]}.md" if is_shown else found[0]

    return LINK.sub(point, markdown)


def on_page_content(html: str, page: Any, config: Any, files: Files) -> str:
    """Link each public name in code to its place in the reference."""
    anchors.update(re.findall(r'id="(lstm_flax[\w.]*)"', html))

    def link(found: re.Match[str]) -> str:
        is_shared = found[2] in SHARED and page.file.src_uri not in ("layers.md", "cells.md")
        path = None if is_shared else names().get(found[2])
        return f'<autoref identifier="{path}">{found[0]}</autoref>' if path else found[0]

    return CODE.sub(link, html)


def on_post_build(config: Any) -> None:
    """Warn of public names without a docstring or a page."""
    for member in public_members():
        if anchors.isdisjoint((member.path, member.canonical_path)):
            log.warning("%s is public, but on no page of docs/reference", member.path)
        for part in (member, *public_methods(member)):
            if not part.has_docstring:
                log.warning("%s is public, but has no docstring", part.path)


def guide() -> Iterator[Path]:
    """The READMEs, and the other pages beside the code that they describe."""
    yield from sorted(ROOT.glob("*.md"))
    for folder in ("lstm_flax", "experiments"):
        yield from sorted((ROOT / folder).rglob("*.md"))


def targets(page: Path) -> Iterator[Path]:
    """The files that a page links to or shows; some may not exist."""
    for _, link in LINK.findall(page.read_text()):
        target = (page.parent / link).resolve()
        if target.is_relative_to(ROOT):
            yield target


def name(path: Path) -> str:
    """The path of a file within the project, which is that of its page."""
    return path.relative_to(ROOT).as_posix()


def shown(source: Path) -> str:
    """The path of the page that shows a source file."""
    return f"{name(source)}.md"


@cache
def public_members() -> list[griffe.Object | griffe.Alias]:
    """What `lstm_flax` exports, the bases, and the public names of its modules but `models`."""
    package = griffe.load("lstm_flax", search_paths=[ROOT])
    found = [package[name] for name in (*(package.exports or ()), *BASES)]
    for module in package.modules.values():
        if module.name != "models":
            found += [m for m in module.members.values() if m.is_public and not m.is_module]
    return found


def public_methods(member: griffe.Object | griffe.Alias) -> list[griffe.Object | griffe.Alias]:
    """The methods and properties that a class defines, but for special ones such as `__add__`."""
    own = member.members.values() if member.is_class else ()
    methods = [m for m in own if m.is_function or "property" in m.labels]
    return [m for m in methods if m.is_public and not m.is_special]


@cache
def names() -> dict[str, str]:
    """Where names lead that stand in code: `LSTMStack`, `training.evaluate` or whole paths."""
    found = {}
    for member in public_members():
        short = member.path.removeprefix("lstm_flax.")
        keys = (member.path, short, member.name if member.is_class else short)
        found |= dict.fromkeys(keys, member.path)
    return found
