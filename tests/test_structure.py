"""The module's shape, as its docstring promises it, and what no file of the repository may contain.

Each rule is a function from source text to the list of what breaks it, so that each is also shown to be able to fail.
"""

from __future__ import annotations

import ast
import builtins
import functools
import importlib.metadata
import io
import itertools
import re
import subprocess
import symtable
import sys
import tokenize
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
MODULE = ROOT / "estelle_updater.py"
RULE = "# " + "=" * 78

FUNCTION_LINES, MOST_FUNCTIONS_LINES, MOST = 60, 35, 0.9
CLASS_LINES = 300
DIVIDED_LINES = 100  # a longer class has parts with names
# How much a line of code (neither blank nor comment nor docstring) holds. Nodes a line of those that we learn from:
# git-filter-repo 4.7, bottle 5.1, websockets 4.6 to 5.6. The limits go down, never up.
NODES_PER_LINE = 5.7
PER_100_LINES: dict[str, tuple[float, tuple[type[ast.AST], ...]]] = {
    "assignments in expressions": (0.4, (ast.NamedExpr,)),
    "conditional expressions": (2.0, (ast.IfExp,)),
    "comprehensions": (3.0, (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)),
}
PROSE = 0.12  # of all lines: comments and docstrings
NO_NODES = (ast.Load, ast.Store, ast.Del, ast.Constant)
TOP_LEVEL = {
    ".ci", ".github", ".gitignore", "LICENSE", "README.md", "config", "estelle_updater.py", "pm2.config.js",
    "pyproject.toml", "systemd", "tests",
}  # fmt: skip
RUN_TIME_PACKAGES = {"websockets", "tomli_w"}
PURE = range(1, 10)
# What a pure section may not touch: sockets, files, processes, clocks, chance, the environment, the terminal.
IMPURE_NAMES = {
    "asyncio", "ctypes", "fcntl", "getpass", "glob", "input", "locale", "logging", "mmap", "msvcrt", "open", "os",
    "pathlib", "platform", "print", "queue", "random", "secrets", "select", "selectors", "shutil", "signal", "socket",
    "ssl", "subprocess", "sys", "tempfile", "threading", "time", "uuid", "winreg", "Path", "PosixPath", "WindowsPath",
}  # fmt: skip
CLOCKS = {("datetime", "now"), ("datetime", "today"), ("datetime", "utcnow"), ("date", "today")}


class Section(NamedTuple):
    number: int
    name: str
    holds: str
    line: int


# ---------------------------------------------------------------------------- the module's parts


@functools.lru_cache(2)
def tree_of(source: str) -> ast.Module:
    """The syntax tree for all rules that only look at it: making it takes most of their time."""
    return ast.parse(source)


@functools.lru_cache(2)
def nodes_of(source: str) -> list[ast.AST]:
    """All of its nodes."""
    return list(ast.walk(tree_of(source)))


def sections_of(source: str) -> list[Section]:
    """The sections by their banners; the header, which has none, comes first."""
    found = [Section(0, "Header", "", 0)]
    for number, line in enumerate(source.splitlines(), 1):
        if match := re.fullmatch(r"# (\d+)\. ([^:]+): (.+)", line):
            found.append(Section(int(match[1]), match[2], match[3], number))
    return found


def statements_of(source: str, tree: ast.Module | None = None) -> Iterator[tuple[Section, list[ast.stmt]]]:
    """Each section with its module-level statements, of a `tree` of the caller's own where it changes them."""
    sections, body = sections_of(source), (tree or tree_of(source)).body
    ends = [section.line for section in sections[1:]] + [10**9]
    for section, end in zip(sections, ends, strict=True):
        yield section, [node for node in body if section.line <= node.lineno < end]


