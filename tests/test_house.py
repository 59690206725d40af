"""The house: which room imports which, what a folder says of itself, and how long files and functions may be.

The map of the rooms is in .github/CONTRIBUTING.md. The tables below are the only place where the rules are written.
"""

import ast
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "pefttutor"

# What a room imports of the package. The most specific name counts: models.carriers has a rule of its own.
# A folder's __init__ also imports what lies in that folder. A family's methods don't import each other: what two of
# them share moves down to parts.
FAMILIES = ("additive", "selective", "lowrank", "hybrid", "quantized", "serving")
TOOLS = ("widgets", "check", "authoring", "bench")
MAY_IMPORT = {
    "kernels": "kernels",
    "saving.files": "",
    "models.carriers": "",
    "models": "models saving.files",
    "data": "data models.carriers saving.files",
    "parts": "parts kernels data",
    "parts.searching": "",
    "method": "parts kernels data",
    **dict.fromkeys(FAMILIES, "method parts kernels data"),
    "catalog": " ".join(FAMILIES),
    "train": "train method parts kernels data catalog saving.files",
    "diagnosis": "diagnosis method parts kernels data",
    "saving": "saving method parts kernels data catalog",
    "memory": "memory method parts kernels data catalog train.losses",
    **dict.fromkeys(TOOLS, "everything"),
    "__init__": "everything",
}
# What a room imports from outside of the package, besides the standard library; the other rooms import what they need.
FROM_OUTSIDE = {
    "kernels": "torch numpy",
    "data": "torch numpy transformers datasets pyarrow pandas",
    **dict.fromkeys(("parts", "method", *FAMILIES), "torch numpy transformers"),
    "parts.searching": "torch nevergrad",  # the one place that needs what not everybody has installed
}
FACE = (
    "the package's face"  # `import pefttutor`, `from pefttutor import LoRA`: what is loaded lazily, for users
)

FILE_LINES = 260
FUNCTION_LINES = 45  # without the docstring
LONGER_FUNCTIONS = {  # each with its own bound, and a reason
    "memory/training.py estimate": 59,  # the table of a step, one line for each part of the memory
    "memory/encoders.py t5": 51,  # both stacks of an encoder-decoder, read from top to bottom
    "check/ex10_answers.py _step": 48,  # one optimizer step with every known mistake as a branch
    "train/loop.py fit": 62,  # every setting of a run is a keyword of its own, on a line of its own
}

AT_ONCE, LATER, FOR_TYPES = "when it is loaded", "inside a function", "for type checking"
KINDS = (AT_ONCE, LATER, FOR_TYPES)


@dataclass(frozen=True)
class Import:
    """One line that imports."""

    module: str  # who imports, such as "lowrank.lora", without the package's name
    target: str  # a module of the package, such as "parts.modules"; FACE; or another library's name, with outside=True
    kind: str
    line: int
    outside: bool = False

    def __str__(self) -> str:
        what = self.target if self.outside or self.target == FACE else f"pefttutor.{self.target}"
        return f"pefttutor/{self.module.replace('.', '/')}.py:{self.line} imports {what} {self.kind}"


@cache
def parsed(file):
    """The syntax tree of a file, read once."""
    return ast.parse(file.read_text(encoding="utf-8"))


def modules(package):
    """Every file by its dotted name; a folder's own file is "folder.__init__"."""
    return {
        ".".join(file.relative_to(package).with_suffix("").parts): file
        for file in sorted(package.rglob("*.py"))
        if "__pycache__" not in file.parts
    }


def imports(package):
    """All imports of the package's files, those inside functions and those for type checking among them."""
    known = modules(package)
    names = set(known) | {name.removesuffix(".__init__") for name in known}
    return [
        Import(module, target, kind, node.lineno, outside)
        for module, file in known.items()
        for node, kind in _nodes(parsed(file), AT_ONCE)
        for target, outside in _targets(node, module, names)
    ]


def _nodes(node, kind):
    """Import statements below `node`, each with when it is carried out."""
    if isinstance(node, ast.Import | ast.ImportFrom):
        yield node, kind
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) and kind == AT_ONCE:
        kind = LATER
    guarded = isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")
    for child in ast.iter_child_nodes(node):
        yield from _nodes(child, FOR_TYPES if guarded and child in node.body else kind)


def _targets(node, module, names):
    """What an import statement names: (target, whether it is outside of the package)."""
    if isinstance(node, ast.Import):
        full = [alias.name for alias in node.names]
    else:
        folder = ["pefttutor", *module.split(".")][: -node.level] if node.level else []
        start = ".".join([*folder, *([node.module] if node.module else [])])
        full = [f"{start}.{alias.name}" for alias in node.names]
    for name in full:
        first, *rest = name.split(".")
        if first != "pefttutor":
            yield first, True
            continue
        while rest and ".".join(rest) not in names:  # what is left is a name in that module
            rest.pop()
        yield ".".join(rest) or FACE, False


