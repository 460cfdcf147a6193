"""The languages in which generated code can be tested: how a program is put together, and what runs it.

Names are those of MultiPL-E (Cassano et al., arXiv 2208.08227). A language is there if its compiler or interpreter is.
"""

import functools
import secrets
import shlex
import shutil
import subprocess
import sys
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from fedsb.data.code import Code
from fedsb.errors import SandboxError
from fedsb.serving.sandbox import Outcome, require_sandbox, run

AT_ONCE = 2  # programs


@dataclass(frozen=True)
class Language:
    """How programs of a language are run.

    Attributes:
        file: the program's file.
        commands: shell words, one after another; the first word of the first is what must be there.
        says: a line that prints a text (`{}`) once all tests before it have passed; "": tests stand in a main function.
    """

    file: str
    commands: tuple[str, ...]
    says: str = ""


_CPP = ("g++ -std=c++17 -o program program.cpp", "./program")
LANGUAGES: dict[str, Language] = {
    "py": Language("program.py", ("python3 -I -B program.py",), "print('{}')"),
    "js": Language("program.js", ("node --max-old-space-size=512 program.js",), "console.log('{}')"),
    "pl": Language("program.pl", ("perl program.pl",), "print '{}';"),
    "sh": Language("program.sh", ("bash program.sh",), "echo '{}'"),
    "java": Language("Problem.java", ("java -Xmx512m -XX:+UseSerialGC -XX:TieredStopAtLevel=1 -ea Problem.java",)),
    "rs": Language("program.rs", ("rustc -o program program.rs", "./program")),
    "cpp": Language("program.cpp", _CPP),
    "c": Language("program.c", ("gcc -o program program.c -lm", "./program")),
    "go": Language("program.go", ("go run program.go",)),
    "rb": Language("program.rb", ("ruby program.rb",), "puts '{}'"),
    "lua": Language("program.lua", ("lua program.lua",)),  # its tests end in os.exit(luaunit.LuaUnit.run())
    "php": Language("program.php", ("php program.php",)),
    "r": Language("program.r", ("Rscript program.r",), "cat('{}')"),
    "jl": Language("program.jl", ("julia program.jl",), 'println("{}")'),
}


@dataclass(frozen=True)
class Verdict:
    """Whether a program passed its tests, and if not, why."""

    passed: bool
    why: str


def require_languages(names: Collection[str]) -> None:
    """Raise SandboxError unless programs of all these languages can be run here, shut in."""
    require_sandbox()
    for name in sorted(names):
        if name not in LANGUAGES:
            raise SandboxError(f"code in {name!r} cannot be tested; languages are {', '.join(LANGUAGES)}")
        if _tool(needed := _binary(name)) is None:
            raise SandboxError(f"code in {name!r} needs {needed}, which is not installed; install it, or leave the task out")


def verdicts(programs: Sequence[tuple[Code, str]]) -> list[Verdict]:
    """Test programs: their code's tests, and the text that goes before these (prompt and completion).

    Raises SandboxError as `require_languages`.
    """
    require_languages({code.language for code, _ in programs})
    with ThreadPoolExecutor(AT_ONCE) as pool:
        return list(pool.map(lambda program: _verdict(*program), programs))


def _verdict(code: Code, text: str) -> Verdict:
    language, tool = LANGUAGES[code.language], _tool(_binary(code.language))
    assert tool is not None
    token = secrets.token_hex(8)  # so that a program which ends before its tests has not passed them
    last = f"\n{language.says.format(token)}\n" if language.says else "\n"
    first, *others = language.commands
    words = [tool.binary, *first.split()[1:]]
    command = " && ".join([shlex.join(words), *others])
    outcome = run({language.file: f"{text}\n{code.tests}{last}"}, ["sh", "-c", command], tool.folders)
    return Verdict(outcome.status == 0 and (not language.says or outcome.output.rstrip().endswith(token)), _why(outcome))


def _why(outcome: Outcome) -> str:
    lines = outcome.output.strip().splitlines()
    return outcome.ended or f"status {outcome.status}" + (f": {lines[-1][:200]}" if lines and outcome.status else "")


def _binary(language: str) -> str:
    return LANGUAGES[language].commands[0].split()[0]


@dataclass(frozen=True)
class _Tool:
    binary: str
    folders: tuple[str, ...]  # that it needs besides /usr


@functools.cache
def _tool(name: str) -> _Tool | None:
    if name == "python3":  # the one that runs this
        return _Tool(f"{sys.base_prefix}/bin/python3", (sys.base_prefix,))
    found = shutil.which(name)
    if found is None:
        return None
    if name == "rustc":  # rustup's is a door to another one in a home
        done = subprocess.run([found, "--print", "sysroot"], capture_output=True, text=True, check=False)
        root = done.stdout.strip()
        return _Tool(f"{root}/bin/rustc", (root,)) if done.returncode == 0 and root else None
    path = Path(found).resolve()
    return _Tool(found, () if path.is_relative_to("/usr") else (str(path.parent.parent),))