class _WithoutAnnotations(ast.NodeTransformer):
    """Annotations may name what is further down, in quotes, so they bind a section to nothing."""

    def visit_arg(self, node: ast.arg) -> ast.arg:
        node.annotation = None
        return node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        node.returns = None
        return self.generic_visit(node)

    def visit_AsyncFunctionDef(self, node: ast.AsyncFunctionDef) -> ast.AST:
        node.returns = None
        return self.generic_visit(node)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST:
        value = node.value or ast.Constant(None)
        return self.generic_visit(ast.copy_location(ast.Assign([node.target], value), node))


def names_of(statements: list[ast.stmt]) -> tuple[set[str], set[str]]:
    """The module-level names that statements bind, and those that they use, in functions and classes too."""
    tree = _WithoutAnnotations().visit(ast.Module(statements, []))
    table = symtable.symtable(ast.unparse(ast.fix_missing_locations(tree)), "section", "exec")
    bound = {symbol.get_name() for symbol in table.get_symbols() if symbol.is_assigned() or symbol.is_imported()}

    def used(scope: symtable.SymbolTable) -> Iterator[str]:
        for symbol in scope.get_symbols():
            elsewhere = symbol.is_declared_global() or (symbol.is_global() and symbol.is_referenced())
            if elsewhere or (scope is table and symbol.is_referenced()):
                yield symbol.get_name()
        for child in scope.get_children():
            yield from used(child)

    return bound, set(used(table))


@functools.lru_cache(2)
def names_by_section(source: str) -> list[tuple[Section, set[str], set[str]]]:
    """`names_of` each section."""
    return [(section, *names_of(statements)) for section, statements in statements_of(source, ast.parse(source))]


def imports_of(statements: list[ast.stmt]) -> set[str]:
    """Full names of the imported modules, those of lazy imports included."""
    found = set()
    for node in (node for statement in statements for node in ast.walk(statement)):
        match node:
            case ast.Import():
                found |= {alias.name for alias in node.names}
            case ast.ImportFrom():
                found.add(node.module or ".")
            case ast.Call(func=ast.Name("_Lazy" | "__import__"), args=[ast.Constant(str(name))]):
                found.add(name)
    return found


# ---------------------------------------------------------------------------- rules on the module


def breaks_banners(source: str) -> list[str]:
    """A line of `# ` and 78 `=`, `# 7. Name: one line`, the line again; numbers rise."""
    lines = ["", *source.splitlines(), ""]
    problems = []
    for number, line in enumerate(lines):
        numbered = re.match(r"#+\s*\d+\s*[.:)]\s*\w", line)
        if numbered and not re.fullmatch(r"# \d+\. [A-Z][^:]*: \S.*\S", line):
            problems.append(f"line {number} is no title: {line}")
        if numbered and not lines[number - 1] == lines[number + 1] == RULE:
            problems.append(f"line {number} has no rule above and below: {line}")
        if re.fullmatch(r"#\s*={5,}.*", line):
            if line != RULE:
                problems.append(f"line {number} is no rule of 78 signs")
            elif not any(re.match(r"# \d+\. ", lines[number + step]) for step in (-1, 1)):
                problems.append(f"line {number} is a rule without a title")
    numbers = [section.number for section in sections_of(source)]
    if any(one >= two for one, two in itertools.pairwise(numbers)):
        problems.append(f"numbers do not rise: {numbers}")
    return problems


def breaks_table(source: str) -> list[str]:
    """The docstring's table and the banners say the same, word for word."""
    rows = re.findall(r"^\| (\d+) +\| (.*?) +\| (.*?) +\|$", ast.get_docstring(tree_of(source)) or "", re.MULTILINE)
    table = [(int(number), name, holds) for number, name, holds in rows if number != "0"]
    banners = [section[:3] for section in sections_of(source)[1:]]
    problems = [f"only in the docstring: {row}" for row in table if row not in banners]
    problems += [f"only as a banner: {row}" for row in banners if row not in table]
    return problems or ([] if table == banners else ["the order differs"])


