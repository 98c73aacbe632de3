"""Command blocks of Markdown files: fenced or indented, with the reason why one is not run."""

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PROGRAMS = {
    "silotune", "make", "python", "python3.11", "pip", "tar", "docker", "podman", "sudo", "systemctl",
    "curl", "jq", "git", "export", "cd", "cat", "install", "head", "openssl", "promtool", "cosign",
    "sha256sum", "uv",
}  # fmt: skip
SHELLS = {"sh", "bash", "console", "shell"}

_FENCE = re.compile(r"^ {0,3}```(\w*)\s*$")
_REASON = re.compile(r"<!-- not run:(.*?)-->", re.DOTALL)


@dataclass(frozen=True)
class Block:
    """One block: where it begins, its language if it says one, its lines, and why it is not run."""

    path: Path
    line: int
    language: str
    lines: tuple[str, ...]
    reason: str | None

    @property
    def name(self):
        return f"{self.path.relative_to(ROOT)}:{self.line}"

    @property
    def commands(self):
        """Its commands, without comments; a line that ends with a backslash goes on in the next."""
        text = "\n".join(self.lines).replace("\\\n", " ")
        lines = (re.sub(r"(^|\s)#.*", "", line).strip() for line in text.split("\n"))
        return [line.removeprefix("$ ") for line in lines if line]

    @property
    def is_commands(self):
        if self.language:
            return self.language in SHELLS
        first = next(iter(self.commands), "")
        words = [word for word in first.split() if not re.match(r"[A-Z_]+=", word)]
        return bool(words) and words[0].rpartition("/")[2] in PROGRAMS | {"pre-commit"}


def blocks_of(path):
    """Every block of a file, in order."""
    lines, found, at = path.read_text().split("\n"), [], 0
    while at < len(lines):
        if fence := _FENCE.match(lines[at]):
            end = next(i for i in range(at + 1, len(lines)) if lines[i].strip() == "```")
            found.append(_block(path, lines, at, lines[at + 1 : end], fence[1]))
            at = end + 1
        elif lines[at].startswith("    ") and (at == 0 or not lines[at - 1].strip()):
            end = at
            while end < len(lines) and (lines[end].startswith("    ") or not lines[end].strip()):
                end += 1
            body = [line[4:] for line in lines[at:end]]
            found.append(_block(path, lines, at, body, ""))
            at = end
        else:
            at += 1
    return found


def _block(path, lines, at, body, language):
    before = "\n".join(lines[:at]).rstrip()
    comments = list(_REASON.finditer(before))
    near = comments and comments[-1].end() == len(before)
    reason = " ".join(comments[-1][1].split()) if near else None
    return Block(path, at + 1, language, tuple(body), reason)


def documents():
    """Every Markdown file that a user reads."""
    found = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
    return found + sorted((ROOT / "examples").rglob("*.md"))


def commands_in_prose(path):
    """``silotune …`` in inline code, with the number of its line."""
    text = re.sub(
        r"```.*?```", lambda m: re.sub(r"[^\n]", " ", m[0]), path.read_text(), flags=re.DOTALL
    )
    for match in re.finditer(r"`(silotune [^`]*)`", text):
        yield text.count("\n", 0, match.start()) + 1, " ".join(match[1].split())
