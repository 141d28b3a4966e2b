"""Run the code blocks in Markdown files, each in its own fresh copy of the repository.

`python -m tests.documents README.md ...` runs a page's shell blocks exactly as written, including installations; CI
calls it in an empty virtual environment. tests/test_documents.py runs the blocks of all other pages.

The first word after the fence is the language: `sh` and `python` blocks run, `text` blocks do not. The words after it
are options, which a rendered page does not show:

    continues        the block continues the previous block, in the same copy
    needs=NAME,...   a package (the block is skipped if it is not installed), or a key of ELSEWHERE (always skipped)
    quotes=FILE      an excerpt: FILE contains its statements and lines; comments and docstrings may be omitted
    varies           the output of the previous block, which differs between machines

The blocks of docs/tutorial/ form one program, which tests/test_tutorial.py runs.
"""

import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).parents[1]
TUTORIAL = sorted(ROOT.glob("docs/tutorial/*.md"))
PAGES = sorted(
    [
        *(page for folder in (".", "docs", "checkpoint", ".github/**") for page in ROOT.glob(f"{folder}/*.md")),
        *TUTORIAL,
    ]
)
ELSEWHERE = {
    "gpu": "an NVIDIA GPU",
    "network": "a network",
    "cluster": "several machines",
    "terminal": "a second terminal, while a server runs",
    "hours": "minutes to days of computation",
}


@dataclass
class Block:
    page: Path
    line: int  # the line of the opening fence, from 1
    language: str
    code: str
    options: dict[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    @property
    def needs(self) -> list[str]:
        return [name for name in self.options.get("needs", "").split(",") if name]

    def before(self) -> str:
        """The code of the blocks that this one continues."""
        return self.options.get("before", "")


def blocks(page: Path) -> list[Block]:
    """All fenced code blocks of a page, in order."""
    found: list[Block] = []
    text = page.read_text(encoding="utf-8")
    for match in re.finditer(r"^( *)```(\S+)(.*)\n((?:.*\n)*?)\1```$", text, re.MULTILINE):
        indent, language, words, code = match.groups()
        options = dict(word.partition("=")[::2] for word in words.split())
        line = text.count("\n", 0, match.start()) + 1
        block = Block(page, line, language, re.sub(f"^{indent}", "", code, flags=re.MULTILINE), options)
        if "continues" in options:
            earlier = next(b for b in reversed(found) if b.language == language)
            options["before"] = earlier.before() + earlier.code
            options["needs"] = ",".join(dict.fromkeys(earlier.needs + block.needs))
        found.append(block)
    return found


def copy_repository(folder: Path) -> None:
    """Copy the working tree: tracked files, and new files that are not ignored."""
    names = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, check=True, capture_output=True, text=True,
    ).stdout.split("\0")  # fmt: skip
    for name in filter(None, names):
        if (ROOT / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)


def main(pages: list[str]) -> int:
    """Run the shell blocks of the pages as written; stop at the first command that fails."""
    for block in (b for page in pages for b in blocks(ROOT / page) if b.language == "sh"):
        missing = [ELSEWHERE[name] for name in block.needs if name in ELSEWHERE]
        print(f"\n== {block.name}" + (f": skipped, needs {', '.join(missing)}" if missing else ""), flush=True)
        if not missing:
            with TemporaryDirectory() as folder:
                copy_repository(Path(folder))
                subprocess.run(["git", "init", "--quiet"], cwd=folder, check=True)
                subprocess.run(["bash", "-euxo", "pipefail", "-c", block.before() + block.code], cwd=folder, check=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