def breaks_map(source: str) -> list[str]:
    """The ways and words in the docstring name what is there, in the section that they say."""
    text = ast.get_docstring(tree_of(source)) or ""
    home: dict[str, int] = {}
    for section, statements in statements_of(source):
        for node in statements:
            if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                home[node.name] = section.number
            if isinstance(node, ast.ClassDef):
                methods = [each for each in node.body if isinstance(each, ast.FunctionDef | ast.AsyncFunctionDef)]
                home |= {f"{node.name}.{method.name}": section.number for method in methods}
    steps = re.findall(r"(?m)^ {4}(\w+(?:\.\w+)?) +(\d+)  ", text)
    problems = [f"{name} is not in section {number}" for name, number in steps if home.get(name) != int(number)]
    named = re.findall(r"\b[A-Z][a-z]\w*\.[a-z_]\w+|(?<=\b[Aa] )[A-Z]\w+(?= is)", text)
    return problems + [f"nothing is called {name}" for name in named if name not in home]


def breaks_upward_order(source: str) -> list[str]:
    """A section uses only names of the sections above it, its own, and built-in ones."""
    known = set(dir(builtins)) | {"__file__", "__name__", "__doc__", "__spec__"}
    parts = names_by_section(source)
    home = {name: section for section, bound, _ in reversed(parts) for name in bound}
    problems = []
    for section, bound, used in parts:
        known |= bound
        for name in sorted(used - known):
            where = f"of section {home[name].number}" if name in home else "that nobody defines"
            problems.append(f"section {section.number} uses {name} {where}")
    return problems


def breaks_purity(source: str) -> list[str]:
    """Sections 1 to 9 get time, bytes and chance as arguments."""
    problems = []
    for (section, statements), (_, _, used) in zip(statements_of(source), names_by_section(source), strict=True):
        if section.number not in PURE:
            continue
        imported = {name.partition(".")[0] for name in imports_of(statements)}
        clocks = {
            f"{node.value.id}.{node.attr}"
            for statement in statements
            for node in ast.walk(statement)
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
            if (node.value.id, node.attr) in CLOCKS
        }
        impure = (used | imported) & IMPURE_NAMES | clocks
        problems += [f"section {section.number} uses {name}" for name in sorted(impure)]
    return problems


def breaks_sizes(source: str) -> list[str]:
    """The module, its classes and its functions are short enough to be read."""
    lengths: list[int] = []
    problems = []
    for node in nodes_of(source):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            length, limit = (node.end_lineno or 0) - node.lineno + 1, CLASS_LINES
            if not isinstance(node, ast.ClassDef):
                lengths.append(length)
                limit = FUNCTION_LINES
            if length > limit:
                problems.append(f"{node.name} has {length} lines, more than {limit}")
    short = sum(length <= MOST_FUNCTIONS_LINES for length in lengths)
    if short < MOST * len(lengths):
        problems.append(f"only {short} of {len(lengths)} functions have at most {MOST_FUNCTIONS_LINES} lines")
    return problems


