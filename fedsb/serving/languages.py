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
        least: a program that passes.
        library: what MultiPL-E's tests may use besides: how that shows in a text, and a program that passes where it is there.
    """

    file: str
    commands: tuple[str, ...]
    says: str = ""
    least: str = ""
    library: tuple[str, str] | None = None


_CPP = ("g++ -std=c++17 -o program program.cpp", "./program")
_JAVA = "java -Xmx512m -XX:+UseSerialGC -XX:TieredStopAtLevel=1 -cp '/usr/share/java/*' -ea Problem.java"
_MAIN = "class Problem { public static void main(String[] a) {} }"
_C = "int main(void) { return 0; }"
_GO = 'package x_test\nimport "testing"\nfunc TestIt(t *testing.T) {}'
LANGUAGES: dict[str, Language] = {
    "py": Language("program.py", ("python3 -I -B program.py",), "print('{}')"),
    "js": Language("program.js", ("node --max-old-space-size=512 program.js",), "console.log('{}')"),
    "pl": Language("program.pl", ("perl program.pl",), "print '{}';", "", ("Test::Deep", "use Test::Deep;")),
    "sh": Language("program.sh", ("bash program.sh",), "echo '{}'"),
    "java": Language("Problem.java", (_JAVA,), "", _MAIN, ("org.javatuples", f"import org.javatuples.*;\n{_MAIN}")),
    "rs": Language("program.rs", ("rustc -o program program.rs", "./program"), "", "fn main() {}"),
    "cpp": Language("program.cpp", _CPP, "", _C),
    "c": Language("program.c", ("gcc -o program program.c -lm", "./program"), "", _C),
    "go": Language("program_test.go", ("go test program_test.go",), "", _GO),
    "rb": Language("program.rb", ("ruby program.rb",), "puts '{}'", "", ("test/unit", "require 'test/unit'")),
    "lua": Language("program.lua", ("lua program.lua",), "", "", ("luaunit", "lu = require('luaunit')")),  # tests end the program
    "php": Language("program.php", ("php program.php",), "", "<?php"),
    "r": Language("program.r", ("Rscript program.r",), "cat('{}')"),
    "jl": Language("program.jl", ("julia program.jl",), 'println("{}")'),
}


@dataclass(frozen=True)
class Verdict:
    """Whether a program passed its tests, and if not, why."""

    passed: bool
    why: str


def require_languages(programs: Collection[tuple[Code, str]]) -> None:
    """Raise SandboxError unless programs of all these languages can be run here, shut in, with what their texts ask for: a small
    one of each is run, once a process."""
    require_sandbox()
    for name in sorted({code.language for code, _ in programs}):
        if name not in LANGUAGES:
            raise SandboxError(f"code in {name!r} cannot be tested; languages are {', '.join(LANGUAGES)}")
        if _tool(needed := _binary(name)) is None:
            raise SandboxError(f"code in {name!r} needs {needed}, which is not installed; install it, or leave the task out")
        if failed := _fails(name, LANGUAGES[name].least):
            raise SandboxError(f"code in {name!r} cannot be run here ({failed}); mend {needed}, or leave the task out")
        marker, least = LANGUAGES[name].library or ("", "")
        asked = marker and any(code.language == name and (marker in code.tests or marker in text) for code, text in programs)
        if asked and (failed := _fails(name, least)):
            raise SandboxError(
                f"code in {name!r} uses {marker}, which is not there ({failed}); install it, or leave the task out"
            )


@functools.cache
def _fails(language: str, program: str) -> str:
    """Why a program that must pass does not; "" if it does."""
    found = _verdict(Code(language, "", ()), program)
    return "" if found.passed else found.why or "it said something else"


def verdicts(programs: Sequence[tuple[Code, str]]) -> list[Verdict]:
    """Test programs: their code's tests, and the text that goes before these (prompt and completion).

    A program has passed if it ends well, and where tests are not in a main function, if what stands after them has run. One that
    reads its own file can fake that.

    Raises SandboxError as `require_languages`.
    """
    require_languages(programs)
    with ThreadPoolExecutor(AT_ONCE) as pool:
        return list(pool.map(lambda program: _verdict(*program), programs))


def _verdict(code: Code, text: str) -> Verdict:
    language, tool = LANGUAGES[code.language], _tool(_binary(code.language))
    assert tool is not None
    token = secrets.token_hex(8)  # so that a program which ends before its tests has not passed them
    last = f"\n{language.says.format(token)}\n" if language.says else "\n"
    first, *others = language.commands
    words = [tool.binary, *shlex.split(first)[1:]]
    command = " && ".join([shlex.join(words), *others])
    outcome = run({language.file: f"{text}\n{code.tests}{last}"}, ["sh", "-c", command], tool.folders)
    return Verdict(outcome.status == 0 and (not language.says or token in outcome.output), _why(outcome))


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
        return _Tool(f"{sys.base_prefix}/bin/python3", (_shown(name, Path(sys.base_prefix)),))
    found = shutil.which(name)
    if found is None:
        return None
    if name == "rustc":  # rustup's is a door to another one in a home
        done = subprocess.run([found, "--print", "sysroot"], capture_output=True, text=True, check=False)
        root = done.stdout.strip()
        return _Tool(f"{root}/bin/rustc", (_shown(name, Path(root)),)) if done.returncode == 0 and root else None
    path = Path(found).resolve()
    if path.is_relative_to("/usr"):
        return _Tool(found if Path(found).is_relative_to("/usr") or Path(found).parent == Path("/bin") else str(path), ())
    return _Tool(str(path), (_shown(name, path.parent.parent),))


def _shown(name: str, folder: Path) -> str:
    """A folder that programs may read because what runs them lies there. Raises SandboxError if more than that does."""
    private = any(each.resolve().is_relative_to(folder) for each in (Path.home(), Path.cwd()))
    if private and not folder.is_relative_to("/usr"):
        raise SandboxError(f"{name} lies in {folder}, which generated code is not to see; install it in a folder of its own")
    return str(folder)