def inside(module, rooms):
    """Whether a module is one of the rooms or lies in one."""
    return any(module == room or module.startswith(f"{room}.") for room in rooms)


def rule(module):
    """The most specific room of MAY_IMPORT in which a module lies, or None."""
    return max((room for room in MAY_IMPORT if inside(module, [room])), key=len, default=None)


def allowed(found):
    """Whether an import goes the right way."""
    if found.outside:
        others = FROM_OUTSIDE.get(rule(found.module))
        return (
            others is None
            or found.target in others.split()
            or found.target in {*sys.stdlib_module_names, "__future__"}
        )
    if found.target == FACE:
        return found.kind == LATER and inside(found.module, TOOLS)
    rooms = MAY_IMPORT[rule(found.module)].split()
    folder = found.module.removesuffix(".__init__")
    own = found.module.endswith(".__init__") and inside(found.target, [folder])
    return own or rooms == ["everything"] or inside(found.target, rooms)


def wrong(package, kind):
    """Lines that import what they should not, without the files that no room has."""
    found = [line for line in imports(package) if line.kind == kind and rule(line.module)]
    return list(dict.fromkeys(str(line) for line in found if not allowed(line)))


def lengths(package):
    """Lines of every "folder/file.py", and of every "folder/file.py function" without its docstring."""
    files, functions = {}, {}
    for file in modules(package).values():
        name = file.relative_to(package).as_posix()
        files[name] = len(file.read_text(encoding="utf-8").splitlines())
        for node in ast.walk(parsed(file)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = node.end_lineno - node.lineno + 1
                if ast.get_docstring(node) is not None:
                    lines -= node.body[0].end_lineno - node.body[0].lineno + 1
                key = f"{name} {node.name}"
                functions[key] = max(lines, functions.get(key, 0))
    return files, functions


def too_long(package):
    """Files and functions above their bounds, and exceptions that nothing needs any more."""
    files, functions = lengths(package)
    found = [f"{name}: {n} lines, at most {FILE_LINES}" for name, n in files.items() if n > FILE_LINES]
    for name, n in functions.items():
        bound = LONGER_FUNCTIONS.get(name, FUNCTION_LINES)
        if n > bound:
            found.append(f"{name}: {n} lines without its docstring, at most {bound}")
    return found


def without_words(package):
    """Folders of Python files that have no __init__, or whose __init__ doesn't say what lives there."""
    found = []
    for folder in sorted({file.parent for file in modules(package).values()}):
        file = folder / "__init__.py"
        words = (ast.get_docstring(parsed(file)) or "") if file.exists() else ""
        if len(words.split()) < 10:
            found.append(f"pefttutor/{file.relative_to(package).as_posix()}: {words!r}")
    return found


# ---- the house as it stands


@pytest.mark.parametrize("kind", KINDS)
def test_imports_go_down_only(kind):
    assert "\n".join(wrong(PACKAGE, kind)) == ""


def test_every_file_lies_in_a_room():
    assert [module for module in modules(PACKAGE) if rule(module) is None] == []


def test_every_folder_says_what_lives_there():
    assert without_words(PACKAGE) == []


def test_files_and_functions_are_short():
    assert "\n".join(too_long(PACKAGE)) == ""


def test_no_exception_outlives_its_reason():
    functions = lengths(PACKAGE)[1]
    assert [name for name in LONGER_FUNCTIONS if functions.get(name, 0) <= FUNCTION_LINES] == []


def test_the_map_names_every_room():
    text = (PACKAGE.parent / ".github" / "CONTRIBUTING.md").read_text(encoding="utf-8")
    rooms = {module.removesuffix(".__init__").split(".")[0] for module in modules(PACKAGE)} - {"__init__"}
    missing = {r for r in rooms if f"`{r}/`" not in text and f"`{r}.py`" not in text}
    assert missing == set()


# ---- the rules, each on a house with one fault in it

FAULTS = [
    ("kernels/k.py", "from pefttutor.parts import modules", "pefttutor.parts.modules when it is loaded"),
    (
        "kernels/k.py",
        "def f():\n    import pefttutor.data.batches",
        "pefttutor.data.batches inside a function",
    ),
    ("kernels/k.py", "import transformers", "transformers when it is loaded"),
    ("data/d.py", "from pefttutor.kernels import k", "pefttutor.kernels when it is loaded"),
    ("data/d.py", "from pefttutor.models.loading import load", "pefttutor.models.loading when it is loaded"),
    ("data/d.py", "import peft", "peft when it is loaded"),
    ("models/m.py", "from pefttutor import data", "pefttutor.data when it is loaded"),
    (
        "models/carriers.py",
        "from pefttutor.models import loading",
        "pefttutor.models.loading when it is loaded",
    ),
    ("saving/files.py", "from ..parts import modules", "pefttutor.parts.modules when it is loaded"),
    ("parts/p.py", "from pefttutor import method as base", "pefttutor.method when it is loaded"),
    ("parts/p.py", "from pefttutor.lowrank.lora import LoRA", "pefttutor.lowrank.lora when it is loaded"),
    (
        "parts/p.py",
        "if TYPE_CHECKING:\n    from pefttutor.method import Method",
        "pefttutor.method for type checking",
    ),
    ("method.py", "from pefttutor.train import losses", "pefttutor.train.losses when it is loaded"),
    ("lowrank/x.py", "from pefttutor.lowrank.lora import LoRA", "pefttutor.lowrank.lora when it is loaded"),
    ("lowrank/x.py", "from . import lora", "pefttutor.lowrank.lora when it is loaded"),
    (
        "lowrank/x.py",
        "def f():\n    from pefttutor.selective import BitFit",
        "pefttutor.selective inside a function",
    ),
    ("hybrid/__init__.py", "from pefttutor.lowrank import lora", "pefttutor.lowrank.lora when it is loaded"),
    ("train/t.py", "from pefttutor.memory import step", "pefttutor.memory.step when it is loaded"),
    ("train/t.py", "from pefttutor import LoRA", f"{FACE} when it is loaded"),
    ("saving/s.py", "def f():\n    import pefttutor", f"{FACE} inside a function"),
    ("memory/m.py", "from pefttutor.train.loop import fit", "pefttutor.train.loop when it is loaded"),
    ("memory/m.py", "from pefttutor.bench.row import Row", "pefttutor.bench.row when it is loaded"),
    ("check/c.py", "import pefttutor", f"{FACE} when it is loaded"),
    ("widgets/w.py", "if TYPE_CHECKING:\n    from pefttutor import LoRA", f"{FACE} for type checking"),
]
RIGHT = [
    ("kernels/k.py", "import math\nimport torch\nfrom pefttutor.kernels.threads import share"),
    ("data/d.py", "from pefttutor.models.carriers import root\nfrom pefttutor.saving.files import write"),
    ("lowrank/__init__.py", "from pefttutor.lowrank.lora import LoRA"),
    (
        "lowrank/x.py",
        "import transformers\nfrom pefttutor import method as base\nfrom pefttutor.parts import modules",
    ),
    ("memory/m.py", "from pefttutor.train.losses import causal_lm_loss"),
    ("bench/b.py", "from pefttutor.lowrank.lora import LoRA\ndef f():\n    import pefttutor"),
]
ROOMS_OF_THE_HOUSE = (
    "kernels/threads data/batches models/loading models/carriers saving/files parts/modules method lowrank/lora "
    "selective/bitfit train/losses train/loop memory/step bench/row"
)


def house(folder, name, text):
    """A small house of empty files, one of which has the text."""
    for room in ROOMS_OF_THE_HOUSE.split():
        file = folder / f"{room}.py"
        file.parent.mkdir(exist_ok=True)
        file.write_text("")
        (file.parent / "__init__.py").write_text("")
    file = folder / name
    file.parent.mkdir(exist_ok=True)
    file.write_text(text)
    return folder


@pytest.mark.parametrize(("name", "text", "what"), FAULTS)
def test_a_wrong_direction_is_found_and_named(tmp_path, name, text, what):
    found = [line for kind in KINDS for line in wrong(house(tmp_path, name, text), kind)]
    assert found == [f"pefttutor/{name}:{text.count(chr(10)) + 1} imports {what}"]


@pytest.mark.parametrize(("name", "text"), RIGHT)
def test_a_right_direction_is_let_through(tmp_path, name, text):
    assert [line for kind in KINDS for line in wrong(house(tmp_path, name, text), kind)] == []


def test_length_and_silence_are_found(tmp_path):
    (tmp_path / "parts").mkdir()
    (tmp_path / "__init__.py").write_text('"""' + "word " * 10 + '"""')
    (tmp_path / "parts" / "p.py").write_text("x = 1\n" * (FILE_LINES + 1))
    body = '    """\n' + "    word\n" * 90 + '    """\n' + "    x = 1\n" * FUNCTION_LINES
    (tmp_path / "method.py").write_text(
        f"class C:\n  def f():\n{body}  def g():\n{body.split('x')[0]}x = 2\n"
    )
    assert too_long(tmp_path) == [
        f"parts/p.py: {FILE_LINES + 1} lines, at most {FILE_LINES}",
        f"method.py f: {FUNCTION_LINES + 1} lines without its docstring, at most {FUNCTION_LINES}",
    ]
    assert without_words(tmp_path) == ["pefttutor/parts/__init__.py: ''"]