def prose_lines(source: str) -> set[int]:
    """The numbers of the lines that hold a comment alone, or a part of a docstring."""
    lines, prose = source.splitlines(), set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT and lines[token.start[0] - 1].lstrip().startswith("#"):
            prose.add(token.start[0])
    for node in nodes_of(source):
        documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        if isinstance(node, documented) and ast.get_docstring(node) is not None:
            prose.update(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    return prose


def breaks_density(source: str) -> list[str]:
    """A line holds one idea: few nodes, few assignments in conditions, comprehensions and conditional expressions."""
    lines, prose = source.splitlines(), prose_lines(source)
    code = sum(bool(line.strip()) and number not in prose for number, line in enumerate(lines, 1))
    nodes = [node for node in nodes_of(source) if not isinstance(node, NO_NODES)]
    density = len(nodes) / code
    problems = [f"{density:.2f} nodes a line, more than {NODES_PER_LINE}"] if density > NODES_PER_LINE else []
    for name, (most, kinds) in PER_100_LINES.items():
        found = 100 * sum(isinstance(node, kinds) for node in nodes) / code
        if found > most:
            problems.append(f"{found:.2f} {name} in 100 lines, more than {most}")
    if len(prose) < PROSE * len(lines):
        problems.append(f"{len(prose)} of {len(lines)} lines are prose, less than {PROSE:.0%}")
    return problems


def breaks_dividers(source: str) -> list[str]:
    """A long class has parts with names: lines `# Word ...` at the level of its methods, each after a blank line."""
    lines, problems = ["", *source.splitlines()], []
    for node in nodes_of(source):
        if isinstance(node, ast.ClassDef) and (node.end_lineno or 0) - node.lineno >= DIVIDED_LINES:
            body = range(node.lineno + 1, node.end_lineno or 0)
            indent = " " * (node.col_offset + 4)
            dividers = [n for n in body if re.match(indent + "# [A-Z]", lines[n]) and not lines[n - 1].strip()]
            if len(dividers) < 2:
                problems.append(f"{node.name} has {(node.end_lineno or 0) - node.lineno + 1} lines and no dividers")
    return problems


def breaks_imports(source: str) -> list[str]:
    """Beside the standard library, only the packages that the header lists."""
    roots = {name.partition(".")[0] for name in imports_of(tree_of(source).body)}
    return sorted(roots - sys.stdlib_module_names - RUN_TIME_PACKAGES)


def breaks_names(source: str) -> list[str]:
    """Names say what is done, not that something is done."""
    vague = re.compile(r"_*(handle|process)_|manager|utils", re.IGNORECASE)
    defined = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    given = {"process_event"}  # websockets calls it so
    found = (node.name for node in nodes_of(source) if isinstance(node, defined) and node.name not in given)
    return [name for name in found if vague.match(name) or re.search(r"(?i)manager|utils", name)]


def breaks_old_pythons(source: str) -> list[str]:
    """Python 3.6 and later read the module to its end: else they say `invalid syntax` somewhere, and never get to the
    sentence at the top."""
    problems = []
    try:
        ast.parse(source, feature_version=(3, 6))
    except SyntaxError as problem:
        problems.append(f"line {problem.lineno}: {problem.msg}")
    lines = source.splitlines()
    # what today's parser takes for any version
    newer = {
        r" *(async )?with \($": "with in parentheses",
        r"from __future__ import annotations": "annotations as text",
    }
    for form, what in newer.items():
        problems += [f"line {number}: {what}" for number, line in enumerate(lines, 1) if re.match(form, line)]
    return problems


def evaluated_annotations(tree: ast.Module) -> Iterator[ast.expr]:
    """Those of functions and of what modules and classes hold; a function's own variables' are never looked at."""
    todo: list[tuple[ast.AST, bool]] = [(tree, False)]
    while todo:
        node, inside = todo.pop()
        if isinstance(node, ast.arg) and node.annotation:
            yield node.annotation
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            inside = True
            if node.returns:
                yield node.returns
        elif isinstance(node, ast.AnnAssign) and not inside:
            yield node.annotation
        todo += [(child, inside) for child in ast.iter_child_nodes(node)]


def breaks_annotations(source: str) -> list[str]:
    """They are values where the source runs: what is defined further down, or imported at its first use, is quoted.

    Importing the module shows that as well, but not for another platform's part, nor what it imports too early.
    """
    tree = tree_of(source)
    ready: dict[str, int] = dict.fromkeys(dir(builtins), 0)
    statements: list[ast.stmt] = list(tree.body)
    for node in statements:
        match node:
            case ast.If(test=ast.Name("TYPE_CHECKING")):
                statements += node.orelse
            case ast.If():
                statements += [*node.body, *node.orelse]
            case ast.ClassDef() | ast.FunctionDef() | ast.AsyncFunctionDef():
                ready.setdefault(node.name, node.end_lineno or 0)
            case ast.Import() | ast.ImportFrom():
                ready |= {alias.asname or alias.name: node.lineno for alias in node.names}
            case ast.Assign(targets=[ast.Name(name)]) | ast.AnnAssign(target=ast.Name(name)):
                ready.setdefault(name, node.end_lineno or 0)
    problems = []
    for number, line in enumerate(source.splitlines(), 1):
        if re.search(r"""(get\(|\[)["']__annotations__""", line):
            problems.append(f"line {number}: from Python 3.14 on they are in no dictionary before they are asked for")
    for annotation in evaluated_annotations(tree):
        for used in (node for node in ast.walk(annotation) if isinstance(node, ast.Name)):
            if ready.get(used.id, used.lineno) >= used.lineno:
                problems.append(f"line {used.lineno}: {used.id} is not there yet")
    return problems


# ---------------------------------------------------------------------------- rules on every file


def breaks_places(text: str) -> list[str]:
    """No path of the machine that it was written on."""
    found = re.findall(r"(?<![\w.~-])/(?:work|root|Users)/\S*|(?<![\w.~-])/home/\w+/\S*|[.]pyenv/\S*", text)
    return [place for place in found if place]


def breaks_hosts(text: str) -> list[str]:
    """No package registry's name: where packages come from is the machine's setting."""
    hosts = [
        ("pypi", "org"), ("pythonhosted", "org"), ("npmjs", "org"), ("npmjs", "com"), ("deb.debian", "org"),
        ("security.debian", "org"), ("archive.ubuntu", "com"), ("crates", "io"), ("proxy.golang", "org"),
        ("npmmirror", "com"), ("unpkg", "com"), ("jsdelivr", "net"), ("ghcr", "io"), ("docker", "io"),
    ]  # fmt: skip
    return [host for host in (".".join(pair) for pair in hosts) if host in text.lower()]


def breaks_words(text: str) -> list[str]:
    """The repository speaks of the product alone, and leaves nothing for later; README names clients that it serves."""
    text = re.sub("(?i)`?clau" + r"de(?: Desktop|_desktop_config\.json| Code| mcp add)", "", text)
    later = "|".join(("TO" + "DO", "FIX" + "ME", "X" + "XX", "NotImplemented" + "Error"))
    tools = "|".join(("clau" + "de", "anthro" + "pic", "open" + "ai", "chat" + "gpt", "copi" + "lot"))
    story = "|".join((r"issues? #?\d", r"(?:close|fixe|resolve)[sd] #\d", "co-authored" + "-by", "sub" + "agent"))
    return re.findall(rf"\b(?:{later})\b", text) + re.findall(rf"(?i)\b(?:{tools}|{story})", text)


def breaks_top_level(names: list[str]) -> list[str]:
    """The given shape: one module and a few folders."""
    return sorted({name.partition("/")[0] for name in names} - TOP_LEVEL)


# ---------------------------------------------------------------------------- what is there keeps them


def repository_files() -> list[str]:
    """Committed files, and those that would be."""
    argv = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listed = subprocess.run(argv, cwd=ROOT, capture_output=True, check=True, timeout=60)
    return sorted(name for name in listed.stdout.decode().split("\0") if name and (ROOT / name).exists())


MODULE_RULES = [
    breaks_banners, breaks_table, breaks_upward_order, breaks_purity, breaks_sizes, breaks_density, breaks_dividers,
    breaks_imports, breaks_names, breaks_old_pythons,
    breaks_annotations, breaks_map,
]  # fmt: skip


@pytest.mark.xdist_group("structure")  # one worker makes the tree of the module
@pytest.mark.parametrize("rule", MODULE_RULES, ids=lambda rule: rule.__name__)
def test_module_keeps_the_rule(rule: Callable[[str], list[str]]):
    assert rule(MODULE.read_text("utf-8")) == []


@pytest.mark.parametrize("rule", [breaks_places, breaks_hosts, breaks_words], ids=lambda rule: rule.__name__)
def test_every_file_keeps_the_rule(rule: Callable[[str], list[str]]):
    texts = {name: name + "\n" + (ROOT / name).read_text("utf-8", "replace") for name in repository_files()}
    texts |= {name: name for name in texts if name.endswith(".png")}  # in so many bytes any word comes about by chance
    assert "estelle_updater.py" in texts
    assert {name: found for name, text in texts.items() if (found := rule(text))} == {}


def breaks_seam(source: str) -> list[str]:
    """What a test reaches of the module stands in tests/seam.py; a text that another process runs may import."""
    modules = [
        (node.lineno, name)
        for node in ast.walk(ast.parse(source))  # each text is looked at once
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in ([node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names])
    ]
    return [f"line {line}: from tests.seam, not from the module" for line, name in modules if name == MODULE.stem]


def test_tests_reach_the_module_through_the_seam_alone():
    seam = ROOT / "tests" / "seam.py"
    texts = {path: path.read_text("utf-8") for path in (ROOT / "tests").rglob("*.py") if path != seam}
    assert {path.name: found for path, text in texts.items() if (found := breaks_seam(text))} == {}
    reached = re.findall(r"(?m)^    (\w+) as \w+,$", seam.read_text("utf-8"))
    used = set(re.findall(r"\w+", "\n".join(texts.values())))
    assert reached and sorted(set(reached) - used) == []


def test_top_level_holds_only_the_given_shape():
    assert breaks_top_level(repository_files()) == []


def test_tools_judge_by_the_oldest_python_that_the_header_names():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]
    oldest = re.search(r'^# requires-python = ">=(3\.\d+)"$', MODULE.read_text("utf-8"), re.MULTILINE)
    assert oldest
    assert settings["mypy"]["python_version"] == oldest[1]
    assert settings["ruff"]["target-version"] == "py" + oldest[1].replace(".", "")


