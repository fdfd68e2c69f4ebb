"""Rules that hold for the whole repository, read from its files; and the one test command."""

import ast
import graphlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path, PurePosixPath

import pytest

ROOT = Path(__file__).resolve().parent.parent
SIZE_LIMIT = 1_000_000  # bytes

# Which of our packages a package may import; a stage script is any .py file in the project root.
ALLOWED_IMPORTS = {  # by package; each may import itself
    "common": set(),
    "model": {"common"},
    "dataset": {"common", "model"},  # of model/ only the tokenizer's loading
    "diagnosis": {"common", "model"},
    "training": {"common", "dataset", "diagnosis", "model"},
    "inference": {"common", "dataset", "model"},
    "export": {"common", "diagnosis", "inference", "model"},
    "sample_world": {"common", "dataset"},
    "stage script": {
        *("common", "dataset", "diagnosis", "inference", "model", "sample_world", "training")
    },
}
OUR_PACKAGES = {*ALLOWED_IMPORTS, "scripts", "benchmarks", "tests"} - {"stage script"}


@pytest.fixture(scope="module")
def project_files() -> list[Path]:
    """Every file that git tracks or would track."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("needs a git checkout")
    command = ["git", "ls-files", "-co", "--exclude-standard", "-z"]
    listing = subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout
    files = [ROOT / name for name in listing.decode("utf-8").split("\0") if name]
    return [file for file in files if file.is_file()]


@pytest.fixture(scope="module")
def sources(project_files: list[Path]) -> dict[str, ast.Module]:
    """The syntax tree of every .py file, by its path from the root."""
    return {
        file.relative_to(ROOT).as_posix(): ast.parse(file.read_text(encoding="utf-8"))
        for file in project_files
        if file.suffix == ".py"
    }


# A check takes what it looks at and returns what is wrong with it: so it can be shown to fail.


def oversized(files: list[Path], limit: int) -> list[str]:
    return [f"{file}: {file.stat().st_size} bytes" for file in files if file.stat().st_size > limit]


def is_constant(node: ast.AST | None, value: object) -> bool:
    return isinstance(node, ast.Constant) and node.value is value


def forbidden_constructs(tree: ast.AST) -> list[str]:
    """`strict=False` (also as load_state_dict's second argument), bare except, `type=bool`."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ExceptHandler) and node.type is None:
            found.append(f"{node.lineno}: bare except")
        if not isinstance(node, ast.Call):
            continue
        for keyword in node.keywords:
            if keyword.arg == "strict" and is_constant(keyword.value, False):
                found.append(f"{node.lineno}: strict=False")
            if keyword.arg == "type" and getattr(keyword.value, "id", None) == "bool":
                found.append(f"{node.lineno}: type=bool")
        is_load = isinstance(node.func, ast.Attribute) and node.func.attr == "load_state_dict"
        if is_load and len(node.args) > 1 and is_constant(node.args[1], False):
            found.append(f"{node.lineno}: strict=False")
    return found


# Position of `mode` and of `encoding` among the arguments, and the default mode.
OPEN = (0, 2, "r")  # Path.open
OPENERS = {
    "builtins.open": (1, 3, "r"),
    "io.open": (1, 3, "r"),
    "os.fdopen": (1, 3, "r"),
    "gzip.open": (1, 3, "rb"),
    "tempfile.NamedTemporaryFile": (0, 2, "w+b"),
    "tempfile.TemporaryFile": (0, 2, "w+b"),
}
NOT_TEXT_FILES = {"os", "tarfile", "zipfile", "webbrowser", "wave", "Image", "dbm", "shelve"}


def opens_without_encoding(tree: ast.AST) -> list[str]:
    """Calls that open, read or write a file as text and leave its encoding to the machine."""
    found = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        if isinstance(node.func, ast.Attribute):
            owner = getattr(node.func.value, "id", "")
            name = node.func.attr
        else:
            owner, name = "builtins", getattr(node.func, "id", "")
            if name in {"NamedTemporaryFile", "TemporaryFile"}:
                owner = "tempfile"
        if f"{owner}.{name}" in OPENERS:
            mode_at, encoding_at, default_mode = OPENERS[f"{owner}.{name}"]
        elif name == "open" and owner not in NOT_TEXT_FILES:
            mode_at, encoding_at, default_mode = OPEN
        elif name in {"read_text", "write_text"}:
            mode_at, encoding_at, default_mode = None, int(name == "write_text"), "r"
        else:
            continue
        keywords = {keyword.arg: keyword.value for keyword in node.keywords}
        mode = keywords.get("mode")
        if mode is None and mode_at is not None and len(node.args) > mode_at:
            mode = node.args[mode_at]
        binary = "b" in (mode.value if isinstance(mode, ast.Constant) else default_mode)
        if owner == "gzip":  # "r" means bytes there
            binary = not (isinstance(mode, ast.Constant) and "t" in mode.value)
        encoding = keywords.get("encoding")
        if encoding is None and len(node.args) > encoding_at:
            encoding = node.args[encoding_at]
        hands_on = None in keywords or any(isinstance(item, ast.Starred) for item in node.args)
        if not binary and not hands_on and (encoding is None or is_constant(encoding, None)):
            found.append(f"{node.lineno}: {name} without encoding=")
    return found


def wrong_imports(path: str, tree: ast.AST) -> list[str]:
    """Imports of our own packages that point against the direction of ALLOWED_IMPORTS."""
    parts = PurePosixPath(path).parts
    importer = parts[0] if len(parts) > 1 else "stage script"
    if importer not in ALLOWED_IMPORTS:
        return []
    imported = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported += [(node.lineno, alias.name.split(".")) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            package = list(parts[:-1])[: len(parts) - node.level] if node.level else []
            module = package + (node.module.split(".") if node.module else [])
            if module:
                imported.append((node.lineno, module))
            else:  # `from .. import dataset` in model/
                imported += [(node.lineno, [alias.name]) for alias in node.names]
    stages = {file.stem for file in ROOT.glob("*.py")}
    return [
        f"{line}: {importer} imports {'.'.join(module)}"
        for line, module in imported
        if module[0] in (OUR_PACKAGES | stages) - ALLOWED_IMPORTS[importer] - {importer}
    ]


def import_circle(sources: dict[str, ast.Module]) -> list[str]:
    """Modules that import each other in a circle, imports for type checkers included."""
    modules = {
        path.removesuffix(".py").removesuffix("/__init__").replace("/", "."): path
        for path in sources
    }
    graph: dict[str, set[str]] = {}
    for module, path in modules.items():
        folders = list(PurePosixPath(path).parent.parts)
        imported = set()
        for node in ast.walk(sources[path]):
            if isinstance(node, ast.Import):
                imported |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                package = folders[: len(folders) - node.level + 1] if node.level else []
                base = ".".join(package + ([node.module] if node.module else []))
                names = {f"{base}.{alias.name}" for alias in node.names}
                imported |= names & modules.keys() or {base}
        graph[module] = (imported & modules.keys()) - {module}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return error.args[1]
    return []


def test_no_file_is_large(project_files):
    assert oversized(project_files, SIZE_LIMIT) == []


def test_a_large_file_is_found(tmp_path):
    (tmp_path / "small").write_bytes(b"12345678")
    (tmp_path / "large").write_bytes(b"123456789")
    found = oversized([tmp_path / "small", tmp_path / "large"], 8)
    assert found == [f"{tmp_path / 'large'}: 9 bytes"]


def test_json_files_are_valid(project_files):
    for file in project_files:
        if file.suffix == ".json":
            json.loads(file.read_text(encoding="utf-8"))


def test_no_forbidden_constructs(sources):
    found = {path: forbidden_constructs(tree) for path, tree in sources.items()}
    assert {path: lines for path, lines in found.items() if lines} == {}


@pytest.mark.parametrize(
    ("source", "wrong"),
    [
        ("model.load_state_dict(w, strict=False)", ["1: strict=False"]),
        ("model.load_state_dict(w, False)", ["1: strict=False"]),
        ("model.load_state_dict(w, strict=True)", []),
        ("text = 'strict=False type=bool except:'", []),
        ("parser.add_argument('--x', type=bool)", ["1: type=bool"]),
        ("parser.add_argument('--x', type=int)", []),
        ("try:\n    pass\nexcept:\n    pass", ["3: bare except"]),
        ("try:\n    pass\nexcept OSError:\n    pass", []),
    ],
)
def test_forbidden_constructs_are_found(source, wrong):
    assert forbidden_constructs(ast.parse(source)) == wrong


def test_text_files_are_opened_with_an_encoding(sources):
    found = {path: opens_without_encoding(tree) for path, tree in sources.items()}
    assert {path: lines for path, lines in found.items() if lines} == {}


@pytest.mark.parametrize(
    "source",
    [
        "open(p)",
        "open(p, 'w')",
        "open(p, mode='a', newline='')",
        "open(p, encoding=None)",
        "open(p, mode)",
        "p.open()",
        "p.open('w')",
        "folder().open('r')",
        "p.read_text()",
        "p.write_text('b')",
        "io.open(p)",
        "os.fdopen(1, 'w')",
        "gzip.open(p, 'rt')",
        "tempfile.NamedTemporaryFile('w', delete=False)",
    ],
)
def test_an_open_without_encoding_is_found(source):
    assert opens_without_encoding(ast.parse(source)) != []


@pytest.mark.parametrize(
    "source",
    [
        "open(p, encoding='utf-8')",
        "open(p, 'r', 1, 'utf-8')",
        "open(p, 'rb')",
        "open(p, mode='wb')",
        "open(p, **options)",
        "p.open(encoding='utf-8')",
        "p.open('ab')",
        "p.read_text('utf-8')",
        "p.write_text('b', encoding='utf-8')",
        "p.read_bytes()",
        "gzip.open(p)",
        "gzip.open(p, 'rt', encoding='utf-8')",
        "os.open(p, os.O_RDONLY)",
        "tempfile.NamedTemporaryFile()",
    ],
)
def test_an_open_with_encoding_or_bytes_passes(source):
    assert opens_without_encoding(ast.parse(source)) == []


def test_imports_point_one_way(sources):
    found = {path: wrong_imports(path, tree) for path, tree in sources.items()}
    assert {path: lines for path, lines in found.items() if lines} == {}


def test_no_imports_go_in_a_circle(sources):
    assert import_circle(sources) == []


def test_a_circle_of_imports_is_found():
    sources = {
        "model/__init__.py": "from .model import MiniMindLM",
        "model/model.py": "from . import decoder",
        "model/decoder.py": "if TYPE_CHECKING:\n    from .model import MiniMindLM",
    }
    trees = {path: ast.parse(text) for path, text in sources.items()}
    assert set(import_circle(trees)) == {"model.model", "model.decoder"}
    trees["model/decoder.py"] = ast.parse("import torch")
    assert import_circle(trees) == []


@pytest.mark.parametrize(
    ("path", "source", "allowed"),
    [
        ("model/model.py", "from .LMConfig import LMConfig", True),
        ("model/model.py", "from model.LMConfig import LMConfig", True),
        ("model/model.py", "import torch, dataset.chat", False),
        ("model/model.py", "from ..dataset import chat", False),
        ("model/model.py", "from .. import dataset", False),
        ("model/model.py", "from .dataset import x", True),
        ("model/deep/layer.py", "from ..model import x", True),
        ("model/deep/layer.py", "from ...training import x", False),
        ("dataset/chat.py", "def f():\n    from diagnosis import plan", False),
        ("dataset/chat.py", "import training.schedule as s", False),
        ("training/checkpoint.py", "from model import LMConfig", True),
        ("training/checkpoint.py", "from inference import packing", False),
        ("training/checkpoint.py", "import train_pretrain", False),
        ("train_new.py", "from dataset import packing\nimport model, training", True),
        ("train_new.py", "from scripts import serve", False),
        ("scripts/serve.py", "import model, dataset, training", True),
    ],
)
def test_an_import_against_the_direction_is_found(path, source, allowed, tmp_path, monkeypatch):
    (tmp_path / "train_pretrain.py").touch()
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    assert (wrong_imports(path, ast.parse(source)) == []) == allowed


# The test command, in a project of its own: a copy of the script and empty requirements.


@pytest.fixture
def small_project(tmp_path) -> Path:
    for folder in ("dataset", "scripts", "tests"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "requirements.txt").touch()
    (tmp_path / "requirements.txt").touch()
    (tmp_path / "constraints.txt").touch()
    for script in ("test.py", "environment.py"):
        shutil.copy(ROOT / "scripts" / script, tmp_path / "scripts")
    return tmp_path


def run_test_command(project: Path, before: str = "pass") -> subprocess.CompletedProcess:
    """Run the copied test command in a fresh interpreter, after the statement `before`."""
    scripts = project / "scripts"  # on the path, as when the script is run
    script = str(scripts / "test.py")
    code = f"import runpy, sys; {before}; sys.argv = [{script!r}]; "
    code += f"sys.path.insert(0, {str(project / 'scripts')!r}); "
    code += f"runpy.run_path({script!r}, run_name='__main__')"
    return subprocess.run(
        [sys.executable, "-c", code], cwd=scripts, capture_output=True, encoding="utf-8"
    )


@pytest.mark.parametrize(
    ("before", "message"),
    [
        ("sys.version_info = (3, 9, 18)", "needs Python 3.10 or newer"),
        ("sys.modules['venv'] = None", "lacks the venv module"),
        ("sys.modules['ensurepip'] = None", "lacks the venv module"),
    ],
)
def test_an_unfit_interpreter_is_told_in_one_line(small_project, before, message):
    result = run_test_command(small_project, before)
    assert result.returncode == 2
    assert message in result.stderr and result.stderr.count("\n") == 1
    assert not (small_project / ".venv").exists()


def test_a_foreign_folder_named_venv_is_left_alone(small_project):
    treasure = small_project / ".venv" / "treasure.txt"
    treasure.parent.mkdir()
    treasure.write_text("mine", encoding="utf-8")
    result = run_test_command(small_project)
    assert result.returncode == 2
    assert "is in the way" in result.stderr and result.stderr.count("\n") == 1
    assert treasure.read_text(encoding="utf-8") == "mine"


def test_a_broken_environment_is_made_anew_and_then_reused(small_project):
    venv = small_project / ".venv"
    binaries = venv / ("Scripts" if os.name == "nt" else "bin")
    binaries.mkdir(parents=True)
    (venv / "pyvenv.cfg").write_text("home = /nowhere\n", encoding="utf-8")
    (binaries / ("python.exe" if os.name == "nt" else "python")).write_bytes(b"broken")

    first = run_test_command(small_project)  # nothing is required, so ruff is missing: status 1
    assert first.returncode == 1
    assert "No module named ruff" in first.stderr
    assert "failed with status 1: ruff format --check ." in first.stderr
    stamp = (venv / "installed.sha256").read_text(encoding="utf-8")

    (venv / "kept").touch()
    second = run_test_command(small_project)
    assert second.returncode == 1 and (venv / "kept").exists()
    (small_project / "constraints.txt").write_text("# changed\n", encoding="utf-8")
    third = run_test_command(small_project)
    assert third.returncode == 1 and (venv / "kept").exists()
    assert (venv / "installed.sha256").read_text(encoding="utf-8") != stamp
