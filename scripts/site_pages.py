"""Pages of the documentation's site that lie elsewhere than in docs/*.md; mkdocs.yml names it as a hook."""

import json
import re
from collections.abc import Mapping
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

import rap_env

PROJECT = Path(__file__).parents[1]
PACKAGES = ("rap_env", "agents")  # those of the reference


def first_page(readme: str) -> str:
    """The README as a page: its links lead into docs/, where the site's pages are."""
    return readme.replace("](docs/", "](")


def notebook_page(notebook: Mapping) -> str:
    """A notebook as Markdown, with the text that its cells printed; nothing is run."""
    blocks = []
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        blocks.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        printed = (output for output in cell.get("outputs", ()) if output.get("name") == "stdout")
        blocks += ("``` {.text .output}\n" + "".join(output["text"]) + "```" for output in printed)
    return "\n\n".join(blocks) + "\n"


def reference() -> dict[str, str]:
    """A page for each package, with what its modules define, by the package's dotted name."""
    pages = {}
    for package in (path.parent for name in PACKAGES for path in sorted((PROJECT / name).rglob("__init__.py"))):
        name = ".".join(package.relative_to(PROJECT).parts)
        modules = [path.stem for path in sorted(package.glob("[!_]*.py"))]
        pages[name] = f"# {name}\n\n" + "".join(f"::: {name}.{module}\n\n" for module in modules)
    names = ", ".join(f"[`{name}`][{getattr(rap_env, name).__module__}.{name}]" for name in rap_env.__all__)
    public = f"Public names, all others may change: {names}.\n\n"
    return pages | {"rap_env": pages["rap_env"].replace("\n\n", f"\n\n{public}", 1)}


def on_config(config: MkDocsConfig) -> None:
    config.nav.append({"Reference": [{name: f"reference/{name}.md"} for name in reference()]})


def on_files(files: Files, config: MkDocsConfig) -> None:
    pages = {"index.md": first_page((PROJECT / "README.md").read_text(encoding="utf-8"))}
    pages |= {f"reference/{name}.md": text for name, text in reference().items()}
    for path in Path(config.docs_dir).glob("*.ipynb"):
        pages[f"{path.stem}.md"] = notebook_page(json.loads(path.read_text(encoding="utf-8")))
    for name, text in pages.items():
        files.append(File.generated(config, name, content=text))


def on_page_markdown(markdown: str, **_unused) -> str:
    return re.sub(r"(\]\([\w/]+)\.ipynb\)", r"\1.md)", markdown)  # links that GitHub follows to the notebook