def test_dependencies_stand_in_the_header_alone():
    header = re.findall(r"^# dependencies = \[(.*)\]$", MODULE.read_text("utf-8"), re.MULTILINE)
    assert len(header) == 1
    names = {re.split(r"[<>=!~ ]", one.strip(' "'))[0].replace("-", "_") for one in header[0].split('", "')}
    assert names == RUN_TIME_PACKAGES
    assert "project" not in tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))


def test_the_websockets_whose_internals_are_overridden_is_the_one_that_was_read():
    """Another version is no fault: compare its `connection_made` and `handshake` with what the Door expects of them."""
    known = re.search(r'^WEBSOCKETS_KNOWN = "(.*?)"', MODULE.read_text("utf-8"), re.MULTILINE)
    assert known and importlib.metadata.version("websockets") == known[1]


def test_lazy_modules_are_those_that_the_type_checker_imports():
    body = tree_of(MODULE.read_text("utf-8")).body
    blocks = [node.body for node in body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    imports = [node for block in blocks for node in block if isinstance(node, ast.Import)]
    known = [alias.name for node in imports for alias in node.names]
    lazy = next(node for node in body if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "_LAZY_NAMES")
    assert list(ast.literal_eval(lazy.value)) == known


# ---------------------------------------------------------------------------- and each rule can be broken


def module(*sections: str, table: str = "", header: str = "import os\n") -> str:
    """A module with sections 1, 2 .. named One: first, Two: second .."""
    titles = ["1. One: first", "2. Two: second", "10. Ten: tenth"]
    parts = [f"{RULE}\n# {title}\n{RULE}\n\n{body}\n" for title, body in zip(titles, sections, strict=False)]
    return f'"""What it is.\n\n{table}"""\n\n{header}' + "\n".join(parts)


GOOD_TABLE = """| #  | section | holds  |
| -- | ------- | ------ |
| 0  | Header  | top    |
| 1  | One     | first  |
| 2  | Two     | second |
"""
GOOD = module(
    "LIMIT = 3\n" + "# Why.\nMORE = 1\n" * 30 + "class A:\n    size: int = LIMIT\n    later: 'B | None' = None",
    "class B(A):\n    def twice(self) -> 'C':\n        os = self.size\n        return [os for open in (1, 2)]",
    table=GOOD_TABLE,
)


def long_function(lines: int, name: str = "f") -> str:
    return f"def {name}():\n" + "    pass\n" * (lines - 1)


BROKEN = [
    (breaks_banners, GOOD.replace(RULE, RULE + "=", 1), "78 signs"),
    (breaks_banners, GOOD.replace(RULE, RULE[:-1], 1), "no rule above"),
    (breaks_banners, GOOD.replace("# 1. One: first", "# 1. One"), "no title"),
    (breaks_banners, GOOD.replace("# 1. One: first", "# One: first"), "without a title"),
    (breaks_banners, GOOD.replace("# 1. One:", "# 2. One:"), "do not rise"),
    (breaks_banners, GOOD.replace("LIMIT = 3", f"{RULE}\n\nLIMIT = 3"), "without a title"),
    (breaks_table, GOOD.replace("| first  |", "| other  |"), "only in the docstring: (1, 'One', 'other')"),
    (breaks_table, GOOD.replace("| 2  | Two     | second |\n", ""), "only as a banner: (2, 'Two', 'second')"),
    (breaks_table, GOOD.replace("| 2  | Two ", "| 3  | Two "), "only in the docstring: (3, "),
    (breaks_table, module("", table="| 1 | One | first |\n| 1 | One | first |\n"), "order"),
    (breaks_upward_order, module("A = B", "B = 1"), "section 1 uses B of section 2"),
    (breaks_upward_order, module("def f():\n    return B()", "class B: ..."), "section 1 uses B of section 2"),
    (breaks_upward_order, module("def f():\n    def g(x=B):\n        ...", "B = 1"), "uses B"),
    (breaks_upward_order, module("def f():\n    return [B for _ in ()]", "B = 1"), "uses B"),
    (breaks_upward_order, module("class A(B): ...", "class B: ..."), "uses B"),
    (breaks_upward_order, module("@b\ndef f(): ...", "def b(f): ..."), "uses b"),
    (breaks_upward_order, module("class A:\n    x = B", "B = 1"), "uses B"),
    (breaks_upward_order, module("def f():\n    global B\n    B += 1", "B = 1"), "uses B"),
    (breaks_upward_order, module("A = nothing"), "nothing that nobody defines"),
    (breaks_purity, module("def f():\n    return os.environ"), "section 1 uses os"),
    (breaks_purity, module("def f():\n    print()"), "uses print"),
    (breaks_purity, module("def f(p):\n    return open(p)"), "uses open"),
    (breaks_purity, module("def f():\n    import time"), "uses time"),
    (breaks_purity, module("def f():\n    from os.path import join"), "uses os"),
    (breaks_purity, module("import asyncio.queues"), "uses asyncio"),
    (breaks_purity, module('def f():\n    return __import__("socket")'), "uses socket"),
    (breaks_purity, module("A = datetime.now()"), "uses datetime.now"),
    (breaks_purity, module("A = Path()"), "uses Path"),
    (breaks_sizes, long_function(FUNCTION_LINES + 1), f"f has {FUNCTION_LINES + 1} lines"),
    (breaks_sizes, "class A:\n    async def f():\n" + "        pass\n" * FUNCTION_LINES, "f has"),
    (breaks_sizes, "class A:\n" + "    pass\n" * CLASS_LINES, f"A has {CLASS_LINES + 1} lines"),
    (breaks_sizes, long_function(36) + long_function(2, "g") * 8, "only 8 of 9"),
    (breaks_density, "a = f(b, c, d, e, g)\n" * 9, "9.11 nodes a line, more than"),
    (breaks_density, "if (a := b):\n    pass\n", "50.00 assignments in expressions in 100 lines"),
    (breaks_density, "a = [b for b in c]\n", "100.00 comprehensions"),
    (breaks_density, "a = b if c else d\n", "100.00 conditional expressions"),
    (breaks_density, "# one\n" + "a = 1\n" * 19, "1 of 20 lines are prose, less than"),
    (breaks_dividers, "class A:\n" + "    pass\n" * DIVIDED_LINES, "lines and no dividers"),
    (breaks_dividers, "class A:\n\n    # One\n" + "    pass\n" * DIVIDED_LINES, "no dividers"),
    (breaks_imports, "import requests", "requests"),
    (breaks_imports, "def f():\n    from yaml.nodes import Node", "yaml"),
    (breaks_imports, 'x = _Lazy("attr.validators")', "attr"),
    (breaks_imports, "from . import other", ""),
    (breaks_names, "def handle_order(): ...", "handle_order"),
    (breaks_names, "class A:\n    async def _process_line(self): ...", "_process_line"),
    (breaks_names, "class RunManager: ...", "RunManager"),
    (breaks_old_pythons, "a = 1\nif (b := a):\n    pass\n", "line 2: Assignment expressions"),
    (breaks_old_pythons, "def f(a, /): pass\n", "line 1: Positional-only"),
    (breaks_old_pythons, "def f():\n    with (\n        a as b,\n    ):\n        pass\n", "line 2: with in"),
    (breaks_old_pythons, "from __future__ import annotations\n", "line 1: annotations"),
    (breaks_annotations, "def f() -> Later: pass\nclass Later: pass\n", "line 1: Later"),
    (breaks_annotations, "class A:\n    def f(self) -> list[A]: pass\n", "line 2: A is"),
    (breaks_annotations, "if TYPE_CHECKING:\n    import ssl\ndef f(a: ssl.SSLContext): pass\n", "line 3: ssl"),
    (breaks_annotations, "a = vars(b).get('__annotations__', {})\n", "line 1: from Python 3.14 on"),
    (breaks_annotations, "if 1:\n    class A:\n        b: A | None = None\n", "line 3: A is"),
    (breaks_map, module("class A: pass", table="Way:\n\n    A.twice    1  moved\n\nEnd.\n"), "A.twice is not"),
    (breaks_map, module("def f(): pass", table="Way:\n\n    f    2  elsewhere\n\nEnd.\n"), "f is not in section 2"),
    (breaks_map, module("", table="A Door is the port, and Gone.method its way.\n"), "called Gone.method"),
    (breaks_map, module("", table="A Door is the port.\n"), "called Door"),
    (breaks_seam, "import estelle_updater as est", "line 1: from tests.seam"),
    (breaks_seam, "def f():\n    from estelle_updater import poll", "line 2: from tests.seam"),
    (breaks_places, "cd /" + "work/main", "main"),
    (breaks_places, "x='/" + "root/.cache'", ".cache'"),
    (breaks_places, "~/.py" + "env/shims", "shims"),
    (breaks_places, "(/" + "home/me/app)", "app)"),
    (breaks_hosts, "https://PyPI" + ".org/simple", "pypi"),
    (breaks_hosts, "registry.npmjs" + ".org", "npmjs"),
    (breaks_words, "# TO" + "DO: later", "TO"),
    (breaks_words, "raise NotImplemented" + "Error", "NotImplemented"),
    (breaks_words, "Co-Authored" + "-By: somebody", "Co-"),
    (breaks_words, "ask Clau" + "de", "Clau"),
    (breaks_words, "see issue" + " #12", "issue"),
    (breaks_words, "fixes" + " #3", "fixes"),
]  # fmt: skip


@pytest.mark.parametrize("rule", MODULE_RULES, ids=lambda rule: rule.__name__)
def test_rule_accepts_good_source(rule: Callable[[str], list[str]]):
    assert rule(GOOD) == []


@pytest.mark.parametrize(("rule", "source", "problem"), BROKEN)
def test_rule_finds_what_breaks_it(rule: Callable[[str], list[str]], source: str, problem: str):
    assert any(problem in found for found in rule(source))


@pytest.mark.parametrize("text", ["/network/", "./work/", "example.net/work/", "the root of /", "~/.local/state"])
def test_paths_that_are_no_places(text: str):
    assert breaks_places(text) == []


def test_shell_sections_may_do_what_pure_ones_may_not():
    shell = module("", "", "def f():\n    import time\n    return os.environ, open(time.time())")
    assert breaks_purity(shell) == []


def test_top_level_rule_finds_a_stray_file():
    assert breaks_top_level(["tests/run", "notes.txt", "docs/a.md", "README.md"]) == ["docs", "notes.txt"]
