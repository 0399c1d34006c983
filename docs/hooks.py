"""mkdocs hooks: model cards and benchmark results lie outside of `docs/`, and are part of the site all the same."""

from pathlib import Path

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
OUTSIDE = ("model_cards/*.md", "benchmarks/results/*.json")


def on_files(files: Files, config) -> Files:
    """Add the files that pages link to as `../model_cards/...`."""
    for pattern in OUTSIDE:
        for path in sorted(ROOT.glob(pattern)):
            name = path.relative_to(ROOT).as_posix()
            files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page, config, files: Files) -> str:
    """Point those links to where the files are in the site."""
    up = "../" * page.file.src_uri.count("/")
    for pattern in OUTSIDE:
        folder = pattern.rsplit("/", 1)[0]
        markdown = markdown.replace(f"](../{up}{folder}/", f"]({up}{folder}/")
    return markdown.replace("](../docs/", "](../")  # what they link to in `docs/` lies beside their folder
